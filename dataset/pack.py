"""A prepared data set in a few large files: ``python dataset/pack.py``.

    python dataset/pack.py --data_path ./data/interhand2.6m/ --save_path ./data/interhand2.6m_packed/
    python dataset/pack.py --verify ./data/interhand2.6m_packed/          # every checksum

Training and evaluation take either form as DATASET.PATH. A folder of 370,000 samples is 1.5 million small files: slow
to list, to copy and to read in random order. Packed it is, for each split,

    samples.bin    for each sample its pictures' JPEG bytes as they are (img, mask, dense), then its entries of
                   data.json as JSON
    labels.npy     one record a sample (``record_type``): labels, and where its bytes lie
    manifest.json  format, contents, size and SHA-256 of both

mapped into memory, so that opening it costs nothing and all loader processes share one copy. Nothing in it is pickled.

``--masks bits`` keeps of each mask only which hand is where, bit-packed: a tenth of the bytes and a fifth of the time
to decode, and the same classes where a picture is not warped; where it is, about 0.3 % of the pixels, at the rim of the
hands, change class, because the JPEG's grey rim is gone. ``--no-targets`` leaves mask and dense out
(DATASET.TARGETS render makes them).
"""

import sys
from pathlib import Path

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import hashlib
import io
import json
import mmap
import os
import shutil
import zlib
from functools import cached_property
from typing import Any, BinaryIO

import cv2
import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataset.interhand import InterHandDataset, PreparedSplit, checked_crop
from dataset.prepared import RECORD, partial_folder
from dataset.raw import HAND_MODEL_RECORD, SPLITS
from utils.distributed import usable_cores
from utils.errors import UserError, user_facing
from utils.files import decode_image, read_json, write_atomically, write_json
from utils.geometry import CROP_SIZE
from utils.hand import MASK_THRESHOLD

FORMAT = 'dir-packed-1'  # raised when older readers would misread it
MANIFEST, LABELS, SAMPLES = 'manifest.json', 'labels.npy', 'samples.bin'
HEAD = 'head.json'  # of an unfinished split: what its manifest will begin with
LABEL_FIELDS = (
    ('root', (2, 3, 3)),
    ('pose', (2, 45)),
    ('shape', (2, 10)),
    ('translation', (2, 3)),
    ('camera_rotation', (3, 3)),
    ('camera_translation', (3,)),
    ('intrinsics', (3, 3)),
)
PARTS = ('img', 'mask', 'dense', 'entries')  # of a sample in samples.bin, in this order
CHUNK = 64  # samples between two writes
_AGAIN = 'copy it again, or pack the data set again (python dataset/pack.py)'


def record_type() -> np.dtype:
    """One sample in labels.npy: float32 labels as in ``dataset.interhand.Sample``, first byte, bytes of each part."""
    return np.dtype(
        [(name, '<f4', shape) for name, shape in LABEL_FIELDS]
        + [('begin', '<u8'), *((f'{part}_bytes', '<u4') for part in PARTS)]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


class PackedDataset(PreparedSplit):
    """A packed split. Raises UserError if its files are missing, cut short or of another version, or if it holds no
    masks or dense maps and they are asked for."""

    def __init__(self, path: str | Path, split: str, **options):
        folder = Path(path) / split
        self.manifest = read_manifest(folder)
        super().__init__(folder, self.manifest['samples'], **options)
        for kind, wanted in (('mask', self.with_mask), ('dense', self.with_dense)):
            if wanted and not self.manifest[kind]:
                raise UserError(
                    f'{folder} was packed without {kind} pictures: set DATASET.TARGETS render, or pack it '
                    'without --no-targets.'
                )

    def __getstate__(self) -> dict:
        """A process that is spawned maps the files itself; a memory map would travel as a copy of the data."""
        return {key: value for key, value in self.__dict__.items() if key not in ('_records', '_content')}

    @cached_property
    def _records(self) -> np.ndarray:
        try:
            records = np.load(self.folder / LABELS, mmap_mode='r', allow_pickle=False)
        except ValueError as error:
            raise UserError(f'{self.folder / LABELS} cannot be read ({error}): {_AGAIN}.') from None
        if records.shape != (self.length,) or records.dtype != record_type():
            raise UserError(f'{self.folder / LABELS} does not hold the labels of {self.length} samples: {_AGAIN}.')
        return records

    @cached_property
    def _content(self) -> memoryview:
        with open(self.folder / SAMPLES, 'rb') as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def name(self, index: int) -> str:
        return f'{self.folder / SAMPLES}[{index}]'

    def labels(self, index: int) -> tuple[np.ndarray, ...]:
        record = self._records[index]
        return tuple(record[name] for name, _ in LABEL_FIELDS)

    def entries(self, index: int) -> dict[str, dict]:
        return json.loads(bytes(self._bytes('entries', index)))

    def picture(self, kind: str, index: int) -> np.ndarray:
        return checked_crop(
            decode_image(self._bytes(kind, index)), f'The {kind} picture of {self.name(index)}', advice=_AGAIN
        )

    def mask(self, index: int) -> np.ndarray:
        if self.manifest['mask'] == 'jpeg':
            return super().mask(index)
        try:
            return unpack_bits(self._bytes('mask', index))
        except (zlib.error, ValueError):
            raise UserError(f'The mask of {self.name(index)} is damaged; {_AGAIN}.') from None

    def _bytes(self, part: str, index: int) -> memoryview:
        record = self._records[index]
        begin = int(record['begin']) + sum(int(record[f'{before}_bytes']) for before in PARTS[: PARTS.index(part)])
        return self._content[begin : begin + int(record[f'{part}_bytes'])]


def open_split(path: str | Path, split: str, **options) -> PreparedSplit:
    """The split, packed or as a folder of files; ``options`` as PreparedSplit takes them."""
    folder = Path(path) / split
    packed = (folder / MANIFEST).exists() or (partial_folder(folder) / HEAD).exists()
    return (PackedDataset if packed else InterHandDataset)(path, split, **options)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises UserError unless it is one of this version and both files have the size it names."""
    if not folder.exists() and partial_folder(folder).is_dir():
        raise UserError(f'{folder} is only half packed; give the same dataset/pack.py command again to finish it.')
    manifest = read_json(folder / MANIFEST)
    version = manifest.get('format') if isinstance(manifest, dict) else None
    if version != FORMAT:
        raise UserError(
            f'{folder / MANIFEST} is of format {version}, this version reads {FORMAT}: pack the data set '
            'again (python dataset/pack.py).'
        )
    try:
        sizes = {name: manifest['files'][name]['bytes'] for name in (LABELS, SAMPLES)}
        complete = all(key in manifest for key in ('samples', 'mask', 'dense'))
    except (KeyError, TypeError):
        complete = False
    if not complete:
        raise UserError(f'{folder / MANIFEST} lacks some of its entries: {_AGAIN}.')
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.exists() else None
        if found != size:
            state = 'is missing' if found is None else f'has {found:,} bytes instead of {size:,}'
            raise UserError(f'{path} {state}: {_AGAIN}.')
    return manifest


def verify_split(folder: Path) -> None:
    """Raises UserError unless both files have the checksum that the manifest names."""
    for name, expected in read_manifest(folder)['files'].items():
        if _sha256(folder / name) != expected['sha256']:
            raise UserError(f'{folder / name} is damaged (its SHA-256 is not that of the manifest): {_AGAIN}.')


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def pack_bits(mask: np.ndarray) -> bytes:
    """(256, 256, 2) uint8 left, right -> which of them is seen at each pixel, by the rule of ``classify_mask``."""
    left, right = mask[..., 0], mask[..., 1]
    seen = np.stack([(left > MASK_THRESHOLD) & (left >= right), (right > MASK_THRESHOLD) & (right > left)], -1)
    return zlib.compress(np.packbits(seen), 1)


def unpack_bits(content: bytes | memoryview) -> np.ndarray:
    """Inverse of ``pack_bits``: (256, 256, 2) uint8, 0 or 255. Raises zlib.error or ValueError for anything else."""
    bits = np.frombuffer(zlib.decompress(content, bufsize=CROP_SIZE * CROP_SIZE // 4), np.uint8)
    return np.unpackbits(bits).reshape(CROP_SIZE, CROP_SIZE, 2) * np.uint8(255)


class _Packer(Dataset):
    """Samples of a folder as the bytes that are kept of them; every picture is decoded once, so that a damaged one is
    found now."""

    def __init__(self, source: InterHandDataset, *, masks: str, targets: bool):
        self.source, self.masks, self.targets = source, masks, targets

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[tuple[np.ndarray, ...], list[bytes]]:
        self.source.picture('img', index)
        parts = [self.source.path('img', index).read_bytes(), b'', b'']
        if self.targets:
            mask = self.source.mask(index)
            self.source.picture('dense', index)
            parts[1] = pack_bits(mask) if self.masks == 'bits' else self.source.path('mask', index).read_bytes()
            parts[2] = self.source.path('dense', index).read_bytes()
        entries = json.dumps(self.source.entries(index), default=_plain, separators=(',', ':'))
        return self.source.labels(index), [*parts, entries.encode()]


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays, which other tools' pickles hold, as JSON's own."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f'{type(value).__name__} in an annotation cannot be kept as JSON')


def pack_split(
    source: InterHandDataset, save_path: Path, *, masks: str = 'jpeg', targets: bool = True, workers: int = 0
) -> None:
    """Pack one split, or what is left of it: a killed run goes on after the last sample that is whole.

    Raises UserError if a sample cannot be read or the folder holds something else.
    """
    split = source.folder.name
    folder = save_path / split
    partial = partial_folder(folder)
    head = {'format': FORMAT, 'samples': len(source), 'mask': masks if targets else None, 'dense': targets}
    if folder.exists():
        _refuse_other(folder, {key: read_manifest(folder)[key] for key in head}, head)
        print(f'{split}: {folder} is already complete.')
        return
    partial.mkdir(parents=True, exist_ok=True)
    if (partial / HEAD).exists():
        _refuse_other(partial, read_json(partial / HEAD), head)
    else:
        write_atomically(partial / LABELS, _labels_header(len(source)))
        write_json(partial / HEAD, head)
    with open(partial / LABELS, 'ab') as labels, open(partial / SAMPLES, 'ab') as samples:
        done = _cut_to_whole_samples(labels, samples, header_bytes=len(_labels_header(len(source))))
        packer = _Packer(source, masks=masks, targets=targets)
        loader = DataLoader(
            packer,
            batch_size=CHUNK,
            sampler=range(done, len(source)),
            num_workers=workers,
            collate_fn=list,
            worker_init_fn=_one_thread,
        )
        with tqdm(total=len(source), initial=done, desc=split, unit='sample') as progress:
            for chunk in loader:
                _append(labels, samples, chunk)
                progress.update(len(chunk))
        for file in (labels, samples):
            os.fsync(file.fileno())
    _finish(source, partial, folder, head)


def _refuse_other(folder: Path, found: dict, wanted: dict) -> None:
    if found != wanted:
        what = '; '.join(
            f'{key} is {found.get(key)}, wanted {wanted[key]}' for key in wanted if found.get(key) != wanted[key]
        )
        raise UserError(f'{folder} was packed differently ({what}); give another --save_path, or remove it first.')


def _labels_header(total: int) -> bytes:
    """What stands before the records of labels.npy."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {'descr': np.lib.format.dtype_to_descr(record_type()), 'fortran_order': False, 'shape': (total,)}
    )
    return header.getvalue()


def _cut_to_whole_samples(labels: BinaryIO, samples: BinaryIO, *, header_bytes: int) -> int:
    """Remove the half-written end that a kill or a power cut left -> number of samples that are there."""
    kind = record_type()
    with open(labels.name, 'rb') as file:
        file.seek(header_bytes)
        content = file.read()
    records = np.frombuffer(content[: len(content) // kind.itemsize * kind.itemsize], kind)
    ends = records['begin'] + sum(records[f'{part}_bytes'].astype(np.uint64) for part in PARTS)
    whole = (records['img_bytes'] > 0) & (ends <= samples.tell())
    done = len(whole) if whole.all() else int(whole.argmin())
    labels.truncate(header_bytes + done * kind.itemsize)
    samples.truncate(int(ends[done - 1]) if done else 0)
    samples.seek(0, os.SEEK_END)
    return done


def _append(labels: BinaryIO, samples: BinaryIO, chunk: list[tuple]) -> None:
    records = np.zeros(len(chunk), record_type())
    for record, (arrays, parts) in zip(records, chunk):
        record['begin'] = samples.tell()
        for (name, _), array in zip(LABEL_FIELDS, arrays):
            record[name] = array
        for part, content in zip(PARTS, parts):
            record[f'{part}_bytes'] = len(content)
            samples.write(content)
    samples.flush()  # first what the records point to
    labels.write(records.tobytes())
    labels.flush()


def _finish(source: InterHandDataset, partial: Path, folder: Path, head: dict) -> None:
    files = {
        name: {'bytes': (partial / name).stat().st_size, 'sha256': _sha256(partial / name)}
        for name in (LABELS, SAMPLES)
    }
    if (source.folder / RECORD).exists():
        shutil.copyfile(source.folder / RECORD, partial / RECORD)
    write_json(partial / MANIFEST, head | {'files': files})
    (partial / HEAD).unlink()
    os.rename(partial, folder)
    print(f'{folder.name}: {head["samples"]:,} samples, {sum(file["bytes"] for file in files.values()):,} bytes')


def _sha256(path: Path) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(0)


@user_facing
def main(argv: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_path', metavar='DIR', help='prepared data set, a folder of files')
    parser.add_argument('--save_path', metavar='DIR', help='where the packed one goes')
    parser.add_argument('--splits', nargs='+', metavar='SPLIT', choices=SPLITS, help='default: those that are there')
    parser.add_argument('--masks', choices=('jpeg', 'bits'), default='jpeg', help='default: %(default)s')
    parser.add_argument('--no-targets', action='store_true', help='leave mask and dense pictures out')
    parser.add_argument('--workers', type=int, default=min(usable_cores(), 16), help='processes (default: %(default)s)')
    parser.add_argument('--verify', metavar='DIR', help='only check a packed data set against its checksums')
    args = parser.parse_args(argv)
    if args.verify:
        for folder in _splits_in(args.verify, args.splits):
            verify_split(folder)
            print(f'{folder}: as it was packed')
        return
    if not (args.data_path and args.save_path):
        raise UserError('give --data_path and --save_path, or --verify.')
    save_path = Path(args.save_path)
    if save_path.resolve() == Path(args.data_path).resolve():
        raise UserError(f'--save_path {save_path} is the data set itself; give another folder.')
    sources = [InterHandDataset(folder.parent, folder.name) for folder in _splits_in(args.data_path, args.splits)]
    save_path.mkdir(parents=True, exist_ok=True)
    if (record := Path(args.data_path) / HAND_MODEL_RECORD).exists():
        shutil.copyfile(record, save_path / HAND_MODEL_RECORD)
    for source in sources:
        pack_split(
            source,
            save_path,
            masks=args.masks,
            targets=not args.no_targets,
            workers=args.workers if args.workers > 1 else 0,
        )


def _splits_in(path: str, asked_for: list[str] | None) -> list[Path]:
    folders = [Path(path) / split for split in asked_for or SPLITS]
    found = [folder for folder in folders if folder.is_dir() or asked_for]
    if not found:
        raise UserError(f'{path} has none of the splits {", ".join(SPLITS)}; give the folder of a prepared data set.')
    return found


if __name__ == '__main__':
    sys.exit(main())
