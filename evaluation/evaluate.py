"""Run a network over a split and collect the errors of every sample, on one process or many."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset.batch import Batch, BatchMaker
from evaluation.metrics import (
    METRES_TO_MM,
    JointRegressor,
    Protocol,
    SampleDetails,
    SampleErrors,
    box_iou,
    concatenate,
    hand_distance,
    in_one_frame,
    procrustes_errors,
    sample_errors,
    segmentation_overlap,
    visible_shares,
)
from evaluation.penetration import PenetrationDepth
from evaluation.summary import breakdown, summarise
from models.placement import place_hands, placement_error
from models.predictions import CAMERA, DIROutput, HandPrediction
from utils import distributed
from utils.errors import UserError
from utils.geometry import project
from utils.training import autocast, set_float32_precision


class Evaluation(NamedTuple):
    """Errors of every sample, in the order of the split."""

    index: Tensor  # (N,) sample numbers
    protocol: Protocol
    stages: list[SampleErrors]  # of each stage, in ``protocol``
    details: SampleDetails | None  # of the last stage
    grid: dict[Protocol, SampleErrors]  # of the last stage, in other protocols

    def summary(self, stage: int = -1) -> dict:
        """The headline figures of a stage."""
        return summarise(self.stages[stage], self.protocol)

    def report(self) -> dict:
        """All that metrics.json holds of the errors; needs ``details``."""
        report = self.summary() | breakdown(self.stages[-1], self.details)
        report['stages'] = [self.summary(stage) for stage in range(len(self.stages))]
        if self.grid:
            report['protocols'] = [summarise(errors, protocol) for protocol, errors in self.grid.items()]
        return report


class Judge(nn.Module):
    """Output and truth of a batch -> errors of each sample."""

    def __init__(
        self,
        batch_maker: BatchMaker,
        *,
        network_root: int,
        protocol: Protocol,
        grid: tuple[Protocol, ...] = (),
        details: bool = False,
        annotated: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        hands = batch_maker.hands
        self.network_root, self.protocol, self.grid, self.annotated = network_root, protocol, grid, annotated
        self.regressor = JointRegressor(hands)
        self.penetration = PenetrationDepth(hands) if details else None
        self.register_buffer('faces', torch.from_numpy(hands.mesh_faces), persistent=False)

    def forward(
        self, output: DIROutput, batch: Batch
    ) -> tuple[list[SampleErrors], list[SampleErrors], SampleDetails | None]:
        """-> errors of each stage, of the last stage in each protocol of the grid, details of the last stage."""
        joints = None
        if self.protocol.joints == 'annotated':
            joints = self.annotated(batch.index.cpu()).to(batch.intrinsics)

        def errors(hands: HandPrediction, protocol: Protocol) -> SampleErrors:
            return sample_errors(
                self.regressor,
                hands.vertices,
                hands.offset,
                true_vertices=batch.target.vertices,
                intrinsics=batch.intrinsics,
                network_root=self.network_root,
                protocol=protocol,
                annotated=joints,
            )

        last = output.stages[-1]
        return (
            [errors(hands, self.protocol) for hands in output.stages],
            [errors(last, protocol) for protocol in self.grid],
            self._details(output, batch, joints) if self.penetration else None,
        )

    def _details(self, output: DIROutput, batch: Batch, joints: Tensor | None) -> SampleDetails:
        hands, true = output.stages[-1], batch.target.vertices
        depth = self.penetration(torch.cat([in_one_frame(hands.vertices, hands.offset), true])).chunk(2)
        placement = place_hands(hands.joints, hands.parameters[..., CAMERA], hands.offset, batch.intrinsics)
        return SampleDetails(
            *procrustes_errors(self.regressor, hands.vertices, true_vertices=true, true_joints=joints),
            box_iou(project(true, batch.intrinsics[:, None])),
            METRES_TO_MM * hand_distance(true),
            *(METRES_TO_MM * metres for metres in depth),
            visible_shares(true, batch.intrinsics, self.faces),
            *(
                METRES_TO_MM * metres
                for metres in placement_error(placement, batch.target.joints[:, :, self.network_root])
            ),
            *segmentation_overlap(output.segmentation, batch.target.segmentation),
        )


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    batch_maker: BatchMaker,
    *,
    title: str = 'evaluate',
    precision: str = 'float32',
    **judgement,
) -> Evaluation:
    """Errors of every stage of ``model`` over ``loader`` (this process's share of it); the model's mode is restored.

    precision: the network's, as EVAL.PRECISION. judgement: what ``Judge`` takes. Raises UserError if a prediction is
    not finite, naming the samples.
    """
    set_float32_precision(precision)
    judge = Judge(batch_maker, **judgement).to(batch_maker.device)
    was_training = model.training
    model.eval()
    indices, judged = [], []
    for samples in tqdm(loader, desc=title, unit='batch', disable=not distributed.is_main(), leave=False):
        batch = batch_maker(samples)
        image = model.preprocess.normalise(batch.image)
        with autocast(precision, image.device):
            output = model(image)
        _check_finite(output, batch, loader)
        indices.append(batch.index)
        judged.append(judge(output, batch))
    model.train(was_training)
    return _gather(indices, judged, judge)


def _check_finite(output: DIROutput, batch: Batch, loader: DataLoader) -> None:
    hands = output.stages[-1]
    finite = hands.vertices.flatten(1).isfinite().all(1) & hands.offset.isfinite().all(1)
    if not bool(finite.all()):
        names = [loader.dataset.name(i) for i in batch.index[~finite].tolist()]
        raise UserError(
            f'The network predicts NaN or infinity for {len(names)} samples, the first is {names[0]}: the '
            'checkpoint is damaged or its training diverged.'
        )


def _gather(indices: list[Tensor], judged: list[tuple], judge: Judge) -> Evaluation:
    """Put the shares of all processes together, every sample once, in the order of the split."""
    mine = None
    if indices:  # a process may have no share of a small split
        stages, grid, details = zip(*judged)
        mine = (
            torch.cat(indices).cpu(),
            _columns(stages),
            _columns(grid),
            concatenate(list(details)) if details[0] else None,
        )
    parts = [part for part in distributed.gather_objects(mine) if part is not None]
    if not parts:
        raise UserError('There are no samples to evaluate.')
    index, stages, grid, details = zip(*parts)
    index = torch.cat(index)
    order = index.argsort()

    def ordered(table: NamedTuple) -> NamedTuple:
        return type(table)(*(values[order] for values in table))

    return Evaluation(
        index[order],
        judge.protocol,
        [ordered(table) for table in _columns(stages)],
        ordered(concatenate(list(details))) if details[0] else None,
        dict(zip(judge.grid, [ordered(table) for table in _columns(grid)])),
    )


def _columns(parts: tuple[list[SampleErrors], ...]) -> list[SampleErrors]:
    """Batches (or processes) of the same tables -> each table whole."""
    return [concatenate(list(column)) for column in zip(*parts)]
