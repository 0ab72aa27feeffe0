"""64 numbers per hand -> meshes, joints and where they are seen."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from manopth import TwoHandLayer
from models.predictions import CAMERA, POSE, ROOT_ROTATION, SHAPE, HandPrediction


def full_precision(device_type: str) -> AbstractContextManager:
    """A region without autocast; no region where there is none anyway: torch.export makes a graph of its own of one."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class HandHead(nn.Module):
    """The hand layer behind every stage; it has no weights. Each hand is centred on its joint ``root_joint``."""

    def __init__(self, hand_layer: TwoHandLayer, *, root_joint: int):
        super().__init__()
        self.hand_layer, self.root_joint = hand_layer, root_joint

    def forward(self, parameters: Tensor, offset: Tensor) -> HandPrediction:
        """parameters (B, 2, 64), offset (B, 3) -> HandPrediction. Always in the hand layer's own precision."""
        parameters, offset = (x.to(self.hand_layer.template.dtype) for x in (parameters, offset))
        with full_precision(parameters.device.type):
            hands = self.hand_layer(
                parameters[..., ROOT_ROTATION],
                parameters[..., POSE],
                parameters[..., SHAPE],
                root_joint=self.root_joint,
            )
            camera = parameters[..., None, CAMERA]
            vertices_uv, joints_uv = (camera[..., :1] * xyz[..., :2] + camera[..., 1:] for xyz in hands)
        return HandPrediction(parameters, offset, hands.vertices, hands.joints, vertices_uv, joints_uv)
