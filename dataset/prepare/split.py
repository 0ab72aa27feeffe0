"""InterHand2.6M as downloaded -> 256 x 256 crops in the field's interchange form: ``python dataset/interhand.py``.

    <save_path>/<split>/img/<i>.jpg    the crop, BGR
                        mask/<i>.jpg   which hand is seen where: channel 1 the right hand, channel 2 the left, 255
                        dense/<i>.jpg  colours of the vertices, interpolated over the visible surface
                        anno/<i>.pkl   MANO parameters, camera, the entries of data.json
                        preparation.json  settings, counts, and every skipped frame with its reason

Frames are numbered without gaps, though whether one is kept shows only when its picture is read. So worker processes
only compute; this process takes their results in order, numbers and writes them, chunk by chunk, into
``<split>.partial`` and notes each finished chunk in a journal. A killed run resumes after the last noted chunk, and the
folder gets its name when all of it is there. A job array prepares a split in parts: see dataset/shards.py.
"""

import argparse
import hashlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.hand_model_record import check_hand_model_record, write_hand_model_record
from dataset.prepare import raw
from dataset.prepare.raw import SPLITS, Camera, Frame, ManoFit, RawSplit, RecordError
from dataset.prepare.resumable import (
    BAD_CAMERA,
    BAD_FIT,
    BEHIND,
    DARK,
    DARKEST,
    JOURNAL,
    MISSING,
    NO_ANNOTATION,
    NO_FIT,
    NOT_INTERACTING,
    NOT_VALID,
    OTHER_SIZE,
    UNREADABLE,
    Journal,
    Skip,
    Skipped,
    already_complete,
    finish,
    pickle_annotation,
    refuse_heavy_damage,
    refuse_nothing_kept,
    refuse_other_settings,
    summarize,
)
from dataset.prepare.shards import Shard, check_shards, clean_up, merge, parse_shard, refuse_other_counts, refuse_shards
from dataset.prepared import FOLDERS, MASK_FILE_CHANNELS, partial_folder, paths
from dataset.vertex_colours import canonical_colours, load_colours
from manopth import HandPair, TwoHandLayer
from manopth.rotations import axis_angle_to_matrix
from models.hands import load_hands
from utils.config import add_config_arguments, load_config, split_off_pairs
from utils.distributed import usable_cores
from utils.errors import UserError, user_facing
from utils.files import read_image
from utils.geometry import CROP_SIZE, crop_matrix, project
from utils.hand import LEFT, NUM_FACES, RIGHT, SIDES
from utils.rasterizer import RENDERERS, interpolate

FORMAT = 1  # of what this file writes; raised when the same input gives other files
# Labels are told by their colour. At full colour resolution the masks survive JPEG without a wrong pixel; at OpenCV's
# default, a quarter of it, about 270 pixels of each change their class.
LABEL_JPEG = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)
CHUNK = 32  # frames per task; the unit of the journal
SOURCES = ('data', 'camera', 'MANO_NeuralAnnot')  # the annotation files that are read
MOST_WORKERS = 16  # by default: a process takes half a gigabyte, and beyond it the one that writes is the bottleneck


class Job(NamedTuple):
    """All a worker needs to know of one frame."""

    path: str
    size: tuple[int, int]  # width, height as annotated
    entries: tuple[dict, dict]
    camera: Camera
    fits: dict[str, ManoFit]


class Sample(NamedTuple):
    """A prepared frame: the content of its JPEG files, and its annotation but for the number."""

    files: dict[str, bytes]
    annotation: dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# One frame
# ---------------------------------------------------------------------------------------------------------------------


def read_picture(path: str, size: tuple[int, int]) -> np.ndarray | Skip:
    """The BGR picture, or why there is none; ``size`` (width, height) is what it has to be."""
    try:
        image = read_image(path)
    except FileNotFoundError:
        return Skip(MISSING, path)
    except OSError as error:
        return Skip(UNREADABLE, f'{path}: {error.strerror}')
    if image is None:
        return Skip(UNREADABLE, f'{path}: cut short or not a picture')
    if image.shape[1::-1] != size:
        return Skip(OTHER_SIZE, f'{path}: {image.shape[1]}x{image.shape[0]}, annotated as {size[0]}x{size[1]}')
    return image


class FramePreparer:
    """Jobs -> samples, a chunk at a time: the hand layer takes them together, the rest goes frame by frame."""

    def __init__(self, models: HandPair, colours: np.ndarray, renderer: str = 'torch'):
        self.layer = TwoHandLayer(models)
        self.faces = torch.from_numpy(models.mesh_faces)
        self.colours = torch.from_numpy(np.concatenate([colours, colours]))
        self.rasterize = RENDERERS[renderer]
        # From axis-angle relative to the mean pose to coefficients: p = c @ components, so c = p @ inverse.
        self.to_coefficients = {model.side: np.linalg.inv(model.pose_components) for model in models}

    @torch.inference_mode()
    def __call__(self, jobs: list[Job]) -> list[Sample | Skip]:
        pictures = [self._bright_picture(job) for job in jobs]
        kept = [(job, picture) for job, picture in zip(jobs, pictures) if not isinstance(picture, Skip)]
        parameters = [{side: self._parameters(side, job.fits[side]) for side in SIDES} for job, _ in kept]
        samples = iter(
            [
                self._prepare(job, picture, one, vertices)
                for (job, picture), one, vertices in zip(kept, parameters, self._world_vertices(parameters))
            ]
        )
        return [picture if isinstance(picture, Skip) else next(samples) for picture in pictures]

    def _bright_picture(self, job: Job) -> np.ndarray | Skip:
        picture = read_picture(job.path, job.size)
        if isinstance(picture, np.ndarray) and cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY).mean() < DARKEST:
            return Skip(DARK)
        return picture

    def _parameters(self, side: str, fit: ManoFit) -> dict[str, np.ndarray]:
        root = axis_angle_to_matrix(torch.from_numpy(fit.pose[:3])).numpy()
        numbers = {'R': root, 'pose': fit.pose[3:] @ self.to_coefficients[side], 'shape': fit.shape, 'trans': fit.trans}
        return {name: value[None].astype(np.float32) for name, value in numbers.items()}

    def _world_vertices(self, parameters: list[dict]) -> Tensor:
        """(n, 2, 778, 3) m, from the numbers as they are stored."""
        if not parameters:
            return torch.empty(0)
        root, pose, shape, trans = (
            torch.from_numpy(np.stack([np.concatenate([one[side][name] for side in SIDES]) for one in parameters]))
            for name in ('R', 'pose', 'shape', 'trans')
        )
        return self.layer(root, pose, shape).vertices + trans[:, :, None]

    def _prepare(self, job: Job, picture: np.ndarray, parameters: dict, world: Tensor) -> Sample | Skip:
        rotation, translation = (torch.from_numpy(a.astype(np.float32)) for a in job.camera[:2])
        vertices = (world @ rotation.T + translation).flatten(0, 1)  # (1556, 3) m, camera axes
        if not (vertices[:, 2] > 0).all():
            return Skip(BEHIND, job.path)
        pixels = project(vertices.double(), torch.from_numpy(job.camera.intrinsics)).numpy()
        to_crop = crop_matrix(pixels)
        intrinsics = to_crop @ job.camera.intrinsics
        crop = cv2.warpAffine(picture, to_crop[:2], (CROP_SIZE, CROP_SIZE))

        fragments = self.rasterize(
            vertices[None], self.faces, torch.from_numpy(intrinsics)[None].float(), (CROP_SIZE, CROP_SIZE)
        )
        face = fragments.face[0].numpy()
        mask = np.zeros((CROP_SIZE, CROP_SIZE, 3), np.uint8)
        mask[..., MASK_FILE_CHANNELS[LEFT]] = 255 * ((face >= 0) & (face < NUM_FACES))
        mask[..., MASK_FILE_CHANNELS[RIGHT]] = 255 * (face >= NUM_FACES)
        dense = interpolate(fragments, self.faces, self.colours)[0].mul_(255).round_().byte().numpy()
        image_entry, annotation_entry = job.entries
        return Sample(
            {'img': _jpeg(crop), 'mask': _jpeg(mask, LABEL_JPEG), 'dense': _jpeg(dense, LABEL_JPEG)},
            {
                'image': image_entry,
                'annotation': annotation_entry,
                'mano_params': parameters,
                'camera': {'R': rotation.numpy(), 't': translation.numpy(), 'camera': intrinsics},
            },
        )


def _jpeg(image: np.ndarray, options: tuple[int, ...] = ()) -> bytes:
    return cv2.imencode('.jpg', image, options)[1].tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# One split
# ---------------------------------------------------------------------------------------------------------------------


def select(split: RawSplit, skipped: Skipped) -> list[Frame]:
    """The frames whose annotations qualify; pictures are not looked at yet."""
    fits: dict[tuple[str, int], Skip | None] = {}  # by time step, which its cameras share
    cameras: dict[tuple[str, str], Skip | None] = {}
    selected = []
    for frame in split.iterate_frames():
        if not frame.hand_type:
            skip = Skip(NO_ANNOTATION)
        elif frame.hand_type != 'interacting':
            skip = Skip(NOT_INTERACTING)
        elif not frame.hand_type_valid:
            skip = Skip(NOT_VALID)
        else:
            step, camera = (frame.capture, frame.frame_idx), (frame.capture, frame.camera)
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


def _fit_problem(split: RawSplit, capture: str, frame_idx: int) -> Skip | None:
    try:
        fits = split.mano(capture, frame_idx)
    except RecordError as error:
        return Skip(BAD_FIT, str(error))
    if None in fits.values():
        return Skip(NO_FIT)
    if not all(np.isfinite(numbers).all() for fit in fits.values() for numbers in fit):
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
    run: Callable[[Iterable[list[Job]]], Iterator],
    shard: Shard | None = None,
) -> None:
    """Prepare one split or a shard of it, or the rest of it. ``run`` maps chunks of jobs to their results, in order.

    Raises UserError if the folder holds something else, too many frames are damaged, or none can be kept.
    """
    whole, what = save_path / split.split, f'{split.split}, shard {shard}' if shard else split.split
    target = shard.folder(whole) if shard else whole
    partial = partial_folder(target)
    if already_complete(target, settings):
        clean_up(target)
        return
    if shard:
        if already_complete(whole, settings):
            return
        refuse_other_counts(whole, shard)
    else:
        refuse_shards(whole)
    journal = Journal(partial / JOURNAL)
    if journal.is_of_merge:
        raise UserError(f'{partial} is a merge of shards that was cut off; finish it with --merge, or remove it.')
    if len(journal.lines) < 2:
        journal.start(settings)
    refuse_other_settings(partial, journal.lines[0], settings)

    frames, total, skipped, more = _select_part(split, shard, partial)
    chunks = [frames[begin : begin + CHUNK] for begin in range(0, len(frames), CHUNK)]
    done, index = journal.replay(chunks, skipped)
    todo = chunks[done:]
    missing = {
        frame.file_name: str(split.image_path(frame))
        for frame in split.missing_pictures(frame for chunk in todo for frame in chunk)
    }
    refuse_heavy_damage(split, what, skipped.damage | missing, total, partial)

    for folder in FOLDERS:
        (partial / folder).mkdir(parents=True, exist_ok=True)
    results = run([_job(split, frame) for frame in chunk] for chunk in todo)
    with tqdm(total=len(frames), initial=len(frames) - sum(map(len, todo)), desc=what, unit='frame') as progress:
        for chunk, outcomes in zip(todo, results):
            noted = []
            for number, (frame, outcome) in enumerate(zip(chunk, outcomes, strict=True)):
                if isinstance(outcome, Sample):
                    _write(partial, index, outcome)
                    index += 1
                    continue
                if outcome.reason == MISSING and frame.file_name not in missing:
                    raise UserError(
                        f'{outcome.detail} was there when the run began and is gone: is the disk still '
                        'there? The same command goes on from here.'
                    )
                skipped.add(frame, outcome)
                noted.append([number, outcome])
            refuse_heavy_damage(split, what, skipped.damage, total, partial)
            journal.append({'next': index, 'skipped': noted})
            progress.update(len(chunk))
    summary = summarize(what, index, total, skipped)
    if not shard:  # others may have what this one lacks
        refuse_nothing_kept(split, index, summary)
    finish(partial, target, settings, index, total, skipped, **more)
    print(summary, end='')
    (target / JOURNAL).unlink()


def _select_part(split: RawSplit, shard: Shard | None, partial: Path) -> tuple[list[Frame], int, Skipped, dict]:
    """The frames to prepare, of how many, what is left out already, and what the record says besides."""
    skipped = Skipped()
    frames = select(split, skipped)
    total = len(frames) + len(skipped)
    if not shard:
        return frames, total, skipped, {}
    # What the selection leaves out belongs to the split, not to a shard: the merge enters it, once.
    refuse_heavy_damage(split, split.split, skipped.damage, total, partial)
    begin, end = shard.bounds(len(frames), CHUNK)
    more = {'shard': {'number': shard.number, 'of': shard.of, 'begin': begin, 'end': end, 'selected': len(frames)}}
    return frames[begin:end], end - begin, Skipped(), more


def settings_of(split: RawSplit, settings: dict) -> dict:
    """All that decides what a split's files are: the command's settings, and the annotation files by their sizes."""
    sizes = {kind: path.stat().st_size if (path := split.file(kind)).exists() else None for kind in SOURCES}
    return settings | {'chunk': CHUNK, 'source': sizes}


def merge_splits(splits: list[tuple[RawSplit, dict]], save_path: Path) -> None:
    """Put the shards of each split, which comes with its settings, together. All are checked before the first merge."""
    found = []
    for split, settings in splits:
        target = save_path / split.split
        if already_complete(target, settings):
            clean_up(target)
        else:
            found.append((split, settings, check_shards(target, settings)))
    for split, settings, shards in found:
        skipped = Skipped()
        selected = len(select(split, skipped))
        merge(split, save_path / split.split, settings, shards, selected, skipped)


def _job(split: RawSplit, frame: Frame) -> Job:
    return Job(
        str(split.image_path(frame)),
        (frame.width, frame.height),
        raw.full_entries(frame),
        split.camera(frame.capture, frame.camera),
        split.mano(frame.capture, frame.frame_idx),
    )


def _write(folder: Path, index: int, sample: Sample) -> None:
    contents = sample.files | {'anno': pickle_annotation({'inter_idx': index} | sample.annotation)}
    for name, path in paths(folder, index).items():
        # Half a file may be left here by a kill, but only beyond the journal's last chunk: it is written again.
        path.write_bytes(contents[name])


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------

_preparer: FramePreparer | None = None  # of this worker process


def _start_worker(mano: tuple[str, str], colours: np.ndarray, renderer: str) -> None:
    global _preparer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _use_one_thread()
    _preparer = FramePreparer(load_hands(*mano), colours, renderer)


def _end_with_parent() -> None:
    """A parent that was killed outright cannot stop its workers, and they would wait for it for ever."""
    parent_process().join()
    os._exit(1)


def _work(jobs: list[Job]) -> list[Sample | Skip]:
    return _preparer(jobs)


def _use_one_thread() -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)  # not 1: that joins the parent's threads, which a fork does not copy, and never returns


def ordered_map(executor: Executor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """``executor.map`` that asks for no more than ``ahead`` items before their time: memory stays bounded."""
    waiting = deque()
    for item in items:
        waiting.append(executor.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Prepare InterHand2.6M: crops, masks, dense maps, annotations.')
    parser.add_argument('--data_path', required=True, help="folder with InterHand2.6M's images/ and annotations/")
    parser.add_argument('--save_path', required=True, help='where the prepared data set goes')
    parser.add_argument('--splits', nargs='+', metavar='SPLIT', help='train, val, test (default: those that are there)')
    parser.add_argument(
        '--shard', metavar='I/N', help='prepare only part I (1 to N) of N of each split: a task of a job array'
    )
    parser.add_argument(
        '--merge', action='store_true', help='put the finished shards together; other options as they were'
    )
    parser.add_argument('--workers', type=int, help=f'processes (default: one per core, at most {MOST_WORKERS})')
    parser.add_argument('--renderer', choices=sorted(RENDERERS), default='torch')
    parser.add_argument('--colours', metavar='FILE', help='v_color.pkl (default: colours by position on the hand)')
    add_config_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    arguments.splits, keys = split_off_pairs(arguments.splits or [])
    arguments.opts = keys + arguments.opts
    if unknown := [word for word in arguments.splits if word not in SPLITS]:
        raise UserError(f"--splits: there is no split '{unknown[0]}'; it must be one of {', '.join(SPLITS)}.")
    if arguments.shard is not None:
        if arguments.merge:
            raise UserError('--shard prepares a part and --merge puts all parts together; give one of them.')
        arguments.shard = parse_shard(arguments.shard)
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f'--workers is {arguments.workers}; it must be at least 1.')
    return arguments


@user_facing
def main(argv: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    arguments = parse_arguments(argv)
    cfg = load_config(arguments.cfg, arguments.opts)
    mano = (cfg.MANO.SOURCE, cfg.MANO.PATH)
    models = load_hands(*mano)
    colours = load_colours(arguments.colours) if arguments.colours else canonical_colours(models)
    splits = [RawSplit(arguments.data_path, name) for name in arguments.splits or raw.find_splits(arguments.data_path)]
    save_path = Path(arguments.save_path)
    check_hand_model_record(arguments.data_path, models)
    check_hand_model_record(save_path, models)
    common = {
        'format': FORMAT,
        'hand_model': models.identity,
        'renderer': arguments.renderer,
        'vertex_colours': hashlib.sha256(colours.tobytes()).hexdigest()[:12],
    }
    todo = [(split, settings_of(split, common)) for split in splits]
    if arguments.merge:
        merge_splits(todo, save_path)
        return
    _use_one_thread()
    preparer = FramePreparer(models, colours, arguments.renderer)
    preparer.rasterize(torch.ones(1, 3, 3), torch.tensor([[0, 1, 2]]), torch.eye(3)[None], (4, 4))  # is it installed?
    save_path.mkdir(parents=True, exist_ok=True)
    write_hand_model_record(save_path, models)

    workers = arguments.workers or min(usable_cores(), MOST_WORKERS)
    if workers == 1:
        for split, settings in todo:
            prepare_split(split, save_path, settings, lambda chunks: map(preparer, chunks), arguments.shard)
        return
    executor = ProcessPoolExecutor(workers, get_context('spawn'), _start_worker, (mano, colours, arguments.renderer))
    try:
        for split, settings in todo:
            prepare_split(
                split,
                save_path,
                settings,
                lambda chunks: ordered_map(executor, _work, chunks, 2 * workers),
                arguments.shard,
            )
    except BrokenProcessPool:
        raise UserError(
            f'A worker process was killed, perhaps for want of memory; use fewer than --workers {workers}. '
            'What was finished is kept, the same command goes on from there.'
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)
