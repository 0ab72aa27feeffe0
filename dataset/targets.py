"""Training targets from labels: hands in camera axes, pixel classes and dense maps, moved exactly as the image is.

The 3D hands are rotated (and mirrored) with the image and the intrinsics follow, so that projecting the new hands with
the new intrinsics gives the old pixels moved by the image map.
"""

import numpy as np
import torch
from torch import Tensor, nn

from dataset.prepared import Sample
from manopth import HandModel, HandPair, Hands, TwoHandLayer
from models.predictions import Target
from utils.geometry import CROP_SIZE, project, rotation_z, to_uv, world_to_camera
from utils.hand import CHAIN_PARENTS, MANO_TO_JOINTS, MASK_THRESHOLD, NUM_CHAIN_JOINTS, NUM_FACES, NUM_JOINTS, WRIST
from utils.rasterizer import interpolate, rasterize


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


def only_present(vertices: Tensor, present: Tensor | None) -> Tensor:
    """Vertices (B, 2, 778, 3) with absent hands behind the camera, where nothing is rendered. present: (B, 2) bool."""
    return vertices if present is None else torch.where(present[:, :, None, None], vertices, -1.0)


VISIBILITY_SIDE = 128  # pixels of the depth map
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
        surface = rasterize(meshes, self.faces, shrink @ intrinsics, (side, side))
        joints = hands.joints.flatten(1, 2)
        cell = (project(joints, intrinsics) * side / CROP_SIZE).floor()
        inside = ((cell >= 0) & (cell < side)).all(-1) & (joints[..., 2] > 0)
        pixel = torch.where(inside[..., None], cell, 0.0).long()
        pixel = pixel[..., 1] * side + pixel[..., 0]
        face, depth = (values.flatten(1).gather(1, pixel) for values in (surface.face, surface.depth))
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
        self, vertices: Tensor, *, intrinsics: Tensor, image_map: Tensor, size: int
    ) -> tuple[Tensor, Tensor | None]:
        """Render augmented hands -> classes (B, size, size) int64 and dense map (B, 3, size, size) in [0, 1] or None.

        vertices (B, 2, 778, 3) m and intrinsics (B, 3, 3) after augmentation; image_map (B, 3, 3) of that augmentation.
        """
        # Pixel i of the files shows what projects to i + 0.5; the shift passes through A as the files' pixels would.
        back, forth = _shift(-0.5).to(image_map), _shift(0.5).to(image_map)
        shrink = torch.diag(intrinsics.new_tensor([size / CROP_SIZE, size / CROP_SIZE, 1.0]))
        to_files = shrink @ forth @ image_map @ back @ torch.linalg.inv(image_map)
        fragments = rasterize(vertices.flatten(1, 2), self.faces, to_files @ intrinsics, (size, size))
        classes = torch.where(fragments.face < 0, 0, 1 + (fragments.face >= NUM_FACES).long())
        if self.colours is None:
            return classes, None
        return classes, interpolate(fragments, self.faces, self.colours).permute(0, 3, 1, 2)


def _shift(pixels: float) -> Tensor:
    return torch.tensor([[1.0, 0.0, pixels], [0.0, 1.0, pixels], [0.0, 0.0, 1.0]])
