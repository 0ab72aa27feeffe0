"""Measure how boxes that follow the hands, and smoothing, change errors and jitter in synthetic clips.

    python dataset/synthesize.py --save_path RAW --frames 0 0 480 --clip 60 --seed 13 MANO.SOURCE standin
    python benchmarks/video.py --data RAW --model CHECKPOINT [--split test] [--every 1] [KEY VALUE ...]

The first box is the true one. Jitter is the RMS of joints minus their average over time (Gaussian, 0.05 s: what is
faster than 4 Hz); the acceleration error is the mean distance between predicted and true acceleration. Each is given
for joints relative to the wrist ("hand") and in camera axes ("place"), as means over clips.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import utils  # noqa: F401  # before PyTorch, see there

# isort: split
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.prepare.raw import RawSplit
from dataset.synthetic.synthesize import CLIP_RATE
from inference import Reconstructor, load_reconstructor
from inference.clip import FrameHands, Recording, smoothed_offline, smoothed_online
from inference.media import Frame
from inference.reconstruct import cut_crop
from inference.tracking import Tracker, look
from utils.errors import UserError, user_facing
from utils.geometry import project
from utils.hand import WRIST
from utils.images import read_image
from utils.stopping import saying_kept

AVERAGED = 0.05  # s: standard deviation of the average that jitter is measured against
SHORTEST = 10 * AVERAGED  # s of a clip: its first and last 4 * AVERAGED are left out of the jitter


class Clip(NamedTuple):
    """Successive images of one camera, with their hands."""

    name: str
    frames: list[Frame]
    intrinsics: np.ndarray  # (3, 3)
    joints: Tensor  # (T, 2, 21, 3) m, camera axes


class Figures(NamedTuple):
    """Of one clip: relative to the wrist, and in camera axes."""

    frames_without_hands: float
    joint_mm: tuple[float, float]
    jitter_mm: tuple[float, float]
    acceleration: tuple[float, float]  # m/s^2


def read_clips(data: str, split: str, every: int) -> Iterator[Clip]:
    """The clips of a raw data set, ``every``-th frames of them."""
    raw = RawSplit(data, split)
    names: dict[tuple[str, str], list] = {}
    for frame in raw.frames:
        names.setdefault((frame.capture, frame.seq_name), []).append(frame)
    for (capture, name), shots in names.items():
        shots = shots[::every]
        start, end = shots[0].frame_idx, shots[-1].frame_idx
        if len({shot.camera for shot in shots}) > 1 or end - start < SHORTEST * CLIP_RATE:
            raise UserError(
                f'{name} of {data}/{split} is not a clip: it needs {SHORTEST} s or more of one camera. Generate '
                'clips with dataset/synthesize.py --clip 60.'
            )
        camera = raw.camera(capture, shots[0].camera)
        joints = [raw.joints(capture, shot.frame_idx) for shot in shots]
        if not all(valid.all() for _, valid in joints):
            raise UserError(f'{name} of {data}/{split} lacks joints: generate clips of both hands throughout.')
        world = np.stack([points for points, _ in joints])
        yield Clip(
            name,
            [Frame(read_image(raw.image_path(shot)), (shot.frame_idx - start) / CLIP_RATE) for shot in shots],
            camera.intrinsics,
            torch.from_numpy(world @ camera.rotation.T + camera.translation),
        )


def predict(reconstruct: Reconstructor, clip: Clip, *, track: bool) -> list[FrameHands]:
    """The hands of every frame, from the true box of the first one."""
    pixels = project(clip.joints[0], torch.from_numpy(clip.intrinsics)).flatten(0, 1)
    left, top, right, bottom = torch.cat([pixels.amin(0), pixels.amax(0)]).tolist()
    box = (left, top, right - left, bottom - top)
    if not track:
        images = [frame.image for frame in clip.frames]
        crops = [cut_crop(image, box, clip.intrinsics) for image in images]
        looks = look(reconstruct, images, crops, [box] * len(crops))
        return [FrameHands(*frame, box, each.hands) for frame, each in zip(clip.frames, looks)]
    tracker = Tracker(reconstruct, lambda image: [box, None])
    sights = [tracker(frame.image, clip.intrinsics) for frame in clip.frames]
    return [
        FrameHands(*frame, None, sight.look and sight.look.hands, cut=sight.cut)
        for frame, sight in zip(clip.frames, sights)
    ]


def measure(clip: Clip, hands: list[FrameHands]) -> Figures:
    """The figures of the frames in which hands were found."""
    found = [number for number, each in enumerate(hands) if each.hands is not None]
    times = torch.tensor([hands[number].time_s for number in found], dtype=torch.float64)
    if len(found) < 3 or times[-1] - times[0] < SHORTEST or not well_inside(times).any():
        raise UserError(f'The hands of {clip.name} were found in {len(found)} of {len(hands)} frames only.')
    joints = torch.stack([each.hands.joints for each in hands if each.hands is not None]).double()
    pairs = [(joints - joints[:, :, WRIST, None], clip.joints[found] - clip.joints[found][:, :, WRIST, None])]
    pairs.append((joints, clip.joints[found]))

    def both(figure: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, float]:
        hand, place = (float(figure(*pair)) for pair in pairs)
        return hand, place

    return Figures(
        (len(hands) - len(found)) / len(hands),
        both(lambda predicted, true: 1000 * (predicted - true).norm(dim=-1).mean()),
        both(lambda predicted, true: 1000 * jitter(predicted, times)),
        both(lambda predicted, true: (acceleration(predicted, times) - acceleration(true, times)).norm(dim=-1).mean()),
    )


def jitter(joints: Tensor, times: Tensor) -> Tensor:
    """RMS distance of joints (T, ..., 3) from their average over time."""
    weights = torch.exp(-0.5 * ((times[:, None] - times) / AVERAGED).square())
    average = torch.tensordot(weights / weights.sum(1, keepdim=True), joints, 1)
    return (joints - average)[well_inside(times)].square().sum(-1).mean().sqrt()


def well_inside(times: Tensor) -> Tensor:
    """Which times (T,) have a whole average around them."""
    return (times >= times[0] + 4 * AVERAGED) & (times <= times[-1] - 4 * AVERAGED)


def acceleration(joints: Tensor, times: Tensor) -> Tensor:
    """Second differences of joints (T, ..., 3) -> (T - 2, ..., 3)."""
    passed = times.diff().view(-1, *[1] * (joints.ndim - 1))
    return (joints.diff(dim=0) / passed).diff(dim=0) / ((passed[1:] + passed[:-1]) / 2)


def smoothings(reconstruct: Reconstructor) -> dict[str, Callable[[Clip, list[FrameHands]], list[FrameHands]]]:
    """What --smooth selects."""
    return {
        'off': lambda clip, hands: hands,
        'online': lambda clip, hands: list(smoothed_online(hands, reconstruct)),
        'offline': lambda clip, hands: list(
            smoothed_offline(Recording(hands), clip.frames, reconstruct, smooth=True, fill=False)
        ),
    }


def table(rows: dict[str, list[Figures]]) -> str:
    """Markdown: means over clips."""
    lines = [
        '| | joint mm, hand | place | jitter mm, hand | place | acceleration error m/s², hand | place | no hands |',
        '|---|---:|---:|---:|---:|---:|---:|---:|',
    ]
    for name, figures in rows.items():
        columns = [(each.joint_mm, each.jitter_mm, each.acceleration) for each in figures]
        cells = ' | '.join(f'{value:.1f}' for value in np.mean(columns, 0).flatten())
        lost = np.mean([each.frames_without_hands for each in figures])
        lines.append(f'| {name} | {cells} | {lost:.1%} |')
    return '\n'.join(lines)


@user_facing
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, metavar='RAW', help='clips of dataset/synthesize.py --clip')
    parser.add_argument('--model', required=True, metavar='CHECKPOINT', help='file, or a run folder (its best.pth)')
    parser.add_argument('--split', default='test', help='default: %(default)s')
    parser.add_argument('--every', type=int, default=1, metavar='N', help='every Nth frame (default: %(default)s)')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:N (default: %(default)s)')
    parser.add_argument('keys', nargs='*', metavar='KEY VALUE', help='configuration keys')
    args = parser.parse_intermixed_args(argv)
    if args.every < 1:
        raise UserError(f'--every is {args.every}; it must be at least 1.')
    reconstruct = load_reconstructor(args.model, device=args.device, overrides=args.keys)
    with saying_kept():
        print(compare(reconstruct, args.data, args.split, args.every))
    return 0


def compare(reconstruct: Reconstructor, data: str, split: str, every: int) -> str:
    """Markdown: figures of the clips with and without tracking and smoothing, and of the true hands."""
    rows: dict[str, list[Figures]] = {}
    for clip in tqdm(read_clips(data, split, every), desc='clips'):
        rows.setdefault('one box, smooth off', []).append(measure(clip, predict(reconstruct, clip, track=False)))
        hands = predict(reconstruct, clip, track=True)
        for name, smooth in smoothings(reconstruct).items():
            rows.setdefault(f'tracked, smooth {name}', []).append(measure(clip, smooth(clip, hands)))
        true = clip.joints.float()
        still = [
            each._replace(hands=each.hands and each.hands._replace(joints=true[number]))
            for number, each in enumerate(hands)
        ]
        rows.setdefault('true hands', []).append(measure(clip, still))
    return table(rows)


if __name__ == '__main__':
    sys.exit(main())
