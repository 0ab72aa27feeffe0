"""Writing files so that a killed run or a full disk leaves the old file or the new one, never half of one."""

import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np

from manopth import ManoError, safe_pickle
from utils.errors import UserError


@contextmanager
def written_aside(path: str | Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A binary file that takes the name ``path`` only once the block ends well; on failure nothing is left behind.

    Makes missing folders. ``durable`` waits for the disk: else a power cut can leave the new name on an empty file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Tasks of a job array write the same file from different machines, where process ids may be the same.
    aside = path.with_name(f'.{path.name}.{secrets.token_hex(8)}.partial')
    try:
        with open(aside, 'wb') as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_atomically(path: str | Path, content: bytes, *, durable: bool = True) -> None:
    """Write ``content`` to ``path`` by way of ``written_aside``."""
    with written_aside(path, durable=durable) as file:
        file.write(content)


def read_image(path: str | Path) -> np.ndarray | None:
    """(H, W, 3) uint8 BGR, or None for what is cut short or no picture. Raises OSError if there is no reading it."""
    return decode_image(Path(path).read_bytes())


def decode_image(content: bytes | memoryview) -> np.ndarray | None:
    """A picture file's bytes -> (H, W, 3) uint8 BGR, or None for what is cut short or no picture."""
    # The decoder fills what is missing of a JPEG cut short with grey and says nothing.
    cut_short = content[:2] == b'\xff\xd8' and b'\xff\xd9' not in bytes(content[-1024:])
    return None if cut_short or not content else cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)


def write_json(path: str | Path, value: Any) -> None:
    """``value`` as indented JSON, atomically. JSON has no NaN or infinity: they become null."""
    write_atomically(path, (json.dumps(_finite(value), indent=1, allow_nan=False) + '\n').encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str | Path) -> Any:
    """Raises UserError if the file is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f'{path} does not exist.') from None
    except ValueError as error:
        raise UserError(
            f'{path} is not valid JSON ({error}): it is cut short or damaged, make or get it again.'
        ) from None


def sha256_of_file(path: str | Path) -> str:
    """Hex digest of a file's content, read in blocks."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def read_pickle(path: str | Path) -> Any:
    """The content of a pickle of plain containers and NumPy arrays; foreign code is refused, never run.

    Raises UserError for a missing or damaged file, and for one that holds anything else.
    """
    try:
        return safe_pickle.load(path)
    except ManoError as error:
        raise UserError(str(error)) from None
