"""Validation during training: figures of every stage and pictures, written to the run's log."""

import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from torch import Tensor
from tqdm import tqdm
from yacs.config import CfgNode

from dataset import PreparedSplit
from dataset.batch import BatchMaker
from dataset.loader import evaluation_loader
from evaluation.aggregation import Samples
from evaluation.evaluate import Evaluation, StoppedEarly, evaluate
from evaluation.metrics import Protocol
from evaluation.pictures import draw_sheets, spread_over
from evaluation.summary import format_damage
from models import DIR
from utils import distributed
from utils.drawing import write_image
from utils.hand import SIDES
from utils.training import RunLog

LOGGED_FIGURES = ('joint_mm', 'vert_mm', 'joint_px', 'vert_px')


def validate(
    model: DIR,
    dataset: PreparedSplit,
    batch_maker: BatchMaker,
    cfg: CfgNode,
    *,
    epoch: int,
    step: int,
    log: RunLog | None,
    stopping: Callable[[], bool],
) -> dict:
    """Evaluate ``model`` on a split in the training's own protocol -> the headline figures of the last stage.

    With several data sets, 'sets' holds the same figures of each, by its folder.

    log: where figures, histograms and pictures go, all of them at the end; None on processes that do not write.
    stopping: asked before each batch and after drawing whether to raise StoppedEarly. Every process of a
    distributed run takes part. Raises UserError if a prediction is not finite.
    """
    with closing(evaluation_loader(dataset, cfg)) as loader:
        result = evaluate(
            model,
            loader,
            batch_maker,
            network_root=cfg.ROOT_JOINT,
            protocol=Protocol(cfg.ROOT_JOINT, scale=True),
            title='validate',
            precision=cfg.EVAL.PRECISION,
            tolerated_damage=cfg.DATASET.TOLERATED_DAMAGE,
            stopping=stopping,
        )
    sheets = {}
    if log and cfg.TRAIN.PICTURES:
        shown = result.indices[spread_over(len(result.indices), cfg.TRAIN.PICTURES)].tolist()
        sheets = draw_sheets(model, dataset, shown, batch_maker)
    if distributed.any_process(stopping()):  # drawing takes a while, in one of the processes
        raise StoppedEarly
    if log:
        _log_figures(log, result, epoch=epoch, step=step)
        if sheets:
            # Every sheet goes to TensorBoard, predictions beside the truth to the run folder as well.
            write_image(Path(cfg.OUTPUT_DIR) / 'pictures' / f'epoch_{epoch:03d}.jpg', sheets['validation'])
            for name, sheet in sheets.items():
                log.picture(name, sheet, step)
    sets = result.summary_of_sets(dataset)
    for number, (folder, summary) in enumerate(sets.items()):
        if log:  # one kind per set: a tag of TensorBoard holds the values of one of them
            figures = _scalars(summary)
            log.write(f'val_set{number}', step, epoch=epoch, set=folder, frames=summary['frames'], **figures)
    return result.summary() | ({'sets': sets} if sets else {})


def _log_figures(log: RunLog, result: Evaluation, *, epoch: int, step: int) -> None:
    if result.damage:
        files = [one.file for one in result.damage]
        log.write('val_damage', step, epoch=epoch, damaged=len(files), files=files)
        tqdm.write(format_damage(result.damage).rstrip())
    for stage, errors in enumerate(result.stages):
        summary = result.summary(stage)
        log.write(f'val_stage{stage}', step, epoch=epoch, **_scalars(summary))
        for name, values in _errors_of_samples(errors).items():
            # A tag holds values of one kind only, and the scalars own the plain names.
            values = values[values.isfinite()]
            if len(values):  # of a hand that no frame shows, there are none
                log.board.add_histogram(f'val_stage{stage}/{name}_samples', values, step)


def _scalars(summary: dict) -> dict[str, float]:
    """The figures of a record; without those of hands that no frame shows."""
    sides = {f'{name}_{side}': value for name in LOGGED_FIGURES for side, value in summary[name].items()}
    return {name: value for name, value in ({'root_mm': summary['root_mm']} | sides).items() if math.isfinite(value)}


def _errors_of_samples(errors: Samples) -> dict[str, Tensor]:
    """{name: (N,) mm} for the histograms."""
    hands = {
        f'{name}_{side}': errors[name][:, hand] for name in ('joint_mm', 'vert_mm') for hand, side in enumerate(SIDES)
    }
    return hands | {'root_mm': errors['root_mm']}
