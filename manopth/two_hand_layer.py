"""``TwoHandLayer``: parameters -> vertices and 21 joints of both hands in one call, in metres."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from manopth.assets import HandModel, HandPair
from manopth.errors import ManoError
from manopth.lbs import HandArrays, linear_blend_skinning
from manopth.rotations import axis_angle_to_matrix, symmetric_6d_to_matrix
from manopth.tables import MANO_TO_JOINTS, SIDES, TIP_VERTICES


class Hands(NamedTuple):
    """Meshes and skeletons of both hands; axis 1 is the hand, 0 left and 1 right."""

    vertices: Tensor  # (B, 2, 778, 3) m
    joints: Tensor  # (B, 2, 21, 3) m, in the order of manopth.tables


class TwoHandLayer(nn.Module):
    """Differentiable MANO layer for both hands; index 0 of the hand axis is the left hand, lengths are metres.

    models: (left, right). tip_vertices: five vertex indices, or one row of five per hand. Raises ManoError for
    models in the wrong order.

    The arrays are non-persistent buffers, so no checkpoint ever contains a licensed array.
    """

    models: HandPair
    template: Tensor
    rest_joints: Tensor
    joint_shape_dirs: Tensor
    tip_vertices: Tensor
    joint_order: Tensor
    faces: Tensor
    pose_mean: Tensor
    pose_components: Tensor

    def __init__(
        self,
        models: tuple[HandModel, HandModel],
        *,
        tip_vertices: Sequence[int] | Sequence[Sequence[int]] = TIP_VERTICES,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.models = HandPair(*models)
        if [model.side for model in self.models] != list(SIDES):
            raise ManoError(
                f'TwoHandLayer: the models are ({", ".join(m.side for m in self.models)}); pass them as (left, right).'
            )

        def stack(name: str) -> Tensor:
            return torch.from_numpy(np.stack([getattr(model, name) for model in self.models]))

        tips = torch.tensor(np.broadcast_to(np.asarray(tip_vertices), (2, 5)))
        buffers = {
            **HandArrays.from_models(self.models, dtype)._asdict(),
            'tip_vertices': tips,
            'joint_order': torch.tensor(MANO_TO_JOINTS),
            'faces': stack('faces'),
            'pose_mean': stack('pose_mean').to(dtype),
            'pose_components': stack('pose_components').to(dtype),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    def forward(
        self, root: Tensor, pose: Tensor, betas: Tensor, *, use_pca: bool = True, root_joint: int | None = None
    ) -> Hands:
        """Pose both hands.

        root: (B, 2, 3) axis-angle, (B, 2, 6) symmetric 6D or (B, 2, 3, 3) matrix, about the wrist.
        pose: (B, 2, 45) PCA coefficients (axis-angle relative to the flat hand with ``use_pca=False``), or
        (B, 2, 15, 3, 3) matrices. betas: (B, 2, 10).
        Returns Hands in metres; re-centred on joint ``root_joint`` of the 21 unless that is None.
        """
        if pose.shape[-2:] != (3, 3):
            axis_angle = self.pose_from_pca(pose) if use_pca else pose
            pose = axis_angle_to_matrix(axis_angle.unflatten(-1, (15, 3)))
        rotations = torch.cat([_root_matrix(root)[:, :, None], pose], 2)
        arrays = HandArrays(*(getattr(self, name) for name in HandArrays._fields))
        vertices, chain = linear_blend_skinning(arrays, rotations, betas)
        index = self.tip_vertices[None, :, :, None].expand(vertices.shape[0], -1, -1, 3)
        joints = torch.cat([chain, vertices.gather(2, index)], 2)[:, :, self.joint_order]
        hands = Hands(vertices, joints)
        return hands if root_joint is None else recentre(hands, root_joint)

    def pose_from_pca(self, coefficients: Tensor) -> Tensor:
        """PCA coefficients (B, 2, 45) -> axis-angle (B, 2, 45) rad: mean + coefficients @ components."""
        return self.pose_mean + torch.einsum('bhk,hkn->bhn', coefficients, self.pose_components)


def recentre(hands: Hands, joint: int) -> Hands:
    """Move each hand so that its own ``joint`` lies at the origin."""
    origin = hands.joints[:, :, joint : joint + 1]
    return Hands(hands.vertices - origin, hands.joints - origin)


def _root_matrix(root: Tensor) -> Tensor:
    if root.shape[-2:] == (3, 3):
        return root
    return symmetric_6d_to_matrix(root) if root.shape[-1] == 6 else axis_angle_to_matrix(root)
