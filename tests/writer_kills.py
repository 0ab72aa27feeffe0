"""Kill every data writer at random moments, finish with the same command, and compare with an uninterrupted run.

    python tests/writer_kills.py [--kills 10] [--seed 0] [--writers pack merge ...]

prints a table and ends with 1 unless all results are equal to the byte. A trial is killed (-9) at a random moment, then
once more with probability 1/2. Processes are forked from this one, which has imported everything, so that a trial takes
about as long as its writer.
"""

import argparse
import contextlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from prepared_tree import write_prepared
from raw_tree import annotation_file, make_raw_tree

from dataset.prepare import command, fit_mano, pack, split
from dataset.synthetic import synthesize
from manopth import recordings
from utils.distributed import use_one_thread


class Writer(NamedTuple):
    main: Callable
    arguments: list[str]  # '{}' is the trial's folder
    given: str | None = None  # folder with which a trial begins


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def start(main: Callable, arguments: list[str], prepare: Callable[[], None] = lambda: None) -> int:
    """Run a command in a forked process -> its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            prepare()
            with contextlib.redirect_stdout(io.StringIO()):
                code = main(arguments)
        finally:
            os._exit(code)
    return pid


def finish(pid: int) -> int:
    """Exit code of a forked process; minus the signal's number if one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def mute() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def writers(root: Path) -> dict[str, Writer]:
    """Every writer with its tiny input, which this writes under ``root``."""
    split.CHUNK, pack.CHUNK, recordings.BATCH_TIME_STEPS['cpu'] = 2, 2, 2
    make_raw_tree(root / 'raw', steps=6)
    write_prepared(root / 'prepared', 'train', 12)
    (root / 'empty').mkdir()
    shutil.copytree(root / 'raw', root / 'unfitted')
    annotation_file(root / 'unfitted', 'MANO_NeuralAnnot').unlink()
    hands = ['MANO.SOURCE', 'standin']
    preparing = ['--data_path', str(root / 'raw'), '--save_path', '{}/out', '--workers', '1']
    for shard in ('1/3', '2/3', '3/3'):
        arguments = [word.format(root / 'shards') for word in preparing]
        assert finish(start(command.main, [*arguments, '--shard', shard, *hands], mute)) == 0
    return {
        'prepare': Writer(command.main, [*preparing, *hands]),
        'shard': Writer(command.main, [*preparing, '--shard', '2/3', *hands]),
        'merge': Writer(command.main, [*preparing, '--merge', *hands], 'shards'),
        'pack': Writer(pack.main, ['--data_path', str(root / 'prepared'), '--save_path', '{}/out', '--workers', '1']),
        'synthesize': Writer(
            synthesize.main, ['--save_path', '{}/out', '--frames', '8', '2', '0', '--workers', '1', *hands]
        ),
        'fit': Writer(fit_mano.main, ['--data_path', '{}', *hands, 'DEVICE', 'cpu'], 'unfitted'),
    }


def kill(writer: Writer, root: Path, trial: Path, moments: list[float]) -> int:
    """Run in ``trial``, killed after each of ``moments`` (s), then to the end -> number of kills that hit."""
    arguments = [word.format(trial) for word in writer.arguments]
    shutil.copytree(root / (writer.given or 'empty'), trial)
    hits = 0
    for moment in moments:
        pid = start(writer.main, arguments, mute)
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
        hits += finish(pid) == -signal.SIGKILL
    code = finish(start(writer.main, arguments, mute))
    if code:
        raise SystemExit(f'{arguments}: exit code {code} after kills at {moments}')
    return hits


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=10, help='trials per writer (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--writers', nargs='+', metavar='NAME', help='default: all')
    args = parser.parse_args(argv)
    use_one_thread()
    draw, unequal = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        every = writers(root)
        print(f'{"writer":12}{"seconds":>8}{"trials":>8}{"kills":>8}{"equal":>8}')
        for name in args.writers or every:
            writer = every[name]
            begin = time.monotonic()
            kill(writer, root, root / f'{name}-whole', [])
            seconds, hits, equal = time.monotonic() - begin, 0, 0
            for number in range(args.kills):
                trial = root / f'{name}-{number}'
                moments = [draw.uniform(0, 0.8 * seconds) for _ in range(draw.choice((1, 2)))]
                hits += kill(writer, root, trial, moments)
                found, expected = contents(trial), contents(root / f'{name}-whole')
                equal += found == expected
                for path in sorted(path for path in found | expected if found.get(path) != expected.get(path)):
                    print(f'{name}, killed after {moments} s: {path} differs')
                shutil.rmtree(trial)
            print(f'{name:12}{seconds:>8.2f}{args.kills:>8}{hits:>8}{equal:>8}', flush=True)
            unequal += args.kills - equal
    return int(unequal > 0)


if __name__ == '__main__':
    sys.exit(main())
