"""Frames that the preparation leaves out: why, how many are tolerated, and the record of a prepared split."""

import hashlib
import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from dataset.prepare.raw import HANDS_SHOWN, NO_HANDS, Frame, RawSplit
from dataset.prepare.resumable import Journal, publish
from dataset.prepared import FOLDERS, RECORD, partial_folder
from utils.errors import UserError
from utils.files import read_json

KEPT_BY_TYPE = 'kept_by_hand_type'  # entry of preparation.json where single hands are kept
DARKEST = 10  # least mean grey value of a frame that is kept

# Why a frame is not kept: properties of the data set first, then damage. The texts are part of preparation.json.
NOT_INTERACTING, NOT_VALID = 'hands not interacting', 'hand type not valid'
UNKNOWN_TYPE = 'unknown hand type'
NO_FIT, DARK = 'a hand without MANO parameters', f'mean grey value below {DARKEST}'
NO_ANNOTATION, BAD_FIT, BAD_CAMERA = 'no annotation', 'damaged MANO parameters', 'damaged camera'
MISSING, UNREADABLE, OTHER_SIZE = 'picture missing', 'picture unreadable', 'picture of another size'
BEHIND = 'hands behind the camera'
DAMAGE = (NO_ANNOTATION, BAD_FIT, BAD_CAMERA, MISSING, UNREADABLE, OTHER_SIZE, BEHIND)
# More damage than this suggests, for instance, an incomplete download.
TOLERATED_SHARE, TOLERATED_FRAMES = 0.01, 10


class Skip(NamedTuple):
    reason: str
    detail: str = ''


class Skipped:
    """Skipped frames: image ids by reason, and a sentence for each damaged one."""

    def __init__(self) -> None:
        self.image_ids: dict[str, list[int]] = {}
        self.damage: dict[str, str] = {}

    def __len__(self) -> int:
        return sum(map(len, self.image_ids.values()))

    def add(self, frame: Frame, skip: Skip) -> None:
        self.image_ids.setdefault(skip.reason, []).append(frame.id)
        if skip.reason in DAMAGE:
            self.damage[frame.file_name] = skip.detail or skip.reason

    def extend(self, image_ids: dict[str, list[int]], damage: dict[str, str]) -> None:
        """Add the skips of a shard, in the order in which single frames would have been added."""
        for reason, ids in image_ids.items():
            self.image_ids.setdefault(reason, []).extend(ids)
        self.damage |= damage

    def table(self) -> str:
        return ''.join(f'{len(ids):>12,}  {reason}\n' for reason, ids in self.image_ids.items())


def digest_of_frames(frames: list[Frame]) -> str:
    """Identifies the frames of a chunk in the journal."""
    text = '\n'.join(f'{frame.id} {frame.file_name}' for frame in frames)
    return hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:16]


def replay(journal: Journal, chunks: list[list[Frame]], skipped: Skipped) -> Counter[str]:
    """Enter the journalled skips into ``skipped`` -> number of frames kept so far, by hand type.

    Raises UserError unless the finished chunks are the first of ``chunks``.
    """
    kept: Counter[str] = Counter()
    for number, entry in enumerate(journal.chunks):
        chunk = chunks[number] if number < len(chunks) else []
        if not chunk or entry['frames'] != digest_of_frames(chunk):
            raise journal.contradiction(number)
        for place, skip in entry['skipped']:
            skipped.add(chunk[place], Skip(*skip))
        left_out = {place for place, _ in entry['skipped']}
        kept.update(frame.hand_type for place, frame in enumerate(chunk) if place not in left_out)
        if entry['next'] != kept.total():
            raise journal.contradiction(number)
    return kept


def recorded_settings(folder: Path) -> dict:
    """The settings of a prepared split. Raises UserError if the folder is none of this project's."""
    record = folder / RECORD
    if not record.exists():
        raise UserError(f'{folder} exists and was not prepared by this command. Choose another --save_path.')
    return read_json(record).get('settings', {})


def pickle_annotation(annotation: dict[str, Any]) -> bytes:
    """Pickle an annotation so that both NumPy 1 and NumPy 2 can read it, under the old name of NumPy's core."""
    # Protocol 3 writes class names as lines of text, so a name of another length leaves the pickle valid.
    return pickle.dumps(annotation, protocol=3).replace(b'cnumpy._core.', b'cnumpy.core.')


def refuse_heavy_damage(split: RawSplit, what: str, damage: dict[str, str], total: int, leftover: Path) -> None:
    """Raises UserError if so many frames are damaged ({file name: sentence}) that the data set must be incomplete."""
    if len(damage) > max(TOLERATED_FRAMES, TOLERATED_SHARE * total):
        some = '; '.join(list(dict.fromkeys(damage.values()))[:3])
        raise UserError(
            f'{len(damage):,} of {total:,} frames of {what} in {split.root} are missing or damaged '
            f'({some}; ...). Complete the data set, remove {leftover} if it exists, and prepare it again.'
        )


def refuse_nothing_kept(split: RawSplit, kept: int, summary: str) -> None:
    """Raises UserError with the reasons if not a single frame was kept."""
    if not kept:
        raise UserError(f'{split.root}: No frame of {split.split} can be prepared. {" ".join(summary.split())}.')


def summarize(what: str, kept: int, total: int, skipped: Skipped, hand_types: dict[str, int] | None = None) -> str:
    """The end of a preparation in words. hand_types: numbers of kept frames, where single hands are kept too."""
    types = ''
    if hand_types is not None:
        words = {NO_HANDS: 'without hands'}
        types = f' ({", ".join(f"{count:,} {words.get(name, name)}" for name, count in hand_types.items())})'
    return f'{what}: {kept:,} of {total:,} frames kept{types}\n{skipped.table()}'


def keeps_single_hands(settings: dict[str, Any]) -> bool:
    """Whether a split is prepared with ``--hands all``; records of ``interacting`` lack the entry."""
    return settings.get('hands') == 'all'


def counts_by_hand_type(kept: Counter[str]) -> dict[str, int]:
    """Numbers of kept frames in the order of HANDS_SHOWN, as preparation.json records them."""
    return {name: kept[name] for name in HANDS_SHOWN}


def finish(target: Path, settings: dict, kept: int, total: int, skipped: Skipped, **more: Any) -> None:
    """Check that every frame is accounted for, write the record (``more`` too) and give the folder its name.

    Removes the leftovers of an interrupted run that found more images. Raises UserError, and publishes nothing, unless
    kept and skipped frames add up to ``total`` and every kept one has its files.
    """
    partial = partial_folder(target)
    if kept + len(skipped) != total:
        raise UserError(
            f'{partial}: {kept:,} frames kept and {len(skipped):,} skipped are not the {total:,} that were selected. '
            f'Nothing was published. Remove {partial} and rerun the command.'
        )
    for name, suffix in FOLDERS.items():
        expected = {f'{index}.{suffix}' for index in range(kept)}
        found = set(os.listdir(partial / name)) if (partial / name).is_dir() else set()
        if missing := expected - found:
            raise UserError(
                f'{partial / name} lacks {len(missing):,} of {kept:,} files, such as {min(missing)}. Nothing was '
                f'published. Remove {partial} and rerun the command.'
            )
        for left_over in found - expected:
            (partial / name / left_over).unlink()
    record = {
        'settings': settings,
        'frames': total,
        'kept': kept,
        'skipped': {reason: len(ids) for reason, ids in skipped.image_ids.items()},
        'damaged': skipped.damage,
        'skipped_image_ids': skipped.image_ids,
        **more,
    }
    publish(target, RECORD, record)
