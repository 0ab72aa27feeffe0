"""Write annotation files of InterHand2.6M's size, layout and density, with synthetic numbers, to time reading them.

    python benchmarks/synthetic_annotations.py --frames 1361062 --out DIR [--split train] [--captures 26] [--joints]

Writes DIR/annotations/<split>/*.json and an empty image folder. Memory does not grow with the number of frames.
"""

import argparse
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.prepare.raw import SPLITS
from utils.errors import UserError, user_facing
from utils.files import atomic_file, write_atomically

CAMERAS = (80, 140)  # of a capture: least, most
STEPS = (10, 60)  # of a sequence, at 5 fps
HAND_TYPES = ('interacting', 'right', 'interacting', 'left')  # of the sequences, in turn
ONE_HAND_LOST, TYPE_NOT_VALID = 0.01, 0.02  # share of time steps
VARIANTS = 1000  # different bounding boxes and fits: enough that no reader gains from repetition


class Sequence(NamedTuple):
    """A recording by all cameras of one capture."""

    capture: int
    name: str
    hand_type: str
    cameras: list[str]
    steps: list[int]  # frame_idx
    images: int  # at most cameras x steps; a truncated last sequence yields the exact number of frames


def make_sequences(frames: int, captures: int, seed: int) -> list[Sequence]:
    """Sequences with ``frames`` images in total, spread evenly over the captures."""
    draw = random.Random(seed)
    sequences = []
    for capture in range(captures):
        left = frames * (capture + 1) // captures - frames * capture // captures
        cameras = [str(400000 + 1000 * capture + 7 * number) for number in range(draw.randint(*CAMERAS))]
        step = 1000
        for number in itertools.count():
            if not left:
                break
            length = min(draw.randint(*STEPS), -(-left // len(cameras)))
            steps = list(range(step, step + 3 * length, 3))
            images = min(length * len(cameras), left)
            kind = HAND_TYPES[number % len(HAND_TYPES)]
            sequences.append(Sequence(capture, f'{number:04}_{kind[:2]}_synth', kind, cameras, steps, images))
            left, step = left - images, steps[-1] + 100
    return sequences


def image_entries(sequences: list[Sequence]) -> Iterator[str]:
    number = 0
    for one in sequences:
        pairs = itertools.islice(itertools.product(enumerate(one.cameras), one.steps), one.images)
        for (place, camera), step in pairs:
            width, height = (512, 334) if place % 4 == 0 else (334, 512)
            yield (
                f'{{"id": {number}, "file_name": "Capture{one.capture}/{one.name}/cam{camera}/image{step}.jpg", '
                f'"width": {width}, "height": {height}, "capture": {one.capture}, "subject": {one.capture % 21}, '
                f'"seq_name": "{one.name}", "camera": "{camera}", "frame_idx": {step}}}'
            )
            number += 1


def annotation_entries(sequences: list[Sequence], seed: int) -> Iterator[str]:
    draw = random.Random(seed)
    boxes = itertools.cycle([json.dumps([draw.uniform(20, 300) for _ in range(4)]) for _ in range(VARIANTS)])
    valid = {kind: json.dumps([[int(kind != 'left')]] * 21 + [[int(kind != 'right')]] * 21) for kind in HAND_TYPES}
    number = 0
    for one in sequences:
        type_valid = {step: int(draw.random() >= TYPE_NOT_VALID) for step in one.steps}
        for step in itertools.islice(itertools.cycle(one.steps), one.images):
            yield (
                f'{{"id": {number}, "image_id": {number}, "bbox": {next(boxes)}, '
                f'"joint_valid": {valid[one.hand_type]}, "hand_type": "{one.hand_type}", '
                f'"hand_type_valid": {type_valid[step]}}}'
            )
            number += 1


def camera_entries(sequences: list[Sequence], seed: int) -> dict[str, dict]:
    draw = random.Random(seed)

    def table(cameras: list[str], *ranges: tuple[float, float]) -> dict[str, list[float]]:
        return {camera: [draw.uniform(*limits) for limits in ranges] for camera in cameras}

    content = {}
    for capture, cameras in {one.capture: one.cameras for one in sequences}.items():
        rows = [table(cameras, *[(-1, 1)] * 3) for _ in range(3)]
        content[str(capture)] = {
            'campos': table(cameras, *[(-1500, 1500)] * 3),
            'camrot': {camera: [row[camera] for row in rows] for camera in cameras},
            'focal': table(cameras, *[(1200, 1300)] * 2),
            'princpt': table(cameras, *[(150, 260)] * 2),
        }
    return content


def fit_entries(one: Sequence, variants: list[str], draw: random.Random) -> Iterator[str]:
    """``"frame_idx": {"right": ..., "left": ...}`` of each time step."""
    for step in one.steps:
        right, left = draw.choice(variants), draw.choice(variants)
        if one.hand_type == 'right' or draw.random() < ONE_HAND_LOST:
            left = 'null'
        elif one.hand_type == 'left':
            right = 'null'
        yield f'"{step}": {{"right": {right}, "left": {left}}}'


def joint_entries(one: Sequence, variants: list[str], draw: random.Random) -> Iterator[str]:
    """``"frame_idx": {"world_coord": ..., ...}`` of each time step."""
    valid = json.dumps([[int(one.hand_type != 'left')]] * 21 + [[int(one.hand_type != 'right')]] * 21)
    for step in one.steps:
        yield (
            f'"{step}": {{"world_coord": {draw.choice(variants)}, "joint_valid": {valid}, '
            f'"hand_type": "{one.hand_type}", "hand_type_valid": true}}'
        )


def by_capture(sequences: list[Sequence], entries: Callable[[Sequence], Iterable[str]]) -> Iterator[str]:
    """``"capture": {...}`` of all its sequences together."""
    for capture, group in itertools.groupby(sequences, lambda one: one.capture):
        yield f'"{capture}": {{{", ".join(itertools.chain.from_iterable(map(entries, group)))}}}'


def write_parts(path: Path, parts: list[tuple[str, Iterable[str], str]]) -> None:
    """Write each part: its opening, comma-separated entries, its closing."""
    with atomic_file(path) as file:
        for opening, entries, closing in parts:
            file.write(opening.encode())
            for number, entry in enumerate(entries):
                file.write(f', {entry}'.encode() if number else entry.encode())
            file.write(closing.encode())


def write_annotations(root: Path, split: str, frames: int, captures: int, *, joints: bool, seed: int = 0) -> None:
    """Write the files of one split and create its empty image folder."""
    draw = random.Random(seed)

    def numbers(count: int, size: float) -> list[float]:
        return [draw.gauss(0, size) for _ in range(count)]

    sequences = make_sequences(frames, captures, seed)
    start = root / 'annotations' / split / f'InterHand2.6M_{split}_'
    write_parts(
        Path(f'{start}data.json'),
        [
            ('{"images": [', image_entries(sequences), '], '),
            ('"annotations": [', annotation_entries(sequences, seed), ']}'),
        ],
    )
    write_atomically(f'{start}camera.json', json.dumps(camera_entries(sequences, seed)).encode())
    fits = [
        json.dumps({'pose': numbers(48, 0.3), 'shape': numbers(10, 0.5), 'trans': numbers(3, 0.2)})
        for _ in range(VARIANTS)
    ]
    write_parts(
        Path(f'{start}MANO_NeuralAnnot.json'),
        [('{', by_capture(sequences, lambda one: fit_entries(one, fits, draw)), '}')],
    )
    if joints:
        points = [json.dumps([numbers(3, 80) for _ in range(42)]) for _ in range(VARIANTS)]
        write_parts(
            Path(f'{start}joint_3d.json'),
            [('{', by_capture(sequences, lambda one: joint_entries(one, points, draw)), '}')],
        )
    (root / 'images' / split).mkdir(parents=True, exist_ok=True)


@user_facing
def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--frames', type=int, required=True, help='images of the split, about half interacting')
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--split', choices=SPLITS, default='train')
    parser.add_argument('--captures', type=int, default=26)
    parser.add_argument('--joints', action='store_true', help='also write joint_3d')
    arguments = parser.parse_args(argv)
    for name in ('frames', 'captures'):
        if (given := getattr(arguments, name)) < 1:
            raise UserError(f'--{name} is {given}; it must be at least 1.')
    write_annotations(arguments.out, arguments.split, arguments.frames, arguments.captures, joints=arguments.joints)


if __name__ == '__main__':
    sys.exit(main())
