"""Several data sets as one: DATASET.PATH [A, B], prepared or packed; DATASET.WEIGHTS are their shares of an epoch."""

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset.damage import joint_folder
from dataset.hand_model_record import check_hand_model_record
from dataset.prepared import PreparedSplit, partial_folder
from manopth import HandPair
from utils.errors import UserError
from utils.seeds import seed_of


def set_folders(path: str | list[str]) -> list[str]:
    """The folders that DATASET.PATH names, in its order. Raises UserError if it names one twice."""
    folders = [path] if isinstance(path, str) else list(path)
    seen: dict[Path, str] = {}
    for folder in folders:
        resolved = Path(folder).resolve()
        if resolved in seen:
            also = '' if seen[resolved] == folder else f', once as {seen[resolved]}'
            raise UserError(
                f'DATASET.PATH names {folder} twice{also}. Name it once; DATASET.WEIGHTS draws from it more often.'
            )
        seen[resolved] = folder
    return folders


def folders_with(path: str | list[str], split: str) -> list[str]:
    """Those folders of DATASET.PATH that hold this split; an unfinished one too, which opening it then refuses."""
    return [folder for folder in set_folders(path) if holds_split(Path(folder), split)]


def holds_split(folder: Path, split: str) -> bool:
    """Whether a data set holds a split, complete, unfinished or in shards."""
    return (folder / split).exists() or partial_folder(folder / split).exists() or any(folder.glob(f'{split}.shard-*'))


def check_hand_model_records(path: str | list[str], hands: HandPair) -> None:
    """``check_hand_model_record`` of every set."""
    for folder in set_folders(path):
        check_hand_model_record(folder, hands)


class MixedSplit(PreparedSplit):
    """The same split of several data sets as one: the samples of the first set, then those of the second, and so on.

    parts: the open splits, in order. options: the keyword arguments of PreparedSplit that they were opened with; the
    augmentation is drawn from a sample's number in the whole.
    """

    def __init__(self, parts: list[PreparedSplit], **options: Any):
        self.parts = parts
        self.ends = list(accumulate(len(part) for part in parts))
        roots, split = [str(part.folder.parent) for part in parts], parts[0].folder.name
        super().__init__(joint_folder(roots, split), self.ends[-1], **options)

    def name(self, index: int) -> str:
        part, own = self._find(index)
        return part.name(own)

    def labels(self, index: int) -> tuple[np.ndarray, ...]:
        part, own = self._find(index)
        return part.labels(own)

    def entries(self, index: int) -> dict[str, dict]:
        part, own = self._find(index)
        return part.entries(own)

    def image(self, kind: str, index: int) -> np.ndarray:
        part, own = self._find(index)
        return part.image(kind, own)

    def mask(self, index: int) -> np.ndarray:
        part, own = self._find(index)
        return part.mask(own)

    def siblings(self, index: int) -> range:
        """The samples of the same set: a damaged sample is replaced by one of them, so that no set loses its share."""
        place = bisect_right(self.ends, index)
        return range(self.ends[place] - len(self.parts[place]), self.ends[place])

    def _find(self, index: int) -> tuple[PreparedSplit, int]:
        place = bisect_right(self.ends, index)
        part = self.parts[place]
        return part, index - (self.ends[place] - len(part))


def sample_ranges(dataset: PreparedSplit) -> dict[str, range]:
    """The samples of each set of a mixture by the set's folder; empty for a single data set."""
    if not isinstance(dataset, MixedSplit):
        return {}
    return {
        str(part.folder.parent): range(end - len(part), end)
        for part, end in zip(dataset.parts, dataset.ends, strict=True)
    }


class WeightedOrder:
    """The order of an epoch in which each set has a fixed share: epoch -> (index, pass over its set) of every draw.

    An epoch draws as many samples as all sets hold together, in proportion to ``weights``. Each set is drawn in random
    order without repeats until it is exhausted, over the ends of epochs too, and then in another order: this number of
    its pass, instead of the epoch, seeds the augmentation, so that a sample drawn twice in an epoch differs. Everything
    follows from (seed, epoch). Raises UserError for a set with less than one sample per epoch.
    """

    def __init__(self, dataset: MixedSplit, weights: list[float], *, seed: int):
        self.lengths, self.seed = [len(part) for part in dataset.parts], seed
        self.starts = [end - length for end, length in zip(dataset.ends, self.lengths)]
        self.counts = _apportion(sum(self.lengths), weights)
        for part, weight, count in zip(dataset.parts, weights, self.counts):
            if count == 0:
                raise UserError(
                    f'DATASET.WEIGHTS {weight:g} of {part.folder.parent} is less than one of the {sum(self.lengths)} '
                    'samples of an epoch. Give it more weight, or leave the set out.'
                )

    def __call__(self, epoch: int) -> list[tuple[int, int]]:
        draws = [
            draw
            for place, count in enumerate(self.counts)
            for draw in self._of_set(place, begin=epoch * count, end=(epoch + 1) * count)
        ]
        order = torch.randperm(len(draws), generator=_generator(self.seed, epoch)).tolist()
        return [draws[position] for position in order]

    def _of_set(self, place: int, *, begin: int, end: int) -> list[tuple[int, int]]:
        """Draws ``begin`` to ``end`` of the endless sequence of one set."""
        length, start = self.lengths[place], self.starts[place]
        draws: list[tuple[int, int]] = []
        for number in range(begin // length, -(-end // length)):
            order = torch.randperm(length, generator=_generator(self.seed, number, place + 1)).tolist()
            first, last = (min(max(edge - number * length, 0), length) for edge in (begin, end))
            draws += [(start + own, number) for own in order[first:last]]
        return draws


def _generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*key))


def _apportion(total: int, weights: list[float]) -> list[int]:
    """Whole numbers in proportion to ``weights`` with this sum: the largest remainders are rounded up."""
    shares = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(weights)), key=lambda place: counts[place] - shares[place])
    for place in by_remainder[: total - sum(counts)]:
        counts[place] += 1
    return counts
