"""Data loaders and sample order, reproducible from (seed, epoch, index): a resumed run sees the same batches."""

import multiprocessing
import os
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import get_start_method
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from yacs.config import CfgNode

from dataset import open_split
from dataset.augmentation import AugmentationRanges
from dataset.batch import learns_dense
from dataset.mixture import MixedSplit, WeightedOrder, folders_with, set_folders
from dataset.prepared import PreparedSplit, Sample
from utils.distributed import rank_and_world, usable_cores, use_one_thread
from utils.errors import UserError
from utils.stopping import holding_stop_signals, shield_worker

_END_S = 5.0  # for a worker process to end


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


class WorkerError(UserError):
    """A loader process has died, hangs or has no shared memory left."""


class Loader(DataLoader):
    """A DataLoader that keeps stop signals from its workers and reports their failures as WorkerError.

    PyTorch reports a dead worker from a SIGCHLD handler, wherever the program is at that moment; here it comes when
    the next batch is asked for, so that no update and no save is cut in two. ``close`` ends the workers.
    """

    def __init__(self, dataset: Dataset, *, num_workers: int, limit_s: float = 0.0, **options):
        """limit_s: how long a batch may take before its worker counts as hung; 0: no limit.

        PyTorch's own ``timeout`` waits without a limit for a process that answers nothing at all.
        """
        super().__init__(
            dataset,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            # A server that forks would be their parent otherwise.
            worker_init_fn=partial(_start_worker, parent=os.getpid() if get_start_method() == 'fork' else None),
            **options,
        )
        self.limit_s, self.processes = limit_s, set[Any]()
        self.waiting_since: float | None = None
        self.failed = self.hung = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # an iterator of the same items
        with self._reporting_failures():
            if self.processes or not self.num_workers:
                with self._waiting(), _child_signals.heard():
                    iterator = super().__iter__()
            else:
                before = set(multiprocessing.active_children())
                with holding_stop_signals():
                    iterator = super().__iter__()
                iterator._workers_done_event = _DoneEvent(iterator._workers_done_event)  # type: ignore[attr-defined]
                self.processes = set(multiprocessing.active_children()) - before
                _child_signals.install()
                if self.limit_s:
                    arguments = weakref.ref(self), self.processes, self.limit_s
                    threading.Thread(target=_end_hung, args=arguments, daemon=True).start()
            while True:
                with self._waiting(), _child_signals.heard():
                    self._check_processes()
                    try:
                        batch = next(iterator)
                    except StopIteration:
                        return
                yield batch

    def close(self) -> None:
        """End the worker processes within seconds, whatever state they are in. A later iteration starts new ones."""
        iterator, self._iterator = self._iterator, None
        if self.failed:  # a hung process would be waited for
            self._kill()
        if iterator is not None and self.num_workers:
            # Apart, since it waits without a limit for a queue that a killed worker may have left half-written.
            end = threading.Thread(target=iterator._shutdown_workers, daemon=True)  # type: ignore[attr-defined]
            end.start()
            end.join(2 * _END_S)
        self._kill()
        self.processes, self.failed, self.hung = set(), False, False

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(_END_S)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        self.waiting_since = time.monotonic()
        try:
            yield
        finally:
            self.waiting_since = None

    @contextmanager
    def _reporting_failures(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:
            message = str(error)
            # A worker ended while it passed a batch on, or PyTorch noticed its end but not the reason.
            if isinstance(error, (ConnectionError, EOFError)) or 'exited unexpectedly' in message:
                message = self._ended_worker(patience_s=1.0) or message
            if not self.num_workers or (sentence := self._explained(message)) is None:
                raise
            self.failed = True
            raise WorkerError(sentence) from None

    def _check_processes(self) -> None:
        """Raise RuntimeError if a worker has ended meanwhile."""
        if ended := self._ended_worker():
            raise RuntimeError(ended)

    def _ended_worker(self, patience_s: float = 0.0) -> str | None:
        """A sentence about a worker that has ended, or ends within ``patience_s``."""
        until = time.monotonic() + patience_s
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
            if not process.is_alive():
                reason = f'exit code {process.exitcode}'
                with suppress(ValueError):
                    reason = signal.strsignal(-process.exitcode) or reason
                return f'DataLoader worker (pid {process.pid}) has ended: {reason}'
        return None

    def _explained(self, message: str) -> str | None:
        """One sentence for an error of PyTorch's loader; None for anything else."""
        fewer = f'use fewer loader processes than {self.num_workers} (TRAIN.WORKERS, EVAL.WORKERS; 0 needs none)'
        if self.hung:
            return (
                f'No loader process delivered a batch for {self.limit_s:g} s: the disk or network holding the data set '
                'hangs, or a batch takes longer. Check it, or raise TRAIN.WORKER_TIMEOUT (0: no limit).'
            )
        if 'Too many open files' in message or 'ancdata' in message:  # what a socket without a free descriptor reports
            return f'The loader processes hold too many open files. Raise the limit (ulimit -n 65536), or {fewer}.'
        if 'shared memory' in message or '(shm)' in message or 'Bus error' in message:
            with suppress(OSError):
                message = f'{shutil.disk_usage("/dev/shm").total / 1e6:.0f} MB'
            return (
                f'The loader processes ran out of shared memory (/dev/shm: {message[:80]}). Enlarge it '
                f'(docker run --shm-size=8g or --ipc=host), or {fewer}.'
            )
        if 'DataLoader worker (pid' in message or 'Pin memory thread' in message:
            what = message.splitlines()[0].rstrip('. ')
            return f'A loader process ended ({what}), often because the machine is out of memory. Then {fewer}.'
        return None


def _end_hung(loader: 'weakref.ref[Loader]', processes: set[Any], limit_s: float) -> None:
    """Kill the workers when a batch takes too long: what waits for them then fails."""
    while True:
        time.sleep(min(1.0, limit_s / 4))
        owner = loader()
        if owner is None or owner.processes is not processes:
            return
        since = owner.waiting_since
        if since is not None and time.monotonic() - since > limit_s:
            owner.hung = True
            for process in processes:
                process.kill()
            return
        del owner


class _DoneEvent:
    """This process's view of the event that ends the workers: reading it takes no lock.

    A worker that is killed while it reads the shared event keeps its lock for ever, and PyTorch reads the event when it
    reports that worker.
    """

    def __init__(self, shared: Any):
        self.shared, self.done = shared, False

    def is_set(self) -> bool:
        return self.done

    def set(self) -> None:
        self.done = True
        self.shared.set()


class _ChildSignals:
    """PyTorch's SIGCHLD handler, called only while a batch is waited for."""

    def __init__(self):
        self.handler: Callable[[int, FrameType | None], Any] | None = None
        self.waiting = False

    def install(self) -> None:
        """Wrap the handler that PyTorch has set with its first worker."""
        current = signal.getsignal(signal.SIGCHLD)
        if callable(current) and current != self._pass_on:
            with suppress(ValueError):  # not the main thread: PyTorch has set none either
                signal.signal(signal.SIGCHLD, self._pass_on)
                self.handler = current

    @contextmanager
    def heard(self) -> Iterator[None]:
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self.waiting and self.handler:
            self.handler(number, frame)


_child_signals = _ChildSignals()


def _start_worker(worker: int, *, parent: int | None) -> None:
    shield_worker(parent)
    use_one_thread()


def training_loader(cfg: CfgNode) -> tuple[Loader, EpochSampler]:
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
        on_damage='replace',
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
    loader = _loader(dataset, cfg, batch_size=cfg.TRAIN.BATCH_SIZE // world, sampler=sampler, workers=cfg.TRAIN.WORKERS)
    return loader, sampler


def evaluation_split(cfg: CfgNode, split: str) -> PreparedSplit:
    """Open a split for evaluation, of all sets that hold it: without augmentation and dense maps.

    Batches leave damaged samples out.
    """
    folders = folders_with(cfg.DATASET.PATH, split) or set_folders(cfg.DATASET.PATH)  # without any, opening fails
    with_mask = cfg.DATASET.TARGETS == 'files'
    path = folders if len(folders) > 1 else folders[0]
    return open_split(path, split, with_mask=with_mask, with_dense=False, on_damage='leave out')


def evaluation_loader(dataset: PreparedSplit, cfg: CfgNode, indices: Sequence[int] | None = None) -> Loader:
    """Build the loader of this process's share of a data set, or of ``indices``: each sample goes to one process."""
    rank, world = rank_and_world()
    indices = range(len(dataset)) if indices is None else indices
    workers = cfg.TRAIN.WORKERS if cfg.EVAL.WORKERS < 0 else cfg.EVAL.WORKERS
    return _loader(dataset, cfg, batch_size=cfg.EVAL.BATCH_SIZE, sampler=indices[rank::world], workers=workers)


def _loader(dataset: PreparedSplit, cfg: CfgNode, *, batch_size: int, sampler: Iterable, workers: int) -> Loader:
    workers = min(workers, usable_cores())  # more would only compete for the cores
    return Loader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        limit_s=cfg.TRAIN.WORKER_TIMEOUT,
        collate_fn=_fetched_batch,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )


def _fetched_batch(batch: Any) -> Sample:
    return batch  # ``__getitems__`` has already batched it
