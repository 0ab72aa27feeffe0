"""Winograd's 3 x 3 convolution for inference on a CPU: 2.25 times fewer products.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016, F(2 x 2, 3 x 3): transform the kernels and
4 x 4 input tiles, multiply them point by point, transform the products back into 2 x 2 output tiles. The result equals
a direct convolution's up to rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.modules import replace_modules

MIN_CHANNELS = 1024  # below, transforming the tiles costs about as much as it saves
# Along one axis: B^T input tile, G kernel, A^T output tile; along both axes their Kronecker squares.
_INPUT = torch.tensor([[1.0, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
_KERNEL = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_OUTPUT = torch.tensor([[1.0, 1, 1, 0], [0, 1, -1, -1]])
_INPUT, _KERNEL, _OUTPUT = (torch.kron(one, one) for one in (_INPUT, _KERNEL, _OUTPUT))  # (16, 16), (16, 9), (4, 16)


class WinogradConv2d(nn.Module):
    """Drop-in replacement of a 3 x 3 nn.Conv2d with padding 1, for inference: (B, in, H, W) -> (B, out, H, W).

    The kernels are transformed once, to 16/9 of their memory, and no longer follow the given convolution's.
    """

    kernels: Tensor  # (16, out, in)
    bias: Tensor | None

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        if not replaceable(convolution):
            raise ValueError(f'Expected a 3 x 3 convolution with padding 1 and no stride or groups, got {convolution}.')
        weight, bias = convolution.weight.detach(), convolution.bias
        by_position = weight.flatten(2).permute(2, 0, 1).flatten(1)
        self.register_buffer('kernels', (_KERNEL.to(weight) @ by_position).view(16, *weight.shape[:2]))
        self.register_buffer('bias', None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = F.pad(x, (0, width % 2, 0, height % 2))  # the tiles cover an even number of rows and columns
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        tiles = F.unfold(x, 4, padding=1, stride=2).unflatten(1, (channels, 16)).permute(2, 1, 0, 3)
        tiles = (_INPUT.to(x) @ tiles.flatten(1)).view(16, channels, batch * rows * columns)
        products = torch.bmm(self.kernels, tiles)  # (16, out, B * rows * columns)
        out = (_OUTPUT.to(x) @ products.flatten(1)).view(2, 2, self.kernels.shape[1], batch, rows, columns)
        out = out.permute(3, 2, 4, 0, 5, 1).flatten(4).flatten(2, 3)[..., :height, :width]
        return out if self.bias is None else out + self.bias[:, None, None]


def replaceable(convolution: nn.Conv2d) -> bool:
    """Whether ``WinogradConv2d`` can compute this convolution."""
    c = convolution
    geometry = (c.kernel_size, c.stride, c.padding, c.dilation, c.groups, c.padding_mode)
    return geometry == ((3, 3), (1, 1), (1, 1), (1, 1), 1, 'zeros')


def use_winograd(model: nn.Module, *, min_channels: int = MIN_CHANNELS) -> None:
    """Replace, in place, the 3 x 3 convolutions of at least ``min_channels`` input and output channels.

    For inference on a CPU in float32: cuDNN chooses such algorithms itself, and bfloat16 would lose digits.
    """

    def faster(convolution: nn.Conv2d) -> nn.Module:
        wide = min(convolution.in_channels, convolution.out_channels) >= min_channels
        return WinogradConv2d(convolution) if wide and replaceable(convolution) else convolution

    replace_modules(model, nn.Conv2d, faster)
