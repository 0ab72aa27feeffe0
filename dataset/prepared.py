"""Prepared data sets: the sample, the base class of all readers, and the reader of the field's folder of files."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from dataset.augmentation import AugmentationParameters, AugmentationRanges, draw_augmentations
from dataset.damage import (
    BAD_ANNOTATION,
    BAD_IMAGE,
    BAD_LABELS,
    MISSING,
    MOST_REPLACEMENTS,
    WRONG_SIZE,
    Damage,
    DamageError,
    read_patiently,
    read_quarantine,
    replacement,
)
from manopth import safe_pickle
from utils.errors import UserError
from utils.files import read_pickle
from utils.geometry import CROP_SIZE
from utils.hand import SIDES
from utils.images import ImageError, announced_size, decode_image

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
    present: Tensor  # (2,) bool: the image shows the hand; the labels of another are those of ``with_placeholders``
    camera_rotation: Tensor  # (3, 3) world -> camera
    camera_translation: Tensor  # (3,) m
    intrinsics: Tensor  # (3, 3) of the crop, pixels
    index: Tensor  # type: ignore[assignment]  # () int64; hides tuple.index, which no sample needs
    augmentation: AugmentationParameters  # applied by ``BatchMaker``
    damage: Sequence[Damage] = ()  # damaged samples that were met while this was read

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


HAND_LABELS = ('root', 'pose', 'shape', 'translation')

# What a split does when a batch asks it for a damaged sample.
OnDamage = Literal['raise', 'replace', 'leave out']


class PreparedSplit(Dataset):
    """One split of a prepared data set, independent of storage; subclasses read the images and labels of a sample.

    ``InterHandDataset`` reads the field's folder of files, ``dataset.packed.PackedDataset`` a few large files.

    Indexed by ``(index, epoch)`` (see ``EpochSampler``) or ``index``: with ``ranges`` the augmentation is drawn from
    (seed, epoch, index) alone, so it does not depend on workers, on order, or on where a run was resumed. A loader
    fetches whole batches through ``__getitems__``. Masks and dense maps are read only with ``with_mask``,
    ``with_dense``.

    on_damage: 'raise' a DamageError for a damaged sample; 'replace' it by another one that follows from (seed, epoch,
    index) alone; or 'leave out', which makes the batch smaller. The last two list it in ``Sample.damage``.

    quarantined: numbers of stored samples that are left out (dataset/verify.py); ``length`` counts the others, and
    ``number`` maps an index to the number that a sample is stored under.
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
        on_damage: OnDamage = 'raise',
        quarantined: Sequence[int] = (),
    ):
        self.folder, self.length, self.ranges, self.seed = folder, length, ranges, seed
        self.with_mask, self.with_dense, self.on_damage = with_mask, with_dense, on_damage
        stored = np.arange(length + len(quarantined)) if quarantined else None
        self._numbers = None if stored is None else np.delete(stored, list(quarantined))

    def __len__(self) -> int:
        return self.length

    def number(self, index: int) -> int:
        """The number under which sample ``index`` is stored: higher where samples before it are quarantined."""
        return index if self._numbers is None else int(self._numbers[index])

    def name(self, index: int) -> str:
        """Where the sample is stored, for messages."""
        raise NotImplementedError

    def labels(self, index: int) -> tuple[np.ndarray, ...]:
        """The float32 arrays of ``LABEL_SHAPES``; every number of an absent hand is NaN.

        Raises DamageError, and OSError if a file cannot be read.
        """
        raise NotImplementedError

    def complete_labels(self, index: int) -> dict[str, np.ndarray]:
        """'present' (2,) bool, then the arrays of ``labels`` by name, with placeholders for absent hands.

        Raises like ``labels``.
        """
        labels = dict(zip(LABEL_SHAPES, self.labels(index), strict=True))
        present = ~np.isnan(labels['pose'][:, 0])
        return {'present': present} | (labels if present.all() else with_placeholders(labels, present))

    def entries(self, index: int) -> dict[str, dict]:
        """The sample's entries of data.json, 'image' and 'annotation'; empty if the preparation kept none. Raises like
        ``labels``."""
        raise NotImplementedError

    def image(self, kind: str, index: int) -> np.ndarray:
        """(256, 256, 3) uint8 BGR of kind 'img', 'mask' or 'dense'. Raises like ``labels``."""
        raise NotImplementedError

    def mask(self, index: int) -> np.ndarray:
        """(256, 256, 2) uint8: where the left, right hand is visible. Raises like ``labels``."""
        stored = self.image('mask', index)
        mask = np.empty((CROP_SIZE, CROP_SIZE, 2), np.uint8)
        left, right = MASK_FILE_CHANNELS
        cv2.mixChannels([stored], [mask], [left, 0, right, 1])  # indexing takes ten times as long
        return mask

    def siblings(self, index: int) -> range:
        """The samples from which one is chosen in place of damaged sample ``index``."""
        return range(self.length)

    def is_readable(self, index: int) -> bool:
        """Whether sample ``index`` exists and is undamaged."""
        try:
            read_patiently(lambda: deque(self._arrays(index), maxlen=0), self.name(index))
        except DamageError:
            return False
        return True

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        batch = self.__getitems__([key])
        augmentation = AugmentationParameters(*(x[0] for x in batch.augmentation))
        return batch.map_tensors(lambda values: values[0])._replace(augmentation=augmentation)

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> Sample:
        """Read a batch: every field with a leading axis."""
        pairs = [key if isinstance(key, tuple) else (key, 0) for key in keys]
        for index, _ in pairs:
            if not 0 <= index < self.length:
                raise IndexError(f'{self.folder} has samples 0 to {self.length - 1}, not {index}')
        fields = self._empty_batch(len(pairs))
        rows = {name: tensor.numpy() for name, tensor in fields.items()}
        damage: dict[int, Damage] = {}
        indices: list[int] = []
        drawn: list[tuple[int, int, int]] = []
        for index, epoch in pairs:
            found = self._fill_row({name: array[len(indices)] for name, array in rows.items()}, index, epoch, damage)
            if found is not None:
                indices.append(found)
                drawn.append((self.seed, epoch, index))
        fields = {name: tensor[: len(indices)] for name, tensor in fields.items()}
        return Sample(
            **{'mask': None, 'dense': None, **fields},  # type: ignore[arg-type]  # the fields by name
            index=torch.tensor(indices, dtype=torch.int64),
            augmentation=draw_augmentations(self.ranges, drawn),
            damage=tuple(damage.values()),
        )

    def _fill_row(self, row: dict[str, np.ndarray], index: int, epoch: int, damage: dict[int, Damage]) -> int | None:
        """Read the sample, or the one in its place, into ``row`` -> its index; None if it is left out. Adds to
        ``damage``."""
        siblings = self.siblings(index)
        candidate = index
        for attempt in range(MOST_REPLACEMENTS):
            if candidate not in damage:
                try:
                    read_patiently(partial(self._copy, candidate, row), self.name(candidate))
                    return candidate
                except DamageError as error:
                    if self.on_damage == 'raise':
                        raise
                    damage[candidate] = Damage(candidate, self.name(candidate), error.reason, str(error))
            if self.on_damage == 'leave out':
                return None
            candidate = replacement(siblings, seed=self.seed, epoch=epoch, index=index, attempt=attempt)
        raise UserError(
            f'{self.name(index)} is damaged, and no readable sample was found in its place in {MOST_REPLACEMENTS} '
            f'attempts. {next(iter(damage.values())).detail}'
        )

    def _copy(self, index: int, row: dict[str, np.ndarray]) -> None:
        for name, array in self._arrays(index):
            row[name][...] = array

    def _arrays(self, index: int) -> Iterator[tuple[str, np.ndarray]]:
        """Every array of one sample with its name in ``Sample``, one at a time: memory for all of them at once would be
        returned to the system and fetched again for every sample."""
        yield 'image', self.image('img', index)
        if self.with_mask:
            yield 'mask', self.mask(index)
        if self.with_dense:
            yield 'dense', self.image('dense', index)
        yield from self.complete_labels(index).items()

    def _empty_batch(self, size: int) -> dict[str, Tensor]:
        """Uninitialised tensors of every array of a batch."""
        channels = {'image': 3} | ({'mask': 2} if self.with_mask else {}) | ({'dense': 3} if self.with_dense else {})
        images = {
            name: torch.empty(size, CROP_SIZE, CROP_SIZE, count, dtype=torch.uint8) for name, count in channels.items()
        }
        if get_worker_info():
            for tensor in images.values():
                tensor.share_memory_()  # while it is empty: otherwise the loader copies it there when it is full
        labels = {name: torch.empty(size, *shape) for name, shape in LABEL_SHAPES.items()}
        return images | {'present': torch.empty(size, 2, dtype=torch.bool)} | labels


def with_placeholders(labels: dict[str, np.ndarray], present: np.ndarray) -> dict[str, np.ndarray]:
    """Labels in which an absent hand is the mean hand one metre in front of the camera, so that all is finite."""
    labels = {name: values.copy() for name, values in labels.items()}
    ahead = labels['camera_rotation'].T @ (np.array([0, 0, 1], np.float32) - labels['camera_translation'])
    for name, value in (('root', np.eye(3)), ('pose', 0), ('shape', 0), ('translation', ahead)):
        labels[name][~present] = value
    return labels


def hands_without_numbers(labels: Sequence[np.ndarray]) -> np.ndarray:
    """(2,) bool: every number of the hand is NaN, in labels in the order of LABEL_SHAPES."""
    return np.isnan(np.concatenate([array.reshape(2, -1) for array in labels[: len(HAND_LABELS)]], 1)).all(1)


def check_finite(labels: Sequence[np.ndarray], name: str, *, advice: str, absent: np.ndarray | None = None) -> None:
    """Raises DamageError if a label, in the order of LABEL_SHAPES, is NaN or infinite. absent: (2,) bool, hands without
    labels."""
    checked = list(labels)
    if absent is not None:
        checked[: len(HAND_LABELS)] = [array[~absent] for array in labels[: len(HAND_LABELS)]]
    if not all(np.isfinite(array).all() for array in checked):
        raise DamageError(f'{name} holds NaN or infinity; {advice}.', BAD_LABELS)


class InterHandDataset(PreparedSplit):
    """Read a split in the field's interchange format: a folder of files (dataset/prepare/split.py).

    Raises UserError if the folder is missing or empty or lacks files, and DamageError on access if one is damaged.
    """

    def __init__(self, path: str | Path, split: str, **options):
        folder = Path(path) / split
        quarantined = read_quarantine(folder)
        super().__init__(folder, _count(folder, quarantined), quarantined=quarantined, **options)

    def name(self, index: int) -> str:
        """The image's path."""
        return str(self.path('img', index))

    def path(self, kind: str, index: int) -> Path:
        return self.folder / kind / f'{self.number(index)}.{FOLDERS[kind]}'

    def labels(self, index: int) -> tuple[np.ndarray, ...]:
        path, content = self._read_annotation(index)
        try:
            hands = [content['mano_params'][side] for side in SIDES]  # None for an absent one
            camera = content['camera']
            arrays = [
                np.stack([_numbers_of_hand(hand, key, shape) for hand in hands])
                for key, shape in (('R', (3, 3)), ('pose', (45,)), ('shape', (10,)), ('trans', (3,)))
            ]
            arrays += [
                safe_pickle.numbers(camera[key], np.float32).reshape(shape)
                for key, shape in (('R', (3, 3)), ('t', 3), ('camera', (3, 3)))
            ]
        except safe_pickle.NOT_NUMBERS as error:
            raise DamageError(
                f'{path} is not a prepared annotation ({type(error).__name__}: {error}); {PREPARE_AGAIN}.'
            ) from None
        check_finite(arrays, str(path), advice=PREPARE_AGAIN, absent=np.array([hand is None for hand in hands]))
        return tuple(arrays)

    def entries(self, index: int) -> dict[str, dict]:
        path, content = self._read_annotation(index)
        entries = {kind: content.get(kind) for kind in ('image', 'annotation')}
        for kind, entry in entries.items():
            if not isinstance(entry, dict | None):
                raise DamageError(f'{path}: its {kind} is a {type(entry).__name__}, not a dictionary; {PREPARE_AGAIN}.')
        return {kind: entry or {} for kind, entry in entries.items()}

    def _read_annotation(self, index: int) -> tuple[Path, dict[str, Any]]:
        path = self.path('anno', index)
        try:
            content = read_pickle(path)
        except UserError as error:
            raise DamageError(str(error), BAD_ANNOTATION if path.exists() else MISSING) from None
        if not isinstance(content, dict):
            raise DamageError(
                f'{path} is not a prepared annotation (it holds {type(content).__name__}); {PREPARE_AGAIN}.'
            )
        return path, content

    def image(self, kind: str, index: int) -> np.ndarray:
        path = self.path(kind, index)
        return checked_crop(path.read_bytes, str(path), advice=PREPARE_AGAIN)


def _numbers_of_hand(hand: dict[str, Any] | None, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array of a hand's annotation; NaN for an absent hand."""
    if hand is None:
        return np.full(shape, np.nan, np.float32)
    return safe_pickle.numbers(hand[key], np.float32).reshape(shape)


def checked_crop(read: Callable[[], bytes], name: str, *, advice: str) -> np.ndarray:
    """Decode the image file that ``read`` returns; raises DamageError with ``advice`` if it is missing, damaged or not
    256 x 256 pixels, and OSError if it cannot be read. A size is refused before it takes memory."""

    def refuse_other_size(height: int, width: int) -> None:
        if (height, width) != (CROP_SIZE, CROP_SIZE):
            raise DamageError(
                f'{name} is {width} x {height} pixels, but prepared crops are {CROP_SIZE} x {CROP_SIZE}; {advice}.',
                WRONG_SIZE,
            )

    try:
        content = read()
        if size := announced_size(content):
            refuse_other_size(*size)
        image = decode_image(content)
    except FileNotFoundError:
        raise DamageError(f'{name} is missing; {advice}.', MISSING) from None
    except ImageError as error:
        raise DamageError(f'{name} is {error}; {advice}.', BAD_IMAGE) from None
    refuse_other_size(*image.shape[:2])
    return image


def _count(folder: Path, quarantined: Sequence[int]) -> int:
    """Number of samples of a prepared split. Raises UserError unless every kind of file is numbered 0 to n - 1, but
    for those quarantined."""
    if not folder.is_dir():
        if partial_folder(folder).is_dir():
            raise UserError(f'{folder} is only partly prepared; rerun dataset/interhand.py as before to finish it.')
        if any(folder.parent.glob(f'{folder.name}.shard-*')):
            raise UserError(
                f'{folder} is prepared in shards; when all are finished, merge them with '
                'python dataset/interhand.py --merge.'
            )
        raise UserError(
            f'{folder.absolute()} does not exist: set DATASET.PATH to a prepared data set '
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
    highest = max(max(found, default=-1) for found in (*numbers.values(), quarantined))
    absent = set(quarantined)
    samples = highest + 1 - len(absent)
    if samples == 0:
        raise UserError(f'{folder} holds no samples; {PREPARE_AGAIN}.')
    for kind, found in numbers.items():
        if gaps := samples - len(found - absent):
            first = next(number for number in range(highest + 1) if number not in found and number not in absent)
            raise UserError(
                f'{folder / kind} has gaps: {gaps} of its files are missing, the first is number {first}. Copy it '
                f'again, leave those samples out (python dataset/verify.py --quarantine), or {PREPARE_AGAIN}.'
            )
    return samples
