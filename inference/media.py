"""Find, read and write image and video files. Every image is uint8 BGR."""

import glob
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from utils.errors import UserError, printable
from utils.files import partial_path
from utils.images import ImageError, decode_image, focal_length
from utils.stderr import print_to_stderr, with_stderr

IMAGE_SUFFIXES = frozenset(
    [
        '.jpg',
        '.jpeg',
        '.jpe',
        '.png',
        '.bmp',
        '.dib',
        '.webp',
        '.tif',
        '.tiff',
        '.jp2',
        '.pbm',
        '.pgm',
        '.ppm',
        '.pnm',
        '.avif',
        '.heic',
        '.heif',
    ]
)
VIDEO_SUFFIXES = frozenset(
    ['.mp4', '.m4v', '.mov', '.avi', '.mkv', '.webm', '.mpg', '.mpeg', '.wmv', '.flv', '.gif', '.ts', '.mts']
)
DEFAULT_RATE = 30.0  # frames/s, for videos and cameras that report neither time stamps nor a rate
HIGHEST_RATE = 1000.0  # frames/s
LONGEST_HOLD = 60.0  # s for which a written video repeats one frame
FAILURES_AT_END = 100  # in a row, after which a video counts as ended: broken frames fail one by one
SYSTEM_FILES = re.compile(r'\..*|Thumbs\.db|desktop\.ini', re.IGNORECASE | re.DOTALL)
_FFMPEG_LINE = re.compile(r'^(?:\[[^\]\n]+ @ \w+\] *(.*)| +Last message repeated.*)\n?', re.MULTILINE)


class Inputs(NamedTuple):
    """The files matched by the command line's inputs."""

    images: list[Path]
    videos: list[Path]
    others: list[Path]  # files in folders that are neither
    system: list[Path]  # files in folders that operating systems write: hidden ones, '._IMG_1.jpg', 'Thumbs.db'


def find_inputs(patterns: list[str]) -> Inputs:
    """Expand files, folders (without subfolders) and glob patterns; each file appears once, folders are sorted by name.

    Raises UserError for a missing path, a folder without images or videos, and a pattern that matches nothing.
    """
    images: dict[str, Path] = {}  # by absolute path
    videos: dict[str, Path] = {}
    others: dict[str, Path] = {}
    system: dict[str, Path] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            # A link to a missing file is kept: reading it fails and is reported. A pipe would be waited for.
            files = sorted(child for child in path.iterdir() if child.is_file() or not child.exists())
            if not any(_suffix(file) in IMAGE_SUFFIXES | VIDEO_SUFFIXES and not _of_system(file) for file in files):
                raise UserError(f'The folder {printable(path)} contains no image or video (of {len(files)} files).')
        elif path.exists():
            files = [path]
        else:
            files = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
            if not files:
                what = 'No file matches the pattern' if glob.has_magic(pattern) else 'There is no file or folder'
                raise UserError(f'{what} {printable(pattern)}.')
        for file in files:
            # A file named explicitly is tried as an image whatever its suffix; in folders the suffix decides.
            is_image = _suffix(file) in IMAGE_SUFFIXES or not path.is_dir()
            table = videos if _suffix(file) in VIDEO_SUFFIXES else images if is_image else others
            if file != path and _of_system(file):
                table = system
            table.setdefault(os.path.abspath(file), file)
    return Inputs(*(list(table.values()) for table in (images, videos, others, system)))


def _suffix(file: Path) -> str:
    return file.suffix.lower()


def _of_system(file: Path) -> bool:
    return SYSTEM_FILES.fullmatch(file.name) is not None or file.parent.name == '__MACOSX'


class Photo(NamedTuple):
    """An image as a person took it."""

    image: np.ndarray  # (H, W, 3) uint8 BGR, upright
    focal: float | None  # pixels, from the 35 mm equivalent in the EXIF data, if any


def read_photo(path: Path) -> Photo:
    """Read an image with its focal length. Raises UserError if ``decode_image`` refuses it, OSError if unreadable."""
    content = path.read_bytes()
    try:
        image = decode_image(content)
    except ImageError as error:
        raise UserError(f'The file is {error}. {error.advice}') from None
    height, width = image.shape[:2]
    return Photo(image, focal_length(content, height=height, width=width))


# Videos


class Frame(NamedTuple):
    """One frame of a video or camera."""

    image: np.ndarray  # (H, W, 3) uint8 BGR
    time_s: float  # since the first frame


class Damage(NamedTuple):
    """A place of a video where frames cannot be decoded, or at which the decoder reports an error."""

    frame: int  # number of the next frame that was decoded
    time_s: float  # of the frame before
    broken: int  # frames that could not be decoded
    message: str  # of the decoder


class Timing(NamedTuple):
    """What a first pass over a video finds: the header's counts and rates are often made up."""

    frames: int
    rate: float  # frames/s where they follow each other fastest, for writing them at a constant rate
    damage: list[Damage]
    truncated: bool  # the file announces more bytes than it has


class Camera:
    """Iterates over the frames of a camera, given by number; their times are those at which they were read.

    Raises UserError if there is none.
    """

    def __init__(self, number: int):
        self.capture = cv2.VideoCapture(number)
        ok, self.first = self.capture.read()
        if not ok:
            self.capture.release()
            raise UserError('There is no camera with this number, or it is in use.')
        self.rate = _plausible(self.capture.get(cv2.CAP_PROP_FPS))

    def __iter__(self) -> Iterator[Frame]:
        ok, image, start = True, self.first, time.monotonic()
        while ok:
            yield Frame(image, time.monotonic() - start)
            ok, image = self.capture.read()

    def close(self) -> None:
        self.capture.release()


class Video:
    """Iterates over the frames of a video file, upright and each with its own time stamp.

    ``timing`` comes from a first pass over at most ``limit`` frames, which ends early when ``stop`` returns True.
    Raises UserError if the file cannot be opened or contains no frame.
    """

    def __init__(self, path: Path, *, limit: int | None = None, stop: Callable[[], bool] = lambda: False):
        self.path, self.limit = path, limit
        reader, positions, damage = _Reader(path), list[float](), list[Damage]()
        with tqdm(desc=f'{path.name}: time stamps', unit='frame', leave=False, delay=5) as bar:
            while (more := not positions or (len(positions) != limit and not stop())) and reader.next():
                if not positions:
                    self.first = reader.image()
                elif reader.broken or reader.message:
                    damage.append(Damage(len(positions), positions[-1] - positions[0], reader.broken, reader.message))
                positions.append(reader.position())
                bar.update()
        if not positions and more:
            raise UserError('The file is not a video that OpenCV can read, or contains no frame.')
        if more and reader.message:
            damage.append(Damage(len(positions), positions[-1] - positions[0], 0, reader.message))
        self.timing = Timing(len(positions), _rate(positions, reader.announced_rate), damage, is_truncated(path))
        reader.close()

    def __iter__(self) -> Iterator[Frame]:
        reader, clock, number = _Reader(self.path), Clock(1 / self.timing.rate), 0
        try:
            while number != self.limit and reader.next():
                yield Frame(reader.image(), clock.time(reader.position()))
                number += 1
        finally:
            reader.close()


def is_truncated(path: Path) -> bool:
    """Whether an AVI, MP4 or MOV file announces more bytes than it has. FFmpeg reports the others by itself."""
    size, position = path.stat().st_size, 0
    with open(path, 'rb') as file:
        head = file.read(12)
        if head[:4] == b'RIFF':
            announced = int.from_bytes(head[4:8], 'little')
            return announced != 0xFFFFFFFF and announced + 8 > size  # the former: of unknown length
        while head[4:8].isalnum() and position < size:  # boxes of MP4: length, type, content
            file.seek(position)
            head = file.read(16)
            length = int.from_bytes(head[:4], 'big')
            if length == 1:
                length = int.from_bytes(head[8:16], 'big')
            if length < 8:  # 0: to the end of the file
                return False
            position += length
    return position > size


class _Reader:
    """Decodes frames with FFmpeg, continues after broken ones, and collects what FFmpeg prints."""

    def __init__(self, path: Path):
        self.broken, self.message = 0, ''  # before the frame that ``next`` decoded
        with _utf8_path(path) as name:
            # Left to choose, OpenCV takes a name with %d for a pattern of numbered images.
            self.capture = self._silently(lambda: cv2.VideoCapture(name, cv2.CAP_FFMPEG))
        self.announced_rate = self.capture.get(cv2.CAP_PROP_FPS)

    def next(self) -> bool:
        """Decode the next frame; False at the end."""
        self.broken, self.message = 0, ''
        while self.broken < FAILURES_AT_END:
            if self._silently(self.capture.grab):
                return True
            self.broken += 1
        return False

    def image(self) -> np.ndarray:
        """The frame (H, W, 3), turned as the file demands."""
        return self._silently(self.capture.retrieve)[1]

    def position(self) -> float:
        """The frame's time stamp in seconds; 0 without one."""
        return self.capture.get(cv2.CAP_PROP_POS_MSEC) / 1000

    def close(self) -> None:
        self.capture.release()

    def _silently(self, action: Callable[[], Any]) -> Any:
        result, printed = with_stderr(action)
        if printed:
            found = _FFMPEG_LINE.search(printed)
            self.message = self.message or (found[1] or '' if found else '')
            print_to_stderr(_FFMPEG_LINE.sub('', printed))
        return result


class Clock:
    """Time stamps, made to start at 0 and to increase: some formats lack those of some frames, or begin anew."""

    def __init__(self, interval: float):
        self.interval, self.offset, self.last = interval, 0.0, -math.inf

    def time(self, position: float) -> float:
        if self.last == -math.inf:
            self.offset, self.last = position, 0.0
        elif position - self.offset > self.last:
            self.last = position - self.offset
        else:
            self.last += self.interval
            self.offset = position - self.last
        return self.last


def _rate(positions: list[float], announced: float) -> float:
    """``Timing.rate``; the announced one, if plausible, only where no time stamps exist."""
    intervals = np.diff(positions)
    intervals = intervals[intervals > 0]
    if not len(intervals):
        return round(_plausible(announced), 2)
    if np.ptp(intervals) > 0.25 * intervals.mean():
        shortest = np.percentile(intervals, 10, method='lower')  # not the least, which may be an accident
        usual = intervals[np.abs(intervals - shortest) <= 0.25 * shortest].mean()
    else:
        usual = intervals.mean()
    return round(float(np.clip(1 / usual, 1, HIGHEST_RATE)), 2)  # MPEG-4 stores a fraction of 16-bit numbers


def _plausible(rate: float) -> float:
    return rate if math.isfinite(rate) and 1 <= rate <= 240 else DEFAULT_RATE


@contextmanager
def _utf8_path(path: Path) -> Iterator[str]:
    """An absolute path for OpenCV, which accepts UTF-8 only; absolute, as FFmpeg takes 'a:b.mp4' for a protocol."""
    absolute = os.path.abspath(path)
    if absolute.encode('utf-8', 'replace').decode() == absolute:
        yield absolute
        return
    with tempfile.TemporaryDirectory() as folder:
        link = os.path.join(folder, f'link{path.suffix}' if path.suffix.isascii() else 'link')
        os.symlink(absolute, link)
        yield link


class VideoWriter:
    """Writes frames at a constant rate: each is repeated until the next one's time, up to a minute.

    Of frames that follow each other faster than the rate, the last one is kept.
    """

    def __init__(self, writer: cv2.VideoWriter, *, rate: float, width: int, height: int):
        self.writer, self.rate, self.size = writer, rate, (width, height)
        self.image: np.ndarray | None = None  # the last one, not written yet
        self.written, self.left_out = 0, 0  # frames; the latter because of LONGEST_HOLD

    def write(self, image: np.ndarray, time_s: float) -> None:
        """image: (H, W, 3) uint8 BGR, resized if necessary; time_s: since the first frame, increasing."""
        due = round(time_s * self.rate) - self.left_out - self.written
        longest = round(LONGEST_HOLD * self.rate)
        self.left_out += max(0, due - longest)
        self._repeat_last(min(due, longest))
        self.image = image if image.shape[1::-1] == self.size else cv2.resize(image, self.size)

    def finish(self) -> None:
        """Write the last frame."""
        self._repeat_last(1)

    def _repeat_last(self, times: int) -> None:
        if self.image is not None:
            for _ in range(times):
                self.writer.write(self.image)
                self.written += 1


@contextmanager
def video_writer(path: Path, *, rate: float, width: int, height: int) -> Iterator[VideoWriter]:
    """Write an MPEG-4 video atomically: it is renamed to ``path`` when the block succeeds, and removed if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial_path(path, keep_suffix=True)
    with _utf8_path(path.parent) as folder:
        name = os.path.join(folder, temporary.name)
        writer = cv2.VideoWriter(name, cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*'mp4v'), rate, (width, height))
        try:
            if not writer.isOpened():
                raise UserError(
                    f'{printable(path)} cannot be written. Check that its folder is writable and that OpenCV was built '
                    'with FFmpeg.'
                )
            video = VideoWriter(writer, rate=rate, width=width, height=height)
            yield video
            video.finish()
            writer.release()
            stored = cv2.VideoCapture(name, cv2.CAP_FFMPEG).get(cv2.CAP_PROP_FRAME_COUNT)
            if stored != video.written:  # OpenCV does not report a full disk
                raise UserError(f'{printable(path)} was not written whole: is the disk full? Make room and rerun.')
            os.replace(temporary, path)
        finally:
            writer.release()
            temporary.unlink(missing_ok=True)
