"""Prepare a split of InterHand2.6M: 256 x 256 crops in the field's interchange form.

    <save_path>/<split>/img/<i>.jpg    the crop, BGR
                        mask/<i>.jpg   which hand is seen where: channel 1 the right hand, channel 2 the left, 255
                        dense/<i>.jpg  vertex colours, interpolated over the visible surface
                        anno/<i>.pkl   MANO parameters (None for an absent hand), camera, the entries of data.json
                        preparation.json  settings, counts, and every skipped frame with its reason

Samples are numbered without gaps, but whether a frame is kept is known only once its image is read. So worker
processes only compute; this process numbers and writes their results in order, chunk by chunk, into ``<split>.partial``
and records each finished chunk in a journal. A killed run resumes after the last recorded chunk, and the folder is
renamed when it is complete. A job array prepares a split in parts: see dataset/prepare/shards.py.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dataset.prepare import raw
from dataset.prepare.frames import FrameTask, PreparedFrame
from dataset.prepare.raw import HANDS_SHOWN, Frame, RawSplit, RecordError
from dataset.prepare.resumable import JOURNAL, Journal, already_complete, growing, refuse_other_settings
from dataset.prepare.shards import (
    Shard,
    check_shards,
    clean_up,
    merge,
    refuse_begun_whole,
    refuse_other_counts,
    refuse_shards,
)
from dataset.prepare.skips import (
    BAD_CAMERA,
    BAD_FIT,
    KEPT_BY_TYPE,
    MISSING,
    NO_ANNOTATION,
    NO_FIT,
    NOT_INTERACTING,
    NOT_VALID,
    UNKNOWN_TYPE,
    Skip,
    Skipped,
    counts_by_hand_type,
    digest_of_frames,
    finish,
    keeps_single_hands,
    pickle_annotation,
    recorded_settings,
    refuse_heavy_damage,
    refuse_nothing_kept,
    replay,
    summarize,
)
from dataset.prepared import FOLDERS, partial_folder, paths
from utils.errors import UserError
from utils.files import sha256_of_file
from utils.stopping import check_stop

FORMAT = 1  # of the prepared files; raised when the same input yields other files
CHUNK = 32  # frames per task; the unit of the journal
SOURCES = ('data', 'camera', 'MANO_NeuralAnnot')  # annotation files in use
SYNTHESIZED = 'synthesized.json'  # in generated raw data: the settings of a complete set


def select(split: RawSplit, skipped: Skipped, *, single_hands: bool = False) -> list[Frame]:
    """The frames whose annotations qualify; images are not read yet.

    Those with interacting hands, and if ``single_hands`` those with a single hand or none. Every hand that the frame's
    hand type names must have a fit.
    """
    fits: dict[tuple[str, int, str], Skip | None] = {}  # by time step and hand type, shared by the cameras
    cameras: dict[tuple[str, str], Skip | None] = {}
    selected: list[Frame] = []
    for frame in split.iterate_frames():
        check_stop()
        skip: Skip | None
        if not frame.hand_type:
            skip = Skip(NO_ANNOTATION)
        elif not single_hands and frame.hand_type != 'interacting':
            skip = Skip(NOT_INTERACTING)
        elif frame.hand_type not in HANDS_SHOWN:
            skip = Skip(UNKNOWN_TYPE)
        elif not frame.hand_type_valid:
            skip = Skip(NOT_VALID)
        else:
            step, camera = (frame.capture, frame.frame_idx, frame.hand_type), (frame.capture, frame.camera)
            if step not in fits:
                fits[step] = _fit_problem(split, *step)
            if camera not in cameras:
                cameras[camera] = _camera_problem(split, *camera)
            skip = fits[step] or cameras[camera]
        if skip:
            skipped.add(frame, skip)
        else:
            selected.append(frame)
    return selected


def _fit_problem(split: RawSplit, capture: str, frame_idx: int, hand_type: str) -> Skip | None:
    try:
        fits = split.mano(capture, frame_idx)
    except RecordError as error:
        return Skip(BAD_FIT, str(error))
    shown = HANDS_SHOWN[hand_type]
    found = [fit for side in shown if (fit := fits[side]) is not None]
    if len(found) < len(shown):
        return Skip(NO_FIT)
    if not all(np.isfinite(numbers).all() for fit in found for numbers in fit):
        return Skip(BAD_FIT, f'capture {capture}, frame {frame_idx}: not finite')
    return None


def _camera_problem(split: RawSplit, capture: str, camera: str) -> Skip | None:
    try:
        split.camera(capture, camera)
    except RecordError as error:
        return Skip(BAD_CAMERA, str(error))
    return None


def prepare_split(
    split: RawSplit,
    save_path: Path,
    settings: dict,
    run: Callable[[Iterable[list[FrameTask]]], Iterator],
    shard: Shard | None = None,
) -> None:
    """Prepare one split or a shard of it, resuming what was begun. ``run`` maps chunks of tasks to results, in order.

    Raises UserError if the folder holds something else or is in use, if too many frames are damaged, or if none is
    kept.
    """
    whole = save_path / split.split
    with growing(shard.folder(whole) if shard else whole):
        _prepare(split, whole, settings, run, shard)


def _prepare(
    split: RawSplit,
    whole: Path,
    settings: dict,
    run: Callable[[Iterable[list[FrameTask]]], Iterator],
    shard: Shard | None,
) -> None:
    what = f'{split.split}, shard {shard}' if shard else split.split
    target = shard.folder(whole) if shard else whole
    partial = partial_folder(target)
    if already_complete(target, settings, recorded=recorded_settings):
        clean_up(target)
        return
    if shard:
        if already_complete(whole, settings, recorded=recorded_settings):
            return
        refuse_other_counts(whole, shard)
        refuse_begun_whole(whole)
    else:
        refuse_shards(whole)
    with Journal(partial / JOURNAL) as journal:
        if journal.is_of_merge:
            raise UserError(f'{partial} is an interrupted merge of shards. Finish it with --merge, or remove it.')
        if not journal.chunks:
            journal.begin(settings)
        refuse_other_settings(partial, journal.header, settings)

        frames, total, skipped, more = _select_part(split, settings, shard, partial)
        chunks = [frames[begin : begin + CHUNK] for begin in range(0, len(frames), CHUNK)]
        done, kept = len(journal.chunks), replay(journal, chunks, skipped)
        todo = chunks[done:]
        missing = {
            frame.file_name: str(split.image_path(frame))
            for frame in split.missing_images(frame for chunk in todo for frame in chunk)
        }
        refuse_heavy_damage(split, what, skipped.damage | missing, total, partial)

        for folder in FOLDERS:
            (partial / folder).mkdir(parents=True, exist_ok=True)
        results = run([frame_task(split, frame) for frame in chunk] for chunk in todo)
        with tqdm(total=len(frames), initial=len(frames) - sum(map(len, todo)), desc=what, unit='frame') as progress:
            for chunk, outcomes in zip(todo, results):
                noted = []
                for number, (frame, outcome) in enumerate(zip(chunk, outcomes, strict=True)):
                    if isinstance(outcome, PreparedFrame):
                        write_frame(partial, kept.total(), outcome)
                        kept[frame.hand_type] += 1
                        continue
                    if outcome.reason == MISSING and frame.file_name not in missing:
                        raise UserError(
                            f'{outcome.detail} existed when the run began and is gone. Check the disk, then rerun the '
                            'same command to continue.'
                        )
                    skipped.add(frame, outcome)
                    noted.append([number, list(outcome)])
                refuse_heavy_damage(split, what, skipped.damage, total, partial)
                journal.note({'frames': digest_of_frames(chunk), 'next': kept.total(), 'skipped': noted})
                progress.update(len(chunk))
                check_stop()
    types = None
    if keeps_single_hands(settings):
        types = more[KEPT_BY_TYPE] = counts_by_hand_type(kept)
    summary = summarize(what, kept.total(), total, skipped, types)
    if not shard:  # other shards may keep frames
        refuse_nothing_kept(split, kept.total(), summary)
    finish(target, settings, kept.total(), total, skipped, **more)
    print(summary, end='')
    clean_up(target)


def _select_part(
    split: RawSplit, settings: dict, shard: Shard | None, partial: Path
) -> tuple[list[Frame], int, Skipped, dict]:
    """-> frames to prepare, frames in all, frames skipped by the selection, additional entries of the record."""
    skipped = Skipped()
    frames = select(split, skipped, single_hands=keeps_single_hands(settings))
    total = len(frames) + len(skipped)
    if not shard:
        return frames, total, skipped, {}
    # Frames that the selection skips belong to the split, not to a shard; the merge records them once.
    refuse_heavy_damage(split, split.split, skipped.damage, total, partial)
    begin, end = shard.bounds(len(frames), CHUNK)
    more = {'shard': {'number': shard.number, 'of': shard.of, 'begin': begin, 'end': end, 'selected': len(frames)}}
    return frames[begin:end], end - begin, Skipped(), more


def settings_of(split: RawSplit, settings: dict) -> dict:
    """Everything that determines a split's files: the command's settings, and what identifies the raw data: the sizes
    of the annotation files, and the settings of synthetic ones."""
    source: dict[str, Any] = {
        kind: path.stat().st_size if (path := split.file(kind)).exists() else None for kind in SOURCES
    }
    if (record := split.root / SYNTHESIZED).is_file():
        source['synthesized'] = sha256_of_file(record)[:12]
    return settings | {'chunk': CHUNK, 'source': source}


def merge_splits(splits: list[tuple[RawSplit, dict]], save_path: Path) -> None:
    """Merge the shards of each split, given with its settings. All are checked before the first merge."""
    with ExitStack() as owned_folders:
        found = []
        for split, settings in splits:
            target = save_path / split.split
            owned_folders.enter_context(growing(target))
            if already_complete(target, settings, recorded=recorded_settings):
                clean_up(target)
            else:
                found.append((split, settings, check_shards(target, settings)))
        for split, settings, shards in found:
            skipped = Skipped()
            selected = len(select(split, skipped, single_hands=keeps_single_hands(settings)))
            merge(split, save_path / split.split, settings, shards, selected, skipped)


def frame_task(split: RawSplit, frame: Frame) -> FrameTask:
    # A fit belongs to a time step, a hand type to an image: a fit of a hand that the image does not show is ignored.
    fits, shown = split.mano(frame.capture, frame.frame_idx), HANDS_SHOWN[frame.hand_type]
    return FrameTask(
        str(split.image_path(frame)),
        frame.file_name,
        (frame.width, frame.height),
        raw.full_entries(frame),
        split.camera(frame.capture, frame.camera),
        {side: fit for side in shown if (fit := fits[side]) is not None},
    )


def write_frame(folder: Path, index: int, sample: PreparedFrame) -> None:
    contents = sample.files | {'anno': pickle_annotation({'inter_idx': index} | sample.annotation)}
    for name, path in paths(folder, index).items():
        # A kill may leave a truncated file here, but only after the journal's last chunk: it is written again.
        path.write_bytes(contents[name])
