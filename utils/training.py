"""The surroundings of a training loop: schedule, parameter groups, precision and logs."""

import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from yacs.config import CfgNode

from utils.errors import UserError
from utils.files import write_atomically

LOG_NAME = 'log.jsonl'
RATE_FACTOR = 'rate_factor'  # key of a parameter group: its learning rate as a multiple of TRAIN.LR


def learning_rate(step: int, *, total: int, base: float, warmup: int = 0, flat: float = 0.0) -> float:
    """Learning rate of step ``step`` (0-based): linear warm-up, then cosine to 0 at ``total``.

    flat: share of the steps after the warm-up that keep the full rate before the cosine begins.
    """
    if step < warmup:
        return base * (step + 1) / (warmup + 1)
    begin = warmup + round(flat * (total - warmup))
    return base * 0.5 * (1 + math.cos(math.pi * max(step - begin, 0) / max(total - begin, 1)))


def build_optimizer(model: nn.Module, cfg: CfgNode) -> torch.optim.AdamW:
    """AdamW on every parameter that is trained; ``set_learning_rate`` sets the rates of its groups.

    Without TRAIN.DECAY_ALL, norms, biases and position embeddings are not decayed; without TRAIN.DECAY_REGRESSORS,
    neither are the regressors: those of the stages contain an identity, the previous estimate, that decay shrinks.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        regressor = 'parameters_head.' in name or 'offset_head.' in name
        factor = cfg.TRAIN.BACKBONE_RATE if name.startswith('backbone.') else 1.0
        factor = cfg.TRAIN.REGRESSOR_RATE if regressor else factor
        plain = parameter.ndim <= 1 or name.endswith(('bias', 'position', 'neighbour_logits'))
        spared = (plain and not cfg.TRAIN.DECAY_ALL) or (regressor and not cfg.TRAIN.DECAY_REGRESSORS)
        groups.setdefault((not spared, factor), []).append(parameter)
    described = [
        {'params': parameters, 'weight_decay': cfg.TRAIN.WEIGHT_DECAY if decayed else 0.0, RATE_FACTOR: factor}
        for (decayed, factor), parameters in groups.items()
    ]
    return torch.optim.AdamW(described, lr=cfg.TRAIN.LR, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group: ``rate`` times the group's factor."""
    for group in optimizer.param_groups:
        group['lr'] = rate * group.get(RATE_FACTOR, 1.0)  # optimizer states of earlier versions have no factors


def set_float32_precision(precision: str) -> None:
    """Let CUDA run float32 matrices and convolutions in TF32 only if ``precision`` is 'tf32'."""
    tf32 = precision == 'tf32'
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast region in which the network runs at ``precision``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == 'bfloat16')


def compiled(module: nn.Module, device: torch.device) -> nn.Module:
    """``torch.compile``. Raises UserError where a CPU run lacks a C++ compiler."""
    compiler = os.environ.get('CXX') or ('clang++' if sys.platform == 'darwin' else 'g++')  # TorchInductor's choice
    if device.type == 'cpu' and not shutil.which(shlex.split(compiler)[0]):
        raise UserError(
            f'TRAIN.COMPILE needs a C++ compiler on a CPU, and {compiler} was not found. Install it (Debian: apt '
            'install g++), name another in the environment variable CXX, or leave TRAIN.COMPILE off.'
        )
    return cast(nn.Module, torch.compile(module))


class Waits:
    """Iterate over ``items`` and sum up the time spent waiting for them.

    while_waiting: a context for each wait.
    """

    def __init__(self, items: Iterable, while_waiting: Callable[[], AbstractContextManager] = nullcontext):
        self.items, self.while_waiting, self.seconds = items, while_waiting, 0.0

    def __iter__(self) -> Iterator:
        iterator, nothing = iter(self.items), object()
        while True:
            begin = time.perf_counter()
            with self.while_waiting():
                item = next(iterator, nothing)
            self.seconds += time.perf_counter() - begin
            if item is nothing:
                return
            yield item

    def since_last_asked(self) -> float:
        """Seconds waited since this was last called."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def read_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a log.jsonl with their records, but for truncated ones: a kill leaves one, and a resumed run
    appends after it. Raises UserError for a line that is not a training record."""
    records = []
    for line in path.read_text('utf-8', errors='replace').splitlines():
        if not (line.startswith('{') and line.endswith('}')):
            continue
        try:
            record = json.loads(line)
            valid = isinstance(record['kind'], str) and isinstance(record['step'], int)
        except (ValueError, KeyError, RecursionError):
            valid = False
        if not valid:
            raise UserError(f'{path} has a line that is not a training record ({line[:40]!r}). Remove it.')
        records.append((line, record))
    return records


class RunLog:
    """log.jsonl (one object per line) and TensorBoard in ``folder``.

    step: None for a new run, which discards what another left there. On resume, records after ``step`` are discarded,
    and with ``validation_due`` those of the validation at ``step``.
    """

    def __init__(self, folder: str | Path, *, step: int | None, validation_due: bool = False):
        self.path = Path(folder) / LOG_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        records = dict(read_records(self.path)) if self.path.exists() and step is not None else {}
        kept = {
            line: record
            for line, record in records.items()
            if step is None
            or record['step'] < step
            or (record['step'] == step and not (validation_due and record['kind'].startswith('val')))
        }
        write_atomically(self.path, ''.join(line + '\n' for line in kept).encode())
        # TensorBoard forgets everything from a step on, so that what is kept of that step is shown again.
        purge = 0 if step is None else step if validation_due else step + 1
        self.board = SummaryWriter(str(folder), purge_step=purge)
        for record in kept.values():
            if record['step'] >= purge:
                self._show(**record)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line, and its numbers to TensorBoard as scalars ``kind/name``."""
        with open(self.path, 'a') as file:
            file.write(json.dumps({'kind': kind, 'step': step, **values}) + '\n')
        self._show(kind, step, **values)

    def _show(self, kind: str, step: int, **values: Any) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.board.add_scalar(f'{kind}/{name}', value, step)

    def sync(self) -> None:
        """Wait until log.jsonl is on the disk: before a checkpoint, after which its records are not written again."""
        with suppress(FileNotFoundError), open(self.path, 'rb') as file:
            os.fsync(file.fileno())

    def picture(self, tag: str, picture: np.ndarray, step: int) -> None:
        """Show a sheet (H, W, 3) uint8 BGR in TensorBoard; as JPEG, thirty times faster than ``add_image``'s PNG."""
        height, width, channels = picture.shape
        image = Summary.Image(
            height=height,
            width=width,
            colorspace=channels,
            encoded_image_string=cv2.imencode('.jpg', picture)[1].tobytes(),
        )
        self.board._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def close(self) -> None:
        self.board.close()
