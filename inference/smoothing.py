"""Smooth hands over time with a One-Euro filter: causally, or forwards and backwards over a whole clip.

Both act on parameters, and the meshes are posed again. Rotations are filtered on the manifold: differences are rotation
vectors log(R^T S), and steps are exp. Positions are filtered as the middle of both roots and the vector from left to
right. Times are true time stamps in seconds, of any spacing.

Casiez, Roussel and Vogel, "1 Euro Filter", CHI 2012.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from inference.reconstruct import Reconstruction
from manopth import Hands
from manopth.rotations import axis_angle_to_matrix, matrix_to_axis_angle, nearest_rotation
from utils.hand import HAND_SCALE

SPEED_CUTOFF = 1.0  # Hz, of the speed itself: the authors' value


class Response(NamedTuple):
    """The two parameters of a One-Euro filter."""

    lowest_cutoff: float  # Hz, of a hand at rest
    cutoff_per_speed: float  # Hz per unit of speed: rad/s, HAND_SCALE/s, PCA units/s


# Chosen on synthetic clips other than those whose figures docs/formats.md reports. Offline there is no delay to avoid.
ONLINE, OFFLINE = Response(3.0, 0.1), Response(2.0, 0.2)


class Motion(NamedTuple):
    """Parameters of both hands in T frames, float64."""

    rotation: Tensor  # (T, 2, 3, 3)
    pose: Tensor  # (T, 2, 45)
    shape: Tensor  # (T, 2, 10)
    middle: Tensor  # (T, 3) m: between the roots
    offset: Tensor  # (T, 3) m: right root - left root

    def one(self, number: int) -> 'Motion':
        """One frame, with its leading axis."""
        return Motion(*(values[number : number + 1] for values in self))

    def reversed(self) -> 'Motion':
        """The frames from the last to the first."""
        return Motion(*(values.flip(0) for values in self))


def motion_of(hands: Reconstruction) -> Motion:
    """The parameters of T successive reconstructions; an absent hand is put where the other one is."""
    roots = torch.where(hands.present[..., None] | ~hands.present.flip(1)[..., None], hands.roots, hands.roots.flip(1))
    roots = roots.double()
    return Motion(
        nearest_rotation(hands.root_rotation.double()),
        hands.pose.double(),
        hands.shape.double(),
        roots.mean(1),
        roots[:, 1] - roots[:, 0],
    )


def posed_again(
    hands: Reconstruction, motion: Motion, pose_hands: Callable[[Tensor, Tensor, Tensor], Hands]
) -> Reconstruction:
    """One reconstruction (no leading axis) with the parameters of ``motion`` (one frame), its mesh posed anew.

    pose_hands: see Reconstructor. Camera, 2D joints, crop and residual remain those of the prediction.
    """
    rotation, pose, shape, middle, offset = (values.float() for values in motion)
    posed = pose_hands(rotation, pose, shape)
    roots = torch.stack([middle - offset / 2, middle + offset / 2], 1)
    return hands._replace(
        vertices=(posed.vertices + roots[:, :, None])[0],
        joints=(posed.joints + roots[:, :, None])[0],
        roots=roots[0],
        root_rotation=rotation[0],
        pose=pose[0],
        shape=shape[0],
        offset=offset[0],
    )


class OneEuroFilter:
    """Causal filter whose cutoff frequency rises with speed: steady at rest, little delay in motion.

    ``shape`` becomes the mean of all frames so far.
    """

    def __init__(self, response: Response = ONLINE):
        self.response, self.time_s = response, 0.0
        self.shape, self.frames = torch.zeros(1, 2, 10, dtype=torch.float64), torch.zeros(2, 1)
        self.filtered: Motion | None = None
        self.speeds: list[Tensor] = []

    def reset(self) -> None:
        """Begin anew after a gap, with the shape that is known."""
        self.filtered = None

    def __call__(self, motion: Motion, time_s: float, *, counted: Tensor | None = None) -> Motion:
        """Filter the next frame, (1, ...) each; equal times repeat the frame before.

        counted: (2,) bool, the hands whose shape enters the mean.
        """
        new = torch.ones(2, 1) if counted is None else counted[:, None].float()
        self.frames = self.frames + new
        self.shape = self.shape + new * (motion.shape - self.shape) / self.frames.clamp_min(1)
        if self.filtered is None:
            self.filtered, self.time_s = motion, time_s
            self.speeds = [torch.zeros_like(step) for step in differences(motion, motion)]
        else:
            passed, self.time_s = max(time_s - self.time_s, 0.0), max(time_s, self.time_s)
            steps = differences(self.filtered, motion)
            delay = 1 / (2 * math.pi * SPEED_CUTOFF)
            # This form of the exponential average does not divide by the time between frames.
            self.speeds = [
                speed + (step - passed * speed) / (passed + delay) for speed, step in zip(self.speeds, steps)
            ]
            shares = [self._share(speed, passed) for speed in self.speeds]
            self.filtered = moved(self.filtered, [share * step for share, step in zip(shares, steps)])
        return self.filtered._replace(shape=self.shape)

    def _share(self, speed: Tensor, passed: float) -> Tensor:
        cutoff = self.response.lowest_cutoff + self.response.cutoff_per_speed * speed.norm(dim=-1, keepdim=True)
        return passed / (passed + 1 / (2 * math.pi * cutoff))


def differences(start: Motion, end: Motion) -> list[Tensor]:
    """From one motion to another, in units of speed: rotation vectors, pose, middle and offset in HAND_SCALE."""
    return [
        matrix_to_axis_angle(start.rotation.mT @ end.rotation),
        end.pose - start.pose,
        (end.middle - start.middle) / HAND_SCALE,
        (end.offset - start.offset) / HAND_SCALE,
    ]


def moved(start: Motion, steps: Sequence[Tensor]) -> Motion:
    """The motion at these ``differences`` from ``start``."""
    turn, pose, middle, offset = steps
    return start._replace(
        rotation=start.rotation @ axis_angle_to_matrix(turn),
        pose=start.pose + pose,
        middle=start.middle + HAND_SCALE * middle,
        offset=start.offset + HAND_SCALE * offset,
    )


def interpolated(start: Motion, end: Motion, share: float) -> Motion:
    """Between two frames, (1, ...) each: rotations along the shortest arc."""
    between = moved(start, [share * step for step in differences(start, end)])
    return between._replace(shape=torch.lerp(start.shape, end.shape, share))


def smooth_online(motion: Motion, times_s: Sequence[float], response: Response = ONLINE) -> Motion:
    """Filter successive frames causally; see ``OneEuroFilter``."""
    smooth = OneEuroFilter(response)
    smoothed = Motion(*(torch.empty_like(values) for values in motion))
    for number, time_s in enumerate(times_s):
        for values, value in zip(smoothed, smooth(motion.one(number), time_s)):
            values[number] = value[0]
    return smoothed


def smooth_offline(motion: Motion, times_s: Sequence[float], response: Response = OFFLINE) -> Motion:
    """Filter successive frames forwards, then backwards: delays cancel. Shapes are not changed.

    On synthetic clips this beats averages and polynomials over neighbouring frames, also on rotations: at a third of
    the jitter, its joint error is 0.5 to 1 mm lower.
    """
    forth = smooth_online(motion, times_s, response).reversed()
    back = smooth_online(forth, [times_s[-1] - time for time in reversed(times_s)], response)
    return back.reversed()._replace(shape=motion.shape)
