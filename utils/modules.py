"""Parts of networks."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

Part = TypeVar('Part', bound=nn.Module)


def replace_modules(network: nn.Module, kind: type[Part], replacement: Callable[[Part], nn.Module]) -> None:
    """Replace, in place, every module of class ``kind`` within ``network`` by what ``replacement`` makes of it."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, replacement(child))
