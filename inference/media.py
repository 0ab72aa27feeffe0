"""Other people's pictures and videos: finding, reading and writing them. Everything is BGR uint8."""

import glob
import io
import math
import os
import secrets
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import ExifTags, Image

from utils.errors import UserError
from utils.files import decode_image

PICTURES = frozenset(
    (
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
    )
)
VIDEOS = frozenset(
    ('.mp4', '.m4v', '.mov', '.avi', '.mkv', '.webm', '.mpg', '.mpeg', '.wmv', '.flv', '.gif', '.ts', '.mts')
)
DIAGONAL_35MM = math.hypot(36, 24)  # mm: of a frame of 35 mm film
DEFAULT_RATE = 30.0  # frames/s, where a video or a camera does not say


class Inputs(NamedTuple):
    """What was found under the names that were given."""

    pictures: list[Path]
    videos: list[Path]
    others: list[Path]  # in folders: files of other kinds


def find_inputs(words: list[str]) -> Inputs:
    """Files, folders (not those in them) and patterns -> files, each once, folders in the order of their names.

    Raises UserError for a name that is not there, a folder without pictures or videos, a pattern that fits nothing.
    """
    pictures, videos, others = {}, {}, {}
    for word in words:
        path = Path(word)
        if path.is_dir():
            files = sorted(child for child in path.iterdir() if child.is_file())
            if not any(file.suffix.lower() in PICTURES | VIDEOS for file in files):
                raise UserError(f'the folder {path} holds no picture or video (of {len(files)} files).')
        elif path.exists():
            files = [path]
        else:
            files = sorted(Path(name) for name in glob.glob(word, recursive=True) if Path(name).is_file())
            if not files:
                what = 'no file fits the pattern' if glob.has_magic(word) else 'there is no file or folder'
                raise UserError(f'{what} {word}.')
        for file in files:
            kind = file.suffix.lower()
            # A file that was named is tried, whatever it is called; of a folder's only those that look like pictures.
            table = videos if kind in VIDEOS else pictures if kind in PICTURES or not path.is_dir() else others
            table[file] = None
    return Inputs(list(pictures), list(videos), list(others))


class Picture(NamedTuple):
    """A picture file."""

    image: np.ndarray  # (H, W, 3) uint8 BGR
    focal: float | None  # pixels, where its EXIF says the 35 mm equivalent


def read_picture(path: Path) -> Picture:
    """Turned as its EXIF says, 16 bits reduced to 8, grey as three channels, alpha over white.

    Raises UserError for what is no picture, cut short, or too large for memory, and OSError where it cannot be read.
    """
    content = path.read_bytes()
    try:
        picture = decode_image(content)
    except cv2.error:  # above 2^30 pixels, or out of memory
        raise UserError('the picture is too large to be read; reduce it first.') from None
    if picture is None:
        raise UserError('this is not a picture that OpenCV reads, or it is cut short; convert it to JPEG or PNG.')
    if content[:2] != b'\xff\xd8':
        picture = _over_white(content, picture)
    return Picture(picture, _exif_focal(content, *picture.shape[:2]))


def _exif_focal(content: bytes, height: int, width: int) -> float | None:
    """From the 35 mm equivalent, which compares the diagonals of the fields of view (CIPA DCG-001)."""
    try:
        with warnings.catch_warnings(action='ignore'):  # large pictures: only the head is read here
            equivalent = (
                Image.open(io.BytesIO(content))
                .getexif()
                .get_ifd(ExifTags.IFD.Exif)
                .get(ExifTags.Base.FocalLengthIn35mmFilm)
            )
    except (OSError, ValueError, SyntaxError, TypeError, struct.error, Image.DecompressionBombError):
        return None  # no picture that Pillow knows, or damaged EXIF: then it is as if there were none
    known = isinstance(equivalent, int) and equivalent > 0  # 0: unknown
    return equivalent * math.hypot(width, height) / DIAGONAL_35MM if known else None


def _over_white(content: bytes, picture: np.ndarray) -> np.ndarray:
    """Where a picture is transparent its colours mean nothing: white, as most programs show it."""
    whole = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if whole is None or whole.ndim != 3 or whole.shape[2] != 4 or whole.shape[:2] != picture.shape[:2]:
        return picture
    largest = np.iinfo(whole.dtype).max if whole.dtype.kind == 'u' else 1.0
    alpha = cv2.convertScaleAbs(whole[..., 3], alpha=255 / largest)[..., None].astype(np.uint16)
    return 255 - ((255 - picture) * alpha // 255).astype(np.uint8)


class Video:
    """Frames of a file or, for a number, of a camera. Iterates over (H, W, 3) pictures, one in memory at a time.

    Raises UserError where it cannot be opened or holds no frame. ``announced`` is how many frames a file says that it
    has, None if it does not.
    """

    def __init__(self, source: Path | int):
        self.source, self.read = source, 0
        self.capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        ok, self.first = self.capture.read()
        if not ok:
            self.capture.release()
            raise UserError(
                'there is no camera of this number, or it is in use.'
                if isinstance(source, int)
                else 'this is not a video that OpenCV reads, or it holds no frame.'
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
    """An MPEG-4 file that takes its name once the block ends well; on failure nothing is left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f'.{path.stem}.{secrets.token_hex(8)}.partial{path.suffix}')
    writer = cv2.VideoWriter(str(aside), cv2.VideoWriter.fourcc(*'mp4v'), rate, (width, height))
    try:
        if not writer.isOpened():
            raise UserError(f'{path} cannot be written: is its folder writable, and OpenCV built with FFmpeg?')
        yield writer
        writer.release()
        os.replace(aside, path)
    finally:
        writer.release()
        aside.unlink(missing_ok=True)
