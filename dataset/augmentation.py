"""Augmentation: one small struct of random numbers per sample, drawn in the loader from (seed, epoch, index)."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLUR_LENGTHS = (3, 9)  # pixels of the motion-blur line, inclusive


class AugmentationRanges(NamedTuple):
    """How far each draw goes; units and meaning: AUGMENT in utils/config.py."""

    rotation: float
    scale: float
    shift: float
    flip: float
    blur: float
    gain: float
    brightness: float
    noise: float


class AugmentationParameters(NamedTuple):
    """What happens to one sample (with a leading axis: to a batch), in order: flip, blur, warp, colour, noise."""

    flip: Tensor  # () bool
    blur_length: Tensor  # () int64 pixels; 0: none
    blur_angle: Tensor  # () rad
    scale: Tensor  # ()
    angle: Tensor  # () rad, positive turns right towards down
    shift: Tensor  # (2,) pixels of the 256 crop
    gain: Tensor  # (3,) per channel, in the file's order (BGR)
    brightness: Tensor  # () grey levels
    noise: Tensor  # () grey levels, standard deviation
    noise_seed: Tensor  # () int64


def parameters(*, flip: bool = False, blur_length: int = 0, blur_angle: float = 0.0, scale: float = 1.0,
               angle: float = 0.0, shift=(0.0, 0.0), gain=(1.0, 1.0, 1.0), brightness: float = 0.0, noise: float = 0.0,
               noise_seed: int = 0) -> AugmentationParameters:
    """One sample's struct from plain numbers; without arguments: leave it as it is."""
    number = torch.tensor
    return AugmentationParameters(
        number(flip), number(blur_length), number(blur_angle), number(scale), number(angle), number(tuple(shift)),
        number(tuple(gain)), number(brightness), number(noise), number(noise_seed))


def draw_augmentation(ranges: AugmentationRanges | None, key: tuple[int, int, int]) -> AugmentationParameters:
    """All draws are uniform and depend on ``key`` = (seed, epoch, index) alone; None leaves the sample as it is."""
    if ranges is None:
        return parameters()
    random = np.random.default_rng(key)

    def around(centre: float, reach: float, size=None):
        return random.uniform(centre - reach, centre + reach, size)

    flip, blur = random.random(2) < (ranges.flip, ranges.blur)
    return parameters(
        flip=bool(flip),
        blur_length=int(random.integers(*BLUR_LENGTHS, endpoint=True)) if blur else 0,
        blur_angle=random.uniform(0, np.pi),
        scale=around(1, ranges.scale),
        angle=np.radians(around(0, ranges.rotation)),
        shift=around(0, ranges.shift, 2),
        gain=around(1, ranges.gain, 3),
        brightness=255 * around(0, ranges.brightness),
        noise=255 * ranges.noise,
        noise_seed=int(random.integers(2**62)),
    )
