"""From the errors of every sample to what is printed, plotted and compared: means, intervals, curves, breakdowns.

Everything is computed from per-sample values, so that figures do not depend on batches or processes, and each part
says how many frames it covers. Values that are NaN (not annotated) do not count.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from evaluation.metrics import Protocol, SampleDetails, SampleErrors
from utils.hand import FINGERS, JOINT_NAMES, SIDES

PER_HAND = ('joint_mm', 'vert_mm', 'joint_px', 'vert_px')  # the headline figures, with root_mm
TITLES = {
    'joint_mm': 'joint mean error',
    'vert_mm': 'vert mean error',
    'joint_px': 'pixel joint mean error',
    'vert_px': 'pixel vert mean error',
    'root_mm': 'root error',
}
RESAMPLES = 1000
PCK_THRESHOLDS = tuple(range(51))  # mm
BOX_IOU_EDGES = (0.0, 0.05, 0.15, 0.3, 0.5, 1.0)
DISTANCE_EDGES = (0.0, 1.0, 5.0, 10.0, 20.0, 50.0, float('inf'))  # mm
VISIBLE_EDGES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
SEGMENTATION_CLASSES = ('background', *SIDES)


def summarise(errors: SampleErrors, protocol: Protocol) -> dict:
    """The headline figures as metrics.json holds them: left / right / all (their plain mean), and the protocol."""
    return {**headline(errors), 'protocol': protocol._asdict() | {'description': protocol.describe()}}


def headline(errors: SampleErrors) -> dict:
    """{'joint_mm': {'left', 'right', 'all'}, ..., 'root_mm', 'frames'}: means over frames.

    Where some joints are not annotated, the joint error is the mean over joints of each joint's mean, as InterNet's.
    """
    figures = {name: sides(*getattr(errors, name).double().nanmean(0).tolist()) for name in PER_HAND}
    if errors.joints_mm.isnan().any():
        figures['joint_mm'] = sides(*errors.joints_mm.double().nanmean(0).nanmean(1).tolist())
    return figures | {'root_mm': errors.root_mm.double().nanmean().item(), 'frames': len(errors.root_mm)}


def sides(left: float, right: float) -> dict[str, float]:
    return {'left': left, 'right': right, 'all': (left + right) / 2}


def intervals(errors: SampleErrors, *, resamples: int = RESAMPLES, seed: int = 0) -> dict:
    """95 % percentile bootstrap intervals over frames of the headline figures, [low, high] each.

    Frames of one recording are alike, so that these are too narrow for a claim about other recordings.
    """
    values = torch.cat([*(getattr(errors, name) for name in PER_HAND), errors.root_mm[:, None]], 1).double()
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
    result = {}
    for number, name in enumerate(PER_HAND):
        hands = means[:, 2 * number : 2 * number + 2]
        columns = zip((*SIDES, 'all'), (hands[:, 0], hands[:, 1], hands.mean(1)))
        result[name] = {side: _central(column) for side, column in columns}
    return result | {'root_mm': _central(means[:, -1]), 'resamples': resamples, 'level': 0.95}


def _central(values: Tensor) -> list[float]:
    return torch.nanquantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()


def pck(joints_mm: Tensor) -> dict:
    """(N, 2, 21) -> share of joints within each threshold, per hand, and the area under the curve over 0 to 50 mm."""
    thresholds = torch.tensor(PCK_THRESHOLDS, dtype=joints_mm.dtype)
    curves = []
    for hand in joints_mm.unbind(1):
        known = hand[hand.isfinite()].sort().values
        curves.append(torch.searchsorted(known, thresholds, right=True).double() / max(len(known), 1))
    areas = [torch.trapezoid(curve, thresholds.double()).item() / PCK_THRESHOLDS[-1] for curve in curves]
    return {
        'thresholds_mm': list(PCK_THRESHOLDS),
        **{side: c.tolist() for side, c in zip(SIDES, curves)},
        'auc': sides(*areas),
    }


def by_joint(joints_mm: Tensor) -> tuple[dict, dict]:
    """(N, 2, 21) -> mean error of each joint and of each finger (its four joints), left / right / all."""
    means = joints_mm.double().nanmean(0)  # (2, 21)
    joints = {name: sides(*means[:, joint].tolist()) for joint, name in enumerate(JOINT_NAMES)}
    fingers = {
        name: sides(*means[:, 1 + 4 * number : 5 + 4 * number].nanmean(1).tolist())
        for number, name in enumerate(FINGERS)
    }
    return joints, {'wrist': joints['wrist']} | fingers


def _bins(by: Tensor, edges: tuple[float, ...]) -> Iterator[tuple[float, float, Tensor]]:
    """From, to, and which values lie in [from, to); the last bin holds its end too. NaN lies in none."""
    for low, high in zip(edges, edges[1:]):
        yield low, high, (by >= low) & ((by < high) if high != edges[-1] else (by <= high))


def binned(errors: SampleErrors, by: Tensor, edges: tuple[float, ...]) -> list[dict]:
    """Mean errors of the frames in each bin [from, to) of ``by`` (N,); the last bin holds its end too."""
    rows = []
    for low, high, inside in _bins(by, edges):
        row = {'from': low, 'to': high if high != float('inf') else None, 'frames': int(inside.sum())}
        if row['frames']:
            chosen = headline(SampleErrors(*(values[inside] for values in errors)))
            row |= {
                'joint_mm': chosen['joint_mm']['all'],
                'vert_mm': chosen['vert_mm']['all'],
                'root_mm': chosen['root_mm'],
            }
        rows.append(row)
    return rows


def by_visibility(errors: SampleErrors, visible: Tensor) -> list[dict]:
    """Mean errors of the *hands* of which a share in [from, to) is seen (the last bin holds 1 too); visible (N, 2)."""
    rows = []
    for low, high, inside in _bins(visible, VISIBLE_EDGES):
        row = {'from': low, 'to': high, 'hands': int(inside.sum())}
        if row['hands']:
            row |= {name: getattr(errors, name)[inside].double().nanmean().item() for name in ('joint_mm', 'vert_mm')}
        rows.append(row)
    return rows


def placement(details: SampleDetails) -> dict:
    """Mean error of the root joints' place in the camera, with the true intrinsics, and how much of it is depth."""
    return sides(*details.placement_mm.double().mean(0).tolist()) | {
        'depth': details.placement_depth_mm.double().mean().item()
    }


def penetration(depth_mm: Tensor) -> dict:
    """(N,) -> share of frames whose hands intersect, mean depth of those, and the deepest."""
    deep = depth_mm[depth_mm > 0].double()
    return {
        'share': len(deep) / len(depth_mm),
        'mean_mm': deep.mean().item() if len(deep) else 0.0,
        'worst_mm': deep.max().item() if len(deep) else 0.0,
    }


def segmentation_iou(details: SampleDetails) -> dict | None:
    """Intersection over union of each class over all pixels of all frames; None without a segmentation."""
    both, either = details.seg_intersection.double().sum(0), details.seg_union.double().sum(0)
    if not bool(either.any()):
        return None
    iou = dict(zip(SEGMENTATION_CLASSES, (both / either.clamp_min(1)).tolist()))
    return iou | {'hands': (iou['left'] + iou['right']) / 2}


def breakdown(errors: SampleErrors, details: SampleDetails) -> dict:
    """All that metrics.json holds besides the headline."""
    joints, fingers = by_joint(errors.joints_mm)
    return {
        'interval_95': intervals(errors),
        'pa_joint_mm': sides(*details.pa_joint_mm.double().nanmean(0).tolist()),
        'pa_vert_mm': sides(*details.pa_vert_mm.double().nanmean(0).tolist()),
        'pck': pck(errors.joints_mm),
        'per_joint_mm': joints,
        'per_finger_mm': fingers,
        'by_box_iou': binned(errors, details.box_iou, BOX_IOU_EDGES),
        'by_distance_mm': binned(errors, details.distance_mm, DISTANCE_EDGES),
        'by_visibility': by_visibility(errors, details.visible),
        'placement_mm': placement(details),
        'penetration': penetration(details.penetration_mm),
        'true_penetration': penetration(details.true_penetration_mm),
        'segmentation_iou': segmentation_iou(details),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def format_summary(summary: dict) -> str:
    """The lines that this field's evaluations print, in their order."""
    lines = []
    for key in PER_HAND:
        value, unit = summary[key], key[-2:]
        lines += [
            f'{TITLES[key]}:',
            '    ' + ', '.join(f'{side}: {value[side]:.6f} {unit}' for side in SIDES),
            f'    all: {value["all"]:.6f} {unit}',
        ]
    return '\n'.join([*lines, f'root error: {summary["root_mm"]:.6f} mm'])


def format_breakdown(summary: dict) -> str:
    """Intervals, stages and breakdowns of ``breakdown`` under the headline."""
    interval, auc = summary['interval_95'], summary['pck']['auc']
    rows = [(TITLES[key], interval[key]['all'], key[-2:]) for key in PER_HAND]
    rows.append((TITLES['root_mm'], interval['root_mm'], 'mm'))
    lines = [f'95 % intervals (bootstrap over {summary["frames"]} frames):']
    lines += [f'    {title + ":":24}{low:9.3f} to {high:9.3f} {unit}' for title, (low, high), unit in rows]
    lines.append(
        f'Procrustes-aligned: joint {summary["pa_joint_mm"]["all"]:.3f} mm, vert {summary["pa_vert_mm"]["all"]:.3f} mm'
    )
    lines.append(f'PCK area, 0 to 50 mm: left {auc["left"]:.4f}, right {auc["right"]:.4f}, all {auc["all"]:.4f}')
    lines.append(
        'by finger (mm):         '
        + ', '.join(f'{name} {value["all"]:.2f}' for name, value in summary['per_finger_mm'].items())
    )
    lines += ['by stage:               joint mm   vert mm  joint px   vert px   root mm']
    lines += [
        f'    {number:<20}' + ''.join(f'{value:10.3f}' for value in _all(stage))
        for number, stage in enumerate(summary['stages'])
    ]
    for title, key in (('box IoU', 'by_box_iou'), ('distance between the hands, mm', 'by_distance_mm')):
        lines.append(f'by {title}:')
        for row in summary[key]:
            upper = 'inf' if row['to'] is None else f'{row["to"]:g}'
            figures = (
                f'joint {row["joint_mm"]:.3f} mm, vert {row["vert_mm"]:.3f} mm, root {row["root_mm"]:.3f} mm'
                if row['frames']
                else '-'
            )
            lines.append(f'    {row["from"]:>5g} to {upper:5}{row["frames"]:>9,} frames: {figures}')
    lines.append('by visible share of a hand:')
    for row in summary['by_visibility']:
        figures = f'joint {row["joint_mm"]:.3f} mm, vert {row["vert_mm"]:.3f} mm' if row['hands'] else '-'
        lines.append(f'    {row["from"]:>5g} to {row["to"]:<5g}{row["hands"]:>9,} hands:  {figures}')
    place = summary['placement_mm']
    lines.append(
        f'{"place in the camera:":24}left {place["left"]:.1f} mm, right {place["right"]:.1f} mm, all '
        f'{place["all"]:.1f} mm, of which depth {place["depth"]:.1f} mm'
    )
    for title, key in (('penetration, predicted', 'penetration'), ('penetration, true', 'true_penetration')):
        value = summary[key]
        lines.append(
            f'{title + ":":24}{100 * value["share"]:.1f} % of frames, {value["mean_mm"]:.2f} mm deep on '
            f'average, {value["worst_mm"]:.2f} mm at worst'
        )
    if summary['segmentation_iou']:
        lines.append(
            'segmentation IoU:       '
            + ', '.join(f'{name} {value:.4f}' for name, value in summary['segmentation_iou'].items())
        )
    return '\n'.join(lines)


def format_grid(grid: list[dict]) -> str:
    """Several protocols side by side: one column each, from ``summarise``."""
    protocols = [summary['protocol'] for summary in grid]
    lines = [
        f'{"every protocol":36}' + ''.join(f'{"root " + str(p["root_joint"]):>12}' for p in protocols),
        ' ' * 36 + ''.join(f'{"scale on" if p["scale"] else "scale off":>12}' for p in protocols),
    ]
    for key in PER_HAND:
        for side in (*SIDES, 'all'):
            name = f'{TITLES[key]}, {side}'
            lines.append(f'{name:32}{key[-2:]:4}' + ''.join(f'{s[key][side]:12.3f}' for s in grid))
    lines.append(f'{TITLES["root_mm"]:32}mm  ' + ''.join(f'{s["root_mm"]:12.3f}' for s in grid))
    return '\n'.join(lines)


def _all(summary: dict) -> list[float]:
    return [*(summary[key]['all'] for key in PER_HAND), summary['root_mm']]
