"""Identity of a data set: the number of samples and digests that change when its frames or their order change."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from dataset.prepared import RECORD, PreparedSplit
from utils.errors import UserError
from utils.files import sha256_of_file

PROBES = 64  # samples whose labels are compared, spread evenly over the set
_UNREADABLE = ''  # in place of a probe's digest


def data_identity(dataset: PreparedSplit) -> dict[str, Any] | list[dict[str, Any]]:
    """The identity of an open split, equal for a prepared set and its packed copy; a list if it joins several sets.

    See ``set_identity``. ``dataset.parts`` are the sets of one that joins several.
    """
    parts = getattr(dataset, 'parts', None)
    return set_identity(dataset) if parts is None else [set_identity(part) for part in parts]


def set_identity(dataset: PreparedSplit) -> dict[str, Any]:
    """The identity of one set:

    samples     their number
    digest      of everything below, to show
    preparation digest of preparation.json, which packing copies: it lists every frame that was left out and the sizes
                of the annotation files, so it determines the frames and their order; '' if another tool prepared the
                set
    probes      digests of the labels of 64 samples spread over the set, '' for one that cannot be read

    Reads 64 annotations and one small file, however large the set is. A change of single images with their labels
    unchanged is not seen; ``python dataset/pack.py --verify`` compares every byte.
    """
    record = dataset.folder / RECORD
    preparation = sha256_of_file(record) if record.is_file() else ''
    probes = [_label_digest(dataset, index) for index in probe_indices(len(dataset))]
    whole = hashlib.sha256('\n'.join([str(len(dataset)), preparation, *probes]).encode()).hexdigest()
    return {'samples': len(dataset), 'digest': whole, 'preparation': preparation, 'probes': probes}


def probe_indices(samples: int) -> list[int]:
    """Sample numbers spread evenly from the first to the last; all of a small set."""
    return np.linspace(0, samples - 1, min(samples, PROBES)).round().astype(int).tolist()


def _label_digest(dataset: PreparedSplit, index: int) -> str:
    try:
        labels = dataset.labels(index)
    except (UserError, OSError):
        return _UNREADABLE
    return hashlib.sha256(b''.join(np.ascontiguousarray(array, '<f4').tobytes() for array in labels)).hexdigest()[:16]


def check_data_identity(recorded: Any, now: Any, *, split: str, path: str | Path) -> None:
    """Raise UserError if a split of a run differs from the ``recorded`` one of its checkpoint ``path``.

    Both: one identity, or a list of them for several sets. None, of a checkpoint of an earlier version, fits any data.
    """
    if recorded is None:
        return
    before, after = (each if isinstance(each, list) else [each] for each in (recorded, now))
    if len(before) != len(after):
        raise UserError(
            f'{path} was trained with the split {split} of {len(before)} data sets, but {len(after)} in DATASET.PATH '
            f'hold one now. {_ADVICE}'
        )
    for number, (old, new) in enumerate(zip(before, after), 1):
        difference = _difference(old, new)
        if difference:
            which = f'data set {number} of {len(after)} in DATASET.PATH' if len(after) > 1 else 'DATASET.PATH'
            raise UserError(f'{path} was trained on other data than those of {which}: {difference}. {_ADVICE}')


_ADVICE = 'Set DATASET.PATH to the data of this run, or start a new run in another OUTPUT_DIR.'


def _difference(old: Any, new: dict[str, Any]) -> str | None:
    """What differs between two identities, in words."""
    if not (isinstance(old, dict) and isinstance(old.get('samples'), int) and isinstance(old.get('probes'), list)):
        return 'the recorded identity is damaged'
    if old['samples'] != new['samples']:
        return f'{old["samples"]:,} samples then, {new["samples"]:,} now'
    if old.get('preparation') and new['preparation'] and old['preparation'] != new['preparation']:
        return f'its {RECORD} has changed, so other frames were kept or left out'
    indices = probe_indices(new['samples'])
    for index, before, after in zip(indices, old['probes'], new['probes']):
        if _UNREADABLE not in (before, after) and before != after:
            return f'sample {index} has other labels'
    return None
