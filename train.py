"""Train DIR.

python train.py                                          # the published recipe, configs/dir_interhand.yaml
python train.py --cfg configs/demo.yaml TRAIN.LR 1e-3
python train.py --resume                                 # continue exactly where the run stopped
python train.py --resume auto                            # the same, or start if there is nothing to continue
torchrun --nproc_per_node 4 train.py                     # several GPUs; TRAIN.BATCH_SIZE counts over all of them
torchrun --max-restarts 3 --nproc_per_node 4 train.py    # a lost process costs the work since the last save

TERM, INT (Ctrl-C), USR1 and HUP save and stop with exit code 128 + the signal's number; docs/scaling.md has a SLURM
script that continues the run.
"""

from utils.stopping import Stopped, StopRequest, end_at_stop_signals

if __name__ == '__main__':
    end_at_stop_signals()  # now: the imports below take seconds

import argparse
import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from tqdm import tqdm
from yacs.config import CfgNode

from dataset import PreparedSplit, Sample
from dataset.batch import BatchMaker, build_batch_maker, parts_of
from dataset.damage import DAMAGED, DamageRecord, TooMuchDamageError
from dataset.identity import check_data_identity, data_identity
from dataset.loader import EpochSampler, Loader, WorkerError, evaluation_split, training_loader
from dataset.mixture import check_hand_model_records, folders_with
from evaluation.evaluate import StoppedEarly
from evaluation.validation import validate
from manopth import HandPair
from models.checkpoint import (
    BEST,
    LATEST,
    check_hand_model,
    has_checkpoint,
    read_checkpoint,
    read_newest_sound,
    refuse_finished,
    save_checkpoint,
    save_rotating,
    to_plain,
)
from models.hands import load_hands
from models.trainer import NonFiniteLossError, Trainer, Update
from utils import distributed
from utils.config import FREE_KEYS, add_config_arguments, changed_keys, load_config
from utils.errors import UserError, out_of_memory, user_facing
from utils.files import remove_stale_partials
from utils.ownership import owned
from utils.run_record import run_record, write_run_record
from utils.training import RunLog, Waits, learning_rate

ACCUMULATE = 'TRAIN.ACCUMULATE'  # may change too, with a warning: a run that no longer fits into memory is not lost
PATIENCE_S = 60  # for the previous process of a run to end, as when a scheduler requeues it


@dataclass
class Progress:
    """Where a run stands: with weights and optimizer state, all that a resumed run continues from."""

    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the next one
    best: float = math.inf  # mm: lowest validation joint error so far
    seconds: float = 0.0  # spent on the run, over all sessions, validation included
    validation_due: bool = False  # of the last finished epoch

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
    validation_batch_maker: BatchMaker  # whole segmentations, which figures and pictures need
    loader: Loader
    sampler: EpochSampler
    validation: PreparedSplit | None  # None: the data set has no split val
    record: dict[str, Any]  # how the run came about (utils/run_record.py)

    @property
    def folder(self) -> Path:
        return Path(self.cfg.OUTPUT_DIR)

    @property
    def total_steps(self) -> int:
        return self.sampler.steps * self.cfg.TRAIN.EPOCHS


@dataclass
class Session:
    """A run at work in this process."""

    run: Training
    progress: Progress
    stop: StopRequest
    log: RunLog | None  # None in all processes but the main one
    bar: tqdm
    damage: DamageRecord
    saved: Progress | None = None  # what latest.pth holds, if this session has written it
    saved_at: float = 0.0

    @property
    def steps_done(self) -> int:
        return self.progress.epoch * self.run.sampler.steps + self.progress.step

    def interruptible(self) -> AbstractContextManager[None]:
        """Within it, a stop signal ends a single process at once; several of them agree on when they leave."""
        return self.stop.interruptible() if distributed.rank_and_world()[1] == 1 else nullcontext()


@user_facing
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser, default='configs/dir_interhand.yaml')
    parser.add_argument('--resume', action='store_true', help='continue from OUTPUT_DIR; "auto": or start a new run')
    parser.add_argument('--resume=auto', action='store_true', dest='resume_or_start', help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(joined_auto(sys.argv[1:] if argv is None else argv))
    cfg = load_config(args.cfg, args.opts)
    wait = cfg.TRAIN.WORKER_TIMEOUT
    device = distributed.start(cfg.DEVICE, timeout_s=wait + 300 if wait else 1800)
    with ExitStack() as at_end:
        at_end.callback(distributed.stop)
        return fit(*open_run(cfg, args, device, at_end))


def open_run(
    cfg: CfgNode, args: argparse.Namespace, device: torch.device, at_end: ExitStack
) -> tuple[Training, Progress | None]:
    """Own OUTPUT_DIR, build the run and restore it if it is to be resumed -> run, where it stands; None: it is new."""
    found = None
    if args.resume_or_start or distributed.restarted():
        found = take_over(cfg, at_end, wait_s=PATIENCE_S)
    elif args.resume:
        latest = Path(cfg.OUTPUT_DIR) / LATEST
        found = take_over(cfg, at_end) or (read_checkpoint(latest), latest)  # which raises: there is none
    else:
        distributed.chosen_by_main(lambda: take_new(cfg, at_end))
    run = build_training(cfg, device, found[0] if found else None)
    at_end.enter_context(closing(run.loader))
    return run, resume(run, *found) if found else None


def joined_auto(words: list[str]) -> list[str]:
    """``--resume auto`` as one word: argparse would let a bare --resume swallow the KEY that follows it."""
    joined: list[str] = []
    for word in words:
        if word == 'auto' and joined[-1:] == ['--resume']:
            joined[-1] = '--resume=auto'
        else:
            joined.append(word)
    return joined


def take_new(cfg: CfgNode, at_end: ExitStack) -> None:
    """Own OUTPUT_DIR for a new run. Raises UserError if it is in use or holds a run."""
    at_end.enter_context(owned(cfg.OUTPUT_DIR))
    if has_checkpoint(cfg.OUTPUT_DIR):
        raise UserError(
            f'{cfg.OUTPUT_DIR} already holds a run: continue it with --resume, or choose another OUTPUT_DIR.'
        )
    refuse_finished(cfg.OUTPUT_DIR)
    remove_stale_partials(cfg.OUTPUT_DIR, recursive=True)


def take_over(cfg: CfgNode, at_end: ExitStack, *, wait_s: float = 0.0) -> tuple[dict[str, Any], Path] | None:
    """Own OUTPUT_DIR -> content and path of its newest sound checkpoint, None if it has none at all.

    Raises UserError if it is in use for longer than ``wait_s``, or if its checkpoints are damaged.
    """
    found: tuple[dict[str, Any], Path] | None = None  # by the main process, which does not read it twice

    def newest() -> Path | None:
        nonlocal found
        at_end.enter_context(owned(cfg.OUTPUT_DIR, wait_s=wait_s))
        remove_stale_partials(cfg.OUTPUT_DIR, recursive=True)
        if not has_checkpoint(cfg.OUTPUT_DIR):
            refuse_finished(cfg.OUTPUT_DIR)
            return None
        found = read_newest_sound(cfg.OUTPUT_DIR)
        return found[1]

    path = distributed.chosen_by_main(newest)
    return (read_checkpoint(path), path) if path and not found else found


def build_training(cfg: CfgNode, device: torch.device, content: dict[str, Any] | None = None) -> Training:
    """Open the data and build the network, without the ImageNet weights if ``content``, a checkpoint, will follow."""
    hands = load_hands(cfg.MANO.SOURCE, cfg.MANO.PATH)
    check_hand_model_records(cfg.DATASET.PATH, hands)
    loader, sampler = training_loader(cfg)
    data = {'train': data_identity(cast(PreparedSplit, loader.dataset))}
    validation = None
    if folders_with(cfg.DATASET.PATH, 'val'):
        validation = evaluation_split(cfg, 'val')  # opened now: an unreadable split must not show after an epoch
        data['val'] = data_identity(validation)
    elif distributed.is_main():
        print(f'{cfg.DATASET.PATH} has no split val: nothing is validated, and best.pth holds the last epoch.')
    trainer = Trainer(cfg, hands, device, pretrained=False if content else None)
    if trainer.initial_weights and distributed.is_main():
        print(trainer.initial_weights.describe(hands))
    previous = content.get('record') if content else None
    record = run_record(seed=cfg.SEED, hand_model=hands.identity, data=data, device=device, previous=previous)
    batch_maker, validation_batch_maker = (
        build_batch_maker(cfg, hands, for_losses=for_losses).to(device) for for_losses in (True, False)
    )
    return Training(cfg, hands, trainer, batch_maker, validation_batch_maker, loader, sampler, validation, record)


def fit(run: Training, resumed_at: Progress | None) -> int:
    """Train to the end or to a stop signal -> exit code. A failure leaves the last whole step in latest.pth."""
    progress = resumed_at or Progress()
    stop, steps_done = StopRequest(), progress.epoch * run.sampler.steps + progress.step
    log = None
    if distributed.is_main():
        resumed_step = steps_done if resumed_at else None
        log = RunLog(run.folder, step=resumed_step, validation_due=progress.validation_due)
        if run.trainer.initial_weights:
            log.write('init_from', 0, **run.trainer.initial_weights._asdict())
        write_run_record(run.folder, run.record, config=to_plain(run.cfg))
    damage = DamageRecord(
        cast(PreparedSplit, run.loader.dataset),
        run.folder / DAMAGED,
        step=steps_done,
        share=run.cfg.DATASET.TOLERATED_DAMAGE,
        log=log.write if log else None,
    )
    bar = tqdm(total=run.total_steps, initial=steps_done, unit='step', mininterval=1, disable=log is None)
    with bar, closing(log) if log else nullcontext():
        session = Session(run, progress, stop, log, bar, damage, saved_at=time.monotonic())
        try:
            finished = run_epochs(session)
        except Exception as error:
            if (problem := failure(error, run)) is None:
                raise
            problem = f'{problem} {kept(session)}'
            if isinstance(error, distributed.LostProcessError) and not log:
                sys.exit(2)  # the main process reports it
            raise UserError(problem) from None
        if not finished:
            save_latest(session)
            numbers = distributed.gather_objects(stop.number)  # no process leaves before the main one has saved
            stopped = Stopped(max(each for each in numbers if each is not None), saved_where(session))
    if not finished:
        if log:
            print(stopped)
        return stopped.exit_code
    if log:
        figure = '' if math.isinf(progress.best) else f', validation joint error {progress.best:.2f} mm'
        print(f'done: {run.folder / BEST}{figure}')
    return 0


def saved_where(session: Session) -> str:
    progress = session.progress
    if progress.step:
        where = f'after step {progress.step} of epoch {progress.epoch + 1}'
    elif progress.epoch:
        where = f'after epoch {progress.epoch}' + (', before its validation' if progress.validation_due else '')
    else:
        where = 'before its first step'
    return f'The run is saved {where}; continue with --resume.'


def run_epochs(session: Session) -> bool:
    """The epoch loop, from wherever the run stands; False if it was asked to stop before the end."""
    run, progress = session.run, session.progress
    while True:
        if progress.validation_due:
            if not validate_and_keep_best(session):
                return False
            progress.validation_due = False
            save_latest(session)
        if progress.epoch >= run.cfg.TRAIN.EPOCHS:
            return True
        session.bar.set_description(f'epoch {progress.epoch + 1}/{run.cfg.TRAIN.EPOCHS}')
        going_on = train_one_epoch(session)
        if progress.step == run.sampler.steps:
            progress.epoch, progress.step = progress.epoch + 1, 0
            due = progress.epoch % run.cfg.TRAIN.VALIDATE_EVERY == 0 or progress.epoch == run.cfg.TRAIN.EPOCHS
            progress.validation_due = due or run.validation is None
            save_latest(session)  # before the validation, which may take long or fail
        if not going_on:
            return False


def train_one_epoch(session: Session) -> bool:
    """Train the epoch that the progress points at, from its step on; False if it was asked to stop."""
    run, progress, log = session.run, session.progress, session.log
    cfg = run.cfg
    run.trainer.train()
    run.sampler.start_at(progress.epoch, progress.step)
    logged_at, logged_step = time.perf_counter(), progress.step
    waits = Waits(run.loader, while_waiting=session.interruptible)
    try:
        for samples in waits:
            session.damage.note(samples.damage, step=session.steps_done + 1, epoch=progress.epoch)
            rate = learning_rate(
                session.steps_done,
                total=run.total_steps,
                base=cfg.TRAIN.LR,
                warmup=cfg.TRAIN.WARMUP_STEPS,
                flat=cfg.TRAIN.FLAT,
            )
            terms, stopping = train_step(
                run, samples, number=session.steps_done, rate=rate, asked_to_stop=lambda: session.stop.requested
            )
            progress.step += 1
            progress.tick()
            if log and progress.step % cfg.TRAIN.LOG_EVERY == 0:
                seconds = time.perf_counter() - logged_at
                speed = (progress.step - logged_step) * cfg.TRAIN.BATCH_SIZE / seconds
                logged_at, logged_step = time.perf_counter(), progress.step
                waiting, total = waits.since_last_asked() / seconds, sum(terms.values())
                figures = {'lr': rate, 'samples_per_second': round(speed, 2), 'waiting_for_data': round(waiting, 4)}
                log.write('train', session.steps_done, epoch=progress.epoch, **figures, total=total, **terms)
                session.bar.set_postfix(loss=f'{total:.3f}', refresh=False)
            session.bar.update()
            if stopping:
                return False
            if progress.step < run.sampler.steps and save_is_due(session):
                save_latest(session)
    except Stopped:
        return False
    return True


def save_is_due(session: Session) -> bool:
    cfg = session.run.cfg
    minutes = (time.monotonic() - session.saved_at) / 60
    return session.progress.step % cfg.TRAIN.SAVE_EVERY == 0 or 0 < cfg.TRAIN.SAVE_MINUTES <= minutes


def train_step(
    run: Training, samples: Sample, *, number: int, rate: float, asked_to_stop: Callable[[], bool] = lambda: False
) -> Update:
    """One update after ``number`` others. Raises UserError, before the weights change, on a non-finite loss or
    gradient."""
    parts = parts_of(samples, len(samples.index) // run.cfg.TRAIN.ACCUMULATE)
    batches = ((batch.image, batch.target) for batch in map(run.batch_maker, parts))
    try:
        with distributed.reporting_lost_processes():
            return run.trainer.step(batches, number=number, count=len(parts), rate=rate, asked_to_stop=asked_to_stop)
    except NonFiniteLossError as error:
        names = 'those of another process'
        if error.here:
            dataset = cast(PreparedSplit, run.loader.dataset)
            names = ', '.join(map(dataset.name, samples.index.tolist()))
        raise UserError(
            f'The {error.what} is not finite; the run stops and its last checkpoint is kept.\n'
            f'terms: {", ".join(f"{name} {value:.4g}" for name, value in error.terms.items())}\nsamples: {names}\n'
            'A smaller TRAIN.LR or TRAIN.CLIP_NORM 1 often helps; --resume continues from the last checkpoint.'
        ) from None


def mm(value: float) -> str:
    return '-' if math.isnan(value) else f'{value:.2f} mm'  # NaN: the root error without a frame of both hands


def validate_and_keep_best(session: Session) -> bool:
    """Validate the last finished epoch and write best.pth if it is the best; False if asked to stop before the end."""
    run, progress, log = session.run, session.progress, session.log
    if run.validation is None:
        save_best(session)
        return True
    poll = distributed.StopPoll(lambda: session.stop.requested)
    try:
        with session.interruptible():
            summary = validate(
                run.trainer.result,
                run.validation,
                run.validation_batch_maker,
                run.cfg,
                epoch=progress.epoch,
                step=session.steps_done,
                log=log,
                stopping=poll,
            )
    except (Stopped, StoppedEarly):
        return False
    joint, vert = summary['joint_mm']['all'], summary['vert_mm']['all']
    if log:
        session.bar.write(
            f'epoch {progress.epoch}: validation joint {joint:.2f} mm, vert {vert:.2f} mm, '
            f'root {mm(summary["root_mm"])}'
        )
        for folder, figures in summary.get('sets', {}).items():
            session.bar.write(f'    {folder}: joint {figures["joint_mm"]["all"]:.2f} mm, root {mm(figures["root_mm"])}')
    progress.tick()
    if math.isnan(joint):  # as without a validation split
        if log:
            session.bar.write('No frame of the split val shows a hand: best.pth holds the last epoch.')
        save_best(session)
    elif joint < progress.best:
        progress.best = joint
        save_best(session)
    return True


def save_latest(session: Session) -> None:
    """Save all that an exact resume needs, unless latest.pth holds it already."""
    session.saved_at = time.monotonic()
    progress, trainer = session.progress, session.run.trainer
    if session.saved == progress:
        return
    if session.log:
        session.log.sync()
        contents = {'progress': asdict(progress), **trainer.state()}
        save_rotating(session.run.folder / LATEST, model=trainer.model, **described(session.run), **contents)
    session.saved = replace(progress)


def save_best(session: Session) -> None:
    if session.log:
        model, progress = session.run.trainer.result, asdict(session.progress)
        save_checkpoint(session.run.folder / BEST, model=model, **described(session.run), progress=progress)


def described(run: Training) -> dict[str, Any]:
    return {'cfg': run.cfg, 'hand_model': run.hands.identity, 'record': run.record}


def failure(error: Exception, run: Training) -> str | None:
    """One sentence for a failure that the run survives, None for any other error."""
    if isinstance(error, (TooMuchDamageError, WorkerError, distributed.LostProcessError)):
        return str(error)
    if not out_of_memory(error):
        return None
    cfg, reason = run.cfg, str(error).splitlines()[0][:160] if str(error) else 'the host has no more'
    world, parts = distributed.rank_and_world()[1], 2 * cfg.TRAIN.ACCUMULATE
    advice = f'a smaller TRAIN.BATCH_SIZE than {cfg.TRAIN.BATCH_SIZE} in a new run'
    if not (cfg.TRAIN.CHECKPOINT or cfg.TRAIN.COMPILE):
        advice = 'TRAIN.CHECKPOINT true, which keeps a seventh of the activations and changes no result'
    elif cfg.TRAIN.BATCH_SIZE % (world * parts) == 0:
        advice = f'TRAIN.ACCUMULATE {parts}, which needs half the activation memory'
    return (
        f'Out of memory ({reason}). Use {advice}; in a validation, a smaller EVAL.BATCH_SIZE than '
        f'{cfg.EVAL.BATCH_SIZE}; on the host, fewer TRAIN.WORKERS than {cfg.TRAIN.WORKERS}.'
    )


def kept(session: Session) -> str:
    """Save the last whole step after a failure -> what a user has to know about it."""
    if not session.run.trainer.whole:
        return 'It came in the middle of an update; --resume continues from the last checkpoint.'
    try:
        save_latest(session)
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        return f'The run could not be saved ({error}); --resume continues from the last checkpoint.'
    return saved_where(session)


def resume(run: Training, content: dict[str, Any], path: Path) -> Progress:
    """Restore a saved run. Raises UserError if the file belongs to another run."""
    if 'optimizer' not in content:
        raise UserError(f'{path} holds a network but no training state; only {LATEST} can be resumed.')
    changed = changed_keys(content['config'], to_plain(run.cfg), free=FREE_KEYS)
    if refused := [each for each in changed if not each.startswith(f'{ACCUMULATE} ')]:
        raise UserError(
            f'{path} belongs to a run with another configuration ({"; ".join(refused)}). Resume it with the same '
            'configuration, or start a new run in another OUTPUT_DIR.'
        )
    if changed and distributed.is_main():
        print(f'Warning: {changed[0]}. Batch norms see other parts of a batch from here on.', file=sys.stderr)
    check_hand_model(content, run.hands, path=path)
    recorded = content.get('record', {}).get('data', {})
    for split, identity in recorded.items():
        if split not in run.record['data']:
            raise UserError(f'{path} was trained with a split {split}, which {run.cfg.DATASET.PATH} lacks now.')
        check_data_identity(identity, run.record['data'][split], split=split, path=path)
    run.trainer.load(content, path=path)
    return Progress(**content['progress'])


if __name__ == '__main__':
    sys.exit(main())
