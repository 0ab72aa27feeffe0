"""Linear blend skinning as pure functions (Romero et al., "Embodied Hands", 2017, eqs. 1-4).

Every array of the hand carries the hand axis: H = 2 for both hands at once, H = 1 for a single one.
"""

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
    joint_shape_dirs: Tensor  # (H, 10, 16 * 3): regressing joints is linear, so it is done once, not per pose
    skinning_weights: Tensor  # (H, V, 16)

    @classmethod
    def from_models(cls, models: tuple[HandModel, ...], dtype: torch.dtype = torch.float32) -> 'HandArrays':
        def stack(array_of) -> Tensor:
            return torch.from_numpy(np.stack([array_of(m) for m in models])).to(dtype)

        return cls(
            template=stack(lambda m: m.template),
            shape_dirs=stack(lambda m: m.shape_dirs.reshape(-1, 10).T),
            pose_dirs=stack(lambda m: m.pose_dirs.reshape(-1, 135).T),
            rest_joints=stack(lambda m: m.joint_regressor @ m.template),
            joint_shape_dirs=stack(lambda m: np.einsum('jv,vck->kjc', m.joint_regressor, m.shape_dirs).reshape(10, -1)),
            skinning_weights=stack(lambda m: m.skinning_weights),
        )


FINGERS, SEGMENTS = 5, 3  # of the chain below the wrist: joint 1 + 3 * finger + segment
assert list(CHAIN_PARENTS[1:]) == [joint - 1 if (joint - 1) % SEGMENTS else 0 for joint in range(1, 16)]


def forward_kinematics(rotations: Tensor, rest_joints: Tensor) -> tuple[Tensor, Tensor]:
    """Pose the skeleton.

    rotations (..., 16, 3, 3) of each joint in its parent's frame, rest_joints (..., 16, 3) m
    -> world rotations (..., 16, 3, 3), joint positions (..., 16, 3) m. The wrist stays at its rest position.

    The five fingers go side by side, segment by segment. All by slices: an index would have to be copied to the device,
    which waits for it.
    """
    turned, placed = [rotations[..., :1, :, :]], [rest_joints[..., :1, :]]
    parents = rest_joints[..., :1, :]
    for segment in range(SEGMENTS):
        joints = rest_joints[..., 1 + segment :: SEGMENTS, :]  # (..., 5, 3)
        bone = (joints - parents)[..., None]
        placed.append(placed[-1] + (turned[-1] @ bone).squeeze(-1))
        turned.append(turned[-1] @ rotations[..., 1 + segment :: SEGMENTS, :, :])
        parents = joints
    fingers, places = torch.stack(turned[1:], -3).flatten(-4, -3), torch.stack(placed[1:], -2).flatten(-3, -2)
    return torch.cat([turned[0], fingers], -3), torch.cat([placed[0], places], -2)


def linear_blend_skinning(hand: HandArrays, rotations: Tensor, betas: Tensor) -> tuple[Tensor, Tensor]:
    """Shape, pose and skin H hands.

    rotations (B, H, 16, 3, 3), wrist first; betas (B, H, 10) -> vertices (B, H, V, 3) m, chain joints (B, H, 16, 3) m.
    The wrist joint stays where the shaped rest mesh has it: the root rotation turns the hand about it. B may be 0.
    """
    batch, hands = betas.shape[:2]

    def blend(weights: Tensor, directions: Tensor) -> Tensor:  # (B, H, K), (H, K, N) -> (B, H, N / 3, 3)
        return torch.einsum('bhk,hkn->bhn', weights, directions).view(batch, hands, directions.shape[-1] // 3, 3)

    identity = torch.eye(3, dtype=rotations.dtype, device=rotations.device)
    corrective = (rotations[:, :, 1:] - identity).reshape(batch, hands, 135)
    shaped = hand.template + blend(betas, hand.shape_dirs) + blend(corrective, hand.pose_dirs)
    rest_joints = hand.rest_joints + blend(betas, hand.joint_shape_dirs)

    turned, joints = forward_kinematics(rotations, rest_joints)
    moved = joints - (turned @ rest_joints[..., None]).squeeze(-1)
    bones = torch.cat([turned, moved[..., None]], -1).flatten(-2)  # (B, H, 16, 3 * 4)
    skin = (hand.skinning_weights @ bones).unflatten(-1, (3, 4))  # (B, H, V, 3, 4)
    vertices = (skin[..., :3] @ shaped[..., None]).squeeze(-1) + skin[..., 3]
    return vertices, joints
