"""Verify a prepared or packed data set, sample by sample: ``python dataset/verify.py``.

    python dataset/verify.py --path ./data/interhand2.6m/                     # every split
    python dataset/verify.py --path ./data/packed/ --split train --quarantine

Every file must exist, decode without a warning of the decoder and have the right size, every label must be finite and
within ``LIMITS``, the mask must not show a hand that the labels lack, and the counts of preparation.json must add up; a
packed set must have its manifest's checksums, and its samples must lie one after the other. What is found is printed by
reason and listed in PATH/verify/SPLIT.json. An interrupted verification resumes. Exit code: 0 sound, 1 damaged, 2 a
mistake.

``--quarantine`` makes readers leave the damaged samples out: they are listed in SPLIT/quarantine.json, the files of a
prepared split move to SPLIT/quarantine/, and preparation.json counts them as skipped. The split is then smaller, so a
run that was started before refuses to resume on it. To undo it, move everything in SPLIT/quarantine/ back and remove
quarantine.json. A packed split with wrong checksums is not quarantined, since any of its bytes may have changed: copy
or pack it again.
"""

import argparse
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dataset.damage import (
    BAD_ANNOTATION,
    BAD_LABELS,
    FORMAT,
    QUARANTINE,
    UNREADABLE,
    Damage,
    DamageError,
    read_patiently,
    read_quarantine,
)
from dataset.packed import (
    LABELS,
    MANIFEST,
    PARTS,
    SAMPLES,
    PackedDataset,
    files_with_other_checksums,
    read_manifest,
    visible_hands,
)
from dataset.prepare.raw import SPLITS
from dataset.prepare.resumable import JOURNAL, Journal, growing
from dataset.prepare.shards import find_shards
from dataset.prepare.skips import KEPT_BY_TYPE
from dataset.prepare.workers import ordered_map, worker_pool
from dataset.prepared import (
    FOLDERS,
    HAND_LABELS,
    LABEL_SHAPES,
    RECORD,
    InterHandDataset,
    PreparedSplit,
    hands_without_numbers,
    partial_folder,
    paths,
)
from utils.distributed import usable_cores
from utils.errors import UserError, user_facing
from utils.files import read_json, sha256_of_file, write_json
from utils.geometry import CROP_SIZE
from utils.hand import SIDES
from utils.stopping import check_stop, holding_stop_signals, obey_stop_signals

CHUNK = 64  # samples per task; the unit of the journal
VERSION = 2  # of the checks: a journal of other ones is discarded
REPORTS = 'verify'  # folder of reports and journals
QUARANTINED = 'quarantine'  # folder, within the split, of what was moved out of it
SKIPPED = 'damaged, quarantined by dataset/verify.py'  # reason in preparation.json
SHOWN = 5  # samples that are printed; the report lists all

# The largest sensible absolute values. Larger ones are mostly in other units, such as millimetres.
LIMITS = {
    'pose': 50.0,  # PCA coefficients, rad
    'shape': 30.0,  # standard deviations of the shape space
    'translation': 20.0,  # m, world
    'camera_translation': 20.0,  # m
}
FARTHEST = 20.0  # m: hand from the camera, which it is in front of
FOCAL_LENGTHS = (20.0, 100_000.0)  # pixels of the crop
MARGIN = 2 * CROP_SIZE  # pixels: how far beyond the crop a hand's translation, some 0.1 m off its wrist, may project
MOST_STRAY_PIXELS = 50  # of a hand in the mask of a sample that lacks it: JPEG noise at the rim of the other hand
NOT_A_ROTATION = 0.01  # largest deviation of R R^T from the identity


class Contents(NamedTuple):
    """A split as it lies on disk, complete or not."""

    dataset: PreparedSplit  # indexed by stored numbers, quarantined ones included
    numbers: list[int]  # of the samples that readers use
    whole: list[str]  # sentences about damage that is not of one sample
    leftovers: list[str]  # files of interrupted commands, which nobody reads
    settings: dict[str, Any]  # for the journal: what the checks depend on

    @property
    def packed(self) -> bool:
        return isinstance(self.dataset, PackedDataset)


class _WholeDamageError(UserError):
    """A split is damaged in a way that leaves no sample to check."""


class _AllFiles(InterHandDataset):
    """A prepared split that may have gaps, by stored number."""

    def __init__(self, folder: Path, total: int):
        PreparedSplit.__init__(self, folder, total)


class _AllRecords(PackedDataset):
    """A packed split by stored number, as its manifest describes it."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.manifest = manifest
        with_mask, with_dense = bool(manifest['mask']), bool(manifest['dense'])
        PreparedSplit.__init__(self, folder, manifest['samples'], with_mask=with_mask, with_dense=with_dense)


# Checks of one sample.


def check_samples(dataset: PreparedSplit, numbers: Sequence[int]) -> list[Damage]:
    """All damage of some samples of a split that is indexed by stored numbers."""
    return [damage for number in numbers for damage in check_sample(dataset, number)]


def check_sample(dataset: PreparedSplit, number: int) -> list[Damage]:
    """The first problem of each file, or part, of a sample."""
    checks: list[Callable[[], Any]] = [partial(dataset.image, 'img', number)]
    if dataset.with_mask:
        checks.append(partial(dataset.mask, number))
    if dataset.with_dense:
        checks.append(partial(dataset.image, 'dense', number))
    checks.append(partial(_check_labels, dataset, number))
    if isinstance(dataset, PackedDataset):
        checks += [partial(_check_place, dataset, number), partial(dataset.entries, number)]
    problems: dict[str, Damage] = {}
    for check in checks:
        try:
            read_patiently(check, dataset.name(number))
        except DamageError as error:
            problems.setdefault(str(error), Damage(number, dataset.name(number), error.reason, str(error)))
    return list(problems.values())


def _check_labels(dataset: PreparedSplit, number: int) -> None:
    labels = dict(zip(LABEL_SHAPES, dataset.labels(number), strict=True))
    if problem := unusual_label(labels):
        raise DamageError(f'The labels of {dataset.name(number)}: {problem}.', BAD_LABELS)
    absent = hands_without_numbers(list(labels.values()))
    if not absent.any() or not dataset.with_mask:
        return
    try:
        seen = visible_hands(dataset.mask(number)).sum((0, 1))
    except DamageError:
        return  # reported by the check of the mask
    for side in np.array(SIDES)[absent & (seen > MOST_STRAY_PIXELS)]:
        raise DamageError(
            f'The mask of {dataset.name(number)} shows the {side} hand, which its labels lack.', BAD_LABELS
        )


def unusual_label(labels: dict[str, np.ndarray]) -> str | None:
    """The first label beyond ``LIMITS``, as a sentence without its end; None if all are sensible.

    labels: the arrays of ``LABEL_SHAPES`` in the units of ``Sample``, finite but for absent hands, which are NaN.
    """
    present = ~hands_without_numbers(list(labels.values()))
    labels = labels | {name: labels[name][present] for name in HAND_LABELS}
    for name, limit in LIMITS.items():
        if (largest := float(np.abs(labels[name]).max(initial=0))) > limit:
            advice = '; it must be in metres' if 'translation' in name else ''
            return f'{name} holds {largest:.4g}, more than {limit:g}{advice}'
    for name in ('root', 'camera_rotation'):
        rotations = labels[name].astype(np.float64).reshape(-1, 3, 3)
        off = np.abs(rotations @ rotations.transpose(0, 2, 1) - np.eye(3)).max(initial=0)
        if off > NOT_A_ROTATION or (np.linalg.det(rotations) < 0).any():
            return f'{name} is not a rotation matrix'
    intrinsics = labels['intrinsics'].astype(np.float64)
    low, high = FOCAL_LENGTHS
    if not all(low <= focal <= high for focal in intrinsics.diagonal()[:2]):
        return f'intrinsics have focal lengths {intrinsics.diagonal()[:2].round(1).tolist()}; pixels of the crop'
    if not np.allclose(intrinsics[2], (0, 0, 1), atol=1e-3):
        return f'the last row of intrinsics is {intrinsics[2].tolist()}, not 0, 0, 1'
    camera = labels['translation'] @ labels['camera_rotation'].T + labels['camera_translation']
    for side, point in zip(np.array(SIDES)[present], camera.astype(np.float64)):
        if not 0 < point[2] <= FARTHEST:
            return f'the {side} hand lies {point[2]:.4g} m in front of the camera'
        pixel = (intrinsics @ point)[:2] / point[2]
        if (pixel < -MARGIN).any() or (pixel > CROP_SIZE + MARGIN).any():
            return f'the {side} hand projects to pixel {pixel.round().tolist()}, far outside of the crop'
    return None


def _check_place(dataset: PackedDataset, number: int) -> None:
    """A sample's bytes begin where those of the sample before it end, and the last one's end is the file's."""
    end = _end_of(dataset, number - 1) if number else 0
    last = number == dataset.manifest['samples'] - 1
    begins_elsewhere = int(dataset.record(number)['begin']) != end
    if begins_elsewhere or (last and _end_of(dataset, number) != dataset.manifest['files'][SAMPLES]['bytes']):
        raise DamageError(f'The bytes of {dataset.name(number)} are not where {LABELS} places them.', BAD_ANNOTATION)


def _end_of(dataset: PackedDataset, number: int) -> int:
    record = dataset.record(number)
    return int(record['begin']) + sum(int(record[f'{part}_bytes']) for part in PARTS)


# Checks of a split as a whole.


def read_contents(folder: Path) -> Contents:
    """Open a split of either form. Raises UserError if it is neither, _WholeDamageError if it cannot be opened."""
    if any((folder / name).exists() for name in (MANIFEST, LABELS, SAMPLES)):
        try:
            manifest = read_manifest(folder)
            dataset: PreparedSplit = _AllRecords(folder, manifest)
            with suppress(DamageError, OSError):  # of one sample
                dataset.labels(0)
        except UserError as error:
            raise _WholeDamageError(str(error)) from None
        known, total = {MANIFEST, LABELS, SAMPLES, RECORD, QUARANTINE, QUARANTINED}, manifest['samples']
        identity = [manifest['files'][name].get('sha256') for name in (LABELS, SAMPLES)]
        leftovers = []
    else:
        known, total, leftovers = {*FOLDERS, RECORD, QUARANTINE, QUARANTINED}, *_scan(folder)
        dataset, identity = _AllFiles(folder, total), []
    quarantined = read_quarantine(folder)
    if quarantined and quarantined[-1] >= total:
        total = quarantined[-1] + 1
    absent = set(quarantined)
    numbers = [number for number in range(total) if number not in absent]
    leftovers += [str(path) for path in folder.iterdir() if path.name not in known]
    leftovers += [str(path) for path in (partial_folder(folder), *folder.parent.glob(f'{folder.name}.shard-*'))]
    whole = _check_record(folder, len(numbers))
    record = sha256_of_file(folder / RECORD) if (folder / RECORD).exists() else None
    settings = {'version': VERSION, 'folder': str(folder.resolve()), 'samples': total, 'quarantined': quarantined}
    return Contents(
        dataset,
        numbers,
        whole,
        sorted(path for path in leftovers if os.path.lexists(path)),
        settings | {'record': record, 'files': identity},
    )


def _scan(folder: Path) -> tuple[int, list[str]]:
    """-> the highest number of a file of a prepared split + 1, and files of other names."""
    highest, most, others = -1, 0, []
    if not any((folder / kind).is_dir() for kind in FOLDERS):
        raise UserError(f'{folder} is neither a prepared nor a packed split.')
    for kind, suffix in FOLDERS.items():
        if not (folder / kind).is_dir():
            raise _WholeDamageError(f'{folder / kind} is missing.')
        count = 0
        for entry in os.scandir(folder / kind):
            stem = entry.name.removesuffix(f'.{suffix}')
            if entry.name == f'{stem}.{suffix}' and stem.isdecimal() and stem == str(int(stem)):
                highest, count = max(highest, int(stem)), count + 1
            else:
                others.append(entry.path)
        most = max(most, count)
    if highest < 0:
        raise _WholeDamageError(f'{folder} holds no samples.')
    if highest >= 2 * most + 1000:
        raise _WholeDamageError(f'{folder} has files with numbers up to {highest:,}, but only {most:,} of a kind.')
    return highest + 1, others


def _check_record(folder: Path, samples: int) -> list[str]:
    """What is wrong with the counts of preparation.json; sets of other tools lack it."""
    path = folder / RECORD
    if not path.exists():
        return []
    try:
        record = read_json(path)
        kept, frames, skipped = record['kept'], record['frames'], sum(record['skipped'].values())
    except (UserError, TypeError, KeyError, AttributeError):
        return [f'{path} is damaged.']
    wrong = []
    if kept != samples:
        wrong.append(f'{path} records {kept:,} kept frames, but the split holds {samples:,} samples.')
    if kept + skipped != frames:
        wrong.append(f'{path}: {kept:,} frames kept and {skipped:,} skipped are not the {frames:,} that it selected.')
    return wrong


def _check_digests(folder: Path, manifest: dict[str, Any]) -> list[str]:
    wrong = files_with_other_checksums(folder, manifest)
    return [f'{path} has another SHA-256 than its manifest records.' for path in wrong]


# The command.


def verify_split(folder: Path, out: Path, *, workers: int, quarantine: bool) -> bool:
    """Verify one split, print and write the report -> whether it is sound now. Raises UserError for a mistake."""
    report, partial = out / f'{folder.name}.json', out / f'{folder.name}.partial'
    with growing(report):
        try:
            contents = read_contents(folder)
        except _WholeDamageError as error:
            write_json(report, {'format': FORMAT, 'folder': str(folder), 'whole': [str(error)]})
            print(f'{folder} is damaged: {error}')
            return False
        with Journal(partial / JOURNAL) as journal:
            damage, whole = _check_all(contents, journal, workers)
        whole = contents.whole + whole
        content = {
            'format': FORMAT,
            'folder': str(folder),
            'form': 'packed' if contents.packed else 'prepared',
            'samples': len(contents.numbers),
            'whole': whole,
            'damaged': [one._asdict() for one in damage],
            'leftovers': contents.leftovers,
        }
        write_json(report, content)
        shutil.rmtree(partial)
    damaged = len({one.sample for one in damage})
    print(f'{folder} ({content["form"]}): {len(contents.numbers):,} samples, {damaged:,} damaged')
    for reason, count in Counter(reason for _, reason in {(one.sample, one.reason) for one in damage}).most_common():
        print(f'{count:>12,}  {reason}')
    _print_some(whole + [one.detail for one in damage] + [f'unused: {path}' for path in contents.leftovers], report)
    if quarantine and (damage or contents.settings['quarantined']):
        quarantine_samples(contents, damage, whole)
        return not whole
    return not (damage or whole)


def _print_some(sentences: list[str], report: Path) -> None:
    for sentence in sentences[:SHOWN]:
        print(f'    {sentence}')
    if len(sentences) > SHOWN:
        print(f'    ... {len(sentences) - SHOWN:,} more in {report}')


def _check_all(contents: Contents, journal: Journal, workers: int) -> tuple[list[Damage], list[str]]:
    """Damage of all samples, in order, and of the packed files as a whole."""
    if journal.header != contents.settings:
        journal.begin(contents.settings)
    dataset, numbers = contents.dataset, contents.numbers
    tasks = [numbers[begin : begin + CHUNK] for begin in range(0, len(numbers), CHUNK)]
    # Damage of an earlier session may have been repaired since, and sound files may have changed.
    again = {entry[0] for chunk in journal.chunks for entry in chunk['damaged']}
    for chunk, task in zip(journal.chunks, tasks):
        if chunk.get('stamp') != _stamp(dataset, task):
            again.update(task)
    damage = check_samples(dataset, sorted(again))
    todo = tasks[len(journal.chunks) :]
    checked = len(numbers) - sum(map(len, todo))
    with ExitStack() as stack:
        pool = stack.enter_context(worker_pool(workers)) if workers > 1 else None
        digests = _submit(pool, dataset) if isinstance(dataset, PackedDataset) else None
        progress = stack.enter_context(
            tqdm(total=len(numbers), initial=checked, desc=contents.dataset.folder.name, unit='sample')
        )
        for task, found in zip(todo, _results(pool, partial(check_samples, dataset), todo, workers)):
            damage += found
            journal.note({'damaged': [list(one) for one in found], 'stamp': _stamp(dataset, task)})
            progress.set_postfix(damaged=len(damage), refresh=False)
            progress.update(len(task))
            check_stop()
        return damage, digests() if digests else []


def _stamp(dataset: PreparedSplit, numbers: Sequence[int]) -> str:
    """A digest of sizes and times of the samples' files; '' for a packed split, whose files the header identifies."""
    if isinstance(dataset, PackedDataset):
        return ''
    digest = hashlib.sha256()
    for number in numbers:
        for path in paths(dataset.folder, number).values():
            with suppress(OSError):  # missing, which is a state as well
                status = path.stat()
                digest.update(f'{path.name} {status.st_size} {status.st_mtime_ns}\n'.encode())
            digest.update(b'\n')
    return digest.hexdigest()[:16]


def _submit(pool: Executor | None, dataset: PackedDataset) -> Callable[[], list[str]]:
    """Start to compute the checksums beside everything else, where there are processes for it."""
    check = partial(_check_digests, dataset.folder, dataset.manifest)
    if pool is None:
        return check
    with holding_stop_signals():
        future: Future[list[str]] = pool.submit(check)

    def result() -> list[str]:
        while not future.done():
            wait([future], timeout=1)
            check_stop()
        return future.result()

    return result


def _results(pool: Executor | None, function: Callable, tasks: Iterable, workers: int) -> Iterator[list[Damage]]:
    return map(function, tasks) if pool is None else ordered_map(pool, function, tasks, 2 * workers)


def quarantine_samples(contents: Contents, damage: Sequence[Damage], whole: Sequence[str]) -> None:
    """Make readers leave damaged samples out. Raises UserError where that cannot help. A killed one can be repeated.

    The list comes first, since it alone decides what readers see; then the files move.
    """
    folder = contents.dataset.folder
    if contents.packed and whole:
        raise UserError(f'{folder} is damaged as a whole, so nothing was quarantined. Copy it again, or pack it again.')
    if any(one.reason == UNREADABLE for one in damage):
        raise UserError(
            f'Files of {folder} cannot be read, perhaps for a failing disk or a lack of permission, so nothing was '
            'quarantined. Fix that and verify again.'
        )
    with growing(folder):
        known = read_json(folder / QUARANTINE)['damaged'] if read_quarantine(folder) else []
        listed = known + [one._asdict() for one in damage]
        numbers = sorted({entry['sample'] for entry in listed})
        if len(numbers) >= len(contents.numbers) + len(contents.settings['quarantined']):
            raise UserError(f'Every sample of {folder} is damaged, so nothing was quarantined. Prepare it again.')
        write_json(folder / QUARANTINE, {'format': FORMAT, 'damaged': listed})
        if not contents.packed:
            for number in numbers:
                _move(folder, number)
        _count_as_skipped(folder, numbers)
    left = len(contents.numbers) - len({one.sample for one in damage})
    print(f'    quarantined; {left:,} samples remain. To undo it, see python dataset/verify.py --help.')


def _move(folder: Path, number: int) -> None:
    there = paths(folder / QUARANTINED, number)
    for name, path in paths(folder, number).items():
        if path.exists():
            there[name].parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, there[name])


def _count_as_skipped(folder: Path, numbers: list[int]) -> None:
    """Derive preparation.json anew from the original, which is kept in the quarantine."""
    if not (folder / RECORD).exists():
        return
    original = folder / QUARANTINED / RECORD
    if not original.exists():
        write_json(original, read_json(folder / RECORD))
    record = read_json(original)
    if not isinstance(record, dict) or not isinstance(record.get('kept'), int):
        return  # reported as damaged
    record['kept'] -= len(numbers)
    record.pop(KEPT_BY_TYPE, None)  # a damaged sample may not tell its own
    record['skipped'] = {**record.get('skipped', {}), SKIPPED: len(numbers)}
    write_json(folder / RECORD, record | {'quarantined': numbers})


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--path', required=True, metavar='DIR', help='prepared or packed data set')
    parser.add_argument('--split', nargs='+', metavar='SPLIT', choices=SPLITS, help='default: all that exist')
    parser.add_argument('--out', metavar='DIR', help='folder of the reports (default: PATH/verify)')
    parser.add_argument('--quarantine', action='store_true', help='make readers leave damaged samples out')
    parser.add_argument('--workers', type=int, default=usable_cores(), help='processes (default: %(default)s)')
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        raise UserError(f'--workers is {arguments.workers}; it must be at least 1.')
    return arguments


@user_facing
def main(argv: list[str] | None = None) -> int:
    """Run the command line -> exit code."""
    arguments = parse_arguments(argv)
    path = Path(arguments.path)
    out = Path(arguments.out) if arguments.out else path / REPORTS
    folders = _splits_in(path, arguments.split)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'{out} cannot be created ({error.strerror}). Choose another folder with --out.') from None
    with obey_stop_signals():
        sound = [
            verify_split(folder, out, workers=arguments.workers, quarantine=arguments.quarantine) for folder in folders
        ]
    return 0 if all(sound) else 1


def _splits_in(path: Path, requested: list[str] | None) -> list[Path]:
    folders = [path / split for split in requested or SPLITS]
    for folder in folders:
        if not folder.is_dir() and (partial_folder(folder).is_dir() or find_shards(folder)):
            raise UserError(f'{folder} is only partly prepared or packed. Finish it with the command that began it.')
    found = [folder for folder in folders if folder.is_dir()]
    if missing := [folder for folder in folders if requested and folder not in found]:
        raise UserError(f'{missing[0]} does not exist.')
    if not found:
        raise UserError(f'{path} has none of the splits {", ".join(SPLITS)}; pass the folder of a prepared data set.')
    return found
