"""Samples -> network input and targets, batched on the device of the model.

Geometry under augmentation is exact: the 3D hands are turned (and mirrored) with the image, and the intrinsics follow,
so that projecting the new hands with the new intrinsics gives the old pixels moved by the image map.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset.augmentation import BLUR_LENGTHS, AugmentationParameters
from dataset.interhand import Sample
from manopth import Hands, TwoHandLayer
from models.criterion import Target
from utils.geometry import (
    CROP_SIZE,
    mirror_image_matrix,
    project,
    rotation_z,
    similarity_about_centre,
    to_uv,
    world_to_camera,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB, of values in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)
MASK_THRESHOLD = 50  # masks are JPEGs: a hand is where a channel exceeds this


class Batch(NamedTuple):
    """What one step works on."""

    image: Tensor  # (B, 3, s, s) RGB, ImageNet-normalised
    target: Target
    intrinsics: Tensor  # (B, 3, 3) of the 256 crop, after augmentation
    picture: Tensor  # (B, 3, s, s) what the network sees, BGR in [0, 255]: for drawing
    index: Tensor  # (B,)


class BatchMaker(nn.Module):
    """Sample (batched) -> Batch. ``image_size``: side of the network's input in pixels."""

    def __init__(self, hand_layer: TwoHandLayer, *, image_size: int = CROP_SIZE):
        super().__init__()
        self.hand_layer, self.image_size = hand_layer, image_size
        self.register_buffer('mean', torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, samples: Sample) -> Batch:
        device = self.mean.device
        plan = samples.augmentation  # stays on the host: what is to be done is decided there, without synchronising
        samples = Sample(*(x.to(device, non_blocking=True) for x in samples[:-1]), plan)
        moved = AugmentationParameters(*(x.to(device, torch.float32, non_blocking=True) for x in plan))
        flip, image_map = plan.flip.to(device), augmentation_map(moved)

        hands = mirror_and_turn(camera_hands(self.hand_layer, samples), flip, moved.angle)
        intrinsics = augmented_intrinsics(samples.intrinsics, image_map, flip, moved.angle)
        picture, mask, dense = self._images(samples, plan, image_map, flip)
        rgb = picture.flip(1) / 255
        target = Target(
            vertices=hands.vertices, joints=hands.joints,
            vertices_uv=to_uv(project(hands.vertices, intrinsics[:, None])),
            joints_uv=to_uv(project(hands.joints, intrinsics[:, None])),
            segmentation=classify_mask(mask), dense=dense / 255,
        )
        return Batch((rgb - self.mean) / self.std, target, intrinsics, picture, samples.index)

    def _images(self, samples: Sample, plan: AugmentationParameters, image_map: Tensor, flip: Tensor):
        """-> picture (B, 3, s, s), mask (B, 2, s, s) left and right, dense (B, 3, s, s) or (B, 3, 0, 0); 0 to 255."""
        image, mask, dense = (x.permute(0, 3, 1, 2).float() for x in samples[:3])
        # A flip shows a right hand where a left one was.
        mask = torch.where(flip[:, None, None, None], mask.flip(1), mask)
        image = motion_blur(image, plan, flip=plan.flip)
        parts = [image, mask, dense] if dense.numel() else [image, mask]
        if self.image_size != CROP_SIZE or moves_the_image(plan):
            warped = warp(torch.cat(parts, 1), image_map, size=self.image_size)
            parts = list(warped.split([part.shape[1] for part in parts], 1))
        if len(parts) == 2:
            parts.append(dense)
        parts[0] = colour_and_noise(parts[0], plan)
        return parts


def camera_hands(hand_layer: TwoHandLayer, samples: Sample) -> Hands:
    """The labels: MANO in the world, then in camera axes, metres. R (MANO + trans) + t."""
    hands = hand_layer(samples.root, samples.pose, samples.shape)
    place = samples.translation[:, :, None]
    return Hands(*(world_to_camera(points + place, samples.camera_rotation, samples.camera_translation)
                   for points in hands))


def augmentation_map(plan: AugmentationParameters) -> Tensor:
    """A (B, 3, 3): flip first (u -> 255 - u), then turn, scale and shift about the crop's centre."""
    similarity = similarity_about_centre(plan.scale, plan.angle, plan.shift)
    mirrored = similarity @ mirror_image_matrix().to(similarity)
    return torch.where(plan.flip.bool()[:, None, None], mirrored, similarity)


def mirror_and_turn(hands: Hands, flip: Tensor, angle: Tensor) -> Hands:
    """The image map's counterpart in 3D: x -> -x with the hands swapped where flipped, then a rotation about z."""
    turn = rotation_z(angle)[:, None]
    flip = flip[:, None, None, None]

    def move(points: Tensor) -> Tensor:
        mirrored = points.flip(1) * points.new_tensor([-1.0, 1.0, 1.0])
        return torch.where(flip, mirrored, points) @ turn.transpose(-1, -2)

    return Hands(*(move(points) for points in hands))


def augmented_intrinsics(intrinsics: Tensor, image_map: Tensor, flip: Tensor, angle: Tensor) -> Tensor:
    """K' = A K (R_z M)^-1 with M = diag(-1, 1, 1) where flipped: no longer upper-triangular, and exact."""
    mirror = torch.ones(len(flip), 3, 3, device=flip.device).diagonal(dim1=1, dim2=2).diag_embed()
    mirror[:, 0, 0] = torch.where(flip, -1.0, 1.0)
    return image_map @ intrinsics @ mirror @ rotation_z(angle).transpose(-1, -2)


def moves_the_image(plan: AugmentationParameters) -> bool:
    """Whether any sample needs a warp; evaluation at full size does not, and sees the file's own pixels."""
    return bool((plan.flip | (plan.scale != 1) | (plan.angle != 0) | (plan.shift != 0).any(-1)).any())


def warp(images: Tensor, image_map: Tensor, *, size: int = CROP_SIZE) -> Tensor:
    """Move pictures by A, bilinear, black outside: (B, C, 256, 256) -> (B, C, size, size).

    A maps pixels of the 256 crop to pixels of the 256 crop; a smaller output shows the same crop in fewer pixels.
    """
    cell = CROP_SIZE / size
    steps = (torch.arange(size, device=images.device, dtype=images.dtype) + 0.5) * cell - 0.5
    down, right = torch.meshgrid(steps, steps, indexing='ij')
    there = torch.stack([right, down, torch.ones_like(right)], -1).view(-1, 3)
    source = (there @ torch.linalg.inv(image_map).transpose(-1, -2))[..., :2].view(len(images), size, size, 2)
    grid = (source + 0.5) * (2 / CROP_SIZE) - 1
    return F.grid_sample(images, grid, mode='bilinear', padding_mode='zeros', align_corners=False)


def motion_blur(image: Tensor, plan: AugmentationParameters, *, flip: Tensor) -> Tensor:
    """Convolve the chosen samples with a normalised line: image (B, 3, H, W), ``plan`` on the host.

    The blur follows the flip; the images here are not flipped yet (the warp does that), so its angle is mirrored.
    """
    chosen = plan.blur_length.nonzero().flatten()
    if len(chosen) == 0:
        return image
    angle = torch.where(flip[chosen], math.pi - plan.blur_angle[chosen], plan.blur_angle[chosen])
    kernels = line_kernels(plan.blur_length[chosen], angle).to(image)
    picked = image[chosen.to(image.device)]
    count, channels = picked.shape[:2]
    padded = F.pad(picked, [kernels.shape[-1] // 2] * 4, mode='reflect').flatten(0, 1)[None]
    blurred = F.conv2d(padded, kernels.repeat_interleave(channels, 0)[:, None], groups=count * channels)
    return image.index_copy(0, chosen.to(image.device), blurred.view_as(picked))


def line_kernels(length: Tensor, angle: Tensor) -> Tensor:
    """Normalised, anti-aliased lines of ``length`` (N,) pixels at ``angle`` (N,) rad -> (N, 9, 9)."""
    side = BLUR_LENGTHS[1]
    steps = torch.arange(side, dtype=torch.float32) - side // 2
    down, right = torch.meshgrid(steps, steps, indexing='ij')
    cos, sin = angle.float().cos()[:, None, None], angle.float().sin()[:, None, None]
    along, beside = right * cos + down * sin, down * cos - right * sin
    inside = (length[:, None, None] / 2 + 0.5 - along.abs()).clamp(0, 1) * (1 - beside.abs()).clamp(0, 1)
    return inside / inside.sum((1, 2), keepdim=True)


def colour_and_noise(image: Tensor, plan: AugmentationParameters) -> Tensor:
    """Gain per channel, brightness, Gaussian noise, then rounded and clipped to 8 bits; samples without any stay."""
    touched = (plan.gain != 1).any(-1) | (plan.brightness != 0) | (plan.noise != 0)
    if not bool(touched.any()):
        return image
    gain, brightness, noise = (getattr(plan, name).to(image) for name in ('gain', 'brightness', 'noise'))
    # One stream for the batch, from the first sample's seed: a resumed run has the same batches, so the same noise.
    generator = torch.Generator(image.device).manual_seed(int(plan.noise_seed[0]))
    grain = torch.randn(image.shape, generator=generator, device=image.device)
    image = image * gain[:, :, None, None] + brightness[:, None, None, None] + grain * noise[:, None, None, None]
    return image.round().clamp(0, 255)


def classify_mask(mask: Tensor) -> Tensor:
    """(B, 2, H, W) left, right -> (B, H, W) int64: 0 where neither exceeds 50, else 1 left or 2 right."""
    strongest, hand = mask.max(1)
    return torch.where(strongest > MASK_THRESHOLD, hand + 1, 0)
