"""Least-squares alignment of corresponding 3D points: rigid (Kabsch 1976) or with scale (Umeyama 1991, eqs. 40-43)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from manopth.rotations import nearest_rotation


class Alignment(NamedTuple):
    """The map x -> scale R (x - source centre) + target centre."""

    rotation: Tensor  # (..., 3, 3)
    scale: Tensor | None  # (...); None for a rigid alignment
    source_centre: Tensor  # (..., 3) weighted means
    target_centre: Tensor  # (..., 3)

    @property
    def translation(self) -> Tensor:
        """(..., 3) t in x -> scale R x + t."""
        centre = (self.rotation @ self.source_centre[..., None]).squeeze(-1)
        return self.target_centre - (centre if self.scale is None else self.scale[..., None] * centre)

    def apply(self, points: Tensor) -> Tensor:
        """Transform points (..., N, 3)."""
        centred = points - self.source_centre[..., None, :]
        if self.scale is not None:
            centred = self.scale[..., None, None] * centred
        return centred @ self.rotation.mT + self.target_centre[..., None, :]


def align(source: Tensor, target: Tensor, *, weight: Tensor | None = None, scale: bool = False) -> Alignment:
    """The alignment that brings source (..., N, 3) closest to target (..., N, 3).

    weight (..., N) >= 0; by default 1 where the target is finite and 0 elsewhere. Targets of weight 0 may be NaN. If
    all weights are 0, the rotation is still a rotation, not NaN. scale: also fit one scale factor per point set, 0 for
    sources that coincide. Gradients are finite for identical and collinear points too.
    """
    if weight is None:
        weight = target.isfinite().all(-1).to(source.dtype)
    weight = (weight / weight.sum(-1, keepdim=True).clamp_min(1e-12))[..., None]
    target = torch.where(weight > 0, target, 0)
    source_centre, target_centre = ((weight * points).sum(-2) for points in (source, target))
    source, target = source - source_centre[..., None, :], target - target_centre[..., None, :]
    covariance = (weight * target).mT @ source
    rotation = nearest_rotation(covariance)
    factor = None
    if scale:
        spread = (weight * source * source).sum((-1, -2))
        # The best rotation maximises this trace, so the trace's derivative through the rotation is zero.
        trace = (rotation.detach() * covariance).sum((-1, -2))
        factor = trace / spread.masked_fill(spread < 1e-20, math.inf)
    return Alignment(rotation, factor, source_centre, target_centre)
