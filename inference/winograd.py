"""A 3 x 3 convolution with 2.25 times fewer products (Lavin and Gray, "Fast Algorithms for Convolutional Neural
Networks", 2016, F(2 x 2, 3 x 3)): tiles of 4 x 4 inputs and the kernels are transformed, multiplied point by point, and
transformed back into tiles of 2 x 2 outputs. The same function, to rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORTH_IT = 256  # positions of a batch's maps: with 2,048 channels the transformation costs as much as 128 of them save
# Of one axis: B^T input tile, G kernel, A^T output tile; for two axes their Kronecker squares.
_INPUT = torch.tensor([[1.0, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
_KERNEL = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_OUTPUT = torch.tensor([[1.0, 1, 1, 0], [0, 1, -1, -1]])
_INPUT, _KERNEL, _OUTPUT = (torch.kron(one, one) for one in (_INPUT, _KERNEL, _OUTPUT))  # (16, 16), (16, 9), (4, 16)


class Conv2dFewProducts(nn.Conv2d):
    """A drop-in 3 x 3 convolution, padding 1, for many channels on a small map.

    There a CPU spends its time on products, and its library does not save them; CUDA's does by itself. So this way is
    taken only on a CPU, in full precision, on maps of even size, for batches that are worth the transformation of the
    kernels; else, and in traced graphs, it is ``nn.Conv2d``.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.kept = None

    def keep_kernels(self) -> None:
        """Transform the kernels once: for 16/9 of the weights' memory any batch without gradients is worth it."""
        self.kept = _transformed_kernels(self.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        kept = None if torch.is_grad_enabled() else self.kept
        plain = (
            torch.compiler.is_compiling()
            or x.device.type != 'cpu'
            or torch.is_autocast_enabled('cpu')
            or height % 2
            or width % 2
            or (kept is None and batch * height * width < WORTH_IT)
        )
        if plain:
            return super().forward(x)
        if kept is not None:
            return _convolve(x, kept, self.bias)
        return _Winograd.apply(x, self.weight, self.bias)


class _Winograd(torch.autograd.Function):
    """Transformed kernels are 16/9 of the weights: they are made again for the backward pass instead of kept."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, _transformed_kernels(weight), bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        batch, channels, height, width = x.shape
        of_tiles = gradient.reshape(batch, -1, height // 2, 2, width // 2, 2).permute(3, 5, 1, 0, 2, 4)
        of_products = (_OUTPUT.T.to(x) @ of_tiles.reshape(4, -1)).view(16, len(weight), -1)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_tiles = torch.bmm(_transformed_kernels(weight).transpose(1, 2), of_products)  # (16, in, B tiles)
            of_tiles = (_INPUT.T.to(x) @ of_tiles.flatten(1)).view(16, channels, batch, -1).permute(2, 1, 0, 3)
            of_x = F.fold(of_tiles.reshape(batch, channels * 16, -1), (height, width), 4, padding=1, stride=2)
        if ctx.needs_input_grad[1]:
            of_kernels = torch.bmm(of_products, _transformed_tiles(x).transpose(1, 2))
            of_weight = _KERNEL.T.to(x) @ of_kernels.flatten(1)
            of_weight = of_weight.view(3, 3, *weight.shape[:2]).permute(2, 3, 0, 1).contiguous()
        return of_x, of_weight, gradient.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None


def keep_kernels(model: nn.Module) -> None:
    """``Conv2dFewProducts.keep_kernels`` wherever there is one: for a network whose weights no longer change."""
    for module in model.modules():
        if isinstance(module, Conv2dFewProducts):
            module.keep_kernels()


def _convolve(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    """x (B, in, H, W), transformed kernels (16, out, in) -> (B, out, H, W)"""
    batch, _, height, width = x.shape
    products = torch.bmm(kernels, _transformed_tiles(x))  # (16, out, B tiles)
    out = _OUTPUT.to(x) @ products.flatten(1)
    out = out.view(2, 2, kernels.shape[1], batch, height // 2, width // 2)
    return out.permute(3, 2, 4, 0, 5, 1).reshape(batch, -1, height, width) + bias[:, None, None]


def _transformed_kernels(weight: Tensor) -> Tensor:
    """(out, in, 3, 3) -> (16, out, in)"""
    by_place = weight.flatten(2).permute(2, 0, 1).flatten(1)
    return (_KERNEL.to(weight) @ by_place).view(16, *weight.shape[:2])


def _transformed_tiles(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (16, C, B * tiles)"""
    tiles = F.unfold(x, 4, padding=1, stride=2).unflatten(1, (x.shape[1], 16)).permute(2, 1, 0, 3)
    return (_INPUT.to(x) @ tiles.reshape(16, -1)).view(16, x.shape[1], -1)
