"""Read a packed data set; dataset/prepare/pack.py describes its files."""

import json
import mmap
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dataset.prepared import LABEL_SHAPES, PreparedSplit, checked_crop, partial_folder
from utils.errors import UserError
from utils.files import decode_image, read_json, sha256_of_file
from utils.geometry import CROP_SIZE
from utils.hand import MASK_THRESHOLD

FORMAT = 'dir-packed-1'  # raised when older readers would misread it
MANIFEST, LABELS, SAMPLES = 'manifest.json', 'labels.npy', 'samples.bin'
PARTS = ('img', 'mask', 'dense', 'entries')  # of a sample in samples.bin, in this order
PACK_AGAIN = 'copy it again, or pack the data set again (python dataset/pack.py)'


def record_type() -> np.dtype:
    """One sample in labels.npy: float32 labels as in ``dataset.prepared.Sample``, first byte, bytes of each part."""
    return np.dtype(
        [(name, '<f4', shape) for name, shape in LABEL_SHAPES.items()]
        + [('begin', '<u8'), *((f'{part}_bytes', '<u4') for part in PARTS)]
    )


class PackedDataset(PreparedSplit):
    """A packed split. Raises UserError if its files are missing, truncated or of another version, or if requested
    masks or dense maps were not packed."""

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
        """Leave the memory maps out: they would be pickled as copies. A spawned process maps the files itself."""
        return {key: value for key, value in self.__dict__.items() if key not in ('_records', '_content')}

    @cached_property
    def _records(self) -> np.ndarray:
        try:
            records = np.load(self.folder / LABELS, mmap_mode='r', allow_pickle=False)
        except ValueError as error:
            raise UserError(f'{self.folder / LABELS} cannot be read ({error}): {PACK_AGAIN}.') from None
        if records.shape != (self.length,) or records.dtype != record_type():
            raise UserError(f'{self.folder / LABELS} does not hold the labels of {self.length} samples: {PACK_AGAIN}.')
        return records

    @cached_property
    def _content(self) -> memoryview:
        with open(self.folder / SAMPLES, 'rb') as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def name(self, index: int) -> str:
        return f'{self.folder / SAMPLES}[{index}]'

    def labels(self, index: int) -> tuple[np.ndarray, ...]:
        record = self._records[index]
        return tuple(record[name] for name in LABEL_SHAPES)

    def entries(self, index: int) -> dict[str, dict]:
        try:
            entries = json.loads(bytes(self._bytes('entries', index)))
        except (ValueError, RecursionError):
            entries = None
        if not isinstance(entries, dict):
            raise UserError(f'The entries of {self.name(index)} are damaged; {PACK_AGAIN}.')
        return entries

    def image(self, kind: str, index: int) -> np.ndarray:
        return checked_crop(
            decode_image(self._bytes(kind, index)), f'The {kind} picture of {self.name(index)}', advice=PACK_AGAIN
        )

    def mask(self, index: int) -> np.ndarray:
        if self.manifest['mask'] == 'jpeg':
            return super().mask(index)
        try:
            return unpack_bits(self._bytes('mask', index))
        except (zlib.error, ValueError):
            raise UserError(f'The mask of {self.name(index)} is damaged; {PACK_AGAIN}.') from None

    def _bytes(self, part: str, index: int) -> memoryview:
        record = self._records[index]
        begin = int(record['begin']) + sum(int(record[f'{before}_bytes']) for before in PARTS[: PARTS.index(part)])
        end = begin + int(record[f'{part}_bytes'])
        if end > len(self._content):
            raise UserError(f'{self.folder / LABELS}: sample {index} ends beyond {SAMPLES}; {PACK_AGAIN}.')
        return self._content[begin:end]


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
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.exists() else None
        if found != size:
            state = 'is missing' if found is None else f'has {found:,} bytes instead of {size:,}'
            raise UserError(f'{path} {state}: {PACK_AGAIN}.')
    return manifest


def verify_split(folder: Path) -> None:
    """Raises UserError unless both files have the checksums of the manifest."""
    files = read_manifest(folder)['files']
    for name in (LABELS, SAMPLES):  # and no other name that a manifest from elsewhere may hold
        if sha256_of_file(folder / name) != files[name].get('sha256'):
            raise UserError(f'{folder / name} is damaged (its SHA-256 is not that of the manifest): {PACK_AGAIN}.')


def pack_bits(mask: np.ndarray) -> bytes:
    """(256, 256, 2) uint8 left, right -> the visible hand at each pixel, by the rule of ``classify_mask``."""
    left, right = mask[..., 0], mask[..., 1]
    seen = np.stack([(left > MASK_THRESHOLD) & (left >= right), (right > MASK_THRESHOLD) & (right > left)], -1)
    return zlib.compress(np.packbits(seen).tobytes(), 1)


def unpack_bits(content: bytes | memoryview) -> np.ndarray:
    """Inverse of ``pack_bits``: (256, 256, 2) uint8, 0 or 255. Raises zlib.error or ValueError for anything else."""
    size = CROP_SIZE * CROP_SIZE // 4
    unpacked = zlib.decompressobj()
    bits = np.frombuffer(unpacked.decompress(content, size + 1), np.uint8)  # bounded: a few bytes can expand to many
    if not unpacked.eof:
        raise ValueError('not the bits of one mask')
    return np.unpackbits(bits).reshape(CROP_SIZE, CROP_SIZE, 2) * np.uint8(255)
