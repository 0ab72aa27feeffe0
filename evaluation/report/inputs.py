"""Read and validate a run's files: metrics.json, per_sample.csv, samples.npz, log.jsonl.

Missing files are None. Damaged ones, and those of another version, raise UserError.
"""

import csv
import io
import math
import shlex
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset.damage import set_folders_of
from evaluation.figures import OPTIONAL_COLUMNS
from evaluation.metrics import PROTOCOLS
from evaluation.runs import Run
from evaluation.samples import KINDS, SAMPLES_VERSION
from evaluation.schema import EVALUATE_AGAIN
from utils.arrays import load_npz
from utils.errors import UserError
from utils.files import read_json
from utils.hand import NUM_FACES, NUM_VERTICES
from utils.run_record import RUN_RECORD
from utils.training import LOG_NAME, read_records

PER_SAMPLE_COLUMNS = ('joint_mm_left', 'joint_mm_right', 'vert_mm_left', 'vert_mm_right', 'root_mm')


class PerSample(NamedTuple):
    """Columns of per_sample.csv; NaN marks missing annotations."""

    sample: list[str]  # index in the split
    file: list[str]
    columns: dict[str, np.ndarray]  # name -> (N,)

    def error(self, name: str) -> np.ndarray:
        """(N,) errors 'joint_mm' or 'vert_mm', as means over the annotated hands of each frame, or 'root_mm'."""
        if name in self.columns:
            return self.columns[name]
        hands = np.stack([self.columns[f'{name}_left'], self.columns[f'{name}_right']])
        known = np.isfinite(hands)
        return np.where(known, hands, 0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)


class Log(NamedTuple):
    """Records of log.jsonl by kind, in order."""

    path: Path
    train: list[dict[str, Any]]
    validation: dict[int, list[dict[str, Any]]]  # stage -> records


class Evaluated(NamedTuple):
    """A run with the contents of its files."""

    label: str  # name, followed by the group's letter if there are several groups
    group: str  # A, B, ...: runs of the same group are comparable
    slot: int  # colour index
    metrics: dict[str, Any]
    run: Run
    per_sample: PerSample | None
    samples: dict[str, np.ndarray] | None
    log: Log | None

    def command(self, *, evaluation: bool = True) -> str:
        """The shell command that creates the missing files; "…" stands for options that metrics.json does not hold."""
        if not evaluation:
            return 'python train.py'
        script = ['apps/eval_interhand.py', '--model', str(self.metrics.get('model') or 'MODEL')]
        if 'training' not in self.metrics:  # the constant-prediction baseline is not trained
            script = ['apps/eval_baseline.py', '--cfg', 'CFG']
        folder, protocol = Path(self.metrics['data']), self.metrics['protocol']['name']
        roots = set_folders_of(folder)
        data = roots[0] if len(roots) == 1 else f'[{", ".join(roots)}]'
        options = ['--protocol', protocol] * (protocol in PROTOCOLS and protocol != 'published')
        options += ['--split', folder.name] * (folder.name != 'test')
        command = shlex.join(['python', *script, '--data_path', data, *options, '--out', str(self.run.path.parent)])
        complete = (
            protocol in PROTOCOLS and PROTOCOLS[protocol].joints == 'regressed' and not self.metrics.get('subset')
        )
        return command if complete else f'{command} …'


def read_evaluated(runs: list[Run]) -> list[Evaluated]:
    """Read the files of all runs and group comparable runs. Raises UserError for unusable files."""
    groups = list(dict.fromkeys(run.comparable_by for run in runs))
    result = []
    for slot, run in enumerate(runs):
        group = letters(groups.index(run.comparable_by))
        result.append(
            Evaluated(
                f'{run.name} [{group}]' if len(groups) > 1 else run.name,
                group,
                slot,
                run.metrics,
                run,
                read_per_sample(run.path.with_name('per_sample.csv')),
                read_samples(run.path.with_name('samples.npz')),
                read_log(find_log(run)),
            )
        )
    return result


def letters(position: int) -> str:
    """Group names: A ... Z, A1, B1, ..."""
    return chr(ord('A') + position % 26) + (str(position // 26) if position >= 26 else '')


def read_per_sample(path: Path) -> PerSample | None:
    if not path.is_file():
        return None
    try:
        head, *rows = csv.reader(io.StringIO(path.read_text('utf-8', errors='replace'), newline=''))
        places = {name: head.index(name) for name in (*PER_SAMPLE_COLUMNS, 'index', 'file')}
        places |= {name: head.index(name) for name in OPTIONAL_COLUMNS if name in head}
        if not rows or any(len(row) != len(head) for row in rows):
            raise ValueError
        columns = {
            name: np.array([float(row[place] or 'nan') for row in rows])
            for name, place in places.items()
            if name not in ('index', 'file')
        }
    except (ValueError, csv.Error):
        raise UserError(f'{path} is truncated or not a table of per-sample errors. {EVALUATE_AGAIN}') from None
    return PerSample([row[places['index']] for row in rows], [row[places['file']] for row in rows], columns)


# name -> (shape with K samples and S stages, numpy dtype kinds)
ARRAYS = {
    'index': (('K',), 'iu'),
    'kind': (('K',), 'U'),
    'name': (('K',), 'U'),
    'image': (('K', 256, 256, 3), 'u'),
    'vertices': (('K', 'S', 2, NUM_VERTICES, 3), 'f'),
    'offset': (('K', 'S', 3), 'f'),
    'true_vertices': (('K', 2, NUM_VERTICES, 3), 'f'),
    'true_roots': (('K', 2, 3), 'f'),
    'intrinsics': (('K', 3, 3), 'f'),
    'faces': ((2, NUM_FACES, 3), 'iu'),
    'joint_mm': (('K', 2), 'f'),
    'root_mm': (('K',), 'f'),
}
MOST_SAMPLE_BYTES = 1 << 28  # of samples.npz; a network of four stages fills some 8 MB
MAY_BE_NAN = ('joint_mm', 'root_mm')


def read_samples(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays listed in ``ARRAYS``; apps/eval_interhand.py --out selects the samples."""
    if not path.is_file():
        return None
    try:
        archive = load_npz(path, most_bytes=MOST_SAMPLE_BYTES)
        version = archive['version'].item()
        arrays = {name: archive[name] for name in ARRAYS} if version == SAMPLES_VERSION else {}
    except (ValueError, OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f'{path} is truncated or damaged ({type(error).__name__}). {EVALUATE_AGAIN}') from None
    if not arrays:
        raise UserError(
            f'{path} has version {version}, but this report reads version {SAMPLES_VERSION}. {EVALUATE_AGAIN}'
        )
    wrong = next((name for name, values in arrays.items() if not _is_sound(name, values, arrays)), None)
    if wrong:
        raise UserError(f'{path}: array {wrong} is malformed. {EVALUATE_AGAIN}')
    return arrays


def _is_sound(name: str, values: np.ndarray, arrays: dict[str, np.ndarray]) -> bool:
    shape, kinds = ARRAYS[name]
    count, stages = (*arrays['vertices'].shape, 0, 0)[:2]
    sizes = {'K': max(count, 1), 'S': max(stages, 1)}
    wanted = tuple(sizes[size] if isinstance(size, str) else size for size in shape)
    if values.dtype.kind not in kinds or values.shape != wanted:
        return False
    if name == 'image':
        return values.dtype == np.uint8
    if name == 'faces':
        return bool(((values >= 0) & (values < NUM_VERTICES)).all())
    if name == 'kind':
        return bool(np.isin(values, KINDS).all())
    return values.dtype.kind != 'f' or name in MAY_BE_NAN or bool(np.isfinite(values).all())


def find_log(run: Run) -> Path | None:
    """Path of the log of the run that trained the evaluated network, in the network's folder or beside the evaluation.

    None if there is none, as for a baseline, or if the log there is that of another run.
    """
    model = run.metrics.get('model')
    if not (isinstance(model, str) and model and 'training' in run.metrics):
        return None
    place = Path(model)
    own = place if place.is_dir() else place.parent
    for folder in (own, run.path.parent.parent, run.path.parent):
        same = same_training(run, folder)
        if same is None:  # a run of an earlier version; it may have been moved since it was evaluated
            moved = not place.exists() and folder.resolve().name in (place.name, place.parent.name)
            same = folder == own or moved
        if same and (folder / LOG_NAME).is_file():
            return folder / LOG_NAME
    return None


def same_training(run: Run, folder: Path) -> bool | None:
    """Whether the evaluated network was trained in the run folder; None if either has no record of its start."""
    file = folder / RUN_RECORD
    records = [run.metrics.get('trained'), read_json(file) if file.is_file() else None]
    starts = [_start(record) for record in records]
    return None if None in starts else starts[0] == starts[1]


def _start(record: Any) -> tuple[Any, Any] | None:
    """When and with which command a recorded training began."""
    sessions = record.get('sessions') if isinstance(record, dict) else None
    first = sessions[0] if isinstance(sessions, list) and sessions else None
    return (first.get('started'), first.get('command')) if isinstance(first, dict) and 'started' in first else None


def read_log(path: Path | None) -> Log | None:
    if path is None:
        return None
    log = Log(path, [], {})
    for _, record in read_records(path):
        kind = record['kind']
        if kind == 'train':
            log.train.append(record)
        elif kind.startswith('val_stage') and kind[9:].isdecimal():
            log.validation.setdefault(int(kind[9:]), []).append(record)
    return log if log.train or log.validation else None


def value_of(record: dict[str, Any], key: str) -> float | None:
    """The finite number under ``key``, else None."""
    value = record.get(key)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
