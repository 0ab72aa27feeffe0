"""Folders that grow and resume: a folder is called ``NAME.partial`` until it is complete, then it is renamed.

Preparation, shards, merging, packing and synthesis share this protocol. The process that writes owns the final name
(``growing``). A journal records every finished chunk by number, with what identifies its content, once its files are on
the disk; settings recorded at the start must match when the same command is given again.
"""

import ctypes
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dataset.prepared import partial_folder
from utils.errors import UserError
from utils.files import remove_stale_partials, write_atomically, write_json
from utils.ownership import owned

JOURNAL = 'journal.jsonl'
VERSION = 2  # of the journal; version 1 did not number its lines
SYNC_SHARE = 0.08  # of the time, at most, is spent waiting for the disk
_NOT_SET = 'not set'


@contextmanager
def growing(folder: Path) -> Iterator[None]:
    """Own ``folder`` (its final name) within the block, and report a full, read-only or failing disk in one sentence.

    Raises UserError, also if another process owns the folder.
    """
    with owned(folder):
        try:
            yield
        except OSError as error:
            where = f' ({error.filename})' if error.filename else ''
            raise UserError(
                f'{folder} could not be completed: {error.strerror or error}{where}. Finished work is kept; fix the '
                'cause, then rerun the same command to continue.'
            ) from None


class Journal:
    """The finished chunks of a growing folder: a header line, then a numbered line with a checksum per chunk.

    ``note`` records a chunk; it reaches the file, in ``commit`` and at the end of the ``with`` block, only after the
    chunk's files have reached the disk. An incomplete last line, which a kill leaves, does not count; a repeated line
    is ignored. Raises UserError for damaged, missing or contradictory lines, and for a journal of an earlier version.
    Reading changes nothing, so that another process's journal can be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self.header: dict | None = None
        self.chunks: list[dict] = []  # in order, without their numbers
        self._end = 0  # of the sound lines
        self._pending: list[bytes] = []
        self._next_commit = 0.0
        self._read()

    def __enter__(self) -> 'Journal':
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is None:
            self.commit()
        else:
            with suppress(OSError):  # the first error is the one to report
                self.commit()

    @property
    def is_of_merge(self) -> bool:
        """Whether shards are being merged into the folder (dataset/prepare/shards.py)."""
        return self.header is not None and 'merge' in self.header

    def begin(self, header: dict) -> None:
        """Discard the previous content."""
        line = _encode({'journal': VERSION, 'header': header})
        write_atomically(self.path, line)
        self.header, self.chunks, self._pending, self._end = header, [], [], len(line)

    def note(self, chunk: dict) -> None:
        """Record the next chunk, whose files are written but may not be on the disk yet."""
        self._pending.append(_encode({'chunk': len(self.chunks), **chunk}))
        self.chunks.append(chunk)
        if time.monotonic() >= self._next_commit:
            self.commit()

    def shorten(self, chunks: int) -> None:
        """Forget all chunks after the first ``chunks``."""
        header, kept = self.header or {}, self.chunks[:chunks]
        self.begin(header)
        for chunk in kept:
            self.note(chunk)

    def commit(self) -> None:
        """Wait until the recorded chunks are on the disk, then write their lines."""
        if not self._pending:
            return
        begin = time.monotonic()
        sync_file_system(self.path.parent)
        content = b''.join(self._pending)
        with open(self.path, 'r+b') as file:
            file.truncate(self._end)
            file.seek(self._end)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._end += len(content)
        self._pending = []
        now = time.monotonic()
        self._next_commit = now + (now - begin) / SYNC_SHARE

    def contradiction(self, number: int) -> UserError:
        """The error to raise if chunk ``number`` is not what is expected now."""
        return UserError(
            f'{self.path}: chunk {number} does not belong to the current input. Remove {self.path.parent} and rerun '
            'the command.'
        )

    def _read(self) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                entry = _decode(line, checked=self.header is not None)
            except ValueError:
                if number == len(lines):
                    return
                raise self._damage(f'line {number} is damaged') from None
            if self.header is None:
                if entry.get('journal') != VERSION or not isinstance(entry.get('header'), dict):
                    raise self._damage('it was begun by another version of this program')
                self.header = entry['header']
            else:
                self._enter(number, entry)
            self._end += len(line)

    def _enter(self, line: int, entry: dict) -> None:
        chunk = entry.pop('chunk', None)
        if chunk == len(self.chunks):
            self.chunks.append(entry)
        elif not isinstance(chunk, int) or not 0 <= chunk < len(self.chunks):
            raise self._damage(f'line {line} records chunk {chunk}, but chunk {len(self.chunks)} comes next')
        elif self.chunks[chunk] != entry:
            raise self._damage(f'line {line} records chunk {chunk} again, with other content')

    def _damage(self, problem: str) -> UserError:
        return UserError(f'{self.path}: {problem}. Remove {self.path.parent} and rerun the command.')


def _encode(entry: dict) -> bytes:
    text = json.dumps(entry)
    return json.dumps({**entry, 'crc': zlib.crc32(text.encode())}).encode() + b'\n'


def _decode(line: bytes, *, checked: bool) -> dict:
    """Raises ValueError for an incomplete or damaged line; ``checked``: and for one without a checksum."""
    entry = json.loads(line)
    if not line.endswith(b'\n') or not isinstance(entry, dict):
        raise ValueError('not a line of a journal')
    checksum = entry.pop('crc', None)
    if (checked or checksum is not None) and checksum != zlib.crc32(json.dumps(entry).encode()):
        raise ValueError('the checksum does not match')
    return entry


def sync_file_system(folder: Path) -> None:
    """Wait until everything written to the folder's file system is on the disk. Raises OSError if writing failed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, 'syncfs'):  # elsewhere than on Linux
        os.sync()
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if libc.syncfs(descriptor):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))
    finally:
        os.close(descriptor)


def already_complete(folder: Path, settings: dict, *, recorded: Callable[[Path], dict]) -> bool:
    """Whether the folder is complete; prints so. Raises UserError if it was created with other settings.

    recorded: reads the settings of a complete folder; raises UserError if it is none.
    """
    if not folder.exists():
        return False
    refuse_other_settings(folder, recorded(folder), settings)
    print(f'{folder.name}: {folder} is already complete.')
    return True


def refuse_other_settings(folder: Path, found: dict | None, wanted: dict) -> None:
    """Raises UserError unless the folder was created with the settings that are wanted now."""
    found = found or {}
    different = [
        f'{key} was {found.get(key, _NOT_SET)}, now {wanted.get(key, _NOT_SET)}'
        for key in wanted | found
        if not _equal(found.get(key, _NOT_SET), wanted.get(key, _NOT_SET), shared=key == 'source')
    ]
    if different:
        raise UserError(
            f'{folder} was created with other settings ({"; ".join(different)}). Choose another --save_path, or remove '
            'the folder first.'
        )


def _equal(found: Any, wanted: Any, *, shared: bool = False) -> bool:
    """Whether settings are equal; ``shared``: only those entries that both have. Earlier versions recorded fewer about
    their 'source'."""
    if not (isinstance(found, dict) and isinstance(wanted, dict)):
        return found == wanted
    return (shared or found.keys() == wanted.keys()) and all(
        _equal(found[key], wanted[key], shared=key == 'source') for key in found.keys() & wanted.keys()
    )


def publish(folder: Path, record_name: str, record: dict[str, Any]) -> None:
    """Complete ``folder``: everything reaches the disk, then its record is written, then it gets its name."""
    partial = partial_folder(folder)
    remove_stale_partials(partial)
    sync_file_system(partial)  # a power cut must not leave the final name on files that never reached the disk
    write_json(partial / record_name, record)
    os.rename(partial, folder)
    sync_file_system(folder.parent)
