"""Files of tensors that are read without running code from them: PyTorch's zip archives, sealed with a checksum.

A seal is the comment at the end of the archive, which ``torch.load`` ignores: the SHA-256 of everything before it. It
is part of the file, so a kill cannot leave a file with another one's checksum.
"""

import hashlib
import io
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import torch

from utils.errors import UserError
from utils.files import atomic_file

_SEAL = b'sha256:'
_SEAL_BYTES = len(_SEAL) + hashlib.sha256().digest_size * 2  # hexadecimal
_BLOCK_BYTES = 1 << 20
# Names in a pickle, as pickletools prints them.
_ALLOWED = re.compile(
    r'collections OrderedDict|torch (\w+Storage|Size|device)|torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)'
)
_BEFORE_1_6 = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # how files of older versions of PyTorch begin
# Records at the end of a zip archive: signature and size without comment.
_END, _END_BYTES = b'PK\5\6', 22
_LOCATOR, _LOCATOR_BYTES = b'PK\6\7', 20
_END_64, _END_64_BYTES = b'PK\6\6', 56


def write_tensors(path: str | Path, content: Any) -> None:
    """``torch.save`` with a seal, atomically. Raises UserError if the disk is full."""
    try:
        with atomic_file(path) as file:
            sealed = _SealedWriter(file)
            torch.save(content, cast(BinaryIO, sealed))  # it only calls write and flush
            sealed.finish()
    except RuntimeError as error:  # torch raises this on a full disk
        raise UserError(
            f'Could not write {path} ({str(error).splitlines()[0]}): is the disk full? The previous checkpoint is '
            'untouched.'
        ) from None


class _SealedWriter:
    """Pass an archive on to ``file`` and seal it."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, hashlib.sha256()
        self.held_back = b''  # the last two bytes, which announce the length of the comment

    def write(self, content: bytes | memoryview) -> int:
        if len(content) < 2:
            joined = self.held_back + bytes(content)
            self._put(joined[:-2])
            self.held_back = joined[-2:]
        else:
            self._put(self.held_back)
            self._put(content[:-2])
            self.held_back = bytes(content[-2:])
        return len(content)

    def flush(self) -> None:  # called by torch.save
        self.file.flush()

    def finish(self) -> None:
        if self.held_back != b'\0\0':
            raise ValueError('torch.save wrote an archive that ends with a comment of its own')
        self._put(_SEAL_BYTES.to_bytes(2, 'little'))
        self.file.write(_SEAL + self.digest.hexdigest().encode())

    def _put(self, content: bytes | memoryview) -> None:
        self.digest.update(content)
        self.file.write(content)


def read_tensors(path: str | Path) -> Any:
    """Read a file written by ``torch.save`` to the CPU, without running code from it.

    Its seal is verified, if it has one, and announced sizes are compared with the file's length before memory is
    allocated. Raises UserError if it is missing, damaged, or holds more than tensors, numbers, strings and containers
    of them.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f'The checkpoint {path} does not exist.')
    try:
        with open(path, 'rb') as file:
            _check_archive(file)
            file.seek(0)
            content = torch.load(file, map_location='cpu', weights_only=True)
            _check_tensors(content, file.seek(0, io.SEEK_END))
            return content
    except OSError as error:
        raise UserError(f'The checkpoint {path} cannot be read: {error.strerror or error}.') from None
    except Exception as error:  # the unpickler raises nearly all kinds for a hostile file
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise  # no fault of the file, whose sizes were checked
        raise UserError(
            f'The checkpoint {path} cannot be read: it is truncated, damaged, or holds more than tensors, numbers and '
            f'strings ({_reason(error)}).'
        ) from None


def check_archive(path: str | Path) -> None:
    """Raise UserError unless ``path`` is a whole archive of tensors whose seal, if it has one, is right."""
    try:
        with open(path, 'rb') as file:
            _check_archive(file)
    except Exception as error:  # zipfile, too, raises many kinds
        raise UserError(f'{path} is truncated or damaged ({_reason(error)}).') from None


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _check_archive(file: BinaryIO) -> None:
    """Raise ValueError or BadZipFile unless the seal is right and every entry lies, uncompressed, within the file.

    The records at the end must be where ``torch.save`` writes them, so that other readers find the same entries.
    """
    if file.read(len(_BEFORE_1_6)) == _BEFORE_1_6:
        raise ValueError('it has the format of PyTorch before 1.6: load it and save it again with a newer one')
    length = file.seek(0, io.SEEK_END)
    tail_bytes = min(length, _END_64_BYTES + _LOCATOR_BYTES + _END_BYTES + _SEAL_BYTES)
    file.seek(length - tail_bytes)
    tail = file.read(tail_bytes)
    end = tail.rfind(_END)
    comment = tail[end + _END_BYTES :]
    if end < 0 or len(tail) < end + _END_BYTES or tail[end + 20 : end + 22] != len(comment).to_bytes(2, 'little'):
        raise ValueError('it is not a whole archive of PyTorch')
    if comment and comment != _SEAL + _sha256(file, length - len(comment)).encode():
        raise ValueError('its SHA-256 is not the recorded one')
    directory_end = length - len(comment) - _END_BYTES
    directory_bytes, directory_begin = _two_numbers(tail[end + 12 : end + 20])
    locator = tail[end - _LOCATOR_BYTES : end] if end >= _LOCATOR_BYTES else b''
    if locator.startswith(_LOCATOR):
        directory_end -= _LOCATOR_BYTES + _END_64_BYTES
        record = tail[end - _LOCATOR_BYTES - _END_64_BYTES : end - _LOCATOR_BYTES]
        if int.from_bytes(locator[8:16], 'little') != directory_end or not record.startswith(_END_64):
            raise ValueError('its end is damaged')
        directory_bytes, directory_begin = _two_numbers(record[40:56])
    if directory_begin + directory_bytes != directory_end:
        raise ValueError('its directory is damaged')
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        _check_entries(entries, directory_begin)
        for entry in entries:
            if entry.filename.lower().endswith('.pkl'):
                _check_pickle(archive.read(entry))


def _sha256(file: BinaryIO, count: int) -> str:
    """Hex digest of the first ``count`` bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while count and (block := file.read(min(count, _BLOCK_BYTES))):
        digest.update(block)
        count -= len(block)
    return digest.hexdigest()


def _two_numbers(record: bytes) -> tuple[int, int]:
    half = len(record) // 2
    return int.from_bytes(record[:half], 'little'), int.from_bytes(record[half:], 'little')


def _check_entries(entries: list[zipfile.ZipInfo], available: int) -> None:
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ValueError(f'its entry {entry.filename} is compressed')
        if '..' in PurePosixPath(entry.filename).parts or entry.filename.startswith(('/', '\\')):
            raise ValueError(f'its entry {entry.filename} has the name of a file elsewhere')
    announced = sum(entry.file_size for entry in entries)
    if announced > available:
        raise ValueError(f'it announces {announced:,} bytes of tensors, but has {available:,}')
    if len({entry.filename.lower() for entry in entries}) < len(entries):  # PyTorch ignores case
        raise ValueError('two of its entries have the same name')


def _check_pickle(content: bytes) -> None:
    """Raise ValueError for a pickle of more than tensors, numbers, strings and containers of them.

    ``weights_only`` also allows, for instance, ``bytearray``, with which 100 bytes allocate a terabyte.
    """
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ('STACK_GLOBAL', 'INST', 'EXT1', 'EXT2', 'EXT4'):  # torch.save writes GLOBAL
            raise ValueError(f'its pickle has the opcode {opcode.name}')
        if opcode.name == 'GLOBAL' and not _ALLOWED.fullmatch(str(argument)):
            raise ValueError(f'it holds {argument}')


def _check_tensors(content: Any, available: int) -> None:
    """Raise ValueError if a tensor has more elements than the file can hold, e.g. one element repeated by its stride.

    Copying such a tensor, as loading a network does, would allocate all of it.
    """
    for tensor in _tensors(content):
        if tensor.numel() * tensor.element_size() > available:
            raise ValueError(f'it announces a tensor of shape {tuple(tensor.shape)}')


def _tensors(content: Any) -> Iterator[torch.Tensor]:
    waiting, seen = [content], set()  # an iteration, since containers may be nested deeply or contain themselves
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)
