"""Read NumPy files from elsewhere: what a file announces is compared with its size before memory is taken."""

import io
import math
import zipfile
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_LENGTH_BYTES = {(1, 0): 2, (2, 0): 4}
LONGEST_HEADER = 65536  # bytes; a second version's may announce 4 GB, for which NumPy would take the memory


class Announced(NamedTuple):
    """What the header of an array announces."""

    shape: tuple[int, ...]
    kind: np.dtype
    begin: int  # byte at which the numbers begin


def read_header(file: IO[bytes]) -> Announced:
    """Read the header of an .npy file from its beginning. Raises ValueError if it is none, or damaged."""
    version = np.lib.format.read_magic(file)  # type: ignore[arg-type]  # it reads, and nothing else
    if version not in _HEADERS:
        raise ValueError('the file has an unknown version')
    length = file.read(_LENGTH_BYTES[version])
    size = int.from_bytes(length, 'little')
    if size > LONGEST_HEADER:
        raise ValueError(f'its header announces {size:,} bytes of itself')
    shape, _, kind = _HEADERS[version](io.BytesIO(length + file.read(size)))
    return Announced(shape, kind, file.tell())


def load_npz(path: str | Path, *, most_bytes: int) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, never unpickled.

    Raises ValueError if they are larger than ``most_bytes`` in all or than a member's announced shape and type, and
    whatever ``zipfile`` raises for a damaged archive (BadZipFile, zlib.error, EOFError, RuntimeError).
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > most_bytes:
            raise ValueError(f'the arrays exceed {most_bytes:,} bytes')
        for member in members:
            with archive.open(member) as file:
                shape, kind, begin = read_header(file)
                if kind.hasobject or begin + math.prod(shape) * kind.itemsize != member.file_size:
                    raise ValueError(f'{member.filename} does not hold the array that it announces')
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def load_npy(path: str | Path) -> np.ndarray:
    """The array of an .npy file, never unpickled. Raises ValueError if it is damaged or smaller than it announces."""
    with open(path, 'rb') as file:
        shape, kind, begin = read_header(file)
        if kind.hasobject:
            raise ValueError('it holds Python objects')
        if begin + math.prod(shape) * kind.itemsize > Path(path).stat().st_size:
            raise ValueError(f'it does not hold the array {kind} {shape} that it announces')
    return np.load(path, allow_pickle=False)
