"""Data loaders and sample order, reproducible from (seed, epoch, index): a resumed run sees the same batches."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from yacs.config import CfgNode

from dataset import open_split
from dataset.augmentation import AugmentationRanges
from dataset.batch import learns_dense
from dataset.mixture import MixedSplit, WeightedOrder, folders_with, set_folders
from dataset.prepared import PreparedSplit, Sample
from utils.distributed import rank_and_world, usable_cores, use_one_thread
from utils.errors import UserError


class EpochSampler(Sampler[tuple[int, int]]):
    """Yield (index, epoch) of this process's share of each global batch, starting at ``start_at``.

    The global order does not depend on the number of processes. An incomplete last batch is dropped. order: (index, key
    of its augmentation) of every draw of an epoch; None for every sample once, in random order.
    """

    def __init__(self, length: int, *, batch_size: int, seed: int, order: WeightedOrder | None = None):
        self.length, self.batch_size, self.seed, self.order = length, batch_size, seed, order
        self.epoch, self.first_step = 0, 0
        rank, world = rank_and_world()
        share = batch_size // world
        self.mine = slice(rank * share, (rank + 1) * share)

    @property
    def steps(self) -> int:
        """Number of steps in a full epoch."""
        return self.length // self.batch_size

    def start_at(self, epoch: int, step: int = 0) -> None:
        """Start the next iteration at this step of this epoch."""
        self.epoch, self.first_step = epoch, step

    def __iter__(self) -> Iterator[tuple[int, int]]:
        draws = self.order(self.epoch) if self.order else self._permutation()
        for step in range(self.first_step, self.steps):
            yield from draws[step * self.batch_size : (step + 1) * self.batch_size][self.mine]

    def _permutation(self) -> list[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        return [(index, self.epoch) for index in order]

    def __len__(self) -> int:
        return (self.steps - self.first_step) * (self.mine.stop - self.mine.start)


def training_loader(cfg: CfgNode) -> tuple[DataLoader, EpochSampler]:
    """Build the augmenting loader of the training split. Raises UserError for a batch size that does not fit."""
    ranges = AugmentationRanges(**{name.lower(): value for name, value in cfg.AUGMENT.items()})
    from_files = cfg.DATASET.TARGETS == 'files'
    dataset = open_split(
        cfg.DATASET.PATH,
        'train',
        ranges=ranges,
        seed=cfg.SEED,
        with_mask=from_files,
        with_dense=from_files and learns_dense(cfg),
    )
    world = rank_and_world()[1]
    if cfg.TRAIN.BATCH_SIZE % (world * cfg.TRAIN.ACCUMULATE):
        raise UserError(
            f'TRAIN.BATCH_SIZE {cfg.TRAIN.BATCH_SIZE} is over all processes and cannot be split over '
            f'{world} of them in TRAIN.ACCUMULATE {cfg.TRAIN.ACCUMULATE} parts each; set it to a multiple of '
            f'{world * cfg.TRAIN.ACCUMULATE}.'
        )
    if len(dataset) < cfg.TRAIN.BATCH_SIZE:
        raise UserError(
            f'{dataset.folder} holds {len(dataset)} samples, fewer than TRAIN.BATCH_SIZE '
            f'{cfg.TRAIN.BATCH_SIZE}: set it to {len(dataset)} or less.'
        )
    order = None
    if isinstance(dataset, MixedSplit) and cfg.DATASET.WEIGHTS:
        order = WeightedOrder(dataset, cfg.DATASET.WEIGHTS, seed=cfg.SEED)
    sampler = EpochSampler(len(dataset), batch_size=cfg.TRAIN.BATCH_SIZE, seed=cfg.SEED, order=order)
    loader = _loader(dataset, batch_size=cfg.TRAIN.BATCH_SIZE // world, sampler=sampler, workers=cfg.TRAIN.WORKERS)
    return loader, sampler


def evaluation_split(cfg: CfgNode, split: str) -> PreparedSplit:
    """Open a split for evaluation, of all sets that hold it: without augmentation and dense maps."""
    folders = folders_with(cfg.DATASET.PATH, split) or set_folders(cfg.DATASET.PATH)  # if none has it, opening fails
    path = folders if len(folders) > 1 else folders[0]
    return open_split(path, split, with_mask=cfg.DATASET.TARGETS == 'files', with_dense=False)


def evaluation_loader(dataset: PreparedSplit, cfg: CfgNode, indices: Sequence[int] | None = None) -> DataLoader:
    """Build the loader of this process's share of a data set, or of ``indices``: each sample goes to one process."""
    rank, world = rank_and_world()
    indices = range(len(dataset)) if indices is None else indices
    workers = cfg.TRAIN.WORKERS if cfg.EVAL.WORKERS < 0 else cfg.EVAL.WORKERS
    return _loader(dataset, batch_size=cfg.EVAL.BATCH_SIZE, sampler=indices[rank::world], workers=workers)


def _loader(dataset: PreparedSplit, *, batch_size: int, sampler: Iterable, workers: int) -> DataLoader:
    workers = min(workers, usable_cores())  # more would only compete for the cores
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=_fetched_batch,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        worker_init_fn=use_one_thread,
    )


def _fetched_batch(batch: Any) -> Sample:
    return batch  # ``__getitems__`` has already batched it
