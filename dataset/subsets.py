"""Select subsets of a split by annotation, and read the annotated joints of its frames."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.damage import DamageError, read_patiently
from dataset.mixture import sample_ranges
from dataset.prepare.raw import RawSplit, RecordError
from dataset.prepared import PreparedSplit
from utils.errors import UserError


class Subset(NamedTuple):
    """Indices of selected samples, and how they were selected; ``description`` is None for the whole split."""

    indices: list[int]
    description: str | None = None


def choose(
    dataset: PreparedSplit,
    *,
    image_ids: str | Path | None = None,
    annotation_ids: str | Path | None = None,
    captures: Iterable[str] = (),
    first: int | None = None,
) -> Subset:
    """Select the samples that pass every filter, in the order of the split, or only the first ``first`` of them.

    image_ids, annotation_ids: files of ids as in InterHand2.6M's data.json (see ``read_ids``). Raises UserError if a
    file cannot be read or no sample passes, and for several data sets, whose ids and captures may coincide.
    """
    indices, filters = list(range(len(dataset))), []
    wanted = {str(capture) for capture in captures}
    files = {'image': image_ids, 'annotation': annotation_ids}
    lists = [(kind, path, read_ids(path)) for kind, path in files.items() if path]
    if lists or wanted:
        refuse_several_sets(dataset, 'Ids and captures')
        table = [
            _identity(dataset, index)
            for index in tqdm(indices, desc='choose', unit='sample', leave=False, disable=None)
        ]
        for kind, path, ids in lists:
            indices = [index for index in indices if (row := table[index]) is None or row[kind] in ids]
            filters.append(f'{kind} ids of {path} ({len(ids):,} listed)')
        if wanted:
            known = {row['capture'] for row in table if row is not None}
            if unknown := wanted - known:
                raise UserError(
                    f'{dataset.folder} has no capture {", ".join(sorted(unknown))}; it has '
                    f'{", ".join(sorted(known, key=lambda name: (len(name), name)))}.'
                )
            indices = [index for index in indices if (row := table[index]) is None or row['capture'] in wanted]
            filters.append(f'capture {", ".join(sorted(wanted))}')
    if not indices:
        raise UserError(
            f'No sample of {dataset.folder} passes the filters ({"; ".join(filters)}). '
            'Choose ids and captures of this split.'
        )
    if first is not None:
        if first < 1:
            raise UserError(f'--first is {first}; it must be at least 1.')
        indices = indices[:first]
        filters.append(f'first {first:,}')
    return Subset(indices, '; '.join(filters) or None)


def refuse_several_sets(dataset: PreparedSplit, what: str) -> None:
    """Raise UserError for several data sets at once: ``what`` belongs to one of them."""
    if len(ranges := sample_ranges(dataset)) > 1:
        raise UserError(f'{what} belong to one data set, but these are {len(ranges)} ({", ".join(ranges)}). Name one.')


def _identity(dataset: PreparedSplit, index: int) -> dict[str, Any] | None:
    """None for a damaged sample, which may belong to any subset: the evaluation lists it."""
    try:
        entries = read_patiently(lambda: dataset.entries(index), dataset.name(index))
    except DamageError:
        if dataset.is_readable(index):
            raise  # it would be evaluated, as a member of every subset
        return None
    image, annotation = entries['image'], entries['annotation']
    return {'image': image.get('id'), 'annotation': annotation.get('id'), 'capture': str(image.get('capture'))}


def read_ids(path: str | Path) -> set[int]:
    """Read ids from a text file (separated by spaces, commas or newlines) or a JSON list; raises UserError."""
    try:
        text = Path(path).read_text()
        ids = json.loads(text) if text.lstrip().startswith('[') else re.split(r'[\s,]+', text.strip())
        if wrong := [one for one in ids if type(one) not in (int, str)]:
            raise ValueError(f'{str(wrong[0])[:20]} is no integer')
        return {int(one) for one in ids if one != ''}
    except FileNotFoundError:
        raise UserError(f'The id list {path} does not exist.') from None
    except (ValueError, TypeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f'{path} is not a list of ids ({error}). It must contain integers, one per line.') from None


class AnnotatedJoints:
    """Annotated joints of samples, from the downloaded annotation files instead of the hand model.

    data_path: the folder with InterHand2.6M's annotations/. Calling it with sample numbers (B,) returns (B, 2, 21, 3) m
    in camera axes, NaN where not annotated. Raises UserError if the files lack the split or a frame, and for several
    data sets.
    """

    def __init__(self, dataset: PreparedSplit, data_path: str | Path):
        refuse_several_sets(dataset, 'Annotation files')
        self.dataset, self.split = dataset, RawSplit(data_path, dataset.folder.name, with_images=False)

    def __call__(self, indices: Tensor) -> Tensor:
        return torch.from_numpy(np.stack([self._joints(index) for index in indices.tolist()]))

    def _joints(self, index: int) -> np.ndarray:
        image = self.dataset.entries(index)['image']
        try:
            capture, camera, frame = image['capture'], image['camera'], image['frame_idx']
        except KeyError as error:
            raise UserError(
                f'The annotation of {self.dataset.name(index)} lacks its {error.args[0]}, which is needed to find the '
                'annotated joints. Prepare the data set again.'
            ) from None
        try:
            points, valid = self.split.joints(capture, frame)
            rotation, translation, _ = self.split.camera(capture, camera)
        except RecordError as error:
            raise UserError(f'{error} (needed for {self.dataset.name(index)})') from None
        points = points @ rotation.T + translation
        return np.where(valid[..., None], points, np.nan).astype(np.float32)
