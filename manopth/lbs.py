"""Linear blend skinning as pure functions (Romero et al., "Embodied Hands", 2017, eqs. 1-4).

A hand axis of size H is 2 for both hands at once, 1 for a single hand.
"""

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from manopth.assets import HandModel
from manopth.tables import CHAIN_PARENTS, NUM_CHAIN_JOINTS, NUM_VERTICES


class HandArrays(NamedTuple):
    """The constant arrays of H hands as tensors (V = 778 vertices, 16 chain joints).

    A joint is a point that moves with its own bone alone, so that joints and vertices are posed together: the P points
    are the 16 joints and then the V vertices, or a selection. They are the last axis, where long rows make elementwise
    operations fast.
    """

    base_points: Tensor  # (H, 3, P) m, less what ``pose_dirs`` adds to the rest pose
    shape_dirs: Tensor  # (H, 10, 3, P)
    pose_dirs: Tensor  # (H, 135, 3, P), of R where MANO's are of R - I: 0 for joints
    skinning_weights: Tensor  # (H, 16, P)
    rest_joints: Tensor  # (H, 16, 3) m, of the mean shape
    joint_shape_dirs: Tensor  # (H, 10, 16 * 3): joint regression is linear, so it is precomputed

    @classmethod
    def from_models(
        cls, models: Sequence[HandModel], dtype: torch.dtype = torch.float32, *, points: np.ndarray | None = None
    ) -> 'HandArrays':
        """points: (H, P) indices into each hand's 16 joints and 778 vertices; None for all of them."""
        if points is None:
            points = np.arange(NUM_CHAIN_JOINTS + NUM_VERTICES)[None].repeat(len(models), 0)
        rest_joints = [m.joint_regressor @ m.template for m in models]
        bases = [m.template - m.pose_dirs @ np.tile(np.eye(3).ravel(), 15) for m in models]
        joint_shape_dirs = [np.einsum('jv,vck->kcj', m.joint_regressor, m.shape_dirs) for m in models]

        def stack(arrays: Iterable[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.stack(list(arrays))).to(dtype).contiguous()

        def select(joints: Iterable[np.ndarray], vertices: Iterable[np.ndarray]) -> Tensor:
            rows = zip(joints, vertices, points)
            return stack(np.concatenate([own, mesh], -1)[..., chosen] for own, mesh, chosen in rows)

        return cls(
            base_points=select([joints.T for joints in rest_joints], [base.T for base in bases]),
            shape_dirs=select(joint_shape_dirs, [m.shape_dirs.T for m in models]),
            pose_dirs=select(repeat(np.zeros((135, 3, NUM_CHAIN_JOINTS))), [m.pose_dirs.T for m in models]),
            skinning_weights=select(repeat(np.eye(NUM_CHAIN_JOINTS)), [m.skinning_weights.T for m in models]),
            rest_joints=stack(rest_joints),
            joint_shape_dirs=stack(dirs.swapaxes(1, 2).reshape(10, -1) for dirs in joint_shape_dirs),
        )


SEGMENTS = 3  # per finger: chain joint = 1 + 3 * finger + segment
assert list(CHAIN_PARENTS[1:]) == [joint - 1 if (joint - 1) % SEGMENTS else 0 for joint in range(1, 16)]


def finger_transforms(rotations: Tensor, rest_joints: Tensor) -> Tensor:
    """Rigid motion of every bone while the wrist stays at rest.

    rotations (..., 15, 3, 3) of the finger joints in their parents' frames, rest_joints (..., 16, 3) m, wrist first
    -> (..., 16, 4, 4): [x, 1] @ M moves a point x of the rest hand with its bone. The wrist's is the identity.

    The five fingers are processed in parallel, segment by segment. Slices only: an index tensor would be copied to the
    device, which forces a synchronisation.
    """
    joints = rest_joints[..., 1:, :, None]
    about_joints = torch.cat([rotations, joints - rotations @ joints], -1).mT  # x -> (x - joint) R^T + joint
    identity = torch.eye(4, dtype=rotations.dtype, device=rotations.device)
    local = torch.cat([about_joints, identity[:, 3:].expand(*about_joints.shape[:-1], 1)], -1)
    base, middle, end = local.unflatten(-3, (-1, SEGMENTS)).unbind(-3)  # (..., 5, 4, 4) each
    middle = middle @ base
    end = end @ middle
    fingers = torch.stack([base, middle, end], -3).flatten(-4, -3)
    return torch.cat([identity.expand(*rotations.shape[:-3], 1, 4, 4), fingers], -3)


def forward_kinematics(rotations: Tensor, rest_joints: Tensor) -> tuple[Tensor, Tensor]:
    """Pose the skeleton.

    rotations (..., 16, 3, 3) of each joint in its parent's frame, wrist first, rest_joints (..., 16, 3) m
    -> world rotations (..., 16, 3, 3), joint positions (..., 16, 3) m. The wrist stays at its rest position.
    """
    root, fingers = rotations.split((1, 15), -3)
    transforms = finger_transforms(fingers, rest_joints)
    positions = turn_about(rest_joints[..., :1, :], _joint_positions(transforms, rest_joints), root.squeeze(-3))
    return root @ transforms[..., :3, :3].mT, positions


def _joint_positions(transforms: Tensor, rest_joints: Tensor) -> Tensor:
    """The joints (..., 16, 3) moved by ``finger_transforms``."""
    turns, shifts = transforms[..., :3].split((3, 1), -2)
    return (rest_joints[..., None, :] @ turns + shifts).squeeze(-2)


def turn_about(centre: Tensor, points: Tensor, rotation: Tensor) -> Tensor:
    """Rotate points (..., N, 3) by rotation (..., 3, 3) about centre (..., 1, 3)."""
    return (points - centre) @ rotation.mT + centre


def pose_features(rotations: Tensor) -> Tensor:
    """Inputs of the pose blend shapes: rotations (..., 15, 3, 3) of the finger joints -> R - I (..., 135)."""
    identity = torch.eye(3, dtype=rotations.dtype, device=rotations.device)
    return (rotations - identity).flatten(-3)


def skin_points(rest_points: Tensor, transforms: Tensor, skinning_weights: Tensor) -> Tensor:
    """Move every point by the weighted mean of the motions of the bones.

    rest_points (H, B, 3, P) m, transforms (H, B, 16, 4, 4) of ``finger_transforms``, skinning_weights (H, 16, P)
    -> (H, B, P, 3) m.
    """
    batch = rest_points.shape[1]
    by_entry = transforms[..., :3].permute(0, 1, 3, 4, 2).flatten(1, 3)  # (H, B * 4 * 3, 16)
    blended = (by_entry @ skinning_weights).unflatten(1, (batch, 4, 3))
    extended = F.pad(rest_points, (0, 0, 0, 1), value=1.0)  # homogeneous
    return (extended[..., None, :] * blended).sum(2).mT


def skin_mesh(
    *, rest_vertices: Tensor, rest_joints: Tensor, rotations: Tensor, skinning_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Move a rest mesh with its skeleton.

    rest_vertices (B, V, 3) m with all blend shapes added, rest_joints (B, 16, 3) m, rotations (B, 16, 3, 3),
    skinning_weights (V, 16) -> vertices (B, V, 3) m, chain joints (B, 16, 3) m.
    """
    transforms = finger_transforms(rotations[:, 1:], rest_joints)
    vertices = skin_points(rest_vertices.mT[None], transforms[None], skinning_weights.mT[None])[0]
    joints = _joint_positions(transforms, rest_joints)
    wrist, root = rest_joints[:, :1], rotations[:, 0]
    return turn_about(wrist, vertices, root), turn_about(wrist, joints, root)


def pose_fingers(hand: HandArrays, rotations: Tensor, betas: Tensor) -> tuple[Tensor, Tensor]:
    """Shape H hands and pose their fingers; the wrist stays at rest.

    The hand axis comes first: each blend shape is one product over all samples of a hand. rotations (H, B, 15, 3, 3),
    betas (H, B, 10) -> points (H, B, P, 3) m, wrist (H, B, 1, 3) m. B may be 0.
    """
    shaped = torch.baddbmm(hand.base_points.flatten(1)[:, None], betas, hand.shape_dirs.flatten(2))
    rest_points = torch.baddbmm(shaped, rotations.flatten(2), hand.pose_dirs.flatten(2)).unflatten(-1, (3, -1))
    rest_joints = torch.baddbmm(hand.rest_joints.flatten(1)[:, None], betas, hand.joint_shape_dirs)
    rest_joints = rest_joints.unflatten(-1, (-1, 3))
    points = skin_points(rest_points, finger_transforms(rotations, rest_joints), hand.skinning_weights)
    return points, rest_joints[:, :, :1]


def linear_blend_skinning(hand: HandArrays, rotations: Tensor, betas: Tensor) -> tuple[Tensor, Tensor]:
    """Shape, pose and skin H hands.

    rotations (B, H, 16, 3, 3), wrist first; betas (B, H, 10) -> vertices (B, H, V, 3) m, chain joints (B, H, 16, 3) m.
    The root rotation turns the hand about its wrist, which stays at its position in the shaped rest mesh. B may be 0.
    """
    rotations, betas = rotations.transpose(0, 1), betas.transpose(0, 1)
    points, wrist = pose_fingers(hand, rotations[:, :, 1:], betas)
    points = turn_about(wrist, points, rotations[:, :, 0]).transpose(0, 1)
    return points[:, :, NUM_CHAIN_JOINTS:], points[:, :, :NUM_CHAIN_JOINTS]
