"""Measure how the error grows with boxes that are displaced or of the wrong size, for one look and for two.

    python benchmarks/boxes.py --data DATA --model CHECKPOINT [--split test] [--samples 100] [--seed 0] [KEY VALUE ...]

DATA is a prepared data set. Each true box, that of both hands' projected vertices, is displaced by a share of its
longer side in a random direction, or scaled. A second look crops again around the hands that the first one predicts
(apps/demo.py --refine-box); "kept" uses it only where it lowers the residual between 3D and 2D. Joints are relative to
the wrist; pixels are those of the 256 crop. Crops show black beyond the prepared image.
"""

import argparse
import sys
from itertools import islice
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import utils  # noqa: F401  # before PyTorch, see there

# isort: split
import numpy as np
import torch
from tqdm import tqdm

from dataset import open_split
from dataset.hand_model_record import check_hand_model_record
from dataset.targets import camera_hands
from inference import Reconstruction, Reconstructor, load_reconstructor
from inference.reconstruct import Box, cut_crop, joined
from inference.tracking import look, look_again
from manopth import TwoHandLayer
from utils.errors import UserError, user_facing
from utils.geometry import project
from utils.hand import WRIST
from utils.stopping import saying_kept

DISPLACEMENTS = (0.0, 0.1, 0.2, 0.3)  # of the longer side
SIZES = (0.7, 0.85, 1.0, 1.2, 1.5)
AT_A_TIME = 16  # samples


class Truth(NamedTuple):
    """Images with their hands: N samples."""

    images: list[np.ndarray]  # (256, 256, 3) uint8 BGR
    intrinsics: np.ndarray  # (N, 3, 3)
    joints: torch.Tensor  # (N, 2, 21, 3) m, camera axes
    joints_px: torch.Tensor  # (N, 2, 21, 2)
    boxes: np.ndarray  # (N, 4) x, y, width, height: of the projected vertices


def read_truth(data: str, split: str, samples: int, layer: TwoHandLayer) -> Truth:
    """The first samples of both hands of a prepared split. Raises UserError if it has fewer."""
    dataset = open_split(data, split, with_mask=False, with_dense=False)
    both = (index for index in range(len(dataset)) if dataset.complete_labels(index)['present'].all())
    chosen = list(islice(both, samples))
    if len(chosen) < samples:
        raise UserError(
            f'{data}/{split} has {len(chosen)} samples of both hands; pass --samples {len(chosen)} or fewer.'
        )
    batch = dataset.__getitems__(chosen)
    hands = camera_hands(layer, batch)
    pixels = project(hands.vertices, batch.intrinsics[:, None]).flatten(1, 2)
    low, high = pixels.amin(1), pixels.amax(1)
    return Truth(
        list(batch.image.numpy()),
        batch.intrinsics.double().numpy(),
        hands.joints,
        project(hands.joints, batch.intrinsics[:, None]),
        torch.cat([low, high - low], 1).double().numpy(),
    )


def changed(boxes: np.ndarray, *, displacement: float, size: float, seed: int) -> list[Box]:
    """Boxes (N, 4), displaced by a share of the longer side in a random direction, and scaled about their centres."""
    angle = np.random.default_rng(seed).uniform(0, 2 * np.pi, len(boxes))
    away = displacement * boxes[:, 2:].max(1, keepdims=True) * np.stack([np.cos(angle), np.sin(angle)], 1)
    corner = boxes[:, :2] + boxes[:, 2:] * (1 - size) / 2 + away
    return [(x, y, width, height) for x, y, width, height in np.hstack([corner, boxes[:, 2:] * size]).tolist()]


def two_looks(reconstruct: Reconstructor, truth: Truth, boxes: list[Box]) -> tuple[Reconstruction, Reconstruction]:
    """The first and the second look at every sample."""
    seen: list[list[Reconstruction]] = [[], []]
    for begin in range(0, len(boxes), AT_A_TIME):
        rows = range(begin, min(begin + AT_A_TIME, len(boxes)))
        images, given = [truth.images[row] for row in rows], [boxes[row] for row in rows]
        crops = [cut_crop(truth.images[row], boxes[row], truth.intrinsics[row]) for row in rows]
        first = look(reconstruct, images, crops, given)
        for looks, results in zip((first, look_again(reconstruct, first)), seen):
            results += [each.hands for each in looks]
    one, two = (joined([hands.with_leading_axis() for hands in results]) for results in seen)
    return one, two


def errors(hands: Reconstruction, truth: Truth) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) mm, mean over joints relative to the wrist; (N,) pixels."""
    relative, true = (joints - joints[:, :, WRIST, None] for joints in (hands.joints, truth.joints))
    return (
        1000 * (relative - true).norm(dim=-1).mean((1, 2)),
        (hands.joints_px - truth.joints_px).norm(dim=-1).mean((1, 2)),
    )


def table(reconstruct: Reconstructor, truth: Truth, seed: int) -> str:
    """Markdown: one row for each displacement and size."""
    lines = [
        '| displaced | size | joint mm, one look | two | kept | pixel joint, one look | two | kept | second kept |',
        '|---:|---:|---:|---:|---:|---:|---:|---:|---:|',
    ]
    settings = [(displacement, 1.0) for displacement in DISPLACEMENTS] + [(0.0, size) for size in SIZES if size != 1]
    for displacement, size in tqdm(settings, desc='boxes'):
        one, two = two_looks(reconstruct, truth, changed(truth.boxes, displacement=displacement, size=size, seed=seed))
        better = two.residual_px < one.residual_px
        columns = []
        for first, second in zip(errors(one, truth), errors(two, truth)):
            columns += [first.mean(), second.mean(), torch.where(better, second, first).mean()]
        cells = ' | '.join(f'{float(value):.1f}' for value in columns)
        lines.append(f'| {displacement:.0%} | {size:g} | {cells} | {float(better.float().mean()):.0%} |')
    return '\n'.join(lines)


@user_facing
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, metavar='DATA', help='prepared or packed data set')
    parser.add_argument('--model', required=True, metavar='CHECKPOINT', help='file, or a run folder (its best.pth)')
    parser.add_argument('--split', default='test', help='default: %(default)s')
    parser.add_argument('--samples', type=int, default=100, metavar='N', help='the first N (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of the directions (default: %(default)s)')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:N (default: %(default)s)')
    parser.add_argument('keys', nargs='*', metavar='KEY VALUE', help='configuration keys')
    args = parser.parse_intermixed_args(argv)
    if args.samples < 1:
        raise UserError(f'--samples is {args.samples}; it must be at least 1.')
    if args.seed < 0:
        raise UserError(f'--seed is {args.seed}; it must be at least 0.')
    reconstruct = load_reconstructor(args.model, device=args.device, overrides=args.keys)
    check_hand_model_record(args.data, reconstruct.hand_models)
    truth = read_truth(args.data, args.split, args.samples, TwoHandLayer(reconstruct.hand_models))
    with saying_kept():
        print(table(reconstruct, truth, args.seed))
    return 0


if __name__ == '__main__':
    sys.exit(main())
