"""Evaluated runs: find and read their metrics.json, compare figures, list differing configuration keys."""

from pathlib import Path
from typing import Any, NamedTuple

from evaluation.registry import compared
from evaluation.schema import check_metrics
from utils.errors import UserError
from utils.files import read_json

_DIGEST_SHOWN = 12  # characters
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
        """Protocol, frames and data, to show."""
        known = ', '.join(digest[:_DIGEST_SHOWN] for digest in self._digests)
        return f'{self._measured}{self.metrics["data"]}{self._part}{f" (digest {known})" if known else ""}'

    @property
    def comparable_by(self) -> str:
        """Equal for runs whose figures are comparable: the same protocol on the same frames, wherever the data lies."""
        return f'{self._measured}{" ".join(sorted(self._digests)) or self.metrics["data"]}{self._part}'

    @property
    def _measured(self) -> str:
        protocol = self.metrics['protocol']
        return f'protocol {protocol["name"]}: {protocol["description"]}; {self.metrics["frames"]} frames of '

    @property
    def _part(self) -> str:
        subset = self.metrics.get('subset')
        return f', {subset["description"]}' if subset else ''

    @property
    def _digests(self) -> list[str]:
        splits = figure(self.metrics, ('evaluated', 'data'))
        names = splits if isinstance(splits, dict) else {}
        return [digest for split in names for digest in data_digests(self.metrics, 'evaluated', split)]


def read_runs(paths: list[str]) -> list[Run]:
    """Read the metrics.json of every run; raises UserError if one is missing, malformed or of another version."""
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
        check_metrics(metrics, path)
        folder = path.parent.parent if path.parent.name == 'eval' else path.parent
        runs.append(Run(folder.name, metrics, path))
    if len({run.name for run in runs}) < len(runs):  # equal folder names: show the paths as typed
        runs = [run._replace(name=given) for run, given in zip(runs, paths)]
    return runs


def data_digests(metrics: dict[str, Any], what: str, split: str) -> list[str]:
    """Digests of the data sets in which a network was 'trained' or 'evaluated'; empty if they are not recorded."""
    recorded = figure(metrics, (what, 'data', split))
    sets = recorded if isinstance(recorded, list) else [recorded]
    return [str(each['digest']) for each in sets if isinstance(each, dict) and 'digest' in each]


def differences(run: Run, first: Run) -> str:
    """Configuration keys of ``run`` that differ from ``first``, with their values: 'MODEL.STAGES 1, ...'.

    And the training data, which the configuration of an evaluation no longer names.
    """
    config, base = run.metrics.get('config') or {}, first.metrics.get('config') or {}
    found = [f'{key} {value}' for key, value in config.items() if key not in NOT_COMPARED and base.get(key) != value]
    if config:
        found += [f'{key} not recorded' for key in base if key not in NOT_COMPARED and key not in config]
    own, other = (data_digests(each.metrics, 'trained', 'train') for each in (run, first))
    if own and other and own != other:
        found.append(f'training data (digest {", ".join(digest[:_DIGEST_SHOWN] for digest in own)})')
    return ', '.join(found)


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
