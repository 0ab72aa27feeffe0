"""Find, read and write image and video files. Every image is uint8 BGR."""

import glob
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from utils.errors import UserError
from utils.images import ImageError, decode_image, focal_length

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
    ]
)
VIDEO_SUFFIXES = frozenset(
    ['.mp4', '.m4v', '.mov', '.avi', '.mkv', '.webm', '.mpg', '.mpeg', '.wmv', '.flv', '.gif', '.ts', '.mts']
)
DEFAULT_RATE = 30.0  # frames/s, for videos and cameras that do not report a rate


class Inputs(NamedTuple):
    """The files matched by the command line's inputs."""

    images: list[Path]
    videos: list[Path]
    others: list[Path]  # files in folders that are neither


def find_inputs(patterns: list[str]) -> Inputs:
    """Expand files, folders (without subfolders) and glob patterns; each file appears once, folders are sorted by name.

    Raises UserError for a missing path, a folder without images or videos, and a pattern that matches nothing.
    """
    images: dict[Path, None] = {}  # dictionaries as ordered sets
    videos: dict[Path, None] = {}
    others: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files = sorted(child for child in path.iterdir() if child.is_file())
            if not any(file.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES for file in files):
                raise UserError(f'The folder {path} contains no image or video (of {len(files)} files).')
        elif path.exists():
            files = [path]
        else:
            files = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
            if not files:
                what = 'No file matches the pattern' if glob.has_magic(pattern) else 'There is no file or folder'
                raise UserError(f'{what} {pattern}.')
        for file in files:
            suffix = file.suffix.lower()
            # A file named explicitly is tried as an image whatever its suffix; in folders the suffix decides.
            is_image = suffix in IMAGE_SUFFIXES or not path.is_dir()
            table = videos if suffix in VIDEO_SUFFIXES else images if is_image else others
            table[file] = None
    return Inputs(list(images), list(videos), list(others))


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


class Video:
    """Iterates over the frames (H, W, 3) uint8 BGR of a video file, or of a camera given by number.

    ``announced`` is the frame count in the file's header, None if absent; ``read`` counts the frames read so far.
    Raises UserError if the source cannot be opened or contains no frame.
    """

    def __init__(self, source: Path | int):
        self.source, self.read = source, 0
        self.capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        ok, self.first = self.capture.read()
        if not ok:
            self.capture.release()
            raise UserError(
                'There is no camera with this number, or it is in use.'
                if isinstance(source, int)
                else 'The file is not a video that OpenCV can read, or contains no frame.'
            )
        rate, count = (self.capture.get(key) for key in (cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT))
        self.rate = rate if math.isfinite(rate) and 0 < rate <= 1000 else DEFAULT_RATE
        self.announced = int(count) if math.isfinite(count) and count > 0 and not isinstance(source, int) else None

    def __iter__(self) -> Iterator[np.ndarray]:
        ok, frame = True, self.first
        while ok:
            self.read += 1
            yield frame
            ok, frame = self.capture.read()

    def close(self) -> None:
        self.capture.release()


@contextmanager
def video_writer(path: Path, *, rate: float, width: int, height: int) -> Iterator[cv2.VideoWriter]:
    """Write an MPEG-4 video atomically: it is renamed to ``path`` when the block succeeds, and removed if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.stem}.{secrets.token_hex(8)}.partial{path.suffix}')
    writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter.fourcc(*'mp4v'), rate, (width, height))
    try:
        if not writer.isOpened():
            raise UserError(
                f'{path} cannot be written. Check that its folder is writable and that OpenCV was built with FFmpeg.'
            )
        yield writer
        writer.release()
        os.replace(temporary, path)
    finally:
        writer.release()
        temporary.unlink(missing_ok=True)
