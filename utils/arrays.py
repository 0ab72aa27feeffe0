"""Read NumPy files from elsewhere: what a file announces is compared with its size before memory is taken."""

import math
import zipfile
from pathlib import Path

import numpy as np

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


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
                read_header = _HEADERS.get(np.lib.format.read_magic(file))
                if read_header is None:
                    raise ValueError(f'{member.filename} has an unknown version')
                shape, _, kind = read_header(file)
                if kind.hasobject or file.tell() + math.prod(shape) * kind.itemsize != member.file_size:
                    raise ValueError(f'{member.filename} does not hold the array that it announces')
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def load_npy(path: str | Path) -> np.ndarray:
    """The array of an .npy file, never unpickled. Raises ValueError if it is damaged or smaller than it announces."""
    with open(path, 'rb') as file:
        read_header = _HEADERS.get(np.lib.format.read_magic(file))
        if read_header is None:
            raise ValueError('the file has an unknown version')
        shape, _, kind = read_header(file)
        if kind.hasobject:
            raise ValueError('it holds Python objects')
        if file.tell() + math.prod(shape) * kind.itemsize > Path(path).stat().st_size:
            raise ValueError(f'it does not hold the array {kind} {shape} that it announces')
    return np.load(path, allow_pickle=False)
