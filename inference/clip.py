"""The hands of a whole video, frame by frame: online or offline smoothing, one shape, and gaps filled on request."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from inference.media import Frame
from inference.reconstruct import Box, Reconstruction, Reconstructor
from inference.smoothing import Motion, OneEuroFilter, interpolated, joined, motion_of, posed_again, smooth_offline
from utils.geometry import project

SEEN, LOST, FILLED = 'seen', 'lost', 'filled'
LONGEST_FILL = 1.0  # s: longer gaps are never filled
# Of a recorded frame; vertices and joints are posed again.
RECORDED = ('roots', 'joints_px', 'root_rotation', 'pose', 'shape', 'camera', 'offset', 'intrinsics', 'to_crop')
RECORDED_NUMBERS = ('residual_px', 'size_in_crop')


class FrameHands(NamedTuple):
    """One frame of a video and its hands."""

    image: np.ndarray  # (H, W, 3) uint8 BGR
    time_s: float
    box: Box | None  # None: the whole image, or no hands
    hands: Reconstruction | None  # without the leading axis, on the CPU; None where no hands are in sight
    cut: bool = False  # whether another scene begins
    filled: bool = False  # whether the hands are interpolated between other frames

    @property
    def state(self) -> str:
        return LOST if self.hands is None else FILLED if self.filled else SEEN


def smoothed_online(frames: Iterable[FrameHands], reconstruct: Reconstructor) -> Iterator[FrameHands]:
    """Smooth the hands by those of earlier frames; anew after a gap or a cut. Shapes are means of all frames so far."""
    smooth = OneEuroFilter()
    for frame in frames:
        if frame.hands is None or frame.cut:
            smooth.reset()
        if frame.hands is None:
            yield frame
        else:
            motion = smooth(motion_of([frame.hands]), frame.time_s)
            yield frame._replace(hands=posed_again(frame.hands, motion, reconstruct.pose_hands))


class _Recorded(NamedTuple):
    """A frame without its image and meshes: 1 kB."""

    time_s: float
    box: Box | None
    numbers: np.ndarray | None  # float32; None where no hands are in sight
    cut: bool


class Recording:
    """The hands of a clip, kept as parameters until its last frame is known, 1 kB a frame: 20 MB for 10 minutes."""

    def __init__(self, frames: Iterable[FrameHands]):
        self.frames: list[_Recorded] = []
        self.shapes: dict[str, torch.Size] = {}
        for frame in frames:
            self.frames.append(_Recorded(frame.time_s, frame.box, self._numbers(frame.hands), frame.cut))

    def _numbers(self, hands: Reconstruction | None) -> np.ndarray | None:
        if hands is None:
            return None
        values = {name: getattr(hands, name) for name in (*RECORDED, *RECORDED_NUMBERS)}
        self.shapes = {name: value.shape for name, value in values.items()}
        return torch.cat([value.flatten() for value in values.values()]).numpy().copy()

    def hands(self, number: int) -> Reconstruction | None:
        """The recorded values of a frame; vertices and joints are empty until ``posed_again``."""
        numbers = self.frames[number].numbers
        if numbers is None:
            return None
        parts = torch.from_numpy(numbers).split([shape.numel() for shape in self.shapes.values()])
        values: dict[str, Tensor] = {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts)}
        return Reconstruction(vertices=torch.empty(0), joints=torch.empty(0), **values)

    def segments(self) -> list[range]:
        """Runs of successive frames with hands, within one scene."""
        runs: list[range] = []
        for number, frame in enumerate(self.frames):
            if frame.numbers is None:
                continue
            follows = bool(runs) and runs[-1].stop == number and not frame.cut
            runs[-1:] = [range(runs[-1].start, number + 1)] if follows else [*runs[-1:], range(number, number + 1)]
        return runs

    def motions(self, *, smooth: Callable[[Motion, list[float]], Motion] | None) -> dict[int, Motion]:
        """Frame -> its motion, each segment smoothed on its own. If so, all have the median shape of the clip."""
        found: dict[int, Motion] = {}
        for run in self.segments():
            motion = motion_of([hands for number in run if (hands := self.hands(number)) is not None])
            if smooth is not None:
                motion = smooth(motion, [self.frames[number].time_s for number in run])
            found |= {number: motion.one(row) for row, number in enumerate(run)}
        if smooth is not None and found:
            shape = joined(list(found.values())).shape.median(0, keepdim=True).values
            found = {number: motion._replace(shape=shape) for number, motion in found.items()}
        return found

    def gaps(self) -> list[range]:
        """Frames without hands between two with hands, of one scene and at most LONGEST_FILL s apart."""
        runs = self.segments()
        between = [range(one.stop, other.start) for one, other in zip(runs, runs[1:])]
        return [
            gap
            for gap in between
            if gap
            and not any(self.frames[number].cut for number in range(gap.start, gap.stop + 1))
            and self.frames[gap.stop].time_s - self.frames[gap.start - 1].time_s <= LONGEST_FILL
        ]


def smoothed_offline(
    recording: Recording, frames: Iterable[Frame], reconstruct: Reconstructor, *, smooth: bool, fill: bool
) -> Iterator[FrameHands]:
    """Smooth a recording with zero phase, fill its short gaps, and join it with the images of the same ``frames``."""
    motions = recording.motions(smooth=smooth_offline if smooth else None)
    filled: dict[int, int] = {}  # frame -> the last one before it that was seen
    for gap in recording.gaps() if fill else ():
        start, end = (recording.frames[number].time_s for number in (gap.start - 1, gap.stop))
        for number in gap:
            share = (recording.frames[number].time_s - start) / (end - start)
            motions[number] = interpolated(motions[gap.start - 1], motions[gap.stop], share)
            filled[number] = gap.start - 1
    for number, (frame, recorded) in enumerate(zip(frames, recording.frames)):
        hands = recording.hands(filled.get(number, number))
        if hands is not None:
            hands = posed_again(hands, motions[number], reconstruct.pose_hands)
            if number in filled:
                hands = hands._replace(joints_px=project(hands.joints, hands.intrinsics))
        yield FrameHands(frame.image, recorded.time_s, recorded.box, hands, cut=recorded.cut, filled=number in filled)
