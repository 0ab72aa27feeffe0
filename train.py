"""Train DIR.

    python train.py                                      # the published recipe, configs/dir_interhand.yaml
    python train.py --cfg configs/demo.yaml TRAIN.LR 1e-3
    python train.py --resume                             # go on exactly where the run stopped
    torchrun --nproc_per_node 4 train.py                 # several GPUs; TRAIN.BATCH_SIZE is over all of them
"""

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from yacs.config import CfgNode

from dataset.batch import Batch, BatchMaker
from dataset.interhand import InterHandDataset
from dataset.loader import EpochSampler, evaluation_loader, training_loader
from dataset.raw import check_hand_model_record
from manopth import TwoHandLayer, load_hand_models
from manopth.assets import describe
from models import build_criterion, build_model
from utils import distributed
from utils.checkpoint import check_hand_model, load_state, read_checkpoint, save_checkpoint, to_device, to_plain
from utils.config import add_config_arguments, flatten, load_config
from utils.errors import UserError, user_facing
from utils.evaluation import Evaluation, evaluate
from utils.metrics import Protocol
from utils.prediction_pictures import draw_samples, spread_over
from utils.training import RunLog, StopRequest, build_optimizer, learning_rate

# Keys that may change when a run is resumed: none of them changes what is learned.
FREE_KEYS = ('DEVICE', 'OUTPUT_DIR', 'DATASET.PATH', 'MANO.PATH', 'MODEL.PRETRAINED', 'MODEL.WEIGHTS',
             'EVAL.BATCH_SIZE', 'TRAIN.WORKERS', 'TRAIN.SAVE_EVERY', 'TRAIN.LOG_EVERY', 'TRAIN.PICTURES')
SUMMARY_FIGURES = ('joint_mm', 'vert_mm', 'joint_px', 'vert_px')


class Training(NamedTuple):
    """Everything that a run is made of."""

    cfg: CfgNode
    model: nn.Module  # the network itself, what checkpoints hold
    parallel: nn.Module  # the same, wrapped where there are several processes
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    batch_maker: BatchMaker
    loader: torch.utils.data.DataLoader
    sampler: EpochSampler
    hand_model: str

    @property
    def total_steps(self) -> int:
        return self.sampler.steps * self.cfg.TRAIN.EPOCHS


@user_facing
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser, default='configs/dir_interhand.yaml')
    parser.add_argument('--resume', action='store_true', help='go on from OUTPUT_DIR/latest.pth')
    args = parser.parse_intermixed_args(argv)
    cfg = load_config(args.cfg, args.opts)
    folder = Path(cfg.OUTPUT_DIR)
    if not args.resume and (folder / 'latest.pth').exists():
        raise UserError(f'{folder} already holds a run: add --resume to go on with it, or choose another OUTPUT_DIR.')

    device = distributed.start(cfg.DEVICE)
    try:
        run = build_training(cfg, device, fresh=not args.resume)
        epoch, step_in_epoch, best = resume(run, folder / 'latest.pth') if args.resume else (0, 0, float('inf'))
        return fit(run, folder, epoch, step_in_epoch, best)
    finally:
        distributed.stop()


def build_training(cfg: CfgNode, device: torch.device, *, fresh: bool) -> Training:
    hand_models = load_hand_models(cfg.MANO.SOURCE, cfg.MANO.PATH)
    check_hand_model_record(cfg.DATASET.PATH, hand_models)
    loader, sampler = training_loader(cfg)
    torch.manual_seed(cfg.SEED)
    model = build_model(cfg, hand_models, pretrained=None if fresh else False)
    model = to_device(model, device)
    parallel = model
    if distributed.rank_and_world()[1] > 1:
        unused = not all(value for value in cfg.LOSS.values() if isinstance(value, float))
        parallel = DistributedDataParallel(model, [device] if device.type == 'cuda' else None,
                                           find_unused_parameters=unused)
    return Training(
        cfg, model, parallel, build_criterion(cfg, hand_models).to(device), build_optimizer(model, cfg),
        BatchMaker(TwoHandLayer(hand_models), image_size=cfg.MODEL.IMAGE_SIZE).to(device), loader, sampler,
        describe(hand_models))


def fit(run: Training, folder: Path, epoch: int, step_in_epoch: int, best: float) -> int:
    """The epoch loop; returns the exit code."""
    cfg, stop = run.cfg, StopRequest()
    log = RunLog(folder, step=epoch * run.sampler.steps + step_in_epoch) if distributed.is_main() else None
    with tqdm(total=run.total_steps, initial=epoch * run.sampler.steps + step_in_epoch, unit='step', mininterval=1,
              disable=not distributed.is_main()) as bar:
        while epoch < cfg.TRAIN.EPOCHS:
            bar.set_description(f'epoch {epoch + 1}/{cfg.TRAIN.EPOCHS}')
            stopped_at = train_one_epoch(run, folder, epoch, step_in_epoch, best, stop=stop, log=log, bar=bar)
            if stopped_at is not None:
                save_latest(run, folder, epoch, stopped_at, best)
                bar.write(f'stopped after step {stopped_at} of epoch {epoch + 1}; --resume goes on from there.')
                return 130
            epoch, step_in_epoch = epoch + 1, 0
            if epoch % cfg.TRAIN.VALIDATE_EVERY == 0 or epoch == cfg.TRAIN.EPOCHS:
                figure = validate(run, folder, epoch, log=log, bar=bar)
                if figure < best:
                    best = figure
                    save_best(run, folder, epoch, best)
            save_latest(run, folder, epoch, 0, best)
    if log:
        log.close()
        print(f'done: best validation joint error {best:.2f} mm, {folder / "best.pth"}')
    return 0


def train_one_epoch(run: Training, folder: Path, epoch: int, first_step: int, best: float, *, stop: StopRequest,
                    log: RunLog | None, bar: tqdm) -> int | None:
    """Train epoch ``epoch`` from step ``first_step`` on; returns the step it was asked to stop after, else None."""
    cfg = run.cfg
    run.parallel.train()
    run.sampler.start_at(epoch, first_step)
    last_log = (time.perf_counter(), first_step)
    for step, samples in enumerate(run.loader, start=first_step + 1):
        batch = run.batch_maker(samples)
        global_step = epoch * run.sampler.steps + step
        rate = learning_rate(global_step - 1, total=run.total_steps, base=cfg.TRAIN.LR, warmup=cfg.TRAIN.WARMUP_STEPS)
        terms = train_step(run, batch, rate)

        if log and step % cfg.TRAIN.LOG_EVERY == 0:
            now = time.perf_counter()
            speed = (step - last_log[1]) * cfg.TRAIN.BATCH_SIZE / (now - last_log[0])
            last_log = (now, step)
            values = {name: value.item() for name, value in terms.items()}
            log.write('train', global_step, epoch=epoch, lr=rate, samples_per_second=round(speed, 2),
                      total=sum(values.values()), **values)
            bar.set_postfix(loss=f'{sum(values.values()):.3f}', refresh=False)
        bar.update()
        if asked_to_stop(stop, step, cfg):
            return step
        if step % cfg.TRAIN.SAVE_EVERY == 0 and step < run.sampler.steps:
            save_latest(run, folder, epoch, step, best)
    return None


def train_step(run: Training, batch: Batch, rate: float) -> dict[str, torch.Tensor]:
    """One update; returns the loss terms. Raises UserError, before it touches the weights, on a non-finite loss."""
    for group in run.optimizer.param_groups:
        group['lr'] = rate
    terms = run.criterion(run.parallel(batch.image), batch.target)
    total = sum(terms.values())
    run.optimizer.zero_grad(set_to_none=True)
    total.backward()
    if not torch.isfinite(total.detach()).item():
        listed = ', '.join(f'{name} {value.item():.4g}' for name, value in terms.items())
        names = ', '.join(run.loader.dataset.name(index) for index in batch.index.tolist())
        raise UserError(f'The loss is not finite; the run stops and its last checkpoint is kept.\nterms: {listed}\n'
                        f'samples: {names}\nA smaller TRAIN.LR or TRAIN.CLIP_NORM 1 often helps; --resume goes on from '
                        'the last checkpoint.')
    if run.cfg.TRAIN.CLIP_NORM > 0:
        nn.utils.clip_grad_norm_(run.model.parameters(), run.cfg.TRAIN.CLIP_NORM)
    run.optimizer.step()
    return {name: value.detach() for name, value in terms.items()}


def asked_to_stop(stop: StopRequest, step: int, cfg: CfgNode) -> bool:
    """All processes must leave together; asking each other costs a round trip, so they do it only now and then."""
    if distributed.rank_and_world()[1] == 1:
        return stop.requested
    return step % cfg.TRAIN.LOG_EVERY == 0 and distributed.any_process(stop.requested)


def validate(run: Training, folder: Path, epoch: int, *, log: RunLog | None, bar: tqdm) -> float:
    """Figures of every stage on the validation split, and pictures; returns the one that ``best`` is chosen by."""
    cfg, step = run.cfg, epoch * run.sampler.steps
    dataset = InterHandDataset(cfg.DATASET.PATH, 'val', with_dense=False)
    result = evaluate(run.model, evaluation_loader(dataset, cfg), run.batch_maker, network_root=cfg.ROOT_JOINT,
                      protocol=Protocol(cfg.ROOT_JOINT, scale=True), title='validate')
    if log:
        log_validation(log, result, step, epoch)
        if cfg.TRAIN.PICTURES:
            sheet = draw_samples(run.model, dataset, spread_over(len(dataset), cfg.TRAIN.PICTURES), run.batch_maker,
                                 path=folder / 'pictures' / f'epoch_{epoch:03d}.jpg')
            log.board.add_image('validation', sheet[..., ::-1].copy(), step, dataformats='HWC')
        summary = result.summary()
        bar.write(f'epoch {epoch}: validation joint {summary["joint_mm"]["all"]:.2f} mm, vert '
                  f'{summary["vert_mm"]["all"]:.2f} mm, root {summary["root_mm"]:.2f} mm')
    return result.summary()['joint_mm']['all']


def log_validation(log: RunLog, result: Evaluation, step: int, epoch: int) -> None:
    for stage in range(len(result.stages)):
        summary = result.summary(stage)
        figures = {f'{name}_{side}': value for name in SUMMARY_FIGURES for side, value in summary[name].items()}
        log.write(f'val_stage{stage}', step, epoch=epoch, root_mm=summary['root_mm'], **figures)


def save_latest(run: Training, folder: Path, epoch: int, step_in_epoch: int, best: float) -> None:
    """Where the run stands: ``epoch`` epochs and ``step_in_epoch`` steps are done."""
    if distributed.is_main():
        save_checkpoint(folder / 'latest.pth', model=run.model, cfg=run.cfg, hand_model=run.hand_model,
                        optimizer=run.optimizer.state_dict(), epoch=epoch, step_in_epoch=step_in_epoch, best=best)


def save_best(run: Training, folder: Path, epoch: int, figure: float) -> None:
    if distributed.is_main():
        save_checkpoint(folder / 'best.pth', model=run.model, cfg=run.cfg, hand_model=run.hand_model, epoch=epoch,
                        val_joint_mm=figure)


def resume(run: Training, path: Path) -> tuple[int, int, float]:
    """Put a saved run back; returns (epoch, step in it, best figure). Raises UserError if it was another run."""
    content = read_checkpoint(path)
    if 'optimizer' not in content:
        raise UserError(f'{path} holds a network but no training state; only latest.pth can be resumed.')
    was, now = (flatten(load_config(None, base=config)) for config in (content['config'], to_plain(run.cfg)))
    changed = [f'{key} was {was[key]!r}, is {now[key]!r}' for key in now
               if was[key] != now[key] and key not in FREE_KEYS]
    if changed:
        raise UserError(f'{path} belongs to a run with another configuration ({"; ".join(changed)}): resume it with '
                        'the same one, or start a new run in another OUTPUT_DIR.')
    check_hand_model(content, run.batch_maker.hand_layer.models, path=path)
    load_state(run.model, content['model'], path=path)
    run.optimizer.load_state_dict(content['optimizer'])
    return content['epoch'], content['step_in_epoch'], content['best']


if __name__ == '__main__':
    sys.exit(main())
