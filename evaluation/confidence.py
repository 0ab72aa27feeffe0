"""Judge a network's certainty: present hands, visible joints, and the predicted deviations of joints.

Per-sample values are those of ``evaluation.comparison.Comparison``; NaN (an absent hand, the root joint) is left out.
"""

import math
from typing import Any

import torch
from torch import Tensor

from evaluation.aggregation import Samples, sides
from utils.hand import JOINT_NAMES

STEPS = 20  # of a sparsification curve: the least certain 0, 5 ... 95 % are removed
REMOVED = tuple(step / STEPS for step in range(STEPS))
# Share of a normal distribution that is expected within 1 and 2 deviations.
WITHIN = {f'within_{times}': math.erf(times / math.sqrt(2)) for times in (1, 2)}
# Joint kinds -> joint numbers. A finger is joints 1 (at the palm), 2, 3 and the tip.
JOINT_KINDS = {'all': list(range(len(JOINT_NAMES))), 'wrist': [JOINT_NAMES.index('wrist')]} | {
    kind: [number for number, name in enumerate(JOINT_NAMES) if name.endswith(ending)]
    for kind, ending in (('joint_1', '_1'), ('joint_2', '_2'), ('joint_3', '_3'), ('tip', '_tip'))
}


def average_precision(scores: Tensor, positive: Tensor) -> float:
    """Average precision of a ranking, without interpolation: the mean precision over the recalled positives.

    scores (N,), high for a positive; positive (N,) bool. Equal scores enter together. NaN unless there are both
    positives and negatives.
    """
    if not bool(positive.any()) or bool(positive.all()):
        return math.nan
    scores, order = scores.sort(descending=True)
    found = positive[order].double().cumsum(0)
    last_of_score = torch.cat([scores[1:] != scores[:-1], torch.ones(1, dtype=torch.bool)])
    precision = (found / torch.arange(1, len(found) + 1))[last_of_score]
    found = found[last_of_score]
    return (found.diff(prepend=found.new_zeros(1)) @ precision / found[-1]).item()


def presence(probability: Tensor, present: Tensor) -> dict[str, Any]:
    """Figures of predicted presence (N, 2) against the true one (N, 2) bool; NaN where no frame counts.

    average_precision: of each hand. handedness_accuracy: share of the frames with a hand in which both hands are on the
    right side of 0.5, as InterNet's. side_accuracy: share of the single-hand frames in which the present hand is the
    more probable one. false_alarms: share of the frames without a hand in which one is predicted.
    """
    count = present.sum(1)
    right = torch.where(present, probability > 0.5, probability < 0.5).all(1)
    likelier = torch.where(present, probability, 0).amax(1) > torch.where(present, 0, probability).amax(1)
    alarm = (probability > 0.5).any(1)
    precision = [average_precision(*hand) for hand in zip(probability.unbind(1), present.unbind(1))]
    return {
        'average_precision': sides(*precision),
        'handedness_accuracy': _share(right[count > 0]),
        'side_accuracy': _share(likelier[count == 1]),
        'false_alarms': _share(alarm[count == 0]),
    }


def deviations(samples: Samples) -> dict[str, Any]:
    """``coverage`` of the predicted deviations, and ``sparsification`` of joints and of frames by them.

    A frame's deviation is the RMS of its joints', its error their mean. ``residual_px``, which needs no predicted
    deviation and is one number per frame, is the baseline.
    """
    error, deviation = _joint_errors(samples), samples['deviation_mm']
    residual = samples['residual_px'].to(deviation)
    known = deviation.isfinite()
    frames = known.flatten(1).any(1)
    of_joints = {'deviation': deviation, 'residual_px': residual[:, None, None].expand_as(error)}
    of_frames = {'deviation': deviation.square().flatten(1).nanmean(1).sqrt(), 'residual_px': residual}
    return coverage(samples['coordinates_mm'], deviation) | {
        'sparsification': {
            'removed': list(REMOVED),
            'joints': sparsification(error[known], {name: values[known] for name, values in of_joints.items()}),
            'frames': sparsification(
                error.flatten(1).nanmean(1)[frames], {name: values[frames] for name, values in of_frames.items()}
            ),
        }
    }


def by_joint_visibility(samples: Samples) -> dict[str, dict[str, float]]:
    """Number, mean error and mean predicted deviation of the visible joints, and of the hidden ones."""
    error, deviation = _joint_errors(samples), samples['deviation_mm']
    rows = {}
    for name, value in (('visible', 1), ('hidden', 0)):
        chosen = (samples['joint_visible'] == value) & error.isfinite()
        rows[name] = {
            'joints': int(chosen.sum()),
            'error_mm': error[chosen].double().mean().item(),
            'deviation_mm': deviation[chosen].double().mean().item(),
        }
    return rows


def _joint_errors(samples: Samples) -> Tensor:
    """(N, 2, 21) mm: distances of the joints whose deviations are predicted."""
    return torch.linalg.vector_norm(samples['coordinates_mm'], dim=-1)


def hidden_joints(logit: Tensor, visible: Tensor) -> dict[str, dict[str, float]]:
    """Hidden joints by kind: their share, the average precision of finding them, the accuracy of both classes.

    logit (N, 2, 21) of a visible joint; visible (N, 2, 21) 1 or 0, NaN for an absent hand.
    """
    figures = {}
    for kind, joints in JOINT_KINDS.items():
        truth, scores = visible[:, :, joints].flatten(), logit[:, :, joints].flatten()
        known = truth.isfinite()
        hidden, scores = truth[known] == 0, -scores[known]
        figures[kind] = {
            'share': _share(hidden),
            'average_precision': average_precision(scores, hidden),
            'accuracy': _share((scores > 0) == hidden),
        }
    return figures


def coverage(coordinates: Tensor, deviation: Tensor) -> dict[str, float]:
    """Share of the coordinates within 1 and 2 predicted deviations, and the factor that calibrates the deviations.

    coordinates (..., 3): errors of a joint; deviation (...) > 0. The factor is the RMS of error / deviation: times it,
    the deviations have the maximum likelihood.
    """
    ratio = (coordinates / deviation[..., None]).abs()
    ratio = ratio[ratio.isfinite()]
    return {
        **{name: _share(ratio <= times) for times, name in enumerate(WITHIN, 1)},
        'calibration': ratio.double().square().mean().sqrt().item(),
    }


def sparsification(errors: Tensor, uncertainties: dict[str, Tensor]) -> dict[str, Any]:
    """Mean error after the least certain are removed, against the order of the errors themselves (the oracle).

    errors (N,); uncertainties: name -> (N,). Curves over ``REMOVED``, in the unit of the errors. ause: area between a
    curve, divided by the mean error, and the oracle's (Ilg et al., ECCV 2018), over 0 to 95 % removed; ``random``
    removes without regard to the errors. NaN without errors.
    """
    curves = {name: sparsified(errors, order) for name, order in uncertainties.items()}
    oracle, whole = sparsified(errors, errors), errors.double().mean()
    removed = torch.tensor(REMOVED, dtype=torch.float64)
    areas = {
        name: torch.trapezoid((curve - oracle) / whole, removed).item()
        for name, curve in {**curves, 'random': whole.expand(STEPS)}.items()
    }
    return {
        'count': len(errors),
        **{name: curve.tolist() for name, curve in curves.items()},
        'oracle': oracle.tolist(),
        'ause': areas,
    }


def sparsified(errors: Tensor, uncertainty: Tensor) -> Tensor:
    """Mean of errors (N,) without the most uncertain of each share in ``REMOVED`` -> (STEPS,).

    Equally uncertain ones are removed in a random order: this is the expected mean.
    """
    if not len(errors):
        return torch.full((STEPS,), torch.nan, dtype=torch.float64)
    uncertainty, order = uncertainty.sort()
    _, group, size = torch.unique_consecutive(uncertainty, return_inverse=True, return_counts=True)
    total = torch.zeros(len(size), dtype=torch.float64).index_add_(0, group, errors[order].double())
    sums = (total / size)[group].cumsum(0)
    kept = torch.tensor([len(errors) - len(errors) * step // STEPS for step in range(STEPS)])
    return sums[kept - 1] / kept


def _share(values: Tensor) -> float:
    """Share of True; NaN of nothing."""
    return values.double().mean().item()
