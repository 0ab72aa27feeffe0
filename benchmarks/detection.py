"""Measure in how many images the hand detector finds none, one or both hands, and where the box is placed then.

    python benchmarks/detection.py --raw RAW [--split test] [--detector FILE] [--model CHECKPOINT] [--samples 60]
        [--enlarge 1 2 4] [KEY VALUE ...]

RAW has InterHand2.6M's layout (dataset/synthesize.py); its first N interacting frames are used, whole. --enlarge pastes
each into a synthetic background of that many times its sides, so that the hands are smaller. Compared are the crops of
the whole image, of a box around the hands found, of the box that apps/demo.py --detect uses, and of the true one: the
median (mean) over images of the mean distance of predicted and true 2D joints, in pixels of the 256 crop around the
true hands. Images in which neither detector nor network finds hands are missing from the column --detect.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import utils  # noqa: F401  # before PyTorch, see there

# isort: split
import numpy as np
from tqdm import tqdm

from dataset.prepare.raw import RawSplit
from dataset.synthetic.appearance import sample_background
from inference import Reconstructor, load_reconstructor
from inference.detector import MODEL, HandDetector, box_around, detection
from inference.media import read_photo
from inference.reconstruct import Box, cut_crop
from inference.tracking import box_in_image
from models.checkpoint import SHIPPED
from utils.config import numbers_and_pairs
from utils.errors import UserError, user_facing
from utils.geometry import crop_matrix
from utils.stopping import saying_kept

WHOLE = 'whole image'
KINDS = (WHOLE, 'around the hands found', '--detect', 'true box')
LARGEST = 16  # of --enlarge
BLACK = 10  # mean of 255 below which an image shows nothing


class Sample(NamedTuple):
    """One image of two hands."""

    image: np.ndarray  # (H, W, 3) uint8 BGR
    intrinsics: np.ndarray  # (3, 3)
    joints_px: np.ndarray  # (2, 21, 2), NaN where unknown

    @property
    def box(self) -> Box:
        """Of the true joints."""
        return box_around(self.joints_px[np.isfinite(self.joints_px[..., 0])])

    def enlarged(self, factor: float, seed: int) -> 'Sample':
        """Somewhere in a background of ``factor`` times its sides."""
        random, (height, width) = np.random.default_rng(seed), self.image.shape[:2]
        tall, wide = round(height * factor), round(width * factor)
        top, left = (int(random.integers(0, room + 1)) for room in (tall - height, wide - width))
        canvas = (255 * sample_background((tall, wide), random)).astype(np.uint8)
        canvas[top : top + height, left : left + width] = self.image
        intrinsics = self.intrinsics.copy()
        intrinsics[:2, 2] += left, top
        return Sample(canvas, intrinsics, self.joints_px + (left, top))


def read_samples(raw: str, split: str, count: int) -> Iterator[Sample]:
    """The first interacting frames. Raises UserError if there are fewer."""
    data, found = RawSplit(raw, split), 0
    for frame in data.frames:
        if found == count:
            return
        if frame.hand_type != 'interacting' or not frame.hand_type_valid:
            continue
        joints, valid = data.joints(frame.capture, frame.frame_idx)
        if not valid.any():
            continue
        image, _ = read_photo(data.image_path(frame))
        if image.mean() < BLACK:
            continue
        camera = data.camera(frame.capture, frame.camera)
        rays = (joints @ camera.rotation.T + camera.translation) @ camera.intrinsics.T
        pixels = np.where(valid[..., None], rays[..., :2] / rays[..., 2:], np.nan)
        found += 1
        yield Sample(image, camera.intrinsics, pixels)
    if found < count:
        raise UserError(f'{raw}/{split} has {found} images of two hands; pass --samples {found} or fewer.')


def error(reconstruct: Reconstructor, sample: Sample, box: Box | None) -> float:
    """Of the hands predicted from a crop around ``box``."""
    crop = cut_crop(sample.image, box, sample.intrinsics)
    predicted = reconstruct.from_crops([crop]).cpu().one(0).joints_px.numpy()
    left, top, width, height = sample.box
    scale = crop_matrix(np.array([[left, top], [left + width, top + height]]))[0, 0]
    return float(np.nanmean(scale * np.linalg.norm(predicted - sample.joints_px, axis=-1)))


def errors(reconstruct: Reconstructor, detector: HandDetector, sample: Sample) -> tuple[int, dict[str, float | None]]:
    """Hands found, and the errors of every kind of crop; None where there is none."""
    hands = detector.hands(sample.image)
    found = detection(hands)
    used = box_in_image(reconstruct, sample.image, sample.intrinsics, found)
    boxes = (None, box_around(np.concatenate(hands)) if hands else None, used, sample.box)
    return found.hands, {
        kind: None if box is None and kind != WHOLE else error(reconstruct, sample, box)
        for kind, box in zip(KINDS, boxes)
    }


def table(reconstruct: Reconstructor, detector: HandDetector, samples: list[Sample], factors: list[float]) -> str:
    """Markdown: a row for each number of hands found, and size of the background."""
    lines = [
        f'| sides of the image | hands found | images | {" | ".join(KINDS)} | without a box |',
        '|---:|---:|---:|---:|---:|---:|---:|---:|',
    ]
    for factor in factors:
        by_hands: dict[int, list[dict[str, float | None]]] = {0: [], 1: [], 2: []}
        for seed, sample in enumerate(tqdm(samples, desc=f'{factor:g} times', leave=False)):
            hands, found = errors(reconstruct, detector, sample.enlarged(factor, seed))
            by_hands[hands].append(found)
        for hands, rows in by_hands.items():
            columns = [[each for row in rows if (each := row[kind]) is not None] for kind in KINDS]
            cells = [f'{np.median(known):.1f} ({np.mean(known):.1f})' if known else '' for known in columns]
            without = sum(row[KINDS[2]] is None for row in rows)
            lines.append(f'| {factor:g} | {hands} | {len(rows)} | {" | ".join(cells)} | {without} |')
    return '\n'.join(lines)


@user_facing
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--raw', required=True, metavar='RAW', help="data set in InterHand2.6M's layout")
    parser.add_argument('--split', default='test', help='default: %(default)s')
    parser.add_argument('--samples', type=int, default=60, metavar='N', help='the first N (default: %(default)s)')
    help_enlarge = 'sides of the image, in sides of the frame (default: 1)'
    parser.add_argument('--enlarge', nargs='+', default=['1'], metavar='FACTOR', help=help_enlarge)
    parser.add_argument('--detector', metavar='FILE', default=MODEL, help='default: %(default)s')
    parser.add_argument('--model', metavar='CHECKPOINT', default=SHIPPED, help='default: the shipped network')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:N (default: %(default)s)')
    parser.add_argument('keys', nargs='*', metavar='KEY VALUE', help='configuration keys')
    args = parser.parse_intermixed_args(argv)
    if args.samples < 1:
        raise UserError(f'--samples is {args.samples}; it must be at least 1.')
    enlarge, pairs = numbers_and_pairs(args.enlarge, float, '--enlarge')
    if not all(1 <= factor <= LARGEST for factor in enlarge):
        raise UserError(f'--enlarge must be between 1 and {LARGEST}.')
    samples = list(read_samples(args.raw, args.split, args.samples))
    detector = HandDetector(args.detector)
    try:
        reconstruct = load_reconstructor(args.model, device=args.device, overrides=[*pairs, *args.keys])
        with saying_kept():
            print(table(reconstruct, detector, samples, enlarge))
    finally:
        detector.close()
    return 0


if __name__ == '__main__':
    sys.exit(main())
