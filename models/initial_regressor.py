"""Stage 0: a first estimate of both hands from the coarsest map, by attention pooling per hand (paper, section 3.2)."""

import torch
from torch import Tensor, nn

from models.layers import PerHandLinear
from models.predictions import NUM_PARAMETERS


class InitialRegressor(nn.Module):
    """c4 (B, C, S, S) -> hand parameters (B, 2, 64), offset (B, 3)."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = channels // 2
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
