"""Draw random augmentation parameters per sample from (seed, epoch, index), in the loader."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLUR_LENGTHS = (3, 9)  # pixels, length of the motion-blur line, inclusive


class AugmentationRanges(NamedTuple):
    """The range of each draw; for units and meaning, see AUGMENT in utils/config.py."""

    rotation: float
    scale: float
    shift: float
    flip: float
    blur: float
    gain: float
    brightness: float
    noise: float


class AugmentationParameters(NamedTuple):
    """Augmentation of one sample (with a leading axis: of a batch), in order: flip, blur, warp, colour, noise."""

    flip: Tensor  # () bool
    blur_length: Tensor  # () int64 pixels; 0 for no blur
    blur_angle: Tensor  # () rad
    scale: Tensor  # ()
    angle: Tensor  # () rad, clockwise on screen
    shift: Tensor  # (2,) pixels of the 256 crop
    gain: Tensor  # (3,) per channel, BGR
    brightness: Tensor  # () grey levels
    noise: Tensor  # () grey levels, standard deviation
    noise_seed: Tensor  # () int64


_TYPES = (torch.bool, torch.int64, *[torch.float32] * 7, torch.int64)  # of the fields of AugmentationParameters


def parameters(
    *,
    flip: bool = False,
    blur_length: int = 0,
    blur_angle: float = 0.0,
    scale: float = 1.0,
    angle: float = 0.0,
    shift: tuple[float, float] = (0.0, 0.0),
    gain: tuple[float, float, float] = (1.0, 1.0, 1.0),
    brightness: float = 0.0,
    noise: float = 0.0,
    noise_seed: int = 0,
) -> AugmentationParameters:
    """Augmentation parameters of one sample from plain numbers. The defaults leave the sample unchanged."""
    row = (flip, blur_length, blur_angle, scale, angle, shift, gain, brightness, noise, noise_seed)
    return AugmentationParameters(*(torch.tensor(value, dtype=kind) for value, kind in zip(row, _TYPES)))


def draw_augmentation(ranges: AugmentationRanges | None, key: tuple[int, int, int]) -> AugmentationParameters:
    """Draw uniformly, from ``key`` = (seed, epoch, index) alone. Without ranges, the sample stays unchanged."""
    return AugmentationParameters(*(column[0] for column in draw_augmentations(ranges, [key])))


def draw_augmentations(ranges: AugmentationRanges | None, keys: list[tuple[int, int, int]]) -> AugmentationParameters:
    """``draw_augmentation`` for a batch: every field has a leading axis."""
    if ranges is None:
        return AugmentationParameters(*(value.expand(len(keys), *value.shape).clone() for value in parameters()))
    columns = zip(*(_draw(ranges, key) for key in keys))
    return AugmentationParameters(*(torch.tensor(column, dtype=kind) for column, kind in zip(columns, _TYPES)))


def _draw(ranges: AugmentationRanges, key: tuple[int, int, int]) -> tuple:
    """Plain numbers in the order of ``AugmentationParameters``: one tensor per number would cost more than drawing."""
    random = np.random.default_rng(key)

    def around(centre: float, reach: float, size: int | None = None):
        values = random.uniform(centre - reach, centre + reach, size)
        return values if size is None else values.tolist()

    flip, blur = random.random(2) < (ranges.flip, ranges.blur)
    length = int(random.integers(*BLUR_LENGTHS, endpoint=True)) if blur else 0
    blur_angle, scale, degrees = random.uniform(0, math.pi), around(1, ranges.scale), around(0, ranges.rotation)
    shift, gain, brightness = around(0, ranges.shift, 2), around(1, ranges.gain, 3), around(0, ranges.brightness)
    return (
        bool(flip),
        length,
        blur_angle,
        scale,
        math.radians(degrees),
        shift,
        gain,
        255 * brightness,
        255 * ranges.noise,
        int(random.integers(2**62)),
    )
