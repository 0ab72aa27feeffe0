"""One refinement stage: image features -> joint tokens -> both hands -> back to image features (paper, section 3.3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.bone_projection import ProjectedConvolution
from models.joint_interaction import JointInteraction
from models.layers import PerHandLinear, PerHandMLP, Residual, SharedMLP
from models.predictions import NUM_PARAMETERS, HandPrediction
from utils.hand import HAND_SCALE, NUM_JOINTS

TOKEN_CHANNELS = 128
JOINT_FEATURES = 64


class RefinementStage(nn.Module):
    """The parts of a stage; DIR.forward puts them in order. Maps are (B, C, S, S), tokens (B, 2, 21, C)."""

    def __init__(
        self,
        previous_channels: int,
        skip_channels: int,
        *,
        channels: int,
        radius: float,
        graph: bool = True,
        transformer: bool = True,
        projection: str = 'bones',
    ):
        super().__init__()
        self.skip = Residual(skip_channels, channels)
        self.fuse_skip = Residual(previous_channels + channels, channels)
        self.sampled = PerHandMLP(channels, TOKEN_CHANNELS, TOKEN_CHANNELS)
        self.position = PerHandMLP(3, TOKEN_CHANNELS, TOKEN_CHANNELS)
        self.interaction = JointInteraction(TOKEN_CHANNELS, JOINT_FEATURES, graph=graph, transformer=transformer)
        self.parameters_head = PerHandLinear(NUM_JOINTS * JOINT_FEATURES + NUM_PARAMETERS, NUM_PARAMETERS)
        self.offset_head = nn.Linear(2 * NUM_JOINTS * JOINT_FEATURES + 3, 3)
        self.projection = None
        if projection != 'none':
            self.projection = ProjectedConvolution(JOINT_FEATURES, channels, radius=radius, along=projection)
            self.projected = SharedMLP(JOINT_FEATURES, JOINT_FEATURES, JOINT_FEATURES)
            self.fuse = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 1))
        self.enhance_map = Residual((1 if projection == 'none' else 2) * channels, channels)

    def merge(self, previous: Tensor, skip: Tensor) -> Tensor:
        """The coarser map, upsampled, with the backbone's map of this resolution."""
        up = F.interpolate(previous, scale_factor=2.0, mode='bilinear', align_corners=False)
        return self.fuse_skip(torch.cat([up, self.skip(skip)], 1))

    def tokens(self, x: Tensor, hands: HandPrediction) -> Tensor:
        """Image features where the joints were last seen, plus where those joints are in 3D."""
        # Where to look is not learned through the look-up: sampling gradients are noisy and the paper stops them.
        where = hands.joints_uv.detach().flatten(1, 2)[:, :, None]  # (B, 42, 1, 2)
        # In the hands' precision: bfloat16 could not tell places a tenth of a cell apart.
        seen = F.grid_sample(x.to(where.dtype), where, mode='bilinear', padding_mode='zeros', align_corners=False)
        seen = seen.squeeze(-1).transpose(1, 2).unflatten(1, (2, NUM_JOINTS))
        return self.sampled(seen) + self.position(hands.joints / HAND_SCALE)

    def regress(self, tokens: Tensor, previous: HandPrediction) -> tuple[Tensor, Tensor]:
        """-> new parameters (B, 2, 64) and offset (B, 3); not residuals, but the previous ones are among the inputs."""
        parameters = self.parameters_head(torch.cat([tokens.flatten(2), previous.parameters], -1))
        return parameters, self.offset_head(torch.cat([tokens.flatten(1), previous.offset], -1))

    def enhance(self, x: Tensor, hands: HandPrediction, tokens: Tensor) -> Tensor:
        """Draw the refined joint features into the map along the *new* bones, with gradient into the new estimate."""
        if self.projection is None:
            return self.enhance_map(x)
        projected = self.projection(hands.joints_uv, self.projected(tokens), size=x.shape[-1])
        return self.enhance_map(torch.cat([x, self.fuse(projected)], 1))
