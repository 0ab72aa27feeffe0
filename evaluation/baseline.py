"""The best constant prediction: mean parameters and mean offset of a training split."""

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from dataset.damage import Damage, DamageError, read_patiently, refuse_damage, tolerated
from dataset.loader import Loader
from dataset.prepared import PreparedSplit
from manopth import TwoHandLayer
from manopth.rotations import nearest_rotation
from models.hand_head import HandHead
from models.placement import nearest_camera
from models.predictions import CAMERA, NUM_PARAMETERS, POSE, ROOT_ROTATION, SHAPE, DIROutput
from models.preprocessing import Preprocessing
from utils.errors import UserError
from utils.geometry import project, to_uv, world_to_camera
from utils.hand import HAND_SCALE, LEFT, RIGHT
from utils.masking import where_leading


class ConstantPrediction(nn.Module):
    """A model with the interface of DIR that ignores the image."""

    parameters_: Tensor
    offset: Tensor

    def __init__(self, hand_head: HandHead, parameters: Tensor, offset: Tensor):
        super().__init__()
        self.hand_head, self.preprocess = hand_head, Preprocessing()
        self.register_buffer('parameters_', parameters)
        self.register_buffer('offset', offset)

    def forward(self, image: Tensor) -> DIROutput:
        batch = len(image)
        hands = self.hand_head(self.parameters_.expand(batch, -1, -1), self.offset.expand(batch, -1))
        return DIROutput([hands], segmentation=None, dense=None)


class _Annotations(Dataset):
    """The annotations of a split, without images, in batches that leave damaged ones out."""

    def __init__(self, dataset: PreparedSplit):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> tuple[list[Tensor], list[Damage]]:
        """-> the values of ``PreparedSplit.complete_labels``, each with a leading axis, and what was left out."""
        rows, damage = [], []
        for index in indices:
            name = self.dataset.name(index)
            try:
                rows.append(read_patiently(partial(self.dataset.complete_labels, index), name).values())
            except DamageError as error:
                damage.append(Damage(index, name, error.reason, str(error)))
        return [torch.from_numpy(np.stack(values)) for values in zip(*rows)], damage


def _fetched_batch(batch):
    return batch  # ``__getitems__`` has already batched it


class MeanPrediction(NamedTuple):
    """Means over a split."""

    parameters: Tensor  # (2, 64)
    offset: Tensor  # (3,)
    damage: tuple[Damage, ...]  # samples that could not be read and were left out


@torch.no_grad()
def mean_prediction(
    dataset: PreparedSplit,
    hand_layer: TwoHandLayer,
    *,
    root_joint: int,
    workers: int = 0,
    tolerated_damage: float = 0.0,
) -> MeanPrediction:
    """Means over ``dataset``. The mean rotation is the chordal one.

    Absent hands are left out, and from the offset the frames without both hands. A hand that no frame shows is the mean
    hand of the model, with the other one's camera. tolerated_damage: share of the samples that may be damaged and are
    left out. Raises UserError if more are, and if no frame shows any hand.
    """
    rotation, pose, shape, offset = torch.zeros(2, 3, 3), torch.zeros(2, 45), torch.zeros(2, 10), torch.zeros(3)
    camera_sum, shown, pairs = torch.zeros(2, 3), torch.zeros(2), 0
    damage: list[Damage] = []
    most, annotations = tolerated(tolerated_damage, len(dataset)), _Annotations(dataset)
    with closing(Loader(annotations, num_workers=workers, batch_size=256, collate_fn=_fetched_batch)) as loader:
        for labels, left_out in tqdm(loader, desc='mean', leave=False):
            damage += left_out
            refuse_damage(damage, most=most, samples=len(dataset), folder=dataset.folder)
            if not labels:
                continue
            present, root, poses, shapes, translation, *camera, intrinsics = labels
            both = present.all(1)
            shown, pairs = shown + present.sum(0), pairs + int(both.sum())
            joints = world_to_camera(hand_layer(root, poses, shapes).joints + translation[:, :, None], *camera)
            apart = joints[:, RIGHT, root_joint] - joints[:, LEFT, root_joint]
            offset += _sum_of(apart, both) / HAND_SCALE / len(dataset)
            uv = to_uv(project(joints, intrinsics[:, None]))
            camera_sum += _sum_of(nearest_camera(joints - joints[:, :, root_joint : root_joint + 1], uv), present)
            rotation += _sum_of(camera[0][:, None] @ root, present)
            pose += _sum_of(poses, present) / len(dataset)
            shape += _sum_of(shapes, present) / len(dataset)
    if not shown.any():
        raise UserError(f'No frame of {dataset.folder} shows a hand, so there is no mean to predict. Prepare it again.')
    rotation = torch.where(shown[:, None, None] > 0, rotation, torch.eye(3))
    camera_sum, frames = torch.where(shown[:, None] > 0, camera_sum, camera_sum.flip(0)), shown[:, None]
    parameters = torch.zeros(2, NUM_PARAMETERS)
    parameters[:, ROOT_ROTATION] = nearest_rotation(rotation)[..., :2].transpose(-1, -2).flatten(1)
    scale = len(dataset) / frames.clamp_min(1)  # 1 if every frame shows the hand
    parameters[:, POSE], parameters[:, SHAPE] = pose * scale, shape * scale
    parameters[:, CAMERA] = camera_sum / torch.where(frames > 0, frames, frames.flip(0))
    return MeanPrediction(parameters, offset * (len(dataset) / max(pairs, 1)), tuple(damage))


def _sum_of(values: Tensor, chosen: Tensor) -> Tensor:
    """Sum over samples of those values (B, ...) that the leading axes of ``chosen`` select."""
    return (values if chosen.all() else where_leading(chosen, values, 0.0)).sum(0)
