"""Read a packed data set; dataset/prepare/pack.py describes its files."""

import json
import os
import zlib
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dataset.damage import BAD_IMAGE, UNREADABLE, DamageError, read_quarantine
from dataset.prepared import (
    LABEL_SHAPES,
    PreparedSplit,
    check_finite,
    checked_crop,
    hands_without_numbers,
    partial_folder,
)
from utils.arrays import read_header
from utils.errors import UserError
from utils.files import read_json, sha256_of_file
from utils.geometry import CROP_SIZE
from utils.hand import MASK_THRESHOLD

FORMAT = 'dir-packed-1'  # raised when older readers would misread it
MANIFEST, LABELS, SAMPLES = 'manifest.json', 'labels.npy', 'samples.bin'
ALL_HANDS = 'all'  # the manifest's entry 'hands' of a set in which samples lack a hand, whose labels are NaN
PARTS = ('img', 'mask', 'dense', 'entries')  # of a sample in samples.bin, in this order
PACK_AGAIN = 'copy it again, or pack the data set again (python dataset/pack.py)'


@cache
def record_type() -> np.dtype:
    """One sample in labels.npy: float32 labels as in ``dataset.prepared.Sample``, first byte, bytes of each part."""
    return np.dtype(
        [(name, '<f4', shape) for name, shape in LABEL_SHAPES.items()]
        + [('begin', '<u8'), *((f'{part}_bytes', '<u4') for part in PARTS)]
    )


class PackedDataset(PreparedSplit):
    """A packed split. Raises UserError if its files are missing, truncated or of another version, or if requested
    masks or dense maps were not packed; DamageError on access to a damaged sample.

    Samples are read, not mapped into memory: where a disk fails, a mapping ends the process with SIGBUS.
    """

    def __init__(self, path: str | Path, split: str, **options):
        folder = Path(path) / split
        self.manifest = read_manifest(folder)
        quarantined = read_quarantine(folder)
        stored = self.manifest['samples']
        if len(quarantined) >= stored or (quarantined and quarantined[-1] >= stored):
            raise UserError(f'{folder} quarantines samples that it does not have, or all of them; pack it again.')
        super().__init__(folder, stored - len(quarantined), quarantined=quarantined, **options)
        for kind, wanted in (('mask', self.with_mask), ('dense', self.with_dense)):
            if wanted and not self.manifest[kind]:
                raise UserError(
                    f'{folder} was packed without {kind} images: set DATASET.TARGETS render, or pack it '
                    'without --no-targets.'
                )

    def __getstate__(self) -> dict:
        """Leave the open files out: a spawned process opens them itself."""
        return {key: value for key, value in self.__dict__.items() if key not in ('_labels_file', '_samples_file')}

    @cached_property
    def _labels_file(self) -> '_File':
        """labels.npy from the first record on."""
        path = self.folder / LABELS
        kind, stored = record_type(), self.manifest['samples']
        try:
            with open(path, 'rb') as file:
                found = read_header(file)
        except OSError:
            raise
        except Exception as error:  # a damaged header can raise almost anything
            raise UserError(f'{path} cannot be read ({error}): {PACK_AGAIN}.') from None
        if (
            found.shape != (stored,)
            or found.kind != kind
            or found.begin + stored * kind.itemsize != path.stat().st_size
        ):
            raise UserError(f'{path} does not hold the labels of {stored} samples: {PACK_AGAIN}.')
        return _File(path, begin=found.begin)

    @cached_property
    def _samples_file(self) -> '_File':
        return _File(self.folder / SAMPLES)

    def name(self, index: int) -> str:
        return f'{self.folder / SAMPLES}[{self.number(index)}]'

    def labels(self, index: int) -> tuple[np.ndarray, ...]:
        record = self.record(index)
        arrays = tuple(record[name] for name in LABEL_SHAPES)
        absent = hands_without_numbers(arrays) if self.manifest.get('hands') == ALL_HANDS else None
        check_finite(arrays, f'The label of {self.name(index)}', advice=PACK_AGAIN, absent=absent)
        return arrays

    def entries(self, index: int) -> dict[str, dict]:
        try:
            entries = json.loads(self._bytes('entries', index))
        except (ValueError, RecursionError):
            entries = None
        if not isinstance(entries, dict):
            raise DamageError(f'The entries of {self.name(index)} are damaged; {PACK_AGAIN}.')
        return entries

    def image(self, kind: str, index: int) -> np.ndarray:
        return checked_crop(
            lambda: self._bytes(kind, index), f'The {kind} image of {self.name(index)}', advice=PACK_AGAIN
        )

    def mask(self, index: int) -> np.ndarray:
        if self.manifest['mask'] == 'jpeg':
            return super().mask(index)
        try:
            return unpack_bits(self._bytes('mask', index))
        except (zlib.error, ValueError):
            raise DamageError(f'The mask of {self.name(index)} is damaged; {PACK_AGAIN}.', BAD_IMAGE) from None

    def record(self, index: int) -> np.ndarray:
        """The sample's record, () of ``record_type``. Raises OSError if it cannot be read."""
        kind = record_type()
        content = self._labels_file.read(self.number(index) * kind.itemsize, kind.itemsize)
        return np.frombuffer(content, kind)[0]

    def _bytes(self, part: str, index: int) -> bytes:
        record = self.record(index)
        begin = int(record['begin']) + sum(int(record[f'{before}_bytes']) for before in PARTS[: PARTS.index(part)])
        size = int(record[f'{part}_bytes'])
        if begin + size > self.manifest['files'][SAMPLES]['bytes']:
            raise DamageError(f'The {part} of {self.name(index)} lies beyond the end of {SAMPLES}; {PACK_AGAIN}.')
        return self._samples_file.read(begin, size)


class _File:
    """A file that is read by position, so that forked processes may share it. ``begin``: position of byte 0."""

    def __init__(self, path: Path, begin: int = 0):
        self.path, self.begin = path, begin
        self._descriptor: int | None = os.open(path, os.O_RDONLY)

    def __del__(self):
        self._close()

    def read(self, position: int, size: int) -> bytes:
        """Raises OSError if the bytes cannot be read, in which case the next attempt opens the file anew."""
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        try:
            content = os.pread(self._descriptor, size, self.begin + position)
        except OSError as error:
            self._close()
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        if len(content) < size:
            raise DamageError(f'{self.path} has been truncated; {PACK_AGAIN}.', UNREADABLE)
        return content

    def _close(self) -> None:
        descriptor, self._descriptor = getattr(self, '_descriptor', None), None
        if descriptor is not None:
            os.close(descriptor)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a packed split. Raises UserError if its version or the size of a file is wrong."""
    if not folder.exists() and partial_folder(folder).is_dir():
        raise UserError(f'{folder} is only partly packed; rerun dataset/pack.py as before to finish it.')
    manifest = read_json(folder / MANIFEST)
    version = manifest.get('format') if isinstance(manifest, dict) else None
    if version != FORMAT:
        raise UserError(
            f'{folder / MANIFEST} is of format {version}, this version reads {FORMAT}: pack the data set '
            'again (python dataset/pack.py).'
        )
    try:
        sizes = {name: manifest['files'][name]['bytes'] for name in (LABELS, SAMPLES)}
        counts = [manifest['samples'], *sizes.values()]
        complete = 'mask' in manifest and 'dense' in manifest and all(type(n) is int and n > 0 for n in counts)
    except (KeyError, TypeError):
        complete = False
    if not complete:
        raise UserError(f'{folder / MANIFEST} lacks some of its entries: {PACK_AGAIN}.')
    if manifest['samples'] * record_type().itemsize > sizes[LABELS]:
        raise UserError(
            f'{folder / MANIFEST} records {manifest["samples"]} samples, for which {LABELS} is too short: {PACK_AGAIN}.'
        )
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.exists() else None
        if found != size:
            state = 'is missing' if found is None else f'has {found:,} bytes instead of {size:,}'
            raise UserError(f'{path} {state}: {PACK_AGAIN}.')
    return manifest


def verify_split(folder: Path) -> None:
    """Raises UserError unless both files have the checksums of the manifest."""
    for path in files_with_other_checksums(folder, read_manifest(folder)):
        raise UserError(f'{path} is damaged (its SHA-256 is not that of the manifest): {PACK_AGAIN}.')


def files_with_other_checksums(folder: Path, manifest: dict[str, Any]) -> Iterator[Path]:
    """The files of a packed split that do not have the SHA-256 of the manifest, read one after the other."""
    for name in (LABELS, SAMPLES):  # and no other name that a manifest from elsewhere may hold
        if sha256_of_file(folder / name) != manifest['files'][name].get('sha256'):
            yield folder / name


def visible_hands(mask: np.ndarray) -> np.ndarray:
    """(256, 256, 2) uint8 left, right -> bool: whether a pixel shows the hand, by the rule of ``classify_mask``."""
    left, right = mask[..., 0], mask[..., 1]
    return np.stack([(left > MASK_THRESHOLD) & (left >= right), (right > MASK_THRESHOLD) & (right > left)], -1)


def pack_bits(mask: np.ndarray) -> bytes:
    """(256, 256, 2) uint8 left, right -> bytes of ``visible_hands``."""
    return zlib.compress(np.packbits(visible_hands(mask)).tobytes(), 1)


def unpack_bits(content: bytes | memoryview) -> np.ndarray:
    """Inverse of ``pack_bits``: (256, 256, 2) uint8, 0 or 255. Raises zlib.error or ValueError for anything else."""
    size = CROP_SIZE * CROP_SIZE // 4
    unpacked = zlib.decompressobj()
    bits = np.frombuffer(unpacked.decompress(content, size + 1), np.uint8)  # bounded: a few bytes can expand to many
    if not unpacked.eof:
        raise ValueError('not the bits of one mask')
    return np.unpackbits(bits).reshape(CROP_SIZE, CROP_SIZE, 2) * np.uint8(255)
