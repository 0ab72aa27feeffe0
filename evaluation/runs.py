"""Evaluated runs: finding and reading their metrics.json, what they can be compared by, and in what they differ."""

from pathlib import Path
from typing import Any, NamedTuple

from utils.errors import UserError
from utils.files import read_json

METRICS_VERSION = 1  # of metrics.json; raised when a figure changes its meaning
# Where things lie and how they are run: no part of what is compared.
NOT_COMPARED = (
    'OUTPUT_DIR',
    'DEVICE',
    'DATASET.PATH',
    'MANO.PATH',
    'MODEL.BACKBONE_WEIGHTS',
    'EVAL.BATCH_SIZE',
    'TRAIN.WORKERS',
    'EVAL.WORKERS',
    'TRAIN.SAVE_EVERY',
    'TRAIN.LOG_EVERY',
    'TRAIN.PICTURES',
    'TRAIN.VALIDATE_EVERY',
)
FIGURES = {
    'joint mm': ('joint_mm', 'all'),
    'vert mm': ('vert_mm', 'all'),
    'joint px': ('joint_px', 'all'),
    'vert px': ('vert_px', 'all'),
    'root mm': ('root_mm',),
    'PA joint mm': ('pa_joint_mm', 'all'),
    'PA vert mm': ('pa_vert_mm', 'all'),
    'PCK area': ('pck', 'auc', 'all'),
}


class Run(NamedTuple):
    """One evaluated run."""

    name: str
    metrics: dict[str, Any]
    path: Path  # of its metrics.json

    @property
    def measured_on(self) -> str:
        """What figures must share to be comparable."""
        protocol, subset = self.metrics['protocol'], self.metrics.get('subset')
        part = f', {subset["description"]}' if subset else ''
        return (
            f'protocol {protocol["name"]}: {protocol["description"]}; {self.metrics["frames"]} frames of '
            f'{self.metrics["data"]}{part}'
        )


def read_runs(paths: list[str]) -> list[Run]:
    """Raises UserError for a run without metrics, or with metrics of another version."""
    runs = []
    for given in paths:
        places = [Path(given), Path(given) / 'metrics.json', Path(given) / 'eval' / 'metrics.json']
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise UserError(
                f'{given} holds no metrics.json, nor does {given}/eval: evaluate it first (python '
                f'apps/eval_interhand.py --model {given} --out {given}/eval --data_path ...).'
            )
        metrics = read_json(path)
        if not isinstance(metrics, dict) or metrics.get('version') != METRICS_VERSION:
            raise UserError(
                f'{path} is not a metrics.json of version {METRICS_VERSION}: evaluate the run again with '
                'apps/eval_interhand.py.'
            )
        folder = path.parent.parent if path.parent.name == 'eval' else path.parent
        runs.append(Run(folder.name, metrics, path))
    if len({run.name for run in runs}) < len(runs):  # the same last folder: show what was typed
        runs = [run._replace(name=given) for run, given in zip(runs, paths)]
    return runs


def differences(run: Run, first: Run) -> str:
    """'MODEL.STAGES 1, ...': configuration keys of ``run`` that are not as in ``first``."""
    config, base = run.metrics.get('config') or {}, first.metrics.get('config') or {}
    return ', '.join(
        f'{key} {value}' for key, value in config.items() if key not in NOT_COMPARED and base.get(key) != value
    )


def figure(metrics: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """The value that ``keys`` lead to, one inside the other; None where there is none."""
    for key in keys:
        metrics = metrics.get(key) if isinstance(metrics, dict) else None
    return metrics


def row(run: Run, first: Run) -> dict[str, Any]:
    """Column -> value; None where a run has no such figure."""
    figures = {title: figure(run.metrics, keys) for title, keys in FIGURES.items()}
    return {
        'run': run.name,
        'differs in': differences(run, first),
        **figures,
        'seconds': figure(run.metrics, ('training', 'seconds')),
    }
