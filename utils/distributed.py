"""One process or many under ``torchrun``: the same calls work in both.

The gradient of a run is the mean of the processes' gradients (DistributedDataParallel), so that a loss which is a mean
over samples needs nothing here. What mixes the samples of a batch does: batch norms and losses over all pixels.
"""

import ctypes
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.errors import UserError


def choose_device(name: str) -> torch.device:
    """DEVICE 'auto', 'cpu', 'cuda' or 'cuda:N' -> a device that works; raises UserError if it does not."""
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
    """Cores that this process may run on: fewer than the machine's in a container or under a job scheduler."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def start(device: str) -> torch.device:
    """Join the process group if ``torchrun`` started us; returns this process's device for DEVICE ``device``."""
    if 'RANK' in os.environ and not dist.is_initialized():
        use_cuda = device.startswith('cuda') or (device == 'auto' and torch.cuda.is_available())
        store, rank, world = next(dist.rendezvous('env://'))
        # Processes that are started again must not find the addresses of those that are gone.
        store = dist.PrefixStore(f'start_{_restarts()}', store)
        dist.init_process_group('nccl' if use_cuda else 'gloo', store=store, rank=rank, world_size=world)
        device = 'cuda' if use_cuda else device
    chosen = choose_device(device)
    if chosen.type == 'cuda':
        torch.cuda.set_device(chosen)
    else:
        keep_freed_memory()
    return chosen


def keep_freed_memory() -> None:
    """Let the C library keep large blocks that are freed, where it is glibc.

    It gives them back to the system at once; the next operation's result then comes as fresh pages, each of which the
    system has to clear. On the large, short-lived tensors of a CPU run that can cost as much as the arithmetic.
    """
    trim_threshold, mmap_max = -1, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(trim_threshold, -1)  # never
    mallopt(mmap_max, 0)  # no block of its own, which would be unmapped when it is freed


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank_and_world()[0] == 0


def gather_objects(part) -> list:
    """``part`` of every process, in rank order, on every process."""
    world = rank_and_world()[1]
    if world == 1:
        return [part]
    parts = [None] * world
    dist.all_gather_object(parts, part)
    return parts


def any_process(flag: bool) -> bool:
    """Whether ``flag`` holds on any process: all must leave a loop together."""
    return any(gather_objects(flag))


def restarted() -> bool:
    """Whether ``torchrun`` started us again after a process of this run was lost."""
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))


def mean_over_processes(values: Tensor) -> Tensor:
    """Mean of a tensor that every process has one of; without gradient."""
    world = rank_and_world()[1]
    if world > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= world
    return values


class _Sum(torch.autograd.Function):
    """Sum over the processes, with gradient: each contribution's is the sum of what all processes do with the sum."""

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
    """Every process's share, all of one size, in rank order, on each of them; differentiable."""
    rank, world = rank_and_world()
    if world == 1:
        return share
    parts = [share if other == rank else torch.zeros_like(share) for other in range(world)]
    return _Sum.apply(torch.cat(parts))


class _SynchronisedBatchNorm(_BatchNorm):
    """Batch norm over the shares of all processes, which must be equal, for a CPU; on CUDA PyTorch has one."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass  # the layer in whose place it is was chosen for its input

    def forward(self, x: Tensor) -> Tensor:
        world = rank_and_world()[1]
        if not self.training or world == 1:
            return super().forward(x)
        others = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        mean = _Sum.apply(x.mean(others)) / world
        centred = x - mean.view(shape)
        variance = _Sum.apply(centred.square().mean(others)) / world
        with torch.no_grad():
            count = world * x.numel() / x.shape[1]
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale.view(shape) + self.bias.view(shape)


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Replace the batch norms of ``model`` by ones that see the whole batch; parameters and their names stay."""
    if device.type == 'cuda':
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, _BatchNorm):
                new = _SynchronisedBatchNorm(norm.num_features, norm.eps, norm.momentum)
                new.__dict__.update({key: norm.__dict__[key] for key in ('_parameters', '_buffers', 'training')})
                setattr(parent, name, new)
    return model
