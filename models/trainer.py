"""One update at a time: a network, its objective, its optimizer and the moving average of its weights."""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from yacs.config import CfgNode

from manopth import HandPair
from models import DIR, build_criterion, build_model
from models.checkpoint import load_state, to_device
from models.criterion import objective
from models.initial_weights import InitialWeights, check_not_own_output, load_initial_weights, needs_imagenet
from models.predictions import Target
from utils import distributed
from utils.seeds import seed_of
from utils.training import autocast, build_optimizer, compiled, set_float32_precision, set_learning_rate


class NonFiniteLossError(Exception):
    """The loss, or a gradient of a finite loss, is NaN or infinite; the weights are untouched.

    what: 'loss' or 'gradient'. terms: those of the whole batch. here: whether samples of this process may be the cause.
    """

    def __init__(self, what: str, terms: dict[str, float], *, here: bool):
        super().__init__(what, terms)
        self.what, self.terms, self.here = what, terms, here


class Update(NamedTuple):
    """What a step reports."""

    terms: dict[str, float]  # loss terms of the whole batch
    stop: bool  # whether any process was asked to stop; the same on all of them


def recompute_as_configured(model: DIR, cfg: CfgNode) -> None:
    """Save the memory that TRAIN.CHECKPOINT or TRAIN.RECOMPUTE_NORMS ask for."""
    if cfg.TRAIN.CHECKPOINT:
        model.recompute_activations()
    elif cfg.TRAIN.RECOMPUTE_NORMS:
        model.recompute_norms()


class Trainer:
    """The network in training. Build it after ``utils.distributed.start`` has joined the other processes, if any.

    model: the network itself, which checkpoints hold; parallel: the same, compiled and wrapped for several processes.
    whole: whether the state is that of a finished step, which may be saved. It is after a failure, too, except in the
    middle of an update.
    """

    def __init__(self, cfg: CfgNode, hands: HandPair, device: torch.device, *, pretrained: bool | None = None):
        """pretrained: overrides MODEL.PRETRAINED; False skips TRAIN.INIT_FROM too. New weights depend on SEED only."""
        self.cfg, self.device = cfg, device
        world = distributed.rank_and_world()[1]
        torch.manual_seed(cfg.SEED)
        self.initial_weights: InitialWeights | None = None  # where they come from, if from TRAIN.INIT_FROM
        init_from, without = cfg.TRAIN.INIT_FROM, cfg.TRAIN.INIT_WITHOUT
        if init_from and pretrained is not False:
            check_not_own_output(init_from, cfg.OUTPUT_DIR)
            model = build_model(cfg, hands, pretrained=None if needs_imagenet(without) else False)
            self.initial_weights = load_initial_weights(model, init_from, without=without, hands=hands)
        else:
            model = build_model(cfg, hands, pretrained=pretrained)
        model.backbone.freeze(cfg.TRAIN.FROZEN_LAYERS)
        recompute_as_configured(model, cfg)
        self.model: DIR = to_device(model, device)
        if world > 1 and cfg.TRAIN.SYNC_BN:
            self.model = distributed.synchronise_batch_norm(self.model, device)
        self.average = None
        if cfg.TRAIN.EMA:
            self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(cfg.TRAIN.EMA))
        self.parallel: nn.Module = self.model
        if world > 1:
            every_weight_is_used = cfg.MODEL.DENSE_HEADS and all(cfg.LOSS.WEIGHT.values())
            self.parallel = DistributedDataParallel(
                self.model, [device] if device.type == 'cuda' else None, find_unused_parameters=not every_weight_is_used
            )
        if cfg.TRAIN.COMPILE:
            self.parallel = compiled(self.parallel, device)
        self.criterion = build_criterion(cfg, hands).to(device)
        self.optimizer = build_optimizer(self.model, cfg)
        norms = [module for module in self.model.modules() if isinstance(module, _BatchNorm)]
        # A forward pass changes these, so that a step that fails before its update has to restore them.
        self.statistics = [buffer for norm in norms for buffer in norm.buffers()]
        self.statistics_before = [buffer.clone() for buffer in self.statistics]
        self.whole = True

    @property
    def result(self) -> DIR:
        """The network that is validated and kept as the best: the moving average where there is one."""
        return cast(DIR, self.average.module) if self.average else self.model

    def train(self) -> None:
        """Enter training mode, also after a validation in another precision."""
        self.parallel.train()
        set_float32_precision(self.cfg.TRAIN.PRECISION)

    def step(
        self,
        batches: Iterable[tuple[Tensor, Target]],
        *,
        number: int,
        count: int,
        rate: float,
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> Update:
        """One update from a batch that arrives in ``count`` equal parts.

        batches: (image (B, 3, s, s) BGR in [0, 255], target) of each part, one at a time. number: finished steps of the
        run; seeds what layers draw (stochastic depth), so that a resumed run draws the same. rate:
        learning rate. asked_to_stop: of this process; all processes learn each other's answer with the loss terms.
        Raises NonFiniteLossError, on every process alike, before the weights change.
        """
        torch._foreach_copy_(self.statistics_before, self.statistics)
        try:
            update = self.gradients(batches, number=number, count=count, rate=rate, asked_to_stop=asked_to_stop)
        except Exception:
            torch._foreach_copy_(self.statistics, self.statistics_before)
            raise
        self.whole = False
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.model)
        self.whole = True
        return update

    def gradients(
        self,
        batches: Iterable[tuple[Tensor, Target]],
        *,
        number: int,
        count: int,
        rate: float,
        asked_to_stop: Callable[[], bool],
    ) -> Update:
        """The first half of ``step``: everything that can fail, without a change of weights."""
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        parts, rank = [], distributed.rank_and_world()[0]
        for part, (image, target) in enumerate(batches, 1):
            torch.manual_seed(seed_of(self.cfg.SEED, number, part, rank))
            parts.append(self.accumulate(image, target, share=1 / count, last=part == count))
        mine = torch.stack([torch.stack(list(terms.values())) for terms in parts]).mean(0)
        # The device is waited for once a step. All processes see the same numbers, so all of them go on or none.
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        norm_and_stop = torch.stack([norm, norm.new_tensor(float(asked_to_stop()))])  # the norm is the same everywhere
        *values, size, stop = distributed.mean_over_processes(torch.cat([mine, norm_and_stop])).tolist()
        terms = dict(zip(parts[0], values))
        if not math.isfinite(sum(values)):
            raise NonFiniteLossError('loss', terms, here=not bool(mine.isfinite().all()))
        if not math.isfinite(size):
            raise NonFiniteLossError('gradient', terms, here=True)
        if self.cfg.TRAIN.CLIP_NORM > 0:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.cfg.TRAIN.CLIP_NORM, norm)
        return Update(terms, stop > 0)

    def accumulate(self, image: Tensor, target: Target, *, share: float = 1.0, last: bool = True) -> dict[str, Tensor]:
        """Add the gradients of a part of a batch -> its loss terms. Processes exchange gradients with the last part."""
        in_sync = last or distributed.rank_and_world()[1] == 1
        with nullcontext() if in_sync else cast(DistributedDataParallel, self.parallel).no_sync():
            normalised = self.model.preprocess.normalise(image)
            with autocast(self.cfg.TRAIN.PRECISION, self.device):
                output = self.parallel(normalised)
            terms = self.criterion(output, target)
            (share * objective(terms)).backward()
        return {name: value.detach() for name, value in terms.items()}

    def state(self) -> dict[str, Any]:
        """What an exact resume needs besides the network itself."""
        average = {'average': self.average.state_dict()} if self.average else {}
        return {'optimizer': self.optimizer.state_dict(), **average}

    def load(self, content: dict[str, Any], *, path: Any) -> None:
        """Restore the network and ``state`` from a checkpoint's content. Raises UserError where it does not fit."""
        load_state(self.model, content['model'], path=path)
        self.optimizer.load_state_dict(content['optimizer'])
        if self.average:
            self.average.load_state_dict(content['average'])
