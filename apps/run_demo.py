"""The whole pipeline on synthetic data: synthesize, prepare, train, evaluate, compare, report (``make demo``).

    python apps/run_demo.py [--out output/demo] [--frames TRAIN VAL TEST] [KEY VALUE ...]

Every step is the command for real data, printed before it runs. It ends with the errors of three predictions on the
same test images: the best constant, the network that it has trained, and the one that is shipped with the code, which
was trained for far longer. Rerun it to continue where it stopped.
"""

import argparse
import shlex
import sys
import time
from functools import reduce
from operator import getitem
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.stopping import STOP_SIGNALS, Stopped, check_stop, end_at_stop_signals, obey_stop_signals, run_passing_stops

if __name__ == '__main__':
    end_at_stop_signals()  # now: the imports below take seconds

from dataset.batch import build_batch_maker
from dataset.loader import evaluation_split
from evaluation.pictures import draw_samples, spread_over
from evaluation.registry import METRICS
from models.checkpoint import SHIPPED, load_model
from utils.config import load_config, refuse_pairs
from utils.errors import UserError, user_facing
from utils.files import read_json, write_json
from utils.ownership import owned

CONFIG = 'configs/demo.yaml'
FRAMES = (2400, 60, 200)
PICTURES = 8
STANDIN = 'the demo, which uses stand-in hands,'
SET_BY = {'OUTPUT_DIR': '--out', 'DATASET.PATH': '--out', 'MANO.SOURCE': STANDIN, 'MANO.PATH': STANDIN}
# Folder of each evaluation -> what it is called in the table.
ROWS = {'shipped': 'shipped network', 'trained': 'trained here, from scratch', 'baseline': 'best constant'}


@user_facing
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default='output/demo', help='output folder (default: %(default)s)')
    parser.add_argument(
        '--frames',
        type=int,
        nargs=3,
        default=FRAMES,
        metavar=('TRAIN', 'VAL', 'TEST'),
        help='number of synthetic images (default: %(default)s)',
    )
    parser.add_argument('opts', nargs='*', metavar='KEY VALUE', help='configuration keys over configs/demo.yaml')
    args = parser.parse_intermixed_args(argv)
    refuse_pairs(args.opts, SET_BY)
    load_config(ROOT / CONFIG, args.opts)  # now: a mistyped key must not show after minutes of synthesis

    out = Path(args.out)
    if Path.cwd() != ROOT:  # where the steps run
        out = out.absolute()
    with owned(out), obey_stop_signals():
        return run_demo(out, args)


def run_demo(out: Path, args: argparse.Namespace) -> int:
    raw, data, run = out / 'raw', out / 'data', out / 'run'
    config = ['--cfg', CONFIG]
    keys = ['DATASET.PATH', str(data), 'OUTPUT_DIR', str(run), *args.opts]
    hands = ['MANO.SOURCE', 'standin']
    seconds = {}

    def step(name: str, *command: str | int | Path) -> None:
        started = time.perf_counter()
        run_command(name, [str(part) for part in command])
        seconds[name] = round(time.perf_counter() - started, 1)

    step('synthesize', 'dataset/synthesize.py', '--save_path', raw, '--frames', *args.frames, *hands)
    step('prepare', 'dataset/interhand.py', '--data_path', raw, '--save_path', data, *hands)
    step('train', 'train.py', *config, '--resume', 'auto', *keys)
    step(
        'evaluate', 'apps/eval_interhand.py', '--data_path', data, '--model', run, '--out', out / 'trained', *args.opts
    )
    shipped: list[str | Path] = ['--model', SHIPPED.relative_to(ROOT), '--out', out / 'shipped']
    shipped += evaluation_keys(args.opts)
    step('evaluate the shipped network', 'apps/eval_interhand.py', '--data_path', data, *shipped)
    step('baseline', 'apps/eval_baseline.py', '--data_path', data, *config, '--out', out / 'baseline', *args.opts)
    step('report', 'apps/report.py', *(out / name for name in ROWS), '--out', out / 'report.html')

    results = {name: read_json(out / name / 'metrics.json') for name in ROWS}
    sheet = draw_test_samples(SHIPPED, data, evaluation_keys(args.opts), out / 'pictures.jpg')
    write_json(out / 'summary.json', results | {'seconds': seconds})
    print(
        f'\n{comparison_table(results)}\n\npictures: {sheet} (the shipped network)\n'
        f'summary:  {out / "summary.json"}\nreport:   {out / "report.html"} (open it in a browser)'
    )
    return 0


def run_command(name: str, command: list[str]) -> None:
    """Run one of the project's scripts as a user would, and pass stop signals on to it.

    Raises UserError if it fails, and ``Stopped`` if it was stopped; it has printed why.
    """
    print(f'\n== {name}\n$ python {shlex.join(command)}', flush=True)
    check_stop()
    code = run_passing_stops([sys.executable, *command], cwd=ROOT)
    check_stop()
    if code > 128 and code - 128 in STOP_SIGNALS:
        raise Stopped(code - 128)
    if code:
        raise UserError(
            f"The demo stopped at '{name}' (exit code {code}). Rerun it to continue from there, or run `make clean` "
            'to start afresh.'
        )


def evaluation_keys(opts: list[str]) -> list[str]:
    """Of KEY VALUE ..., those that concern a network which is trained already."""
    pairs = zip(opts[::2], opts[1::2])
    return [word for key, value in pairs if key == 'DEVICE' or key.startswith('EVAL.') for word in (key, value)]


def draw_test_samples(checkpoint: Path, data: Path, opts: list[str], path: Path) -> Path:
    """Write a sheet of test samples spread over the split."""
    model, cfg, _ = load_model(checkpoint, [*opts, 'DATASET.PATH', str(data)])
    batch_maker = build_batch_maker(cfg, model.hands)
    dataset = evaluation_split(cfg, 'test')
    draw_samples(model, dataset, spread_over(len(dataset), PICTURES), batch_maker, path=path)
    return path


def comparison_table(results: dict[str, dict]) -> str:
    """A row for each of ``ROWS``: the headline figures and the Procrustes-aligned joint error."""
    columns = [each.table for each in METRICS if each.table and (each.headline or each.key == 'pa_joint_mm')]
    first = results['trained']
    lines = [
        f'{first["frames"]} test frames; {first["protocol"]["description"]}',
        f'{"":28}' + ''.join(f'{column.title:>13}' for column in columns),
    ]
    for name, title in reversed(ROWS.items()):
        values = (reduce(getitem, column.keys, results[name]) for column in columns)
        lines.append(f'{title:28}' + ''.join(f'{value:>13.2f}' for value in values))
    return '\n'.join(lines)


if __name__ == '__main__':
    sys.exit(main())
