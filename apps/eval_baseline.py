"""The best constant prediction: what an evaluation gives for mean training parameters and the mean training offset.

    python apps/eval_baseline.py --data_path ./data/interhand2.6m/ [--root_joint 9] [--no-scale] [KEY VALUE ...]

A network that does not beat this has learned nothing. Both hands get their mean root rotation in camera axes, mean
pose, mean shape, and the mean vector between the roots, whatever the image.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from apps.eval_interhand import add_evaluation_arguments, evaluate_split, report
from dataset import open_split
from dataset.prepared import PreparedSplit
from manopth import TwoHandLayer
from models.hand_head import HandHead
from models.hands import load_hands
from models.placement import nearest_camera
from models.predictions import CAMERA, NUM_PARAMETERS, POSE, ROOT_ROTATION, SHAPE, DIROutput
from models.preprocessing import Preprocessing
from utils import distributed
from utils.config import flatten, load_config
from utils.errors import user_facing
from utils.geometry import project, to_uv, world_to_camera
from utils.hand import HAND_SCALE, LEFT, RIGHT


class ConstantPrediction(nn.Module):
    """Has the interface of DIR and does not look at the image."""

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
    """The annotations of a split without its images."""

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
    """(parameters (2, 64), offset (3,)): means over ``dataset``. The mean rotation is the chordal one, by SVD."""
    rotation, pose, shape, offset = torch.zeros(2, 3, 3), torch.zeros(2, 45), torch.zeros(2, 10), torch.zeros(3)
    camera_sum = torch.zeros(2, 3)
    loader = DataLoader(_Annotations(dataset), batch_size=256, num_workers=workers)
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


def nearest_rotation(matrix: Tensor) -> Tensor:
    """(..., 3, 3) -> the closest rotation in the Frobenius norm (orthogonal Procrustes)."""
    u, _, vh = torch.linalg.svd(matrix)
    sign = torch.ones(matrix.shape[:-1])
    sign[..., 2] = torch.linalg.det(u @ vh)
    return u @ (sign[..., None] * vh)


@user_facing
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_path', required=True, help='prepared data set; the means are over its training split')
    parser.add_argument('--cfg', metavar='FILE', help='YAML file with what differs from utils/config.py')
    add_evaluation_arguments(parser)
    args = parser.parse_intermixed_args(argv)

    cfg = load_config(args.cfg, [*args.opts, 'DATASET.PATH', args.data_path])
    hand_layer = TwoHandLayer(load_hands(cfg.MANO.SOURCE, cfg.MANO.PATH))
    labels = open_split(args.data_path, 'train', with_mask=False, with_dense=False)
    means = mean_prediction(labels, hand_layer, root_joint=cfg.ROOT_JOINT, workers=cfg.TRAIN.WORKERS)
    model = ConstantPrediction(HandHead(hand_layer, root_joint=cfg.ROOT_JOINT), *means)
    measured = evaluate_split(model, cfg, args)
    if distributed.is_main():
        report(measured, title='best constant prediction', out=args.out, more={'config': flatten(cfg)})
    distributed.stop()
    return 0


if __name__ == '__main__':
    sys.exit(main())
