"""Draw random augmentation parameters per sample from (seed, epoch, index), in the loader."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLUR_LENGTHS = (3, 9)  # pixels, length of the motion-blur line, inclusive
REDUCTIONS = (2, 5)  # of the resolution, inclusive
QUALITIES = (10, 60)  # of JPEG compression, inclusive
MOST_OCCLUDERS = 3
NO_OCCLUDERS = ((0.0,) * 8,) * MOST_OCCLUDERS


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
    occlude: float = 0.0
    coarse: float = 0.0
    grey: float = 0.0
    gamma: float = 0.0
    jpeg: float = 0.0


class AugmentationParameters(NamedTuple):
    """Augmentation of one sample (with a leading axis: of a batch).

    In order: flip, blur, warp, occluders, reduction, gamma, colour, noise, loss of colour, compression.
    """

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
    occluders: (
        Tensor  # (3, 8) centre (2) and half sides (2) in sides of the image, angle (rad), BGR; half sides 0: none
    )
    reduction: Tensor  # () int64: the resolution is divided by this
    gamma: Tensor  # () exponent of values in [0, 1]
    grey: Tensor  # () bool
    quality: Tensor  # () int64 of JPEG compression; 0 for none


# Of the fields of AugmentationParameters.
_TYPES = (
    *(torch.bool, torch.int64, *[torch.float32] * 7, torch.int64),
    *(torch.float32, torch.int64, torch.float32, torch.bool, torch.int64),
)


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
    occluders: tuple[tuple[float, ...], ...] = NO_OCCLUDERS,
    reduction: int = 1,
    gamma: float = 1.0,
    grey: bool = False,
    quality: int = 0,
) -> AugmentationParameters:
    """Augmentation parameters of one sample from plain numbers. The defaults leave the sample unchanged."""
    row = (
        *(flip, blur_length, blur_angle, scale, angle, shift, gain, brightness, noise, noise_seed),
        *(occluders, reduction, gamma, grey, quality),
    )
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
        *_draw_degradation(ranges, random),
    )


def _draw_degradation(ranges: AugmentationRanges, random: np.random.Generator) -> tuple:
    """Occluders, reduction, gamma, grey, quality. Drawn last, so that all other draws do not depend on their ranges."""
    probabilities = (ranges.occlude, ranges.coarse, ranges.grey, ranges.jpeg)
    if not any(probabilities) and not ranges.gamma:
        return NO_OCCLUDERS, 1, 1.0, False, 0
    occluded, coarse, grey, compressed = (random.random(4) < probabilities).tolist()
    gamma = 2 ** random.uniform(-ranges.gamma, ranges.gamma)
    reduction, quality = (int(random.integers(*limits, endpoint=True)) for limits in (REDUCTIONS, QUALITIES))
    occluders = list(NO_OCCLUDERS)
    for place in range(int(random.integers(1, MOST_OCCLUDERS, endpoint=True)) if occluded else 0):
        centre, half_sides = random.uniform(0.1, 0.9, 2), random.uniform(0.02, 0.14, 2)
        occluders[place] = (*centre, *half_sides, random.uniform(0, math.pi), *random.uniform(0, 255, 3))
    return tuple(occluders), reduction if coarse else 1, gamma, grey, quality if compressed else 0
