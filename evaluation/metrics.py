"""Errors of two-hand meshes, per sample, in the protocols that this field quotes: batched tensor code on any device.

Joints of the prediction are regressed from its vertices (16 by the hand model's regressor, 5 tip vertices), those of
the truth likewise or taken from the annotation files. Each hand is centred on its own root joint; scale alignment
multiplies the predicted hand by true / predicted length of bone 0-9.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manopth import HandPair
from models.placement import relative_roots
from utils.geometry import CROP_SIZE, bone_length, project
from utils.hand import HAND_SCALE, LEFT, MANO_TO_JOINTS, NUM_CHAIN_JOINTS, NUM_FACES, RIGHT, TIP_VERTICES
from utils.rasterizer import rasterize

METRES_TO_MM = 1000.0
VISIBILITY_SIZE = 64  # pixels: side of the picture in which hidden parts are counted


class Protocol(NamedTuple):
    """The choices that every figure depends on."""

    root_joint: int = 0  # 0 wrist, 9 middle MCP
    scale: bool = True  # align the size of each predicted hand by bone 0-9
    joints: str = 'regressed'  # the true joints: 'regressed' from the true vertices, or 'annotated' (joint_3d.json)

    def describe(self) -> str:
        root = {0: 'wrist', 9: 'middle MCP'}[self.root_joint]
        truth = {'regressed': 'joints regressed from vertices', 'annotated': 'annotated joints'}[self.joints]
        scale = 'on (bone 0-9)' if self.scale else 'off'
        return f'root joint {self.root_joint} ({root}), scale alignment {scale}, {truth}'


# By the method that is quoted with it (their best published figures: docs/protocols.md).
PROTOCOLS = {
    'published': Protocol(0, True),
    'intaghand': Protocol(9, True),
    'acr': Protocol(9, False),
    'internet': Protocol(0, False, 'annotated'),
    'interwild': Protocol(0, False),
}
NEEDS_SUBSET = {'interwild': 'the human-annotated frames'}  # protocols that are defined on a part of the test set
GRID = tuple(Protocol(root, scale) for root in (0, 9) for scale in (True, False))


class SampleErrors(NamedTuple):
    """Errors of each sample in one protocol; the hand axis is (left, right). NaN where the truth is not annotated."""

    joint_mm: Tensor  # (B, 2) mean over the joints
    vert_mm: Tensor  # (B, 2) mean over 778 vertices
    joint_px: Tensor  # (B, 2) pixels of the 256 crop, prediction placed at the true root
    vert_px: Tensor  # (B, 2)
    root_mm: Tensor  # (B,) predicted against true vector from the left root to the right one
    joints_mm: Tensor  # (B, 2, 21) each joint


class SampleDetails(NamedTuple):
    """What else is measured of each sample, whatever root and scale."""

    pa_joint_mm: Tensor  # (B, 2) after Procrustes alignment (rotation, translation, scale) of each hand
    pa_vert_mm: Tensor  # (B, 2)
    box_iou: Tensor  # (B,) of the two true hands' boxes in the picture: how much they cover each other
    distance_mm: Tensor  # (B,) smallest distance between vertices of the two true hands
    penetration_mm: Tensor  # (B,) how deep the predicted hands, placed by the offset, reach into each other
    true_penetration_mm: Tensor  # (B,) the same of the true hands: annotated fits are not free of it
    visible: Tensor  # (B, 2) share of each true hand's outline in the picture that the other hand does not hide
    placement_mm: Tensor  # (B, 2) the root joints placed in the camera by models.placement, against the true ones
    placement_depth_mm: Tensor  # (B, 2) how much of that is depth
    seg_intersection: Tensor  # (B, 3) pixels of background, left, right, predicted and true
    seg_union: Tensor  # (B, 3) predicted or true; 0 without a segmentation


class JointRegressor(nn.Module):
    """Vertices (B, 2, 778, 3) -> 21 joints (B, 2, 21, 3), regressed from the posed mesh: the field's evaluation."""

    def __init__(self, hand_models: HandPair):
        super().__init__()
        matrices = np.zeros((2, NUM_CHAIN_JOINTS + len(TIP_VERTICES), hand_models[0].template.shape[0]), np.float32)
        for hand, model in enumerate(hand_models):
            matrices[hand, :NUM_CHAIN_JOINTS] = model.joint_regressor
            matrices[hand, np.arange(NUM_CHAIN_JOINTS, matrices.shape[1]), TIP_VERTICES] = 1
        self.register_buffer('matrices', torch.from_numpy(matrices[:, MANO_TO_JOINTS]), persistent=False)

    def forward(self, vertices: Tensor) -> Tensor:
        return self.matrices.to(vertices) @ vertices


def sample_errors(
    regressor: JointRegressor,
    vertices: Tensor,
    offset: Tensor,
    *,
    true_vertices: Tensor,
    intrinsics: Tensor,
    network_root: int,
    protocol: Protocol,
    annotated: Tensor | None = None,
) -> SampleErrors:
    """Errors of a batch.

    vertices (B, 2, 778, 3) m, predicted, centred on the network's own root joint ``network_root``; offset (B, 3)
    predicted (right root - left root) / HAND_SCALE; true_vertices (B, 2, 778, 3) m, camera axes; intrinsics
    (B, 3, 3); annotated (B, 2, 21, 3) m, camera axes, NaN where invalid: the true joints where the protocol wants them.
    """
    root = protocol.root_joint
    joints, fit_joints = regressor(vertices), regressor(true_vertices)
    true_joints = annotated if protocol.joints == 'annotated' else fit_joints
    true_root, fit_root = true_joints[:, :, root : root + 1], fit_joints[:, :, root : root + 1]
    root_error = torch.linalg.vector_norm(
        predicted_root_vector(joints, offset, network_root=network_root, root_joint=root)
        - (true_root[:, RIGHT, 0] - true_root[:, LEFT, 0]),
        dim=-1,
    )

    own_root = joints[:, :, root : root + 1]
    joints, vertices = joints - own_root, vertices - own_root
    if protocol.scale:
        factor = bone_length(true_joints) / bone_length(joints)
        joints, vertices = joints * factor, vertices * factor
    joints, vertices = joints + true_root, vertices + fit_root  # at the true root: 3D distances stay the same

    camera = intrinsics[:, None]
    joints_mm = METRES_TO_MM * distances(joints, true_joints)
    return SampleErrors(
        joint_mm=joints_mm.nanmean(-1),
        vert_mm=METRES_TO_MM * distances(vertices, true_vertices).mean(-1),
        joint_px=distances(project(joints, camera), project(true_joints, camera)).nanmean(-1),
        vert_px=distances(project(vertices, camera), project(true_vertices, camera)).mean(-1),
        root_mm=METRES_TO_MM * root_error,
        joints_mm=joints_mm,
    )


def distances(a: Tensor, b: Tensor) -> Tensor:
    """(..., N, D) twice -> (..., N)."""
    return torch.linalg.vector_norm(a - b, dim=-1)


def predicted_root_vector(joints: Tensor, offset: Tensor, *, network_root: int, root_joint: int) -> Tensor:
    """Right root minus left root, (B, 3) m: the network's offset, moved to ``root_joint`` by its unscaled joints."""
    vector = offset * HAND_SCALE
    if root_joint == network_root:
        return vector
    return vector + joints[:, RIGHT, root_joint] - joints[:, LEFT, root_joint]


def procrustes(points: Tensor, target: Tensor) -> Tensor:
    """``points`` moved onto ``target`` by the similarity of least squares (Umeyama 1991, eqs. 40-43).

    points, target (..., N, 3) -> (..., N, 3). Points without a finite target have no say, and move along.
    """
    known = target.isfinite().all(-1, keepdim=True)
    weight = known.to(points.dtype) / known.sum(-2, keepdim=True).clamp_min(1)
    target = torch.where(known, target, 0)
    centre, there = ((weight * x).sum(-2, keepdim=True) for x in (points, target))
    a, b = points - centre, target - there
    u, singular, vh = torch.linalg.svd((weight * b).transpose(-1, -2) @ a)
    sign = torch.ones_like(singular)
    sign[..., 2] = torch.linalg.det(u @ vh).sign()  # no reflection
    rotation = (u * sign[..., None, :]) @ vh
    scale = (singular * sign).sum(-1) / (weight * a * a).sum((-1, -2)).clamp_min(1e-20)
    return scale[..., None, None] * a @ rotation.transpose(-1, -2) + there


def procrustes_errors(
    regressor: JointRegressor, vertices: Tensor, *, true_vertices: Tensor, true_joints: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(B, 2) mm each: mean error of joints and of vertices, each aligned by themselves as the field has it."""
    true_joints = regressor(true_vertices) if true_joints is None else true_joints
    return tuple(
        METRES_TO_MM * distances(procrustes(ours, truth), truth).nanmean(-1)
        for ours, truth in ((regressor(vertices), true_joints), (vertices, true_vertices))
    )


def box_iou(pixels: Tensor) -> Tensor:
    """Points of both hands in the picture (B, 2, V, 2) -> (B,) intersection over union of the hands' boxes."""
    low, high = pixels.amin(2), pixels.amax(2)  # (B, 2, 2)
    common = (high.amin(1) - low.amax(1)).clamp_min(0).prod(-1)
    return common / ((high - low).prod(-1).sum(-1) - common)


def hand_distance(vertices: Tensor) -> Tensor:
    """(B, 2, V, 3) m -> (B,) m: smallest distance between a vertex of one hand and one of the other."""
    # By way of products, torch's default, a metre from the camera touching hands would be half a millimetre apart.
    return torch.cdist(vertices[:, LEFT], vertices[:, RIGHT], compute_mode='donot_use_mm_for_euclid_dist').amin((1, 2))


def in_one_frame(vertices: Tensor, offset: Tensor) -> Tensor:
    """Root-relative vertices (B, 2, V, 3) m and offset (B, 3) in HAND_SCALE -> vertices with the left root at 0."""
    return vertices + relative_roots(offset)[:, :, None]


def visible_shares(vertices: Tensor, intrinsics: Tensor, faces: Tensor) -> Tensor:
    """(B, 2) share of each hand's pixels that are seen, of those that it alone would cover; NaN out of the picture.

    vertices (B, 2, 778, 3) m, camera axes; intrinsics (B, 3, 3) of the 256 crop; faces (3076, 3) of both hands as one
    mesh.
    """
    behind = vertices.new_tensor([0.0, 0.0, -1.0])  # is not drawn
    shown = torch.eye(2, dtype=torch.bool, device=vertices.device)[:, None, :, None, None]
    alone = torch.where(shown, vertices, behind)  # (2, B, 2, 778, 3)
    smaller = torch.diag(intrinsics.new_tensor([VISIBILITY_SIZE / CROP_SIZE, VISIBILITY_SIZE / CROP_SIZE, 1.0]))
    meshes = torch.cat([vertices[None], alone]).flatten(0, 1).flatten(1, 2)
    face = rasterize(meshes, faces, (smaller @ intrinsics).repeat(3, 1, 1), (VISIBILITY_SIZE, VISIBILITY_SIZE)).face
    left, right = ((face >= 0) & (face < NUM_FACES)), face >= NUM_FACES
    together, left_alone, right_alone = torch.stack([left, right], -1).sum((1, 2)).chunk(3)  # (B, 2) each
    return together / torch.stack([left_alone[:, LEFT], right_alone[:, RIGHT]], -1)


def predicted_classes(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """logits (B, 3, s, s) -> (B, *size): 0 background, 1 left, 2 right, at the resolution of the labels."""
    return F.interpolate(logits.float(), size, mode='bilinear', align_corners=False).argmax(1)


def segmentation_overlap(logits: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    """logits (B, 3, s, s), labels (B, H, W) -> (B, 3) pixels in both and in either, of the labels' resolution.

    Zeros for a model without segmentation (None).
    """
    if logits is None:
        nothing = torch.zeros(len(labels), 3, device=labels.device)
        return nothing, nothing
    predicted = predicted_classes(logits, labels.shape[-2:])
    both = torch.stack([((predicted == c) & (labels == c)).sum((1, 2)) for c in range(3)], 1)
    either = torch.stack([((predicted == c) | (labels == c)).sum((1, 2)) for c in range(3)], 1)
    return both.float(), either.float()


def concatenate(parts: list) -> NamedTuple:
    """Batches of one kind (SampleErrors, SampleDetails) -> all samples, on the host."""
    return type(parts[0])(*(torch.cat([values.cpu() for values in column]) for column in zip(*parts)))
