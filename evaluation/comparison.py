"""A prediction beside the truth of its batch: the input of every metric."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dataset.batch import Batch
from dataset.targets import only_present
from evaluation.metrics import (
    METRES_TO_MM,
    JointRegressor,
    Protocol,
    box_iou,
    hand_distance,
    in_one_frame,
    placement_error,
    procrustes_errors,
    sample_errors,
    segmentation_overlap,
    visible_shares,
)
from evaluation.penetration import PenetrationDepth
from models.placement import Placement, counted_hands, place_hands
from models.predictions import CAMERA, DIROutput, HandPrediction
from utils.geometry import project
from utils.masking import where_leading


@dataclass
class Comparison:
    """One stage of a network's output, the truth and the protocol.

    What several metrics share is a property, computed on first use. The labels of an absent hand are placeholders:
    per-hand values of an absent hand are NaN, and so are values of both hands together unless both are present.
    """

    output: DIROutput
    batch: Batch
    protocol: Protocol
    network_root: int  # the root joint that the prediction is centred on
    regressor: JointRegressor
    penetration: PenetrationDepth
    faces: Tensor  # (3076, 3) of both hands as one mesh
    stage: int = -1
    annotated: Tensor | None = None  # (B, 2, 21, 3) m, camera axes, NaN where invalid

    @property
    def hands(self) -> HandPrediction:
        return self.output.stages[self.stage]

    @property
    def present(self) -> Tensor:
        """(B, 2) bool: the image shows the hand."""
        present = self.batch.target.present
        return self.batch.index.new_ones(len(self.batch.index), 2, dtype=torch.bool) if present is None else present

    @property
    def true_vertices(self) -> Tensor:
        """(B, 2, 778, 3) m, camera axes."""
        return self.batch.target.vertices

    @cached_property
    def errors(self) -> dict[str, Tensor]:
        """Errors in the protocol: see ``sample_errors``."""
        errors = sample_errors(
            self.regressor,
            self.hands.vertices,
            self.hands.offset,
            true_vertices=self.true_vertices,
            intrinsics=self.batch.intrinsics,
            network_root=self.network_root,
            protocol=self.protocol,
            annotated=self.annotated,
        )
        return {
            name: self._of_pairs(values) if name == 'root_mm' else self._of_present(values)
            for name, values in errors.items()
        }

    @cached_property
    def procrustes(self) -> tuple[Tensor, Tensor]:
        """PA errors of joints and vertices, (B, 2) mm each."""
        joints, vertices = procrustes_errors(
            self.regressor, self.hands.vertices, true_vertices=self.true_vertices, true_joints=self.annotated
        )
        return self._of_present(joints), self._of_present(vertices)

    @cached_property
    def penetration_mm(self) -> tuple[Tensor, Tensor]:
        """Penetration depth of the predicted hands, placed by the offset, and of the true hands, (B,) mm each."""
        predicted = in_one_frame(self.hands.vertices, self.hands.offset)
        pairs = [self._of_pairs(vertices) for vertices in (predicted, self.true_vertices)]
        depth = METRES_TO_MM * self.penetration(torch.cat(pairs))
        return depth[: len(predicted)], depth[len(predicted) :]

    @cached_property
    def placement(self) -> Placement:
        """Both hands placed in the camera by models.placement; a single hand is placed by itself."""
        hands, present = self.hands, self.batch.target.present
        counted = None if present is None else counted_hands(present)
        camera = hands.parameters[..., CAMERA]
        return place_hands(hands.joints, camera, hands.offset, self.batch.intrinsics, counted=counted)

    @cached_property
    def placement_mm(self) -> tuple[Tensor, Tensor]:
        """Error of the root joints placed in the camera, and its depth part, (B, 2) mm each."""
        truth = self.batch.target.joints[:, :, self.network_root]
        distance, depth = placement_error(self.placement, truth)
        return self._of_present(METRES_TO_MM * distance), self._of_present(METRES_TO_MM * depth)

    @property
    def box_iou(self) -> Tensor:
        """(B,) intersection over union of the true hands' bounding boxes in the image."""
        return self._of_pairs(box_iou(project(self.true_vertices, self.batch.intrinsics[:, None])))

    @property
    def distance_mm(self) -> Tensor:
        """(B,) smallest distance between vertices of the two true hands."""
        return self._of_pairs(METRES_TO_MM * hand_distance(self.true_vertices))

    @property
    def visible(self) -> Tensor:
        """(B, 2) share of each true hand's outline that the other hand does not hide."""
        vertices = only_present(self.true_vertices, self.batch.target.present)
        return visible_shares(vertices, self.batch.intrinsics, self.faces)

    @cached_property
    def segmentation(self) -> tuple[Tensor, Tensor]:
        """Pixels of background, left, right in the intersection and the union, (B, 3) each."""
        return segmentation_overlap(self.output.segmentation, self.batch.target.segmentation)

    @property
    def presence(self) -> Tensor | None:
        """(B, 2) float64 predicted probability of each hand; None without MODEL.PRESENCE."""
        logits = self.output.presence
        return None if logits is None else logits.double().sigmoid()

    @property
    def visible_logit(self) -> Tensor | None:
        """(B, 2, 21) predicted logit of a visible joint; None without MODEL.CONFIDENCE or the true visibility."""
        if self.output.confidence is None or self.batch.target.visible is None:
            return None
        return self._of_present(self.output.confidence.visible.float())

    @property
    def joint_visible(self) -> Tensor | None:
        """(B, 2, 21) 1 for a joint that is truly visible, 0 for a hidden one; None with ``visible_logit``."""
        visible = self.batch.target.visible
        return None if self.output.confidence is None or visible is None else self._of_present(visible.float())

    @property
    def deviation_mm(self) -> Tensor | None:
        """(B, 2, 21) predicted standard deviation of a coordinate, NaN at the root; None without MODEL.CONFIDENCE."""
        if self.output.confidence is None:
            return None
        return self._of_present(self._but_root(METRES_TO_MM * self.output.confidence.deviation))

    @property
    def coordinates_mm(self) -> Tensor | None:
        """(B, 2, 21, 3) errors that ``deviation_mm`` is predicted for; None without MODEL.CONFIDENCE.

        Of the network's own joints, those of the kinematic chain, relative to the network's root joint and without
        scale alignment, as in its loss.
        """
        if self.output.confidence is None:
            return None
        truth = self.batch.target.joints
        difference = self.hands.joints - (truth - truth[:, :, self.network_root : self.network_root + 1])
        return self._of_present(self._but_root(METRES_TO_MM * difference))

    @property
    def residual_px(self) -> Tensor | None:
        """(B,) RMS distance of the placed joints from those predicted in the image, as in hands.json, beside which
        ``deviation_mm`` is judged; None without MODEL.CONFIDENCE, NaN without a hand."""
        if self.output.confidence is None:
            return None
        return torch.where(self.present.any(1), self.placement.residual_px, torch.nan)

    def _of_present(self, values: Tensor) -> Tensor:
        """Values (B, 2, ...) with NaN for absent hands."""
        present = self.batch.target.present
        if present is None:
            return values
        return where_leading(present, values, torch.nan)

    def _of_pairs(self, values: Tensor) -> Tensor:
        """Values (B, ...) with NaN for frames without both hands."""
        present = self.batch.target.present
        if present is None:
            return values
        return where_leading(present.all(1), values, torch.nan)

    def _but_root(self, values: Tensor) -> Tensor:
        """Values (B, 2, 21, ...) with NaN at the network's root joint, whose error is 0."""
        root = torch.arange(values.shape[2], device=values.device) == self.network_root
        return values.masked_fill(root.view(-1, *[1] * (values.ndim - 3)), torch.nan)
