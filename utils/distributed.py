"""One process or many under ``torchrun``: the same calls work in both."""

import os

import torch
import torch.distributed as dist

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
        raise UserError(f'DEVICE {name} cannot be used ({str(error).splitlines()[0]}): set it to auto or cpu, or check '
                        'the driver (nvidia-smi).') from None


def usable_cores() -> int:
    """Cores that this process may run on: fewer than the machine's in a container or under a job scheduler."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def start(device: str) -> torch.device:
    """Join the process group if ``torchrun`` started us; returns this process's device for DEVICE ``device``."""
    if 'RANK' in os.environ and not dist.is_initialized():
        use_cuda = device.startswith('cuda') or (device == 'auto' and torch.cuda.is_available())
        dist.init_process_group('nccl' if use_cuda else 'gloo')
        device = 'cuda' if use_cuda else device
    chosen = choose_device(device)
    if chosen.type == 'cuda':
        torch.cuda.set_device(chosen)
    return chosen


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
