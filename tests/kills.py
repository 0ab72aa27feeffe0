"""Kill a training at random moments, resume it, and compare it bit by bit with a run that nothing disturbed.

    python tests/kills.py --out /dev/shm/kills [--first 0] [--count 50] [--results kills.md]

A trial starts a tiny training, sends one signal (KILL, TERM, INT, USR1, HUP) to one process, to torchrun or to every
process of the job as a scheduler does, continues with ``--resume auto`` at once, and requires: the exit code that
docs/scaling.md promises; no traceback of ours; nothing left running; in the end the weights, optimizer state, figures
and best.pth of the undisturbed run with the same number of processes, equal to the bit, and every step in log.jsonl
once. A signal that comes after the end of a run counts as missed, and its trial is repeated at another moment.

Trials are numbered, and a number with a seed determines its trial, so that parts can run elsewhere. A minute of a core
each; memory as /dev/shm takes 1 GB.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

from tiny import TRAINING

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# fmt: off
TINY = [
    *TRAINING, 'MODEL.STAGES', '1', 'TRAIN.BATCH_SIZE', '4', 'TRAIN.EPOCHS', '3', 'TRAIN.VALIDATE_EVERY', '1',
    'TRAIN.PICTURES', '2', 'TRAIN.LOG_EVERY', '1', 'TRAIN.SAVE_EVERY', '2', 'TRAIN.EMA', '0.9', 'EVAL.BATCH_SIZE', '2',
]
# fmt: on
TRAIN_SAMPLES, VAL_SAMPLES, STEPS = 12, 6, 9
PATIENCE_S = 300.0
ENDING_S = 5.0
MOST_ATTEMPTS = 5  # at a trial whose signal comes after the end of the run


class Setting(NamedTuple):
    processes: int
    workers: int
    target: str  # 'process': one of them; 'torchrun': their launcher; 'job': all, with loader processes and launcher
    moment: str  # 'any', 'start-up', 'save' or 'validation'


SETTINGS = (
    Setting(1, 0, 'process', 'any'),
    Setting(1, 2, 'job', 'any'),
    Setting(1, 2, 'process', 'save'),
    Setting(1, 0, 'job', 'validation'),
    Setting(1, 2, 'process', 'start-up'),
    Setting(2, 0, 'torchrun', 'any'),
    Setting(2, 2, 'job', 'any'),
    Setting(2, 2, 'torchrun', 'save'),
    Setting(2, 0, 'process', 'validation'),
    Setting(2, 2, 'torchrun', 'start-up'),
)


class Trial(NamedTuple):
    number: int
    setting: Setting
    signal: signal.Signals
    random: random.Random


def trial(number: int, seed: int = 0, attempt: int = 0) -> Trial:
    """Trial ``number``; 50 in a row combine every setting with every signal. ``attempt`` draws another moment."""
    setting = SETTINGS[number % len(SETTINGS)]
    sent = SIGNALS[(number // len(SETTINGS) + number) % len(SIGNALS)]
    return Trial(number, setting, sent, random.Random(f'{seed} {number} {attempt}'))


class Job:
    """A training in processes of its own."""

    def __init__(self, data: Path, out: Path, setting: Setting, *more: str):
        words = [*TINY, 'DATASET.PATH', str(data), 'OUTPUT_DIR', str(out), 'TRAIN.WORKERS', str(setting.workers), *more]
        command = [sys.executable, 'train.py', *words]
        if setting.processes > 1:
            launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(setting.processes)]
            command[1:1] = launcher
        self.out, self.begin = out, time.monotonic()
        self.output = out.with_suffix('.log').open('w+')
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONDONTWRITEBYTECODE': '1'},
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def text(self) -> str:
        return self.out.with_suffix('.log').read_bytes().decode(errors='replace')  # which keeps carriage returns

    def members(self) -> list[int]:
        """Ids of all its processes; loader processes have the command line of the process that forked them."""
        return [pid for pid, words in command_lines() if str(self.out) in words]

    def lasting_members(self) -> list[int]:
        """Its processes that are still there after seconds: loader processes look for their parent once a second."""
        deadline = time.monotonic() + ENDING_S
        while (left := self.members()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def ranks(self) -> list[int]:
        """Ids of the processes that train."""
        if 'torch.distributed.run' not in self.process.args:
            return [self.process.pid]
        return [pid for pid in self.members() if parent(pid) == self.process.pid]

    def wait(self, timeout: float = PATIENCE_S) -> int:
        code = self.process.wait(timeout)
        self.output.close()
        return code

    def end(self) -> None:
        """Kill whatever is left of it."""
        for pid in self.members():
            send(pid, signal.SIGKILL)
        self.process.wait()


def command_lines() -> Iterator[tuple[int, list[str]]]:
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            words = (folder / 'cmdline').read_bytes().decode(errors='replace').split('\0')
            if (folder / 'stat').read_text().rpartition(')')[2].split()[0] != 'Z':
                yield int(folder.name), words
        except OSError:  # it has ended
            continue


def parent(pid: int) -> int | None:
    try:
        return int(Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[1])
    except OSError:
        return None


def send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def moment_reached(job: Job, trial: Trial, whole_s: float, start_s: float) -> None:
    """Wait for the trial's moment, or for the end of the job."""
    moment, delay = trial.setting.moment, trial.random.random()
    if moment == 'any':
        until = job.begin + delay * whole_s
    elif moment == 'start-up':
        until = job.begin + delay * start_s
    else:
        nth = trial.random.randrange(3)  # of the saves or validations
        seen = 0
        was = False
        while job.running and seen <= nth:
            now = any(job.out.glob('.latest.pth.*')) if moment == 'save' else in_validation(job)
            seen, was = seen + (now and not was), now
            time.sleep(0.001)
        until = time.monotonic() + 0.05 * delay
    while job.running and time.monotonic() < until:
        time.sleep(0.001)


def in_validation(job: Job) -> bool:
    """Whether the console shows the validation's progress."""
    return job.text.rpartition('\r')[2].startswith('validate')


def strike(job: Job, trial: Trial) -> None:
    setting, number = trial.setting, trial.signal
    if setting.target == 'job':
        for pid in job.members():
            send(pid, number)
    elif setting.target == 'torchrun' or setting.processes == 1:
        send(job.process.pid, number)
    else:
        ranks = job.ranks()
        send(trial.random.choice(ranks) if ranks else job.process.pid, number)


def expected_codes(trial: Trial) -> set[int]:
    """The exit codes that the process we started may have; 0 if the signal came after the end of the work (missed)."""
    number, setting = trial.signal, trial.setting
    if setting.processes == 1:
        # A negative code: Python itself had not started yet.
        return {-number} if number == signal.SIGKILL else {128 + number, -number, 0}
    # torchrun has codes of its own: 1 for whatever ended its processes, and it ignores USR1 as little as KILL.
    return {1, 0, -number}


class Reference(NamedTuple):
    """A run that nothing disturbed."""

    out: Path
    whole_s: float
    start_s: float  # until its first step


def reference(data: Path, out: Path, processes: int) -> Reference:
    job = Job(data, out, Setting(processes, 0, 'process', 'any'))
    while job.running and not steps_of(out):
        time.sleep(0.01)
    start_s = time.monotonic() - job.begin
    if job.wait():
        raise SystemExit(f'The undisturbed run failed:\n{job.text}')
    return Reference(out, time.monotonic() - job.begin, start_s)


def records(out: Path, kind: str) -> list[dict]:
    path = out / 'log.jsonl'
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if record['kind'] == kind]


def steps_of(out: Path) -> list[int]:
    try:
        return [record['step'] for record in records(out, 'train')]
    except ValueError:  # a line that is being written
        return []


def differences(a: Path, b: Path, *, steps: int = STEPS) -> list[str]:
    """Where two finished runs differ."""
    found = []
    for name in ('latest.pth', 'best.pth'):
        one, other = (torch.load(folder / name, map_location='cpu', weights_only=True) for folder in (a, b))
        for content in (one, other):
            content['progress'].pop('seconds')
            content.pop('record')
            content['config'].pop('OUTPUT_DIR')
            for key in ('WORKERS', 'SAVE_EVERY', 'CHECKPOINT'):
                content['config']['TRAIN'].pop(key)
        found += [f'{name}: {key}' for key in unequal(one, other)]
    if steps_of(b) != list(range(1, steps + 1)):
        found.append(f'steps in the log: {steps_of(b)}')
    for stage in range(2):
        one, other = (records(folder, f'val_stage{stage}') for folder in (a, b))
        if one != other:
            found.append(f'validation figures of stage {stage}')
    return found


def unequal(a, b, path: str = '') -> Iterator[str]:
    """Keys of the leaves in which two nested containers differ; NaN equals nothing."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from unequal(a[key], b[key], f'{path}.{key}')
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for number, pair in enumerate(zip(a, b)):
            yield from unequal(*pair, f'{path}[{number}]')
    elif not (torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b):
        yield path


class Result(NamedTuple):
    trial: Trial
    after_s: float
    steps: int  # in the log at that moment
    code: int
    problems: list[str]

    @property
    def missed(self) -> bool:
        """Whether the run was over before the signal came, which tests nothing."""
        return self.code == 0 and not self.problems

    def row(self) -> str:
        setting = self.trial.setting
        cells = (
            self.trial.number,
            setting.processes,
            setting.workers,
            self.trial.signal.name.removeprefix('SIG'),
            setting.target,
            setting.moment,
            f'{self.after_s:.2f}',
            self.steps,
            self.code,
            '; '.join(self.problems) or 'equal to the bit',
        )
        return f'| {" | ".join(map(str, cells))} |'


HEADER = """| trial | processes | workers | signal | to | moment | after, s | steps done | exit code | resumed run |
|---:|---:|---:|---|---|---|---:|---:|---:|---|"""


def run(trial: Trial, data: Path, out: Path, whole: Reference) -> Result:
    problems = []
    job = Job(data, out, trial.setting, '--resume', 'auto')
    try:
        moment_reached(job, trial, whole.whole_s, whole.start_s)
        struck, steps = time.monotonic(), len(steps_of(out))
        strike(job, trial)
        code = job.wait()
        if code not in expected_codes(trial):
            problems.append(f'exit code {code}')
        if trial.setting.processes == 1 and 'Traceback' in job.text:
            problems.append(f'traceback: {job.text[job.text.index("Traceback") :][-1500:]}')
        again = Job(data, out.with_name(f'{out.name}'), trial.setting, '--resume', 'auto')
        try:
            if code := again.wait():
                problems.append(f'not resumed ({code}): {again.text[-500:]}')
            else:
                problems += differences(whole.out, out)
            if left := again.lasting_members():
                problems.append(f'{len(left)} processes left')
            if left := sorted(path.name for path in out.parent.glob(f'.{out.name}*')) + sorted(
                path.name for path in out.glob('.*')
            ):
                problems.append(f'files left: {", ".join(left)}')
        finally:
            again.end()
        return Result(trial, struck - job.begin, steps, job.process.returncode, problems)
    finally:
        job.end()


def make_data(folder: Path) -> Path:
    from prepared_tree import write_prepared

    for seed, (split, count) in enumerate((('train', TRAIN_SAMPLES), ('val', VAL_SAMPLES))):
        if not (folder / split).exists():
            write_prepared(folder, split, count, seed=seed)
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, required=True, help='working folder, best in memory')
    parser.add_argument('--first', type=int, default=0)
    parser.add_argument('--count', type=int, default=50)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--results', type=Path, help='file for the table')
    args = parser.parse_args(argv)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, the trainings would inherit that it is ignored
    args.out.mkdir(parents=True, exist_ok=True)
    data = make_data(args.out / 'data')
    rows, failed, wholes = [HEADER], 0, {}
    for number in range(args.first, args.first + args.count):
        out = args.out / f'trial_{number}'
        for attempt in range(MOST_ATTEMPTS):
            now = trial(number, args.seed, attempt)
            processes = now.setting.processes
            if processes not in wholes:
                wholes[processes] = reference(data, args.out / f'whole_{processes}_{args.first}', processes)
            result = run(now, data, out, wholes[processes])
            if not result.missed:
                break
            shutil.rmtree(out)
        else:
            result.problems.append('the run was over before every signal')
        failed += bool(result.problems)
        rows.append(result.row())
        print(rows[-1], flush=True)
        if not result.problems:
            shutil.rmtree(out)
        if args.results:
            args.results.write_text('\n'.join(rows) + '\n')
    print(f'{args.count - failed} of {args.count} kills: resumed run equal to the bit')
    return min(failed, 1)


if __name__ == '__main__':
    sys.exit(main())
