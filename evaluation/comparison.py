"""A prediction beside the truth of its batch: the input of every metric."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dataset.batch import Batch
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
from models.placement import place_hands
from models.predictions import CAMERA, DIROutput, HandPrediction
from utils.geometry import project


@dataclass
class Comparison:
    """One stage of a network's output, the truth and the protocol.

    What several metrics share is a property, computed on first use.
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
    def true_vertices(self) -> Tensor:
        """(B, 2, 778, 3) m, camera axes."""
        return self.batch.target.vertices

    @cached_property
    def errors(self) -> dict[str, Tensor]:
        """Errors in the protocol: see ``sample_errors``."""
        return sample_errors(
            self.regressor,
            self.hands.vertices,
            self.hands.offset,
            true_vertices=self.true_vertices,
            intrinsics=self.batch.intrinsics,
            network_root=self.network_root,
            protocol=self.protocol,
            annotated=self.annotated,
        )

    @cached_property
    def procrustes(self) -> tuple[Tensor, Tensor]:
        """PA errors of joints and vertices, (B, 2) mm each."""
        return procrustes_errors(
            self.regressor, self.hands.vertices, true_vertices=self.true_vertices, true_joints=self.annotated
        )

    @cached_property
    def penetration_mm(self) -> tuple[Tensor, Tensor]:
        """Penetration depth of the predicted hands, placed by the offset, and of the true hands, (B,) mm each."""
        predicted = in_one_frame(self.hands.vertices, self.hands.offset)
        depth = METRES_TO_MM * self.penetration(torch.cat([predicted, self.true_vertices]))
        return depth[: len(predicted)], depth[len(predicted) :]

    @cached_property
    def placement_mm(self) -> tuple[Tensor, Tensor]:
        """Error of the root joints placed in the camera by models.placement, and its depth part, (B, 2) mm each."""
        hands, truth = self.hands, self.batch.target.joints[:, :, self.network_root]
        placement = place_hands(hands.joints, hands.parameters[..., CAMERA], hands.offset, self.batch.intrinsics)
        distance, depth = placement_error(placement, truth)
        return METRES_TO_MM * distance, METRES_TO_MM * depth

    @property
    def box_iou(self) -> Tensor:
        """(B,) intersection over union of the true hands' bounding boxes in the image."""
        return box_iou(project(self.true_vertices, self.batch.intrinsics[:, None]))

    @property
    def distance_mm(self) -> Tensor:
        """(B,) smallest distance between vertices of the two true hands."""
        return METRES_TO_MM * hand_distance(self.true_vertices)

    @property
    def visible(self) -> Tensor:
        """(B, 2) share of each true hand's outline that the other hand does not hide."""
        return visible_shares(self.true_vertices, self.batch.intrinsics, self.faces)

    @cached_property
    def segmentation(self) -> tuple[Tensor, Tensor]:
        """Pixels of background, left, right in the intersection and the union, (B, 3) each."""
        return segmentation_overlap(self.output.segmentation, self.batch.target.segmentation)
