"""Hand parameters -> meshes and joints in 3D, and their projections."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from manopth import TwoHandLayer
from models.predictions import CAMERA, POSE, ROOT_ROTATION, SHAPE, HandPrediction


def full_precision(device_type: str) -> AbstractContextManager:
    """Disable autocast in this context; a null context if it is off: torch.export makes a subgraph of any other."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class HandHead(nn.Module):
    """The hand layer, shared by all stages and without weights; centres each hand on its joint ``root_joint``."""

    def __init__(self, hand_layer: TwoHandLayer, *, root_joint: int):
        super().__init__()
        self.hand_layer, self.root_joint = hand_layer, root_joint

    def forward(self, parameters: Tensor, offset: Tensor) -> HandPrediction:
        """parameters (B, 2, 64), offset (B, 3) -> HandPrediction, in the hand layer's precision even under autocast."""
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
