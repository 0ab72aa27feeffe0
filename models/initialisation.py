"""Weights before training. The backbone keeps torchvision's own (or its ImageNet weights)."""

import torch
from torch import nn

from models.bone_projection import ProjectedConvolution
from models.dir import DIR
from models.joint_interaction import CrossHandTransformer, SkeletonGraphLayer
from models.layers import PerHandLinear
from models.predictions import CAMERA, NUM_PARAMETERS, ROOT_ROTATION

# What 'identity' starts from: no rotation, mean pose and shape, a hand that fills about half of the crop.
_UPRIGHT_6D = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
_CAMERA_SCALE = 5.0  # uv per metre


def initialise(model: DIR, scheme: str) -> None:
    """Fill every layer outside the backbone.

    'published': 2D convolutions N(0, sqrt(2 / (k^2 out))), all linear weights N(0, 0.001), the transformer's too.
    'identity': the same convolutions, but the regressors start at an upright mean hand and each stage at the previous
    stage's estimate, and the transformer has PyTorch's own linear initialisation instead of being almost switched off.
    """
    for part in (model.initial_regressor, model.stages, model.dense_heads):
        for module in part.modules():
            _published(module, linear=scheme == 'published')
    if scheme == 'identity':
        _start_at_mean_hand(model)


def _published(module: nn.Module, *, linear: bool) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=(2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, ProjectedConvolution):
        nn.init.normal_(module.weight, std=(2 / (9 * module.weight.shape[3])) ** 0.5)
        nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.Linear, PerHandLinear)) and linear:
        nn.init.normal_(module.weight, std=0.001)
    elif isinstance(module, SkeletonGraphLayer):
        a, b = module.weight.shape[2], module.out_features
        bound = 1.414 * (6 / (a + b)) ** 0.5  # Xavier-uniform per matrix, gain 1.414
        nn.init.uniform_(module.weight, -bound, bound)
        nn.init.ones_(module.neighbour_logits)
    elif isinstance(module, CrossHandTransformer):
        nn.init.zeros_(module.position)


@torch.no_grad()
def _start_at_mean_hand(model: DIR) -> None:
    start = torch.zeros(NUM_PARAMETERS)
    start[ROOT_ROTATION] = torch.tensor(_UPRIGHT_6D)
    start[CAMERA.start] = _CAMERA_SCALE
    first = model.initial_regressor
    for head, bias in ((first.parameters_head, start), (first.offset_head, torch.zeros(3))):
        nn.init.normal_(head.weight, std=0.001)
        head.bias.copy_(bias.expand_as(head.bias))
    for stage in model.stages:
        for head in (stage.parameters_head, stage.offset_head):
            nn.init.normal_(head.weight, std=0.001)
            outputs = head.weight.shape[-2]
            head.weight[..., -outputs:] += torch.eye(outputs)  # the previous estimate is the tail of the input
            nn.init.zeros_(head.bias)
