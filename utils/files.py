"""Reading and writing files; writes are atomic, so a killed run or a full disk never leaves a partial file."""

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from manopth import ManoError, safe_pickle
from utils.errors import UserError

PARTIAL_NAME = re.compile(r'\.(.+)\.[0-9a-f]{16}\.partial(\.[^.]+)?', re.DOTALL)  # of ``partial_path``


@contextmanager
def atomic_file(path: str | Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A binary file that is renamed to ``path`` when the block succeeds, and removed when it fails.

    Creates missing folders. ``durable`` waits for the disk: without it, a power cut can leave ``path`` empty. A killed
    process leaves its temporary file; ``remove_stale_partials`` removes it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = partial_path(path)
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


def partial_path(path: Path, *, keep_suffix: bool = False) -> Path:
    """A new name beside ``path`` for a file that is renamed to it when it is complete.

    keep_suffix: for writers that choose a format by it.
    """
    # Tasks of a job array may write the same file from different machines with equal process ids.
    return path.with_name(f'.{path.name}.{secrets.token_hex(8)}.partial{path.suffix if keep_suffix else ""}')


def remove_stale_partials(folder: str | Path, *, of: str | None = None, recursive: bool = False) -> list[Path]:
    """Remove the temporary files that killed processes left in ``folder`` -> their paths, sorted.

    of: a file's name, to remove only those of that file. Only for a folder or file that this process owns
    (``utils.ownership.owned``): they may belong to a process that is writing.
    """
    folder = Path(folder)
    found = folder.rglob('.*') if recursive else folder.glob('.*')
    stale = sorted(
        path
        for path in found
        if (match := PARTIAL_NAME.fullmatch(path.name)) and of in (None, match[1]) and path.is_file()
    )
    for path in stale:
        path.unlink(missing_ok=True)
    return stale


def write_atomically(path: str | Path, content: bytes, *, durable: bool = True) -> None:
    """Write ``content`` to a temporary file, then rename it to ``path``."""
    with atomic_file(path, durable=durable) as file:
        file.write(content)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN and infinity, which JSON lacks, become null."""
    write_atomically(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """``value`` as ``write_json`` writes it."""
    return (json.dumps(_finite(value), indent=1, allow_nan=False) + '\n').encode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str | Path) -> Any:
    """The content of a JSON file. Raises UserError if it is missing or not valid JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f'{path} does not exist.') from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f'{path} is not valid JSON ({error}): it is truncated or damaged. Create or download it again.'
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
