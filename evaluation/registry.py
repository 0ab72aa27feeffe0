"""The registry of metrics: one entry drives metrics.json, per_sample.csv, the console and the table of runs.

To add a metric, add an entry to ``METRICS`` and its definition to docs/protocols.md. The order of the entries is the
order everywhere.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor

from evaluation.aggregation import (
    BOX_IOU_EDGES,
    DISTANCE_EDGES,
    Samples,
    binned,
    by_hands,
    by_joint,
    by_visibility,
    mean,
    mean_joint_error,
    pck,
    penetration,
    placement,
    segmentation_iou,
    some_absent,
)
from evaluation.comparison import Comparison
from evaluation.confidence import WITHIN, by_joint_visibility, deviations, hidden_joints, presence
from utils.hand import SIDES


class TableColumn(NamedTuple):
    """How the table of runs shows a metric."""

    title: str
    keys: tuple[str, ...]  # the path to the value in metrics.json
    digits: int = 2
    higher_is_better: bool = False

    def best(self, values: Iterable[float]) -> float:
        """The best of several runs' values."""
        return max(values) if self.higher_is_better else min(values)


def _always(samples: Samples) -> bool:
    return True


class Metric(NamedTuple):
    """How one metric is measured, aggregated and shown. Every part is optional but the key."""

    key: str  # in metrics.json
    title: str = ''  # on the console
    unit: str = ''
    # A batch's values: (B,), (B, 2, ...); NaN: missing; None: the network or the data lack them altogether.
    measure: Callable[[Comparison], Tensor | None] | None = None
    column: str = ''  # of the measured values, if it is not the key
    per_hand: bool = False  # the values are (B, 2), the figure is {'left', 'right', 'all'}
    headline: bool = False  # depends on the protocol: measured for every stage and every protocol, and printed first
    in_csv: bool = True  # per_sample.csv has the measured values
    in_json: bool = True  # metrics.json has the figure
    applies: Callable[[Samples], bool] = _always  # only then do metrics.json, per_sample.csv and the console have it
    aggregate: Callable[[Samples], Any] | None = None  # samples -> figure; by default the mean over frames
    lines: Callable[[dict[str, Any]], list[str]] | None = None  # metrics.json -> console lines; by default the figure
    table: TableColumn | None = None  # None: not in the table of runs

    @property
    def name(self) -> str:
        """The column of the measured values."""
        return self.column or self.key

    def figure(self, samples: Samples) -> Any:
        """The value in metrics.json, if the metric applies."""
        return self.aggregate(samples) if self.aggregate else mean(samples[self.name])

    def csv_columns(self, samples: Samples) -> dict[str, Tensor]:
        """Columns of per_sample.csv: header -> (N,)."""
        if self.name not in samples or not self.applies(samples):
            return {}
        values = samples[self.name]
        if not self.per_hand:
            return {self.name: values}
        return {f'{self.name}_{side}': values[:, hand] for hand, side in enumerate(SIDES)}

    def console_lines(self, summary: dict[str, Any]) -> list[str]:
        """The lines below the headline that print the figure, if the metric applied."""
        if self.in_json and self.key not in summary:
            return []
        if self.lines:
            return self.lines(summary)
        value = summary[self.key]
        figures = [f'{side} {value[side]:.3f}' for side in value] if isinstance(value, dict) else [f'{value:.3f}']
        return [f'{self.title + ":":24}' + ', '.join(f'{figure} {self.unit}'.rstrip() for figure in figures)]


def error(
    key: str, title: str, unit: str, *, per_hand: bool = True, aggregate: Callable[[Samples], Any] | None = None
) -> Metric:
    """An error of ``sample_errors`` as a headline metric."""
    return Metric(
        key,
        title,
        unit,
        measure=lambda comparison: comparison.errors[key],
        per_hand=per_hand,
        headline=True,
        aggregate=aggregate,
        table=TableColumn(key.replace('_', ' '), (key, 'all') if per_hand else (key,)),
    )


def hidden(key: str, measure: Callable[[Comparison], Tensor | None], *, headline: bool = False) -> Metric:
    """Measured values that only serve to aggregate other metrics."""
    return Metric(key, measure=measure, headline=headline, in_csv=False, in_json=False, lines=_no_lines)


def covariate(
    key: str,
    measure: Callable[[Comparison], Tensor],
    *,
    per_hand: bool = False,
    applies: Callable[[Samples], bool] = _always,
) -> Metric:
    """A property of each frame or hand that is in per_sample.csv but has no mean of its own."""
    return Metric(key, measure=measure, per_hand=per_hand, applies=applies, in_json=False, lines=_no_lines)


# ---------------------------------------------------------------------------------------------------------------------
# Console lines
# ---------------------------------------------------------------------------------------------------------------------


def _no_lines(summary: dict[str, Any]) -> list[str]:
    return []


def _procrustes_lines(summary: dict[str, Any]) -> list[str]:
    joint, vert = summary['pa_joint_mm']['all'], summary['pa_vert_mm']['all']
    return [f'Procrustes-aligned: joint {joint:.3f} mm, vert {vert:.3f} mm']


def _pck_lines(summary: dict[str, Any]) -> list[str]:
    areas = ', '.join(f'{side} {area:.4f}' for side, area in summary['pck']['auc'].items())
    return [f'PCK area, 0 to 50 mm: {areas}']


def _finger_lines(summary: dict[str, Any]) -> list[str]:
    fingers = ', '.join(f'{name} {value["all"]:.2f}' for name, value in summary['per_finger_mm'].items())
    return [f'{"by finger (mm):":24}{fingers}']


def _stage_lines(summary: dict[str, Any]) -> list[str]:
    stages = [
        {key: value for key, value in stage.items() if key not in ('frames', 'protocol')} for stage in summary['stages']
    ]
    lines = [f'{"by stage:":22}' + ''.join(f'{key.replace("_", " "):>10}' for key in stages[0])]
    for number, stage in enumerate(stages):
        values = (value['all'] if isinstance(value, dict) else value for value in stage.values())
        lines.append(f'    {number:<20}' + ''.join(f'{value:10.3f}' for value in values))
    return lines


def _bin_lines(title: str, key: str) -> Callable[[dict[str, Any]], list[str]]:
    def lines(summary: dict[str, Any]) -> list[str]:
        printed = [f'by {title}:']
        for row in summary[key]:
            upper = 'inf' if row['to'] is None else f'{row["to"]:g}'
            figures = ', '.join(
                f'{name} {row[f"{name}_mm"]:.3f} mm' for name in ('joint', 'vert', 'root') if f'{name}_mm' in row
            )
            counted = f'{row["frames"]:>9,} frames: ' if 'frames' in row else f'{row["hands"]:>9,} hands:  '
            printed.append(f'    {row["from"]:>5g} to {upper:5}{counted}{figures or "-"}')
        return printed

    return lines


def _placement_lines(summary: dict[str, Any]) -> list[str]:
    place = summary['placement_mm']
    hands = ', '.join(f'{side} {place[side]:.1f} mm' for side in (*SIDES, 'all'))
    return [f'{"place in the camera:":24}{hands}, of which depth {place["depth"]:.1f} mm']


def _penetration_lines(title: str, key: str) -> Callable[[dict[str, Any]], list[str]]:
    def lines(summary: dict[str, Any]) -> list[str]:
        value = summary[key]
        if math.isnan(value['share']):
            return []
        return [
            f'{title + ":":24}{100 * value["share"]:.1f} % of frames, {value["mean_mm"]:.2f} mm deep on average, '
            f'{value["worst_mm"]:.2f} mm at worst'
        ]

    return lines


def _segmentation_lines(summary: dict[str, Any]) -> list[str]:
    if not summary['segmentation_iou']:
        return []
    classes = ', '.join(f'{name} {value:.4f}' for name, value in summary['segmentation_iou'].items())
    return [f'{"segmentation IoU:":24}{classes}']


def _hands_lines(summary: dict[str, Any]) -> list[str]:
    lines = ['by hands in the frame:']
    for name, row in summary['by_hands'].items():
        errors = [f'{error} {row[f"{error}_mm"]:.3f} mm' for error in ('joint', 'vert', 'root') if _known(row, error)]
        lines.append(f'    {name:15}{row["frames"]:>9,} frames: {", ".join(errors) or "-"}')
    return lines


def _known(row: dict[str, Any], error: str) -> bool:
    return not math.isnan(row[f'{error}_mm'])


def _presence_lines(summary: dict[str, Any]) -> list[str]:
    figures = summary['presence']
    if figures is None:
        return [f'{"presence:":24}not predicted (MODEL.PRESENCE is off), though some frames lack a hand']
    precision = ', '.join(
        f'{side} {value:.4f}' for side, value in figures['average_precision'].items() if not math.isnan(value)
    )
    shares = ', '.join(
        f'{title} {100 * figures[key]:.1f} %'
        for title, key in (
            ('handedness', 'handedness_accuracy'),
            ('side of a single hand', 'side_accuracy'),
            ('false alarms on empty frames', 'false_alarms'),
        )
        if not math.isnan(figures[key])
    )
    lines = {'presence, AP:': precision, 'presence:': shares}
    return [f'{title:24}{text}' for title, text in lines.items() if text]


def _hidden_lines(summary: dict[str, Any]) -> list[str]:
    lines = ['hidden joints:']
    for kind, value in summary['hidden_joints'].items():
        precision = value['average_precision']
        ranked = '' if math.isnan(precision) else f', AP {precision:.4f}'
        lines.append(
            f'    {kind.replace("_", " "):20}{100 * value["share"]:5.1f} % hidden{ranked}, '
            f'accuracy {100 * value["accuracy"]:.1f} %'
        )
    return lines


def _joint_visibility_lines(summary: dict[str, Any]) -> list[str]:
    rows = summary['by_joint_visibility'].items()
    return [
        f'{f"{name} joints:":24}error {row["error_mm"]:.3f} mm, predicted deviation {row["deviation_mm"]:.3f} mm'
        for name, row in rows
    ]


def _deviation_lines(summary: dict[str, Any]) -> list[str]:
    figures = summary['deviation']
    shares = ', '.join(
        f'{100 * figures[key]:.1f} % of coordinates within {times} ({100 * expected:.1f} % expected)'
        for times, (key, expected) in enumerate(WITHIN.items(), 1)
    )
    lines = [f'{"deviation:":24}{shares}; calibration factor {figures["calibration"]:.3f}']
    for what in ('joints', 'frames'):
        areas = ', '.join(f'{name} {area:.4f}' for name, area in figures['sparsification'][what]['ause'].items())
        lines.append(f'{f"sparsification, {what}:":24}AUSE {areas}')
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# The registry
# ---------------------------------------------------------------------------------------------------------------------

METRICS: tuple[Metric, ...] = (
    error('joint_mm', 'joint mean error', 'mm', aggregate=mean_joint_error),
    error('vert_mm', 'vert mean error', 'mm'),
    error('joint_px', 'pixel joint mean error', 'px'),
    error('vert_px', 'pixel vert mean error', 'px'),
    error('root_mm', 'root error', 'mm', per_hand=False),
    hidden('joints_mm', lambda comparison: comparison.errors['joints_mm'], headline=True),
    Metric(
        'pa_joint_mm',
        'Procrustes-aligned joint error',
        'mm',
        measure=lambda comparison: comparison.procrustes[0],
        per_hand=True,
        lines=_procrustes_lines,
        table=TableColumn('PA joint mm', ('pa_joint_mm', 'all')),
    ),
    Metric(
        'pa_vert_mm',
        'Procrustes-aligned vert error',
        'mm',
        measure=lambda comparison: comparison.procrustes[1],
        per_hand=True,
        lines=_no_lines,  # printed with the joints
        table=TableColumn('PA vert mm', ('pa_vert_mm', 'all')),
    ),
    Metric(
        'pck',
        aggregate=lambda samples: pck(samples['joints_mm']),
        lines=_pck_lines,
        table=TableColumn('PCK area', ('pck', 'auc', 'all'), digits=4, higher_is_better=True),
    ),
    Metric('per_joint_mm', aggregate=lambda samples: by_joint(samples['joints_mm'])[0], lines=_no_lines),
    Metric('per_finger_mm', aggregate=lambda samples: by_joint(samples['joints_mm'])[1], lines=_finger_lines),
    Metric('stages', in_json=False, lines=_stage_lines),  # the figures are those of the headline, stage by stage
    Metric(
        'by_box_iou',
        aggregate=lambda samples: binned(samples, samples['box_iou'], BOX_IOU_EDGES),
        lines=_bin_lines('box IoU', 'by_box_iou'),
    ),
    Metric(
        'by_distance_mm',
        aggregate=lambda samples: binned(samples, samples['distance_mm'], DISTANCE_EDGES),
        lines=_bin_lines('distance between the hands, mm', 'by_distance_mm'),
    ),
    Metric(
        'by_visibility',
        aggregate=lambda samples: by_visibility(samples, samples['visible']),
        lines=_bin_lines('visible share of a hand', 'by_visibility'),
    ),
    Metric(
        'placement_mm',
        measure=lambda comparison: comparison.placement_mm[0],
        per_hand=True,
        aggregate=lambda samples: placement(samples['placement_mm'], samples['placement_depth_mm']),
        lines=_placement_lines,
    ),
    hidden('placement_depth_mm', lambda comparison: comparison.placement_mm[1]),
    covariate('visible', lambda comparison: comparison.visible, per_hand=True),
    covariate('box_iou', lambda comparison: comparison.box_iou),
    covariate('distance_mm', lambda comparison: comparison.distance_mm),
    Metric(
        'penetration',
        measure=lambda comparison: comparison.penetration_mm[0],
        column='penetration_mm',
        aggregate=lambda samples: penetration(samples['penetration_mm']),
        lines=_penetration_lines('penetration, predicted', 'penetration'),
    ),
    Metric(
        'true_penetration',
        measure=lambda comparison: comparison.penetration_mm[1],
        column='true_penetration_mm',
        aggregate=lambda samples: penetration(samples['true_penetration_mm']),
        lines=_penetration_lines('penetration, true', 'true_penetration'),
    ),
    Metric(
        'segmentation_iou',
        aggregate=lambda samples: segmentation_iou(samples['seg_intersection'], samples['seg_union']),
        lines=_segmentation_lines,
    ),
    hidden('seg_intersection', lambda comparison: comparison.segmentation[0]),
    hidden('seg_union', lambda comparison: comparison.segmentation[1]),
    Metric('by_hands', applies=some_absent, aggregate=by_hands, lines=_hands_lines),
    covariate('present', lambda comparison: comparison.present, per_hand=True, applies=some_absent),
    Metric(
        'presence',
        measure=lambda comparison: comparison.presence,
        per_hand=True,
        applies=lambda samples: 'presence' in samples or some_absent(samples),
        aggregate=lambda samples: presence(samples['presence'], samples['present']) if 'presence' in samples else None,
        lines=_presence_lines,
    ),
    Metric(
        'hidden_joints',
        applies=lambda samples: 'visible_logit' in samples,
        aggregate=lambda samples: hidden_joints(samples['visible_logit'], samples['joint_visible']),
        lines=_hidden_lines,
    ),
    Metric(
        'by_joint_visibility',
        applies=lambda samples: 'visible_logit' in samples,
        aggregate=by_joint_visibility,
        lines=_joint_visibility_lines,
    ),
    Metric(
        'deviation', applies=lambda samples: 'deviation_mm' in samples, aggregate=deviations, lines=_deviation_lines
    ),
    hidden('deviation_mm', lambda comparison: comparison.deviation_mm),
    hidden('coordinates_mm', lambda comparison: comparison.coordinates_mm),
    hidden('residual_px', lambda comparison: comparison.residual_px),
    hidden('visible_logit', lambda comparison: comparison.visible_logit),
    hidden('joint_visible', lambda comparison: comparison.joint_visible),
)


def measured(metrics: tuple[Metric, ...], comparison: Comparison) -> Samples:
    """The values of a batch: column -> (B, ...), without those that the network or the data lack."""
    values = {metric.name: metric.measure(comparison) for metric in metrics if metric.measure}
    return {name: value for name, value in values.items() if value is not None}


def headline(metrics: tuple[Metric, ...] = METRICS) -> tuple[Metric, ...]:
    """The metrics that are measured for every stage and protocol and have a figure."""
    return tuple(metric for metric in metrics if metric.headline and metric.in_json)


def compared(metrics: tuple[Metric, ...] = METRICS) -> list[TableColumn]:
    """Columns of the table of runs."""
    return [metric.table for metric in metrics if metric.table]
