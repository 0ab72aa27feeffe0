"""Which hands are in the image, which joints are visible, and how far each joint may be off (optional heads)."""

import math

import torch
from torch import Tensor, nn

from models.hand_head import full_precision
from models.layers import PerHandMLP, conv_head, sample_map
from models.predictions import HandPrediction, JointConfidence
from utils.hand import HAND_SCALE

SMALLEST_DEVIATION, LARGEST_DEVIATION = 5e-4, 0.5  # m
_TYPICAL_DEVIATION = 0.01  # m, at the start


class PresenceHead(nn.Module):
    """Map (B, C, S, S) -> presence logits (B, 2): a hand is in the image if some cell shows it.

    Each cell has a logit per hand; their smooth maximum, log(mean(exp)), is the hand's.
    """

    def __init__(self, in_channels: int):
        super().__init__()
        self.evidence = conv_head(in_channels, max(in_channels // 2, 2), 2)
        for parameter in self.evidence[-1].parameters():
            nn.init.zeros_(parameter)  # undecided

    def forward(self, x: Tensor) -> Tensor:
        cells = self.evidence(x).flatten(2).float()
        return cells.logsumexp(-1) - math.log(cells.shape[-1])


class ConfidenceHead(nn.Module):
    """Map (B, C, S, S) and the last estimate -> JointConfidence.

    A joint is judged by the map where it was estimated, by the mean of the map and by the estimated hand, which enters
    without gradient.
    """

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.judge = PerHandMLP(2 * in_channels + 3, channels, 2)

    def forward(self, x: Tensor, hands: HandPrediction) -> JointConfidence:
        hands = hands.detach()
        seen = sample_map(x, hands.joints_uv)
        mean = x.mean((2, 3))[:, None, None].expand_as(seen)
        judged = self.judge(torch.cat([seen, mean.to(seen.dtype), hands.joints / HAND_SCALE], -1))
        with full_precision(x.device.type):
            visible, deviation = judged.to(hands.joints.dtype).unbind(-1)
            deviation = _TYPICAL_DEVIATION * deviation.exp()
            return JointConfidence(visible, deviation.clamp(SMALLEST_DEVIATION, LARGEST_DEVIATION))
