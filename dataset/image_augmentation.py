"""Augmentation of the pixels: motion blur, the warp, occluders, resolution, colour and noise, JPEG."""

import math
from functools import cache

import cv2
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.augmentation import BLUR_LENGTHS, MOST_OCCLUDERS, REDUCTIONS, AugmentationParameters
from dataset.prepared import Sample
from utils.geometry import CROP_SIZE, mirror_image_matrix, similarity_about_centre, warp


def augmentation_map(plan: AugmentationParameters) -> Tensor:
    """The image map A (B, 3, 3): flip (u -> 255 - u), then rotate, scale and shift about the centre of the crop."""
    similarity = similarity_about_centre(plan.scale, plan.angle, plan.shift)
    mirrored = similarity @ mirror_image_matrix().to(similarity)
    return torch.where(plan.flip.bool()[:, None, None], mirrored, similarity)


def augment_images(samples: Sample, image_map: Tensor, *, size: int) -> Tensor:
    """Augment the samples' images, moved by image_map (B, 3, 3) -> (B, 3, size, size) float32 BGR in [0, 255].

    The augmentation parameters stay on the host: choosing what to do from them never waits for the device.
    """
    plan = samples.augmentation
    image = samples.image.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    motion_blur_(image, plan)
    image = warp_moved(image, plan, image_map=image_map, size=size)
    occlude_(image, plan)
    reduce_resolution_(image, plan)
    image = colour_and_noise_(apply_gamma(image, plan), plan)
    remove_colour_(image, plan)
    compress_(image, plan)
    return image


def warp_moved(
    images: Tensor, plan: AugmentationParameters, *, image_map: Tensor, size: int, pixels: Tensor | None = None
) -> Tensor:
    """``warp``, but at full size, samples that ``plan`` (on the host) leaves in place keep the pixels of the file."""
    still = torch.zeros_like(plan.flip) if size != CROP_SIZE else ~moves_pixels(plan)
    if not still.any():
        return warp(images, image_map, size=size, pixels=pixels)
    read = images if pixels is None else images[:, :, pixels[:, None], pixels]
    if still.all():
        return read
    warped = warp(images, image_map, size=size, pixels=pixels)
    return torch.where(still.to(images.device)[:, None, None, None], read, warped)


def moves_pixels(plan: AugmentationParameters) -> Tensor:
    """Which samples need a warp (B,). Evaluation at full size needs none."""
    return plan.flip | (plan.scale != 1) | (plan.angle != 0) | (plan.shift != 0).any(-1)


def motion_blur_(image: Tensor, plan: AugmentationParameters) -> None:
    """Blur the chosen samples along a line, in place: image (B, 3, H, W) before its flip, ``plan`` on the host.

    The blur angle is defined on the flipped image, and the warp flips later: here the angle is mirrored instead.
    """
    chosen = plan.blur_length.nonzero().flatten()
    if len(chosen) == 0:
        return
    angle = torch.where(plan.flip[chosen], math.pi - plan.blur_angle[chosen], plan.blur_angle[chosen])
    kernels = line_kernels(plan.blur_length[chosen], angle)
    if image.device.type == 'cpu':  # OpenCV skips the zeros of a kernel: ten times as fast, and equal to the bit
        for row, kernel in zip(chosen.tolist(), kernels.numpy()):
            for channel in image[row].numpy():
                cv2.filter2D(channel, cv2.CV_32F, kernel, dst=channel, borderType=cv2.BORDER_REFLECT_101)
        return
    rows = chosen.to(image.device)
    image.index_copy_(0, rows, filter_images(image[rows], kernels.to(image)))


def filter_images(images: Tensor, kernels: Tensor) -> Tensor:
    """Correlate images (N, C, H, W) with one kernel each, (N, k, k) with k odd; the border is reflected."""
    count, channels = images.shape[:2]
    padded = F.pad(images, [kernels.shape[-1] // 2] * 4, mode='reflect').flatten(0, 1)[None]
    filtered = F.conv2d(padded, kernels.repeat_interleave(channels, 0)[:, None], groups=count * channels)
    return filtered.view_as(images)


def line_kernels(length: Tensor, angle: Tensor) -> Tensor:
    """Motion-blur kernels (N, 9, 9): normalised, anti-aliased lines of ``length`` (N,) pixels at ``angle`` (N,) rad."""
    side = BLUR_LENGTHS[1]
    steps = torch.arange(side, dtype=torch.float32) - side // 2
    down, right = torch.meshgrid(steps, steps, indexing='ij')
    cos, sin = angle.float().cos()[:, None, None], angle.float().sin()[:, None, None]
    along, beside = right * cos + down * sin, down * cos - right * sin
    inside = (length[:, None, None] / 2 + 0.5 - along.abs()).clamp(0, 1) * (1 - beside.abs()).clamp(0, 1)
    return inside / inside.sum((1, 2), keepdim=True)


def colour_and_noise_(image: Tensor, plan: AugmentationParameters) -> Tensor:
    """Apply gain per channel, brightness and Gaussian noise, then round and clip to 8 bits, in place.

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
    image.mul_(gain[:, :, None, None]).add_(brightness[:, None, None, None])  # on a CPU twice as fast as ``addcmul``
    return image.addcmul_(grain, noise[:, None, None, None]).round_().clamp_(0, 255)


def occlude_(image: Tensor, plan: AugmentationParameters) -> None:
    """Paint plain rectangles over the chosen samples, in place."""
    chosen = (plan.occluders[:, :, 2] > 0).any(1).nonzero().flatten()
    if len(chosen) == 0:
        return
    rows, rectangles = chosen.to(image.device), plan.occluders[chosen].to(image)
    steps = (torch.arange(image.shape[-1], device=image.device) + 0.5) / image.shape[-1]
    picked = image[rows]
    for place in range(MOST_OCCLUDERS):
        x, y, half_width, half_height, angle = rectangles[:, place, :5, None, None].unbind(1)
        right, down = steps - x, steps[:, None] - y
        along = right * angle.cos() + down * angle.sin()
        beside = down * angle.cos() - right * angle.sin()
        inside = (along.abs() < half_width) & (beside.abs() < half_height)
        picked = torch.where(inside[:, None], rectangles[:, place, 5:, None, None], picked)
    image.index_copy_(0, rows, picked)


def reduce_resolution_(image: Tensor, plan: AugmentationParameters) -> None:
    """Average the chosen samples over larger pixels and interpolate back to their size, in place."""
    size = image.shape[-1]
    for divisor in range(REDUCTIONS[0], REDUCTIONS[1] + 1):
        chosen = (plan.reduction == divisor).nonzero().flatten()
        if len(chosen):
            rows = chosen.to(image.device)
            small = F.interpolate(image[rows], (size // divisor, size // divisor), mode='area')
            image.index_copy_(0, rows, F.interpolate(small, (size, size), mode='bilinear', align_corners=False))


def apply_gamma(image: Tensor, plan: AugmentationParameters) -> Tensor:
    """Raise values in [0, 1] to the power ``gamma``. Without any in the batch, the image is returned unchanged."""
    if not bool((plan.gamma != 1).any()):
        return image
    return 255 * (image / 255).clamp(0, 1) ** plan.gamma.to(image)[:, None, None, None]


def remove_colour_(image: Tensor, plan: AugmentationParameters) -> None:
    """Replace the chosen samples' channels by their luma, in place."""
    chosen = plan.grey.nonzero().flatten()
    if len(chosen):
        rows = chosen.to(image.device)
        blue, green, red = image[rows].split(1, 1)
        luma = (0.114 * blue + 0.587 * green + 0.299 * red).round_()
        image.index_copy_(0, rows, luma.expand(-1, 3, -1, -1))


def compress_(image: Tensor, plan: AugmentationParameters) -> None:
    """Apply JPEG's loss (without chroma subsampling) to the chosen samples, in place: BGR in [0, 255], side / 8 whole.

    ITU-T T.81: quantise the discrete cosine transform of 8 x 8 blocks with the tables of its Annex K, scaled to the
    quality as libjpeg does.
    """
    chosen = plan.quality.nonzero().flatten()
    if len(chosen) == 0:
        return
    rows, quality = chosen.to(image.device), plan.quality[chosen].float()
    scale = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)[:, None, None, None]
    quantum = ((_QUANTISATION * scale + 50) / 100).floor().clamp(1, 255).to(image)  # (N, 3, 8, 8)
    quantum = quantum[:, :, None, :, None, :]
    cosines, to_ycc = _cosines().to(image), _YCC_OF_BGR.to(image)
    picked = image[rows]
    size = picked.shape[-1]
    ycc = torch.einsum('cd,ndyx->ncyx', to_ycc, picked)
    ycc[:, 0] -= 128
    blocks = ycc.unflatten(3, (size // 8, 8)).unflatten(2, (size // 8, 8))  # (N, 3, S / 8, 8, S / 8, 8)
    frequencies = torch.einsum('ui,ncyixj,vj->ncyuxv', cosines, blocks, cosines)
    frequencies = (frequencies / quantum).round_() * quantum
    ycc = torch.einsum('ui,ncyuxv,vj->ncyixj', cosines, frequencies, cosines).flatten(4).flatten(2, 3)
    ycc[:, 0] += 128
    lossy = torch.einsum('dc,ncyx->ndyx', torch.linalg.inv(_YCC_OF_BGR).to(image), ycc)
    image.index_copy_(0, rows, lossy.round_().clamp_(0, 255))


_YCC_OF_BGR = torch.tensor([[0.114, 0.587, 0.299], [0.5, -0.331264, -0.168736], [-0.081312, -0.418688, 0.5]])
_LUMA = [
    *([16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55], [14, 13, 16, 24, 40, 57, 69, 56]),
    *([14, 17, 22, 29, 51, 87, 80, 62], [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92]),
    *([49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99]),
]
_CHROMA = [
    *([17, 18, 24, 47, 99, 99, 99, 99], [18, 21, 26, 66, 99, 99, 99, 99], [24, 26, 56, 99, 99, 99, 99, 99]),
    *([47, 66, 99, 99, 99, 99, 99, 99], *[[99] * 8] * 4),
]
_QUANTISATION = torch.tensor([_LUMA, _CHROMA, _CHROMA], dtype=torch.float32)


@cache
def _cosines() -> Tensor:
    """The orthonormal discrete cosine transform of 8 values: (frequency, position)."""
    frequency, position = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing='ij')
    matrix = 0.5 * torch.cos((2 * position + 1) * frequency * math.pi / 16)
    matrix[0] /= 2**0.5
    return matrix
