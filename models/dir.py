"""DIR: decoupled iterative refinement of two interacting hands.

Ren et al., "Decoupled Iterative Refinement Framework for Interacting Hands Reconstruction from a Single RGB Image",
ICCV 2023; "the paper" in this package.
"""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from manopth import HandPair
from models.backbone import Backbone
from models.batch_counting import BatchCounters
from models.confidence import ConfidenceHead, PresenceHead
from models.hand_head import HandHead
from models.initial_regressor import InitialRegressor
from models.layers import conv_head
from models.predictions import DIROutput
from models.preprocessing import Preprocessing
from models.recomputation import recomputable
from models.refinement import MapFusion, RefinementStage


class DenseHeads(nn.Module):
    """Auxiliary supervision: map (B, C, S, S) -> segmentation logits (B, 3, S, S), vertex colour (B, 3, S, S)."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.recomputes = False
        self.trunk = conv_head(in_channels, channels, channels, bias=False)
        self.segmentation = conv_head(channels, channels // 2, 3)
        self.dense = conv_head(channels, channels // 2, 3)

    @recomputable
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.trunk(x)
        return self.segmentation(x), self.dense(x)


class DIR(nn.Module):
    """Image (B, 3, H, W), RGB, ImageNet-normalised, H = W a multiple of 32 -> DIROutput.

    preprocess: stored crops -> such images. hands: the pair that the network predicts. neck: fuses the coarsest map
    with finer ones, one level after the other, before the first stage.
    dense_heads: None trains the hands alone (ablation). presence_head, confidence_head: None, as published, assumes
    that both hands are in the image and judges no joint. detach: no gradient flows from a stage into the previous
    estimate.
    """

    preprocess: Preprocessing
    hand_head: HandHead

    def __init__(
        self,
        *,
        hands: HandPair,
        preprocess: Preprocessing,
        backbone: Backbone,
        initial_regressor: InitialRegressor,
        hand_head: HandHead,
        stages: Sequence[RefinementStage],
        neck: Sequence[MapFusion] = (),
        dense_heads: DenseHeads | None,
        presence_head: PresenceHead | None = None,
        confidence_head: ConfidenceHead | None = None,
        detach: bool = True,
    ):
        super().__init__()
        self.hands, self.preprocess = hands, preprocess
        self.backbone, self.initial_regressor, self.hand_head = backbone, initial_regressor, hand_head
        self.neck = cast(Sequence[MapFusion], nn.ModuleList(neck))
        self.stages = cast(Sequence[RefinementStage], nn.ModuleList(stages))
        self.dense_heads, self.detach = dense_heads, detach
        self.presence_head, self.confidence_head = presence_head, confidence_head
        self.batch_counters = BatchCounters(self)

    def train(self, mode: bool = True) -> 'DIR':
        super().train(mode)
        self.batch_counters = BatchCounters(self)  # batch norms may have been replaced by synchronised ones
        return self

    def forward(self, image: Tensor) -> DIROutput:
        if self.training:
            self.batch_counters.count()
        *skips, x = self.backbone(image)
        estimates = [self.hand_head(*self.initial_regressor(x))]
        finer = reversed(skips)
        for fusion in self.neck:
            x = fusion(x, next(finer))
        for stage, skip in zip(self.stages, finer):
            previous = estimates[-1].detach() if self.detach else estimates[-1]
            x, hands = stage(x, skip, previous, self.hand_head)
            estimates.append(hands)
        segmentation, dense = (None, None) if self.dense_heads is None else self.dense_heads(x)
        presence = None if self.presence_head is None else self.presence_head(x)
        confidence = None if self.confidence_head is None else self.confidence_head(x, estimates[-1])
        return DIROutput(estimates, segmentation=segmentation, dense=dense, presence=presence, confidence=confidence)

    def recompute_activations(self) -> None:
        """Keep little for the backward pass and recompute the rest there: less memory, a quarter more time."""
        for block in (self.backbone, *self.neck, *self.stages, self.dense_heads):
            if block is not None:
                block.recomputes = True

    def recompute_norms(self) -> None:
        """Recompute the backbone's batch norms and activations in the backward pass, instead of keeping them."""
        self.backbone.recomputes_norms = True

    def drop_auxiliary(self) -> None:
        """Remove everything that the last estimate, presence and confidence do not depend on."""
        self.dense_heads = None
        if self.stages and self.presence_head is None and self.confidence_head is None:
            self.stages[-1].drop_projection()
