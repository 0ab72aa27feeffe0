"""Data sets: files -> batches. ``open_split`` alone decides which class reads a folder."""

from pathlib import Path

from dataset.packed import LABELS, MANIFEST, PackedDataset
from dataset.prepared import InterHandDataset, PreparedSplit, Sample, partial_folder

__all__ = ['PreparedSplit', 'Sample', 'open_split']


def open_split(path: str | Path, split: str, **options) -> PreparedSplit:
    """Open a prepared split, packed or as a folder of files. ``options``: the keyword arguments of PreparedSplit."""
    folder = Path(path) / split
    packed = (folder / MANIFEST).exists() or (partial_folder(folder) / LABELS).exists()
    return (PackedDataset if packed else InterHandDataset)(path, split, **options)
