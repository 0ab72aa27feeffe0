"""``TwoHandLayer``: parameters -> vertices and 21 joints of both hands in one call, in metres."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from manopth.assets import HandModel, HandPair
from manopth.errors import ManoError
from manopth.lbs import HandArrays, pose_fingers, turn_about
from manopth.rotations import axis_angle_to_matrix, symmetric_6d_to_matrix
from manopth.tables import MANO_TO_JOINTS, NUM_CHAIN_JOINTS, NUM_JOINTS, NUM_VERTICES, SIDES, TIP_VERTICES


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
    base_points: Tensor
    rest_joints: Tensor
    joint_shape_dirs: Tensor
    tip_vertices: Tensor
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

        tips = np.broadcast_to(np.asarray(tip_vertices), (2, 5))
        chain, vertices = (np.arange(count)[None].repeat(2, 0) for count in (NUM_CHAIN_JOINTS, NUM_VERTICES))
        joints = np.concatenate([chain, NUM_CHAIN_JOINTS + tips], 1)[:, MANO_TO_JOINTS]
        points = np.concatenate([joints, NUM_CHAIN_JOINTS + vertices], 1)
        buffers = {
            **HandArrays.from_models(self.models, dtype, points=points)._asdict(),
            'tip_vertices': torch.tensor(tips),
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
        points = self.points(root, pose, betas, use_pca=use_pca, root_joint=root_joint)
        joints, vertices = points.split((NUM_JOINTS, NUM_VERTICES), 2)
        return Hands(vertices, joints)

    def points(
        self, root: Tensor, pose: Tensor, betas: Tensor, *, use_pca: bool = True, root_joint: int | None = None
    ) -> Tensor:
        """As ``forward``, but the 21 joints and then the 778 vertices in one tensor, (B, 2, 799, 3)."""
        if use_pca and pose.ndim == 3:
            pose = self.pose_from_pca(pose)
        root, pose, betas = (x.transpose(0, 1) for x in (root, pose, betas))  # hand first, as in pose_fingers
        if pose.ndim == 3:
            pose = axis_angle_to_matrix(pose.unflatten(-1, (15, 3)))
        if root.ndim == 3:
            root = symmetric_6d_to_matrix(root) if root.shape[-1] == 6 else axis_angle_to_matrix(root)
        points, wrist = pose_fingers(HandArrays(*(getattr(self, name) for name in HandArrays._fields)), pose, betas)
        if root_joint is None:
            points = turn_about(wrist, points, root)
        else:  # what is re-centred may be turned about any point
            points = (points - points[:, :, root_joint : root_joint + 1]) @ root.mT
        return points.transpose(0, 1)

    def pose_from_pca(self, coefficients: Tensor) -> Tensor:
        """PCA coefficients (B, 2, 45) -> axis-angle (B, 2, 45) rad: mean + coefficients @ components."""
        by_hand = torch.baddbmm(self.pose_mean[:, None], coefficients.transpose(0, 1), self.pose_components)
        return by_hand.transpose(0, 1)
