"""The image backbone: torchvision's ResNets without pooling and classifier."""

from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from utils.errors import UserError


class ResNetBackbone(nn.Module):
    """Image (B, 3, H, W) -> feature maps c1, c2, c3, c4 at strides 4, 8, 16, 32 with ``channels`` channels."""

    def __init__(self, name: str = 'resnet50'):
        super().__init__()
        net = torchvision.models.get_model(name, weights=None)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layers = nn.ModuleList([net.layer1, net.layer2, net.layer3, net.layer4])
        expansion = net.fc.in_features // 512
        self.channels = tuple(width * expansion for width in (64, 128, 256, 512))

    def forward(self, image: Tensor) -> list[Tensor]:
        x = self.stem(image)
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return maps

    def load_torchvision(self, state: dict[str, Tensor]) -> None:
        """Take a torchvision ``state_dict`` (its classifier ``fc`` is not used); raises RuntimeError on a mismatch."""
        self.load_state_dict({ours(key): value for key, value in state.items() if not key.startswith('fc.')})


def ours(torchvision_key: str) -> str:
    """torchvision's name of a ResNet entry -> the backbone's."""
    module, rest = torchvision_key.split('.', 1)
    if module.startswith('layer'):
        return f'layers.{int(module[5:]) - 1}.{rest}'
    return f'stem.{("conv1", "bn1").index(module)}.{rest}'


def torchvisions(our_key: str) -> str:
    """Inverse of ``ours``."""
    part, index, rest = our_key.split('.', 2)
    return f'layer{int(index) + 1}.{rest}' if part == 'layers' else f'{("conv1", "bn1")[int(index)]}.{rest}'


def load_imagenet(backbone: ResNetBackbone, name: str, weights_file: str = '') -> None:
    """Give ``backbone`` its ImageNet weights (see ``imagenet_state``); raises UserError if they do not fit, too."""
    try:
        backbone.load_torchvision(imagenet_state(name, weights_file))
    except (RuntimeError, ValueError, AttributeError):
        raise UserError(
            f'{weights_file or "The ImageNet weights"} do not fit {name}: MODEL.BACKBONE_WEIGHTS takes a '
            'torchvision state_dict of that very network.'
        ) from None


def imagenet_state(name: str, weights_file: str = '') -> dict[str, Tensor]:
    """ImageNet weights of torchvision's ``name``: from a local file, or from torchvision's cache or download.

    Raises UserError when they cannot be had, saying what to do.
    """
    instead = 'give a local file with MODEL.BACKBONE_WEIGHTS FILE, or train from scratch with MODEL.PRETRAINED false'
    try:
        if weights_file:
            return torch.load(Path(weights_file), map_location='cpu', weights_only=True)
        weights = torchvision.models.get_model_weights(name).DEFAULT
        return weights.get_state_dict(progress=True, check_hash=True)
    except Exception as error:
        what = weights_file or f"torchvision's ImageNet weights for {name}"
        reason = f'{type(error).__name__}: {error}'.splitlines()[0][:160]
        raise UserError(f'{what} cannot be had ({reason}): {instead}.') from None
