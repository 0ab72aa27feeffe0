"""Stage 0: a first estimate of both hands from the coarsest map, by attention pooling per hand (paper, section 3.2)."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from models.layers import PerHandLinear
from models.predictions import NUM_PARAMETERS


class InitialRegressor(nn.Module):
    """c4 (B, C, S, S) -> hand parameters (B, 2, 64), offset (B, 3).

    attention_channels: hidden channels of each hand's attention; None for half of c4's.
    """

    def __init__(self, channels: int, *, attention_channels: int | None = None):
        super().__init__()
        hidden = attention_channels or channels // 2
        # Both hands in one convolution: the first half of the hidden channels is the left hand's.
        self.attention = nn.Sequential(
            nn.Conv2d(channels, 2 * hidden, 3, padding=1),
            nn.BatchNorm2d(2 * hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(2 * hidden, 2, 1, groups=2),
            nn.Sigmoid(),
        )
        self.parameters_head = PerHandLinear(channels, NUM_PARAMETERS)
        self.offset_head = nn.Linear(channels, 3)

    def forward(self, c4: Tensor) -> tuple[Tensor, Tensor]:
        attention = self.attention(c4).flatten(2)  # (B, 2, S * S)
        pooled = torch.einsum('bhs,bcs->bhc', attention, c4.flatten(2)) / (attention.sum(-1, keepdim=True) + 1e-8)
        return self.parameters_head(pooled), self.offset_head(c4.mean((2, 3)))

    @torch.no_grad()
    def start_at(self, parameters: Tensor) -> None:
        """Initialise the regressors so that the first estimate is about ``parameters`` (64,) for both hands and a
        zero offset."""
        for head, bias in ((self.parameters_head, parameters), (self.offset_head, torch.zeros(3))):
            nn.init.normal_(head.weight, std=0.001)
            head.bias.copy_(bias.expand_as(head.bias))

    def watch_attention(self, callback: Callable[[Tensor], object]) -> AbstractContextManager:
        """Within this context, pass each forward's attention, (B, 2, S, S) in [0, 1], to ``callback``."""
        return self.attention.register_forward_hook(lambda module, args, output: callback(output))
