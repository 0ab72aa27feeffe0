"""Where the hands of an input are: one box for all, a file of boxes, or a detector."""

import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from inference.reconstruct import Box
from utils.errors import UserError, printable
from utils.files import read_json

Boxes = Callable[[Path, np.ndarray], Sequence[Box | None]]  # input, image -> a box for each pair of hands in it


class BoxesFile:
    """{"name": [x, y, w, h] or a list of such boxes}: names as given, relative to the file's folder, or bare.

    Bytes of a name that are no UTF-8 are written as the demo prints them: '\\xe4'.
    """

    def __init__(self, path: Path):
        self.path, table = path, read_json(path)
        if not isinstance(table, dict):
            raise UserError(f'{printable(path)} must hold {{"image.jpg": [x, y, width, height], ...}}.')
        try:
            self.table = {_composed(Path(name)): boxes for name, boxes in table.items()}
        except UnicodeEncodeError:  # half of a surrogate pair
            raise UserError(f'{printable(path)} lists a name that no file can have. Remove it.') from None
        if len(self.table) < len(table):
            raise UserError(f'{printable(path)} lists a name twice, spelled differently. Remove one of them.')

    def __call__(self, source: Path, image: np.ndarray) -> list[Box]:
        names, resolved, folder = [source, Path(source.name)], source.resolve(), self.path.resolve().parent
        if resolved.is_relative_to(folder):
            names.insert(1, resolved.relative_to(folder))
        found = next((self.table[name] for name in map(_composed, names) if name in self.table), None)
        if not isinstance(found, list) or not found:
            raise UserError(f'{printable(self.path)} has no box for it.')
        return found if isinstance(found[0], list) else [found]  # type: ignore[list-item]  # checked when cropping


def _composed(name: Path) -> str:
    """Equal for the forms of a name that look alike: macOS writes 'a' and a combining mark where others write 'ä'."""
    return unicodedata.normalize('NFC', printable(name))


def smoothed(before: Box | None, now: Box | None) -> Box | None:
    """Half way from the last box to the new one; the last one where the detector found no hands."""
    if before is None or now is None:
        return now or before
    left, top, width, height = ((a + b) / 2 for a, b in zip(before, now))
    return left, top, width, height
