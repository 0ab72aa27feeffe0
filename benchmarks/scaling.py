"""Estimate the cost of a training run on n devices from the throughput measured on one.

    python benchmarks/scaling.py --samples-per-second 1200 [--devices 1 8 64] [--batch 64] [--bandwidth 50]
    python benchmarks/scaling.py --benchmark FOLDER/benchmark.json

A step takes the device's time for its share of the batch, plus the gradient exchange that the backward pass does not
hide, plus the round trips of the synchronised batch norms. A benchmark knows the time of several shares: small ones
take a GPU longer than their part of a large one. docs/scaling.md lists the assumptions.
"""

import argparse
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import add_flag
from utils.errors import UserError, user_facing
from utils.files import read_json

PARAMETERS = 90.4e6  # of the network with ResNet-50
SYNCHRONISED = 2 * 97  # collectives of the batch norms per step: one forward and one backward each
BACKWARD_SHARE = 2 / 3  # of a step's time, during which gradients can be exchanged


class Speed(NamedTuple):
    """Training speed of one device."""

    name: str
    seconds: dict[int, float]  # batch -> a step's time, measured

    def step(self, share: float) -> float:
        """Seconds for ``share`` samples: interpolated; beyond the measured batches, a smaller one takes as long as the
        smallest, where launching the operators takes the time, and a larger one has the rate of the largest."""
        batches = sorted(self.seconds)
        interpolated = float(np.interp(share, batches, [self.seconds[batch] for batch in batches]))
        return interpolated * max(1.0, share / batches[-1])


class Run(NamedTuple):
    """A training run and its machine."""

    speed: Speed

    samples: int = 370_000  # of the train split, prepared
    epochs: int = 50
    batch: int = 64  # over all devices
    loader_per_worker: float = 1000.0  # samples/s
    bandwidth: float = 50e9  # bytes/s between two devices, one way
    latency: float = 30e-6  # s a collective


class Cost(NamedTuple):
    """The cost of a run on ``devices``."""

    devices: int
    step_ms: float
    samples_per_second: float
    efficiency: float  # of n times one device
    hours: float
    device_hours: float
    workers: float  # loader processes per device that keep it busy


def cost(run: Run, devices: int) -> Cost:
    """Estimate the cost. Raises UserError if the batch is smaller than the number of devices."""
    if devices > run.batch:
        raise UserError(f'A batch of {run.batch} cannot be distributed over {devices} devices. Pass a larger --batch.')
    compute = run.speed.step(run.batch / devices)
    exchange = 0.0
    if devices > 1:
        ring = 2 * (devices - 1) / devices * 4 * PARAMETERS / run.bandwidth
        exchange = max(0.0, ring - BACKWARD_SHARE * compute) + SYNCHRONISED * run.latency
    step = compute + exchange
    rate = run.batch / step
    hours = run.samples * run.epochs / rate / 3600
    return Cost(
        devices,
        1e3 * step,
        rate,
        run.speed.step(run.batch) / (devices * step),
        hours,
        hours * devices,
        rate / devices / run.loader_per_worker,
    )


def table(run: Run, devices: list[int]) -> str:
    lines = [
        '| devices | batch | step, ms | samples/s | efficiency | hours | device hours | workers each |',
        '|---:|---:|---:|---:|---:|---:|---:|---:|',
    ]
    for number in devices:
        one = cost(run, number)
        lines.append(
            f'| {number} | {run.batch} | {one.step_ms:.4g} | {one.samples_per_second:,.4g} | '
            f'{one.efficiency:.0%} | {one.hours:,.3g} | {one.device_hours:,.3g} | {math.ceil(one.workers)} |'
        )
    return '\n'.join(lines)


def measured_speeds(path: str | Path) -> list[Speed]:
    """Training speeds in a benchmark's JSON, one per precision. Raises UserError if there is none."""
    content = read_json(path)
    speeds: dict[str, dict[int, float]] = {}
    try:
        rows = [row for part in content['tables'] if part['title'] == 'Throughput' for row in part['rows']]
        for row in rows:
            named = re.fullmatch(r'training, batch (\d+), (.+)', row['what'])
            if named and row['unit'] == 'samples/s':
                batch = int(named[1])
                speeds.setdefault(named[2], {})[batch] = batch / row['value']
    except (TypeError, KeyError, ZeroDivisionError):
        speeds = {}
    if not speeds:
        raise UserError(
            f'{path} holds no training throughput: make it with benchmarks/run.py --only throughput --out FOLDER.'
        )
    return [Speed(*speed) for speed in speeds.items()]


@user_facing
def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    defaults = Run._field_defaults
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flag(parser, '--samples-per-second', type=float, help='training throughput of one device')
    parser.add_argument(
        '--benchmark', metavar='FILE', help='benchmark.json of benchmarks/run.py, instead; its fastest precision counts'
    )
    parser.add_argument('--devices', type=int, nargs='+', default=[1, 8, 64])
    parser.add_argument('--batch', type=int, default=defaults['batch'], help='over all devices (default: %(default)s)')
    parser.add_argument('--samples', type=int, default=defaults['samples'], help='of an epoch (default: %(default)s)')
    parser.add_argument('--epochs', type=int, default=defaults['epochs'], help='default: %(default)s')
    parser.add_argument(
        '--loader',
        type=float,
        default=defaults['loader_per_worker'],
        help='samples/s of a worker (default: %(default)s)',
    )
    parser.add_argument(
        '--bandwidth',
        type=float,
        default=defaults['bandwidth'] / 1e9,
        help='GB/s between two devices (default: %(default)s)',
    )
    args = parser.parse_args(argv)
    if bool(args.samples_per_second) == bool(args.benchmark):
        raise UserError('Pass either --samples-per-second or --benchmark.')
    rate = 1.0 if args.samples_per_second is None else args.samples_per_second
    numbers = (rate, args.batch, args.samples, args.epochs, args.loader, args.bandwidth, *args.devices)
    if not all(0 < number < math.inf for number in numbers):
        raise UserError('All numbers must be above 0 and finite.')
    if args.benchmark:
        speed = min(measured_speeds(args.benchmark), key=lambda speed: speed.step(args.batch))
        print(f'{speed.name}, measured at batches of {", ".join(map(str, sorted(speed.seconds)))}:\n')
    else:
        speed = Speed('given', {1: 1 / rate})
    print(table(Run(speed, args.samples, args.epochs, args.batch, args.loader, 1e9 * args.bandwidth), args.devices))


if __name__ == '__main__':
    sys.exit(main())
