"""Run a network over a split and collect the errors of every sample, on one process or many."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset.batch import Batch, BatchMaker
from models.predictions import DIROutput
from utils import distributed
from utils.errors import UserError
from utils.metrics import JointRegressor, Protocol, SampleErrors, concatenate, sample_errors, summarise


class Evaluation(NamedTuple):
    """Errors of every sample, in the order of the split, for each stage."""

    index: Tensor  # (N,) sample numbers
    stages: list[SampleErrors]
    protocol: Protocol

    def summary(self, stage: int = -1) -> dict:
        return summarise(self.stages[stage], self.protocol)


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader, batch_maker: BatchMaker, *, network_root: int, protocol: Protocol,
             title: str = 'evaluate') -> Evaluation:
    """Errors of every stage of ``model`` over ``loader`` (this process's share of it); the model's mode is restored.

    Raises UserError if a prediction is not finite, naming the samples.
    """
    regressor = JointRegressor(batch_maker.hand_layer.models).to(batch_maker.mean.device)
    was_training = model.training
    model.eval()
    indices, errors = [], []
    for samples in tqdm(loader, desc=title, unit='batch', disable=not distributed.is_main(), leave=False):
        batch = batch_maker(samples)
        output = model(batch.image)
        _check_finite(output, batch, loader)
        indices.append(batch.index)
        errors.append([sample_errors(regressor, hands.vertices, hands.offset, true_vertices=batch.target.vertices,
                                     intrinsics=batch.intrinsics, network_root=network_root, protocol=protocol)
                       for hands in output.stages])
    model.train(was_training)
    return _gather(torch.cat(indices).cpu(), [concatenate(list(stage)) for stage in zip(*errors)], protocol)


def _check_finite(output: DIROutput, batch: Batch, loader: DataLoader) -> None:
    hands = output.stages[-1]
    finite = hands.vertices.flatten(1).isfinite().all(1) & hands.offset.isfinite().all(1)
    if not bool(finite.all()):
        names = [loader.dataset.name(i) for i in batch.index[~finite].tolist()]
        raise UserError(f'The network predicts NaN or infinity for {len(names)} samples, the first is {names[0]}: the '
                        'checkpoint is damaged or its training diverged.')


def _gather(index: Tensor, stages: list[SampleErrors], protocol: Protocol) -> Evaluation:
    """Put the shares of all processes together, every sample once, in the order of the split."""
    parts = distributed.gather_objects((index, stages))
    index = torch.cat([part[0] for part in parts])
    order = index.argsort()
    merged = [concatenate([part[1][stage] for part in parts]) for stage in range(len(stages))]
    return Evaluation(index[order], [SampleErrors(*(values[order] for values in stage)) for stage in merged], protocol)
