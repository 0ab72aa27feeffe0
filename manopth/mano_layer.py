"""Parameters -> vertices and 21 joints, in metres: ``TwoHandLayer`` for both hands, ``ManoLayer`` for one."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from manopth.assets import HandModel, correct_left_shape_dirs, load_mano_pkl
from manopth.errors import ManoError
from manopth.lbs import HandArrays, linear_blend_skinning
from manopth.rotations import axis_angle_to_matrix, gram_schmidt_6d_to_matrix, symmetric_6d_to_matrix
from manopth.tables import MANO_TO_JOINTS, SIDES, TIP_VERTICES


class Hands(NamedTuple):
    """Meshes and skeletons of H hands."""

    vertices: Tensor  # (B, H, 778, 3) m
    joints: Tensor  # (B, H, 21, 3) m, order of utils.hand


class _HandLayer(nn.Module):
    """H hands as constant buffers. They are non-persistent: no checkpoint ever contains a licensed array."""

    def __init__(self, models: tuple[HandModel, ...], *, tip_vertices, dtype: torch.dtype):
        super().__init__()
        self.models = models
        for name, value in HandArrays.from_models(models, dtype)._asdict().items():
            self.register_buffer(name, value, persistent=False)
        tips = np.broadcast_to(np.asarray(tip_vertices), (len(models), 5))
        self.register_buffer('tip_vertices', torch.tensor(tips), persistent=False)
        self.register_buffer('joint_order', torch.tensor(MANO_TO_JOINTS), persistent=False)
        self.register_buffer('faces', torch.from_numpy(np.stack([m.faces for m in models])), persistent=False)
        for name in ('pose_mean', 'pose_components'):
            stacked = torch.from_numpy(np.stack([getattr(m, name) for m in models])).to(dtype)
            self.register_buffer(name, stacked, persistent=False)

    def skin(self, rotations: Tensor, betas: Tensor) -> Hands:
        """rotations (B, H, 16, 3, 3), betas (B, H, 10) -> Hands; the wrist stays at its rest position."""
        arrays = HandArrays(*(getattr(self, name) for name in HandArrays._fields))
        vertices, chain = linear_blend_skinning(arrays, rotations, betas)
        index = self.tip_vertices[None, :, :, None].expand(vertices.shape[0], -1, -1, 3)
        joints = torch.cat([chain, vertices.gather(2, index)], 2)[:, :, self.joint_order]
        return Hands(vertices, joints)


class TwoHandLayer(_HandLayer):
    """Both hands in one call; index 0 of the hand axis is the left hand.

    models: (left, right). tip_vertices: five vertex numbers, or a row of five per hand.
    """

    def __init__(
        self, models: tuple[HandModel, HandModel], *, tip_vertices=TIP_VERTICES, dtype: torch.dtype = torch.float32
    ):
        if [m.side for m in models] != list(SIDES):
            raise ValueError('TwoHandLayer takes the models in the order (left, right)')
        super().__init__(models, tip_vertices=tip_vertices, dtype=dtype)

    def pose_from_pca(self, coefficients: Tensor) -> Tensor:
        """PCA coefficients (B, 2, 45) -> axis-angle (B, 2, 45) rad: mean + coefficients @ components."""
        return self.pose_mean + torch.einsum('bhk,hkn->bhn', coefficients, self.pose_components)

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
        hands = self.skin(torch.cat([_root_matrix(root)[:, :, None], pose], 2), betas)
        return hands if root_joint is None else recentre(hands, root_joint)


def recentre(hands: Hands, joint: int) -> Hands:
    """Move each hand so that its own ``joint`` lies at the origin."""
    origin = hands.joints[:, :, joint : joint + 1]
    return Hands(hands.vertices - origin, hands.joints - origin)


def _root_matrix(root: Tensor) -> Tensor:
    if root.shape[-2:] == (3, 3):
        return root
    return symmetric_6d_to_matrix(root) if root.shape[-1] == 6 else axis_angle_to_matrix(root)


class ManoLayer(_HandLayer):
    """One hand, with the constructor words of the widely used public layer; lengths are metres here.

    side: 'left' or 'right'. use_pca with ncomps: the pose is that many PCA coefficients, else 45 axis-angle numbers.
    flat_hand_mean: pose 0 is the flat hand, else the mean pose is added. center_idx: joint of the 21 to move to the
    origin. root_rot_mode: 'axisang' (3 numbers) or 'rot6d' (6; symmetric if robust_rot, else Gram-Schmidt).
    joint_rot_mode: 'axisang', or 'rotmat' for a pose of 16 matrices, root included. mano_root: folder of the official
    files; ``model`` takes a HandModel instead.
    """

    def __init__(
        self,
        center_idx: int | None = None,
        flat_hand_mean: bool = True,
        ncomps: int = 6,
        side: str = 'right',
        mano_root: str = 'misc/mano',
        use_pca: bool = True,
        root_rot_mode: str = 'axisang',
        joint_rot_mode: str = 'axisang',
        robust_rot: bool = False,
        *,
        model: HandModel | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        for word, value, allowed in (
            ('side', side, SIDES),
            ('root_rot_mode', root_rot_mode, ('axisang', 'rot6d')),
            ('joint_rot_mode', joint_rot_mode, ('axisang', 'rotmat')),
        ):
            if value not in allowed:
                raise ManoError(f'ManoLayer: {word} is {value!r}; it must be one of {", ".join(allowed)}.')
        if not 1 <= ncomps <= 45:
            raise ManoError(f'ManoLayer: ncomps is {ncomps}; a hand has 1 to 45 pose components.')
        if model is not None and model.side != side:
            raise ManoError(f'ManoLayer: side is {side!r}, but the model given is a {model.side} hand.')
        super().__init__((model or _load_one(mano_root, side),), tip_vertices=TIP_VERTICES, dtype=dtype)
        self.center_idx, self.flat_hand_mean, self.robust_rot = center_idx, flat_hand_mean, robust_rot
        self.ncomps = ncomps if use_pca else 45
        self.use_pca, self.root_rot_mode, self.joint_rot_mode = use_pca, root_rot_mode, joint_rot_mode

    def forward(self, pose: Tensor, betas: Tensor | None = None, trans: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pose one hand.

        pose (B, root + pose numbers) or (B, 16, 3, 3); betas (B, 10), default 0; trans (B, 3) m, default 0. As in the
        public layer a ``trans`` other than 0 takes the place of re-centring on ``center_idx``.
        Returns vertices (B, 778, 3) m, joints (B, 21, 3) m.
        """
        if betas is None:
            betas = pose.new_zeros(len(pose), 10)
        hands = self.skin(self._rotations(pose)[:, None], betas[:, None])
        if trans is not None and bool(trans.any()):
            hands = Hands(*(points + trans[:, None, None] for points in hands))
        elif self.center_idx is not None:
            hands = recentre(hands, self.center_idx)
        return hands.vertices[:, 0], hands.joints[:, 0]

    def _rotations(self, pose: Tensor) -> Tensor:
        """-> (B, 16, 3, 3)."""
        if self.joint_rot_mode == 'rotmat':
            return pose.view(len(pose), 16, 3, 3)
        root, fingers = pose.split([3 if self.root_rot_mode == 'axisang' else 6, self.ncomps], dim=1)
        if self.root_rot_mode == 'axisang':
            root = axis_angle_to_matrix(root)
        else:
            root = symmetric_6d_to_matrix(root) if self.robust_rot else gram_schmidt_6d_to_matrix(root)
        if self.use_pca:
            fingers = fingers @ self.pose_components[0, : self.ncomps]
        if not self.flat_hand_mean:
            fingers = fingers + self.pose_mean
        return torch.cat([root[:, None], axis_angle_to_matrix(fingers.unflatten(-1, (15, 3)))], 1)


def _load_one(mano_root: str, side: str) -> HandModel:
    right = load_mano_pkl(f'{mano_root}/MANO_RIGHT.pkl', side='right')
    if side == 'right':
        return right
    return correct_left_shape_dirs(load_mano_pkl(f'{mano_root}/MANO_LEFT.pkl', side='left'), right)
