"""One refinement stage: image features -> joint tokens -> both hands -> back to image features (paper, section 3.3)."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.bone_projection import ProjectedConvolution, drawn_norm
from models.hand_head import full_precision
from models.joint_interaction import JointInteraction
from models.layers import PerHandLinear, PerHandMLP, Residual, SharedMLP, sample_map
from models.predictions import NUM_PARAMETERS, HandPrediction
from models.recomputation import recomputable
from utils.hand import HAND_SCALE, NUM_JOINTS

TOKEN_CHANNELS = 128  # of the published network, as all defaults here
JOINT_FEATURES = 64


class SkipConnection(nn.Module):
    """Fuse a map, upsampled, with the backbone's map of twice its resolution, as a stage and the neck begin."""

    def __init__(self, previous_channels: int, skip_channels: int, *, channels: int):
        super().__init__()
        self.recomputes = False
        self.skip = Residual(skip_channels, channels)
        self.fuse_skip = Residual(previous_channels + channels, channels)

    def merge(self, previous: Tensor, skip: Tensor) -> Tensor:
        """previous (B, C, S, S), skip (B, D, 2 S, 2 S) -> (B, channels, 2 S, 2 S)."""
        up = F.interpolate(previous, scale_factor=2.0, mode='bilinear', align_corners=False)
        return self.fuse_skip(torch.cat([up, self.skip(skip)], 1))


class MapFusion(SkipConnection):
    """One level of the neck: ``merge`` alone, without an estimate."""

    @recomputable
    def forward(self, previous: Tensor, skip: Tensor) -> Tensor:
        return self.merge(previous, skip)


class RefinementStage(SkipConnection):
    """The previous map and estimate, and the backbone's map of twice the resolution -> the next map and estimate.

    Maps are (B, C, S, S), tokens (B, 2, 21, C). A variant (``STAGE_VARIANTS``) shares constructor, ``forward`` and
    ``start_at_previous``, ``drop_projection`` and ``watch_bone_features``. ``enhances`` False: the output map is the
    fused one, without the joint features drawn into it.
    """

    def __init__(
        self,
        previous_channels: int,
        skip_channels: int,
        *,
        channels: int,
        radius: float,
        tokens: int = TOKEN_CHANNELS,
        features: int = JOINT_FEATURES,
        graph: bool = True,
        graph_layers: int = 4,
        graph_skip: bool = False,
        transformer: bool = True,
        projection: str = 'bones',
        enhances: bool = True,
    ):
        super().__init__(previous_channels, skip_channels, channels=channels)
        self.sampled = PerHandMLP(channels, tokens, tokens)
        self.position = PerHandMLP(3, tokens, tokens)
        self.interaction = JointInteraction(
            tokens, features, graph=graph, transformer=transformer, graph_layers=graph_layers, graph_skip=graph_skip
        )
        self.parameters_head = PerHandLinear(NUM_JOINTS * features + NUM_PARAMETERS, NUM_PARAMETERS)
        self.offset_head = nn.Linear(2 * NUM_JOINTS * features + 3, 3)
        self.projection: ProjectedConvolution | None = None
        self.projected: SharedMLP | None = None
        self.fuse: nn.Sequential | None = None
        if enhances and projection != 'none':
            self.projection = ProjectedConvolution(features, channels, radius=radius, along=projection)
            self.projected = SharedMLP(features, features, features)
            self.fuse = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 1))
        # Registered last: initial weights are drawn in the order of registration.
        self.enhance_map: nn.Module = nn.Identity()
        if enhances:
            self.enhance_map = Residual((1 if projection == 'none' else 2) * channels, channels)

    @recomputable
    def forward(
        self, x: Tensor, skip: Tensor, previous: HandPrediction, hand_head: Callable[[Tensor, Tensor], HandPrediction]
    ) -> tuple[Tensor, HandPrediction]:
        """x (B, C, S, S), skip (B, D, 2 S, 2 S) -> map (B, channels, 2 S, 2 S), estimate.

        hand_head: parameters (B, 2, 64), offset (B, 3) -> HandPrediction.
        """
        x = self.merge(x, skip)
        tokens = self.interaction(self.tokens(x, previous), previous)
        hands = hand_head(*self.regress(tokens, previous))
        return self.enhance(x, hands, tokens), hands

    def tokens(self, x: Tensor, hands: HandPrediction) -> Tensor:
        """Image features sampled at the estimated joints, plus an embedding of the joints' 3D positions."""
        # The paper stops the gradient through the sampling positions: it is noisy.
        seen = sample_map(x, hands.joints_uv.detach())
        return self.sampled(seen) + self.position(hands.joints / HAND_SCALE)

    def regress(self, tokens: Tensor, previous: HandPrediction) -> tuple[Tensor, Tensor]:
        """-> new parameters (B, 2, 64), offset (B, 3): not residuals, but the previous ones are among the inputs."""
        with full_precision(tokens.device.type):  # bfloat16 would round the previous estimate to 8 bits
            tokens = tokens.to(previous.parameters.dtype)
            parameters = self.parameters_head(torch.cat([tokens.flatten(2), previous.parameters], -1))
            return parameters, self.offset_head(torch.cat([tokens.flatten(1), previous.offset], -1))

    def enhance(self, x: Tensor, hands: HandPrediction, tokens: Tensor) -> Tensor:
        """Draw the refined joint features into the map along the *new* bones, with gradient into the new estimate."""
        if self.projection is None or self.projected is None or self.fuse is None:
            return self.enhance_map(x)
        projected = self.projection(hands.joints_uv, self.projected(tokens), size=x.shape[-1])
        return self.enhance_map(torch.cat([x, self.fuse(projected)], 1))

    @torch.no_grad()
    def start_at_previous(self) -> None:
        """Initialise the regressors so that the stage's estimate is about the previous one."""
        for head in (self.parameters_head, self.offset_head):
            nn.init.normal_(head.weight, std=0.001)
            outputs = head.weight.shape[-2]
            head.weight[..., -outputs:] += torch.eye(outputs)  # the previous estimate is the tail of the input
            nn.init.zeros_(head.bias)

    def drop_projection(self) -> None:
        """Remove what computes the output map; ``forward`` then returns the fused input map in its place."""
        self.projection = self.projected = self.fuse = None
        self.enhance_map = nn.Identity()

    def watch_bone_features(self, callback: Callable[[Tensor], object]) -> AbstractContextManager:
        """Within this context, pass each forward's norm of the drawn joint features, (B, S, S), to ``callback``.

        The callback is never called for a stage without projection.
        """
        if self.projection is None:
            return nullcontext()

        def report(module: ProjectedConvolution, args: tuple, kwargs: dict, output: Tensor) -> None:
            callback(drawn_norm(*module.factors(*args, **kwargs)))

        return self.projection.register_forward_hook(report, with_kwargs=True)


# MODEL.STAGE_VARIANT -> the class of the refinement stages.
STAGE_VARIANTS: dict[str, type[RefinementStage]] = {'dir': RefinementStage}
