"""Folders that grow and resume: a folder is called ``NAME.partial`` until it is complete, then it is renamed.

Preparation, shards, merging, packing and synthesis share this protocol. What is done so far is a journal (``Journal``),
or the data files themselves; settings recorded at the start must match when the same command is given again.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dataset.prepared import partial_folder
from utils.errors import UserError
from utils.files import write_json

JOURNAL = 'journal.jsonl'


class Journal:
    """The finished parts of a folder: a line with the settings, then one per part. A truncated line does not count."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[dict] = []
        end = 0
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b'\n'):
                    break
                try:
                    self.lines.append(json.loads(line))
                except ValueError:
                    raise UserError(f'{path} is damaged. Remove {path.parent} and start again.') from None
                end += len(line)
            os.truncate(path, end)

    @property
    def is_of_merge(self) -> bool:
        """Whether shards are being merged into the folder (dataset/prepare/shards.py)."""
        return bool(self.lines) and 'merge' in self.lines[0]

    def start(self, settings: dict) -> None:
        """Discard the previous content."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        self.lines = []
        self.append(settings)

    def append(self, line: dict) -> None:
        with open(self.path, 'ab') as file:
            file.write(json.dumps(line).encode() + b'\n')
        self.lines.append(line)


def already_complete(folder: Path, settings: dict, *, recorded: Callable[[Path], dict]) -> bool:
    """Whether the folder is complete; prints so. Raises UserError if it was created with other settings.

    recorded: reads the settings of a complete folder; raises UserError if it is none.
    """
    if not folder.exists():
        return False
    refuse_other_settings(folder, recorded(folder), settings)
    print(f'{folder.name}: {folder} is already complete.')
    return True


def refuse_other_settings(folder: Path, found: dict, wanted: dict) -> None:
    """Raises UserError unless the folder was created with the settings that are wanted now."""
    different = [f'{key} was {found.get(key)}, now {wanted[key]}' for key in wanted if found.get(key) != wanted[key]]
    if different or found != wanted:
        raise UserError(
            f'{folder} was created with other settings ({"; ".join(different)}). Choose another --save_path, or remove '
            'the folder first.'
        )


def publish(folder: Path, record_name: str, record: dict[str, Any]) -> None:
    """Complete ``folder``: everything reaches the disk, then its record is written, then it gets its name."""
    partial = partial_folder(folder)
    os.sync()  # a power cut must not leave the final name on files that never reached the disk
    write_json(partial / record_name, record)
    os.rename(partial, folder)
