"""DIR: decoupled iterative refinement of two interacting hands (Ren et al., ICCV 2023)."""

from torch import Tensor, nn

from manopth import HandPair
from models.backbone import ResNetBackbone
from models.hand_head import HandHead
from models.initial_regressor import InitialRegressor
from models.layers import conv_head
from models.predictions import DIROutput
from models.preprocessing import Preprocessing
from models.refinement import RefinementStage


class DenseHeads(nn.Module):
    """Auxiliary supervision: map (B, C, S, S) -> segmentation logits (B, 3, S, S), vertex colour (B, 3, S, S)."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.trunk = conv_head(in_channels, channels, channels, bias=False)
        self.segmentation = conv_head(channels, channels // 2, 3)
        self.dense = conv_head(channels, channels // 2, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.trunk(x)
        return self.segmentation(x), self.dense(x)


class NoDenseHeads(nn.Module):
    """Ablation: empty maps, of which no loss is taken."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        empty = x.new_zeros(x.shape[0], 3, 0, 0)
        return empty, empty


class DIR(nn.Module):
    """Image (B, 3, H, W), RGB, ImageNet-normalised, H = W a multiple of 32 -> DIROutput.

    ``preprocess`` makes such images of stored crops; ``hands`` is the pair that the network predicts.
    """

    def __init__(
        self,
        *,
        hands: HandPair,
        preprocess: Preprocessing,
        backbone: ResNetBackbone,
        initial_regressor: InitialRegressor,
        hand_head: HandHead,
        stages: list[RefinementStage],
        dense_heads: nn.Module,
        detach: bool = True,
    ):
        super().__init__()
        self.hands, self.preprocess = hands, preprocess
        self.backbone, self.initial_regressor, self.hand_head = backbone, initial_regressor, hand_head
        self.stages, self.dense_heads, self.detach = nn.ModuleList(stages), dense_heads, detach

    def forward(self, image: Tensor) -> DIROutput:
        *skips, x = self.backbone(image)
        hands = self.hand_head(*self.initial_regressor(x))
        estimates = [hands]
        for stage, skip in zip(self.stages, reversed(skips)):
            previous = hands.detach() if self.detach else hands  # each stage answers for its own step only
            x = stage.merge(x, skip)
            tokens = stage.interaction(stage.tokens(x, previous), previous)
            hands = self.hand_head(*stage.regress(tokens, previous))
            x = stage.enhance(x, hands, tokens)
            estimates.append(hands)
        return DIROutput(estimates, *self.dense_heads(x))
