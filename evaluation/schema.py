"""The structure of metrics.json, which comparisons and reports rely on."""

import math
from pathlib import Path
from typing import Any

from evaluation.confidence import JOINT_KINDS, WITHIN
from evaluation.figures import ERRORS, PRESENCE_SHARES
from evaluation.registry import headline
from utils.errors import UserError
from utils.hand import FINGERS, JOINT_NAMES

EVALUATE_AGAIN = 'Evaluate the run again with apps/eval_interhand.py --out.'
# Schema of metrics.json: NUMBER, FIGURE, a type, {key: schema} (more keys are allowed), [schema of every item],
# (schema of each item, ...).
NUMBER, FIGURE = 'a number', 'a number, or null if it was not measured'
SIDED = {'left': FIGURE, 'right': FIGURE, 'all': FIGURE}
HEADLINE = {metric.key: SIDED for metric in headline() if metric.per_hand} | {'root_mm': FIGURE}
PENETRATION = {'share': FIGURE, 'mean_mm': FIGURE, 'worst_mm': FIGURE}
JOINTS = {'joints': int, 'error_mm': FIGURE, 'deviation_mm': FIGURE}
SPARSIFICATION = {
    'count': int,
    **{name: [FIGURE] for name in ('deviation', 'residual_px', 'oracle')},
    'ause': dict.fromkeys(('deviation', 'residual_px', 'random'), FIGURE),
}
REQUIRED = {**HEADLINE, 'frames': int, 'data': str, 'protocol': {'name': str, 'description': str}}
OPTIONAL = {
    'subset': {'description': str},
    'config': dict,
    'training': dict,
    'stages': [HEADLINE],
    'interval_95': {
        name: {'all': (FIGURE, FIGURE)} if schema is SIDED else (FIGURE, FIGURE) for name, schema in HEADLINE.items()
    },
    'pa_joint_mm': SIDED,
    'pa_vert_mm': SIDED,
    'placement_mm': {**SIDED, 'depth': FIGURE},
    'pck': {'thresholds_mm': [NUMBER], 'left': [FIGURE], 'right': [FIGURE], 'auc': SIDED},
    'per_joint_mm': dict.fromkeys(JOINT_NAMES, SIDED),
    'per_finger_mm': dict.fromkeys(('wrist', *FINGERS), SIDED),
    'by_box_iou': [{'from': NUMBER, 'to': FIGURE, 'frames': int}],
    'by_distance_mm': [{'from': NUMBER, 'to': FIGURE, 'frames': int}],
    'by_visibility': [{'from': NUMBER, 'to': FIGURE, 'hands': int}],
    'penetration': PENETRATION,
    'true_penetration': PENETRATION,
    'segmentation_iou': dict.fromkeys(('background', 'left', 'right', 'hands'), FIGURE),
    'by_hands': dict.fromkeys(
        ('single', 'interacting', 'all', 'empty'), {'frames': int} | {keys[0]: FIGURE for keys in ERRORS.values()}
    ),
    'presence': {'average_precision': SIDED} | dict.fromkeys(PRESENCE_SHARES, FIGURE),
    'hidden_joints': dict.fromkeys(JOINT_KINDS, dict.fromkeys(('share', 'average_precision', 'accuracy'), FIGURE)),
    'by_joint_visibility': {'visible': JOINTS, 'hidden': JOINTS},
    'deviation': {
        **dict.fromkeys((*WITHIN, 'calibration'), FIGURE),
        'sparsification': {'removed': [NUMBER], 'joints': SPARSIFICATION, 'frames': SPARSIFICATION},
    },
}


def check_metrics(metrics: dict[str, Any], path: Path) -> None:
    """Raise UserError unless the content of a metrics.json has the structure that its readers rely on."""
    for key, schema in (REQUIRED | OPTIONAL).items():
        value = metrics.get(key)
        if not (matches(value, schema) or (value is None and key in OPTIONAL)):
            raise UserError(f'{path}: {key} is missing or malformed. {EVALUATE_AGAIN}')


def matches(value: Any, schema: Any) -> bool:
    if isinstance(schema, dict):
        return isinstance(value, dict) and all(key in value and matches(value[key], schema[key]) for key in schema)
    if isinstance(schema, list):
        return isinstance(value, list) and all(matches(item, schema[0]) for item in value)
    if isinstance(schema, tuple):
        return isinstance(value, list) and len(value) == len(schema) and all(map(matches, value, schema))
    if schema in (NUMBER, FIGURE):
        return (value is None and schema == FIGURE) or (isinstance(value, (int, float)) and math.isfinite(value))
    return isinstance(value, schema)
