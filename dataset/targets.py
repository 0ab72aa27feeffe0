"""Samples -> network input and targets, batched on the device of the model.

Geometry under augmentation is exact: the 3D hands are turned (and mirrored) with the image, and the intrinsics follow,
so that projecting the new hands with the new intrinsics gives the old pixels moved by the image map.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from dataset.augmentation import BLUR_LENGTHS, AugmentationParameters
from dataset.prepared import Sample
from dataset.vertex_colours import canonical_colours, load_colours
from manopth import HandPair, Hands, TwoHandLayer
from models.predictions import Target
from utils.geometry import (
    CROP_SIZE,
    mirror_image_matrix,
    project,
    rotation_z,
    similarity_about_centre,
    to_uv,
    world_to_camera,
)
from utils.hand import MASK_THRESHOLD, NUM_FACES
from utils.rasterizer import interpolate, rasterize, two_hand_faces

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB, of values in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)
CPU_PART = 8  # samples at a time on a CPU: larger blocks of memory would come as fresh pages for every operation


class Batch(NamedTuple):
    """What one step works on."""

    image: Tensor  # (B, 3, s, s) RGB, ImageNet-normalised
    target: Target
    intrinsics: Tensor  # (B, 3, 3) of the 256 crop, after augmentation
    index: Tensor  # (B,)

    @property
    def picture(self) -> Tensor:
        """(B, 3, s, s) what the network sees, BGR in [0, 255], for drawing."""
        mean, std = (self.image.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return ((self.image * std + mean) * 255).flip(1)


def learns_dense(cfg: CfgNode) -> bool:
    """Whether dense maps are a target of this configuration."""
    return cfg.MODEL.DENSE_HEADS and cfg.LOSS.WEIGHT.DENSE > 0


def build_batch_maker(cfg: CfgNode, hand_models: HandPair) -> 'BatchMaker':
    """The batch maker as ``cfg`` describes it. Raises UserError if DATASET.COLOURS cannot be read."""
    renderer = None
    if cfg.DATASET.TARGETS == 'render':
        colours = load_colours(cfg.DATASET.COLOURS) if cfg.DATASET.COLOURS else canonical_colours(hand_models)
        renderer = TargetRenderer(hand_models, colours if learns_dense(cfg) else None)
    return BatchMaker(TwoHandLayer(hand_models), image_size=cfg.MODEL.IMAGE_SIZE, renderer=renderer)


class TargetRenderer(nn.Module):
    """Which hand is seen where, and the dense map, drawn from the labels as dataset/prepare/split.py draws the files.

    colours: (778, 3) in [0, 1], BGR, or None for no dense maps.
    """

    def __init__(self, models: HandPair, colours: np.ndarray | None = None):
        super().__init__()
        self.register_buffer('faces', two_hand_faces(models), persistent=False)
        both = None if colours is None else torch.from_numpy(np.concatenate([colours, colours]))
        self.register_buffer('colours', both, persistent=False)

    def forward(self, vertices: Tensor, intrinsics: Tensor, image_map: Tensor, *, size: int) -> tuple[Tensor, Tensor]:
        """Augmented vertices (B, 2, 778, 3) m and intrinsics, and the image map A that they were augmented with
        -> classes (B, size, size) int64: 0, 1 left, 2 right; dense (B, 3, size, size) or (B, 3, 0, 0) in [0, 1].

        The files show at pixel i what projects to i + 0.5; the shift goes through A as the files' pixels would.
        """
        back, forth = _shift(-0.5).to(image_map), _shift(0.5).to(image_map)
        shrink = torch.diag(intrinsics.new_tensor([size / CROP_SIZE, size / CROP_SIZE, 1.0]))
        to_files = shrink @ forth @ image_map @ back @ torch.linalg.inv(image_map)
        fragments = rasterize(vertices.flatten(1, 2), self.faces, to_files @ intrinsics, (size, size))
        classes = torch.where(fragments.face < 0, 0, 1 + (fragments.face >= NUM_FACES).long())
        if self.colours is None:
            return classes, vertices.new_zeros(len(vertices), 3, 0, 0)
        return classes, interpolate(fragments, self.faces, self.colours).permute(0, 3, 1, 2)


def _shift(pixels: float) -> Tensor:
    return torch.tensor([[1.0, 0.0, pixels], [0.0, 1.0, pixels], [0.0, 0.0, 1.0]])


class BatchMaker(nn.Module):
    """Sample (batched) -> Batch. ``image_size``: side of the network's input in pixels. ``renderer`` makes the targets
    that are not in the samples."""

    def __init__(
        self, hand_layer: TwoHandLayer, *, image_size: int = CROP_SIZE, renderer: TargetRenderer | None = None
    ):
        super().__init__()
        self.hand_layer, self.image_size, self.renderer = hand_layer, image_size, renderer
        self.register_buffer('mean', torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, samples: Sample) -> Batch:
        if self.mean.device.type != 'cpu' or len(samples.index) <= CPU_PART:
            return self.make(samples)
        return _map_tensors(torch.cat, *map(self.make, parts_of(samples, CPU_PART)))

    @torch.no_grad()
    def make(self, samples: Sample) -> Batch:
        """The whole batch at once."""
        device = self.mean.device
        plan = samples.augmentation  # stays on the host: what is to be done is decided there, without synchronising
        samples = Sample(*(x.to(device, non_blocking=True) for x in samples[:-1]), plan)
        moved = AugmentationParameters(*(x.to(device, torch.float32, non_blocking=True) for x in plan))
        flip, image_map = plan.flip.to(device), augmentation_map(moved)

        hands = mirror_and_turn(camera_hands(self.hand_layer, samples), flip, moved.angle)
        intrinsics = augmented_intrinsics(samples.intrinsics, image_map, flip, moved.angle)
        if self.renderer:
            samples = samples._replace(mask=samples.mask[:, :0, :0], dense=samples.dense[:, :0, :0])
        picture, mask, dense = self._images(samples, plan, image_map, flip)
        if self.renderer:
            segmentation, dense = self.renderer(hands.vertices, intrinsics, image_map, size=self.image_size)
        else:
            segmentation, dense = classify_mask(mask), dense / 255
        target = Target(
            vertices=hands.vertices,
            joints=hands.joints,
            vertices_uv=to_uv(project(hands.vertices, intrinsics[:, None])),
            joints_uv=to_uv(project(hands.joints, intrinsics[:, None])),
            segmentation=segmentation,
            dense=dense,
        )
        return Batch(self.normalised(picture), target, intrinsics, samples.index)

    def network_input(self, crops: Tensor) -> Tensor:
        """Crops as they are, (B, 256, 256, 3) uint8 BGR -> (B, 3, s, s) as the network takes them."""
        picture = crops.to(self.mean.device).permute(0, 3, 1, 2).float()
        if self.image_size != CROP_SIZE:
            nowhere = torch.eye(3, device=picture.device).expand(len(picture), 3, 3)
            picture = warp(picture, nowhere, size=self.image_size)
        return self.normalised(picture)

    def normalised(self, picture: Tensor) -> Tensor:
        """(B, 3, s, s) BGR in [0, 255] -> RGB, less ImageNet's mean, in its standard deviations."""
        return torch.addcmul(-self.mean / self.std, picture.flip(1), 1 / (255 * self.std))

    def _images(self, samples: Sample, plan: AugmentationParameters, image_map: Tensor, flip: Tensor):
        """-> picture (B, 3, s, s), mask (B, 2, s, s) left and right, dense (B, 3, s, s); 0 to 255, or no pixels."""
        there = [x for x in samples[:3] if x.numel()]
        stacked = torch.cat(there, -1).permute(0, 3, 1, 2).float()
        if samples.mask.numel():  # a flip shows a right hand where a left one was
            mask = stacked[:, 3:5]
            mask.copy_(torch.where(flip[:, None, None, None], mask.flip(1), mask))
        motion_blur_(stacked[:, :3], plan, flip=plan.flip)
        if self.image_size != CROP_SIZE or moves_the_image(plan):
            stacked = warp(stacked, image_map, size=self.image_size)
        parts = iter(stacked.split([x.shape[-1] for x in there], 1))
        image, mask, dense = (next(parts) if x.numel() else x.permute(0, 3, 1, 2).float() for x in samples[:3])
        return colour_and_noise(image, plan), mask, dense


def _map_tensors(function: Callable, *trees: NamedTuple) -> NamedTuple:
    """Apply ``function`` to the list of corresponding tensors of NamedTuples that are built alike."""
    return type(trees[0])(
        *(
            function(leaves) if isinstance(leaves[0], Tensor) else _map_tensors(function, *leaves)
            for leaves in zip(*trees)
        )
    )


def parts_of(samples: Sample, size: int) -> list[Sample]:
    """A batch in parts of ``size`` samples."""
    starts = range(0, len(samples.index), size)
    return [_map_tensors(lambda leaves, begin=begin: leaves[0][begin : begin + size], samples) for begin in starts]


def camera_hands(hand_layer: TwoHandLayer, samples: Sample) -> Hands:
    """The labels: MANO in the world, then in camera axes, metres. R (MANO + trans) + t."""
    hands = hand_layer(samples.root, samples.pose, samples.shape)
    place = samples.translation[:, :, None]
    return Hands(
        *(world_to_camera(points + place, samples.camera_rotation, samples.camera_translation) for points in hands)
    )


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
    # Where an output pixel comes from, in grid_sample's units, is a sum of what its column and its row contribute.
    by_right, by_down, constant = torch.linalg.inv(image_map)[:, None, :2].mul(2 / CROP_SIZE).unbind(-1)
    columns = by_right * steps[:, None]
    rows = by_down * steps[:, None] + (constant + 1 / CROP_SIZE - 1)
    grid = columns[:, None] + rows[:, :, None]  # (B, size, size, 2)
    return F.grid_sample(images, grid, mode='bilinear', padding_mode='zeros', align_corners=False)


def motion_blur_(image: Tensor, plan: AugmentationParameters, *, flip: Tensor) -> None:
    """Convolve the chosen samples with a normalised line, in place: image (B, 3, H, W), ``plan`` on the host.

    The blur follows the flip; the images here are not flipped yet (the warp does that), so its angle is mirrored.
    """
    chosen = plan.blur_length.nonzero().flatten()
    if len(chosen) == 0:
        return
    angle = torch.where(flip[chosen], math.pi - plan.blur_angle[chosen], plan.blur_angle[chosen])
    kernels = line_kernels(plan.blur_length[chosen], angle).to(image)
    picked = image[chosen.to(image.device)]
    count, channels = picked.shape[:2]
    padded = F.pad(picked, [kernels.shape[-1] // 2] * 4, mode='reflect').flatten(0, 1)[None]
    blurred = F.conv2d(padded, kernels.repeat_interleave(channels, 0)[:, None], groups=count * channels)
    image.index_copy_(0, chosen.to(image.device), blurred.view_as(picked))


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
    # A stream for each sample: whatever batch and process a sample falls into, its noise is the same.
    generator, grain = torch.Generator(image.device), torch.empty_like(image)
    for one, seed in zip(grain, plan.noise_seed.tolist()):
        one.normal_(generator=generator.manual_seed(seed))
    image = torch.addcmul(brightness[:, None, None, None], image, gain[:, :, None, None])
    return image.addcmul_(grain, noise[:, None, None, None]).round_().clamp_(0, 255)


def classify_mask(mask: Tensor) -> Tensor:
    """(B, 2, H, W) left, right -> (B, H, W) int64: 0 where neither exceeds 50, else 1 left or 2 right."""
    strongest, hand = mask.max(1)
    return torch.where(strongest > MASK_THRESHOLD, hand + 1, 0)
