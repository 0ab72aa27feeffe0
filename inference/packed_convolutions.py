"""Convolutions for inference on a CPU whose weights are laid out once, as oneDNN reads them.

PyTorch's convolutions lay out their weights anew at every call. For one image that takes a quarter of the time.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from utils.modules import replace_modules


class PackedConv2d(nn.Module):
    """Drop-in replacement of an nn.Conv2d, for inference: the same sums in float32; maps come out channels-last.

    shape: that of the input (B, in, H, W) for which the layout is chosen; others are computed as well, but slower.
    The weights no longer follow the given convolution's. PyTorch can neither copy nor save them.
    """

    def __init__(self, convolution: nn.Conv2d, shape: torch.Size):
        super().__init__()
        if not packable(convolution):
            raise ValueError(f'Expected a float32 convolution on a CPU with zeros as padding, got {convolution}.')
        c = convolution
        self.geometry = (c.padding, c.stride, c.dilation, c.groups)
        self.bias = None if c.bias is None else c.bias.detach()
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        self.weight = reorder(c.weight.detach().to_mkldnn(), *self.geometry, shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return _convolve(x, self.weight, self.bias, *self.geometry, 'none', [], '')  # no activation after it


# What TorchInductor's code calls: torch.mkldnn_convolution would convert channels-last maps there and back.
_convolve: Any = None
if torch.backends.mkldnn.is_available() and not torch.backends.mkldnn.is_acl_available():  # not tried on ARM
    _convolve = getattr(torch.ops.mkldnn, '_convolution_pointwise', None)


def packable(convolution: nn.Conv2d) -> bool:
    """Whether ``PackedConv2d`` can compute this convolution here."""
    c = convolution
    plain = c.weight.dtype == torch.float32 and c.weight.device.type == 'cpu'
    return _convolve is not None and plain and c.padding_mode == 'zeros' and not isinstance(c.padding, str)


@torch.no_grad()
def pack_convolutions(model: nn.Module, *inputs: Tensor) -> None:
    """Replace, in place, the convolutions of ``model`` that a call with these inputs passes through."""
    shapes: dict[nn.Module, torch.Size] = {}

    def note(module: nn.Module, args: tuple[Tensor]) -> None:
        shapes.setdefault(module, args[0].shape)

    found = [m for m in model.modules() if isinstance(m, nn.Conv2d) and packable(m)]
    if not found:
        return
    with ExitStack() as hooks:
        for convolution in found:
            hooks.enter_context(convolution.register_forward_pre_hook(note))
        model(*inputs)
    replace_modules(model, nn.Conv2d, lambda c: PackedConv2d(c, shapes[c]) if c in shapes else c)
