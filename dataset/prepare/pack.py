"""Pack a prepared data set into a few large files: ``python dataset/pack.py``.

    python dataset/pack.py --data_path ./data/interhand2.6m/ --save_path ./data/interhand2.6m_packed/
    python dataset/pack.py --verify ./data/interhand2.6m_packed/          # every checksum

Training and evaluation accept either form as DATASET.PATH. A folder of 370,000 samples is 1.5 million small files: slow
to list, to copy and to read in random order. Packed, each split is

    samples.bin    for each sample its JPEG files as they are (img, mask, dense), then its entries of data.json as JSON
    labels.npy     one record per sample (``record_type``): labels, and the position of its bytes
    manifest.json  format, contents, size and SHA-256 of both; "hands": "all" if a sample lacks a hand

read by position, so opening it costs nothing. Nothing in it is pickled. The labels of an absent hand are NaN.

``--masks bits`` stores of each mask only which hand is where, bit-packed: a tenth of the bytes and a fifth of the time
to decode. The classes are the same where the image is not warped; where it is, about 0.3 % of the pixels, at the rim of
the hands, change class, because the JPEG's grey rim is gone. ``--no-targets`` omits mask and dense (DATASET.TARGETS
render draws them).
"""

import argparse
import hashlib
import io
import json
import shutil
import zlib
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from dataset.hand_model_record import claim_hand_model_record, recorded_hand_model
from dataset.identity import probe_indices
from dataset.mixture import holds_split
from dataset.packed import (
    ALL_HANDS,
    FORMAT,
    LABELS,
    MANIFEST,
    PARTS,
    SAMPLES,
    pack_bits,
    read_manifest,
    record_type,
    verify_split,
)
from dataset.prepare.raw import SPLITS
from dataset.prepare.resumable import JOURNAL, Journal, already_complete, growing, publish, refuse_other_settings
from dataset.prepare.workers import results_in_order
from dataset.prepared import LABEL_SHAPES, RECORD, InterHandDataset, partial_folder
from utils.distributed import usable_cores
from utils.errors import UserError, user_facing
from utils.files import read_json, sha256_of_file
from utils.stopping import check_stop, obey_stop_signals

CHUNK = 64  # samples per task; the unit of the journal

PackedSample = tuple[tuple[np.ndarray, ...], list[bytes]]  # labels, parts


class _Packer:
    """Samples as the bytes that are packed. Every image is decoded once, so that damage is found now."""

    def __init__(self, source: InterHandDataset, *, masks: str, targets: bool):
        self.source, self.masks, self.targets = source, masks, targets

    def __call__(self, indices: Iterable[int]) -> list[PackedSample]:
        return [self._pack(index) for index in indices]

    def _pack(self, index: int) -> PackedSample:
        self.source.image('img', index)
        parts = [self.source.path('img', index).read_bytes(), b'', b'']
        if self.targets:
            mask = self.source.mask(index)
            self.source.image('dense', index)
            parts[1] = pack_bits(mask) if self.masks == 'bits' else self.source.path('mask', index).read_bytes()
            parts[2] = self.source.path('dense', index).read_bytes()
        try:
            entries = json.dumps(self.source.entries(index), default=_plain, separators=(',', ':'))
        except (TypeError, ValueError, RecursionError) as error:
            path = self.source.path('anno', index)
            raise UserError(f'The entries of {path} cannot be kept as JSON ({error}). Prepare it again.') from None
        return self.source.labels(index), [*parts, entries.encode()]


def _plain(value: Any) -> Any:
    """Convert NumPy numbers and arrays, which other tools' pickles contain, to JSON types."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f'it holds {type(value).__name__}')


def pack_split(
    source: InterHandDataset, save_path: Path, *, masks: str = 'jpeg', targets: bool = True, workers: int = 1
) -> None:
    """Pack one split; a killed run resumes after the last recorded chunk.

    Raises UserError if a sample cannot be read, or if the folder is in use or holds something else.
    """
    folder = save_path / source.folder.name
    head: dict[str, Any] = {
        'format': FORMAT,
        'samples': len(source),
        'mask': masks if targets else None,
        'dense': targets,
    }
    with growing(folder):
        prepared, labels = _settings_of_preparation(source.folder), _digest_of_labels(source.labels, len(source))

        def recorded(folder: Path) -> dict[str, Any]:
            manifest, before = read_manifest(folder), _settings_of_preparation(folder)
            known = prepared is not None and before is not None
            records = np.load(folder / LABELS, mmap_mode='r', allow_pickle=False)
            packed = _digest_of_labels(lambda index: [records[index][name] for name in LABEL_SHAPES], len(records))
            settings = {'preparation': before if known else prepared, 'labels': packed}
            return {key: manifest[key] for key in head} | settings

        if already_complete(folder, head | {'preparation': prepared, 'labels': labels}, recorded=recorded):
            (folder / JOURNAL).unlink(missing_ok=True)
            return
        packer = _Packer(source, masks=masks, targets=targets)
        with Journal(partial_folder(folder) / JOURNAL) as journal:
            _pack_chunks(journal, packer, head | {'labels': labels}, workers)
        _finish(source, partial_folder(folder), folder, head)


def _pack_chunks(journal: Journal, packer: _Packer, settings: dict[str, Any], workers: int) -> None:
    partial, source = journal.path.parent, packer.source
    settings = settings | {'source': _digest_of_record(source)}
    if journal.header is None and (partial / LABELS).exists():
        raise UserError(f'{partial} was begun by another version of this program. Remove it and rerun the command.')
    if not journal.chunks:
        journal.begin(settings)
    refuse_other_settings(partial, {'labels': settings['labels']} | (journal.header or {}), settings)
    for name in (LABELS, SAMPLES):
        (partial / name).touch()
    with open(partial / LABELS, 'r+b') as labels, open(partial / SAMPLES, 'r+b') as samples:
        sound = _sound_chunks(journal, labels, samples, _labels_header(len(source)))
        if sound < len(journal.chunks):
            journal.shorten(sound)
        done = journal.chunks[-1]['samples'] if journal.chunks else 0
        todo = [range(begin, min(begin + CHUNK, len(source))) for begin in range(done, len(source), CHUNK)]
        with (
            closing(results_in_order(packer, todo, workers=workers)) as chunks,
            tqdm(total=len(source), initial=done, desc=source.folder.name, unit='sample') as progress,
        ):
            for indices, chunk in zip(todo, chunks):
                checksum = _append(labels, samples, chunk)
                journal.note({'samples': indices.stop, 'bytes': samples.tell(), 'crc32': checksum})
                progress.update(len(chunk))
                check_stop()


def _settings_of_preparation(folder: Path) -> dict[str, Any] | None:
    """How a split was prepared; None where another tool did it. Quarantine does not change it."""
    record = read_json(folder / RECORD) if (folder / RECORD).exists() else {}
    return record.get('settings') if isinstance(record, dict) else None


def _digest_of_labels(labels: Callable[[int], Iterable[np.ndarray]], samples: int) -> str:
    """Tells sets apart that were prepared alike, or by another tool: a digest of the labels of some samples."""
    digest = hashlib.sha256()
    for index in probe_indices(samples):
        for array in labels(index):
            digest.update(np.ascontiguousarray(array, '<f4').tobytes())
    return digest.hexdigest()[:12]


def _digest_of_record(source: InterHandDataset) -> str | None:
    """Tells a split that was prepared again from the one before. Raises UserError if samples have gone since."""
    path = source.folder / RECORD
    if not path.exists():  # prepared by another tool
        return None
    record = read_json(path)
    kept = record.get('kept') if isinstance(record, dict) else None
    if kept != len(source):
        raise UserError(
            f'{source.folder} holds {len(source):,} samples, but {path.name} records {kept}. Copy it again or prepare '
            'the data set again (python dataset/interhand.py).'
        )
    return sha256_of_file(path)


def _labels_header(total: int) -> bytes:
    """The header of labels.npy."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {'descr': np.lib.format.dtype_to_descr(record_type()), 'fortran_order': False, 'shape': (total,)}
    )
    return header.getvalue()


def _sound_chunks(journal: Journal, labels: BinaryIO, samples: BinaryIO, header: bytes) -> int:
    """Remove what a kill left after the recorded chunks -> how many of them have their bytes; the first that a power
    cut or a copy has damaged, and all after it, are packed again."""
    sound, labels_end, samples_end, done = 0, len(header), 0, 0
    if journal.chunks and labels.read(len(header)) == header:
        for chunk in journal.chunks:
            records = labels.read((chunk['samples'] - done) * record_type().itemsize)
            content = samples.read(chunk['bytes'] - samples_end)
            if zlib.crc32(content, zlib.crc32(records)) != chunk['crc32']:
                break
            sound, done, samples_end, labels_end = sound + 1, chunk['samples'], chunk['bytes'], labels.tell()
    labels.seek(0)
    labels.write(header)
    for file, end in ((labels, labels_end), (samples, samples_end)):
        file.truncate(end)
        file.seek(end)
    return sound


def _append(labels: BinaryIO, samples: BinaryIO, chunk: list[PackedSample]) -> int:
    """Write a chunk to both files -> CRC-32 of its records and bytes."""
    records, content = np.zeros(len(chunk), record_type()), io.BytesIO()
    for record, (arrays, parts) in zip(records, chunk):
        record['begin'] = samples.tell() + content.tell()
        for name, array in zip(LABEL_SHAPES, arrays):
            record[name] = array
        for part, piece in zip(PARTS, parts):
            record[f'{part}_bytes'] = len(piece)
            content.write(piece)
    samples.write(content.getbuffer())
    labels.write(records.tobytes())
    for file in (samples, labels):
        file.flush()
    return zlib.crc32(content.getbuffer(), zlib.crc32(records.tobytes()))


def _finish(source: InterHandDataset, partial: Path, folder: Path, head: dict) -> None:
    """Check that every sample is there, then publish. Raises UserError, and publishes nothing, otherwise."""
    records = np.load(partial / LABELS, mmap_mode='r', allow_pickle=False)
    sizes = sum(records[f'{part}_bytes'].astype(np.int64) for part in PARTS)
    ends, length = np.cumsum(sizes), (partial / SAMPLES).stat().st_size
    if len(records) != head['samples'] or ends[-1] != length or not np.array_equal(records['begin'], ends - sizes):
        raise UserError(
            f'{partial} does not hold the {head["samples"]:,} samples of {source.folder}. Nothing was published. '
            f'Remove {partial} and rerun the command.'
        )
    files = {
        name: {'bytes': (partial / name).stat().st_size, 'sha256': sha256_of_file(partial / name)}
        for name in (LABELS, SAMPLES)
    }
    if (source.folder / RECORD).exists():
        shutil.copyfile(source.folder / RECORD, partial / RECORD)
    publish(folder, MANIFEST, head | _hands_entry(records) | {'files': files})
    (folder / JOURNAL).unlink()
    size = sum((folder / name).stat().st_size for name in files)
    print(f'{folder.name}: {head["samples"]:,} samples, {size:,} bytes')


def _hands_entry(records: np.ndarray) -> dict[str, str]:
    """The manifest's permission of NaN labels, if a sample lacks a hand; sets without such samples have no entry.

    The labels decide and not the source's preparation.json, which sets of other tools lack.
    """
    return {'hands': ALL_HANDS} if np.isnan(records['pose'][:, :, 0]).any() else {}


@user_facing
def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_path', metavar='DIR', help='prepared data set, a folder of files')
    parser.add_argument('--save_path', metavar='DIR', help='output folder of the packed data set')
    parser.add_argument('--splits', nargs='+', metavar='SPLIT', choices=SPLITS, help='default: all that exist')
    parser.add_argument('--masks', choices=('jpeg', 'bits'), default='jpeg', help='default: %(default)s')
    parser.add_argument('--no-targets', action='store_true', help='omit masks and dense maps')
    parser.add_argument('--workers', type=int, default=min(usable_cores(), 16), help='processes (default: %(default)s)')
    parser.add_argument('--verify', metavar='DIR', help='only compare a packed data set with its checksums')
    args = parser.parse_args(argv)
    if args.workers < 1:
        raise UserError(f'--workers is {args.workers}; it must be at least 1.')
    with obey_stop_signals():
        verify(args) if args.verify else pack(args)


def verify(args: argparse.Namespace) -> None:
    """Check the packed splits at --verify. Nothing is written, so no folder is owned: a named one is complete."""
    for folder in _splits_in(args.verify, args.splits):
        check_stop()
        verify_split(folder)
        print(f'{folder}: as it was packed')


def pack(args: argparse.Namespace) -> None:
    """Pack the splits of --data_path into --save_path."""
    if not (args.data_path and args.save_path):
        raise UserError('Pass --data_path and --save_path, or --verify.')
    save_path = Path(args.save_path)
    if save_path.resolve() == Path(args.data_path).resolve():
        raise UserError(f'--save_path {save_path} is the data set itself. Choose another folder.')
    sources = [InterHandDataset(folder.parent, folder.name) for folder in _splits_in(args.data_path, args.splits)]
    save_path.mkdir(parents=True, exist_ok=True)
    recorded, present = recorded_hand_model(args.data_path), recorded_hand_model(save_path)
    if recorded is None and present is not None:
        raise UserError(
            f'{save_path} holds data of the hand model {present}, but {args.data_path} records none. Use another '
            'folder.'
        )
    if recorded is not None and present is None and any(holds_split(save_path, split) for split in SPLITS):
        raise UserError(
            f'{save_path} holds data without a record of their hand model, but those of {args.data_path} are of '
            f'{recorded}. Use another folder.'
        )
    if recorded:
        claim_hand_model_record(save_path, recorded)
    for source in sources:
        pack_split(source, save_path, masks=args.masks, targets=not args.no_targets, workers=args.workers)


def _splits_in(path: str, requested: list[str] | None) -> list[Path]:
    """The folders of the requested splits, or of all; unfinished ones too, which their readers refuse."""
    folders = [Path(path) / split for split in requested or SPLITS]
    found = [folder for folder in folders if requested or holds_split(folder.parent, folder.name)]
    if not found:
        raise UserError(f'{path} has none of the splits {", ".join(SPLITS)}; pass the folder of a prepared data set.')
    return found
