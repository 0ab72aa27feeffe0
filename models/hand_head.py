"""Hand parameters -> meshes and joints in 3D, and their projections."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from manopth import TwoHandLayer
from models.predictions import PARAMETER_SIZES, HandPrediction
from utils.hand import NUM_JOINTS, NUM_VERTICES


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
        parameters, offset = (x.to(self.hand_layer.base_points.dtype) for x in (parameters, offset))
        with full_precision(parameters.device.type):
            root, pose, shape, camera = parameters.split(PARAMETER_SIZES, -1)
            points = self.hand_layer.points(root, pose, shape, root_joint=self.root_joint)
            scale, shift = camera[:, :, None].split((1, 2), -1)
            points_uv = torch.addcmul(shift, scale, points[..., :2])
            joints, vertices = points.split((NUM_JOINTS, NUM_VERTICES), 2)
            joints_uv, vertices_uv = points_uv.split((NUM_JOINTS, NUM_VERTICES), 2)
        return HandPrediction(parameters, offset, vertices, joints, vertices_uv, joints_uv)
