"""Read images of any common format: upright, 8-bit BGR, over white; damaged ones are refused (docs/formats.md).

JPEG is decoded by OpenCV, everything else by Pillow; the orientation always comes from Pillow, since OpenCV's handling
of it depends on the format and the version.
"""

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from utils.stderr import print_to_stderr, with_stderr

DIAGONAL_35MM = math.hypot(36, 24)  # mm: of a 35 mm film frame
_JPEG = b'\xff\xd8'
_UNTURNED = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
# The texts of libjpeg's warnings, of which it prints the first only. All mean damage but the last one, which some
# cameras earn by parameters that change no pixel.
_ODD_SCAN = 'Invalid SOS parameters for sequential JPEG'
_WARNING = re.compile(
    r'^(?:Corrupt JPEG data|Premature end of|Inconsistent progression|Unknown Adobe color|Warning: unknown JFIF|'
    rf'{_ODD_SCAN}).*\n?',
    re.MULTILINE,
)
_MARKER = re.compile(rb'\xff[^\x00\xff\xd0-\xd7]')  # behind a scan's data, in which FF is followed by 00 or RST
_PROGRESSIVE, _SCAN, _END, _APP1 = 0xC2, 0xDA, 0xD9, 0xE1
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of segments that hold the size


class ImageError(Exception):
    """Why an image cannot be used, as the end of a sentence: 'empty', 'too large', 'damaged or truncated (...)'."""

    def __init__(self, reason: str, advice: str = 'Copy or download it again.'):
        super().__init__(reason)
        self.advice = advice

    def __reduce__(self):
        return type(self), (str(self), self.advice)


def read_image(path: str | Path) -> np.ndarray:
    """(H, W, 3) uint8 BGR of an image file. Raises OSError if it cannot be read, and ImageError like decode_image."""
    return decode_image(Path(path).read_bytes())


def decode_image(content: bytes | memoryview) -> np.ndarray:
    """Decode an image file's content -> (H, W, 3) uint8 BGR.

    The image is turned upright according to its metadata, 16 bits are reduced to 8, alpha is composited over white; of
    several frames, the first is decoded. Raises ImageError for anything else, and for damage, also where the decoder
    only warns of it: in a JPEG, bytes that are missing or changed. Data behind a JPEG's end is ignored, and its end
    marker may be missing. Changed bytes that leave the code valid cannot be noticed; only a checksum finds those.
    """
    if not content:
        raise ImageError('empty')
    if content[:2] != _JPEG:
        return _decode_other(bytes(content))
    # With a marker at the end, libjpeg warns of each pixel that is missing, and of nothing if only the marker was.
    whole = b''.join((content, b'\xff\xd9'))
    try:
        image, warning = _decode_jpeg(whole)
        if warning.startswith(_ODD_SCAN):  # which would hide a second warning
            image, warning = _decode_jpeg(_with_usual_scans(whole))
    except cv2.error:
        raise ImageError('too large', 'Reduce it first.') from None
    header = {segment.marker for segment in takewhile(lambda segment: segment.marker != _SCAN, _segments(whole))}
    if not warning and _PROGRESSIVE in header and not _all_scans_exist(whole):
        warning = 'scans are missing'
    if image is None or warning:
        raise ImageError(
            f'damaged or truncated ({warning or "JPEG header"})',
            'Copy or download it again; if a viewer shows it whole, save it there as PNG.',
        )
    # EXIF and XMP lie in APP1. Asking Pillow takes as long as decoding a crop.
    return upright(image, exif_orientation(whole)) if _APP1 in header else image


def announced_size(content: bytes | memoryview) -> tuple[int, int] | None:
    """Height and width that an image file announces, before it is turned upright; None if it has no sound header."""
    if content[:2] == _JPEG:
        frame = next((segment for segment in _segments(bytes(content)) if segment.marker in _FRAMES), None)
        if frame is None or frame.end - frame.begin < 5:
            return None
        height, width = (int.from_bytes(content[frame.begin + at : frame.begin + at + 2], 'big') for at in (1, 3))
        return height, width
    _register_heif()
    try:
        with warnings.catch_warnings(action='ignore'), Image.open(io.BytesIO(bytes(content))) as image:
            return image.height, image.width
    except Exception:  # on damaged files, Pillow raises almost anything
        return None


def upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an image as EXIF's orientation 1 to 8 demands; other values mean 1."""
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def focal_length(content: bytes, *, height: int, width: int) -> float | None:
    """Focal length in pixels from the 35 mm equivalent in EXIF, None without one.

    It is defined by the diagonal field of view (CIPA DCG-001).
    """
    try:
        with warnings.catch_warnings(action='ignore'):
            exif = _metadata(content)
            equivalent = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.FocalLengthIn35mmFilm)
    except Exception:  # damaged metadata, where Pillow raises almost anything, is treated like missing metadata
        return None
    if not isinstance(equivalent, int) or equivalent <= 0:  # 0: unknown
        return None
    return equivalent * math.hypot(width, height) / DIAGONAL_35MM


def exif_orientation(content: bytes) -> int:
    """EXIF's orientation of an image file, 1 (upright) where there is none."""
    try:
        with warnings.catch_warnings(action='ignore'):
            return int(_metadata(content).get(ExifTags.Base.Orientation, 1))
    except Exception:  # as above
        return 1


def _metadata(content: bytes) -> Image.Exif:
    """EXIF of an image file.

    Pillow refuses images as large as some that OpenCV decodes. It needs only a JPEG's header, so it gets that alone,
    with the size set to 1 x 1.
    """
    if content[:2] == _JPEG:
        header = bytearray()
        for segment in _segments(content):
            if segment.marker in _FRAMES:
                header[:] = content[: segment.end]
                header[segment.begin + 1 : segment.begin + 5] = 0, 1, 0, 1  # height, width
            if segment.marker == _SCAN:
                content = bytes(header) + content[len(header) : segment.end]
                break
    return Image.open(io.BytesIO(content)).getexif()


# JPEG


def _decode_jpeg(content: bytes) -> tuple[np.ndarray | None, str]:
    """The image and libjpeg's warning, which it only prints."""
    image, printed = with_stderr(lambda: cv2.imdecode(np.frombuffer(content, np.uint8), _UNTURNED))
    if not printed:
        return image, ''
    print_to_stderr(_WARNING.sub('', printed))
    warning = _WARNING.search(printed)
    return image, warning[0].strip() if warning else ''


class _Segment(NamedTuple):
    marker: int
    begin: int  # of its content
    end: int


def _segments(content: bytes) -> Iterator[_Segment]:
    """The marker segments of a JPEG up to its end marker, scans' headers included. Stops where they are damaged."""
    position = 2
    while found := _MARKER.search(content, position):
        marker, begin = content[found.start() + 1], found.end()
        end = begin + int.from_bytes(content[begin : begin + 2], 'big')
        if marker == _END or end > len(content):
            return
        yield _Segment(marker, begin + 2, end)
        position = max(end, begin)


def _with_usual_scans(content: bytes) -> bytes:
    """A sequential JPEG with the only parameters that its scans can have: coefficients 0 to 63, no approximation."""
    patched = bytearray(content)
    for segment in _segments(content):
        if segment.marker == _SCAN:
            patched[segment.end - 3 : segment.end] = 0, 63, 0
    return bytes(patched)


def _all_scans_exist(content: bytes) -> bool:
    """Whether a progressive JPEG contains every coefficient to its last bit; others count as complete."""
    missing: dict[int, set[int]] = {}  # coefficients by component
    for segment in _segments(content):
        part = content[segment.begin : segment.end]
        if segment.marker == _PROGRESSIVE:
            missing = {component: set(range(64)) for component in part[6::3]}
        elif segment.marker == _SCAN and len(part) > 3 and part[-1] & 15 == 0:  # no lower bits are left for later scans
            for component in part[1:-3:2]:
                missing.get(component, set()).difference_update(range(part[-3], part[-2] + 1))
    return not any(missing.values())


# Other formats


def _decode_other(content: bytes) -> np.ndarray:
    _register_heif()
    try:
        with warnings.catch_warnings(action='ignore'):
            image = Image.open(io.BytesIO(content))
            kind, orientation = image.format, exif_orientation(content)
            image.load()
    except UnidentifiedImageError:
        return _decode_by_opencv(content)
    except (Image.DecompressionBombError, MemoryError):
        raise ImageError('too large', 'Reduce it first.') from None
    except Exception as error:  # on damaged files, Pillow raises almost anything
        raise ImageError(f'damaged or truncated ({error})') from None
    if kind == 'AVIF' and _opencv_reads_avif() and cv2.imdecode(np.frombuffer(content, np.uint8), _UNTURNED) is None:
        raise ImageError('damaged or truncated (AVIF)')  # which Pillow's decoder conceals
    if kind == 'TIFF':
        orientation = 1  # Pillow and libtiff turn it themselves
    return upright(_eight_bit_bgr(image), orientation)


def _eight_bit_bgr(image: Image.Image) -> np.ndarray:
    if image.mode[0] in 'IF':  # one channel of more than 8 bits
        values = np.asarray(image)
        if values.dtype.kind == 'f':
            values = np.nan_to_num(values).clip(0, 1) * 255
        elif image.mode != 'I' or values.max(initial=0) > 255:
            values = values.clip(0, 65535) // 256
        return np.repeat(values.clip(0, 255).round().astype(np.uint8)[..., None], 3, -1)
    if not image.has_transparency_data:
        return np.asarray(image.convert('RGB'))[..., ::-1]
    colours = np.asarray(image.convert('RGBA'))
    alpha = colours[..., 3:].astype(np.uint16)
    return 255 - ((255 - colours[..., 2::-1]) * alpha // 255).astype(
        np.uint8
    )  # those of transparent pixels are arbitrary


def _decode_by_opencv(content: bytes) -> np.ndarray:
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        image = None
    if image is None:
        if content[4:8] == b'ftyp' and content[8:12] in (b'heic', b'heix', b'mif1', b'msf1'):
            raise ImageError('in HEIC format', 'Convert it to JPEG, or run pip install pillow-heif.')
        raise ImageError('not an image in a known format', 'Convert it to JPEG or PNG.')
    return image


@cache
def _register_heif() -> None:
    """Let Pillow read HEIC if the optional package for it is installed."""
    with suppress(ImportError):
        import pillow_heif  # type: ignore[import-not-found]

        pillow_heif.register_heif_opener()


@cache
def _opencv_reads_avif() -> bool:
    found = re.search(r'AVIF:\s+(\S+)', cv2.getBuildInformation())
    return found is not None and found[1] != 'NO'
