"""Read the 3D joints of one or two hands, as other trackers and programs write them: .npy, .npz and .csv files.

Files are untrusted: nothing is unpickled, and an announced shape is compared with the file's size first.
"""

import csv
import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.arrays import load_npy, load_npz
from utils.errors import UserError, printable
from utils.hand import INTERHAND_TO_JOINTS, LEFT, MANO_TO_JOINTS, NUM_JOINTS, RIGHT, SIDES

_OURS = tuple(range(NUM_JOINTS))
# Joint of the file for each of our 21: wrist, then thumb to little finger, each from base to tip.
ORDERS = {
    'ours': _OURS,
    'openpose': _OURS,
    'mediapipe': _OURS,
    'mano': MANO_TO_JOINTS,  # 16 joints of the kinematic chain, then the tips of thumb, index, middle, ring, little
    'interhand': INTERHAND_TO_JOINTS,  # thumb to little finger, each from tip to base, then the wrist
}
UNITS = {'m': 1.0, 'mm': 1e-3}  # m
MOST_BYTES = 2**32  # of the arrays of an .npz file
SMALLEST_HAND, LARGEST_HAND = 0.02, 0.6  # m: diagonal of the box around a hand's joints
NO_JOINTS, COINCIDE, TOO_LARGE = 'no joints', 'joints coincide', 'larger than a hand'
_NUMBERS_PER_HAND = 3 * NUM_JOINTS
_DAMAGED = (
    ValueError,
    TypeError,
    OverflowError,
    EOFError,
    KeyError,
    RuntimeError,
    SyntaxError,
    tokenize.TokenError,  # from NumPy's parser of headers
    zipfile.BadZipFile,
    zlib.error,
)
_COLUMNS = ('frame', 'time_s')  # of a CSV file, before the coordinates


class JointTrack(NamedTuple):
    """The joints of T frames. Axis 1 is the hand: left, right."""

    points: np.ndarray  # (T, 2, 21, 3) m, NaN where missing
    frame: np.ndarray  # (T,) int64
    time_s: np.ndarray | None  # (T,) s, if the file has them

    @property
    def valid(self) -> np.ndarray:
        """(T, 2, 21) bool."""
        return np.isfinite(self.points).all(-1)


class _Content(NamedTuple):
    """Numbers as a file has them."""

    joints: np.ndarray
    frame: np.ndarray | None
    time_s: np.ndarray | None


def read_joint_file(path: Path, *, order: str, units: str, side: str | None = None) -> JointTrack:
    """Read a file of joints.

    order: a key of ORDERS; units: of UNITS. side: 'left' or 'right' for a file of one hand, of shape (21, 3) or
    (T, 21, 3). Without it the file has both hands: (2, 21, 3) or (T, 2, 21, 3), left first, or (42, 3) or (T, 42, 3),
    left first, but in InterHand2.6M's order right first. The last two axes may be flattened. Joints that are not
    finite, and those at (0, 0, 0) if a hand has several, are missing. Raises UserError for a file that cannot be read.
    """
    name = printable(path)
    if not path.is_file():
        raise UserError(f'{name} does not exist, or is not a file.')
    readers = {'.npy': _read_npy, '.npz': _read_npz, '.csv': _read_csv}
    if path.suffix.lower() not in readers:
        raise UserError(f'{name} is no file of joints: it must end in .npy, .npz or .csv.')
    content = readers[path.suffix.lower()](path)
    hands = _hands(name, content.joints, order, side)
    if not len(hands):
        raise UserError(f'{name} contains no frame.')
    points = np.full((len(hands), 2, NUM_JOINTS, 3), np.nan)
    points[:, slice(None) if side is None else [SIDES.index(side)]] = hands[:, :, list(ORDERS[order])]
    points[~np.isfinite(points).all(-1)] = np.nan
    at_zero = (points == 0).all(-1)
    points[at_zero & (at_zero.sum(-1, keepdims=True) > 1)] = np.nan
    points *= UNITS[units]
    _check_units(name, points, units)
    frame = np.arange(len(points)) if content.frame is None else _column(name, 'frame', content.frame, len(points))
    time_s = None if content.time_s is None else _column(name, 'time_s', content.time_s, len(points))
    if not np.isfinite(frame).all() or (frame != np.round(frame)).any() or np.abs(frame).max() > 2**53:
        raise UserError(f'{name}: frame must hold whole numbers.')
    return JointTrack(points, frame.astype(np.int64), time_s)


def implausible(points: np.ndarray) -> np.ndarray:
    """(T, 2) of text: why a hand's joints (T, 2, 21, 3) m cannot be fitted, whatever their number; '' if they can."""
    extent = _extents(points)
    reason = np.full(extent.shape, '', '<U24')
    reason[np.isnan(extent)] = NO_JOINTS
    reason[extent < SMALLEST_HAND] = COINCIDE
    reason[extent > LARGEST_HAND] = TOO_LARGE
    return reason


def _extents(points: np.ndarray) -> np.ndarray:
    """(T, 2) m: diagonal of the box around the joints; NaN for hands without joints."""
    missing = np.isnan(points)
    span = np.where(missing, -np.inf, points).max(-2) - np.where(missing, np.inf, points).min(-2)
    with np.errstate(over='ignore'):
        return np.where(np.isfinite(span).all(-1), np.sqrt((span * span).sum(-1)), np.nan)


def _check_units(name: str, points: np.ndarray, units: str) -> None:
    """Raise UserError if the hands would have a hand's size in the other unit, but do not in this one."""
    extents = _extents(points)
    extents = extents[~np.isnan(extents)]
    if not len(extents):
        return
    extent = float(np.median(extents))
    other = next(unit for unit in UNITS if unit != units)
    factor = UNITS[other] / UNITS[units]
    if not SMALLEST_HAND <= extent <= LARGEST_HAND and SMALLEST_HAND <= extent * factor <= LARGEST_HAND:
        raise UserError(
            f'{name}: in {units}, a hand spans {extent:.3g} m. Are the joints in {other} (--units {other})?'
        )


def _hands(name: str, joints: np.ndarray, order: str, side: str | None) -> np.ndarray:
    """(T, 1 or 2, 21, 3) float64, left first."""
    values, shape = joints, joints.shape
    if values.dtype.kind not in 'fiu':
        raise UserError(f'{name}: the joints are of type {values.dtype}; they must be numbers.')
    values = values.astype(np.float64)
    if values.ndim and values.shape[-1] in (_NUMBERS_PER_HAND, 2 * _NUMBERS_PER_HAND):
        values = values.reshape(*values.shape[:-1], -1, 3)
    if values.shape[-2:] == (2 * NUM_JOINTS, 3):
        values = values.reshape(*values.shape[:-2], 2, NUM_JOINTS, 3)
        if order == 'interhand':
            values = values[..., [RIGHT, LEFT], :, :]
        values = values if values.ndim == 4 else values[None]
    elif values.ndim == 3 and (side or len(values) != 2):
        values = values[:, None]
    while 2 <= values.ndim < 4:
        values = values[None]
    if values.shape[-2:] != (NUM_JOINTS, 3) or values.ndim != 4 or values.shape[1] not in (1, 2):
        wanted = '(21, 3) or (T, 21, 3)' if side else '(2, 21, 3), (T, 2, 21, 3), (42, 3) or (T, 42, 3)'
        raise UserError(f'{name}: the joints have shape {shape}; it must be {wanted}.')
    if not side and values.shape[1] == 1:
        raise UserError(f'{name} holds one hand (shape {shape}): say which with --side left or --side right.')
    if side and values.shape[1] == 2:
        raise UserError(f'{name} holds both hands (shape {shape}): leave out --side.')
    return values


def _column(name: str, key: str, values: np.ndarray, count: int) -> np.ndarray:
    if values.shape != (count,) or values.dtype.kind not in 'fiu':
        raise UserError(f'{name}: {key} has shape {values.shape} and type {values.dtype}; it must be {count} numbers.')
    return values.astype(np.float64)


def _read_npy(path: Path) -> _Content:
    with _refusing(path):
        return _Content(load_npy(path), None, None)


def _read_npz(path: Path) -> _Content:
    with _refusing(path):
        arrays = load_npz(path, most_bytes=MOST_BYTES)
    if 'joints' not in arrays and len(arrays) != 1:
        raise UserError(f'{printable(path)} has no array joints, but {", ".join(sorted(arrays)[:5]) or "none"}.')
    joints = arrays['joints'] if 'joints' in arrays else next(iter(arrays.values()))
    return _Content(joints, arrays.get('frame'), arrays.get('time_s'))


class _refusing:
    """Turns the errors of NumPy's readers into a UserError about the file."""

    def __init__(self, path: Path):
        self.name = printable(path)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        seeking = isinstance(error, OSError) and not error.filename  # to where an archive's damaged directory points
        if isinstance(error, _DAMAGED) or seeking:
            reason = ' '.join(str(error).split())[:160].rstrip('.')
            raise UserError(
                f'{self.name} is damaged, or holds more than plain arrays of numbers ({reason}). Save the joints again '
                'as a numeric array.'
            ) from None


def _read_csv(path: Path) -> _Content:
    """One row per frame, optionally below a line of names; columns frame and time_s may come first."""
    name, columns, numbers = printable(path), list[str](), list[np.ndarray]()
    for line, cells in _csv_rows(path):
        if not numbers and not columns and None in map(_number, cells):
            columns = [cell.strip() for cell in cells]
            continue
        if len(cells) != len(columns or cells) or (numbers and len(cells) != len(numbers[0])):
            raise UserError(f'{name}, line {line} has {len(cells)} columns, but those before it have another number.')
        values = [_number(cell) for cell in cells]
        if None in values:
            raise UserError(f'{name}, line {line}: {cells[values.index(None)].strip()[:40]!r} is not a number.')
        numbers.append(np.array(values, np.float64))
    if not numbers:
        raise UserError(f'{name} contains no frame.')
    table = np.stack(numbers)
    leading = {key: columns.index(key) for key in _COLUMNS if key in columns[: len(_COLUMNS)]}
    joints = table[:, len(leading) :]
    if joints.shape[1] == _NUMBERS_PER_HAND:
        joints = joints.reshape(-1, 1, NUM_JOINTS, 3)  # each row is a frame, so two rows are not two hands
    if (joints.ndim == 2 and joints.shape[1] != 2 * _NUMBERS_PER_HAND) or max(leading.values(), default=-1) >= len(
        leading
    ):
        raise UserError(
            f'{name} has {joints.shape[1]} columns of coordinates; it must have 63 (x, y, z of 21 joints) or 126 (two '
            'hands), and no others but frame and time_s, named in a first line, before them.'
        )
    return _Content(joints, *(table[:, leading[key]] if key in leading else None for key in _COLUMNS))


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of every line that is not empty; separated by commas, semicolons or tabs."""
    try:
        with open(path, encoding='utf-8-sig', newline='') as file:
            head = file.read(4096).split('\n')[0]
            separator = max(',;\t', key=head.count)
            file.seek(0)
            reader = csv.reader(file, delimiter=separator)
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    yield reader.line_num, cells
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'{printable(path)} is not a CSV file in UTF-8 ({error}).') from None


def _number(cell: str) -> float | None:
    """The value of a cell, NaN if it is empty; None if it is no number."""
    text = cell.strip()
    try:
        return float(text) if text else math.nan
    except ValueError:
        return None
