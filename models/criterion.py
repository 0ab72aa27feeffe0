"""The training objective: output + target -> named, weighted loss terms."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manopth import HandPair
from models import losses
from models.mesh_losses import MeshLosses
from models.predictions import DIROutput, HandPrediction, Target
from utils.distributed import whole_batch
from utils.geometry import scale_to_truth
from utils.hand import HAND_SCALE, LEFT, RIGHT, SIDES

SEGMENTATION_CLASS_WEIGHTS = (0.1, 0.45, 0.45)  # background, left, right
_SIDED = tuple(f'_{side}' for side in SIDES)
# The terms of every stage -> endings of their names, one per value.
HAND_TERMS = {
    'joint_uv': _SIDED,
    'vertex_uv': _SIDED,
    'joint_xyz': _SIDED,
    'vertex_xyz': _SIDED,
    'edge': _SIDED,
    'normal': _SIDED,
    'offset': ('',),
}


class DIRCriterion(nn.Module):
    """Losses on every stage's hands and on the dense maps (Ren et al., ICCV 2023).

    weights: joint_uv, vertex_uv, joint_xyz, vertex_xyz, edge, normal, offset (every stage), segmentation, lovasz,
    dense, presence, visibility, deviation. An absent hand enters presence and the dense maps only.
    stage_weights: further factor of the terms of each estimate, the initial one first; None for 1.
    root_joint: the joint on which prediction and target are both centred. scale_to_truth: before the 3D terms, each
    predicted hand is scaled by true / predicted length of bone 0-9, with gradient through the scale.
    """

    class_weights: Tensor
    hand_weights: Tensor
    stage_weights: Tensor | None

    def __init__(
        self,
        hand_models: HandPair,
        *,
        weights: dict[str, float],
        stage_weights: Sequence[float] | None = None,
        root_joint: int,
        lovasz_on_probabilities: bool = False,
        scale_to_truth: bool = False,
    ):
        super().__init__()
        self.weights, self.root_joint = weights, root_joint
        self.lovasz_on_probabilities, self.scale_to_truth = lovasz_on_probabilities, scale_to_truth
        self.mesh_losses = MeshLosses(hand_models.faces)
        self.register_buffer('class_weights', torch.tensor(SEGMENTATION_CLASS_WEIGHTS), persistent=False)
        self.hand_terms = [name for name in HAND_TERMS if weights[name]]
        row = [weights[name] for name in self.hand_terms for _ in HAND_TERMS[name]]
        self.register_buffer('hand_weights', torch.tensor(row), persistent=False)
        factors = None if stage_weights is None or set(stage_weights) == {1} else torch.tensor(stage_weights)[:, None]
        self.register_buffer('stage_weights', factors, persistent=False)

    def forward(self, output: DIROutput, target: Target) -> dict[str, Tensor]:
        """-> {'joint_uv_left_0': value, ...}: every term already weighted; their sum is the objective."""
        truth = self._centred_truth(target)
        terms = self._dense_terms(output.segmentation, output.dense, target)
        terms |= self._confidence_terms(output, target, truth)
        return terms | self._hand_terms(output.stages, target, truth)

    def _dense_terms(self, logits: Tensor | None, dense: Tensor | None, target: Target) -> dict[str, Tensor]:
        if logits is None or dense is None:
            return {}
        logits, dense = (x.to(self.class_weights.dtype) for x in (logits, dense))
        size = logits.shape[-2:]
        labels = F.interpolate(target.segmentation[:, None].to(logits.dtype), size, mode='nearest')[:, 0].long()
        # Neither loss is a mean over samples: each process needs the whole batch.
        logits, labels = whole_batch(logits), whole_batch(labels)
        scores = logits.softmax(1) if self.lovasz_on_probabilities else logits
        terms = {
            'segmentation': F.cross_entropy(logits, labels, weight=self.class_weights),
            'lovasz': losses.lovasz_softmax(scores, labels),
        }
        if target.dense is not None:
            colour = F.interpolate(target.dense, size, mode='bilinear', align_corners=False)
            terms['dense'] = losses.huber(dense, colour)
        return self._weighted(terms)

    def _confidence_terms(self, output: DIROutput, target: Target, truth: '_CentredTruth') -> dict[str, Tensor]:
        terms = {}
        if output.presence is not None:
            present = torch.ones_like(output.presence) if target.present is None else target.present.float()
            terms['presence'] = F.binary_cross_entropy_with_logits(output.presence, present)
        if output.confidence is not None:
            if target.visible is None:
                raise ValueError('MODEL.CONFIDENCE needs visible joints: build the batch maker with visibility=True.')
            visible, deviation = output.confidence
            each = F.binary_cross_entropy_with_logits(visible, target.visible.to(visible.dtype), reduction='none')
            terms['visibility'] = losses.mean_per_hand(each, target.present)
            errors = losses.deviation_loss(deviation / HAND_SCALE, output.stages[-1].joints / HAND_SCALE - truth.joints)
            known = torch.arange(errors.shape[-1], device=errors.device) != self.root_joint  # its error is 0
            terms['deviation'] = losses.mean_per_hand(errors * known, target.present)
        return self._by_hand(self._weighted(terms))

    def _centred_truth(self, target: Target) -> '_CentredTruth':
        roots = target.joints[:, :, self.root_joint : self.root_joint + 1]
        joints, vertices = ((points - roots) / HAND_SCALE for points in (target.joints, target.vertices))
        return _CentredTruth(joints, vertices, (roots[:, RIGHT, 0] - roots[:, LEFT, 0]) / HAND_SCALE)

    def _hand_terms(
        self, stages: Sequence[HandPrediction], target: Target, truth: '_CentredTruth'
    ) -> dict[str, Tensor]:
        """The terms of all stages, computed together: the first axis of every tensor is the stage."""
        if not stages or not self.hand_terms:
            return {}
        fields = ('joints', 'vertices', 'joints_uv', 'vertices_uv', 'offset')
        joints, vertices, joints_uv, vertices_uv, offset = (
            torch.stack([getattr(hands, field) for hands in stages]) for field in fields
        )
        joints, vertices = joints / HAND_SCALE, vertices / HAND_SCALE
        if self.scale_to_truth:
            scale = scale_to_truth(joints, truth.joints)
            joints, vertices = joints * scale, vertices * scale
        present = target.present
        edge, normal = self.mesh_losses(vertices, truth.vertices, present)
        both = None if present is None else present.all(1, keepdim=True)
        values = {
            'joint_uv': losses.huber_per_hand(joints_uv, target.joints_uv, present),
            'vertex_uv': losses.huber_per_hand(vertices_uv, target.vertices_uv, present),
            'joint_xyz': losses.huber_per_hand(joints, truth.joints, present),
            'vertex_xyz': losses.huber_per_hand(vertices, truth.vertices, present),
            'edge': edge,
            'normal': normal,
            # One vector per sample, which counts where both hands are present.
            'offset': losses.huber_per_hand(offset[:, :, None, None], truth.offset[:, None, None], both),
        }
        weighted = torch.cat([values[name] for name in self.hand_terms], 1) * self.hand_weights
        if self.stage_weights is not None:
            weighted = weighted * self.stage_weights[: len(stages)]
        columns = [f'{name}{ending}' for name in self.hand_terms for ending in HAND_TERMS[name]]
        names = [f'{column}_{stage}' for stage in range(len(stages)) for column in columns]
        return dict(zip(names, weighted.flatten().unbind(), strict=True))

    def _weighted(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.weights[name] * value for name, value in terms.items() if self.weights[name]}

    @staticmethod
    def _by_hand(terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Split every term that has one value per hand."""
        split: dict[str, Tensor] = {}
        for name, value in terms.items():
            split |= dict(zip([f'{name}_{side}' for side in SIDES], value)) if value.ndim else {name: value}
        return split


def objective(terms: dict[str, Tensor]) -> Tensor:
    """The sum of all terms, which training minimises."""
    return torch.stack(list(terms.values())).sum()


class _CentredTruth(NamedTuple):
    joints: Tensor  # (B, 2, 21, 3) in HAND_SCALE about the root joint
    vertices: Tensor  # (B, 2, 778, 3)
    offset: Tensor  # (B, 3)
