"""Reconstruct the hands in many images and videos, write the results, and skip on a rerun what is already done."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from inference.boxes import Boxes, smoothed
from inference.clip import FILLED, FrameHands, Recording, smoothed_offline, smoothed_online
from inference.detector import MODEL as DETECTOR_MODEL
from inference.detector import Detection, HandDetector
from inference.files import (
    IMAGE_RECORD,
    JOINT_COLUMNS,
    LINES,
    OVERLAY,
    TABLE,
    VIDEO_RECORD,
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
from inference.folders import OUTCOME, Folders, input_name, remove_results
from inference.live_view import LiveView
from inference.media import Camera, Frame, Inputs, Video, read_photo, video_writer
from inference.motion import motion_recorder, write_image_motion
from inference.reconstruct import SMALL_HANDS, Box, Crop, Reconstruction, Reconstructor, assumed_intrinsics, cut_crop
from inference.tracking import SceneCuts, Tracker, box_around_both, box_in_image, hands_box, jumped, look, look_again
from models.checkpoint import checkpoint_file
from utils.errors import UserError, printable
from utils.files import atomic_file, read_json, remove_stale_partials, write_json
from utils.hand import SIDES
from utils.stopping import StopRequest

LISTED_DAMAGE = 100  # places of a video that video.json lists


class Settings(NamedTuple):
    """What was asked for; results depend on everything but ``out`` and ``batch``."""

    model: str  # checkpoint
    keys: list[str]  # KEY VALUE ... over its configuration
    box: list[float] | None = None  # x, y, width, height
    boxes: str | None = None  # file of boxes
    detect: bool = False
    detector: str = DETECTOR_MODEL  # its file
    refine_box: bool = False  # look twice
    track: str = 'on'  # 'on' or 'off': whether a video's box follows the hands
    smooth: str = 'off'  # 'off', 'online' or 'offline'
    fill: bool = False  # short gaps of a video
    focal: float | None = None  # pixels
    principal: list[float] | None = None  # pixels: principal point
    frames: int | None = None  # of each video, only the first
    export: tuple[str, ...] = ()  # further files, of inference.motion.FORMATS
    out: Path = Path('output/pictures')
    batch: int = 8  # crops

    def record(self, source: Path | int) -> dict[str, Any]:
        """What the results of an input depend on: if a file records the same, they need not be computed again."""
        files = [checkpoint_file(self.model)]
        files += [Path(self.boxes)] if self.boxes else []
        files += [Path(self.detector)] if self.detect else []
        files += [source] if isinstance(source, Path) else []
        stats = [file.stat() for file in files]
        optional: dict[str, Any] = {'detector': printable(self.detector)} if self.detect else {}
        optional |= {'export': list(self.export)} if self.export else {}
        return {
            'input': input_name(source),
            'model': printable(self.model),
            'keys': self.keys,
            'box': self.box,
            'boxes': self.boxes and printable(self.boxes),
            'detect': self.detect,
            'refine_box': self.refine_box,
            'track': self.track,
            'smooth': self.smooth,
            'fill': self.fill,
            'focal': self.focal,
            'principal': self.principal,
            'frames': self.frames,
            'modified': [stat.st_mtime_ns for stat in stats],
            'bytes': [stat.st_size for stat in stats],
        } | optional  # absent: as in results of earlier versions

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
        self.folders: dict[str, str] = {}  # by input, of those done now or earlier

    def finished(self, source: Path | int, results: Path, *, pair: int = 1, earlier: bool = False) -> None:
        """results: folder of the input; pair: the pair of hands of an image that was written."""
        (self.earlier if earlier else self.done).append(printable(_pair_folder(results, pair)))
        self.folders[input_name(source)] = results.name

    def fail(self, source: Path, reason: str) -> None:
        self.failed.append({'input': printable(source), 'reason': reason})
        tqdm.write(f'{printable(source)}: {reason}')

    def warn(self, source: Path, text: str) -> None:
        self.warnings.append({'input': printable(source), 'warning': text})
        tqdm.write(f'{printable(source)}: {text}')

    def finish(self, out: Path) -> int:
        """Print and write the outcome -> exit code, 1 if anything failed."""
        path = out / OUTCOME
        write_json(path, vars(self) | {'folders': _former_folders(path) | self.folders})
        earlier = f', {len(self.earlier)} done earlier' if self.earlier else ''
        failed = f', {len(self.failed)} failed' if self.failed else ''
        print(f'{len(self.done)} done{earlier}{failed}: {printable(out)}, listed in {printable(path)}')
        for each in self.failed:
            print(f'    failed: {each["input"]}: {each["reason"]}')
        return 1 if self.failed else 0


def _former_folders(path: Path) -> dict[str, str]:
    """``Outcome.folders`` of former commands that wrote beside ``path``, as far as the folders still exist."""
    try:
        folders = read_json(path)['folders']
        return {source: name for source, name in folders.items() if (path.parent / name).is_dir()}
    except (UserError, LookupError, TypeError, AttributeError):
        return {}


class Item(NamedTuple):
    """One pair of hands, cropped and ready for the network."""

    source: Path
    results: Path  # folder of the image's or video's results
    pair: int  # from 1, of an image
    image: np.ndarray  # (H, W, 3) uint8 BGR, the whole one
    shown: Shown
    crop: Crop
    about: dict[str, Any]  # what hands.json records of its origin

    @property
    def folder(self) -> Path:
        """That of this pair."""
        return _pair_folder(self.results, self.pair)


def _pair_folder(results: Path, pair: int) -> Path:
    return results if pair == 1 else results / str(pair)


class _NothingWritten(Exception):
    """Leaves no file of a video that was stopped before its first frame."""


class Job(NamedTuple):
    """A reconstructor at work on a list of inputs. One process at a time may work on an output folder."""

    reconstruct: Reconstructor
    boxes: Boxes
    settings: Settings
    outcome: Outcome
    stop: StopRequest
    view: LiveView | None = None  # shows overlays of videos and cameras while they are processed
    detector: HandDetector | None = None  # instead of boxes

    def run(self, inputs: Inputs, camera: int | None = None) -> None:
        """Process all images, then all videos, then the camera, until a stop is requested."""
        choice = Folders(self.settings.out)
        folders = {source: choice.choose(source) for source in [*inputs.images, *inputs.videos]}
        self.run_images(inputs.images, folders)
        for video in inputs.videos:
            if not self.stop.requested:
                self.run_video(video, folders[video])
        if camera is not None and not self.stop.requested:
            self.run_video(camera, choice.choose(camera))

    # Images

    def run_images(self, paths: list[Path], folders: dict[Path, Path]) -> None:
        items = self.image_items(tqdm(paths, unit='image', disable=not paths), folders)
        begun: set[Path] = set()
        for item, hands in self.reconstructed(items):
            if item.results not in begun:
                begun.add(item.results)
                remove_stale_partials(item.results)
                remove_results(item.results)
            models = self.reconstruct.hand_models
            write_image_motion(item.folder, self.settings.export, hands, models)
            write_image_files(item.folder, item.shown, item.crop.image, hands, models, **item.about)
            self.outcome.finished(item.source, item.results, pair=item.pair)
            if hands.present.any():
                self.warn_of_small_hands(item.source, item.about['box'], hands)
            else:
                self.outcome.warn(item.source, f'The network finds no hands in it ({presence_text(hands)}).')

    def reconstructed(self, items: Iterator[Item]) -> Iterator[tuple[Item, Reconstruction]]:
        """Items with their hands (no leading axis, on the CPU), a batch at a time, until a stop is requested."""
        while not self.stop.requested and (batch := list(islice(items, self.settings.batch))):
            images, crops, boxes = zip(*((item.image, item.crop, item.about['box']) for item in batch))
            looks = look(self.reconstruct, images, crops, boxes)
            if self.settings.refine_box:
                looks = look_again(self.reconstruct, looks)
            for item, seen in zip(batch, looks):
                if self.stop.requested:
                    return
                yield item._replace(crop=seen.crop, about=item.about | {'box': seen.box}), seen.hands

    def warn_of_small_hands(self, source: Path, box: Box | None, hands: Reconstruction) -> None:
        size = float(hands.size_in_crop)
        if size >= SMALL_HANDS:
            return
        advice = 'is the box around both hands, and does the network know such images?'
        if box is None:
            advice = 'pass --box x y width height, --boxes or --detect.'
        self.outcome.warn(
            source, f'The hands seem to span {size:.2f} of the crop, but the network was trained on 0.8: {advice}'
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
        if already_done(folder / IMAGE_RECORD, asked):
            self.outcome.finished(path, folder, earlier=True)
            return []
        image, focal = read_photo(path)
        intrinsics, shown = self.settings.intrinsics(image, focal), reduced(image)
        about: dict[str, Any] = {'size': list(image.shape[1::-1]), 'focal_from': self.settings.focal_from(focal)}
        if self.detector is None:
            boxes = self.boxes(path, image)
        else:
            detection = self.detector(image)
            boxes = [self.detected_box(path, image, intrinsics, detection)]
            about['detected_hands'] = detection.hands
        items = [
            Item(
                path,
                folder,
                pair,
                image,
                shown,
                cut_crop(image, box, intrinsics),
                {'asked': asked, 'box': box, **about},
            )
            for pair, box in enumerate(boxes, 1)
        ]
        return items[::-1]  # the first pair marks the image as done, so it is written last

    # Detected hands

    def detected_box(self, path: Path, image: np.ndarray, intrinsics: np.ndarray, detection: Detection) -> Box:
        """Where to crop an image. Warns if the network placed the box, and raises UserError if it sees no hands."""
        box = box_in_image(self.reconstruct, image, intrinsics, detection)
        if box is None:
            raise UserError('Neither the detector nor the network finds hands in it; pass --box or --boxes.')
        if detection.hands < 2:
            found = 'one hand' if detection.hands else 'no hands'
            self.outcome.warn(path, f'The detector found {found}; the network placed the box. Check crop.jpg.')
        return box

    def report_detection(self, name: Path) -> dict[str, list[int]]:
        """Warn of frames of a video without two detected hands -> what video.json records of the detector."""
        if self.detector is None:
            return {}
        none, one, two = (self.detector.found[hands] for hands in range(3))
        if none or one:
            self.outcome.warn(
                name,
                f'The detector found no hands in {none}, one in {one} and two in {two} of the frames that it searched; '
                'where it found fewer than two, the network placed the box. Check the overlay.',
            )
        return {'detected_hands': [none, one, two]}

    # Videos

    def run_video(self, source: Path | int, folder: Path) -> None:
        """Reconstruct a video or a camera's frames. A stop keeps the frames so far, as a shorter video."""
        name = Path(f'camera {source}') if isinstance(source, int) else source
        try:
            asked = self.settings.record(source)
            if already_done(folder / VIDEO_RECORD, asked):
                self.outcome.finished(source, folder, earlier=True)
                return
            if self.detector is not None:
                self.detector.found.clear()
            if isinstance(source, int):
                camera = Camera(source)
                try:
                    about = self.write_video_files(camera, camera.first.shape, camera.rate, name, folder)
                finally:
                    camera.close()
            else:
                video = Video(source, limit=self.settings.frames, stop=lambda: self.stop.requested)
                about = self.write_video_files(video, video.first.shape, video.timing.rate, name, folder)
                about |= self.report_damage(video, name)
            about |= self.report_detection(name)
        except _NothingWritten:
            return
        except UserError as error:
            self.outcome.fail(name, str(error))
            return
        except FileNotFoundError as error:
            self.outcome.fail(name, f'{error.strerror}.')
            return
        about |= {
            'asked': asked,
            'focal_from': self.settings.focal_from(),
            'complete': isinstance(source, int) or not self.stop.requested,
        }
        write_json(folder / VIDEO_RECORD, header(self.reconstruct.hand_models, **about))
        self.outcome.finished(source, folder)

    def report_damage(self, video: Video, name: Path) -> dict[str, Any]:
        """Warn of a file's damage -> what video.json records of it."""
        damage = video.timing.damage
        if video.timing.truncated:
            count = video.timing.frames
            after = '' if count == self.settings.frames else f', after {count} frames'  # no more were read
            self.outcome.warn(name, f'The file is truncated: the video ends early{after}.')
        if damage:
            first, broken = damage[0], sum(place.broken for place in damage)
            self.outcome.warn(
                name,
                f'The video is damaged in {len(damage)} place(s), first after {first.time_s:.2f} s (near frame '
                f'{first.frame}): {first.message or "undecodable frames"}. {broken} frame(s) could not be decoded.',
            )
        listed = [place._asdict() for place in damage[:LISTED_DAMAGE]]
        return {'truncated': video.timing.truncated, 'damaged_places': len(damage), 'damage': listed}

    def write_video_files(
        self, frames: Iterable[Frame], shape: tuple[int, ...], rate: float, name: Path, folder: Path
    ) -> dict[str, Any]:
        """Write overlay.mp4, joints.csv and hands.jsonl, a batch of frames at a time -> what video.json records of it.

        shape: (height, width, ...) of a frame; rate: of the overlay, frames/s.
        """
        limit, models = self.settings.frames, self.reconstruct.hand_models
        height, width = reduced(np.empty(shape, np.uint8)).image.shape[:2]
        written, lost, filled, first_lost, last = 0, 0, 0, 0.0, 0.0
        remove_stale_partials(folder)
        with (
            video_writer(folder / OVERLAY, rate=rate, width=width, height=height) as movie,
            atomic_file(folder / TABLE) as table,
            atomic_file(folder / LINES) as lines,
            tqdm(
                total=frames.timing.frames if isinstance(frames, Video) else limit, desc=name.name, unit='frame'
            ) as bar,
            motion_recorder(folder, self.settings.export, models, rate=rate) as motion,
        ):
            table.write(csv_line(['frame', 'time_s', *JOINT_COLUMNS]))
            for frame in self.video_hands(frames, name, folder):
                hands, last = frame.hands, frame.time_s
                shown = reduced(frame.image)
                movie.write(overlay := shown.image if hands is None else draw_overlay(shown, hands, models), last)
                if self.view:
                    self.view.show(overlay)
                numbers = [''] * len(JOINT_COLUMNS) if hands is None else joint_row(hands)
                table.write(csv_line([written, f'{last:.4f}', *numbers]))
                lines.write(json_line(frame_record(frame, written)))
                if hands is None:
                    first_lost = first_lost if lost else last
                    lost += 1
                elif written == lost:
                    self.warn_of_small_hands(name, frame.box, hands)
                motion.add(hands, frame=written, time_s=last, filled=frame.filled)
                filled += frame.filled
                written += 1
                bar.update()
            if not written:
                raise _NothingWritten
            remove_results(folder)
        if lost:
            self.outcome.warn(
                name,
                f'No hands were found in {lost} of {written} frames, first at {first_lost:.2f} s; {TABLE} and {LINES} '
                f'have gaps there{self.advice_for_lost_frames()}',
            )
        measured = (written - 1) / last if last else rate
        return {
            'frames': written,
            'frames_without_hands': lost,
            'frames_filled': filled,
            'frames_per_second': round(measured, 4),
            'overlay_frames_per_second': rate,
            **motion.summary,
        }

    def advice_for_lost_frames(self) -> str:
        """The end of a sentence."""
        if self.settings.track == 'off':  # only the network itself leaves frames out
            return ', because the network finds no hands in their crops.'
        if self.settings.box or self.settings.boxes:
            return '. Pass --track off to keep to the box in every frame.'
        other = '--box' if self.detector else '--box or --detect'
        return f'. Pass {other} to find them, or --track off to keep to one crop in every frame.'

    def video_hands(self, frames: Iterable[Frame], name: Path, folder: Path) -> Iterator[FrameHands]:
        """Frames with their hands, tracked, smoothed and filled as the settings ask."""
        hands = self.predicted_hands(islice(frames, self.settings.frames), name, folder)
        if self.settings.smooth == 'offline' or self.settings.fill:
            hands = smoothed_online(hands, self.reconstruct) if self.settings.smooth == 'online' else hands
            total = frames.timing.frames if isinstance(frames, Video) else None
            recording = Recording(tqdm(hands, desc=f'{name.name}: hands', total=total, unit='frame', leave=False))
            offline = self.settings.smooth == 'offline'
            hands = smoothed_offline(recording, iter(frames), self.reconstruct, smooth=offline, fill=self.settings.fill)
        elif self.settings.smooth == 'online':
            hands = smoothed_online(hands, self.reconstruct)
        for frame in hands:
            if self.stop.requested:
                return
            yield frame

    def predicted_hands(self, frames: Iterable[Frame], name: Path, folder: Path) -> Iterator[FrameHands]:
        """Frames with the hands that the network predicts, until a stop is requested."""
        if self.settings.track == 'off':
            is_cut, before = SceneCuts(), None
            for item, predicted in self.reconstructed(self.video_items(frames, name, folder)):
                hands = predicted if predicted.present.any() else None
                now = None if hands is None else hands_box(hands)
                cut = is_cut(item.image) or jumped(before, now)
                before = now
                yield FrameHands(item.image, item.about['time_s'], item.about['box'], hands, cut=cut)
            return
        tracker = Tracker(
            self.reconstruct, lambda image: self.first_boxes(name, image), refine=self.settings.refine_box
        )
        for frame in frames:
            if self.stop.requested:
                return
            sight = tracker(frame.image, self.settings.intrinsics(frame.image))
            found = sight.look
            box, hands = (found.box, found.hands) if found else (None, None)
            yield FrameHands(frame.image, frame.time_s, box, hands, cut=sight.cut)

    def first_boxes(self, name: Path, image: np.ndarray) -> list[Box | None]:
        """Where a video's hands are looked for: in the given or detected box, then in the whole image."""
        box = self.only_box(name, image)
        return [None] if box is None else [box, None]

    def only_box(self, name: Path, image: np.ndarray) -> Box | None:
        if self.detector is not None:
            return box_around_both(self.reconstruct, image, self.settings.intrinsics(image), self.detector(image))
        boxes = self.boxes(name, image)
        if len(boxes) > 1:
            raise UserError('A video accepts one box for all its frames.')
        return boxes[0]

    def video_items(self, frames: Iterable[Frame], name: Path, folder: Path) -> Iterator[Item]:
        """Frames with their crops. Detected boxes are smoothed; where no hands are detected, the last one is kept."""
        box: Box | None = None
        for frame in frames:
            if self.stop.requested:
                return
            given = self.only_box(name, frame.image)
            box = smoothed(box, given) if self.detector else given
            crop = cut_crop(frame.image, box, self.settings.intrinsics(frame.image))
            about = {'box': box, 'time_s': frame.time_s}
            yield Item(name, folder, 1, frame.image, reduced(frame.image), crop, about)


def frame_record(frame: FrameHands, number: int) -> dict[str, Any]:
    """A line of hands.jsonl. Filled frames lack what only a prediction has; lost ones have no numbers."""
    box = None if frame.box is None else [round(value, 3) for value in frame.box]
    about = {'frame': number, 'time_s': round(frame.time_s, 4), 'state': frame.state, 'box': box}
    if frame.hands is None:
        return about
    numbers = as_numbers(frame.hands)
    if frame.state == FILLED:
        numbers |= dict.fromkeys({'presence', 'to_crop', 'residual_px', 'size_in_crop'} & numbers.keys())
        for side in SIDES:
            if numbers[side]:
                numbers[side] |= dict.fromkeys({'camera', 'visible', 'deviation_m'} & numbers[side].keys())
    return about | numbers


def presence_text(hands: Reconstruction) -> str:
    """The presence of both hands of one reconstruction, for messages."""
    values = [] if hands.presence is None else hands.presence.tolist()
    return 'presence: ' + ', '.join(f'{side} {value:.2f}' for side, value in zip(SIDES, values))


def already_done(record: Path, asked: dict[str, Any]) -> bool:
    """Whether ``record`` (hands.json or video.json) was written by the same command for the same input."""
    if not record.is_file():
        return False
    content = read_json(record)
    return isinstance(content, dict) and content.get('asked') == asked and content.get('complete', True)
