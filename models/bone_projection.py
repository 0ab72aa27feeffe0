"""From joint space back to image space: joint features drawn along the projected bones (paper, section 3.3).

Every bone has its own channels, so that overlapping hands never mix: 2 hands x 20 bones x 64 features = 2,560 channels,
nearly all zero. A bone's map is the sum of two weight maps (parent, child), each times a feature vector; so a
convolution over it equals a convolution of the weight maps with kernels contracted with the features.
``ProjectedConvolution`` computes that, with a thirtieth of the operations and without the 2,560-channel map. ``draw``
defines that map, for tests.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.geometry import bone_ends
from utils.hand import BONES, NUM_JOINTS


def cell_centres(size: int, like: Tensor) -> Tensor:
    """Centres (i + 0.5) of the cells of a size x size map: (S, S, 2), (right, down), in cells."""
    steps = torch.arange(size, dtype=like.dtype, device=like.device) + 0.5
    down, right = torch.meshgrid(steps, steps, indexing='ij')
    return torch.stack([right, down], -1)


def bone_weights(joints_uv: Tensor, *, size: int, radius: float) -> Tensor:
    """Weights of each bone's parent and child features in each cell.

    joints_uv (B, 2, 21, 2) in [-1, 1] -> (B, 2, 20, 2, S, S). With p, c the ends in cells and g a cell's centre:
    parent |g - c| / (|g - p| + |g - c|), child |g - p| / (...), for cells closer than ``radius`` cells to the segment,
    else 0. A bone of zero length contributes nothing. Differentiable but for the mask.
    """
    ends = bone_ends(joints_uv * (size / 2) + size / 2)  # (B, 2, 20, 2, 2) cells
    to_end = cell_centres(size, ends) - ends[..., None, None, :]  # (B, 2, 20, 2, S, S, 2)
    distance = torch.linalg.vector_norm(to_end, dim=-1)
    total = distance.sum(3, keepdim=True)
    with torch.no_grad():
        bone = (ends[..., 1, :] - ends[..., 0, :])[..., None, None, :]
        length_squared = (bone * bone).sum(-1)
        along = ((to_end[:, :, :, 0] * bone).sum(-1) / length_squared.clamp_min(1e-12)).clamp(0, 1)
        beside = torch.linalg.vector_norm(torch.addcmul(to_end[:, :, :, 0], along[..., None], bone, value=-1), dim=-1)
        outside = ~((beside < radius) & (length_squared > 0))
    return distance.flip(3) / total.masked_fill(outside[:, :, :, None], math.inf)


def joint_weights(joints_uv: Tensor, *, size: int, radius: float) -> Tensor:
    """Weights of discs at the joints instead of bones (ablation): joints_uv (B, 2, 21, 2) -> (B, 2, 21, 1, S, S).

    1 at the joint, falling linearly to 0 at ``radius`` + 1 cells.
    """
    centres = (joints_uv * (size / 2) + size / 2)[..., None, None, :]
    distance = torch.linalg.vector_norm(cell_centres(size, centres) - centres, dim=-1)
    return (1 - distance / (radius + 1)).clamp_min(0)[:, :, :, None]


def draw(weights: Tensor, features: Tensor) -> Tensor:
    """The projected map: weights (B, 2, N, E, S, S), features (B, 2, N, E, C) -> (B, 2 * N * C, S, S).

    Channel = hand * N * C + bone * C + c.
    """
    return torch.einsum('bhnexy,bhnec->bhncxy', weights, features).flatten(1, 3)


def drawn_norm(weights: Tensor, features: Tensor) -> Tensor:
    """Norm over the channels of ``draw``'s map, (B, S, S), without computing that map.

    Bones do not share channels, so their squared norms add up; with w a bone's weights in a cell and F the features of
    its ends, each is |w F|^2 = w F F^T w^T.
    """
    products = features @ features.transpose(-1, -2)  # (B, 2, N, E, E) F F^T
    squared = torch.einsum('bhnexy,bhnfxy,bhnef->bxy', weights, weights, products)
    return squared.clamp_min(0).sqrt()  # rounding may leave a cell just below 0


class ProjectedConvolution(nn.Module):
    """3 x 3 convolution over the joint features drawn along the bones, without drawing them.

    tokens (B, 2, 21, a), joints_uv (B, 2, 21, 2) -> (B, b, S, S). ``along`` is 'bones' or 'joints' (ablation).
    """

    ends: Tensor

    def __init__(self, a: int, b: int, *, radius: float, along: str = 'bones'):
        super().__init__()
        self.radius, self.along = radius, along
        ends = torch.tensor(BONES) if along == 'bones' else torch.arange(NUM_JOINTS)[:, None]
        self.register_buffer('ends', ends, persistent=False)  # (N, E) joint of each end
        # As a plain Conv2d's weight it would be (b, 2 * N * a, 3, 3): see ``as_conv_weight``.
        self.weight = nn.Parameter(torch.empty(2, len(ends), a, b, 3, 3))
        self.bias = nn.Parameter(torch.zeros(b))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, sqrt(2 / (9 b))), as for an nn.Conv2d of the network; no bias."""
        nn.init.normal_(self.weight, std=(2 / (9 * self.weight.shape[3])) ** 0.5)
        nn.init.zeros_(self.bias)

    def forward(self, joints_uv: Tensor, tokens: Tensor, *, size: int) -> Tensor:
        weights, features = self.factors(joints_uv, tokens, size=size)
        batch, hands, drawn, ends, _ = features.shape
        out = self.weight.shape[3]
        kernels = torch.bmm(
            features.permute(1, 2, 0, 3, 4).reshape(hands * drawn, batch * ends, -1),
            self.weight.flatten(0, 1).flatten(2),
        )  # (2 N, B E, b 9)
        kernels = kernels.view(hands * drawn, batch, ends, out, 9).permute(1, 3, 0, 2, 4).reshape(batch, out, -1)
        patches = F.unfold(weights.flatten(1, 3), 3, padding=1)  # (B, 2 N E 9, S S)
        return torch.baddbmm(self.bias[:, None], kernels, patches).view(batch, out, size, size)

    def factors(self, joints_uv: Tensor, tokens: Tensor, *, size: int) -> tuple[Tensor, Tensor]:
        """Arguments of ``draw``: weights (B, 2, N, E, S, S), features (B, 2, N, E, a)."""
        draw_weights = bone_weights if self.along == 'bones' else joint_weights
        weights = draw_weights(joints_uv, size=size, radius=self.radius).to(tokens.dtype)
        return weights, tokens[:, :, self.ends]

    @staticmethod
    def as_conv_weight(weight: Tensor) -> Tensor:
        """(2, N, a, b, 3, 3) -> the weight (b, 2 * N * a, 3, 3) of the Conv2d over ``draw``'s map."""
        return weight.flatten(0, 2).transpose(0, 1)

    @staticmethod
    def from_conv_weight(weight: Tensor, features: int) -> Tensor:
        """Inverse of ``as_conv_weight``; ``features`` is a."""
        return weight.transpose(0, 1).unflatten(0, (2, -1, features))
