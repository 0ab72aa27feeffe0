"""Compare training recipes on synthetic data: equal samples, steps and seeds, one change at a time, paired.

    python dataset/synthesize.py --save_path RAW --frames 2400 400 0 MANO.SOURCE standin
    python dataset/interhand.py --data_path RAW --save_path DATA MANO.SOURCE standin
    python benchmarks/recipe.py --data DATA --out FOLDER [--seeds 0 1 2] [--only NAME ...] [--jobs 2] [KEY VALUE ...]

Trains configs/recipes/small.yaml (the published recipe at a size for a CPU), the same with each further file of that
folder, and with configs/dir_interhand_tuned.yaml, each with every seed; KEY VALUE pairs change all of them. The error
is that of the last validation. A change's effect is its error over the published recipe's with the same seed; the
interval is Student's over the seeds. Runs are in FOLDER/NAME-SEED; a rerun continues what is unfinished, and refuses
runs with another configuration or other data.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple, cast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import utils  # noqa: F401  # before PyTorch, see there
from dataset.identity import check_data_identity, data_identity
from dataset.loader import evaluation_split, training_loader
from dataset.prepared import PreparedSplit
from models.checkpoint import to_plain
from utils.config import FREE_KEYS, changed_keys, load_config, numbers_and_pairs, refuse_pairs, split_off_pairs
from utils.errors import UserError, user_facing
from utils.files import read_json, write_atomically, write_json
from utils.ownership import owned
from utils.stopping import check_stop, obey_stop_signals, requested_stop, run_passing_stops
from utils.training import LOG_NAME, read_records

SMALL = ROOT / 'configs/recipes/small.yaml'
TUNED = ROOT / 'configs/dir_interhand_tuned.yaml'
PUBLISHED = 'published'
RESULT = 'result.json'  # in a finished run's folder
FIGURES = ('joint_mm_all', 'joint_px_all', 'root_mm')
# Of 1, 2, ... degrees of freedom: see student().
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Effect(NamedTuple):
    """Relative change of an error over seeds: mean and half width of its 95 % interval (NaN for one seed)."""

    mean: float
    half_width: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return abs(self.mean) > self.half_width


def recipes() -> dict[str, list[Path]]:
    """Name -> its configuration files, later ones override earlier ones."""
    changes = sorted(set(SMALL.parent.glob('*.yaml')) - {SMALL})
    return {PUBLISHED: [SMALL], **{path.stem: [SMALL, path] for path in changes}, 'tuned': [SMALL, TUNED]}


def identify(path: str, keys: list[str]) -> dict[str, Any]:
    """Identities of the data's splits. Raises UserError if one is missing or cannot be read."""
    cfg = load_config(SMALL, ['DATASET.PATH', path, *keys])
    loader, _ = training_loader(cfg)
    return {
        'train': data_identity(cast(PreparedSplit, loader.dataset)),
        'val': data_identity(evaluation_split(cfg, 'val')),
    }


def check_finished(path: Path, configuration: dict[str, Any], data: dict[str, Any]) -> None:
    """Raise UserError if a finished run's RESULT belongs to another configuration or to other data."""
    finished = read_json(path)
    try:
        free = {*FREE_KEYS} - {'EVAL.PRECISION'}
        changed = changed_keys(finished['configuration'], configuration, free=free)
        before = finished['data']
        if changed:
            raise UserError(f'{path} belongs to another configuration ({"; ".join(changed)}).')
        for split, identity in data.items():
            check_data_identity(before[split], identity, split=split, path=path)
    except (TypeError, KeyError):
        raise UserError(f'{path} is not the result of a run. Choose another --out or remove {path.parent}.') from None
    except UserError as error:
        raise UserError(f'{error} Choose another --out or remove {path.parent}.') from None


def train(folder: Path, files: list[Path], keys: list[str], data: dict[str, Any]) -> None:
    """Run train.py to its end, continuing where it stopped, and write RESULT.

    Raises UserError if it fails, or if the folder holds the result of another configuration or of other data.
    """
    configuration = to_plain(load_config([*files], keys))
    if (folder / RESULT).exists():
        check_finished(folder / RESULT, configuration, data)
        return
    command = [sys.executable, ROOT / 'train.py', '--resume', 'auto']
    command += [word for path in files for word in ('--cfg', path)]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'console.txt', 'a') as console:
        # A session of its own: Ctrl-C reaches it once, from here.
        code = run_passing_stops(
            [*map(str, command), *keys],
            stdout=console,
            stderr=subprocess.STDOUT,
            env={'OMP_NUM_THREADS': '1', **os.environ},
            start_new_session=True,
        )
    if code == 0:
        write_json(folder / RESULT, result(folder) | {'configuration': configuration, 'data': data})
    elif requested_stop() is None:
        raise UserError(f'{folder.name} failed (exit code {code}); see {folder / "console.txt"}.')


def result(folder: Path) -> dict:
    """Errors of every stage at every validation, from the run's log; None for one that the split does not have.

    Raises UserError if no frame of the split shows a hand.
    """
    records = [record for _, record in read_records(folder / LOG_NAME)]
    rates = [record['samples_per_second'] for record in records if record['kind'] == 'train']
    curve: dict[int, list[dict]] = {}
    for record in records:
        if record['kind'].startswith('val_stage') and 'joint_mm_all' in record:
            curve.setdefault(record['step'], []).append(record)
    if not curve:
        raise UserError(f'The runs cannot be compared: no frame of the split val shows a hand ({folder / LOG_NAME}).')
    return {
        'samples_per_second': statistics.median(rates) if rates else None,  # no step of a short run is logged
        'curve': [
            {'step': step, **{key: [stage.get(key) for stage in stages] for key in FIGURES}}
            for step, stages in sorted(curve.items())
        ],
    }


def effect(errors: list[float], published: list[float]) -> Effect:
    """Errors per seed against the published recipe's with the same seeds."""
    ratios = [ours / theirs - 1 for ours, theirs in zip(errors, published, strict=True)]
    if len(ratios) < 2:
        return Effect(ratios[0], math.nan)
    half_width = student(len(ratios) - 1) * statistics.stdev(ratios) / math.sqrt(len(ratios))
    return Effect(statistics.mean(ratios), half_width)


def student(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's distribution; many degrees of freedom: Abramowitz & Stegun 26.7.5."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def table(results: dict[str, dict[int, dict]], batch: int) -> str:
    """Markdown: each recipe's errors and effect, then the course of the published and the tuned one."""
    head = [
        'recipe',
        'seeds',
        'joint mm',
        'change',
        '95 % interval',
        'stages, mm',
        'pixel joint',
        'root mm',
        'samples/s',
    ]
    lines = [f'| {" | ".join(head)} |', '|---|' + '---:|' * (len(head) - 1)]
    for name, runs in results.items():
        seeds = sorted(runs.keys() & results[PUBLISHED].keys())
        if not seeds:
            continue
        last = {seed: runs[seed]['curve'][-1] for seed in seeds}
        joint = [last[seed]['joint_mm_all'][-1] for seed in seeds]
        own = effect(joint, [results[PUBLISHED][seed]['curve'][-1]['joint_mm_all'][-1] for seed in seeds])
        interval = '' if math.isnan(own.half_width) else f'± {100 * own.half_width:.1f} %'
        stages = zip(*(last[seed]['joint_mm_all'] for seed in seeds))
        cells = [
            name,
            str(len(seeds)),
            f'{statistics.mean(joint):.2f}',
            '' if name == PUBLISHED else f'{"**" * own.clear}{100 * own.mean:+.1f} %{"**" * own.clear}',
            '' if name == PUBLISHED else interval,
            ' → '.join(f'{statistics.mean(stage):.1f}' for stage in stages),
            *(mean_cell([last[seed][key][-1] for seed in seeds]) for key in FIGURES[1:]),
            mean_cell([runs[seed]['samples_per_second'] for seed in seeds]),
        ]
        lines.append(f'| {" | ".join(cells)} |')
    courses = [name for name in (PUBLISHED, 'tuned') if results.get(name)]
    lines += [
        '',
        f'| samples | {" | ".join(f"{name}, joint mm" for name in courses)} |',
        '|---:|' + '---:|' * len(courses),
    ]
    for points in zip(*(zip(*(run['curve'] for run in results[name].values())) for name in courses)):
        means = [statistics.mean(point['joint_mm_all'][-1] for point in seeds) for seeds in points]
        lines.append(f'| {points[0][0]["step"] * batch:,} | {" | ".join(f"{mean:.2f}" for mean in means)} |')
    return '\n'.join(lines)


def mean_cell(values: list[float | None]) -> str:
    """Of the known ones."""
    known = [value for value in values if value is not None]
    return f'{statistics.mean(known):.1f}' if known else ''


@user_facing
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, metavar='DATA', help='prepared or packed data set with train and val')
    parser.add_argument('--out', required=True, type=Path, metavar='FOLDER', help='runs, recipe.json and recipe.md')
    parser.add_argument('--seeds', nargs='+', default=['0', '1', '2'], metavar='SEED', help='default: 0 1 2')
    names = f'of {", ".join(recipes())} (default: all)'
    parser.add_argument('--only', nargs='+', default=[], metavar='NAME', help=names)
    parser.add_argument(
        '--jobs', type=int, default=1, help='trainings at a time, one thread each (default: %(default)s)'
    )
    parser.add_argument('opts', nargs='*', metavar='KEY VALUE', help='configuration keys of all runs')
    args = parser.parse_intermixed_args(argv)
    known, opts = recipes(), args.opts
    only, more = split_off_pairs(args.only)
    seeds, pairs = numbers_and_pairs(args.seeds, int, '--seeds')
    seeds, opts = list(dict.fromkeys(seeds)), [*more, *pairs, *opts]
    refuse_pairs(opts, {'DATASET.PATH': '--data', 'OUTPUT_DIR': '--out', 'SEED': '--seeds'})
    if unknown := [name for name in only if name not in known]:
        raise UserError(f'{unknown[0]!r} is not a recipe; choose from {", ".join(known)}.')
    if args.jobs < 1:
        raise UserError(f'--jobs is {args.jobs}; it must be at least 1.')
    if min(seeds, default=-1) < 0:
        raise UserError('--seeds needs numbers from 0 on.')
    chosen = {name: files for name, files in known.items() if not only or name in {PUBLISHED, *only}}
    batch = load_config(SMALL, opts).TRAIN.BATCH_SIZE
    data = identify(args.data, opts)

    with owned(args.out), obey_stop_signals():
        run_all(chosen, seeds, out=args.out, jobs=args.jobs, keys=['DATASET.PATH', args.data, *opts], data=data)
        results = {name: {seed: read_json(args.out / f'{name}-{seed}' / RESULT) for seed in seeds} for name in chosen}
        text = table(results, batch)
        write_json(args.out / 'recipe.json', results)
        write_atomically(args.out / 'recipe.md', f'{text}\n'.encode())
    print(text)
    return 0


def run_all(
    chosen: dict[str, list[Path]], seeds: list[int], *, out: Path, jobs: int, keys: list[str], data: dict[str, Any]
) -> None:
    """Every recipe with the first seed, then with the next. Raises ``Stopped`` after a stop signal.

    When a run fails, those that were begun are trained to their end first.
    """
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {}
        for seed in seeds:
            for name, files in chosen.items():
                folder = out / f'{name}-{seed}'
                own = [*keys, 'OUTPUT_DIR', str(folder), 'SEED', str(seed)]
                waiting[pool.submit(train, folder, files, own, data)] = folder.name
        try:
            for number, done in enumerate(as_completed(waiting), 1):
                done.result()
                check_stop()
                print(f'{number}/{len(waiting)} {waiting[done]}', flush=True)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, UserError) and any(run.running() for run in waiting):
                print(f'{error} Waiting for the runs that were begun ...', file=sys.stderr, flush=True)
            raise


if __name__ == '__main__':
    sys.exit(main())
