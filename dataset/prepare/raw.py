"""Read InterHand2.6M as downloaded (v1.0): typed readers of annotation files with a million frames.

Files are mapped, not loaded, and only the fields that are used become objects. Lengths are converted from the files'
millimetres to metres here and nowhere else. Camera: X_cam = R X_world + t, x right, y down, z forward.

    images/<split>/<file_name>
    annotations/<split>/InterHand2.6M_<split>_{data,camera,joint_3d,MANO_NeuralAnnot}.json
"""

import mmap
import os
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from utils.errors import UserError
from utils.hand import INTERHAND_TO_JOINTS, LEFT, NUM_JOINTS, RIGHT, SIDES

SPLITS = ('train', 'val', 'test')
# hand_type -> the hands that an image shows. InterHand2.6M has no image without hands; synthetic data have.
NO_HANDS = 'none'
HANDS_SHOWN: dict[str, tuple[str, ...]] = {'interacting': SIDES, 'left': ('left',), 'right': ('right',), NO_HANDS: ()}
MILLIMETRE = 1e-3
_GET_IT = 'get it again from https://mks0601.github.io/InterHand2.6M (v1.0, 5 fps, annotations)'
# JSON has no word for them, but files written by Python do: a number that is not one becomes null, and null NaN.
_NOT_A_NUMBER = re.compile(rb'(?<=[\s:,\[])-?(?:NaN|Infinity)(?=[\s,\]}])')
_Number = float | None


class RecordError(UserError):
    """A single record of an annotation file cannot be used."""


class Frame(msgspec.Struct, frozen=True, gc=False):
    """One image and the hands that it shows. ``capture`` and ``camera`` are the keys of the other files."""

    id: int
    file_name: str  # relative to images/<split>, within which it stays
    width: int
    height: int
    capture: str
    subject: str
    seq_name: str
    camera: str
    frame_idx: int
    hand_type: str  # a key of HANDS_SHOWN, or unknown; '' if the image has no annotation
    hand_type_valid: bool
    entries: tuple[msgspec.Raw, ...]  # of data.json, undecoded: image, annotation


class Camera(NamedTuple):
    """float64: rotation (3, 3), translation (3,) m, intrinsics (3, 3) pixels of the whole image."""

    rotation: np.ndarray
    translation: np.ndarray
    intrinsics: np.ndarray


class ManoFit(NamedTuple):
    """float64, world axes: pose (48,) axis-angle of root + 15 joints, relative to the mean; shape (10,); trans (3,) m.

    NaN where the file holds no number.
    """

    pose: np.ndarray
    shape: np.ndarray
    trans: np.ndarray


class _DataFile(msgspec.Struct):
    images: list[msgspec.Raw]
    annotations: list[msgspec.Raw]


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str
    width: int
    height: int
    capture: int | str
    camera: int | str
    frame_idx: int
    seq_name: str = ''
    subject: int | str = ''


class _Annotation(msgspec.Struct, gc=False):
    image_id: int
    hand_type: str
    hand_type_valid: bool | int | float | None


class _Cameras(msgspec.Struct):
    campos: dict[str, list[_Number]]  # mm, world
    camrot: dict[str, list[list[_Number]]]
    focal: dict[str, list[_Number]]
    princpt: dict[str, list[_Number]]


class _Joints(msgspec.Struct):
    world_coord: list[list[_Number]]  # (42, 3) mm
    joint_valid: list[Any]  # (42,) or (42, 1)


class _Fit(msgspec.Struct):
    pose: list[_Number]
    shape: list[_Number]
    trans: list[_Number]


class _Fits(msgspec.Struct):
    left: _Fit | None = None
    right: _Fit | None = None


def find_splits(data_path: str | Path) -> list[str]:
    """The existing splits, in the order train, val, test. Raises UserError if there is none."""
    root = Path(data_path)
    if not root.is_dir():
        raise UserError(f"{root} does not exist. Pass the folder with InterHand2.6M's images/ and annotations/.")
    found = [split for split in SPLITS if (root / 'annotations' / split).is_dir()]
    if not found:
        raise UserError(
            f'{root} has no annotations/train, annotations/val or annotations/test. Pass the folder with '
            "InterHand2.6M's images/ and annotations/."
        )
    return found


def annotation_file(data_path: str | Path, split: str, kind: str) -> Path:
    """The annotation file of a kind: data, camera, joint_3d, MANO_NeuralAnnot."""
    return Path(data_path) / 'annotations' / split / f'InterHand2.6M_{split}_{kind}.json'


class RawSplit:
    """One split, whose files are read on first use; every reader raises UserError that names a bad file.

    A data set from elsewhere must not lead its reader to other files: file names that leave ``images/<split>`` are
    refused, and so are symbolic links below it to places outside of the data set. ``with_images``: whether the images
    must be there, and not the annotation files alone.
    """

    def __init__(self, data_path: str | Path, split: str, *, with_images: bool = True):
        self.root, self.split = Path(data_path), split
        self.images = self.root / 'images' / split
        if split not in find_splits(data_path):
            found = ', '.join(find_splits(data_path))
            raise UserError(f'{self.root}/annotations has no split {split}; it has {found}.')
        if with_images and not self.images.is_dir():
            raise UserError(f'{self.images} does not exist. Unpack the images of {split} there.')

    def file(self, kind: str) -> Path:
        """See ``annotation_file``."""
        return annotation_file(self.root, self.split, kind)

    def image_path(self, frame: Frame) -> Path:
        return self.images / frame.file_name

    def missing_images(self, frames: Iterable[Frame]) -> list[Frame]:
        """The frames without an image. Each folder is listed once, since calls to a network file system are slow.

        Raises UserError if a symbolic link leads out of the data set.
        """
        listings: dict[str, dict[str, bool]] = {}
        missing = []
        for frame in frames:
            folder, _, name = frame.file_name.rpartition('/')
            if folder not in listings:
                self._refuse_outside(self.images / folder)
                listings[folder] = _file_names(self.images / folder)
            is_link = listings[folder].get(name)
            if is_link is None:
                missing.append(frame)
            elif is_link:
                self._refuse_outside(self.image_path(frame))
        return missing

    def _refuse_outside(self, path: Path) -> None:
        real = Path(os.path.realpath(path))
        # images/<split> may itself be a link to another disk: its owner has put it there.
        if not any(real.is_relative_to(os.path.realpath(tree)) for tree in (self.root, self.images)):
            raise UserError(
                f'{path} links to {real}, outside of {self.root}. Copy the files there, or link {self.images} as a '
                'whole.'
            )

    @cached_property
    def frames(self) -> list[Frame]:
        return list(self.iterate_frames())

    def iterate_frames(self) -> Iterator[Frame]:
        """All frames in the order of data.json, joined with their annotations by image id, none kept in memory."""
        path = self.file('data')
        content = _decode(path, _DataFile)
        annotations: dict[int, tuple] = {}
        words: dict[str, str] = {}  # one object per hand type
        for raw, entry in _decode_each(path, content.annotations, _Annotation):
            annotations[entry.image_id] = (
                words.setdefault(entry.hand_type, entry.hand_type),
                bool(entry.hand_type_valid),
                raw,
            )
        for number, (raw, image) in enumerate(_decode_each(path, content.images, _Image)):
            if not _stays_within(image.file_name):
                raise UserError(
                    f'{path}: image number {number} has the file name {image.file_name!r}, which leaves '
                    f'{self.images}; {_GET_IT}.'
                )
            hand_type, valid, *annotation = annotations.get(image.id, ('', False))
            # Few different words, a million times: keep one of each.
            capture, subject, seq_name, camera = (
                words.setdefault(word, word)
                for word in (str(image.capture), str(image.subject), image.seq_name, str(image.camera))
            )
            yield Frame(
                image.id,
                image.file_name,
                image.width,
                image.height,
                capture,
                subject,
                seq_name,
                camera,
                image.frame_idx,
                hand_type,
                valid,
                (raw, *annotation),
            )

    @cached_property
    def _cameras(self) -> dict[str, _Cameras]:
        return _decode(self.file('camera'), dict[str, _Cameras])

    @cached_property
    def _joints(self) -> dict[str, dict[str, msgspec.Raw]]:
        return _decode(self.file('joint_3d'), dict[str, dict[str, msgspec.Raw]])

    @cached_property
    def _fits(self) -> dict[str, dict[str, msgspec.Raw]]:
        return _decode(self.file('MANO_NeuralAnnot'), dict[str, dict[str, msgspec.Raw]])

    def camera(self, capture: str | int, camera_id: str | int) -> Camera:
        """Raises RecordError if the camera is missing or not finite."""
        path, capture, camera_id = self.file('camera'), str(capture), str(camera_id)
        try:
            found = self._cameras[capture]
            numbers = [
                np.array(table[camera_id], dtype=np.float64)
                for table in (found.camrot, found.campos, found.focal, found.princpt)
            ]
        except (KeyError, ValueError):
            raise RecordError(f'{path} has no complete camera {camera_id} of capture {capture}; {_GET_IT}.') from None
        rotation, position, focal, centre = numbers
        if [n.shape for n in numbers] != [(3, 3), (3,), (2,), (2,)] or not all(np.isfinite(n).all() for n in numbers):
            raise RecordError(
                f'{path}: camera {camera_id} of capture {capture} is not made of finite numbers; {_GET_IT}.'
            )
        intrinsics = np.array([[focal[0], 0, centre[0]], [0, focal[1], centre[1]], [0, 0, 1]])
        return Camera(rotation, -rotation @ position * MILLIMETRE, intrinsics)

    def mano(self, capture: str | int, frame_idx: str | int) -> dict[str, ManoFit | None]:
        """{'left': ..., 'right': ...}, None for a hand without a fit. Raises RecordError if numbers are missing."""
        raw = self._fits.get(str(capture), {}).get(str(frame_idx))
        if raw is None:
            return dict.fromkeys(SIDES)
        path, where = self.file('MANO_NeuralAnnot'), f'the fit of capture {capture}, frame {frame_idx}'
        fits = _decode_record(path, where, raw, _Fits | None)
        out: dict[str, ManoFit | None] = dict.fromkeys(SIDES)
        for side in SIDES:
            fit = getattr(fits, side, None)
            if not fit:
                continue
            out[side] = numbers = ManoFit(*(np.array(v, np.float64) for v in (fit.pose, fit.shape, fit.trans)))
            if [values.size for values in numbers] != [48, 10, 3]:
                raise RecordError(f'{path}: {where} does not hold 48 + 10 + 3 numbers; {_GET_IT}.')
        return out

    def joints(self, capture: str | int, frame_idx: str | int) -> tuple[np.ndarray, np.ndarray]:
        """World joints (2, 21, 3) m in the project's order, 0 where invalid, and which are valid (2, 21).

        Raises RecordError if the frame is not in the file or does not hold 42 joints.
        """
        path, where = self.file('joint_3d'), f'capture {capture}, frame {frame_idx}'
        raw = self._joints.get(str(capture), {}).get(str(frame_idx))
        if raw is None:
            raise RecordError(f'{path} has no {where}; {_GET_IT}.')
        entry = _decode_record(path, where, raw, _Joints)
        try:
            points = np.array(entry.world_coord, dtype=np.float64).reshape(2, NUM_JOINTS, 3)
            valid = np.array(entry.joint_valid, dtype=np.float64).reshape(2, NUM_JOINTS) > 0
        except (ValueError, TypeError):
            raise RecordError(f'{path}: {where} does not hold 42 joints; {_GET_IT}.') from None
        first_is_right = [1, 0]
        assert (LEFT, RIGHT) == (0, 1)
        points = points[first_is_right][:, INTERHAND_TO_JOINTS] * MILLIMETRE
        valid = valid[first_is_right][:, INTERHAND_TO_JOINTS] & np.isfinite(points).all(-1)
        return np.where(valid[..., None], points, 0.0), valid


def full_entries(frame: Frame) -> tuple[dict, dict]:
    """The frame's image and annotation entries of data.json with all their fields.

    Raises UserError for a text that is not UTF-8 in a field that nothing else reads.
    """
    image, annotation = (*frame.entries, b'{}')[:2]
    try:
        return msgspec.json.decode(image), msgspec.json.decode(annotation)
    except UnicodeDecodeError as error:
        raise UserError(f'The entry of {frame.file_name} in data.json cannot be used: {error}; {_GET_IT}.') from None


def _stays_within(file_name: str) -> bool:
    """Whether a path stays below the folder that it is relative to."""
    parts = file_name.split('/')
    return parts[0] != '' and '..' not in parts and '\0' not in file_name


def _file_names(folder: Path) -> dict[str, bool]:
    """The regular files of a folder -> whether each is a symbolic link."""
    try:
        with os.scandir(folder) as entries:
            # A link to nowhere is no file, nor are pipes and devices, which can be read forever.
            return {entry.name: entry.is_symlink() for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return {}


def _decode(path: Path, kind: Any) -> Any:
    try:
        with open(path, 'rb') as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise UserError(f'{path} is missing; {_GET_IT}.') from None
    except ValueError:
        raise UserError(f'{path} is empty; {_GET_IT}.') from None
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        raise UserError(f'{path} is not an annotation file of InterHand2.6M v1.0: {error}; {_GET_IT}.') from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    try:
        return msgspec.json.decode(_NOT_A_NUMBER.sub(b'null', content), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f'{path} cannot be read ({error}): it is truncated or damaged; {_GET_IT}.') from None


def _decode_each(path: Path, entries: list[msgspec.Raw], kind: type) -> Iterator[tuple[msgspec.Raw, Any]]:
    decoder: msgspec.json.Decoder = msgspec.json.Decoder(kind)
    for number, raw in enumerate(entries):
        try:
            yield raw, decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            what = 'image' if kind is _Image else 'annotation'
            raise UserError(f'{path}: {what} number {number} cannot be used: {error}; {_GET_IT}.') from None


def _decode_record(path: Path, where: str, raw: msgspec.Raw, kind: Any) -> Any:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RecordError(f'{path}: {where} cannot be used: {error}; {_GET_IT}.') from None
