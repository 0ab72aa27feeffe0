"""Errors of two-hand meshes, per sample, in the field's headline protocol.

Joints on both sides are regressed from vertices (16 by the hand model's regressor, 5 tip vertices); each hand is
centred on its own root joint; scale alignment multiplies the predicted hand by true / predicted length of bone 0-9.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from manopth import HandModel
from models.criterion import bone_length
from utils.geometry import project
from utils.hand import HAND_SCALE, LEFT, MANO_TO_JOINTS, NUM_CHAIN_JOINTS, RIGHT, SIDES, TIP_VERTICES

METRES_TO_MM = 1000.0


class Protocol(NamedTuple):
    """The choices that every figure depends on."""

    root_joint: int = 0  # 0 wrist, 9 middle MCP
    scale: bool = True  # align the size of each predicted hand by bone 0-9

    def describe(self) -> str:
        root = {0: 'wrist', 9: 'middle MCP'}[self.root_joint]
        return (f'root joint {self.root_joint} ({root}), scale alignment {"on (bone 0-9)" if self.scale else "off"}, '
                'joints regressed from vertices')


class SampleErrors(NamedTuple):
    """Errors of each sample; the hand axis is (left, right)."""

    joint_mm: Tensor  # (B, 2) mean over 21 joints
    vert_mm: Tensor  # (B, 2) mean over 778 vertices
    joint_px: Tensor  # (B, 2) pixels of the 256 crop, prediction placed at the true root
    vert_px: Tensor  # (B, 2)
    root_mm: Tensor  # (B,) predicted against true vector from the left root to the right one


class JointRegressor(nn.Module):
    """Vertices (B, 2, 778, 3) -> 21 joints (B, 2, 21, 3), regressed from the posed mesh: the field's evaluation."""

    def __init__(self, hand_models: tuple[HandModel, HandModel]):
        super().__init__()
        matrices = np.zeros((2, NUM_CHAIN_JOINTS + len(TIP_VERTICES), hand_models[0].template.shape[0]), np.float32)
        for hand, model in enumerate(hand_models):
            matrices[hand, :NUM_CHAIN_JOINTS] = model.joint_regressor
            matrices[hand, np.arange(NUM_CHAIN_JOINTS, matrices.shape[1]), TIP_VERTICES] = 1
        self.register_buffer('matrices', torch.from_numpy(matrices[:, MANO_TO_JOINTS]), persistent=False)

    def forward(self, vertices: Tensor) -> Tensor:
        return self.matrices.to(vertices) @ vertices


def sample_errors(regressor: JointRegressor, vertices: Tensor, offset: Tensor, *, true_vertices: Tensor,
                  intrinsics: Tensor, network_root: int, protocol: Protocol) -> SampleErrors:
    """Errors of a batch.

    vertices (B, 2, 778, 3) m, predicted, centred on the network's own root joint ``network_root``; offset (B, 3)
    predicted (right root - left root) / HAND_SCALE; true_vertices (B, 2, 778, 3) m, camera axes; intrinsics
    (B, 3, 3).
    """
    root = protocol.root_joint
    joints, true_joints = regressor(vertices), regressor(true_vertices)
    true_root = true_joints[:, :, root:root + 1]
    root_error = torch.linalg.vector_norm(
        predicted_root_vector(joints, offset, network_root=network_root, root_joint=root)
        - (true_root[:, RIGHT, 0] - true_root[:, LEFT, 0]), dim=-1)

    own_root = joints[:, :, root:root + 1]
    joints, vertices = joints - own_root, vertices - own_root
    if protocol.scale:
        factor = bone_length(true_joints) / bone_length(joints)
        joints, vertices = joints * factor, vertices * factor
    joints, vertices = joints + true_root, vertices + true_root  # at the true root: 3D distances stay the same

    def mean_distance(prediction: Tensor, truth: Tensor) -> Tensor:
        return torch.linalg.vector_norm(prediction - truth, dim=-1).mean(-1)

    camera = intrinsics[:, None]
    return SampleErrors(
        joint_mm=METRES_TO_MM * mean_distance(joints, true_joints),
        vert_mm=METRES_TO_MM * mean_distance(vertices, true_vertices),
        joint_px=mean_distance(project(joints, camera), project(true_joints, camera)),
        vert_px=mean_distance(project(vertices, camera), project(true_vertices, camera)),
        root_mm=METRES_TO_MM * root_error,
    )


def predicted_root_vector(joints: Tensor, offset: Tensor, *, network_root: int, root_joint: int) -> Tensor:
    """Right root minus left root, (B, 3) m: the network's offset, moved to ``root_joint`` by its unscaled joints."""
    vector = offset * HAND_SCALE
    if root_joint == network_root:
        return vector
    return vector + joints[:, RIGHT, root_joint] - joints[:, LEFT, root_joint]


def concatenate(parts: list[SampleErrors]) -> SampleErrors:
    """Batches -> one SampleErrors of all samples (float64, host)."""
    return SampleErrors(*(torch.cat([values.double().cpu() for values in column]) for column in zip(*parts)))


def summarise(errors: SampleErrors, protocol: Protocol) -> dict:
    """Means over samples, as metrics.json holds them: each figure left / right / all (their plain mean)."""
    summary: dict = {}
    for name in SampleErrors._fields[:4]:
        left, right = getattr(errors, name).mean(0).tolist()
        summary[name] = {'left': left, 'right': right, 'all': (left + right) / 2}
    summary['root_mm'] = errors.root_mm.mean().item()
    summary['frames'] = len(errors.root_mm)
    summary['protocol'] = protocol._asdict() | {'description': protocol.describe()}
    return summary


def format_summary(summary: dict) -> str:
    """The lines that this field's evaluations print, in their order."""
    lines = []
    for title, key, unit in (('joint mean error', 'joint_mm', 'mm'), ('vert mean error', 'vert_mm', 'mm'),
                             ('pixel joint mean error', 'joint_px', 'px'), ('pixel vert mean error', 'vert_px', 'px')):
        value = summary[key]
        lines += [f'{title}:', '    ' + ', '.join(f'{side}: {value[side]:.6f} {unit}' for side in SIDES),
                  f'    all: {value["all"]:.6f} {unit}']
    return '\n'.join([*lines, f'root error: {summary["root_mm"]:.6f} mm'])
