"""Train DIR.

python train.py                                          # the published recipe, configs/dir_interhand.yaml
python train.py --cfg configs/demo.yaml TRAIN.LR 1e-3
python train.py --resume                                 # continue exactly where the run stopped
torchrun --nproc_per_node 4 train.py                     # several GPUs; TRAIN.BATCH_SIZE counts over all of them
torchrun --max-restarts 3 --nproc_per_node 4 train.py    # a lost process costs the work since the last save
"""

import argparse
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from yacs.config import CfgNode

from dataset import PreparedSplit, Sample
from dataset.batch import BatchMaker, build_batch_maker, parts_of
from dataset.loader import EpochSampler, evaluation_split, training_loader
from dataset.mixture import check_hand_model_records, folders_with
from evaluation.validation import validate
from manopth import HandPair
from models.checkpoint import check_hand_model, read_checkpoint, save_checkpoint, to_plain
from models.hands import load_hands
from models.trainer import NonFiniteLossError, Trainer
from utils import distributed
from utils.config import add_config_arguments, changed_keys, load_config
from utils.errors import UserError, user_facing
from utils.training import RunLog, StopRequest, Waits, learning_rate

# Keys that a resumed run may change: none of them affects what is learned.
FREE_KEYS = (
    'DEVICE',
    'OUTPUT_DIR',
    'DATASET.PATH',
    'MANO.PATH',
    'MODEL.PRETRAINED',
    'MODEL.BACKBONE_WEIGHTS',
    'EVAL.BATCH_SIZE',
    'EVAL.PRECISION',
    'EVAL.WORKERS',
    'TRAIN.COMPILE',
    'TRAIN.WORKERS',
    'TRAIN.SAVE_EVERY',
    'TRAIN.LOG_EVERY',
    'TRAIN.PICTURES',
)


@dataclass
class Progress:
    """Where a run stands: with weights and optimizer state, all that a resumed run continues from."""

    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the next one
    best: float = math.inf  # mm: lowest validation joint error so far
    seconds: float = 0.0  # spent on the run, over all sessions, validation included

    def __post_init__(self):
        self._since = time.perf_counter()

    def tick(self) -> None:
        """Count the time since the last call."""
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now


class Training(NamedTuple):
    """Everything that a run consists of."""

    cfg: CfgNode
    hands: HandPair
    trainer: Trainer
    batch_maker: BatchMaker
    loader: DataLoader
    sampler: EpochSampler
    validation: PreparedSplit | None  # None: the data set has no split val

    @property
    def folder(self) -> Path:
        return Path(self.cfg.OUTPUT_DIR)

    @property
    def total_steps(self) -> int:
        return self.sampler.steps * self.cfg.TRAIN.EPOCHS


@user_facing
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser, default='configs/dir_interhand.yaml')
    parser.add_argument('--resume', action='store_true', help='continue from OUTPUT_DIR/latest.pth')
    args = parser.parse_intermixed_args(argv)
    cfg = load_config(args.cfg, args.opts)
    latest = Path(cfg.OUTPUT_DIR) / 'latest.pth'
    resuming = args.resume or (distributed.restarted() and latest.exists())
    if not resuming and latest.exists():
        raise UserError(
            f'{latest.parent} already holds a run: continue it with --resume, or choose another OUTPUT_DIR.'
        )
    device = distributed.start(cfg.DEVICE)
    try:
        run = build_training(cfg, device, fresh=not resuming)
        return fit(run, resume(run, latest) if resuming else Progress())
    finally:
        distributed.stop()


def build_training(cfg: CfgNode, device: torch.device, *, fresh: bool) -> Training:
    """Open the data and build the network; ``fresh`` False skips the ImageNet weights, since a checkpoint follows."""
    hands = load_hands(cfg.MANO.SOURCE, cfg.MANO.PATH)
    check_hand_model_records(cfg.DATASET.PATH, hands)
    loader, sampler = training_loader(cfg)
    validation = None
    if folders_with(cfg.DATASET.PATH, 'val'):
        validation = evaluation_split(cfg, 'val')  # opened now: an unreadable split must not show after an epoch
    elif distributed.is_main():
        print(f'{cfg.DATASET.PATH} has no split val: nothing is validated, and best.pth holds the last epoch.')
    trainer = Trainer(cfg, hands, device, pretrained=None if fresh else False)
    if trainer.initial_weights and distributed.is_main():
        print(trainer.initial_weights.describe(hands))
    return Training(cfg, hands, trainer, build_batch_maker(cfg, hands).to(device), loader, sampler, validation)


def fit(run: Training, progress: Progress) -> int:
    """The epoch loop -> exit code."""
    cfg, stop, steps_done = run.cfg, StopRequest(), progress.epoch * run.sampler.steps + progress.step
    log = RunLog(run.folder, step=steps_done) if distributed.is_main() else None
    if log and run.trainer.initial_weights:
        log.write('init_from', 0, **run.trainer.initial_weights._asdict())
    with tqdm(total=run.total_steps, initial=steps_done, unit='step', mininterval=1, disable=log is None) as bar:
        while progress.epoch < cfg.TRAIN.EPOCHS:
            bar.set_description(f'epoch {progress.epoch + 1}/{cfg.TRAIN.EPOCHS}')
            if not train_one_epoch(run, progress, stop=stop, log=log, bar=bar):
                save_latest(run, progress)
                bar.write(f'Stopped after step {progress.step} of epoch {progress.epoch + 1}; continue with --resume.')
                return 130
            progress.epoch, progress.step = progress.epoch + 1, 0
            validate_and_keep_best(run, progress, log=log, bar=bar)
            save_latest(run, progress)
    if log:
        log.close()
        figure = '' if run.validation is None else f', validation joint error {progress.best:.2f} mm'
        print(f'done: {run.folder / "best.pth"}{figure}')
    return 0


def train_one_epoch(run: Training, progress: Progress, *, stop: StopRequest, log: RunLog | None, bar: tqdm) -> bool:
    """Train the epoch that ``progress`` points at, from its step on; False if it was asked to stop before the end."""
    cfg = run.cfg
    run.trainer.train()
    run.sampler.start_at(progress.epoch, progress.step)
    logged_at, logged_step = time.perf_counter(), progress.step
    waits = Waits(run.loader)
    for samples in waits:
        step = progress.epoch * run.sampler.steps + progress.step
        rate = learning_rate(
            step, total=run.total_steps, base=cfg.TRAIN.LR, warmup=cfg.TRAIN.WARMUP_STEPS, flat=cfg.TRAIN.FLAT
        )
        terms = train_step(run, samples, rate)
        progress.step += 1
        progress.tick()
        if log and progress.step % cfg.TRAIN.LOG_EVERY == 0:
            seconds = time.perf_counter() - logged_at
            speed = (progress.step - logged_step) * cfg.TRAIN.BATCH_SIZE / seconds
            logged_at, logged_step = time.perf_counter(), progress.step
            waiting, total = waits.since_last_asked() / seconds, sum(terms.values())
            figures = {'lr': rate, 'samples_per_second': round(speed, 2), 'waiting_for_data': round(waiting, 4)}
            log.write('train', step + 1, epoch=progress.epoch, **figures, total=total, **terms)
            bar.set_postfix(loss=f'{total:.3f}', refresh=False)
        bar.update()
        if asked_to_stop(stop, progress.step, cfg):
            return False
        if progress.step % cfg.TRAIN.SAVE_EVERY == 0 and progress.step < run.sampler.steps:
            save_latest(run, progress)
    return True


def train_step(run: Training, samples: Sample, rate: float) -> dict[str, float]:
    """One update -> the loss terms of the whole batch. Raises UserError, before the weights change, on a non-finite
    loss."""
    parts = parts_of(samples, len(samples.index) // run.cfg.TRAIN.ACCUMULATE)
    batches = ((batch.image, batch.target) for batch in map(run.batch_maker, parts))
    try:
        return run.trainer.step(batches, count=len(parts), rate=rate)
    except NonFiniteLossError as error:
        names = 'those of another process'
        if error.here:
            dataset = cast(PreparedSplit, run.loader.dataset)
            names = ', '.join(map(dataset.name, samples.index.tolist()))
        raise UserError(
            'The loss is not finite; the run stops and its last checkpoint is kept.\n'
            f'terms: {", ".join(f"{name} {value:.4g}" for name, value in error.terms.items())}\nsamples: {names}\n'
            'A smaller TRAIN.LR or TRAIN.CLIP_NORM 1 often helps; --resume continues from the last checkpoint.'
        ) from None


def asked_to_stop(stop: StopRequest, step: int, cfg: CfgNode) -> bool:
    """All processes must leave together; asking each other costs a round trip, so they do it only now and then."""
    if distributed.rank_and_world()[1] == 1:
        return stop.requested
    return step % cfg.TRAIN.LOG_EVERY == 0 and distributed.any_process(stop.requested)


def validate_and_keep_best(run: Training, progress: Progress, *, log: RunLog | None, bar: tqdm) -> None:
    """After an epoch: its validation, where one is due, and best.pth."""
    cfg, epoch = run.cfg, progress.epoch
    if run.validation is None:
        save_best(run, progress)
    elif epoch % cfg.TRAIN.VALIDATE_EVERY == 0 or epoch == cfg.TRAIN.EPOCHS:
        step = epoch * run.sampler.steps
        summary = validate(run.trainer.result, run.validation, run.batch_maker, cfg, epoch=epoch, step=step, log=log)
        joint, vert = summary['joint_mm']['all'], summary['vert_mm']['all']
        if log:
            bar.write(
                f'epoch {epoch}: validation joint {joint:.2f} mm, vert {vert:.2f} mm, root {summary["root_mm"]:.2f} mm'
            )
            for folder, figures in summary.get('sets', {}).items():
                bar.write(f'    {folder}: joint {figures["joint_mm"]["all"]:.2f} mm, root {figures["root_mm"]:.2f} mm')
        progress.tick()
        if joint < progress.best:
            progress.best = joint
            save_best(run, progress)


def save_latest(run: Training, progress: Progress) -> None:
    """Save all that an exact resume needs."""
    _save(run, 'latest.pth', run.trainer.model, progress=asdict(progress), **run.trainer.state())


def save_best(run: Training, progress: Progress) -> None:
    _save(run, 'best.pth', run.trainer.result, progress=asdict(progress))


def _save(run: Training, name: str, model: torch.nn.Module, **more) -> None:
    if distributed.is_main():
        save_checkpoint(run.folder / name, model=model, cfg=run.cfg, hand_model=run.hands.identity, **more)


def resume(run: Training, path: Path) -> Progress:
    """Restore a saved run. Raises UserError if the file belongs to another run."""
    content = read_checkpoint(path)
    if 'optimizer' not in content:
        raise UserError(f'{path} holds a network but no training state; only latest.pth can be resumed.')
    if changed := changed_keys(content['config'], to_plain(run.cfg), free=FREE_KEYS):
        raise UserError(
            f'{path} belongs to a run with another configuration ({"; ".join(changed)}). Resume it with the same '
            'configuration, or start a new run in another OUTPUT_DIR.'
        )
    check_hand_model(content, run.hands, path=path)
    run.trainer.load(content, path=path)
    return Progress(**content['progress'])


if __name__ == '__main__':
    sys.exit(main())
