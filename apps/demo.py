"""Both hands in your own pictures and videos: meshes, positions and overlays.

    python apps/demo.py --model CHECKPOINT INPUT [INPUT ...] [--box X Y W H | --boxes FILE.json | --detect]
        [--focal PX] [--principal CX CY] [--out DIR] [--batch N] [--frames N] [KEY VALUE ...]
    python apps/demo.py --model CHECKPOINT --camera 0 --serve 8000        # look at http://localhost:8000

INPUT: pictures, folders, patterns ('shots/*.png'), videos. The network wants both hands in the middle of its crop, so
say where they are: a box around both hands in pixels (x, y of the upper left corner, width, height), one for all inputs
(--box) or one each (--boxes, {"name.jpg": [x, y, w, h], ...}; several boxes give several pairs of hands), or let a
detector look for them (--detect). Without any of these the whole picture is taken.

For every picture a folder DIR/NAME: overlay.jpg, side.jpg, above.jpg, crop.jpg, left.obj, right.obj, hands.glb (camera
axes, metres) and hands.json (MANO parameters, camera, offset, joints); for a video overlay.mp4, joints.csv, hands.jsonl
and video.json. docs/formats.md describes them. Without --focal (in pixels of the whole picture) the focal length is
what the picture's EXIF says, or else assumed to be the longer side; distances are in proportion to it. Given again,
the command leaves out what it has done.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault('OPENCV_LOG_LEVEL', 'SILENT')  # what cannot be opened is said in one sentence

import numpy as np
from tqdm import tqdm

from inference.detector import MODEL as DETECTOR_MODEL
from inference.detector import HandDetector
from inference.files import (
    JOINT_COLUMNS,
    Shown,
    as_numbers,
    csv_line,
    draw_overlay,
    header,
    joint_row,
    json_line,
    reduced,
    write_picture_files,
)
from inference.live_view import LiveView
from inference.media import Inputs, Video, find_inputs, read_picture, video_writer
from inference.reconstruct import (
    SMALL_HANDS,
    Box,
    Crop,
    Reconstruction,
    Reconstructor,
    assumed_intrinsics,
    cut_crop,
    load_reconstructor,
)
from utils.config import default_config, flatten
from utils.distributed import keep_freed_memory
from utils.errors import UserError, user_facing
from utils.files import read_json, write_json, written_aside
from utils.training import StopRequest

Boxes = Callable[[Path, np.ndarray], list[Box | None]]  # input, picture -> where the pairs of hands are in it


class Item(NamedTuple):
    """One pair of hands that waits for the network."""

    source: Path
    folder: Path  # where its files go
    shown: Shown
    crop: Crop
    about: dict[str, Any]  # what hands.json says of where it came from


class Outcome:
    """What became of the inputs: printed at the end, and kept as DIR/demo.json."""

    def __init__(self):
        self.done, self.earlier, self.failed, self.warnings = [], [], [], []

    def fail(self, source: Path | str, reason: str) -> None:
        self.failed.append({'input': str(source), 'reason': reason})
        tqdm.write(f'{source}: {reason}')

    def warn(self, source: Path | str, text: str) -> None:
        self.warnings.append({'input': str(source), 'warning': text})
        tqdm.write(f'{source}: {text}')

    def finish(self, out: Path) -> int:
        """Print and write the outcome; returns the exit code: 1 if anything failed."""
        write_json(out / 'demo.json', vars(self))
        earlier = f', {len(self.earlier)} were there already' if self.earlier else ''
        failed = f', {len(self.failed)} failed' if self.failed else ''
        print(f'{len(self.done)} done{earlier}{failed}: {out}, listed in {out / "demo.json"}')
        for each in self.failed:
            print(f'    failed: {each["input"]}: {each["reason"]}')
        return 1 if self.failed else 0


class Demo(NamedTuple):
    """Everything that the loops need."""

    reconstruct: Reconstructor
    boxes: Boxes
    args: argparse.Namespace
    outcome: Outcome
    stop: StopRequest
    view: LiveView | None  # where frames are shown as they are made

    @property
    def out(self) -> Path:
        return Path(self.args.out)

    def asked(self, source: Path | int) -> dict[str, Any]:
        """What the files of an input depend on: where this is the same they need not be made again."""
        args, model, camera = self.args, Path(self.args.model), isinstance(source, int)
        files = [
            model / 'best.pth' if model.is_dir() else model,
            *([args.boxes] if args.boxes else []),
            *([] if camera else [source]),
        ]
        return {
            'input': f'camera {source}' if camera else str(source),
            'model': args.model,
            'keys': args.keys,
            'box': args.box,
            'boxes': args.boxes,
            'detect': args.detect,
            'focal': args.focal,
            'principal': args.principal,
            'frames': args.frames,
            'modified': [Path(file).stat().st_mtime_ns for file in files],
        }

    def intrinsics(self, image: np.ndarray, focal: float | None = None) -> np.ndarray:
        """``focal``: what the picture itself says, unless --focal is given."""
        matrix = assumed_intrinsics(*image.shape[1::-1], self.args.focal or focal)
        if self.args.principal:
            matrix[:2, 2] = self.args.principal
        return matrix

    def focal_from(self, focal: float | None = None) -> str:
        return 'given' if self.args.focal else 'exif' if focal else 'assumed'


@user_facing
def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    inputs = find_inputs(args.inputs)
    with ExitStack() as at_end:
        boxes = choose_boxes(args, at_end)
        reconstruct = load_reconstructor(args.model, device=args.device, overrides=args.keys)
        reconstruct.batch_size = args.batch
        if reconstruct.device.type == 'cpu':
            keep_freed_memory()
        demo = Demo(reconstruct, boxes, args, Outcome(), StopRequest(), open_view(args, at_end))
        run(demo, inputs)
    code = demo.outcome.finish(demo.out)
    if demo.stop.requested and args.camera is None:
        raise KeyboardInterrupt
    return code


def run(demo: Demo, inputs: Inputs) -> None:
    """All pictures, then all videos, then the camera."""
    if inputs.others:
        print(
            f'left out, neither picture nor video: {", ".join(path.name for path in inputs.others[:5])}'
            f'{f" and {len(inputs.others) - 5} more" if len(inputs.others) > 5 else ""}'
        )
    camera = demo.args.camera
    folders = output_folders(demo.out, [*inputs.pictures, *inputs.videos])
    run_pictures(demo, inputs.pictures, folders)
    for source in [*inputs.videos, *([] if camera is None else [camera])]:
        if not demo.stop.requested:
            run_video(demo, source, folders.get(source, demo.out / f'camera{camera}'))


def open_view(args: argparse.Namespace, at_end: ExitStack) -> LiveView | None:
    if args.serve is None:
        return None
    view = LiveView(args.serve)
    at_end.callback(view.close)
    print(f'look at {view.address}')
    return view


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('inputs', nargs='*', metavar='INPUT', help='picture, folder, pattern or video; KEY VALUE last')
    parser.add_argument('--model', required=True, metavar='CHECKPOINT', help='file, or a run folder (its best.pth)')
    parser.add_argument('--camera', type=int, metavar='N', help='a camera, until Ctrl-C or --frames')
    where = parser.add_mutually_exclusive_group()
    where.add_argument('--box', type=float, nargs=4, metavar=('X', 'Y', 'W', 'H'), help='both hands, in every input')
    where.add_argument('--boxes', metavar='FILE.json', help='both hands, by input')
    where.add_argument('--detect', action='store_true', help='look for the hands (requirements-demo.txt)')
    parser.add_argument('--detector', metavar='FILE', default=DETECTOR_MODEL, help='its model (default: %(default)s)')
    parser.add_argument('--focal', type=float, metavar='PX', help='focal length (default: EXIF, or the longer side)')
    parser.add_argument('--principal', type=float, nargs=2, metavar=('CX', 'CY'), help='default: the middle')
    parser.add_argument('--out', default='output/pictures', metavar='DIR', help='default: %(default)s')
    parser.add_argument('--batch', type=int, default=8, metavar='N', help='crops at a time (default: %(default)s)')
    parser.add_argument('--frames', type=int, metavar='N', help='of each video only the first N frames')
    parser.add_argument('--serve', type=int, metavar='PORT', help='show videos and cameras at http://localhost:PORT')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:N (default: %(default)s)')
    args = parser.parse_intermixed_args(argv)
    # Names of files may look like anything, so only known keys begin the KEY VALUE pairs.
    keys = flatten(default_config())
    first = next((number for number, word in enumerate(args.inputs) if word in keys), len(args.inputs))
    args.inputs, args.keys = args.inputs[:first], args.inputs[first:]
    if not args.inputs and args.camera is None:
        raise UserError('there is nothing to look at: name pictures, folders or videos, or give --camera 0.')
    for name in ('batch', 'frames', 'focal'):
        value = getattr(args, name)
        if value is not None and not 0 < value < float('inf'):
            raise UserError(f'--{name} is {value:g}; it must be above 0.')
    return args


def output_folders(out: Path, sources: list[Path]) -> dict[Path, Path]:
    """A folder each, named after the file; files of one name are told apart by a number."""
    folders, taken = {}, set()
    for source in sources:
        name, number = source.stem, 1
        while name in taken:
            number += 1
            name = f'{source.stem}-{number}'
        taken.add(name)
        folders[source] = out / name
    return folders


# ---------------------------------------------------------------------------------------------------------------------
# Where the hands are
# ---------------------------------------------------------------------------------------------------------------------


def choose_boxes(args: argparse.Namespace, at_end: ExitStack) -> Boxes:
    if args.boxes:
        return BoxesFile(Path(args.boxes))
    if args.detect:
        detector = HandDetector(args.detector)
        at_end.callback(detector.close)
        return lambda source, picture: [detector(picture)]
    return lambda source, picture: [args.box]


class BoxesFile:
    """{"name": [x, y, w, h] or a list of such boxes}: names as given, from the file's folder on, or without folders."""

    def __init__(self, path: Path):
        self.path, self.table = path, read_json(path)
        if not isinstance(self.table, dict):
            raise UserError(f'{path} must hold {{"picture.jpg": [x, y, width, height], ...}}.')

    def __call__(self, source: Path, picture: np.ndarray) -> list[Box]:
        names, resolved, folder = [str(source), source.name], source.resolve(), self.path.resolve().parent
        if resolved.is_relative_to(folder):
            names.insert(1, str(resolved.relative_to(folder)))
        found = next((self.table[name] for name in names if name in self.table), None)
        if not isinstance(found, list) or not found:
            raise UserError(f'{self.path} has no box for it.')
        return found if isinstance(found[0], list) else [found]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def run_pictures(demo: Demo, paths: list[Path], folders: dict[Path, Path]) -> None:
    items = picture_items(demo, tqdm(paths, unit='picture', disable=not paths), folders)
    for item, hands in reconstructed(demo, items):
        write_picture_files(item.folder, item.shown, item.crop.image, hands, demo.reconstruct.hand_models, **item.about)
        demo.outcome.done.append(str(item.folder))
        warn_of_small_hands(demo.outcome, item.source, item.about['box'], hands)


def reconstructed(demo: Demo, items: Iterator[Item]) -> Iterator[tuple[Item, Reconstruction]]:
    """Items with their hands (no leading axis, on the CPU), a batch at a time, until a stop is asked for."""
    while not demo.stop.requested and (batch := list(islice(items, demo.args.batch))):
        hands = demo.reconstruct.from_crops([item.crop for item in batch]).cpu()
        yield from ((item, hands.one(number)) for number, item in enumerate(batch))


def warn_of_small_hands(outcome: Outcome, source: Path, box: Box | None, hands: Reconstruction) -> None:
    size = float(hands.size_in_crop)
    if size >= SMALL_HANDS:
        return
    advice = (
        'give --box x y width height, --boxes or --detect'
        if box is None
        else 'is the box around both hands, and does the network know such pictures'
    )
    outcome.warn(
        source,
        f'the hands seem to take {size:.2f} of the crop, where the network was trained on 0.8: '
        f'{advice}{"." if box is None else "?"}',
    )


def picture_items(demo: Demo, paths: Iterable[Path], folders: dict[Path, Path]) -> Iterator[Item]:
    """The pictures that can be read and are still to be done; what cannot be read is noted and left out."""
    for path in paths:
        if demo.stop.requested:
            return
        try:
            yield from open_picture(demo, path, folders[path])
        except UserError as error:
            demo.outcome.fail(path, str(error))
        except OSError as error:
            demo.outcome.fail(path, f'{error.strerror}.')


def open_picture(demo: Demo, path: Path, folder: Path) -> list[Item]:
    asked = demo.asked(path)
    if already_done(folder / 'hands.json', asked):
        demo.outcome.earlier.append(str(folder))
        return []
    image, focal = read_picture(path)
    boxes, intrinsics, shown = demo.boxes(path, image), demo.intrinsics(image, focal), reduced(image)
    if demo.args.detect and boxes == [None]:
        raise UserError('the detector finds no hands in it: say where they are with --box or --boxes.')
    items = []
    for number, box in reversed(list(enumerate(boxes))):
        about = {'asked': asked, 'box': box, 'size': list(image.shape[1::-1]), 'focal_from': demo.focal_from(focal)}
        # By the first pair of hands an earlier run is known, so it comes last.
        place = folder if number == 0 else folder / str(number + 1)
        items.append(Item(path, place, shown, cut_crop(image, box, intrinsics), about))
    return items


def already_done(record: Path, asked: dict[str, Any]) -> bool:
    """Whether ``record`` (hands.json or video.json) was written by the same command for the same input."""
    if not record.is_file():
        return False
    content = read_json(record)
    return isinstance(content, dict) and content.get('asked') == asked and content.get('complete', True)


# ---------------------------------------------------------------------------------------------------------------------
# Videos
# ---------------------------------------------------------------------------------------------------------------------


def run_video(demo: Demo, source: Path | int, folder: Path) -> None:
    """Reconstruct a video; what cannot be read is noted. A stop keeps what is done so far, as a shorter video."""
    asked = demo.asked(source)
    if not isinstance(source, int) and already_done(folder / 'video.json', asked):
        demo.outcome.earlier.append(str(folder))
        return
    name = Path(f'camera {source}') if isinstance(source, int) else source
    try:
        video = Video(source)
        try:
            written = write_video_files(demo, video, name, folder)
        finally:
            video.close()
    except UserError as error:
        demo.outcome.fail(name, str(error))
        return
    ends_early = video.announced and written < min(video.announced, demo.args.frames or video.announced)
    if ends_early and not demo.stop.requested:
        demo.outcome.warn(name, f'the video ends early: {written} frames of the {video.announced} that it announces.')
    write_json(
        folder / 'video.json',
        header(
            demo.reconstruct.hand_models,
            asked=asked,
            frames=written,
            frames_per_second=video.rate,
            focal_from=demo.focal_from(),
            complete=not demo.stop.requested,
        ),
    )
    demo.outcome.done.append(str(folder))


def write_video_files(demo: Demo, video: Video, name: Path, folder: Path) -> int:
    """overlay.mp4, joints.csv, hands.jsonl, a batch of frames at a time; returns the number of frames."""
    limit, models = demo.args.frames, demo.reconstruct.hand_models
    shown_size = reduced(video.first).image.shape
    frames = video_items(demo, islice(video, limit), name, folder)
    total = min(video.announced, limit or video.announced) if video.announced else limit
    written = 0
    with (
        video_writer(folder / 'overlay.mp4', rate=video.rate, width=shown_size[1], height=shown_size[0]) as movie,
        written_aside(folder / 'joints.csv') as table,
        written_aside(folder / 'hands.jsonl') as lines,
        tqdm(total=total, desc=name.name, unit='frame') as bar,
    ):
        table.write(csv_line(['frame', 'time_s', *JOINT_COLUMNS]))
        for item, hands in reconstructed(demo, frames):
            movie.write(overlay := draw_overlay(item.shown, hands, models))
            if demo.view:
                demo.view.show(overlay)
            seconds = written / video.rate
            table.write(csv_line([written, f'{seconds:.4f}', *joint_row(hands)]))
            lines.write(
                json_line({'frame': written, 'time_s': round(seconds, 4), 'box': item.about['box']} | as_numbers(hands))
            )
            if written == 0:
                warn_of_small_hands(demo.outcome, name, item.about['box'], hands)
            written += 1
            bar.update()
    return written


def video_items(demo: Demo, frames: Iterable[np.ndarray], name: Path, folder: Path) -> Iterator[Item]:
    """Frames with their crops. Where a detector sees no hands the last box stays; boxes move smoothly, not in jumps."""
    box = None
    for frame in frames:
        boxes = demo.boxes(name, frame)
        if len(boxes) > 1:
            raise UserError('a video takes one box for all its frames.')
        box = smoothed(box, boxes[0]) if demo.args.detect else boxes[0]
        yield Item(name, folder, reduced(frame), cut_crop(frame, box, demo.intrinsics(frame)), {'box': box})


def smoothed(before: Box | None, now: Box | None) -> Box | None:
    """Half way from the last box to the new one."""
    if before is None or now is None:
        return now or before
    return tuple((a + b) / 2 for a, b in zip(before, now))


if __name__ == '__main__':
    sys.exit(main())
