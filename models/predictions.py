"""Named predictions and targets of the network."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

# The 64 parameters of a hand, in this order.
ROOT_ROTATION = slice(0, 6)  # symmetric 6D
POSE = slice(6, 51)  # PCA coefficients
SHAPE = slice(51, 61)  # MANO betas
CAMERA = slice(61, 64)  # weak perspective: scale, then translation (right, down)
NUM_PARAMETERS = 64
PARAMETER_SIZES = tuple(part.stop - part.start for part in (ROOT_ROTATION, POSE, SHAPE, CAMERA))


class HandPrediction(NamedTuple):
    """One stage's estimate of both hands; root-relative means relative to each hand's own root joint."""

    parameters: Tensor  # (B, 2, 64)
    offset: Tensor  # (B, 3) right root - left root, camera axes, in units of HAND_SCALE
    vertices: Tensor  # (B, 2, 778, 3) m, root-relative
    joints: Tensor  # (B, 2, 21, 3) m, root-relative
    vertices_uv: Tensor  # (B, 2, 778, 2) in [-1, 1] of the crop
    joints_uv: Tensor  # (B, 2, 21, 2)

    @property
    def finite(self) -> Tensor:
        """(B,) bool: both hands and the offset of a sample are finite."""
        return self.vertices.flatten(1).isfinite().all(1) & self.offset.isfinite().all(1)

    def detach(self) -> 'HandPrediction':
        return HandPrediction(*(tensor.detach() for tensor in self))


class JointConfidence(NamedTuple):
    """What the network thinks of the joints of its last estimate."""

    visible: Tensor  # (B, 2, 21) logits: the joint is neither hidden nor outside the crop
    deviation: Tensor  # (B, 2, 21) m: standard deviation of each coordinate, root-relative; meaningless for the root


class DIROutput(NamedTuple):
    """The network's output, as the criterion and the metrics read it."""

    stages: list[HandPrediction]  # the initial estimate, then one per refinement stage
    segmentation: Tensor | None  # (B, 3, S, S) logits: background, left, right; None without dense heads
    dense: Tensor | None  # (B, 3, S, S) vertex colour of the visible surface, in [0, 1], channels as in the files (BGR)
    presence: Tensor | None = None  # (B, 2) logits: the hand is in the image; None without MODEL.PRESENCE
    confidence: JointConfidence | None = None  # of the last estimate; None without MODEL.CONFIDENCE


class Target(NamedTuple):
    """Ground truth of a batch; 3D in camera axes and metres, not centred (the criterion does that)."""

    vertices: Tensor  # (B, 2, 778, 3) m
    joints: Tensor  # (B, 2, 21, 3) m
    vertices_uv: Tensor  # (B, 2, 778, 2) in [-1, 1] of the crop
    joints_uv: Tensor  # (B, 2, 21, 2)
    segmentation: Tensor  # (B, H, W) int64: 0 background, 1 left, 2 right; H = W of the image or of the dense heads
    dense: Tensor | None  # (B, 3, H, W) in [0, 1], channels as in the files (BGR); None where it is not learned
    present: Tensor | None = None  # (B, 2) bool: the hand is in the image, its labels mean something; None: all are
    visible: Tensor | None = None  # (B, 2, 21) bool: joints neither hidden nor outside the crop; None: not rendered

    def map(self, function: Callable[[Tensor], Tensor]) -> 'Target':
        """Apply ``function`` to every tensor."""
        return Target(*(None if values is None else function(values) for values in self))  # type: ignore[arg-type]
