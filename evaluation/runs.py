"""Evaluated runs: find and read their metrics.json, compare figures, list differing configuration keys."""

from pathlib import Path
from typing import Any, NamedTuple

from evaluation.registry import compared
from utils.errors import UserError
from utils.files import read_json

METRICS_VERSION = 1  # of metrics.json; increased when a figure changes its meaning
# Paths and settings of the run that do not change what is compared.
NOT_COMPARED = (
    'OUTPUT_DIR',
    'DEVICE',
    'DATASET.PATH',
    'DATASET.TOLERATED_DAMAGE',
    'MANO.PATH',
    'MODEL.BACKBONE_WEIGHTS',
    'EVAL.BATCH_SIZE',
    'TRAIN.CHECKPOINT',
    'TRAIN.RECOMPUTE_NORMS',
    'TRAIN.WORKERS',
    'EVAL.WORKERS',
    'TRAIN.SAVE_EVERY',
    'TRAIN.LOG_EVERY',
    'TRAIN.PICTURES',
    'TRAIN.VALIDATE_EVERY',
)
FIGURES = {column.title: column.keys for column in compared()}  # title -> path in metrics.json


class Run(NamedTuple):
    """One evaluated run."""

    name: str
    metrics: dict[str, Any]
    path: Path  # of its metrics.json

    @property
    def measured_on(self) -> str:
        """Protocol, frames and data: figures are comparable only if they share them."""
        protocol, subset = self.metrics['protocol'], self.metrics.get('subset')
        part = f', {subset["description"]}' if subset else ''
        return (
            f'protocol {protocol["name"]}: {protocol["description"]}; {self.metrics["frames"]} frames of '
            f'{self.metrics["data"]}{part}'
        )


def read_runs(paths: list[str]) -> list[Run]:
    """Read the metrics.json of every run; raises UserError if one is missing or has another version."""
    runs = []
    for given in paths:
        places = [Path(given), Path(given) / 'metrics.json', Path(given) / 'eval' / 'metrics.json']
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise UserError(
                f'There is no metrics.json in {given} or {given}/eval. Evaluate the run first: python '
                f'apps/eval_interhand.py --model {given} --out {given}/eval --data_path ...'
            )
        metrics = read_json(path)
        if not isinstance(metrics, dict) or metrics.get('version') != METRICS_VERSION:
            raise UserError(
                f'{path} is not a metrics.json of version {METRICS_VERSION}. Evaluate the run again with '
                'apps/eval_interhand.py.'
            )
        folder = path.parent.parent if path.parent.name == 'eval' else path.parent
        runs.append(Run(folder.name, metrics, path))
    if len({run.name for run in runs}) < len(runs):  # equal folder names: show the paths as typed
        runs = [run._replace(name=given) for run, given in zip(runs, paths)]
    return runs


def differences(run: Run, first: Run) -> str:
    """Configuration keys of ``run`` that differ from ``first``, with their values: 'MODEL.STAGES 1, ...'."""
    config, base = run.metrics.get('config') or {}, first.metrics.get('config') or {}
    return ', '.join(
        f'{key} {value}' for key, value in config.items() if key not in NOT_COMPARED and base.get(key) != value
    )


def figure(metrics: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """The value at a path of nested keys; None if it is missing."""
    value: Any = metrics
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def row(run: Run, first: Run) -> dict[str, Any]:
    """A row of the table of runs: column -> value, None if the run lacks the figure."""
    figures = {title: figure(run.metrics, keys) for title, keys in FIGURES.items()}
    return {
        'run': run.name,
        'differs in': differences(run, first),
        **figures,
        'seconds': figure(run.metrics, ('training', 'seconds')),
    }
