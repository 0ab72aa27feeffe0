"""Augmentation of the pixels: mask flip and motion blur, then the warp, then colour and noise."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.augmentation import BLUR_LENGTHS, AugmentationParameters
from utils.geometry import CROP_SIZE, mirror_image_matrix, similarity_about_centre, warp


def augmentation_map(plan: AugmentationParameters) -> Tensor:
    """The image map A (B, 3, 3): flip (u -> 255 - u), then rotate, scale and shift about the centre of the crop."""
    similarity = similarity_about_centre(plan.scale, plan.angle, plan.shift)
    mirrored = similarity @ mirror_image_matrix().to(similarity)
    return torch.where(plan.flip.bool()[:, None, None], mirrored, similarity)


def augment_images(
    images: dict[str, Tensor], plan: AugmentationParameters, *, image_map: Tensor, size: int
) -> dict[str, Tensor]:
    """Augment stored images (B, 256, 256, C) uint8 -> (B, C, size, size) float32 in [0, 255], by the same names.

    images: 'image' BGR, and optionally 'mask' (left, right) and 'dense', all on one device. ``plan`` stays on the host:
    choosing what to do from it never waits for the device.
    """
    stacked = torch.cat(list(images.values()), -1).permute(0, 3, 1, 2).float()
    parts = dict(zip(images, stacked.split([image.shape[-1] for image in images.values()], 1)))
    if 'mask' in parts:  # flipped, a right hand is where a left hand was
        flip = plan.flip.to(stacked.device)[:, None, None, None]
        parts['mask'].copy_(torch.where(flip, parts['mask'].flip(1), parts['mask']))
    motion_blur_(parts['image'], plan)
    if size != CROP_SIZE or moves_pixels(plan):
        warped = warp(stacked, image_map, size=size)
        parts = dict(zip(images, warped.split([image.shape[-1] for image in images.values()], 1)))
    return parts | {'image': colour_and_noise(parts['image'], plan)}


def moves_pixels(plan: AugmentationParameters) -> bool:
    """Whether any sample needs a warp. Evaluation at full size does not, and keeps the pixels of the file."""
    return bool((plan.flip | (plan.scale != 1) | (plan.angle != 0) | (plan.shift != 0).any(-1)).any())


def motion_blur_(image: Tensor, plan: AugmentationParameters) -> None:
    """Blur the chosen samples along a line, in place: image (B, 3, H, W) before its flip, ``plan`` on the host.

    The blur angle is defined on the flipped image, and the warp flips later: here the angle is mirrored instead.
    """
    chosen = plan.blur_length.nonzero().flatten()
    if len(chosen) == 0:
        return
    angle = torch.where(plan.flip[chosen], math.pi - plan.blur_angle[chosen], plan.blur_angle[chosen])
    kernels = line_kernels(plan.blur_length[chosen], angle).to(image)
    picked = image[chosen.to(image.device)]
    count, channels = picked.shape[:2]
    padded = F.pad(picked, [kernels.shape[-1] // 2] * 4, mode='reflect').flatten(0, 1)[None]
    blurred = F.conv2d(padded, kernels.repeat_interleave(channels, 0)[:, None], groups=count * channels)
    image.index_copy_(0, chosen.to(image.device), blurred.view_as(picked))


def line_kernels(length: Tensor, angle: Tensor) -> Tensor:
    """Motion-blur kernels (N, 9, 9): normalised, anti-aliased lines of ``length`` (N,) pixels at ``angle`` (N,) rad."""
    side = BLUR_LENGTHS[1]
    steps = torch.arange(side, dtype=torch.float32) - side // 2
    down, right = torch.meshgrid(steps, steps, indexing='ij')
    cos, sin = angle.float().cos()[:, None, None], angle.float().sin()[:, None, None]
    along, beside = right * cos + down * sin, down * cos - right * sin
    inside = (length[:, None, None] / 2 + 0.5 - along.abs()).clamp(0, 1) * (1 - beside.abs()).clamp(0, 1)
    return inside / inside.sum((1, 2), keepdim=True)


def colour_and_noise(image: Tensor, plan: AugmentationParameters) -> Tensor:
    """Apply gain per channel, brightness and Gaussian noise, then round and clip to 8 bits.

    Without any of them in the batch, the image is returned unchanged.
    """
    touched = (plan.gain != 1).any(-1) | (plan.brightness != 0) | (plan.noise != 0)
    if not bool(touched.any()):
        return image
    gain, brightness, noise = (getattr(plan, name).to(image) for name in ('gain', 'brightness', 'noise'))
    # One stream per sample: its noise does not depend on the batch or process it is in.
    generator, grain = torch.Generator(image.device), torch.empty_like(image)
    for one, seed in zip(grain, plan.noise_seed.tolist()):
        one.normal_(generator=generator.manual_seed(seed))
    image = torch.addcmul(brightness[:, None, None, None], image, gain[:, :, None, None])
    return image.addcmul_(grain, noise[:, None, None, None]).round_().clamp_(0, 255)
