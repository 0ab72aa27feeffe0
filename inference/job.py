"""Reconstruct the hands in many images and videos, write the results, and skip on a rerun what is already done."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from inference.boxes import Boxes, smoothed
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
    write_image_files,
)
from inference.live_view import LiveView
from inference.media import Inputs, Video, read_photo, video_writer
from inference.reconstruct import SMALL_HANDS, Box, Crop, Reconstruction, Reconstructor, assumed_intrinsics, cut_crop
from utils.errors import UserError
from utils.files import atomic_file, read_json, remove_stale_partials, write_json
from utils.stopping import StopRequest


class Settings(NamedTuple):
    """What was asked for; results depend on everything but ``out`` and ``batch``."""

    model: str  # checkpoint
    keys: list[str]  # KEY VALUE ... over its configuration
    box: list[float] | None = None  # x, y, width, height
    boxes: str | None = None  # file of boxes
    detect: bool = False
    focal: float | None = None  # pixels
    principal: list[float] | None = None  # pixels: principal point
    frames: int | None = None  # of each video, only the first
    out: Path = Path('output/pictures')
    batch: int = 8  # crops

    def record(self, source: Path | int) -> dict[str, Any]:
        """What the results of an input depend on: if a file records the same, they need not be computed again."""
        model = Path(self.model)
        files = [model / 'best.pth' if model.is_dir() else model]
        files += [Path(self.boxes)] if self.boxes else []
        files += [source] if isinstance(source, Path) else []
        return {
            'input': f'camera {source}' if isinstance(source, int) else str(source),
            'model': self.model,
            'keys': self.keys,
            'box': self.box,
            'boxes': self.boxes,
            'detect': self.detect,
            'focal': self.focal,
            'principal': self.principal,
            'frames': self.frames,
            'modified': [file.stat().st_mtime_ns for file in files],
        }

    def intrinsics(self, image: np.ndarray, focal: float | None = None) -> np.ndarray:
        """(3, 3) of an image; ``focal`` is its EXIF value, which the settings override."""
        height, width = image.shape[:2]
        matrix = assumed_intrinsics(width, height, self.focal or focal)
        if self.principal:
            matrix[:2, 2] = self.principal
        return matrix

    def focal_from(self, focal: float | None = None) -> str:
        return 'given' if self.focal else 'exif' if focal else 'assumed'


class Outcome:
    """What happened to each input: printed at the end and written to demo.json."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.earlier: list[str] = []
        self.failed: list[dict[str, str]] = []
        self.warnings: list[dict[str, str]] = []

    def fail(self, source: Path | str, reason: str) -> None:
        self.failed.append({'input': str(source), 'reason': reason})
        tqdm.write(f'{source}: {reason}')

    def warn(self, source: Path | str, text: str) -> None:
        self.warnings.append({'input': str(source), 'warning': text})
        tqdm.write(f'{source}: {text}')

    def finish(self, out: Path) -> int:
        """Print and write the outcome -> exit code, 1 if anything failed."""
        write_json(out / 'demo.json', vars(self))
        earlier = f', {len(self.earlier)} done earlier' if self.earlier else ''
        failed = f', {len(self.failed)} failed' if self.failed else ''
        print(f'{len(self.done)} done{earlier}{failed}: {out}, listed in {out / "demo.json"}')
        for each in self.failed:
            print(f'    failed: {each["input"]}: {each["reason"]}')
        return 1 if self.failed else 0


class Item(NamedTuple):
    """One pair of hands, cropped and ready for the network."""

    source: Path
    folder: Path  # of its results
    shown: Shown
    crop: Crop
    about: dict[str, Any]  # what hands.json records of its origin


class Job(NamedTuple):
    """A reconstructor at work on a list of inputs."""

    reconstruct: Reconstructor
    boxes: Boxes
    settings: Settings
    outcome: Outcome
    stop: StopRequest
    view: LiveView | None = None  # shows overlays of videos and cameras while they are processed

    def run(self, inputs: Inputs, camera: int | None = None) -> None:
        """Process all images, then all videos, then the camera."""
        out = self.settings.out
        folders = output_folders(out, [*inputs.images, *inputs.videos])
        for folder in folders.values():
            remove_stale_partials(folder, recursive=True)
        self.run_images(inputs.images, folders)
        for video in inputs.videos:
            if not self.stop.requested:
                self.run_video(video, folders[video])
        if camera is not None and not self.stop.requested:
            self.run_video(camera, out / f'camera{camera}')

    # Images

    def run_images(self, paths: list[Path], folders: dict[Path, Path]) -> None:
        items = self.image_items(tqdm(paths, unit='image', disable=not paths), folders)
        for item, hands in self.reconstructed(items):
            models = self.reconstruct.hand_models
            write_image_files(item.folder, item.shown, item.crop.image, hands, models, **item.about)
            self.outcome.done.append(str(item.folder))
            self.warn_of_small_hands(item, hands)

    def reconstructed(self, items: Iterator[Item]) -> Iterator[tuple[Item, Reconstruction]]:
        """Items with their hands (no leading axis, on the CPU), a batch at a time, until a stop is requested."""
        while not self.stop.requested and (batch := list(islice(items, self.settings.batch))):
            hands = self.reconstruct.from_crops([item.crop for item in batch]).cpu()
            yield from ((item, hands.one(number)) for number, item in enumerate(batch))

    def warn_of_small_hands(self, item: Item, hands: Reconstruction) -> None:
        size = float(hands.size_in_crop)
        if size >= SMALL_HANDS:
            return
        advice = 'is the box around both hands, and does the network know such images?'
        if item.about['box'] is None:
            advice = 'pass --box x y width height, --boxes or --detect.'
        self.outcome.warn(
            item.source, f'The hands seem to span {size:.2f} of the crop, but the network was trained on 0.8: {advice}'
        )

    def image_items(self, paths: Iterable[Path], folders: dict[Path, Path]) -> Iterator[Item]:
        """The readable images that are not done yet; unreadable ones are recorded as failed."""
        for path in paths:
            if self.stop.requested:
                return
            try:
                yield from self.open_image(path, folders[path])
            except UserError as error:
                self.outcome.fail(path, str(error))
            except OSError as error:
                self.outcome.fail(path, f'{error.strerror}.')

    def open_image(self, path: Path, folder: Path) -> list[Item]:
        asked = self.settings.record(path)
        if already_done(folder / 'hands.json', asked):
            self.outcome.earlier.append(str(folder))
            return []
        image, focal = read_photo(path)
        boxes, intrinsics, shown = self.boxes(path, image), self.settings.intrinsics(image, focal), reduced(image)
        if self.settings.detect and list(boxes) == [None]:
            raise UserError('The detector finds no hands in it; pass --box or --boxes.')
        about = {'size': list(image.shape[1::-1]), 'focal_from': self.settings.focal_from(focal)}
        items = [
            Item(
                path,
                folder if number == 0 else folder / str(number + 1),
                shown,
                cut_crop(image, box, intrinsics),
                {'asked': asked, 'box': box, **about},
            )
            for number, box in enumerate(boxes)
        ]
        return items[::-1]  # the first pair marks the image as done, so it is written last

    # Videos

    def run_video(self, source: Path | int, folder: Path) -> None:
        """Reconstruct a video or a camera's frames. A stop keeps the frames so far, as a shorter video."""
        asked = self.settings.record(source)
        if not isinstance(source, int) and already_done(folder / 'video.json', asked):
            self.outcome.earlier.append(str(folder))
            return
        name = Path(f'camera {source}') if isinstance(source, int) else source
        try:
            video = Video(source)
            try:
                written = self.write_video_files(video, name, folder)
            finally:
                video.close()
        except UserError as error:
            self.outcome.fail(name, str(error))
            return
        ends_early = video.announced and written < min(video.announced, self.settings.frames or video.announced)
        if ends_early and not self.stop.requested:
            self.outcome.warn(name, f'The video ends early, after {written} of the {video.announced} announced frames.')
        about = {
            'asked': asked,
            'frames': written,
            'frames_per_second': video.rate,
            'focal_from': self.settings.focal_from(),
            'complete': not self.stop.requested,
        }
        write_json(folder / 'video.json', header(self.reconstruct.hand_models, **about))
        self.outcome.done.append(str(folder))

    def write_video_files(self, video: Video, name: Path, folder: Path) -> int:
        """Write overlay.mp4, joints.csv and hands.jsonl, a batch of frames at a time -> number of frames."""
        limit, models = self.settings.frames, self.reconstruct.hand_models
        height, width = reduced(video.first).image.shape[:2]
        frames = self.video_items(islice(video, limit), name, folder)
        total = min(video.announced, limit or video.announced) if video.announced else limit
        written = 0
        with (
            video_writer(folder / 'overlay.mp4', rate=video.rate, width=width, height=height) as movie,
            atomic_file(folder / 'joints.csv') as table,
            atomic_file(folder / 'hands.jsonl') as lines,
            tqdm(total=total, desc=name.name, unit='frame') as bar,
        ):
            table.write(csv_line(['frame', 'time_s', *JOINT_COLUMNS]))
            for item, hands in self.reconstructed(frames):
                movie.write(overlay := draw_overlay(item.shown, hands, models))
                if self.view:
                    self.view.show(overlay)
                seconds = written / video.rate
                table.write(csv_line([written, f'{seconds:.4f}', *joint_row(hands)]))
                about = {'frame': written, 'time_s': round(seconds, 4), 'box': item.about['box']}
                lines.write(json_line(about | as_numbers(hands)))
                if written == 0:
                    self.warn_of_small_hands(item, hands)
                written += 1
                bar.update()
        return written

    def video_items(self, frames: Iterable[np.ndarray], name: Path, folder: Path) -> Iterator[Item]:
        """Frames with their crops. Detected boxes are smoothed; where none is found, the last one is kept."""
        box: Box | None = None
        for frame in frames:
            boxes = self.boxes(name, frame)
            if len(boxes) > 1:
                raise UserError('A video accepts one box for all its frames.')
            box = smoothed(box, boxes[0]) if self.settings.detect else boxes[0]
            crop = cut_crop(frame, box, self.settings.intrinsics(frame))
            yield Item(name, folder, reduced(frame), crop, {'box': box})


def output_folders(out: Path, sources: list[Path]) -> dict[Path, Path]:
    """A folder per input, named after the file; a number distinguishes files of one name."""
    folders: dict[Path, Path] = {}
    taken: set[str] = set()
    for source in sources:
        name, number = source.stem, 1
        while name in taken:
            number += 1
            name = f'{source.stem}-{number}'
        taken.add(name)
        folders[source] = out / name
    return folders


def already_done(record: Path, asked: dict[str, Any]) -> bool:
    """Whether ``record`` (hands.json or video.json) was written by the same command for the same input."""
    if not record.is_file():
        return False
    content = read_json(record)
    return isinstance(content, dict) and content.get('asked') == asked and content.get('complete', True)
