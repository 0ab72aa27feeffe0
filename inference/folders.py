"""Choose the folder of each input's results, so that no two inputs ever share one, and clear it of former results."""

import os
import re
import unicodedata
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from inference.files import IMAGE_FILES, IMAGE_RECORD, VIDEO_FILES, VIDEO_RECORD
from utils.errors import UserError, printable
from utils.files import PARTIAL_NAME, read_json

OUTCOME = 'demo.json'  # beside the folders
LONGEST_NAME = 120  # bytes, far below every file system's limit
_UNSAFE = re.compile(r'[\x00-\x1f\x7f-\x9f\ufffd\u2028-\u202e\u2066-\u2069\\/:*?"<>|%]')  # somewhere, or for OpenCV


def input_name(source: Path | int) -> str:
    """The name under which an input is recorded: its absolute path, or 'camera N'."""
    return f'camera {source}' if isinstance(source, int) else printable(os.path.abspath(source))


def folder_name(stem: str) -> str:
    """A folder name for a file's stem that every file system accepts, in Unicode's composed form."""
    name = unicodedata.normalize('NFC', os.fsencode(stem).decode('utf-8', 'replace'))
    name = re.sub(r'^[-. ]+', '_', _UNSAFE.sub('_', name))
    return name.encode()[:LONGEST_NAME].decode('utf-8', 'ignore').rstrip('. ') or '_'


class Folders:
    """Assigns the folders below ``out``.

    An input keeps the folder that its results are in already. Otherwise it gets the first of NAME, NAME-2, NAME-3 ...
    that holds nothing but leftovers of an interrupted command; names that some file systems do not tell apart are one.
    """

    def __init__(self, out: Path):
        self.out, self.taken = out, {_key(OUTCOME)}
        self.existing: dict[str, list[str]] = defaultdict(list)
        if out.is_dir():
            for name in sorted(os.listdir(out)):
                self.existing[_key(name)].append(name)
        self.numbered: dict[str, list[str]] = defaultdict(list)
        for key in self.existing:
            self.numbered[re.sub(r'-\d+$', '', key)].append(key)

    def choose(self, source: Path | int) -> Path:
        """The folder of a file or a camera; a recording of a camera never continues an earlier one."""
        name = f'camera{source}' if isinstance(source, int) else folder_name(source.stem)
        if isinstance(source, Path):
            for key in dict.fromkeys([_key(name), *self.numbered[_key(name)]]):
                for folder in (self.out / existing for existing in self.existing[key]):
                    if key not in self.taken and owner(folder) == input_name(source):
                        self.taken.add(key)
                        return folder
        number, candidate = 1, name
        while not self._vacant(candidate):
            number += 1
            candidate = f'{name}-{number}'
        key = _key(candidate)
        self.taken.add(key)
        return self.out / (self.existing[key] or [candidate])[0]

    def _vacant(self, name: str) -> bool:
        key = _key(name)
        folders = [self.out / existing for existing in self.existing[key]]
        return key not in self.taken and all(folder.is_dir() and _only_leftovers(folder) for folder in folders)


def owner(folder: Path) -> str | None:
    """The name of the input whose results ``folder`` holds; None if it is not recorded."""
    for record in (folder / IMAGE_RECORD, folder / VIDEO_RECORD):
        with suppress(UserError, OSError, LookupError, TypeError):
            name = read_json(record)['asked']['input']
            return name if name.startswith('camera ') else os.path.abspath(name)
    return None


def remove_results(folder: Path) -> None:
    """Remove the results of a former command, the records that declare them complete first; other files stay."""
    for record in (IMAGE_RECORD, VIDEO_RECORD):
        (folder / record).unlink(missing_ok=True)
    for path in _children(folder):
        if path.name in IMAGE_FILES or path.name in VIDEO_FILES:
            path.unlink()
        elif _may_hold_pair(path) and ((path / IMAGE_RECORD).exists() or _all_known(path, IMAGE_FILES)):
            remove_results(path)
            with suppress(OSError):  # files of others
                path.rmdir()


def _only_leftovers(folder: Path) -> bool:
    """Whether a folder holds nothing but results of the demo without their record."""
    pairs = frozenset(path.name for path in _children(folder) if _may_hold_pair(path) and _all_known(path, IMAGE_FILES))
    return _all_known(folder, (IMAGE_FILES | VIDEO_FILES | pairs) - {IMAGE_RECORD, VIDEO_RECORD})


def _may_hold_pair(path: Path) -> bool:
    """Whether this may be the folder of an image's second or later pair of hands."""
    return re.fullmatch(r'[1-9]\d{0,3}', path.name) is not None and path.is_dir()


def _all_known(folder: Path, known: frozenset[str]) -> bool:
    return all(path.name in known or PARTIAL_NAME.fullmatch(path.name) for path in _children(folder))


def _children(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _key(name: str) -> str:
    """Equal for names that a file system may not tell apart."""
    return unicodedata.normalize('NFC', unicodedata.normalize('NFC', name).casefold())
