"""Time a training step on the CPU alone and beside one busy process, for several bounds of OpenMP's spinning.

    python benchmarks/busy.py [--spin 1000 3000 10000] [--steps 5] [--rounds 3] [--out FOLDER] [KEY VALUE ...]

Each round measures every setting in a process of its own, since libgomp reads its setting once: steps alone, then
beside a process that computes in Python. The machine must be quiet otherwise. Settings:

  libgomp       its own default, before this project bounded it
  spin N        GOMP_SPINCOUNT=N; utils/__init__.py chooses one
  passive       OMP_WAIT_POLICY=PASSIVE: no spinning
  one thread    OMP_NUM_THREADS=1: nothing to wait for
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import utils

# isort: split
import torch

from models.hands import load_hands
from models.predictions import Target
from models.trainer import Trainer
from utils.config import load_config, numbers_and_pairs
from utils.distributed import keep_freed_memory, usable_cores
from utils.errors import UserError, user_facing
from utils.files import write_atomically, write_json
from utils.hand import NUM_JOINTS, NUM_VERTICES
from utils.stopping import output_of, saying_kept

WAITING = ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY', 'OMP_NUM_THREADS', 'KMP_BLOCKTIME')  # which a setting replaces
SPINS = (1000, 2000, 3000, 4000, 6000, 10_000)
BUSY = """import os, sys
while os.getppid() == int(sys.argv[1]):  # and no longer, whatever ends the parent
    for _ in range(10**6):
        pass
"""
DEMO = 'configs/demo.yaml'


class Times(NamedTuple):
    """Seconds per step: medians."""

    alone: float
    busy: float


def settings(spins: list[int]) -> dict[str, dict[str, str]]:
    """{name: environment variables}."""
    return {
        # A variable that libgomp ignores, but which keeps this project from choosing.
        'libgomp': {'KMP_BLOCKTIME': '200'},
        **{f'spin {count}': {'GOMP_SPINCOUNT': str(count)} for count in spins},
        'passive': {'OMP_WAIT_POLICY': 'PASSIVE'},
        'one thread': {'OMP_NUM_THREADS': '1'},
    }


def training_step(opts: list[str]) -> Callable[[], object]:
    """One update of the demo's network on random images."""
    cfg = load_config(ROOT / DEMO, ['MANO.SOURCE', 'standin', 'DEVICE', 'cpu', *opts])
    keep_freed_memory()
    trainer = Trainer(cfg, load_hands(cfg.MANO.SOURCE, cfg.MANO.PATH), torch.device('cpu'))
    trainer.train()
    batch, size = cfg.TRAIN.BATCH_SIZE, cfg.MODEL.IMAGE_SIZE
    joints, vertices = (0.1 * torch.randn(batch, 2, number, 3) for number in (NUM_JOINTS, NUM_VERTICES))
    target = Target(
        vertices=vertices,
        joints=joints,
        vertices_uv=vertices[..., :2],
        joints_uv=joints[..., :2],
        segmentation=torch.randint(3, (batch, size, size)),
        dense=torch.rand(batch, 3, size, size),
    )
    image = 255 * torch.rand(batch, 3, size, size)
    return lambda: trainer.step([(image, target)], number=0, count=1, rate=0.0)


def measure(step: Callable[[], object], steps: int) -> Times:
    """Steps alone, then beside a busy process; the first of each is not counted."""
    alone = _median_seconds(step, steps)
    busy = subprocess.Popen([sys.executable, '-c', BUSY, str(os.getpid())])
    try:
        return Times(alone, _median_seconds(step, steps))
    finally:
        busy.kill()
        busy.wait()


def _median_seconds(step: Callable[[], object], steps: int) -> float:
    step()
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def measure_in_process(variables: dict[str, str], steps: int, opts: list[str]) -> Times:
    """``measure`` in a process with these environment variables."""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING} | variables
    command = [sys.executable, __file__, '--measure', '--steps', str(steps), *opts]
    try:
        return Times(**json.loads(output_of(command, env=environment)))
    except RuntimeError as error:
        raise UserError(f'The measurement failed ({error}).') from None


def table(measured: dict[str, list[Times]]) -> str:
    """Medians over the rounds, and their ratios to libgomp's default alone."""
    yardstick = statistics.median(times.alone for times in measured['libgomp'])
    rows = ['| setting | alone, s | busy, s | alone, ratio | busy, ratio |', '|---|---:|---:|---:|---:|']
    for name, rounds in measured.items():
        alone, busy = (statistics.median(column) for column in zip(*rounds))
        chosen = ' (chosen)' if name == f'spin {utils.SPIN_COUNT}' else ''
        rows.append(f'| {name}{chosen} | {alone:.3f} | {busy:.3f} | {alone / yardstick:.2f} | {busy / yardstick:.2f} |')
    return '\n'.join(rows)


@user_facing
def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    spin = f'default: {" ".join(map(str, SPINS))}'
    parser.add_argument('--spin', nargs='+', default=list(SPINS), metavar='N', help=spin)
    parser.add_argument('--steps', type=int, default=5, help='per setting and round (default: %(default)s)')
    parser.add_argument('--rounds', type=int, default=3, help='default: %(default)s')
    parser.add_argument('--out', metavar='FOLDER', help='write busy.json and busy.md there')
    parser.add_argument('--measure', action='store_true', help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument('opts', nargs='*', metavar='KEY VALUE', help='configuration keys')
    args = parser.parse_intermixed_args(argv)
    spins, pairs = numbers_and_pairs(list(map(str, args.spin)), int, '--spin')
    opts = [*pairs, *args.opts]
    if min(args.steps, args.rounds, *spins) < 1:
        raise UserError('--spin, --steps and --rounds must be at least 1.')
    if args.measure:
        print(json.dumps(measure(training_step(opts), args.steps)._asdict()))
        return
    spins = sorted({*spins, utils.SPIN_COUNT})
    measured: dict[str, list[Times]] = {name: [] for name in settings(spins)}
    with saying_kept():
        for number in range(args.rounds):
            for name, variables in settings(spins).items():
                times = measure_in_process(variables, args.steps, opts)
                measured[name].append(times)
                figures = f'{times.alone:.3f} s alone, {times.busy:.3f} s busy'
                print(f'round {number + 1}, {name}: {figures}', file=sys.stderr)
    text = f'{usable_cores()} cores, PyTorch {torch.__version__}\n\n{table(measured)}\n'
    print(text, end='')
    if args.out:
        rows = {name: [times._asdict() for times in rounds] for name, rounds in measured.items()}
        write_json(Path(args.out) / 'busy.json', {'cores': usable_cores(), 'torch': torch.__version__, 'seconds': rows})
        write_atomically(Path(args.out) / 'busy.md', text.encode())


if __name__ == '__main__':
    sys.exit(main())
