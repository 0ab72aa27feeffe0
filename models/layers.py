"""Layers shared by several parts of the network."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Sequential):
    """Pre-activation bottleneck, (B, a, S, S) -> (B, b, S, S); the skip is a 1 x 1 convolution where a != b."""

    def __init__(self, a: int, b: int):
        super().__init__(
            nn.BatchNorm2d(a),
            nn.ReLU(inplace=True),
            nn.Conv2d(a, b // 2, 1),
            nn.BatchNorm2d(b // 2),
            nn.ReLU(inplace=True),
            nn.Conv2d(b // 2, b // 2, 3, padding=1),
            nn.BatchNorm2d(b // 2),
            nn.ReLU(inplace=True),
            nn.Conv2d(b // 2, b, 1),
        )
        self.skip = nn.Conv2d(a, b, 1) if a != b else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for name, module in self.named_children():
            if name != 'skip':
                y = module(y)
        return self.skip(x) + y


def conv_head(a: int, hidden: int, b: int, *, bias: bool = True) -> nn.Sequential:
    """Conv3x3(a -> hidden) BN ReLU Conv1x1(hidden -> b)."""
    return nn.Sequential(
        nn.Conv2d(a, hidden, 3, padding=1, bias=bias),
        nn.BatchNorm2d(hidden),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, b, 1),
    )


def sample_map(x: Tensor, uv: Tensor) -> Tensor:
    """Bilinear samples of a map (B, C, S, S) at uv (B, 2, J, 2) in [-1, 1] -> (B, 2, J, C); zeros outside.

    In the precision of uv: bfloat16 cannot resolve a tenth of a cell.
    """
    where = uv.flatten(1, 2)[:, :, None]  # (B, 2 * J, 1, 2)
    seen = F.grid_sample(x.to(where.dtype), where, mode='bilinear', padding_mode='zeros', align_corners=False)
    return seen.squeeze(-1).transpose(1, 2).unflatten(1, uv.shape[1:3])


class PerHandLinear(nn.Module):
    """A linear layer with separate weights for each hand: (B, 2, a) -> (B, 2, b)."""

    def __init__(self, a: int, b: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, b, a))
        self.bias = nn.Parameter(torch.empty(2, b))
        bound = 1 / math.sqrt(a)  # nn.Linear's default
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias[..., None], self.weight, x.permute(1, 2, 0)).permute(2, 0, 1)


class PerHandMLP(nn.Sequential):
    """Linear BN ReLU Linear on joint tokens, weights and statistics per hand: (B, 2, J, a) -> (B, 2, J, b).

    Implemented as grouped convolutions with the hand axis folded into the channels.
    """

    def __init__(self, a: int, hidden: int, b: int):
        super().__init__(
            nn.Conv1d(2 * a, 2 * hidden, 1, groups=2),
            nn.BatchNorm1d(2 * hidden),
            nn.ReLU(inplace=True),
            nn.Conv1d(2 * hidden, 2 * b, 1, groups=2),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return unfold_hands(super().forward(fold_hands(tokens)))


class SharedMLP(nn.Sequential):
    """Linear BN ReLU Linear on joint tokens, one set of weights for both hands: (B, 2, J, a) -> (B, 2, J, b).

    In training, the batch norm runs on the left hand, then on the right: each is normalised by its own batch
    statistics, and the running ones are updated twice a step. All else sees both hands at once.
    """

    def __init__(self, a: int, hidden: int, b: int):
        super().__init__(
            nn.Conv1d(a, hidden, 1), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Conv1d(hidden, b, 1)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        first, norm, activation, last = self
        x = first(tokens.permute(1, 0, 3, 2).flatten(0, 1))  # (2 B, hidden, J)
        x = torch.cat([norm(hand) for hand in x.chunk(2)]) if self.training else norm(x)
        return last(activation(x)).unflatten(0, (2, -1)).permute(1, 0, 3, 2)


def fold_hands(tokens: Tensor) -> Tensor:
    """Move the hand axis into the channels: (B, 2, J, C) -> (B, 2 * C, J)."""
    return tokens.transpose(2, 3).flatten(1, 2)


def unfold_hands(channels: Tensor) -> Tensor:
    """Inverse of ``fold_hands``: (B, 2 * C, J) -> (B, 2, J, C)."""
    return channels.unflatten(1, (2, -1)).transpose(2, 3)
