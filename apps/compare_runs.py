"""Compare runs: one table from their metrics.json files, in Markdown and CSV.

    python apps/compare_runs.py RUN [RUN ...] [--out TABLE]

RUN is a metrics.json, or a folder that has one in it or in its eval/ (`apps/eval_interhand.py --out`). "differs in"
lists the configuration keys and training data in which a run differs from the first. Figures of different protocols,
frames or data never share a table.
"""

import argparse
import csv
import io
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.registry import compared
from evaluation.runs import Run, read_runs, row
from utils.errors import UserError, user_facing
from utils.files import write_atomically

COLUMNS = {column.title: column for column in compared()}


@user_facing
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='run folder, evaluation folder or metrics.json')
    parser.add_argument('--out', metavar='TABLE', help='write TABLE.md and TABLE.csv')
    args = parser.parse_args(argv)

    base = Path(args.out or 'runs')
    base = base.with_suffix('') if base.suffix in ('.md', '.csv') else base
    if base.name in ('', '..'):
        raise UserError(f'--out {args.out} is a folder. Pass the name of the table in it, e.g. {base / "runs"}.')
    runs = read_runs(args.runs)
    markdown = markdown_tables(runs)
    print(markdown)
    if args.out:
        write_atomically(base.with_name(f'{base.name}.md'), f'{markdown}\n'.encode())
        write_atomically(base.with_name(f'{base.name}.csv'), csv_table(runs).encode())
        print(f'\nwritten: {base}.md, {base}.csv')
    return 0


def markdown_tables(runs: list[Run]) -> str:
    """One table per protocol and set of frames, with the best figures in bold."""
    parts = []
    for comparable_by in dict.fromkeys(run.comparable_by for run in runs):
        group = [run for run in runs if run.comparable_by == comparable_by]
        rows = [row(run, runs[0]) for run in group]
        best = {
            title: column.best(values)
            for title, column in COLUMNS.items()
            if len(values := [r[title] for r in rows if r[title] is not None]) > 1
        }
        lines = [
            f'{group[0].measured_on}\n',
            '| ' + ' | '.join(rows[0]) + ' |',
            '|' + '|'.join('---' if title in ('run', 'differs in') else '---:' for title in rows[0]) + '|',
        ]
        lines += [
            '| ' + ' | '.join(_cell(title, value, best.get(title)) for title, value in r.items()) + ' |' for r in rows
        ]
        parts.append('\n'.join(lines))
    return '\n\n'.join(parts)


def _cell(title: str, value: Any, best: float | None) -> str:
    if value is None or value == '':
        return '–'
    if isinstance(value, str):
        return value
    text = f'{value:.{COLUMNS[title].digits if title in COLUMNS else 0}f}'
    return f'**{text}**' if value == best else text


def csv_table(runs: list[Run]) -> str:
    """One row per run in full precision, with protocol, frames and data."""
    rows = [row(run, runs[0]) | {'frames': run.metrics['frames'], 'measured on': run.measured_on} for run in runs]
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0], lineterminator='\n')
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


if __name__ == '__main__':
    sys.exit(main())
