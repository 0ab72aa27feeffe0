"""One process or many under ``torchrun``: the same calls work for both.

DistributedDataParallel averages the gradients of the processes, so a loss that is a mean over samples needs no help.
Whatever mixes the samples of a batch does: batch norms, and losses over all pixels.
"""

import ctypes
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import cv2
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.errors import UserError
from utils.modules import replace_modules

Network = TypeVar('Network', bound=nn.Module)
Value = TypeVar('Value')
# How gloo and PyTorch word the loss of a process, for which they have no exception of their own.
_LOST = re.compile(
    '(?i)connection (closed|reset|refused)|broken pipe|application timeout|timed out waiting|wait timeout|'
    'failed to recv|remote process exited|socket timeout|nccl communicator was aborted'
)
_store: dist.Store | None = None  # of the processes of this run


class LostProcessError(UserError):
    """Another process of this run has ended or no longer answers."""


def choose_device(name: str) -> torch.device:
    """DEVICE 'auto', 'cpu', 'cuda' or 'cuda:N' -> a working device. Raises UserError if it cannot be used."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    if name == 'cuda' and dist.is_initialized():
        name = f'cuda:{os.environ["LOCAL_RANK"]}'
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f'DEVICE {name} cannot be used ({str(error).splitlines()[0]}): set it to auto or cpu, or check '
            'the driver (nvidia-smi).'
        ) from None


def usable_cores() -> int:
    """Cores that this process may run on: a container or a job scheduler may grant fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def use_one_thread(worker: int = 0) -> None:
    """Compute with one thread in this process, one of several that share the cores; a DataLoader passes ``worker``."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)  # not 1: that joins the parent's threads, which a fork does not copy, and hangs


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set PyTorch's number of threads within the block and restore it afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def start(device: str, *, timeout_s: float = 1800) -> torch.device:
    """Join the process group if started by ``torchrun`` -> the device of this process for DEVICE ``device``.

    timeout_s: how long a process waits for the others in one exchange before it gives up (LostProcessError).
    """
    global _store
    if 'RANK' in os.environ and not dist.is_initialized():
        use_cuda = device.startswith('cuda') or (device == 'auto' and torch.cuda.is_available())
        with reporting_lost_processes():
            store, rank, world = next(dist.rendezvous('env://'))
            # Restarted processes must not find the addresses of dead ones in the store.
            _store = dist.PrefixStore(f'start_{_restarts()}', store)
            dist.init_process_group(
                'nccl' if use_cuda else 'gloo',
                store=_store,
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=timeout_s),
            )
        device = 'cuda' if use_cuda else device
    chosen = choose_device(device)
    if chosen.type == 'cuda':
        torch.cuda.set_device(chosen)
    else:
        keep_freed_memory()
    return chosen


def keep_freed_memory() -> None:
    """Make glibc keep large freed blocks instead of returning them to the system.

    Otherwise every large tensor comes as fresh pages that the kernel has to clear first, which can cost a CPU run as
    much as the arithmetic.
    """
    trim_threshold, mmap_max = -1, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(trim_threshold, -1)  # never
    mallopt(mmap_max, 0)  # no separate mapping for large blocks, which would be unmapped when freed


def stop() -> None:
    global _store
    if dist.is_initialized():
        dist.destroy_process_group()
    _store = None


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank_and_world()[0] == 0


@contextmanager
def reporting_lost_processes() -> Iterator[None]:
    """Raise LostProcessError where an exchange with the other processes fails because one of them is gone."""
    try:
        yield
    except RuntimeError as error:
        if 'RANK' in os.environ and (isinstance(error, dist.DistError) or _LOST.search(str(error))):
            raise LostProcessError(
                'Another process of this run has ended or does not answer; its own message, or the log of the kernel '
                'or the scheduler, tells why.'
            ) from None
        raise


def gather_objects(part) -> list:
    """Every process's ``part``, in rank order, on every process."""
    world = rank_and_world()[1]
    if world == 1:
        return [part]
    parts = [None] * world
    with reporting_lost_processes():
        dist.all_gather_object(parts, part)
    return parts


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is set on any process, so that all leave a loop together."""
    if rank_and_world()[1] == 1:
        return flag
    device = 'cuda' if dist.get_backend() == 'nccl' else 'cpu'
    return mean_over_processes(torch.tensor(float(flag), device=device)).item() > 0


def chosen_by_main(choose: Callable[[], Value]) -> Value:
    """The value of ``choose`` in the main process, on every process. Its UserError or OSError ends all of them.

    The main process alone reports it: the others raise SystemExit with exit code 2.
    """
    value: Value | None = None
    problem: UserError | OSError | None = None
    if is_main():
        try:
            value = choose()
        except (UserError, OSError) as error:
            problem = error
    value, refused = gather_objects((value, problem is not None))[0]
    if problem:
        raise problem
    if refused:
        sys.exit(2)
    return value  # type: ignore[return-value]  # None only if ``choose`` returned it


class StopPoll:
    """Whether any process has been asked to stop, for loops in which the processes do not wait for each other.

    ``requested`` is this process's own answer. The others learn of it through the store, at most once a second.
    """

    def __init__(self, requested: Callable[[], bool], interval_s: float = 1.0):
        self.requested, self.interval_s = requested, interval_s
        self.stopped, self.asked = False, -interval_s

    def __call__(self) -> bool:
        if rank_and_world()[1] == 1 or _store is None:
            return self.requested()
        if not self.stopped and self.requested():
            self.stopped = True
            with _reachable() as store:
                store.set('stop', 'requested')
        now = time.monotonic()
        if not self.stopped and now - self.asked >= self.interval_s:
            self.asked = now
            with _reachable() as store:
                self.stopped = store.check(['stop'])
        return self.stopped


@contextmanager
def _reachable() -> Iterator[dist.Store]:
    """The store, whose host may be gone: its processes then get a stop signal of their own."""
    assert _store is not None
    try:
        yield _store
    except RuntimeError as error:
        if not isinstance(error, dist.DistError):
            raise


def restarted() -> bool:
    """Whether ``torchrun`` restarted this run after losing a process."""
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))


def mean_over_processes(values: Tensor) -> Tensor:
    """Mean of every process's ``values``; no gradient."""
    world = rank_and_world()[1]
    if world > 1:
        values = values.clone()
        with reporting_lost_processes():
            dist.all_reduce(values)
        values /= world
    return values


class _Sum(torch.autograd.Function):
    """Differentiable sum over the processes: the gradient of a contribution is summed over all processes, too."""

    @staticmethod
    def forward(ctx, mine: Tensor) -> Tensor:
        total = mine.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


def whole_batch(share: Tensor) -> Tensor:
    """Concatenate the processes' shares, all of one size, in rank order, on every process; differentiable."""
    rank, world = rank_and_world()
    if world == 1:
        return share
    parts = [share if other == rank else torch.zeros_like(share) for other in range(world)]
    return _Sum.apply(torch.cat(parts))


class _SynchronisedBatchNorm(_BatchNorm):
    """Batch norm over equal shares of all processes on a CPU; PyTorch's own is CUDA only."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass  # the replaced layer was chosen for its input

    def forward(self, x: Tensor) -> Tensor:
        world = rank_and_world()[1]
        if not self.training or world == 1:
            return super().forward(x)
        with torch.autocast('cpu', enabled=False):
            return self._over_all_processes(x.float(), world).to(x.dtype)

    def _over_all_processes(self, x: Tensor, world: int) -> Tensor:
        others = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        mean = _Sum.apply(x.mean(others)) / world
        centred = x - mean.view(shape)
        variance = _Sum.apply(centred.square().mean(others)) / world
        with torch.no_grad():
            count = world * x.numel() / x.shape[1]
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None and self.momentum is not None
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale.view(shape) + self.bias.view(shape)


def synchronise_batch_norm(model: Network, device: torch.device) -> Network:
    """Replace the batch norms of ``model`` with ones that see the whole batch; parameters keep their names."""
    if device.type == 'cuda':
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def synchronised(norm: _BatchNorm) -> _SynchronisedBatchNorm:
        new = _SynchronisedBatchNorm(norm.num_features, norm.eps, norm.momentum)
        new.__dict__.update({key: norm.__dict__[key] for key in ('_parameters', '_buffers', 'training')})
        return new

    replace_modules(model, _BatchNorm, synchronised)
    return model
