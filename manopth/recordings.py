"""Fit hand parameters to recordings: many time steps, in which each person keeps one shape."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manopth.assets import HandPair
from manopth.fitting import PointModel, fit_hands, fittable, place_points
from manopth.rotations import matrix_to_axis_angle

SHAPE_TIME_STEPS = 64  # a person's shape is fitted to at most this many time steps, spread over the recording
BATCH_TIME_STEPS = {'cpu': 128, 'cuda': 4096}  # larger ones fall out of a CPU's cache: half as fast at 512


class Fit(NamedTuple):
    """Parameters of T time steps, axis 1 left and right, float64, in the axes of the joints; NaN for hands without a
    fit."""

    pose: Tensor  # (T, 2, 48) axis-angle: root, then 15 joints relative to the mean pose
    shape: Tensor  # (T, 2, 10)
    trans: Tensor  # (T, 2, 3) m
    residual: Tensor  # (T, 2, 21) mm, NaN at invalid joints
    joints: Tensor  # (T, 2, 21, 3) m, of the fitted hand


def fit_time_steps(
    models: HandPair,
    joints: Tensor,
    valid: Tensor,
    subject: Tensor,
    *,
    device: str = 'cpu',
    progress: Callable[[int], Any] = lambda count: None,
) -> Fit:
    """Fit both hands at T time steps. All hands of one subject share one shape.

    joints (T, 2, 21, 3) m, valid (T, 2, 21) bool, subject (T,) int64 numbers from 0. ``progress`` is called between
    batches with the number of time steps just finished, which may be 0; it may raise to stop the fit. Hands that are
    not ``fittable`` are ignored; their results are NaN.
    """
    model = PointModel.from_models(models, device)
    joints, valid = joints.double(), valid & fittable(valid)[..., None]
    betas = _subject_shapes(model, joints, valid, subject, device, progress)[subject][:, None].expand(-1, 2, -1)
    sizes = ((48,), (10,), (3,), joints.shape[2:3], joints.shape[2:])
    out = Fit(*(joints.new_full((len(joints), 2, *size), math.nan) for size in sizes))
    for rows in torch.arange(len(joints)).split(_batch_size(device)):
        target, seen = joints[rows].to(device), valid[rows].to(device)
        hands = fit_hands(model, target, seen, betas=betas[rows].to(device))
        placed = place_points(model, hands)
        distance = (placed - target).norm(dim=-1) * 1e3
        fit = Fit(
            pose=torch.cat([matrix_to_axis_angle(hands.root), (hands.pose - model.pose_mean).flatten(2)], -1),
            shape=hands.betas,
            trans=hands.trans,
            residual=torch.where(seen, distance, math.nan),
            joints=placed,
        )
        fitted = seen.any(-1)
        for all_values, values in zip(out, fit):
            all_values[rows] = values.masked_fill(~fitted.view(*fitted.shape, *[1] * (values.ndim - 2)), math.nan).cpu()
        progress(len(rows))
    return out


def _subject_shapes(
    model: PointModel, joints: Tensor, valid: Tensor, subject: Tensor, device: str, progress: Callable[[int], Any]
) -> Tensor:
    """(S, 10) betas of each subject, from some of its time steps, several subjects at once."""
    subjects = int(subject.max()) + 1 if len(subject) else 0
    betas = joints.new_zeros(subjects, 10)
    chosen = []
    for number in range(subjects):
        progress(0)
        usable = ((subject == number) & valid.flatten(1).any(1)).nonzero().squeeze(1)
        spread = torch.linspace(0, len(usable) - 1, min(len(usable), SHAPE_TIME_STEPS)).round().long()
        chosen.append(usable[spread])
        if sum(map(len, chosen)) >= _batch_size(device) or number == subjects - 1:
            rows = torch.cat(chosen)
            group = subject[rows].unique(return_inverse=True)[1]
            hands = fit_hands(model, joints[rows].to(device), valid[rows].to(device), subject=group.to(device))
            betas[subject[rows]] = hands.betas[:, 0].cpu()
            chosen = []
    return betas


def _batch_size(device: str) -> int:
    return BATCH_TIME_STEPS['cpu' if device == 'cpu' else 'cuda']
