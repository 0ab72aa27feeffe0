"""Initial weights of everything but the backbone, which keeps torchvision's (or its ImageNet weights)."""

import torch
from torch import nn

from models.bone_projection import ProjectedConvolution
from models.dir import DIR
from models.joint_interaction import CrossHandTransformer, SkeletonGraphLayer
from models.layers import PerHandLinear
from models.predictions import CAMERA, NUM_PARAMETERS, ROOT_ROTATION

# The first estimate of 'identity': no rotation, mean pose and shape, a hand that fills about half of the crop.
_UPRIGHT_6D = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
_CAMERA_SCALE = 5.0  # uv per metre


def initialise(model: DIR, scheme: str) -> None:
    """Initialise every layer outside the backbone and the optional heads of models/confidence.py.

    'published': 2D convolutions N(0, sqrt(2 / (k^2 out))), all linear weights N(0, 0.001), the transformer's too.
    'identity': the same convolutions, but the regressors start at an upright mean hand and each stage at the previous
    stage's estimate, and the transformer keeps PyTorch's linear initialisation, with which it is not almost off.
    """
    linear = (nn.Linear, PerHandLinear) if scheme == 'published' else ()
    parts = [model.initial_regressor, *model.neck, *model.stages, model.dense_heads]
    for module in (module for part in parts if part is not None for module in part.modules()):
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=(2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, linear):
            nn.init.normal_(module.weight, std=0.001)
        elif isinstance(module, (ProjectedConvolution, SkeletonGraphLayer, CrossHandTransformer)):
            module.reset_parameters()
    if scheme == 'identity':
        model.initial_regressor.start_at(_mean_hand())
        for stage in model.stages:
            stage.start_at_previous()


def _mean_hand() -> torch.Tensor:
    """(64,)"""
    parameters = torch.zeros(NUM_PARAMETERS)
    parameters[ROOT_ROTATION] = torch.tensor(_UPRIGHT_6D)
    parameters[CAMERA.start] = _CAMERA_SCALE
    return parameters
