"""Prepare a split in shards, as the tasks of a job array, and merge them.

Every task selects the same frames and prepares one contiguous range of them: ``<split>.shard-<i>-of-<n>`` is a
prepared split numbered from 0 whose record names the range. Frames that the selection skips belong to no shard; the
merge repeats the selection and records them first, as a run without shards does. So the merged folder equals the one
of such a run, byte for byte.
"""

import hashlib
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from tqdm import tqdm

from dataset.prepare.raw import RawSplit
from dataset.prepare.resumable import JOURNAL, Journal, refuse_other_settings
from dataset.prepare.skips import (
    KEPT_BY_TYPE,
    Skipped,
    counts_by_hand_type,
    finish,
    keeps_single_hands,
    pickle_annotation,
    refuse_heavy_damage,
    refuse_nothing_kept,
    summarize,
)
from dataset.prepared import FOLDERS, RECORD, partial_folder, paths
from utils.errors import UserError
from utils.files import read_json, read_pickle
from utils.ownership import owned
from utils.stopping import check_stop

MOST_NAMED = 20  # missing shards in a message


class Shard(NamedTuple):
    """Part ``number`` (from 1) of ``of``."""

    number: int
    of: int

    def __str__(self) -> str:
        return f'{self.number}/{self.of}'

    def folder(self, split_folder: Path) -> Path:
        """The shard's folder, beside its split."""
        return split_folder.with_name(f'{split_folder.name}.shard-{self.number}-of-{self.of}')

    def bounds(self, frames: int, chunk: int) -> tuple[int, int]:
        """(begin, end) of its range of selected frames: whole chunks, whose number differs by one at most."""
        chunks = -(-frames // chunk)
        begin, end = (chunks * number // self.of * chunk for number in (self.number - 1, self.number))
        return min(begin, frames), min(end, frames)


class _Range(msgspec.Struct):
    number: int
    of: int
    begin: int
    end: int
    selected: int  # frames of the whole split


class _Record(msgspec.Struct):
    """Required content of a shard's preparation.json."""

    settings: dict[str, Any]
    kept: int
    skipped_image_ids: dict[str, list[int]]
    damaged: dict[str, str]
    shard: _Range
    kept_by_hand_type: dict[str, int] | None = None  # only of --hands all


class FinishedShard(NamedTuple):
    folder: Path
    record: _Record
    digest: str  # of the record's file


def parse_shard(text: str) -> Shard:
    """'3/64' -> Shard(3, 64)"""
    match = re.fullmatch(r'([0-9]+)/([0-9]+)', text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f'--shard is {text}; it must be i/n with i from 1 to n, such as 3/64.')
    return Shard(int(match[1]), int(match[2]))


def find_shards(split_folder: Path) -> dict[Shard, bool]:
    """The shards beside a split's (future) folder, and whether each is finished."""
    form = re.compile(re.escape(split_folder.name) + r'\.shard-([0-9]+)-of-([0-9]+)(\.partial)?')
    names = os.listdir(split_folder.parent) if split_folder.parent.is_dir() else []
    found: dict[Shard, bool] = {}
    # x sorts before x.partial: a finished shard stays finished.
    for match in filter(None, map(form.fullmatch, sorted(names))):
        found.setdefault(Shard(int(match[1]), int(match[2])), match[3] is None)
    return found


def refuse_other_counts(split_folder: Path, wanted: Shard | None = None) -> None:
    """Raises UserError if the existing shards, or ``wanted``, disagree on the number of shards."""
    found = {shard.of for shard in find_shards(split_folder)} | ({wanted.of} if wanted else set())
    if len(found) > 1:
        counts = ' and into '.join(map(str, sorted(found)))
        raise UserError(
            f'{split_folder.name} is split in different ways, into {counts} shards: keep to one of them '
            f'and remove the other {split_folder}.shard-* folders.'
        )


def refuse_shards(split_folder: Path) -> None:
    """Raises UserError if any exist: a run without shards would repeat their work."""
    if find_shards(split_folder):
        raise UserError(
            f'{split_folder.parent} holds shards of {split_folder.name}: merge them with --merge, '
            f'or remove {split_folder}.shard-* first.'
        )


def refuse_begun_whole(split_folder: Path) -> None:
    """Raises UserError if a run without shards has begun, whose work shards would repeat."""
    partial = partial_folder(split_folder)
    journal = Journal(partial / JOURNAL)
    if journal.header is not None and not journal.is_of_merge:
        raise UserError(
            f'{partial} was begun by a command without --shard. Finish it with that command, or remove it first.'
        )


# ---------------------------------------------------------------------------------------------------------------------
# Checks before the merge
# ---------------------------------------------------------------------------------------------------------------------


def check_shards(split_folder: Path, settings: dict) -> list[FinishedShard]:
    """All shards of a split, in order. Raises UserError unless all are finished and together cover the split."""
    refuse_other_counts(split_folder)
    found = find_shards(split_folder)
    if not found:
        raise UserError(
            f'{split_folder.parent} has no shards of {split_folder.name}; prepare them first, each with --shard i/n.'
        )
    for shard in (shard for shard, finished in found.items() if not finished):
        with owned(shard.folder(split_folder)):  # refused, with its owner's name, while it is being prepared
            pass
    of = next(iter(found)).of
    wanted = [Shard(number, of) for number in range(1, of + 1)]
    _refuse_gaps(split_folder, wanted, found)
    shards = [_read_shard(shard, shard.folder(split_folder), settings) for shard in wanted]
    selected = shards[0].record.shard.selected
    for shard, one in zip(wanted, shards):
        span = one.record.shard
        # Every range follows from the number of frames: if all are as expected, they neither overlap nor leave gaps.
        if (span.begin, span.end, span.selected) != (*shard.bounds(selected, settings['chunk']), selected):
            raise UserError(
                f'{one.folder} holds the frames {span.begin} to {span.end} of {span.selected}, which does '
                f'not fit the other shards; remove it and prepare it again (--shard {shard}).'
            )
    return shards


def _refuse_gaps(split_folder: Path, wanted: list[Shard], found: dict[Shard, bool]) -> None:
    problems = []
    for problem, there in (('missing', None), ('unfinished', False)):
        numbers = [str(shard.number) for shard in wanted if found.get(shard) is there]
        if numbers:
            more = ', ...' if len(numbers) > MOST_NAMED else ''
            problems.append(f'{problem}: {", ".join(numbers[:MOST_NAMED])}{more}')
    if problems:
        raise UserError(
            f'{split_folder}.shard-*: of {wanted[0].of} shards, {"; ".join(problems)}; run these again '
            f'(--shard i/{wanted[0].of}), then merge.'
        )


def _read_shard(shard: Shard, folder: Path, settings: dict) -> FinishedShard:
    again = f'remove {folder} and prepare it again (--shard {shard})'
    path = folder / RECORD
    try:
        record = msgspec.convert(read_json(path), _Record)
    except msgspec.ValidationError as error:
        raise UserError(f'{path} is not the record of a shard ({error}); {again}.') from None
    refuse_other_settings(folder, record.settings, settings)
    span, skipped = record.shard, sum(map(len, record.skipped_image_ids.values()))
    if (span.number, span.of) != shard or record.kept + skipped != span.end - span.begin:
        raise UserError(
            f'{path} records shard {span.number}/{span.of}, with {record.kept} frames kept and {skipped} '
            f'skipped from {span.begin} to {span.end}: that is not this shard; {again}.'
        )
    if keeps_single_hands(settings) and sum((record.kept_by_hand_type or {}).values()) != record.kept:
        raise UserError(f'{path}: {KEPT_BY_TYPE} does not add up to the {record.kept} frames kept; {again}.')
    for name, suffix in FOLDERS.items():
        names = set(os.listdir(folder / name)) if (folder / name).is_dir() else set()
        numbers = (int(stem) for each in names if (stem := each.removesuffix(f'.{suffix}')).isdecimal())
        # Counted from what exists: a damaged record may announce any number.
        found = len({number for number in numbers if number < record.kept and f'{number}.{suffix}' in names})
        if not found == len(names) == record.kept:
            raise UserError(
                f'{folder / name} does not hold the {record.kept:,} files that {RECORD} records: '
                f'{record.kept - found:,} missing, {len(names) - found:,} too many; {again}.'
            )
    return FinishedShard(folder, record, hashlib.sha256(path.read_bytes()).hexdigest())


# ---------------------------------------------------------------------------------------------------------------------
# The merge
# ---------------------------------------------------------------------------------------------------------------------


def merge(
    split: RawSplit, split_folder: Path, settings: dict, shards: list[FinishedShard], selected: int, skipped: Skipped
) -> None:
    """Renumber the samples of all shards into one split; ``skipped`` holds the frames that the selection skipped.

    A kill at any moment loses nothing: shards are only read until the whole has its name. Images are hard-linked into
    ``<split>.partial``, so nothing is copied and nothing moves. Files beyond the journal's last line may be incomplete;
    the same command writes them again. The shards are removed only after the rename, and the journal, which names
    them, after that: ``clean_up`` can always resume.
    """
    refuse_begun_whole(split_folder)
    partial = partial_folder(split_folder)
    found = shards[0].record.shard.selected
    if found != selected:
        raise UserError(
            f'{split.root}: {selected} frames of {split.split} can be prepared, the shards in '
            f'{split_folder.parent} were prepared from {found}: the annotation files have changed, remove the '
            'shards and prepare them again.'
        )
    for one in shards:
        skipped.extend(one.record.skipped_image_ids, one.record.damaged)
    kept = sum(one.record.kept for one in shards)
    total = kept + len(skipped)
    types, more = None, {}
    if keeps_single_hands(settings):
        counts = (Counter(one.record.kept_by_hand_type) for one in shards)
        types = more[KEPT_BY_TYPE] = counts_by_hand_type(sum(counts, Counter()))
    summary = summarize(split.split, kept, total, skipped, types)
    refuse_nothing_kept(split, kept, summary)
    refuse_heavy_damage(split, split.split, skipped.damage, total, Path(f'{split_folder}.shard-*'))

    merge_of = {'settings': settings, 'shards': {one.folder.name: one.digest for one in shards}}
    with _open_journal(partial, merge_of) as journal:
        for name in FOLDERS:
            (partial / name).mkdir(exist_ok=True)
        done = len(journal.chunks)
        index = sum(one.record.kept for one in shards[:done])
        if done and journal.chunks[-1] != {'shard': shards[done - 1].folder.name, 'next': index}:
            raise journal.contradiction(done - 1)
        with tqdm(total=kept, initial=index, desc=f'{split.split}, merge', unit='frame') as progress:
            for one in shards[done:]:
                for number in range(one.record.kept):
                    check_stop()
                    _take_over(one.folder, number, partial, index)
                    index += 1
                    progress.update()
                journal.note({'shard': one.folder.name, 'next': index})
    finish(split_folder, settings, kept, total, skipped, **more)
    print(summary, end='')
    clean_up(split_folder)


def _open_journal(partial: Path, merge_of: dict) -> Journal:
    journal = Journal(partial / JOURNAL)
    if journal.header != {'merge': merge_of}:
        if journal.header is not None:  # shards were prepared again since; this folder only links to their old files
            shutil.rmtree(partial)
        journal.begin({'merge': merge_of})
    return journal


def _take_over(folder: Path, number: int, partial: Path, index: int) -> None:
    source, target = paths(folder, number), paths(partial, index)
    for name in FOLDERS:
        target[name].unlink(missing_ok=True)  # never write through a hard link to a shard's file
    annotation = read_pickle(source['anno'])
    if not isinstance(annotation, dict) or annotation.get('inter_idx') != number:
        raise UserError(
            f'{source["anno"]} is not the annotation of sample {number}; remove {folder} and prepare it again.'
        )
    target['anno'].write_bytes(pickle_annotation(annotation | {'inter_idx': index}))
    for name in FOLDERS.keys() - {'anno'}:
        _link(source[name], target[name])


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, target)


def clean_up(folder: Path) -> None:
    """Remove the remains of a finished folder's shards, then its journal."""
    journal = Journal(folder / JOURNAL)
    merged = journal.header['merge']['shards'] if journal.header and journal.is_of_merge else {}
    for one in (shard.folder(folder) for shard in find_shards(folder)):
        if one.name in merged:
            shutil.rmtree(one)
    journal.path.unlink(missing_ok=True)
