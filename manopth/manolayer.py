"""``ManoLayer``: one hand in millimetres, a drop-in for the published layer of Hasson et al. (CVPR 2019).

Written from that layer's documented interface and from code that calls it, not from its source. Constructor, argument
order, units, joint order and ``th_*`` attributes are the same; the README lists the differences.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from manopth.assets import HandModel, correct_left_shape_dirs, load_mano_pkl
from manopth.errors import ManoError
from manopth.lbs import pose_features, skin_mesh
from manopth.rotations import axis_angle_to_matrix, gram_schmidt_6d_to_matrix, nearest_rotation, symmetric_6d_to_matrix
from manopth.tables import CHAIN_PARENTS, MANO_TO_JOINTS, PUBLISHED_LEFT_MIDDLE_TIP, SIDES, TIP_VERTICES

PALM_VERTICES = (95, 22)  # ``root_palm`` moves joint 0 to the midpoint of these
MILLIMETRES = 1000.0

Flag = bool | Tensor


class ManoLayer(nn.Module):
    """Differentiable MANO layer for one hand, in millimetres: pose and shape parameters -> vertices and 21 joints.

    center_idx: joint of the 21 that is moved to the origin, None for none. flat_hand_mean: a pose of zeros is the flat
    hand, else the mean pose. use_pca, ncomps: the pose is that many PCA coefficients, else 45 axis-angle numbers.
    side: 'right' or 'left'. mano_root: folder of the official MANO_{LEFT,RIGHT}.pkl. root_rot_mode: 'axisang' (3
    numbers) or 'rot6d' (6; symmetric with robust_rot, else Gram-Schmidt). joint_rot_mode: 'axisang', or 'rotmat' for a
    pose of 16 matrices, root included.

    model: a HandModel to use instead of the files. correct_left_shape: fix the mirrored shape directions of the
    official left file, which needs MANO_RIGHT.pkl beside it; off by default, as in the published layer, because betas
    that were fitted with that layer belong to the uncorrected directions.

    The ``th_*`` arrays are buffers in metres and ``forward`` reads them at every call, so edits take effect. They are
    not saved in a state dict; those that old checkpoints contain are ignored on loading.

    Raises ManoError for an unusable argument or file.
    """

    th_betas: Tensor  # (1, 10) zeros
    th_v_template: Tensor  # (1, 778, 3)
    th_shapedirs: Tensor  # (778, 3, 10)
    th_posedirs: Tensor  # (778, 3, 135)
    th_J_regressor: Tensor  # (16, 778)
    th_weights: Tensor  # (778, 16)
    th_faces: Tensor  # (1538, 3) int64
    th_hands_mean: Tensor  # (1, 45), zeros with flat_hand_mean
    th_comps: Tensor  # (45, 45)
    th_selected_comps: Tensor  # (ncomps, 45)

    def __init__(
        self,
        center_idx: int | None = None,
        flat_hand_mean: bool = True,
        ncomps: int = 6,
        side: str = 'right',
        mano_root: str | Path = 'mano/models',
        use_pca: bool = True,
        root_rot_mode: str = 'axisang',
        joint_rot_mode: str = 'axisang',
        robust_rot: bool = False,
        *,
        model: HandModel | None = None,
        correct_left_shape: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        for name, value, allowed in (
            ('side', side, SIDES),
            ('root_rot_mode', root_rot_mode, ('axisang', 'rot6d')),
            ('joint_rot_mode', joint_rot_mode, ('axisang', 'rotmat')),
        ):
            if value not in allowed:
                raise ManoError(f'ManoLayer: {name} is {value!r}; it must be one of {", ".join(allowed)}.')
        if not 1 <= ncomps <= 45:
            raise ManoError(f'ManoLayer: ncomps is {ncomps}; it must be between 1 and 45.')
        if model is None:
            model = _load_hand(Path(mano_root), side, correct_left_shape=correct_left_shape)
        elif model.side != side:
            raise ManoError(f'ManoLayer: side is {side!r}, but the model is a {model.side} hand.')

        self.center_idx, self.flat_hand_mean, self.side = center_idx, flat_hand_mean, side
        self.use_pca, self.ncomps = use_pca, ncomps if use_pca else 45
        self.root_rot_mode, self.joint_rot_mode, self.robust_rot = root_rot_mode, joint_rot_mode, robust_rot
        self.rot = 3 if root_rot_mode == 'axisang' else 6  # numbers of the root rotation
        self.kintree_parents = list(CHAIN_PARENTS)
        self.register_buffer('th_faces', torch.tensor(model.faces), persistent=False)
        for name, array in {
            'th_betas': np.zeros((1, 10)),
            'th_v_template': model.template[None],
            'th_shapedirs': model.shape_dirs,
            'th_posedirs': model.pose_dirs,
            'th_J_regressor': model.joint_regressor,
            'th_weights': model.skinning_weights,
            'th_hands_mean': model.pose_mean[None] * (not flat_hand_mean),
            'th_comps': model.pose_components,
            'th_selected_comps': model.pose_components[: self.ncomps],
        }.items():
            self.register_buffer(name, torch.tensor(array, dtype=dtype), persistent=False)
        thumb, index, middle, ring, little = TIP_VERTICES
        self._tips = [thumb, index, middle if side == 'right' else PUBLISHED_LEFT_MIDDLE_TIP, ring, little]
        self.register_load_state_dict_pre_hook(_drop_saved_arrays)

    def forward(
        self,
        th_pose_coeffs: Tensor,
        th_betas: Tensor | None = None,
        th_trans: Tensor | None = None,
        root_palm: Flag = False,
        share_betas: Flag = False,
    ) -> tuple[Tensor, Tensor]:
        """Pose one hand -> vertices (B, 778, 3) and joints (B, 21, 3), both in millimetres.

        th_pose_coeffs: (B, rot + ncomps) or, with joint_rot_mode 'rotmat', (B, 16, 3, 3), projected onto rotations.
        th_betas: (B, 10), or (1, 10) for the whole batch; None or zeros of any shape mean the mean shape.
        th_trans: (B, 3) or (1, 3) in *metres*. If any entry is not zero it is added instead of centring on center_idx.
        root_palm: move joint 0 from the wrist to the middle of the palm. share_betas: use the batch's mean betas.
        Raises ManoError for tensors of other shapes.
        """
        rotations = self._rotations(th_pose_coeffs)
        batch = len(rotations)
        betas = self._rows('th_betas', th_betas, size=10, batch=batch)
        if betas is None:
            betas = self.th_betas
        elif bool(share_betas):
            betas = betas.mean(0, keepdim=True)
        shaped = self.th_v_template + torch.einsum('vck,bk->bvc', self.th_shapedirs, betas)
        corrective = torch.einsum('vck,bk->bvc', self.th_posedirs, pose_features(rotations[:, 1:]))
        vertices, chain = skin_mesh(
            rest_vertices=shaped + corrective,
            rest_joints=(self.th_J_regressor @ shaped).expand(batch, -1, -1),
            rotations=rotations,
            skinning_weights=self.th_weights,
        )
        joints = torch.cat([chain, vertices[:, self._tips]], 1)[:, list(MANO_TO_JOINTS)]
        if bool(root_palm):
            joints = torch.cat([vertices[:, list(PALM_VERTICES)].mean(1, keepdim=True), joints[:, 1:]], 1)
        offset = self._rows('th_trans', th_trans, size=3, batch=batch)
        if offset is not None:
            offset = offset[:, None]
        elif self.center_idx is not None:
            offset = -joints[:, self.center_idx, None]
        if offset is not None:
            vertices, joints = vertices + offset, joints + offset
        return vertices * MILLIMETRES, joints * MILLIMETRES

    def _rotations(self, pose: Tensor) -> Tensor:
        """Pose parameters -> (B, 16, 3, 3)."""
        if self.joint_rot_mode == 'rotmat':
            if pose.shape[1:] != (16, 3, 3):
                raise ManoError(f'ManoLayer: th_pose_coeffs has shape {tuple(pose.shape)}; it must be (B, 16, 3, 3).')
            return nearest_rotation(pose)
        if pose.ndim != 2 or pose.shape[1] != self.rot + self.ncomps:
            raise ManoError(
                f'ManoLayer: th_pose_coeffs has shape {tuple(pose.shape)}; it must be (B, {self.rot + self.ncomps}): '
                f'{self.rot} numbers of the root rotation and {self.ncomps} of the pose.'
            )
        root, fingers = pose.split([self.rot, self.ncomps], dim=1)
        if self.root_rot_mode == 'axisang':
            root = axis_angle_to_matrix(root)
        else:
            root = symmetric_6d_to_matrix(root) if self.robust_rot else gram_schmidt_6d_to_matrix(root)
        if self.use_pca:
            fingers = fingers @ self.th_selected_comps
        fingers = fingers + self.th_hands_mean
        return torch.cat([root[:, None], axis_angle_to_matrix(fingers.unflatten(-1, (15, 3)))], 1)

    @staticmethod
    def _rows(name: str, value: Tensor | None, *, size: int, batch: int) -> Tensor | None:
        """Check an optional argument (B, size) or (1, size); return None if it is absent or all zeros, of any shape."""
        if value is None or not bool(value.any()):
            return None
        if value.ndim != 2 or value.shape[0] not in (1, batch) or value.shape[1] != size:
            raise ManoError(
                f'ManoLayer: {name} has shape {tuple(value.shape)}; it must be ({batch}, {size}) or (1, {size}).'
            )
        return value


def _drop_saved_arrays(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """The published layer saved its arrays in every checkpoint; the ones in use come from the MANO file."""
    for key in [key for key in state_dict if key.startswith(f'{prefix}th_')]:
        del state_dict[key]


def _load_hand(folder: Path, side: str, *, correct_left_shape: bool) -> HandModel:
    hand = load_mano_pkl(folder / f'MANO_{side.upper()}.pkl', side=side)
    if side == 'left' and correct_left_shape:
        return correct_left_shape_dirs(hand, load_mano_pkl(folder / 'MANO_RIGHT.pkl', side='right'))
    return hand
