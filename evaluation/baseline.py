"""The best constant prediction: mean parameters and mean offset of a training split."""

from contextlib import closing

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from dataset.loader import Loader
from dataset.prepared import PreparedSplit
from manopth import TwoHandLayer
from manopth.rotations import nearest_rotation
from models.hand_head import HandHead
from models.placement import nearest_camera
from models.predictions import CAMERA, NUM_PARAMETERS, POSE, ROOT_ROTATION, SHAPE, DIROutput
from models.preprocessing import Preprocessing
from utils.geometry import project, to_uv, world_to_camera
from utils.hand import HAND_SCALE, LEFT, RIGHT


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
    """The annotations of a split, without images."""

    def __init__(self, dataset: PreparedSplit):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> list[Tensor]:
        return list(map(torch.from_numpy, self.dataset.labels(index)))


@torch.no_grad()
def mean_prediction(
    dataset: PreparedSplit, hand_layer: TwoHandLayer, *, root_joint: int, workers: int = 0
) -> tuple[Tensor, Tensor]:
    """Means over ``dataset``: parameters (2, 64) and offset (3,). The mean rotation is the chordal one."""
    rotation, pose, shape, offset = torch.zeros(2, 3, 3), torch.zeros(2, 45), torch.zeros(2, 10), torch.zeros(3)
    camera_sum = torch.zeros(2, 3)
    with closing(Loader(_Annotations(dataset), batch_size=256, num_workers=workers)) as loader:
        for root, poses, shapes, translation, *camera, intrinsics in tqdm(loader, desc='mean', leave=False):
            joints = world_to_camera(hand_layer(root, poses, shapes).joints + translation[:, :, None], *camera)
            offset += (joints[:, RIGHT, root_joint] - joints[:, LEFT, root_joint]).sum(0) / HAND_SCALE / len(dataset)
            uv = to_uv(project(joints, intrinsics[:, None]))
            camera_sum += nearest_camera(joints - joints[:, :, root_joint : root_joint + 1], uv).sum(0)
            rotation += (camera[0][:, None] @ root).sum(0)
            pose += poses.sum(0) / len(dataset)
            shape += shapes.sum(0) / len(dataset)
    parameters = torch.zeros(2, NUM_PARAMETERS)
    parameters[:, ROOT_ROTATION] = nearest_rotation(rotation)[..., :2].transpose(-1, -2).flatten(1)
    parameters[:, POSE], parameters[:, SHAPE] = pose, shape
    parameters[:, CAMERA] = camera_sum / len(dataset)
    return parameters, offset
