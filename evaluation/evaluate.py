"""Evaluate a network on a split: per-sample values of every metric, on one process or several."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset.batch import Batch, BatchMaker
from dataset.damage import Damage, refuse_damage, tolerated
from dataset.mixture import sample_ranges
from dataset.prepared import PreparedSplit
from evaluation.aggregation import Samples, choose_rows, concatenate
from evaluation.comparison import Comparison
from evaluation.metrics import JointRegressor, Protocol
from evaluation.penetration import PenetrationDepth
from evaluation.registry import METRICS, Metric, measured
from evaluation.summary import breakdown, summarise
from models.predictions import DIROutput
from utils import distributed
from utils.errors import UserError
from utils.training import autocast, set_float32_precision


class StoppedEarly(Exception):
    """A process was asked to stop during an evaluation; raised on all of them."""


class Evaluation(NamedTuple):
    """Per-sample values of the metrics, in the order of the split."""

    indices: Tensor  # (N,) sample numbers
    protocol: Protocol
    stages: list[Samples]  # the headline metrics of each stage, in ``protocol``
    details: Samples | None  # all metrics of the last stage
    grid: dict[Protocol, Samples]  # the headline metrics of the last stage, in other protocols
    metrics: tuple[Metric, ...]
    damage: tuple[Damage, ...] = ()  # samples that could not be read and were left out

    def summary(self, stage: int = -1) -> dict[str, Any]:
        """The headline figures of a stage."""
        return summarise(self.stages[stage], self.protocol, self.metrics)

    def summary_of(self, samples: range, stage: int = -1) -> dict[str, Any] | None:
        """``summary`` of those of ``samples`` that were evaluated; None if none of them was."""
        rows = ((self.indices >= samples.start) & (self.indices < samples.stop)).nonzero().flatten()
        if len(rows) == 0:
            return None
        return summarise(choose_rows(self.stages[stage], rows), self.protocol, self.metrics)

    def summary_of_sets(self, dataset: PreparedSplit) -> dict[str, dict[str, Any]]:
        """``summary_of`` each set of a mixture that had samples evaluated, by its folder; empty for a single set."""
        summaries = {folder: self.summary_of(samples) for folder, samples in sample_ranges(dataset).items()}
        return {folder: summary for folder, summary in summaries.items() if summary is not None}

    def report(self) -> dict[str, Any]:
        """Every figure of metrics.json. Raises ValueError if the details were not evaluated."""
        if self.details is None:
            raise ValueError('The report needs all metrics: evaluate with details=True.')
        report = self.summary() | breakdown(self.details, self.metrics)
        report['stages'] = [self.summary(stage) for stage in range(len(self.stages))]
        if self.grid:
            report['protocols'] = [
                summarise(samples, protocol, self.metrics) for protocol, samples in self.grid.items()
            ]
        return report


class JudgedBatch(NamedTuple):
    """The fields of ``Evaluation`` for one batch, or for one process's share."""

    indices: Tensor
    stages: list[Samples]
    details: Samples | None
    grid: list[Samples]


class Judge(nn.Module):
    """Measure the metrics of each sample of a batch.

    grid: further protocols for the headline metrics of the last stage. details: measure all metrics, not only the
    headline. annotated: sample numbers -> true joints, for protocols with annotated joints.
    """

    faces: Tensor

    def __init__(
        self,
        batch_maker: BatchMaker,
        *,
        network_root: int,
        protocol: Protocol,
        grid: tuple[Protocol, ...] = (),
        details: bool = False,
        annotated: Callable[[Tensor], Tensor] | None = None,
        metrics: tuple[Metric, ...] = METRICS,
    ):
        super().__init__()
        hands = batch_maker.hands
        self.network_root, self.protocol, self.grid, self.annotated = network_root, protocol, grid, annotated
        self.metrics, self.details = metrics, details
        self.regressor = JointRegressor(hands)
        self.penetration = PenetrationDepth(hands)
        self.register_buffer('faces', torch.from_numpy(hands.mesh_faces), persistent=False)

    def forward(self, output: DIROutput, batch: Batch) -> JudgedBatch:
        annotated = None
        if self.protocol.joints == 'annotated' and self.annotated is not None:  # without them, the metrics refuse
            annotated = self.annotated(batch.index.cpu()).to(batch.intrinsics)

        def comparison(protocol: Protocol, stage: int) -> Comparison:
            return Comparison(
                output,
                batch,
                protocol,
                network_root=self.network_root,
                regressor=self.regressor,
                penetration=self.penetration,
                faces=self.faces,
                stage=stage,
                annotated=annotated,
            )

        headline = tuple(metric for metric in self.metrics if metric.headline)
        stages = [comparison(self.protocol, stage) for stage in range(len(output.stages))]
        return JudgedBatch(
            indices=batch.index,
            stages=[measured(headline, stage) for stage in stages],
            details=measured(self.metrics, stages[-1]) if self.details else None,
            grid=[measured(headline, comparison(protocol, -1)) for protocol in self.grid],
        )


@torch.inference_mode()
def evaluate(
    model: Any,
    loader: DataLoader,
    batch_maker: BatchMaker,
    *,
    title: str = 'evaluate',
    precision: str = 'float32',
    tolerated_damage: float = 0.0,
    stopping: Callable[[], bool] = lambda: False,
    **judgement,
) -> Evaluation:
    """Evaluate every stage of ``model`` on ``loader`` (this process's share); the model's mode is restored.

    model: DIR or a module with its interface. precision: of the network, as EVAL.PRECISION. tolerated_damage: share of
    the samples that may be damaged and are left out. stopping: asked before each batch whether to raise StoppedEarly.
    judgement: keyword arguments of ``Judge``. Raises UserError naming the samples if more are damaged or a prediction
    is not finite.
    """
    set_float32_precision(precision)
    judge = Judge(batch_maker, **judgement).to(batch_maker.device)
    was_training = model.training
    model.eval()
    judged: list[JudgedBatch] = []
    damage: list[Damage] = []
    total = sum(distributed.gather_objects(len(loader.sampler)))  # type: ignore[arg-type]  # every sampler has a length
    folder = cast(PreparedSplit, loader.dataset).folder
    limit: dict[str, Any] = {'most': tolerated(tolerated_damage, total), 'samples': total, 'folder': folder}
    stopped = False
    for samples in tqdm(loader, desc=title, unit='batch', disable=not distributed.is_main(), leave=False):
        stopped = stopping()
        if stopped:
            break
        damage += samples.damage
        refuse_damage(damage, **limit)
        if not len(samples.index):
            continue
        batch = batch_maker(samples)
        image = model.preprocess.normalise(batch.image)
        with autocast(precision, image.device):
            output = model(image)
        _check_finite(output, batch, loader.dataset)
        judged.append(judge(output, batch))
    model.train(was_training)
    if distributed.any_process(stopped):
        raise StoppedEarly
    damage = sorted(one for part in distributed.gather_objects(damage) for one in part)
    refuse_damage(damage, **limit)
    return _gather(judged, judge)._replace(damage=tuple(damage))


def _check_finite(output: DIROutput, batch: Batch, dataset: Any) -> None:
    finite = output.stages[-1].finite
    for values in (output.presence, *(output.confidence or ())):
        finite = finite if values is None else finite & values.flatten(1).isfinite().all(1)
    if not bool(finite.all()):
        names = [dataset.name(i) for i in batch.index[~finite].tolist()]
        raise UserError(
            f'The network predicts NaN or infinity for {len(names)} samples, the first is {names[0]}: the '
            'checkpoint is damaged or its training diverged.'
        )


def _gather(judged: list[JudgedBatch], judge: Judge) -> Evaluation:
    """Merge the shares of all processes, every sample once, in the order of the split."""
    own = _merge(judged) if judged else None  # a process may have no share of a small split
    parts = [part for part in distributed.gather_objects(own) if part is not None]
    if not parts:
        raise UserError('There are no samples to evaluate.')
    merged = _merge(parts)
    order = merged.indices.argsort()
    return Evaluation(
        indices=merged.indices[order],
        protocol=judge.protocol,
        stages=[choose_rows(samples, order) for samples in merged.stages],
        details=None if merged.details is None else choose_rows(merged.details, order),
        grid={protocol: choose_rows(samples, order) for protocol, samples in zip(judge.grid, merged.grid)},
        metrics=judge.metrics,
    )


def _merge(parts: list[JudgedBatch]) -> JudgedBatch:
    details = [part.details for part in parts if part.details is not None]
    return JudgedBatch(
        indices=torch.cat([part.indices for part in parts]).cpu(),
        stages=[concatenate(list(samples)) for samples in zip(*(part.stages for part in parts))],
        details=concatenate(details) if details else None,
        grid=[concatenate(list(samples)) for samples in zip(*(part.grid for part in parts))],
    )
