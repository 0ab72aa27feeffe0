"""The hands of a whole video, frame by frame: online or offline smoothing, one shape, and gaps filled on request."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from inference.media import Frame
from inference.reconstruct import Box, Reconstruction, Reconstructor
from inference.smoothing import Motion, OneEuroFilter, interpolated, motion_of, posed_again, smooth_offline
from utils.geometry import project

SEEN, LOST, FILLED = 'seen', 'lost', 'filled'
LONGEST_FILL = 1.0  # s: longer gaps are never filled
# What is recorded of a frame's Reconstruction; vertices and joints are posed again.
SHAPES: dict[str, tuple[int, ...]] = {
    'roots': (2, 3),
    'joints_px': (2, 21, 2),
    'root_rotation': (2, 3, 3),
    'pose': (2, 45),
    'shape': (2, 10),
    'camera': (2, 3),
    'offset': (3,),
    'intrinsics': (3, 3),
    'to_crop': (3, 3),
    'residual_px': (),
    'size_in_crop': (),
    'present': (2,),
}
OPTIONAL_SHAPES = {'presence': (2,), 'visible': (2, 21), 'deviation': (2, 21)}  # of networks that predict them

Smoothing = Callable[[Motion, list[float]], Motion]


class FrameHands(NamedTuple):
    """One frame of a video and its hands."""

    image: np.ndarray  # (H, W, 3) uint8 BGR
    time_s: float
    box: Box | None  # None: the whole image, or no hands
    hands: Reconstruction | None  # without the leading axis, on the CPU; None where no hands are in sight
    cut: bool = False  # whether another scene begins, or the hands jump
    filled: bool = False  # whether the hands are interpolated between other frames

    @property
    def state(self) -> str:
        return LOST if self.hands is None else FILLED if self.filled else SEEN


def smoothed_online(frames: Iterable[FrameHands], reconstruct: Reconstructor) -> Iterator[FrameHands]:
    """Smooth the hands by those of earlier frames; anew after a gap or a cut, and where a hand comes or goes. Shapes
    are means of all frames so far."""
    smooth, before = OneEuroFilter(), None
    for frame in frames:
        present = _present(frame.hands)
        if frame.hands is None or frame.cut or present != before:
            smooth.reset()
        before = present
        if frame.hands is None:
            yield frame
        else:
            motion = smooth(motion_of(frame.hands.with_leading_axis()), frame.time_s, counted=frame.hands.present)
            yield frame._replace(hands=posed_again(frame.hands, motion, reconstruct.pose_hands))


class _Recorded(NamedTuple):
    """A frame without its image and meshes: 1 kB."""

    time_s: float
    box: Box | None
    numbers: np.ndarray | None  # float32; None where no hands are in sight
    present: tuple[bool, ...] | None  # left, right
    cut: bool


def _recorded_shapes(hands: Reconstruction) -> dict[str, tuple[int, ...]]:
    """What is recorded of these hands."""
    return SHAPES | {name: shape for name, shape in OPTIONAL_SHAPES.items() if getattr(hands, name) is not None}


def _recorded(frame: FrameHands) -> _Recorded:
    hands, numbers = frame.hands, None
    if hands is not None:
        numbers = torch.cat([getattr(hands, name).flatten().float() for name in _recorded_shapes(hands)]).numpy().copy()
    return _Recorded(frame.time_s, frame.box, numbers, _present(hands), frame.cut)


def _present(hands: Reconstruction | None) -> tuple[bool, ...] | None:
    return None if hands is None else tuple(hands.present.tolist())


class Recording:
    """The hands of a clip, kept as parameters until its last frame is known, 1 kB a frame: 20 MB for 10 minutes."""

    def __init__(self, frames: Iterable[FrameHands]):
        self.frames: list[_Recorded] = []
        self.shapes = SHAPES
        for each in frames:
            if each.hands is not None:
                self.shapes = _recorded_shapes(each.hands)
            self.frames.append(_recorded(each))

    def hands(self, number: int) -> Reconstruction:
        """The recorded values of a frame with hands; vertices and joints are empty until ``posed_again``."""
        return self._stacked([number]).one(0)

    def _stacked(self, numbers: list[int]) -> Reconstruction:
        rows = [row for number in numbers if (row := self.frames[number].numbers) is not None]
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        recorded = torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, sum(sizes))
        parts = recorded.split(sizes, 1)
        values = {
            name: part.unflatten(1, shape) if shape else part[:, 0]
            for (name, shape), part in zip(self.shapes.items(), parts)
        }
        values['present'] = values['present'].bool()
        empty = torch.empty(len(recorded), 0)
        return Reconstruction(vertices=empty, joints=empty, **values)

    def segments(self) -> list[range]:
        """Runs of successive frames with the same hands, within one scene."""
        runs: list[range] = []
        for number, frame in enumerate(self.frames):
            if frame.numbers is None:
                continue
            follows = bool(runs) and runs[-1].stop == number and not frame.cut
            follows = follows and frame.present == self.frames[number - 1].present
            runs[-1:] = [range(runs[-1].start, number + 1)] if follows else [*runs[-1:], range(number, number + 1)]
        return runs

    def motion(self, *, smooth: Smoothing | None) -> tuple[Motion, dict[int, int]]:
        """The motion of all frames with hands, and frame -> row of it.

        Each segment is smoothed on its own, and all get the median shape of the clip.
        """
        seen = [number for run in self.segments() for number in run]
        hands = self._stacked(seen)
        motion = motion_of(hands)
        rows = {number: row for row, number in enumerate(seen)}
        if smooth is not None and seen:
            parts = []
            for run in self.segments():
                part = Motion(*(values[rows[run.start] : rows[run.start] + len(run)] for values in motion))
                parts.append(smooth(part, [self.frames[number].time_s for number in run]))
            motion = Motion(*(torch.cat(values) for values in zip(*parts)))
            known = torch.where(hands.present[..., None], motion.shape, torch.nan)
            shape = known.nanmedian(0, keepdim=True).values.nan_to_num(0)
            motion = motion._replace(shape=shape.expand_as(motion.shape))
        return motion, rows

    def gaps(self) -> list[range]:
        """Frames without hands between two with the same hands, of one scene and at most LONGEST_FILL s apart."""
        runs = self.segments()
        between = [range(one.stop, other.start) for one, other in zip(runs, runs[1:])]
        return [
            gap
            for gap in between
            if gap
            and self.frames[gap.start - 1].present == self.frames[gap.stop].present
            and not any(self.frames[number].cut for number in range(gap.start, gap.stop + 1))
            and 0 < self.frames[gap.stop].time_s - self.frames[gap.start - 1].time_s <= LONGEST_FILL
        ]


def smoothed_offline(
    recording: Recording, frames: Iterable[Frame], reconstruct: Reconstructor, *, smooth: bool, fill: bool
) -> Iterator[FrameHands]:
    """Smooth a recording with zero phase, fill its short gaps, and join it with the images of the same ``frames``."""
    motion, rows = recording.motion(smooth=smooth_offline if smooth else None)
    gaps = recording.gaps() if fill else []
    around = {number: gap for gap in gaps for number in gap}
    for number, (frame, recorded) in enumerate(zip(frames, recording.frames)):
        hands, gap = None, around.get(number)
        if number in rows:
            hands = posed_again(recording.hands(number), motion.one(rows[number]), reconstruct.pose_hands)
        elif gap is not None:
            before, after = gap.start - 1, gap.stop
            start, end = (recording.frames[at].time_s for at in (before, after))
            share = (recorded.time_s - start) / (end - start)
            between = interpolated(motion.one(rows[before]), motion.one(rows[after]), share)
            hands = posed_again(recording.hands(before), between, reconstruct.pose_hands)
            hands = hands._replace(joints_px=project(hands.joints, hands.intrinsics))
        filled = gap is not None
        yield FrameHands(frame.image, recorded.time_s, recorded.box, hands, cut=recorded.cut, filled=filled)
