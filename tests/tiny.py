"""A network small enough to build in every test, and what it is fed with."""

import torch

from models import build_model
from models.predictions import Target
from utils.config import load_config
from utils.hand import NUM_JOINTS, NUM_VERTICES

# fmt: off
TINY = [
    'MODEL.BACKBONE', 'resnet18', 'MODEL.IMAGE_SIZE', '64', 'MODEL.MAP_CHANNELS', '16', 'MODEL.PRETRAINED', 'false',
    'MODEL.TOKEN_CHANNELS', '16', 'MODEL.JOINT_FEATURES', '8', 'MODEL.ATTENTION_CHANNELS', '16',
    'MODEL.GRAPH_LAYERS', '2', 'MANO.SOURCE', 'standin',
]
# Commands that train: 3 million weights, since saving them takes longer than a step.
TRAINING = [
    '--cfg', 'configs/demo.yaml', 'MODEL.BACKBONE', 'efficientnet_lite0', 'MODEL.IMAGE_SIZE', '64',
    'MODEL.MAP_CHANNELS', '16', 'MODEL.TOKEN_CHANNELS', '16', 'MODEL.JOINT_FEATURES', '8',
    'MODEL.ATTENTION_CHANNELS', '16', 'MODEL.GRAPH_LAYERS', '1', 'DEVICE', 'cpu',
]
# fmt: on


def tiny_config(**changes):
    """tiny_config(STAGES=1): a small network with these MODEL keys changed."""
    return load_config(None, TINY + [text for key, value in changes.items() for text in (f'MODEL.{key}', str(value))])


def tiny_model(standin, **changes):
    torch.manual_seed(0)
    return build_model(tiny_config(**{'INIT': 'identity', **changes}), standin)


def images(batch: int, size: int = 64) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def made_target(batch: int) -> Target:
    g = torch.Generator().manual_seed(2)
    joints, vertices = (0.1 * torch.randn(batch, 2, n, 3, generator=g) for n in (NUM_JOINTS, NUM_VERTICES))
    joints_uv, vertices_uv = (0.5 * torch.randn(batch, 2, n, 2, generator=g) for n in (NUM_JOINTS, NUM_VERTICES))
    return Target(
        vertices,
        joints,
        vertices_uv,
        joints_uv,
        torch.randint(3, (batch, 64, 64), generator=g),
        torch.rand(batch, 3, 64, 64, generator=g),
    )
