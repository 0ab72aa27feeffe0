"""Pack a prepared data set into a few large files: ``python dataset/pack.py``.

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

import argparse
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataset.hand_model_record import HAND_MODEL_RECORD
from dataset.packed import (
    FORMAT,
    HEAD,
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
from dataset.prepare.resumable import already_complete, publish, refuse_other_settings
from dataset.prepared import LABEL_SHAPES, RECORD, InterHandDataset, partial_folder
from utils.distributed import usable_cores, use_one_thread
from utils.errors import UserError, user_facing
from utils.files import read_json, sha256_of_file, write_atomically, write_json

CHUNK = 64  # samples between two writes


class _Packer(Dataset):
    """Samples as the bytes that are packed. Every image is decoded once, so that damage is found now."""

    def __init__(self, source: InterHandDataset, *, masks: str, targets: bool):
        self.source, self.masks, self.targets = source, masks, targets

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[tuple[np.ndarray, ...], list[bytes]]:
        self.source.image('img', index)
        parts = [self.source.path('img', index).read_bytes(), b'', b'']
        if self.targets:
            mask = self.source.mask(index)
            self.source.image('dense', index)
            parts[1] = pack_bits(mask) if self.masks == 'bits' else self.source.path('mask', index).read_bytes()
            parts[2] = self.source.path('dense', index).read_bytes()
        entries = json.dumps(self.source.entries(index), default=_plain, separators=(',', ':'))
        return self.source.labels(index), [*parts, entries.encode()]


def _plain(value: Any) -> Any:
    """Convert NumPy numbers and arrays, which other tools' pickles contain, to JSON types."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f'{type(value).__name__} in an annotation cannot be kept as JSON')


def pack_split(
    source: InterHandDataset, save_path: Path, *, masks: str = 'jpeg', targets: bool = True, workers: int = 0
) -> None:
    """Pack one split; a killed run resumes after the last complete sample.

    Raises UserError if a sample cannot be read or the folder holds something else.
    """
    split = source.folder.name
    folder = save_path / split
    partial = partial_folder(folder)
    head: dict[str, Any] = {
        'format': FORMAT,
        'samples': len(source),
        'mask': masks if targets else None,
        'dense': targets,
    }
    if already_complete(folder, head, recorded=lambda folder: {key: read_manifest(folder)[key] for key in head}):
        return
    partial.mkdir(parents=True, exist_ok=True)
    if (partial / HEAD).exists():
        refuse_other_settings(partial, read_json(partial / HEAD), head)
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
            worker_init_fn=use_one_thread,
        )
        with tqdm(total=len(source), initial=done, desc=split, unit='sample') as progress:
            for chunk in loader:
                _append(labels, samples, chunk)
                progress.update(len(chunk))
        for file in (labels, samples):
            os.fsync(file.fileno())
    _finish(source, partial, folder, head)


def _labels_header(total: int) -> bytes:
    """The header of labels.npy."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {'descr': np.lib.format.dtype_to_descr(record_type()), 'fortran_order': False, 'shape': (total,)}
    )
    return header.getvalue()


def _cut_to_whole_samples(labels: BinaryIO, samples: BinaryIO, *, header_bytes: int) -> int:
    """Remove the truncated end that a kill or a power cut left -> number of complete samples."""
    kind = record_type()
    with open(labels.name, 'rb') as file:
        file.seek(header_bytes)
        content = file.read()
    records = np.frombuffer(content[: len(content) // kind.itemsize * kind.itemsize], kind)
    ends = records['begin'] + sum(records[f'{part}_bytes'].astype(np.uint64) for part in PARTS)
    whole = (records['img_bytes'] > 0) & (ends <= samples.tell())
    done = len(whole) if bool(whole.all()) else int(whole.argmin())
    labels.truncate(header_bytes + done * kind.itemsize)
    samples.truncate(int(ends[done - 1]) if done else 0)
    samples.seek(0, os.SEEK_END)
    return done


def _append(labels: BinaryIO, samples: BinaryIO, chunk: list[tuple]) -> None:
    records = np.zeros(len(chunk), record_type())
    for record, (arrays, parts) in zip(records, chunk):
        record['begin'] = samples.tell()
        for name, array in zip(LABEL_SHAPES, arrays):
            record[name] = array
        for part, content in zip(PARTS, parts):
            record[f'{part}_bytes'] = len(content)
            samples.write(content)
    samples.flush()  # the data before the records that point to it
    labels.write(records.tobytes())
    labels.flush()


def _finish(source: InterHandDataset, partial: Path, folder: Path, head: dict) -> None:
    files = {
        name: {'bytes': (partial / name).stat().st_size, 'sha256': sha256_of_file(partial / name)}
        for name in (LABELS, SAMPLES)
    }
    if (source.folder / RECORD).exists():
        shutil.copyfile(source.folder / RECORD, partial / RECORD)
    publish(folder, MANIFEST, head | {'files': files})
    (folder / HEAD).unlink()
    size = sum((folder / name).stat().st_size for name in files)
    print(f'{folder.name}: {head["samples"]:,} samples, {size:,} bytes')


@user_facing
def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
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
        raise UserError('Pass --data_path and --save_path, or --verify.')
    save_path = Path(args.save_path)
    if save_path.resolve() == Path(args.data_path).resolve():
        raise UserError(f'--save_path {save_path} is the data set itself. Choose another folder.')
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
        raise UserError(f'{path} has none of the splits {", ".join(SPLITS)}; pass the folder of a prepared data set.')
    return found
