"""Aggregate per-sample values into figures: means, curves, breakdowns, bootstrap intervals.

Samples are a dictionary: column name -> (N, ...) tensor, hands in axis 1. Figures are computed from per-sample values
alone, so they do not depend on batches or processes. NaN (not annotated, or a hand that is absent) is left out.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from utils.hand import FINGERS, JOINT_NAMES, SIDES

Samples = dict[str, Tensor]

RESAMPLES = 1000
PCK_THRESHOLDS = tuple(range(51))  # mm
BOX_IOU_EDGES = (0.0, 0.05, 0.15, 0.3, 0.5, 1.0)
DISTANCE_EDGES = (0.0, 1.0, 5.0, 10.0, 20.0, 50.0, float('inf'))  # mm
VISIBLE_EDGES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
SEGMENTATION_CLASSES = ('background', *SIDES)


def concatenate(parts: list[Samples]) -> Samples:
    """Concatenate the samples of several batches, on the CPU."""
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}


def choose_rows(samples: Samples, rows: Tensor) -> Samples:
    """The samples that ``rows``, a mask or an index, selects."""
    return {name: values[rows] for name, values in samples.items()}


def sides(left: float, right: float) -> dict[str, float]:
    """The figures of both hands; ``all`` is their plain mean, or the figure of the only hand that has one."""
    if math.isnan(left) or math.isnan(right):
        return {'left': left, 'right': right, 'all': right if math.isnan(left) else left}
    return {'left': left, 'right': right, 'all': (left + right) / 2}


def mean(values: Tensor) -> Any:
    """Mean over frames: (N,) -> a number; (N, 2) -> {'left', 'right', 'all'}."""
    means = values.double().nanmean(0)
    return means.item() if means.ndim == 0 else sides(*means.tolist())


def mean_joint_error(samples: Samples) -> dict[str, float]:
    """Mean joint error of each hand.

    Where some joints are not annotated, it is the mean over joints of each joint's mean over frames, as InterNet's.
    """
    if samples['joints_mm'].isnan().any():
        return sides(*samples['joints_mm'].double().nanmean(0).nanmean(1).tolist())
    return mean(samples['joint_mm'])


def intervals(samples: Samples, keys: list[str], *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """95 % percentile bootstrap intervals of the means over frames, [low, high] each.

    keys: columns (N,) or (N, 2). The joint error's interval is that of ``mean_joint_error``. Frames of one
    recording are alike, so the intervals are too narrow for a claim about other recordings.
    """
    columns = {key: samples[key] for key in keys}
    known_joints = samples['joints_mm'].isfinite()
    if 'joint_mm' in keys and (known_joints.any(2) != known_joints.all(2)).any():
        # Not for hands that lack all joints, where it is the same and takes six times as long.
        columns['joint_mm'] = samples['joints_mm']  # (N, 2, 21)
    values = torch.cat([column.flatten(1) if column.ndim > 1 else column[:, None] for column in columns.values()], 1)
    values = values.double()
    known = values.isfinite()
    table = torch.cat([values.nan_to_num(0), known.double()], 1)
    generator = torch.Generator().manual_seed(seed)
    frames = len(table)
    sums = torch.stack(
        [
            torch.bincount(torch.randint(frames, (frames,), generator=generator), minlength=frames).double() @ table
            for _ in range(resamples)
        ]
    )
    means = sums[:, : values.shape[1]] / sums[:, values.shape[1] :]
    result: dict[str, Any] = {}
    sizes = [math.prod(column.shape[1:]) for column in columns.values()]
    for (key, column), part in zip(columns.items(), means.split(sizes, 1)):
        if column.ndim == 1:
            result[key] = _central(part[:, 0])
        else:
            hands = part if column.ndim == 2 else part.unflatten(1, column.shape[1:]).nanmean(2)
            means_of_hands = (hands[:, 0], hands[:, 1], hands.nanmean(1))
            result[key] = {side: _central(values) for side, values in zip((*SIDES, 'all'), means_of_hands)}
    return result | {'resamples': resamples, 'level': 0.95}


def _central(values: Tensor) -> list[float]:
    return torch.nanquantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()


def pck(joints_mm: Tensor) -> dict[str, Any]:
    """PCK curve of each hand and its area over 0 to 50 mm, from joint errors (N, 2, 21) mm; NaN without any joint."""
    thresholds = torch.tensor(PCK_THRESHOLDS, dtype=joints_mm.dtype)
    curves = []
    for hand in joints_mm.unbind(1):
        known = hand[hand.isfinite()].sort().values
        curves.append(torch.searchsorted(known, thresholds, right=True).double() / (len(known) or math.nan))
    areas = [torch.trapezoid(curve, thresholds.double()).item() / PCK_THRESHOLDS[-1] for curve in curves]
    return {
        'thresholds_mm': list(PCK_THRESHOLDS),
        **{side: c.tolist() for side, c in zip(SIDES, curves)},
        'auc': sides(*areas),
    }


def by_joint(joints_mm: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Mean error of each joint and of each finger (its four joints): (N, 2, 21) -> {name: left / right / all} twice."""
    means = joints_mm.double().nanmean(0)  # (2, 21)
    joints = {name: sides(*means[:, joint].tolist()) for joint, name in enumerate(JOINT_NAMES)}
    fingers = {
        name: sides(*means[:, 1 + 4 * number : 5 + 4 * number].nanmean(1).tolist())
        for number, name in enumerate(FINGERS)
    }
    return joints, {'wrist': joints['wrist']} | fingers


def _bins(by: Tensor, edges: tuple[float, ...]) -> Iterator[tuple[float, float, Tensor]]:
    """From, to and mask of each bin [from, to); the last one includes its end. NaN is in no bin."""
    for low, high in zip(edges, edges[1:]):
        yield low, high, (by >= low) & ((by < high) if high != edges[-1] else (by <= high))


def binned(samples: Samples, by: Tensor, edges: tuple[float, ...]) -> list[dict[str, Any]]:
    """Mean errors of the frames in each bin [from, to) of ``by`` (N,); the last bin includes its end."""
    rows = []
    for low, high, inside in _bins(by, edges):
        row = {'from': low, 'to': high if high != float('inf') else None, 'frames': int(inside.sum())}
        if row['frames']:
            chosen = choose_rows(samples, inside)
            row |= {
                'joint_mm': mean_joint_error(chosen)['all'],
                'vert_mm': mean(chosen['vert_mm'])['all'],
                'root_mm': mean(chosen['root_mm']),
            }
        rows.append(row)
    return rows


def some_absent(samples: Samples) -> bool:
    """Whether a frame lacks a hand."""
    return 'present' in samples and not bool(samples['present'].all())


def by_hands(samples: Samples) -> dict[str, dict[str, Any]]:
    """Number and mean errors of the frames that show a single hand, two hands, any hand, none.

    As InterNet's: the joint error is the mean of left and right, the root error that of the frames with two hands.
    """
    count = samples['present'].sum(1)
    groups = {'single': count == 1, 'interacting': count == 2, 'all': count > 0, 'empty': count == 0}
    rows: dict[str, dict[str, Any]] = {}
    for name, inside in groups.items():
        chosen = choose_rows(samples, inside)
        rows[name] = {
            'frames': int(inside.sum()),
            'joint_mm': mean_joint_error(chosen)['all'],
            'vert_mm': mean(chosen['vert_mm'])['all'],
            'root_mm': mean(chosen['root_mm']),
        }
    return rows


def by_visibility(samples: Samples, visible: Tensor) -> list[dict[str, Any]]:
    """Mean errors of the *hands* whose visible share (N, 2) is in each bin [from, to); the last bin includes 1."""
    rows = []
    for low, high, inside in _bins(visible, VISIBLE_EDGES):
        row = {'from': low, 'to': high, 'hands': int(inside.sum())}
        if row['hands']:
            row |= {name: samples[name][inside].double().nanmean().item() for name in ('joint_mm', 'vert_mm')}
        rows.append(row)
    return rows


def placement(error_mm: Tensor, depth_mm: Tensor) -> dict[str, float]:
    """Mean error of the root joints placed in the camera, and of its depth component: (N, 2) mm each."""
    return sides(*error_mm.double().nanmean(0).tolist()) | {'depth': depth_mm.double().nanmean().item()}


def penetration(depth_mm: Tensor) -> dict[str, float]:
    """Share of frames whose hands intersect, their mean depth and the maximum: depths (N,) mm.

    Every figure is NaN without a frame of two hands.
    """
    known = depth_mm[depth_mm.isfinite()]
    if not len(known):
        return dict.fromkeys(('share', 'mean_mm', 'worst_mm'), math.nan)
    deep = known[known > 0].double()
    return {
        'share': len(deep) / len(known),
        'mean_mm': deep.mean().item() if len(deep) else 0.0,
        'worst_mm': deep.max().item() if len(deep) else 0.0,
    }


def segmentation_iou(intersection: Tensor, union: Tensor) -> dict[str, float] | None:
    """Intersection over union of each class over all pixels of all frames, from (N, 3) pixels each.

    None if all unions are empty: a model without a segmentation. NaN for a class that is neither true nor predicted in
    any frame.
    """
    both, either = intersection.double().sum(0), union.double().sum(0)
    if not bool(either.any()):
        return None
    iou = dict(zip(SEGMENTATION_CLASSES, (both / either).tolist()))
    return iou | {'hands': sides(iou['left'], iou['right'])['all']}
