"""Per-sample errors of two-hand meshes in the published protocols, as batched tensor functions on any device.

Predicted joints are regressed from the predicted vertices (16 by the hand model's regressor, 5 tip vertices); true
joints likewise, or read from the annotation files. Each hand is centred on its own root joint; scale alignment
multiplies the predicted hand by true / predicted length of bone 0-9. The registry of metrics is evaluation/registry.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manopth import HandPair
from manopth.alignment import align
from models.placement import Placement, relative_roots
from utils.geometry import CROP_SIZE, project, scale_to_truth
from utils.hand import HAND_SCALE, LEFT, MANO_TO_JOINTS, NUM_CHAIN_JOINTS, NUM_FACES, RIGHT, TIP_VERTICES
from utils.rasterizer import rasterize

METRES_TO_MM = 1000.0
VISIBILITY_SIZE = 64  # pixels: side of the image in which occluded parts are counted


class Protocol(NamedTuple):
    """The choices that every metric depends on."""

    root_joint: int = 0  # 0 wrist, 9 middle MCP
    scale: bool = True  # align the size of each predicted hand by bone 0-9
    joints: str = 'regressed'  # the true joints: 'regressed' from the true vertices, or 'annotated' (joint_3d.json)

    def describe(self) -> str:
        root = {0: 'wrist', 9: 'middle MCP'}[self.root_joint]
        truth = {'regressed': 'joints regressed from vertices', 'annotated': 'annotated joints'}[self.joints]
        scale = 'on (bone 0-9)' if self.scale else 'off'
        return f'root joint {self.root_joint} ({root}), scale alignment {scale}, {truth}'


# By the method that reports it (their published figures: docs/protocols.md).
PROTOCOLS = {
    'published': Protocol(0, True),
    'intaghand': Protocol(9, True),
    'acr': Protocol(9, False),
    'internet': Protocol(0, False, 'annotated'),
    'interwild': Protocol(0, False),
}
NEEDS_SUBSET = {'interwild': 'the human-annotated frames'}  # protocols that are defined on part of the test set
GRID = tuple(Protocol(root, scale) for root in (0, 9) for scale in (True, False))


class JointRegressor(nn.Module):
    """Regress 21 joints (B, 2, 21, 3) from posed vertices (B, 2, 778, 3), as published evaluations do."""

    matrices: Tensor

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
) -> dict[str, Tensor]:
    """Errors of a batch in one protocol, by name.

    -> joint_mm, vert_mm, joint_px, vert_px (B, 2), means over joints or vertices; root_mm (B,), of the vector from the
    left to the right root; joints_mm (B, 2, 21). px are pixels of the 256 crop with the prediction placed at the true
    root. NaN where the truth is not annotated.

    vertices (B, 2, 778, 3) m, predicted, centred on the network's own root joint ``network_root``; offset (B, 3)
    predicted (right root - left root) / HAND_SCALE; true_vertices (B, 2, 778, 3) m, camera axes; intrinsics
    (B, 3, 3); annotated (B, 2, 21, 3) m, camera axes, NaN where invalid: the true joints of
    protocols with annotated joints.
    """
    root = protocol.root_joint
    joints, fit_joints = regressor(vertices), regressor(true_vertices)
    true_joints = fit_joints
    if protocol.joints == 'annotated':
        if annotated is None:
            raise ValueError('A protocol with annotated joints needs them: pass `annotated`.')
        true_joints = annotated
    true_root, fit_root = true_joints[:, :, root : root + 1], fit_joints[:, :, root : root + 1]
    root_error = torch.linalg.vector_norm(
        predicted_root_vector(joints, offset, network_root=network_root, root_joint=root)
        - (true_root[:, RIGHT, 0] - true_root[:, LEFT, 0]),
        dim=-1,
    )

    own_root = joints[:, :, root : root + 1]
    joints, vertices = joints - own_root, vertices - own_root
    if protocol.scale:
        factor = scale_to_truth(joints, true_joints)
        joints, vertices = joints * factor, vertices * factor
    joints, vertices = joints + true_root, vertices + fit_root  # at the true root: 3D distances stay the same

    camera = intrinsics[:, None]
    joints_mm = METRES_TO_MM * distances(joints, true_joints)
    return {
        'joint_mm': joints_mm.nanmean(-1),
        'vert_mm': METRES_TO_MM * distances(vertices, true_vertices).mean(-1),
        'joint_px': distances(project(joints, camera), project(true_joints, camera)).nanmean(-1),
        'vert_px': distances(project(vertices, camera), project(true_vertices, camera)).mean(-1),
        'root_mm': METRES_TO_MM * root_error,
        'joints_mm': joints_mm,
    }


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances of corresponding points (..., N, D) -> (..., N)."""
    return torch.linalg.vector_norm(a - b, dim=-1)


def predicted_root_vector(joints: Tensor, offset: Tensor, *, network_root: int, root_joint: int) -> Tensor:
    """Right root minus left root, (B, 3) m: the predicted offset, moved to ``root_joint`` by the unscaled joints."""
    vector = offset * HAND_SCALE
    if root_joint == network_root:
        return vector
    return vector + joints[:, RIGHT, root_joint] - joints[:, LEFT, root_joint]


def procrustes_errors(
    regressor: JointRegressor, vertices: Tensor, *, true_vertices: Tensor, true_joints: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """PA errors of joints and of vertices, (B, 2) mm each: the two are aligned separately, as published ones are."""
    true_joints = regressor(true_vertices) if true_joints is None else true_joints

    def error(points: Tensor, target: Tensor) -> Tensor:
        aligned = align(points, target, scale=True).apply(points)
        return METRES_TO_MM * distances(aligned, target).nanmean(-1)

    return error(regressor(vertices), true_joints), error(vertices, true_vertices)


def box_iou(pixels: Tensor) -> Tensor:
    """Intersection over union of both hands' bounding boxes: image points (B, 2, V, 2) -> (B,); 0 without any area."""
    low, high = pixels.amin(2), pixels.amax(2)  # (B, 2, 2)
    common = (high.amin(1) - low.amax(1)).clamp_min(0).prod(-1)
    together = (high - low).prod(-1).sum(-1) - common
    return common / together.masked_fill(together == 0, 1)


def hand_distance(vertices: Tensor) -> Tensor:
    """Smallest distance between vertices of different hands: (B, 2, V, 3) m -> (B,) m."""
    # torch's default, by matrix products, is off by half a millimetre for touching hands a metre from the camera.
    return torch.cdist(vertices[:, LEFT], vertices[:, RIGHT], compute_mode='donot_use_mm_for_euclid_dist').amin((1, 2))


def in_one_frame(vertices: Tensor, offset: Tensor) -> Tensor:
    """Place root-relative hands (B, 2, V, 3) m by the offset (B, 3) in HAND_SCALE; the left root stays at 0."""
    return vertices + relative_roots(offset)[:, :, None]


def visible_shares(vertices: Tensor, intrinsics: Tensor, faces: Tensor) -> Tensor:
    """Visible share of the pixels that each hand alone would cover, (B, 2); NaN outside the image.

    vertices (B, 2, 778, 3) m, camera axes; intrinsics (B, 3, 3) of the 256 crop; faces (3076, 3) of both hands as one
    mesh.
    """
    behind = vertices.new_tensor([0.0, 0.0, -1.0])  # behind the camera: not drawn
    shown = torch.eye(2, dtype=torch.bool, device=vertices.device)[:, None, :, None, None]
    alone = torch.where(shown, vertices, behind)  # (2, B, 2, 778, 3)
    smaller = torch.diag(intrinsics.new_tensor([VISIBILITY_SIZE / CROP_SIZE, VISIBILITY_SIZE / CROP_SIZE, 1.0]))
    meshes = torch.cat([vertices[None], alone]).flatten(0, 1).flatten(1, 2)
    face = rasterize(meshes, faces, (smaller @ intrinsics).repeat(3, 1, 1), (VISIBILITY_SIZE, VISIBILITY_SIZE)).face
    left, right = ((face >= 0) & (face < NUM_FACES)), face >= NUM_FACES
    together, left_alone, right_alone = torch.stack([left, right], -1).sum((1, 2)).chunk(3)  # (B, 2) each
    return together / torch.stack([left_alone[:, LEFT], right_alone[:, RIGHT]], -1)


def predicted_classes(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Classes of segmentation logits (B, 3, s, s), upsampled -> (B, *size): 0 background, 1 left, 2 right."""
    return F.interpolate(logits.float(), list(size), mode='bilinear', align_corners=False).argmax(1)


def segmentation_overlap(logits: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels of each class in the intersection and the union of prediction and labels, (B, 3) each.

    logits (B, 3, s, s), upsampled to labels (B, H, W). Without logits (a model without dense heads) both are 0.
    """
    if logits is None:
        nothing = torch.zeros(len(labels), 3, device=labels.device)
        return nothing, nothing
    predicted = predicted_classes(logits, labels.shape[-2:])
    both = torch.stack([((predicted == c) & (labels == c)).sum((1, 2)) for c in range(3)], 1)
    either = torch.stack([((predicted == c) | (labels == c)).sum((1, 2)) for c in range(3)], 1)
    return both.float(), either.float()


def placement_error(placement: Placement, true_roots: Tensor) -> tuple[Tensor, Tensor]:
    """Distance between placed and true roots (B, 2, 3) m -> (B, 2) m, and its depth component (B, 2) m."""
    apart = placement.roots - true_roots
    return torch.linalg.vector_norm(apart, dim=-1), apart[..., 2].abs()
