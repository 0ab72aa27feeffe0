"""Train DIR.

python train.py                                      # the published recipe, configs/dir_interhand.yaml
python train.py --cfg configs/demo.yaml TRAIN.LR 1e-3
python train.py --resume                             # go on exactly where the run stopped
torchrun --nproc_per_node 4 train.py                 # several GPUs; TRAIN.BATCH_SIZE is over all of them
torchrun --max-restarts 3 --nproc_per_node 4 train.py    # a lost process costs what was done since the last save
"""

import argparse
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from yacs.config import CfgNode

from dataset.batch import BatchMaker, build_batch_maker, parts_of
from dataset.hand_model_record import check_hand_model_record
from dataset.loader import EpochSampler, evaluation_loader, evaluation_split, training_loader
from dataset.prepared import PreparedSplit, Sample
from evaluation.evaluate import Evaluation, evaluate
from evaluation.metrics import Protocol, SampleErrors
from evaluation.pictures import draw_sheets, spread_over
from models import build_criterion, build_model
from models.checkpoint import check_hand_model, load_state, read_checkpoint, save_checkpoint, to_device, to_plain
from models.hands import load_hands
from utils import distributed
from utils.config import add_config_arguments, flatten, load_config
from utils.drawing import write_image
from utils.errors import UserError, user_facing
from utils.hand import SIDES
from utils.training import (
    RunLog,
    StopRequest,
    Waits,
    autocast,
    build_optimizer,
    compiled,
    learning_rate,
    set_float32_precision,
)

# Keys that may change when a run is resumed: none of them changes what is learned.
FREE_KEYS = (
    'DEVICE',
    'OUTPUT_DIR',
    'DATASET.PATH',
    'MANO.PATH',
    'MODEL.PRETRAINED',
    'MODEL.BACKBONE_WEIGHTS',
    'EVAL.BATCH_SIZE',
    'EVAL.PRECISION',
    'TRAIN.COMPILE',
    'TRAIN.WORKERS',
    'EVAL.WORKERS',
    'TRAIN.SAVE_EVERY',
    'TRAIN.LOG_EVERY',
    'TRAIN.PICTURES',
)
SUMMARY_FIGURES = ('joint_mm', 'vert_mm', 'joint_px', 'vert_px')


class Training(NamedTuple):
    """Everything that a run is made of."""

    cfg: CfgNode
    model: nn.Module  # the network itself, what checkpoints hold
    parallel: nn.Module  # the same, compiled and wrapped where there are several processes
    average: AveragedModel | None  # moving average of its weights
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    batch_maker: BatchMaker
    loader: torch.utils.data.DataLoader
    sampler: EpochSampler
    validation: PreparedSplit | None  # None: the data set has no split val
    hand_model: str

    @property
    def device(self) -> torch.device:
        return self.batch_maker.device

    @property
    def result(self) -> nn.Module:
        """What is validated and kept as the best."""
        return self.average.module if self.average else self.model

    @property
    def folder(self) -> Path:
        return Path(self.cfg.OUTPUT_DIR)

    @property
    def total_steps(self) -> int:
        return self.sampler.steps * self.cfg.TRAIN.EPOCHS


@dataclass
class Progress:
    """Where a run stands: what a resumed one goes on from, next to weights and optimizer."""

    epoch: int = 0  # epochs done
    step: int = 0  # steps done of the next one
    best: float = math.inf  # mm: lowest validation joint error so far
    seconds: float = 0.0  # spent on it, over all sessions, validation included

    def __post_init__(self):
        self._since = time.perf_counter()

    def tick(self) -> None:
        """Count the time since the last call."""
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now


@user_facing
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser, default='configs/dir_interhand.yaml')
    parser.add_argument('--resume', action='store_true', help='go on from OUTPUT_DIR/latest.pth')
    args = parser.parse_intermixed_args(argv)
    cfg = load_config(args.cfg, args.opts)
    latest = Path(cfg.OUTPUT_DIR) / 'latest.pth'
    resuming = args.resume or (distributed.restarted() and latest.exists())
    if not resuming and latest.exists():
        raise UserError(
            f'{latest.parent} already holds a run: add --resume to go on with it, or choose another OUTPUT_DIR.'
        )
    device = distributed.start(cfg.DEVICE)
    try:
        run = build_training(cfg, device, fresh=not resuming)
        return fit(run, resume(run, latest) if resuming else Progress())
    finally:
        distributed.stop()


def build_training(cfg: CfgNode, device: torch.device, *, fresh: bool) -> Training:
    hand_models = load_hands(cfg.MANO.SOURCE, cfg.MANO.PATH)
    check_hand_model_record(cfg.DATASET.PATH, hand_models)
    loader, sampler = training_loader(cfg)
    validation = validation_split(cfg)  # now, not after the first epoch, it should turn out that it cannot be read
    torch.manual_seed(cfg.SEED)
    model = build_model(cfg, hand_models, pretrained=None if fresh else False)
    model = to_device(model, device)
    if distributed.rank_and_world()[1] > 1 and cfg.TRAIN.SYNC_BN:
        model = distributed.synchronise_batch_norm(model, device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg.TRAIN.EMA)) if cfg.TRAIN.EMA else None
    return Training(
        cfg,
        model,
        parallelised(model, cfg, device),
        average,
        build_criterion(cfg, hand_models).to(device),
        build_optimizer(model, cfg),
        build_batch_maker(cfg, hand_models).to(device),
        loader,
        sampler,
        validation,
        hand_models.identity,
    )


def parallelised(model: nn.Module, cfg: CfgNode, device: torch.device) -> nn.Module:
    """The network as it is called in training: over all processes, compiled if TRAIN.COMPILE."""
    parallel = model
    if distributed.rank_and_world()[1] > 1:
        unused = not (cfg.MODEL.DENSE_HEADS and all(cfg.LOSS.WEIGHT.values()))
        parallel = DistributedDataParallel(
            model, [device] if device.type == 'cuda' else None, find_unused_parameters=unused
        )
    return compiled(parallel, device) if cfg.TRAIN.COMPILE else parallel


def validation_split(cfg: CfgNode) -> PreparedSplit | None:
    if not (Path(cfg.DATASET.PATH) / 'val').exists():
        if distributed.is_main():
            print(f'{cfg.DATASET.PATH} has no split val: nothing is validated, and best.pth is the last epoch.')
        return None
    return evaluation_split(cfg, 'val')


def fit(run: Training, progress: Progress) -> int:
    """The epoch loop; returns the exit code."""
    cfg, stop, steps_done = run.cfg, StopRequest(), progress.epoch * run.sampler.steps + progress.step
    log = RunLog(run.folder, step=steps_done) if distributed.is_main() else None
    with tqdm(total=run.total_steps, initial=steps_done, unit='step', mininterval=1, disable=log is None) as bar:
        while progress.epoch < cfg.TRAIN.EPOCHS:
            bar.set_description(f'epoch {progress.epoch + 1}/{cfg.TRAIN.EPOCHS}')
            if not train_one_epoch(run, progress, stop=stop, log=log, bar=bar):
                save_latest(run, progress)
                bar.write(f'stopped after step {progress.step} of epoch {progress.epoch + 1}; --resume goes on there.')
                return 130
            progress.epoch, progress.step = progress.epoch + 1, 0
            if run.validation is None:
                save_best(run, progress)
            elif progress.epoch % cfg.TRAIN.VALIDATE_EVERY == 0 or progress.epoch == cfg.TRAIN.EPOCHS:
                figure = validate(run, progress.epoch, log=log, bar=bar)
                progress.tick()
                if figure < progress.best:
                    progress.best = figure
                    save_best(run, progress)
            save_latest(run, progress)
    if log:
        log.close()
        figure = '' if run.validation is None else f', validation joint error {progress.best:.2f} mm'
        print(f'done: {run.folder / "best.pth"}{figure}')
    return 0


def train_one_epoch(run: Training, progress: Progress, *, stop: StopRequest, log: RunLog | None, bar: tqdm) -> bool:
    """Train the epoch that ``progress`` points at, from its step on; False if it was asked to stop on the way."""
    cfg = run.cfg
    run.parallel.train()
    set_float32_precision(cfg.TRAIN.PRECISION)
    run.sampler.start_at(progress.epoch, progress.step)
    logged_at, logged_step = time.perf_counter(), progress.step
    waits = Waits(run.loader)
    for samples in waits:
        global_step = progress.epoch * run.sampler.steps + progress.step
        rate = learning_rate(global_step, total=run.total_steps, base=cfg.TRAIN.LR, warmup=cfg.TRAIN.WARMUP_STEPS)
        terms = train_step(run, samples, rate)
        progress.step += 1
        progress.tick()

        if log and progress.step % cfg.TRAIN.LOG_EVERY == 0:
            seconds = time.perf_counter() - logged_at
            speed = (progress.step - logged_step) * cfg.TRAIN.BATCH_SIZE / seconds
            logged_at, logged_step = time.perf_counter(), progress.step
            log.write(
                'train',
                global_step + 1,
                epoch=progress.epoch,
                lr=rate,
                samples_per_second=round(speed, 2),
                waiting_for_data=round(waits.since_last_asked() / seconds, 4),
                total=sum(terms.values()),
                **terms,
            )
            bar.set_postfix(loss=f'{sum(terms.values()):.3f}', refresh=False)
        bar.update()
        if asked_to_stop(stop, progress.step, cfg):
            return False
        if progress.step % cfg.TRAIN.SAVE_EVERY == 0 and progress.step < run.sampler.steps:
            save_latest(run, progress)
    return True


def train_step(run: Training, samples: Sample, rate: float) -> dict[str, float]:
    """One update; returns the loss terms of the whole batch. Raises UserError, before it touches the weights, on a
    non-finite loss."""
    for group in run.optimizer.param_groups:
        group['lr'] = rate
    run.optimizer.zero_grad(set_to_none=True)
    parts = parts_of(samples, len(samples.index) // run.cfg.TRAIN.ACCUMULATE)
    of_parts = [accumulate(run, part, share=1 / len(parts), last=part is parts[-1]) for part in parts]
    mine = torch.stack([torch.stack(list(terms.values())) for terms in of_parts]).mean(0)
    # One wait for the device a step. All processes see the same numbers, so all of them go on or none.
    terms = dict(zip(of_parts[0], distributed.mean_over_processes(mine).tolist()))
    if not math.isfinite(sum(terms.values())):
        refuse(run, samples, terms, mine)
    if run.cfg.TRAIN.CLIP_NORM > 0:
        nn.utils.clip_grad_norm_(run.model.parameters(), run.cfg.TRAIN.CLIP_NORM)
    run.optimizer.step()
    if run.average:
        run.average.update_parameters(run.model)
    return terms


def accumulate(run: Training, samples: Sample, *, share: float, last: bool) -> dict[str, Tensor]:
    """Add the gradients of a part of a batch; returns its loss terms. Processes exchange theirs with the last one."""
    batch = run.batch_maker(samples)
    image = run.model.preprocess.normalise(batch.image)
    exchange = last or distributed.rank_and_world()[1] == 1
    with nullcontext() if exchange else run.parallel.no_sync():
        with autocast(run.cfg.TRAIN.PRECISION, run.device):
            output = run.parallel(image)
        terms = run.criterion(output, batch.target)
        (share * sum(terms.values())).backward()
    return {name: value.detach() for name, value in terms.items()}


def refuse(run: Training, samples: Sample, terms: dict[str, float], mine: Tensor) -> None:
    """Raises UserError with the terms and, on the processes where they arose, the samples of a non-finite loss."""
    names = 'those of another process'
    if not torch.isfinite(mine).all():
        names = ', '.join(run.loader.dataset.name(index) for index in samples.index.tolist())
    raise UserError(
        'The loss is not finite; the run stops and its last checkpoint is kept.\n'
        f'terms: {", ".join(f"{name} {value:.4g}" for name, value in terms.items())}\nsamples: {names}\n'
        'A smaller TRAIN.LR or TRAIN.CLIP_NORM 1 often helps; --resume goes on from the last checkpoint.'
    )


def asked_to_stop(stop: StopRequest, step: int, cfg: CfgNode) -> bool:
    """All processes must leave together; asking each other costs a round trip, so they do it only now and then."""
    if distributed.rank_and_world()[1] == 1:
        return stop.requested
    return step % cfg.TRAIN.LOG_EVERY == 0 and distributed.any_process(stop.requested)


def validate(run: Training, epoch: int, *, log: RunLog | None, bar: tqdm) -> float:
    """Figures of every stage on the validation split, and pictures; returns the one that ``best`` is chosen by."""
    cfg, step, dataset = run.cfg, epoch * run.sampler.steps, run.validation
    result = evaluate(
        run.result,
        evaluation_loader(dataset, cfg),
        run.batch_maker,
        network_root=cfg.ROOT_JOINT,
        protocol=Protocol(cfg.ROOT_JOINT, scale=True),
        title='validate',
        precision=cfg.EVAL.PRECISION,
    )
    summary = result.summary()
    if log:
        log_validation(log, result, step, epoch)
        if cfg.TRAIN.PICTURES:
            log_pictures(run, log, step, epoch)
        bar.write(
            f'epoch {epoch}: validation joint {summary["joint_mm"]["all"]:.2f} mm, vert '
            f'{summary["vert_mm"]["all"]:.2f} mm, root {summary["root_mm"]:.2f} mm'
        )
    return summary['joint_mm']['all']


def log_validation(log: RunLog, result: Evaluation, step: int, epoch: int) -> None:
    for stage in range(len(result.stages)):
        summary = result.summary(stage)
        figures = {f'{name}_{side}': value for name in SUMMARY_FIGURES for side, value in summary[name].items()}
        log.write(f'val_stage{stage}', step, epoch=epoch, root_mm=summary['root_mm'], **figures)
        for name, values in errors_of_samples(result.stages[stage]).items():
            # A tag holds values of one kind only, and the scalars have the plain names.
            log.board.add_histogram(f'val_stage{stage}/{name}_samples', values, step)


def errors_of_samples(errors: SampleErrors) -> dict[str, Tensor]:
    """What the histograms show: {name: (N,) mm}."""
    hands = {
        f'{name}_{side}': getattr(errors, name)[:, hand]
        for name in ('joint_mm', 'vert_mm')
        for hand, side in enumerate(SIDES)
    }
    return hands | {'root_mm': errors.root_mm}


def log_pictures(run: Training, log: RunLog, step: int, epoch: int) -> None:
    """Every sheet to TensorBoard, predictions beside truth to the run folder as well."""
    indices = spread_over(len(run.validation), run.cfg.TRAIN.PICTURES)
    sheets = draw_sheets(run.result, run.validation, indices, run.batch_maker)
    write_image(run.folder / 'pictures' / f'epoch_{epoch:03d}.jpg', sheets['validation'])
    for name, sheet in sheets.items():
        log.picture(name, sheet, step)


def save_latest(run: Training, progress: Progress) -> None:
    """All that an exact resume needs."""
    if distributed.is_main():
        average = {'average': run.average.state_dict()} if run.average else {}
        save_checkpoint(
            run.folder / 'latest.pth',
            model=run.model,
            cfg=run.cfg,
            hand_model=run.hand_model,
            optimizer=run.optimizer.state_dict(),
            progress=asdict(progress),
            **average,
        )


def save_best(run: Training, progress: Progress) -> None:
    if distributed.is_main():
        save_checkpoint(
            run.folder / 'best.pth', model=run.result, cfg=run.cfg, hand_model=run.hand_model, progress=asdict(progress)
        )


def resume(run: Training, path: Path) -> Progress:
    """Put a saved run back. Raises UserError if it was another run."""
    content = read_checkpoint(path)
    if 'optimizer' not in content:
        raise UserError(f'{path} holds a network but no training state; only latest.pth can be resumed.')
    was, now = (flatten(load_config(None, base=config)) for config in (content['config'], to_plain(run.cfg)))
    changed = [
        f'{key} was {was[key]!r}, is {now[key]!r}' for key in now if was[key] != now[key] and key not in FREE_KEYS
    ]
    if changed:
        raise UserError(
            f'{path} belongs to a run with another configuration ({"; ".join(changed)}): resume it with '
            'the same one, or start a new run in another OUTPUT_DIR.'
        )
    check_hand_model(content, run.batch_maker.hands, path=path)
    load_state(run.model, content['model'], path=path)
    run.optimizer.load_state_dict(content['optimizer'])
    if run.average:
        run.average.load_state_dict(content['average'])
    return Progress(**content['progress'])


if __name__ == '__main__':
    sys.exit(main())
