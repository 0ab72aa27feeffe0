"""Data sets: files -> batches. ``open_split`` alone decides which class reads a folder."""

from pathlib import Path

import utils  # noqa: F401  # before PyTorch, see there
from dataset.mixture import MixedSplit, set_folders
from dataset.packed import LABELS, MANIFEST, PackedDataset
from dataset.prepared import InterHandDataset, PreparedSplit, Sample, partial_folder

__all__ = ['PreparedSplit', 'Sample', 'open_split']


def open_split(path: str | Path | list[str], split: str, **options) -> PreparedSplit:
    """Open a prepared split, packed or as a folder of files, or that of several data sets as one.

    options: the keyword arguments of PreparedSplit.
    """
    if isinstance(path, list):
        return MixedSplit([open_split(folder, split, **options) for folder in set_folders(path)], **options)
    folder = Path(path) / split
    packed = (folder / MANIFEST).exists() or (partial_folder(folder) / LABELS).exists()
    return (PackedDataset if packed else InterHandDataset)(path, split, **options)
