"""Linear blend skinning as pure functions (Romero et al., "Embodied Hands", 2017, eqs. 1-4).

All tensors carry a hand axis of size H: 2 for both hands at once, 1 for a single hand.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from manopth.assets import HandModel
from manopth.tables import CHAIN_PARENTS


class HandArrays(NamedTuple):
    """The constant arrays of H hands as tensors (V = 778 vertices, 16 chain joints)."""

    template: Tensor  # (H, V, 3) m
    shape_dirs: Tensor  # (H, 10, V * 3)
    pose_dirs: Tensor  # (H, 135, V * 3)
    rest_joints: Tensor  # (H, 16, 3) m, of the mean shape
    joint_shape_dirs: Tensor  # (H, 10, 16 * 3): joint regression is linear, so it is precomputed
    skinning_weights: Tensor  # (H, V, 16)

    @classmethod
    def from_models(cls, models: Sequence[HandModel], dtype: torch.dtype = torch.float32) -> 'HandArrays':
        def stack(array_of: Callable[[HandModel], np.ndarray]) -> Tensor:
            return torch.from_numpy(np.stack([array_of(m) for m in models])).to(dtype)

        return cls(
            template=stack(lambda m: m.template),
            shape_dirs=stack(lambda m: m.shape_dirs.reshape(-1, 10).T),
            pose_dirs=stack(lambda m: m.pose_dirs.reshape(-1, 135).T),
            rest_joints=stack(lambda m: m.joint_regressor @ m.template),
            joint_shape_dirs=stack(lambda m: np.einsum('jv,vck->kjc', m.joint_regressor, m.shape_dirs).reshape(10, -1)),
            skinning_weights=stack(lambda m: m.skinning_weights),
        )


SEGMENTS = 3  # per finger: chain joint = 1 + 3 * finger + segment
assert list(CHAIN_PARENTS[1:]) == [joint - 1 if (joint - 1) % SEGMENTS else 0 for joint in range(1, 16)]


def forward_kinematics(rotations: Tensor, rest_joints: Tensor) -> tuple[Tensor, Tensor]:
    """Pose the skeleton.

    rotations (..., 16, 3, 3) of each joint in its parent's frame, rest_joints (..., 16, 3) m
    -> world rotations (..., 16, 3, 3), joint positions (..., 16, 3) m. The wrist stays at its rest position.

    The five fingers are processed in parallel, segment by segment. Slices only: an index tensor would be copied to the
    device, which forces a synchronisation.
    """
    world, positions = [rotations[..., :1, :, :]], [rest_joints[..., :1, :]]
    parents = rest_joints[..., :1, :]
    for segment in range(SEGMENTS):
        joints = rest_joints[..., 1 + segment :: SEGMENTS, :]  # (..., 5, 3)
        bone = (joints - parents)[..., None]
        positions.append(positions[-1] + (world[-1] @ bone).squeeze(-1))
        world.append(world[-1] @ rotations[..., 1 + segment :: SEGMENTS, :, :])
        parents = joints
    finger_world = torch.stack(world[1:], -3).flatten(-4, -3)
    finger_positions = torch.stack(positions[1:], -2).flatten(-3, -2)
    return torch.cat([world[0], finger_world], -3), torch.cat([positions[0], finger_positions], -2)


def pose_features(rotations: Tensor) -> Tensor:
    """Inputs of the pose blend shapes: rotations (..., 16, 3, 3), wrist first -> R - I of the fingers (..., 135)."""
    identity = torch.eye(3, dtype=rotations.dtype, device=rotations.device)
    return (rotations[..., 1:, :, :] - identity).flatten(-3)


def skin_mesh(
    *, rest_vertices: Tensor, rest_joints: Tensor, rotations: Tensor, skinning_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Move a rest mesh with its skeleton.

    rest_vertices (..., V, 3) m with all blend shapes added, rest_joints (..., 16, 3) m, rotations (..., 16, 3, 3),
    skinning_weights (..., V, 16) -> vertices (..., V, 3) m, chain joints (..., 16, 3) m.
    """
    world, joints = forward_kinematics(rotations, rest_joints)
    offsets = joints - (world @ rest_joints[..., None]).squeeze(-1)
    bones = torch.cat([world, offsets[..., None]], -1).flatten(-2)  # (..., 16, 3 * 4)
    skin = (skinning_weights @ bones).unflatten(-1, (3, 4))  # (..., V, 3, 4)
    vertices = (skin[..., :3] @ rest_vertices[..., None]).squeeze(-1) + skin[..., 3]
    return vertices, joints


def linear_blend_skinning(hand: HandArrays, rotations: Tensor, betas: Tensor) -> tuple[Tensor, Tensor]:
    """Shape, pose and skin H hands.

    rotations (B, H, 16, 3, 3), wrist first; betas (B, H, 10) -> vertices (B, H, V, 3) m, chain joints (B, H, 16, 3) m.
    The root rotation turns the hand about its wrist, which stays at its position in the shaped rest mesh. B may be 0.
    """
    batch, hands = betas.shape[:2]

    def blend(weights: Tensor, directions: Tensor) -> Tensor:  # (B, H, K), (H, K, N) -> (B, H, N / 3, 3)
        return torch.einsum('bhk,hkn->bhn', weights, directions).view(batch, hands, directions.shape[-1] // 3, 3)

    return skin_mesh(
        rest_vertices=hand.template + blend(betas, hand.shape_dirs) + blend(pose_features(rotations), hand.pose_dirs),
        rest_joints=hand.rest_joints + blend(betas, hand.joint_shape_dirs),
        rotations=rotations,
        skinning_weights=hand.skinning_weights,
    )
