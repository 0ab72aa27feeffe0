"""Prepared data sets: the sample, the base class of all readers, and the reader of the field's folder of files."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from dataset.augmentation import AugmentationParameters, AugmentationRanges, draw_augmentations
from utils.errors import UserError
from utils.files import read_image, read_pickle
from utils.geometry import CROP_SIZE
from utils.hand import SIDES

FOLDERS = {'img': 'jpg', 'mask': 'jpg', 'dense': 'jpg', 'anno': 'pkl'}  # of a split -> extension of their files
RECORD = 'preparation.json'  # counts of kept and skipped frames, with the reasons
# The field's preparation writes the right hand into BGR channel 1 of a mask file and the left into channel 2.
MASK_FILE_CHANNELS = (2, 1)  # of (left, right)
PREPARE_AGAIN = 'prepare the data set again (python dataset/interhand.py)'


def paths(folder: Path, index: int) -> dict[str, Path]:
    """The files of one sample."""
    return {name: folder / name / f'{index}.{suffix}' for name, suffix in FOLDERS.items()}


def partial_folder(folder: Path) -> Path:
    """The folder's name until the preparation has finished it."""
    return folder.with_name(f'{folder.name}.partial')


class Sample(NamedTuple):
    """One sample as stored on disk, or a batch with a leading axis; targets are computed from it on the device."""

    image: Tensor  # (256, 256, 3) uint8, BGR
    mask: Tensor | None  # (256, 256, 2) uint8: 255 where the left, right hand is visible (JPEG: only near 0 or 255)
    dense: Tensor | None  # (256, 256, 3) uint8, BGR; mask and dense are None where they were not requested
    root: Tensor  # (2, 3, 3) world root rotation
    pose: Tensor  # (2, 45) PCA coefficients
    shape: Tensor  # (2, 10)
    translation: Tensor  # (2, 3) m, world
    camera_rotation: Tensor  # (3, 3) world -> camera
    camera_translation: Tensor  # (3,) m
    intrinsics: Tensor  # (3, 3) of the crop, pixels
    index: Tensor  # type: ignore[assignment]  # () int64; hides tuple.index, which no sample needs
    augmentation: AugmentationParameters  # applied by ``BatchMaker``

    def to(self, device: torch.device) -> 'Sample':
        """The sample on ``device``, but for its augmentation: decisions read it on the host, without synchronising."""
        return self.map_tensors(lambda value: value.to(device, non_blocking=True))

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> 'Sample':
        """Apply ``function`` to every tensor but those of the augmentation."""
        tensors = {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}
        changed: dict[str, Any] = {name: function(value) for name, value in tensors.items()}
        return self._replace(**changed)


# The fields of a sample that its annotation holds, in the order of ``PreparedSplit.labels``, with their shapes.
LABEL_SHAPES = {
    'root': (2, 3, 3),
    'pose': (2, 45),
    'shape': (2, 10),
    'translation': (2, 3),
    'camera_rotation': (3, 3),
    'camera_translation': (3,),
    'intrinsics': (3, 3),
}


class PreparedSplit(Dataset):
    """One split of a prepared data set, independent of storage; subclasses read the images and labels of a sample.

    ``InterHandDataset`` reads the field's folder of files, ``dataset.packed.PackedDataset`` a few large files.

    Indexed by ``(index, epoch)`` (see ``EpochSampler``) or ``index``: with ``ranges`` the augmentation is drawn from
    (seed, epoch, index) alone, so it does not depend on workers, on order, or on where a run was resumed. A loader
    fetches whole batches through ``__getitems__``. Masks and dense maps are read only with ``with_mask``,
    ``with_dense``.
    """

    def __init__(
        self,
        folder: Path,
        length: int,
        *,
        ranges: AugmentationRanges | None = None,
        seed: int = 0,
        with_mask: bool = True,
        with_dense: bool = True,
    ):
        self.folder, self.length, self.ranges, self.seed = folder, length, ranges, seed
        self.with_mask, self.with_dense = with_mask, with_dense

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        """Where the sample is stored, for messages."""
        raise NotImplementedError

    def labels(self, index: int) -> tuple[np.ndarray, ...]:
        """The float32 arrays of ``LABEL_SHAPES``. Raises UserError if they cannot be read."""
        raise NotImplementedError

    def entries(self, index: int) -> dict[str, dict]:
        """The sample's entries of data.json, 'image' and 'annotation'; empty if the preparation kept none."""
        raise NotImplementedError

    def image(self, kind: str, index: int) -> np.ndarray:
        """(256, 256, 3) uint8 BGR of kind 'img', 'mask' or 'dense'. Raises UserError if it cannot be read."""
        raise NotImplementedError

    def mask(self, index: int) -> np.ndarray:
        """(256, 256, 2) uint8: where the left, right hand is visible. Raises UserError if it cannot be read."""
        stored = self.image('mask', index)
        mask = np.empty((CROP_SIZE, CROP_SIZE, 2), np.uint8)
        left, right = MASK_FILE_CHANNELS
        cv2.mixChannels([stored], [mask], [left, 0, right, 1])  # indexing takes ten times as long
        return mask

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        batch = self.__getitems__([key])
        augmentation = AugmentationParameters(*(x[0] for x in batch.augmentation))
        return batch.map_tensors(lambda values: values[0])._replace(augmentation=augmentation)

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> Sample:
        """Read a batch: every field with a leading axis."""
        pairs = [key if isinstance(key, tuple) else (key, 0) for key in keys]
        indices = [index for index, _ in pairs]
        for index in indices:
            if not 0 <= index < self.length:
                raise IndexError(f'{self.folder} has samples 0 to {self.length - 1}, not {index}')
        labels = zip(*(self.labels(index) for index in indices))
        return Sample(
            image=_read_all(partial(self.image, 'img'), indices, channels=3),
            mask=_read_all(self.mask, indices, channels=2) if self.with_mask else None,
            dense=_read_all(partial(self.image, 'dense'), indices, channels=3) if self.with_dense else None,
            **{name: torch.from_numpy(np.stack(column)) for name, column in zip(LABEL_SHAPES, labels, strict=True)},
            index=torch.tensor(indices),
            augmentation=draw_augmentations(self.ranges, [(self.seed, epoch, index) for index, epoch in pairs]),
        )


def _read_all(read: Callable[[int], np.ndarray], indices: list[int], *, channels: int) -> Tensor:
    images = torch.empty(len(indices), CROP_SIZE, CROP_SIZE, channels, dtype=torch.uint8)
    if get_worker_info():
        images.share_memory_()  # while it is empty: otherwise the loader copies it there when it is full
    for row, index in zip(images.numpy(), indices):
        row[...] = read(index)
    return images


class InterHandDataset(PreparedSplit):
    """Read a split in the field's interchange format: a folder of files (dataset/prepare/split.py).

    Raises UserError if the folder is missing or empty or lacks files, and on access if a file is unreadable.
    """

    def __init__(self, path: str | Path, split: str, **options):
        folder = Path(path) / split
        super().__init__(folder, _count(folder), **options)

    def name(self, index: int) -> str:
        """The image's path."""
        return str(self.path('img', index))

    def path(self, kind: str, index: int) -> Path:
        return self.folder / kind / f'{index}.{FOLDERS[kind]}'

    def labels(self, index: int) -> tuple[np.ndarray, ...]:
        path, content = self._read_annotation(index)
        try:
            hands = [content['mano_params'][side] for side in SIDES]
            camera = content['camera']
            arrays = [
                np.stack([np.asarray(hand[key], np.float32).reshape(shape) for hand in hands])
                for key, shape in (('R', (3, 3)), ('pose', 45), ('shape', 10), ('trans', 3))
            ]
            arrays += [
                np.asarray(camera[key], np.float32).reshape(shape)
                for key, shape in (('R', (3, 3)), ('t', 3), ('camera', (3, 3)))
            ]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f'{path} is not a prepared annotation ({type(error).__name__}: {error}); {PREPARE_AGAIN}.'
            ) from None
        if not all(np.isfinite(array).all() for array in arrays):
            raise UserError(f'{path} holds NaN or infinity; {PREPARE_AGAIN}.')
        return tuple(arrays)

    def entries(self, index: int) -> dict[str, dict]:
        content = self._read_annotation(index)[1]
        return {kind: content.get(kind) or {} for kind in ('image', 'annotation')}

    def _read_annotation(self, index: int) -> tuple[Path, dict[str, Any]]:
        path = self.path('anno', index)
        content = read_pickle(path)
        if not isinstance(content, dict):
            raise UserError(
                f'{path} is not a prepared annotation (it holds {type(content).__name__}); {PREPARE_AGAIN}.'
            )
        return path, content

    def image(self, kind: str, index: int) -> np.ndarray:
        path = self.path(kind, index)
        try:
            image = read_image(path)
        except OSError:
            image = None
        return checked_crop(image, str(path), advice=PREPARE_AGAIN)


def checked_crop(image: np.ndarray | None, name: str, *, advice: str) -> np.ndarray:
    """Return ``image``; raises UserError with ``advice`` if it is None or not 256 x 256 pixels."""
    if image is None:
        raise UserError(f'{name} is missing or not a readable image; {advice}.')
    if image.shape[:2] != (CROP_SIZE, CROP_SIZE):
        raise UserError(
            f'{name} is {image.shape[1]} x {image.shape[0]} pixels, but prepared crops are {CROP_SIZE} x '
            f'{CROP_SIZE}; {advice}.'
        )
    return image


def _count(folder: Path) -> int:
    """Number of samples of a prepared split. Raises UserError unless every kind of file is numbered 0 to n - 1."""
    if not folder.is_dir():
        if partial_folder(folder).is_dir():
            raise UserError(f'{folder} is only partly prepared; rerun dataset/interhand.py as before to finish it.')
        if any(folder.parent.glob(f'{folder.name}.shard-*')):
            raise UserError(
                f'{folder} is prepared in shards; when all are finished, merge them with '
                'python dataset/interhand.py --merge.'
            )
        raise UserError(
            f'{folder} does not exist: set DATASET.PATH to a prepared data set '
            '(python dataset/interhand.py --data_path INTERHAND --save_path ./data/interhand2.6m/).'
        )
    numbers: dict[str, set[int]] = {}
    for kind, suffix in ((kind, f'.{ending}') for kind, ending in FOLDERS.items()):
        if not (folder / kind).is_dir():
            raise UserError(f'{folder / kind} is missing, so {folder} is not a prepared split; {PREPARE_AGAIN}.')
        stems = (
            entry.name.removesuffix(suffix)
            for entry in os.scandir(folder / kind)
            if entry.name.endswith(suffix) and entry.is_file()  # pipes and devices can be read forever
        )
        numbers[kind] = {int(stem) for stem in stems if stem.isdecimal()}
    samples = 1 + max(max(found, default=-1) for found in numbers.values())
    if samples == 0:
        raise UserError(f'{folder} holds no samples; {PREPARE_AGAIN}.')
    for kind, found in numbers.items():
        if gaps := samples - len(found):
            first = next(number for number in range(samples) if number not in found)
            raise UserError(
                f'{folder / kind} has gaps: {gaps} of its files are missing, the first is number {first}. Copy '
                f'it again, or {PREPARE_AGAIN}.'
            )
    return samples
