"""The folder of a prepared split, while it grows and when it is done: names, journal, record, what is left out and why.

``<split>.partial`` holds the samples so far and a journal of what is finished; ``finish`` adds the record and gives the
folder its name. See dataset/prepare/split.py for the form.
"""

import json
import os
import pickle
from pathlib import Path
from typing import Any, NamedTuple

from dataset.prepare.raw import Frame, RawSplit
from dataset.prepared import RECORD, paths
from utils.errors import UserError
from utils.files import read_json, write_json

JOURNAL = 'journal.jsonl'
DARKEST = 10  # least mean grey value of a picture that is kept

# Why a frame is not kept. The first are properties of the data set, the others damage that the user should know about.
NOT_INTERACTING, NOT_VALID = 'hands not interacting', 'hand type not valid'
NO_FIT, DARK = 'a hand without MANO parameters', f'mean grey value below {DARKEST}'
NO_ANNOTATION, BAD_FIT, BAD_CAMERA = 'no annotation', 'damaged MANO parameters', 'damaged camera'
MISSING, UNREADABLE, OTHER_SIZE = 'picture missing', 'picture unreadable', 'picture of another size'
BEHIND = 'hands behind the camera'
DAMAGE = (NO_ANNOTATION, BAD_FIT, BAD_CAMERA, MISSING, UNREADABLE, OTHER_SIZE, BEHIND)
# More damage than this is no accident but, say, half a download.
TOLERATED_SHARE, TOLERATED_FRAMES = 0.01, 10


class Skip(NamedTuple):
    reason: str
    detail: str = ''


class Skipped:
    """Frames that are not kept: image ids by reason, and a sentence for each damaged one."""

    def __init__(self):
        self.image_ids: dict[str, list[int]] = {}
        self.damage: dict[str, str] = {}

    def __len__(self) -> int:
        return sum(map(len, self.image_ids.values()))

    def add(self, frame: Frame, skip: Skip) -> None:
        self.image_ids.setdefault(skip.reason, []).append(frame.id)
        if skip.reason in DAMAGE:
            self.damage[frame.file_name] = skip.detail or skip.reason

    def extend(self, image_ids: dict[str, list[int]], damage: dict[str, str]) -> None:
        """Enter what others noted, in the order in which frame after frame would have been added."""
        for reason, ids in image_ids.items():
            self.image_ids.setdefault(reason, []).extend(ids)
        self.damage |= damage

    def table(self) -> str:
        return ''.join(f'{len(ids):>12,}  {reason}\n' for reason, ids in self.image_ids.items())


class Journal:
    """What of a folder is done: a line of settings, then a line per finished part. A line cut short does not count."""

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
                    raise UserError(f'{path} is damaged; remove {path.parent} and start again.') from None
                end += len(line)
            os.truncate(path, end)

    @property
    def is_of_merge(self) -> bool:
        """Whether the folder is put together from shards (dataset/shards.py)."""
        return bool(self.lines) and 'merge' in self.lines[0]

    def start(self, settings: dict) -> None:
        """Forget what there was."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        self.lines = []
        self.append(settings)

    def append(self, line: dict) -> None:
        with open(self.path, 'ab') as file:
            file.write(json.dumps(line).encode() + b'\n')
        self.lines.append(line)

    def replay(self, chunks: list[list[Frame]], skipped: Skipped) -> tuple[int, int]:
        """Enter the noted skips into ``skipped`` -> (number of finished chunks, number of the next sample)."""
        finished = self.lines[1:]
        for line, chunk in zip(finished, chunks):
            for number, skip in line['skipped']:
                skipped.add(chunk[number], Skip(*skip))
        return len(finished), finished[-1]['next'] if finished else 0


def pickle_annotation(annotation: dict[str, Any]) -> bytes:
    """A pickle that readers with NumPy 1 and with NumPy 2 open: in it NumPy's core goes by its old, lasting name."""
    # Protocol 3 writes a class as a line of text, so that another name of another length is still a valid pickle.
    return pickle.dumps(annotation, protocol=3).replace(b'cnumpy._core.', b'cnumpy.core.')


def already_complete(folder: Path, settings: dict) -> bool:
    """Whether the folder is there and finished, and says so. Raises UserError if it was made in another way."""
    if not folder.exists():
        return False
    record = folder / RECORD
    if not record.exists():
        raise UserError(f'{folder} exists and was not prepared by this command; give another --save_path.')
    refuse_other_settings(folder, read_json(record).get('settings', {}), settings)
    print(f'{folder.name}: {folder} is already complete.')
    return True


def refuse_other_settings(folder: Path, found: dict, wanted: dict) -> None:
    """Raises UserError unless the folder's settings are those that are wanted now."""
    if found == wanted:
        return
    different = [key for key in wanted if found.get(key) != wanted[key]]
    what = '; '.join(f'{key} was {found.get(key)}, now {wanted[key]}' for key in different)
    raise UserError(
        f'{folder} was prepared with other settings ({what}); give another --save_path, or remove the folder first.'
    )


def refuse_heavy_damage(split: RawSplit, what: str, damage: dict[str, str], total: int, leftover: Path) -> None:
    """Single damaged frames (what is wrong, by file name) are listed; many of them are an incomplete data set."""
    if len(damage) > max(TOLERATED_FRAMES, TOLERATED_SHARE * total):
        some = '; '.join(list(dict.fromkeys(damage.values()))[:3])
        raise UserError(
            f'{len(damage):,} of {total:,} frames of {what} in {split.root} are missing or damaged '
            f'({some}; ...): complete the data set, remove {leftover} if it is there, and prepare it '
            'again.'
        )


def refuse_nothing_kept(split: RawSplit, kept: int, summary: str) -> None:
    """Raises UserError, with the reasons, if there is not a single sample."""
    if not kept:
        raise UserError(f'{split.root}: no frame of {split.split} can be prepared. {" ".join(summary.split())}.')


def summarize(what: str, kept: int, total: int, skipped: Skipped) -> str:
    return f'{what}: {kept:,} of {total:,} frames kept\n{skipped.table()}'


def finish(partial: Path, target: Path, settings: dict, kept: int, total: int, skipped: Skipped, **more: Any) -> None:
    """Write the record (``more`` too) and give the folder its name."""
    index = kept  # files of a run that knew more pictures
    while left_over := [path for path in paths(partial, index).values() if path.exists()]:
        for path in left_over:
            path.unlink()
        index += 1
    os.sync()  # or a power cut could leave the finished name on files that never reached the disk
    write_json(
        partial / RECORD,
        {
            'settings': settings,
            'frames': total,
            'kept': kept,
            'skipped': {reason: len(ids) for reason, ids in skipped.image_ids.items()},
            'damaged': skipped.damage,
            'skipped_image_ids': skipped.image_ids,
            **more,
        },
    )
    os.rename(partial, target)
