"""Loaders and the order of samples: all follows from (seed, epoch, index), so a resumed run sees what it would have."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Sampler
from yacs.config import CfgNode

from dataset import open_split
from dataset.augmentation import AugmentationRanges
from dataset.prepared import PreparedSplit, Sample
from dataset.targets import learns_dense
from utils.distributed import rank_and_world, usable_cores
from utils.errors import UserError


class EpochSampler(Sampler[tuple[int, int]]):
    """(index, epoch) of this process's share of every global batch, from step ``first_step`` of epoch ``epoch`` on.

    The global order does not depend on the number of processes. A last batch that is not full is left out.
    """

    def __init__(self, length: int, *, batch_size: int, seed: int):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.epoch, self.first_step = 0, 0
        rank, world = rank_and_world()
        share = batch_size // world
        self.mine = slice(rank * share, (rank + 1) * share)

    @property
    def steps(self) -> int:
        """Steps of a whole epoch."""
        return self.length // self.batch_size

    def start_at(self, epoch: int, step: int = 0) -> None:
        self.epoch, self.first_step = epoch, step

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        for step in range(self.first_step, self.steps):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield from ((index, self.epoch) for index in batch[self.mine])

    def __len__(self) -> int:
        return (self.steps - self.first_step) * (self.mine.stop - self.mine.start)


def training_loader(cfg: CfgNode) -> tuple[DataLoader, EpochSampler]:
    """Loader of the training split with augmentation; raises UserError if the split is too small for one batch."""
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
            f'{world} of them in TRAIN.ACCUMULATE {cfg.TRAIN.ACCUMULATE} parts each; choose a multiple.'
        )
    if len(dataset) < cfg.TRAIN.BATCH_SIZE:
        raise UserError(
            f'{dataset.folder} holds {len(dataset)} samples, fewer than TRAIN.BATCH_SIZE '
            f'{cfg.TRAIN.BATCH_SIZE}: set it to {len(dataset)} or less.'
        )
    sampler = EpochSampler(len(dataset), batch_size=cfg.TRAIN.BATCH_SIZE, seed=cfg.SEED)
    loader = _loader(dataset, batch_size=cfg.TRAIN.BATCH_SIZE // world, sampler=sampler, workers=cfg.TRAIN.WORKERS)
    return loader, sampler


def evaluation_split(cfg: CfgNode, split: str) -> PreparedSplit:
    """A split as evaluation reads it: no augmentation, no dense maps."""
    return open_split(cfg.DATASET.PATH, split, with_mask=cfg.DATASET.TARGETS == 'files', with_dense=False)


def evaluation_loader(dataset: PreparedSplit, cfg: CfgNode, indices: Sequence[int] | None = None) -> DataLoader:
    """Loader of this process's share of a data set, or of some samples of it: over all processes each comes once."""
    rank, world = rank_and_world()
    indices = range(len(dataset)) if indices is None else indices
    workers = cfg.TRAIN.WORKERS if cfg.EVAL.WORKERS < 0 else cfg.EVAL.WORKERS
    return _loader(dataset, batch_size=cfg.EVAL.BATCH_SIZE, sampler=indices[rank::world], workers=workers)


def _loader(dataset: PreparedSplit, *, batch_size: int, sampler: Iterable, workers: int) -> DataLoader:
    workers = min(workers, usable_cores())  # more of them would only compete for the cores
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=_as_fetched,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_worker_setup,
    )


def _as_fetched(batch: Sample) -> Sample:
    return batch  # ``__getitems__`` made it


def _worker_setup(worker: int) -> None:
    import cv2

    torch.set_num_threads(1)
    cv2.setNumThreads(0)  # not 1: that joins the parent's threads, which a fork does not copy, and never returns
