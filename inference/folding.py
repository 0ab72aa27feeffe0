"""Prepare a trained network for inference: the same estimates with fewer operations."""

import copy
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from inference.packed_convolutions import pack_convolutions
from inference.winograd import use_winograd
from models.dir import DIR

Network = TypeVar('Network', bound=nn.Module)


def for_inference(model: DIR) -> DIR:
    """A copy of ``model`` that computes the same last estimate: batch norms folded, auxiliary parts removed."""
    model = fold_batch_norms(model)
    model.drop_auxiliary()
    return model


def replace_convolutions(model: DIR) -> None:
    """Replace, in place, the convolutions of a float32 network on a CPU by forms that run faster there."""
    use_winograd(model)
    side = model.preprocess.image_size
    pack_convolutions(model, model.preprocess.mean.new_zeros(1, 3, side, side))


def fold_batch_norms(model: Network) -> Network:
    """A copy of ``model``, in evaluation mode, in which no batch norm directly follows a convolution.

    In evaluation mode a batch norm scales and shifts each channel, which the convolution's weights can absorb.
    Raises ValueError for a network in training mode.
    """
    if model.training:
        raise ValueError('Batch norms can be folded in evaluation mode only: call model.eval() first.')
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        children = dict(parent.named_children())
        for convolution, norm in _pairs(parent, list(children)):
            conv, bn = children[convolution], children[norm]
            if isinstance(conv, (nn.Conv1d, nn.Conv2d)) and isinstance(bn, _BatchNorm):
                assert bn.running_mean is not None and bn.running_var is not None
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
                )
                setattr(parent, norm, nn.Identity())
    return model


def _pairs(parent: nn.Module, names: list[str]) -> list[tuple[str, str]]:
    """Names of pairs of children of which the second runs directly after the first."""
    if isinstance(parent, nn.Sequential):
        return list(zip(names, names[1:]))
    # torchvision's ResNet and its residual blocks call their children by name: conv1, bn1, ...
    return [(name, f'bn{name[4:]}') for name in names if name.startswith('conv') and f'bn{name[4:]}' in names]
