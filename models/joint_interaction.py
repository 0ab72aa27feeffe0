"""The 3D joint space: tokens interact along each hand's skeleton, then across the hands (paper, section 3.3)."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import SharedMLP, fold_hands, unfold_hands
from models.predictions import HandPrediction
from utils.hand import BONES, HAND_SCALE, NUM_JOINTS


class SkeletonGraphLayer(nn.Module):
    """Graph layer with separate matrices for every joint of every hand: (B, 2, J, a) -> (B, 2, J, b).

    out = x W_self + softmax(A) (x W_neighbour) + bias, BN, ReLU; A holds one learned logit per directed bone. (The
    published layer also learns a logit per joint for the self term, which a softmax over one entry ignores.) ``skip``
    adds the input to the output. Call ``reset_parameters`` before training.
    """

    edges: Tensor

    def __init__(self, a: int, b: int, *, skip: bool = False):
        super().__init__()
        self.out_features, self.skip = b, skip
        # W_self and W_neighbour side by side, for one product.
        self.weight = nn.Parameter(torch.zeros(2, NUM_JOINTS, a, 2 * b))
        self.bias = nn.Parameter(torch.zeros(2, b))
        self.neighbour_logits = nn.Parameter(torch.ones(2, 2 * len(BONES)))
        self.norm = nn.BatchNorm1d(2 * b)
        edges = torch.tensor(sorted([(p, c) for p, c in BONES] + [(c, p) for p, c in BONES]))  # row-major non-zeros
        self.register_buffer('edges', edges.T.contiguous(), persistent=False)

    def reset_parameters(self) -> None:
        """Xavier-uniform per matrix with gain 1.414, equal neighbours."""
        fan_in, fan_out = self.weight.shape[2], self.out_features
        bound = 1.414 * (6 / (fan_in + fan_out)) ** 0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.ones_(self.neighbour_logits)

    def neighbour_weights(self, logits: Tensor | None = None) -> Tensor:
        """(..., 2, J, J): row i holds the weights of joint i's neighbours; rows sum to 1.

        logits (..., 2, edges): of several layers at once; None for this layer's.
        """
        logits = self.neighbour_logits if logits is None else logits
        scores = logits.new_full((*logits.shape[:-1], NUM_JOINTS, NUM_JOINTS), -9e15)
        scores[..., self.edges[0], self.edges[1]] = logits
        return scores.softmax(-1)

    def forward(self, tokens: Tensor, neighbours: Tensor | None = None) -> Tensor:
        """neighbours (2, J, J): ``neighbour_weights``; None to compute them."""
        neighbours = self.neighbour_weights() if neighbours is None else neighbours
        batch = tokens.shape[0]  # not len(tokens), which torch.export would make a constant
        by_joint = tokens.permute(1, 2, 0, 3).flatten(0, 1)  # (2 J, B, a)
        both = torch.bmm(by_joint, self.weight.flatten(0, 1)).view(2, NUM_JOINTS, batch, 2, self.out_features)
        own, around = both.permute(3, 0, 1, 2, 4).flatten(3).unbind()  # (2, J, B b)
        mixed = torch.baddbmm(own, neighbours, around).view(2, NUM_JOINTS, batch, self.out_features)
        mixed = mixed.permute(2, 0, 1, 3) + self.bias[:, None]
        mixed = F.relu(unfold_hands(self.norm(fold_hands(mixed))))
        return tokens + mixed if self.skip else mixed


class SkeletonGraph(nn.Sequential):
    """Graph layers, one after the other; all their neighbour weights are computed at once."""

    def forward(self, tokens: Tensor) -> Tensor:
        layers = cast(list[SkeletonGraphLayer], list(self))
        if layers:
            logits = torch.stack([layer.neighbour_logits for layer in layers])
            for layer, neighbours in zip(layers, layers[0].neighbour_weights(logits).unbind()):
                tokens = layer(tokens, neighbours)
        return tokens


class TransformerBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), x + mlp(norm(x)); exact GELU, no dropout."""

    def __init__(self, channels: int, *, heads: int = 4, mlp_ratio: int = 2):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(channels, mlp_ratio * channels), nn.GELU(), nn.Linear(mlp_ratio * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class CrossHandTransformer(nn.Module):
    """All 42 tokens attend to each other: (B, 2, J, C) -> (B, 2, J, C). The same norm follows every block."""

    def __init__(self, channels: int, *, blocks: int = 3):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(2, NUM_JOINTS, channels))
        self.blocks = nn.ModuleList(TransformerBlock(channels) for _ in range(blocks))
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def reset_parameters(self) -> None:
        """Zero the position embedding."""
        nn.init.zeros_(self.position)

    def forward(self, tokens: Tensor) -> Tensor:
        x = (tokens + self.position).flatten(1, 2)
        for block in self.blocks:
            x = self.norm(block(x))
        return x.view_as(tokens)


class JointInteraction(nn.Module):
    """Graph layers within each hand, position in the common frame, transformer across: (B, 2, J, a) -> (B, 2, J, b).

    ``graph`` and ``transformer`` switch these parts on (ablations). ``graph_skip``: of each graph layer.
    """

    def __init__(
        self,
        a: int,
        b: int,
        *,
        graph: bool = True,
        transformer: bool = True,
        graph_layers: int = 4,
        graph_skip: bool = False,
    ):
        super().__init__()
        layers = graph_layers if graph else 0
        self.graph = SkeletonGraph(*[SkeletonGraphLayer(a, a, skip=graph_skip) for _ in range(layers)])
        self.global_position = SharedMLP(3, a, a)
        self.transformer = CrossHandTransformer(a) if transformer else nn.Identity()
        self.head = nn.Sequential(nn.LayerNorm(a), nn.Linear(a, b))

    def forward(self, tokens: Tensor, hands: HandPrediction) -> Tensor:
        tokens = self.graph(tokens) + self.global_position(common_frame_joints(hands))
        return self.head(self.transformer(tokens))


def common_frame_joints(hands: HandPrediction) -> Tensor:
    """Joints (B, 2, J, 3) in HAND_SCALE about the midpoint of the roots: left - offset / 2, right + offset / 2."""
    joints, offset = hands.joints / HAND_SCALE, hands.offset
    sides = torch.linspace(-0.5, 0.5, 2, dtype=offset.dtype, device=offset.device)
    return torch.addcmul(joints, offset[:, None, None], sides[:, None, None])
