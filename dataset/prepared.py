"""Prepared data sets: the sample, what every reader of a split has in common, and the reader of the field's folder."""

import os
from collections.abc import Callable
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

FOLDERS = {'img': 'jpg', 'mask': 'jpg', 'dense': 'jpg', 'anno': 'pkl'}  # of a split, and what is in them
RECORD = 'preparation.json'  # what was kept, what was skipped and why
# Channels of the mask files: the field's preparation writes the right hand into BGR channel 1, the left into channel 2.
MASK_FILE_CHANNELS = (2, 1)  # of (left, right)


def paths(folder: Path, index: int) -> dict[str, Path]:
    """The files of one sample."""
    return {name: folder / name / f'{index}.{suffix}' for name, suffix in FOLDERS.items()}


def partial_folder(folder: Path) -> Path:
    """What the folder is called until it is finished."""
    return folder.with_name(f'{folder.name}.partial')


class Sample(NamedTuple):
    """One sample as it lies on disk, or a batch of them; labels are made from it on the device of the model."""

    image: Tensor  # (256, 256, 3) uint8, BGR
    mask: Tensor  # (256, 256, 2) uint8: 255 where the left, the right hand is seen (JPEG: not exactly 0 or 255)
    dense: Tensor  # (256, 256, 3) uint8, BGR; mask and dense are (0, 0, ...) where not asked for
    root: Tensor  # (2, 3, 3) world root rotation
    pose: Tensor  # (2, 45) PCA coefficients
    shape: Tensor  # (2, 10)
    translation: Tensor  # (2, 3) m, world
    camera_rotation: Tensor  # (3, 3) world -> camera
    camera_translation: Tensor  # (3,) m
    intrinsics: Tensor  # (3, 3) of the crop, pixels
    index: Tensor  # () int64
    augmentation: AugmentationParameters  # what ``BatchMaker`` does to it


class PreparedSplit(Dataset):
    """One split of a prepared data set, however it is stored: ``InterHandDataset`` reads the field's folder of files,
    ``dataset.packed.PackedDataset`` a few large ones. Subclasses say where a sample's bytes and labels are.

    Indexed by ``(index, epoch)`` (see ``EpochSampler``) or ``index``: with ``ranges`` the augmentation is drawn from
    (seed, epoch, index) alone, so that it does not depend on workers, order or where a run was resumed. A loader
    fetches whole batches through ``__getitems__``. Without ``with_mask``, ``with_dense`` those pictures are not read.
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
        """What to call the sample so that people find it."""
        raise NotImplementedError

    def labels(self, index: int) -> tuple[np.ndarray, ...]:
        """float32 (root, pose, shape, translation, camera_rotation, camera_translation, intrinsics) as in Sample."""
        raise NotImplementedError

    def entries(self, index: int) -> dict[str, dict]:
        """The sample's entries of data.json, 'image' and 'annotation'; empty where the preparation kept none."""
        raise NotImplementedError

    def picture(self, kind: str, index: int) -> np.ndarray:
        """(256, 256, 3) uint8 BGR of kind 'img', 'mask' or 'dense'. Raises UserError if it cannot be read."""
        raise NotImplementedError

    def mask(self, index: int) -> np.ndarray:
        """(256, 256, 2) uint8: where the left, the right hand is seen."""
        stored = self.picture('mask', index)
        mask = np.empty((CROP_SIZE, CROP_SIZE, 2), np.uint8)
        left, right = MASK_FILE_CHANNELS
        cv2.mixChannels([stored], [mask], [left, 0, right, 1])  # indexing takes ten times as long
        return mask

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        batch = self.__getitems__([key])
        return Sample(*(x[0] for x in batch[:-1]), AugmentationParameters(*(x[0] for x in batch.augmentation)))

    def __getitems__(self, keys: list[int | tuple[int, int]]) -> Sample:
        """A batch: every field with a leading axis."""
        keys = [key if isinstance(key, tuple) else (key, 0) for key in keys]
        indices = [index for index, _ in keys]
        for index in indices:
            if not 0 <= index < self.length:
                raise IndexError(f'{self.folder} has samples 0 to {self.length - 1}, not {index}')
        readers = (
            (partial(self.picture, 'img'), 3, True),
            (self.mask, 2, self.with_mask),
            (partial(self.picture, 'dense'), 3, self.with_dense),
        )
        pictures = [
            _read_all(read, indices, channels) if wanted else torch.empty(len(keys), 0, 0, channels).byte()
            for read, channels, wanted in readers
        ]
        labels = (torch.from_numpy(np.stack(column)) for column in zip(*map(self.labels, indices)))
        plan = draw_augmentations(self.ranges, [(self.seed, epoch, index) for index, epoch in keys])
        return Sample(*pictures, *labels, torch.tensor(indices), plan)


def _read_all(read: Callable[[int], np.ndarray], indices: list[int], channels: int) -> Tensor:
    pictures = torch.empty(len(indices), CROP_SIZE, CROP_SIZE, channels, dtype=torch.uint8)
    if get_worker_info():
        pictures.share_memory_()  # now, while it is empty: the loader would copy it there when it is full
    for row, index in zip(pictures.numpy(), indices):
        row[...] = read(index)
    return pictures


class InterHandDataset(PreparedSplit):
    """A split in the field's interchange form: a folder of files (dataset/prepare/split.py).

    Raises UserError if the folder is missing, empty, has a gap, or (on access) if a file is unreadable.
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
                f'{path} is not a prepared annotation ({type(error).__name__}: {error}); prepare the data '
                'set again (python dataset/interhand.py).'
            ) from None
        if not all(np.isfinite(array).all() for array in arrays):
            raise UserError(f'{path} holds NaN or infinity; prepare the data set again (python dataset/interhand.py).')
        return tuple(arrays)

    def entries(self, index: int) -> dict[str, dict]:
        content = self._read_annotation(index)[1]
        return {kind: content.get(kind) or {} for kind in ('image', 'annotation')}

    def _read_annotation(self, index: int) -> tuple[Path, dict[str, Any]]:
        path = self.path('anno', index)
        content = read_pickle(path)
        if not isinstance(content, dict):
            raise UserError(
                f'{path} is not a prepared annotation (it holds {type(content).__name__}); prepare the '
                'data set again (python dataset/interhand.py).'
            )
        return path, content

    def picture(self, kind: str, index: int) -> np.ndarray:
        path = self.path(kind, index)
        try:
            image = read_image(path)
        except OSError:
            image = None
        return checked_crop(image, str(path), advice='prepare the data set again (python dataset/interhand.py)')


def checked_crop(image: np.ndarray | None, name: str, *, advice: str) -> np.ndarray:
    """``image`` itself; raises UserError, with what to do, if it is none or not of a crop's size."""
    if image is None:
        raise UserError(f'{name} is missing or not a readable image; {advice}.')
    if image.shape[:2] != (CROP_SIZE, CROP_SIZE):
        raise UserError(
            f'{name} is {image.shape[1]} x {image.shape[0]} pixels; prepared crops are {CROP_SIZE} x '
            f'{CROP_SIZE}: {advice}.'
        )
    return image


def _count(folder: Path) -> int:
    """Number of samples of a prepared split; raises UserError unless every kind of file runs 0 .. n - 1."""
    if not folder.is_dir():
        if partial_folder(folder).is_dir():
            raise UserError(
                f'{folder} is only half prepared; give the same dataset/interhand.py command again to finish it.'
            )
        if any(folder.parent.glob(f'{folder.name}.shard-*')):
            raise UserError(
                f'{folder} is prepared in shards; when all are finished, give the dataset/interhand.py '
                'command with --merge.'
            )
        raise UserError(
            f'{folder} does not exist: set DATASET.PATH to a prepared data set '
            '(python dataset/interhand.py --data_path INTERHAND --save_path ./data/interhand2.6m/).'
        )
    numbers: dict[str, set[int]] = {}
    for kind, suffix in ((kind, f'.{ending}') for kind, ending in FOLDERS.items()):
        if not (folder / kind).is_dir():
            raise UserError(f'{folder / kind} is missing: {folder} is not a prepared split (dataset/interhand.py).')
        stems = (entry.name.removesuffix(suffix) for entry in os.scandir(folder / kind) if entry.name.endswith(suffix))
        numbers[kind] = {int(stem) for stem in stems if stem.isdecimal()}
    samples = 1 + max(max(found, default=-1) for found in numbers.values())
    if samples == 0:
        raise UserError(f'{folder} holds no samples; prepare the data set again (python dataset/interhand.py).')
    for kind, found in numbers.items():
        gaps = sorted(set(range(samples)) - found)
        if gaps:
            raise UserError(
                f'{folder / kind} has gaps: {len(gaps)} of its files are missing, the first is number '
                f'{gaps[0]}. Copy it again, or prepare the data set again (python dataset/interhand.py).'
            )
    return samples
