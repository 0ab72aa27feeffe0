"""The whole pipeline on synthetic data: synthesize, prepare, train, evaluate, compare, report (``make demo``).

    python apps/run_demo.py [--out output/demo] [--frames TRAIN VAL TEST] [KEY VALUE ...]

Every step is the command for real data, printed before it runs. Rerun it to continue where it stopped.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.batch import build_batch_maker
from dataset.loader import evaluation_split
from evaluation.pictures import draw_samples, spread_over
from evaluation.registry import headline
from models.checkpoint import load_model
from utils.errors import UserError, user_facing
from utils.files import read_json, write_json
from utils.ownership import owned
from utils.stopping import STOP_SIGNALS, Stopped, check_stop, obey_stop_signals, requested_stop

CONFIG = 'configs/demo.yaml'
FRAMES = (2400, 60, 200)
PICTURES = 8
POLL_S = 0.2


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

    out = Path(args.out)
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
    step('baseline', 'apps/eval_baseline.py', '--data_path', data, *config, '--out', out / 'baseline', *args.opts)
    step('report', 'apps/report.py', out / 'trained', out / 'baseline', '--out', out / 'report.html')

    trained, baseline = (read_json(out / name / 'metrics.json') for name in ('trained', 'baseline'))
    sheet = draw_test_samples(run, data, args.opts, out / 'pictures.jpg')
    write_json(out / 'summary.json', {'trained': trained, 'baseline': baseline, 'seconds': seconds})
    print(
        f'\n{comparison_table(trained, baseline)}\n\npictures: {sheet}\nsummary:  {out / "summary.json"}\n'
        f'report:   {out / "report.html"} (open it in a browser)'
    )
    return 0


def run_command(name: str, command: list[str]) -> None:
    """Run one of the project's scripts as a user would, and pass stop signals on to it.

    Raises UserError if it fails, and ``Stopped`` if it was stopped; it has printed why.
    """
    print(f'\n== {name}\n$ python {shlex.join(command)}', flush=True)
    check_stop()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    passed_on = False
    while process.poll() is None:
        try:
            process.wait(POLL_S)
        except subprocess.TimeoutExpired:
            number = requested_stop()
            if number is not None and not passed_on:  # once: a group's signal has reached it already
                process.send_signal(number)
                passed_on = True
    check_stop()
    code = process.returncode
    if code > 128 and code - 128 in STOP_SIGNALS:
        raise Stopped(code - 128)
    if code:
        raise UserError(
            f"The demo stopped at '{name}' (exit code {code}). Rerun it to continue from there, or run `make clean` "
            'to start afresh.'
        )


def draw_test_samples(run: Path, data: Path, opts: list[str], path: Path) -> Path:
    """Write a sheet of test samples spread over the split."""
    model, cfg, _ = load_model(run, [*opts, 'DATASET.PATH', str(data)])
    batch_maker = build_batch_maker(cfg, model.hands)
    dataset = evaluation_split(cfg, 'test')
    draw_samples(model, dataset, spread_over(len(dataset), PICTURES), batch_maker, path=path)
    return path


def comparison_table(trained: dict, baseline: dict) -> str:
    """The headline figures of both evaluations side by side, with their ratio."""
    lines = [
        f'{trained["frames"]} test frames; {trained["protocol"]["description"]}',
        f'{"":24}{"trained":>12}{"constant":>12}{"ratio":>8}',
    ]
    for metric in headline():
        ours, constant = (
            summary[metric.key]['all'] if metric.per_hand else summary[metric.key] for summary in (trained, baseline)
        )
        lines.append(
            f'{metric.title:24}{ours:>9.2f} {metric.unit}{constant:>9.2f} {metric.unit}{ours / constant:>8.2f}'
        )
    return '\n'.join(lines)


if __name__ == '__main__':
    sys.exit(main())
