"""Runs side by side: one table out of the metrics.json of each, in Markdown and CSV.

    python apps/compare_runs.py RUN [RUN ...] [--out TABLE]

RUN is a metrics.json or a folder with one in it or in its eval/ (`apps/eval_interhand.py --out`). The first run is what
the others are compared with: "differs in" lists configuration keys. Figures of different protocols, frames or data
never share a table.
"""

import argparse
import csv
import io
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apps.eval_interhand import METRICS_VERSION
from utils.errors import UserError, user_facing
from utils.files import read_json, write_atomically

# Where things lie and how they are run: no part of what is compared.
NOT_COMPARED = ('OUTPUT_DIR', 'DEVICE', 'DATASET.PATH', 'MANO.PATH', 'MODEL.WEIGHTS', 'EVAL.BATCH_SIZE',
                'TRAIN.WORKERS', 'TRAIN.SAVE_EVERY', 'TRAIN.LOG_EVERY', 'TRAIN.PICTURES', 'TRAIN.VALIDATE_EVERY')
FIGURES = {
    'joint mm': ('joint_mm', 'all'), 'vert mm': ('vert_mm', 'all'), 'joint px': ('joint_px', 'all'),
    'vert px': ('vert_px', 'all'), 'root mm': ('root_mm',), 'PA joint mm': ('pa_joint_mm', 'all'),
    'PA vert mm': ('pa_vert_mm', 'all'), 'PCK area': ('pck', 'auc', 'all'),
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
        return (f'protocol {protocol["name"]}: {protocol["description"]}; {self.metrics["frames"]} frames of '
                f'{self.metrics["data"]}{part}')


@user_facing
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='run folder, evaluation folder or metrics.json')
    parser.add_argument('--out', metavar='TABLE', help='write TABLE.md and TABLE.csv')
    args = parser.parse_args(argv)

    runs = read_runs(args.runs)
    markdown = markdown_tables(runs)
    print(markdown)
    if args.out:
        base = Path(args.out).with_suffix('') if Path(args.out).suffix in ('.md', '.csv') else Path(args.out)
        write_atomically(base.with_name(f'{base.name}.md'), f'{markdown}\n'.encode())
        write_atomically(base.with_name(f'{base.name}.csv'), csv_table(runs).encode())
        print(f'\nwritten: {base}.md, {base}.csv')
    return 0


def read_runs(paths: list[str]) -> list[Run]:
    """Raises UserError for a run without metrics, or with metrics of another version."""
    runs = []
    for given in paths:
        places = [Path(given), Path(given) / 'metrics.json', Path(given) / 'eval' / 'metrics.json']
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise UserError(f'{given} holds no metrics.json, nor does {given}/eval: evaluate it first (python '
                            f'apps/eval_interhand.py --model {given} --out {given}/eval --data_path ...).')
        metrics = read_json(path)
        if not isinstance(metrics, dict) or metrics.get('version') != METRICS_VERSION:
            raise UserError(f'{path} is not a metrics.json of version {METRICS_VERSION}: evaluate the run again with '
                            'apps/eval_interhand.py.')
        folder = path.parent.parent if path.parent.name == 'eval' else path.parent
        runs.append(Run(folder.name, metrics, path))
    if len({run.name for run in runs}) < len(runs):  # the same last folder: show what was typed
        runs = [run._replace(name=given) for run, given in zip(runs, paths)]
    return runs


def differences(run: Run, first: Run) -> str:
    """'MODEL.STAGES 1, ...': configuration keys of ``run`` that are not as in ``first``."""
    config, base = run.metrics.get('config') or {}, first.metrics.get('config') or {}
    return ', '.join(f'{key} {value}' for key, value in config.items()
                     if key not in NOT_COMPARED and base.get(key) != value)


def row(run: Run, first: Run) -> dict[str, Any]:
    """Column -> value; None where a run has no such figure."""
    figures = {}
    for title, keys in FIGURES.items():
        value = run.metrics
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        figures[title] = value
    training = run.metrics.get('training') or {}
    return {'run': run.name, 'differs in': differences(run, first), **figures,
            'seconds': training.get('seconds')}


def markdown_tables(runs: list[Run]) -> str:
    """One table for each protocol and set of frames, its best figures in bold."""
    parts = []
    for measured_on in dict.fromkeys(run.measured_on for run in runs):
        rows = [row(run, runs[0]) for run in runs if run.measured_on == measured_on]
        best = {title: (max if title == 'PCK area' else min)(values) for title in FIGURES
                if len(values := [r[title] for r in rows if r[title] is not None]) > 1}
        lines = [f'{measured_on}\n', '| ' + ' | '.join(rows[0]) + ' |',
                 '|' + '|'.join('---' if title in ('run', 'differs in') else '---:' for title in rows[0]) + '|']
        lines += ['| ' + ' | '.join(_cell(title, value, best.get(title)) for title, value in r.items()) + ' |'
                  for r in rows]
        parts.append('\n'.join(lines))
    return '\n\n'.join(parts)


def _cell(title: str, value: Any, best: float | None) -> str:
    if value is None or value == '':
        return '–'
    if isinstance(value, str):
        return value
    text = f'{value:.0f}' if title == 'seconds' else f'{value:.4f}' if title == 'PCK area' else f'{value:.2f}'
    return f'**{text}**' if value == best else text


def csv_table(runs: list[Run]) -> str:
    """All runs, one row each, full precision, with what they were measured on."""
    rows = [row(run, runs[0]) | {'frames': run.metrics['frames'], 'measured on': run.measured_on} for run in runs]
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0], lineterminator='\n')
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


if __name__ == '__main__':
    sys.exit(main())
