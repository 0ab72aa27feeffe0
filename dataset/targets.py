"""Training targets from labels: hands in camera axes, pixel classes and dense maps, moved exactly as the image is.

The 3D hands are rotated (and mirrored) with the image and the intrinsics follow, so that projecting the new hands with
the new intrinsics gives the old pixels moved by the image map.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset.image_augmentation import warp_moved
from dataset.prepared import Sample
from manopth import HandModel, HandPair, Hands, TwoHandLayer
from models.predictions import Target
from utils.geometry import CROP_SIZE, project, rotation_z, to_uv, world_to_camera
from utils.hand import CHAIN_PARENTS, MANO_TO_JOINTS, MASK_THRESHOLD, NUM_CHAIN_JOINTS, NUM_FACES, NUM_JOINTS, WRIST
from utils.masking import where_leading
from utils.rasterizer import Fragments, interpolate, nearest_at, rasterize


def camera_hands(hand_layer: TwoHandLayer, samples: Sample) -> Hands:
    """Pose the annotated hands, in camera axes and metres: R (MANO + translation) + t."""
    hands = hand_layer(samples.root, samples.pose, samples.shape)
    place = samples.translation[:, :, None]
    return Hands(
        *(world_to_camera(points + place, samples.camera_rotation, samples.camera_translation) for points in hands)
    )


def mirror_and_rotate(hands: Hands, *, flip: Tensor, angle: Tensor) -> Hands:
    """Apply the image augmentation in 3D: where flipped, x -> -x and the hands swap; then rotate about z.

    flip (B,) bool, angle (B,) rad.
    """
    rotation = rotation_z(angle)[:, None]
    flip = flip[:, None, None, None]

    def move(points: Tensor) -> Tensor:
        mirrored = points.flip(1) * points.new_tensor([-1.0, 1.0, 1.0])
        return torch.where(flip, mirrored, points) @ rotation.transpose(-1, -2)

    return Hands(*(move(points) for points in hands))


def augmented_intrinsics(intrinsics: Tensor, *, image_map: Tensor, flip: Tensor, angle: Tensor) -> Tensor:
    """K' = A K (R_z M)^-1 with M = diag(-1, 1, 1) where flipped: exact, and no longer upper-triangular."""
    mirror = torch.ones(len(flip), 3, 3, device=flip.device).diagonal(dim1=1, dim2=2).diag_embed()
    mirror[:, 0, 0] = torch.where(flip, -1.0, 1.0)
    return image_map @ intrinsics @ mirror @ rotation_z(angle).transpose(-1, -2)


def make_target(
    hands: Hands,
    intrinsics: Tensor,
    *,
    segmentation: Tensor,
    dense: Tensor | None,
    present: Tensor | None = None,
    visible: Tensor | None = None,
) -> Target:
    """Augmented hands and intrinsics (B, 3, 3), with what else a Target holds -> Target."""
    return Target(
        vertices=hands.vertices,
        joints=hands.joints,
        vertices_uv=to_uv(project(hands.vertices, intrinsics[:, None])),
        joints_uv=to_uv(project(hands.joints, intrinsics[:, None])),
        segmentation=segmentation,
        dense=dense,
        present=present,
        visible=visible,
    )


def classify_mask(mask: Tensor) -> Tensor:
    """(B, 2, H, W) left, right in [0, 255] -> classes (B, H, W) int64: 0 where neither exceeds 50, 1 left, 2 right."""
    strongest, hand = mask.max(1)
    return torch.where(strongest > MASK_THRESHOLD, hand + 1, 0)


class PixelTargets(NamedTuple):
    """Training targets per pixel."""

    segmentation: Tensor  # (B, n, n) int64: 0 background, 1 left, 2 right
    dense: Tensor | None  # (B, 3, n, n) in [0, 1]; None where it is not learned


def stored_maps(samples: Sample, image_map: Tensor, *, size: int, target_size: int) -> PixelTargets:
    """Warp the samples' masks and dense maps as the image, by image_map (B, 3, 3), and classify the mask.

    size: side of the image in pixels. target_size: side of the targets, which divides ``size``: they equal the classes
    of all ``size`` x ``size`` pixels resized by 'nearest' and that dense map resized by 'bilinear', but only the pixels
    that those read are computed. Raises ValueError without masks.
    """
    if samples.mask is None:
        raise ValueError(
            'The samples have no masks: open the split with_mask=True, or give the batch maker a renderer.'
        )

    def warped(stored: Tensor, pixels_of: Callable[[int], list[int]]) -> Tensor:
        images, cell = stored.float().permute(0, 3, 1, 2), size // target_size
        pixels = None if cell == 1 else pixels_in_cells(pixels_of(cell), cell=cell, size=size, device=images.device)
        return warp_moved(images, samples.augmentation, image_map=image_map, size=size, pixels=pixels)

    mask = warped(samples.mask, pixels_of_nearest)
    flip = samples.augmentation.flip.to(mask.device)[:, None, None, None]
    segmentation = classify_mask(torch.where(flip, mask.flip(1), mask))  # flipped, a right hand is where a left one was
    if samples.dense is None:
        return PixelTargets(segmentation, None)
    dense = warped(samples.dense, pixels_of_bilinear) / 255
    return PixelTargets(segmentation, resize_dense(dense, target_size))


def resize_dense(dense: Tensor, side: int) -> Tensor:
    """Resize dense maps (B, 3, n, n) to ``side`` as the criterion does."""
    if dense.shape[-1] == side:
        return dense
    return F.interpolate(dense, (side, side), mode='bilinear', align_corners=False)


def pixels_of_nearest(cell: int) -> list[int]:
    """The pixel of each cell that ``F.interpolate``'s 'nearest' reads where it reduces ``cell`` pixels to one."""
    return [0]


def pixels_of_bilinear(cell: int) -> list[int]:
    """The pixels of each cell that 'bilinear' (without ``align_corners``) reads: the one or two in its middle."""
    return list(range((cell - 1) // 2, cell // 2 + 1))


def pixels_in_cells(of_cell: list[int], *, cell: int, size: int, device: torch.device) -> Tensor:
    """Rows (or columns) of an image of side ``size`` that lie at the places ``of_cell`` of each of its cells."""
    return torch.stack([torch.arange(place, size, cell, device=device) for place in of_cell], 1).flatten()


def only_present(vertices: Tensor, present: Tensor | None) -> Tensor:
    """Vertices (B, 2, 778, 3) with absent hands behind the camera, where nothing is rendered. present: (B, 2) bool."""
    return vertices if present is None else where_leading(present, vertices, -1.0)


VISIBILITY_SIDE = 128  # pixels: the crop's side where joints are compared with surfaces
THICKEST = 0.03  # m: a surface that lies further in front of a joint is not the joint's own


class JointVisibility(nn.Module):
    """Find the visible joints: those whose own flesh is the nearest surface in their pixel.

    A joint's flesh are the faces of the two rigid parts that meet in it, up to ``THICKEST`` in front of it.
    """

    faces: Tensor
    flesh: Tensor

    def __init__(self, hands: HandPair):
        super().__init__()
        self.register_buffer('faces', torch.from_numpy(hands.mesh_faces), persistent=False)
        self.register_buffer('flesh', torch.block_diag(*map(_flesh, hands)).bool(), persistent=False)

    def forward(self, hands: Hands, intrinsics: Tensor, present: Tensor | None = None) -> Tensor:
        """Augmented hands, m, and intrinsics (B, 3, 3) of the 256 crop -> (B, 2, 21) bool; False outside the crop.

        present: (B, 2) bool. Whatever augmentation draws in front of the hands is not considered.
        """
        side = VISIBILITY_SIDE
        shrink = torch.diag(intrinsics.new_tensor([side / CROP_SIZE, side / CROP_SIZE, 1.0]))
        meshes = only_present(hands.vertices, present).flatten(1, 2)
        joints = hands.joints.flatten(1, 2)
        cell = (project(joints, intrinsics) * side / CROP_SIZE).floor()
        inside = ((cell >= 0) & (cell < side)).all(-1) & (joints[..., 2] > 0)
        pixels = torch.where(inside[..., None], cell, 0.0).long()
        face, depth = nearest_at(meshes, self.faces, shrink @ intrinsics, pixels)
        own = self.flesh[torch.arange(len(self.flesh), device=face.device), face.clamp_min(0)]
        own &= joints[..., 2] - depth < THICKEST
        visible = (inside & ((face < 0) | own)).unflatten(1, (2, NUM_JOINTS))
        return visible if present is None else visible & present[:, :, None]


def _flesh(hand: HandModel) -> Tensor:
    """(21, 1538): which faces belong to the parts that meet in each joint."""
    part = hand.skinning_weights[hand.faces].sum(1).argmax(1)  # of each face
    rows = []
    for joint, chain in enumerate(MANO_TO_JOINTS):
        if chain >= NUM_CHAIN_JOINTS:  # a tip, on the part of the joint before it
            meeting = [MANO_TO_JOINTS[joint - 1]]
        else:
            meeting = [chain] if joint == WRIST else [chain, CHAIN_PARENTS[chain]]
        rows.append(np.isin(part, meeting))
    return torch.from_numpy(np.stack(rows))


class TargetRenderer(nn.Module):
    """Render pixel classes and dense maps from the labels, as dataset/prepare/split.py renders the files.

    colours: (778, 3) in [0, 1], BGR; without them no dense maps are rendered.
    """

    faces: Tensor
    colours: Tensor | None

    def __init__(self, hands: HandPair, colours: np.ndarray | None = None):
        super().__init__()
        self.register_buffer('faces', torch.from_numpy(hands.mesh_faces), persistent=False)
        both = None if colours is None else torch.from_numpy(np.concatenate([colours, colours]))
        self.register_buffer('colours', both, persistent=False)

    def forward(
        self, vertices: Tensor, *, intrinsics: Tensor, image_map: Tensor, size: int, target_size: int | None = None
    ) -> PixelTargets:
        """Render augmented hands into targets of ``target_size`` (None: ``size``), equal to resized ones of ``size``.

        vertices (B, 2, 778, 3) m and intrinsics (B, 3, 3) after augmentation; image_map (B, 3, 3) of that augmentation.
        """
        # Pixel i of the files shows what projects to i + 0.5; the shift passes through A as the files' pixels would.
        back, forth = _shift(-0.5).to(image_map), _shift(0.5).to(image_map)
        shrink = torch.diag(intrinsics.new_tensor([size / CROP_SIZE, size / CROP_SIZE, 1.0]))
        to_files = shrink @ forth @ image_map @ back @ torch.linalg.inv(image_map)
        side = target_size or size
        cell = size // side
        of_dense = [] if self.colours is None else pixels_of_bilinear(cell)
        of_cell = sorted({*pixels_of_nearest(cell), *of_dense})
        pixels = None if cell == 1 else pixels_in_cells(of_cell, cell=cell, size=size, device=vertices.device)
        fragments = rasterize(vertices.flatten(1, 2), self.faces, to_files @ intrinsics, (size, size), pixels=pixels)
        face = fragments.face[:, :: len(of_cell), :: len(of_cell)]
        classes = torch.where(face < 0, 0, 1 + (face >= NUM_FACES).long())
        if self.colours is None:
            return PixelTargets(classes, None)

        def read_by_dense(values: Tensor) -> Tensor:  # (B, side * len(of_cell), side * len(of_cell), ...)
            cells = values.unflatten(2, (side, -1)).unflatten(1, (side, -1))
            return cells[:, :, -len(of_dense) :, :, -len(of_dense) :].flatten(3, 4).flatten(1, 2)

        fragments = Fragments(*map(read_by_dense, fragments))
        dense = interpolate(fragments, self.faces, self.colours).permute(0, 3, 1, 2)
        return PixelTargets(classes, resize_dense(dense, side))


def _shift(pixels: float) -> Tensor:
    return torch.tensor([[1.0, 0.0, pixels], [0.0, 1.0, pixels], [0.0, 0.0, 1.0]])
