"""The command that prepares InterHand2.6M: ``python dataset/interhand.py --help``."""

import argparse
import hashlib
from pathlib import Path

import numpy as np
import torch

from dataset.hand_model_record import check_hand_model_record, claim_hand_model_record
from dataset.prepare import raw
from dataset.prepare.frames import FramePreparer, FrameTask, PreparedFrame
from dataset.prepare.raw import SPLITS, RawSplit
from dataset.prepare.shards import parse_shard
from dataset.prepare.skips import Skip
from dataset.prepare.split import FORMAT, merge_splits, prepare_split, settings_of
from dataset.prepare.workers import ordered_map, worker_pool
from dataset.vertex_colours import canonical_colours, load_colours
from models.hands import load_hands
from utils.config import add_config_arguments, load_config, split_off_pairs
from utils.distributed import usable_cores, use_one_thread
from utils.errors import UserError, user_facing
from utils.rasterizer import RENDERERS
from utils.stopping import obey_stop_signals

MOST_WORKERS = 16  # by default: a process needs half a gigabyte, and beyond this the writing process is the bottleneck

_preparer: FramePreparer | None = None  # of this worker process


def _start_worker(mano: tuple[str, str], colours: np.ndarray, renderer: str) -> None:
    global _preparer
    _preparer = FramePreparer(load_hands(*mano), colours, renderer)


def _work(tasks: list[FrameTask]) -> list[PreparedFrame | Skip]:
    assert _preparer is not None  # set when the process starts
    return _preparer(tasks)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Prepare InterHand2.6M: crops, masks, dense maps and annotations.')
    parser.add_argument('--data_path', required=True, help="folder with InterHand2.6M's images/ and annotations/")
    parser.add_argument('--save_path', required=True, help='output folder of the prepared data set')
    parser.add_argument('--splits', nargs='+', metavar='SPLIT', help='train, val, test (default: all that exist)')
    parser.add_argument(
        '--hands',
        choices=('interacting', 'all'),
        default='interacting',
        help='keep the frames with interacting hands, or also those with a single hand or none, about as many '
        '(default: %(default)s)',
    )
    parser.add_argument(
        '--shard', metavar='I/N', help='prepare only part I (1 to N) of N of each split: a task of a job array'
    )
    parser.add_argument('--merge', action='store_true', help='merge the finished shards; other options as they were')
    parser.add_argument('--workers', type=int, help=f'processes (default: one per core, at most {MOST_WORKERS})')
    parser.add_argument('--renderer', choices=sorted(RENDERERS), default='torch')
    parser.add_argument('--colours', metavar='FILE', help='v_color.pkl (default: colours by position on the hand)')
    add_config_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    arguments.splits, keys = split_off_pairs(arguments.splits or [])
    arguments.opts = keys + arguments.opts
    if unknown := [word for word in arguments.splits if word not in SPLITS]:
        raise UserError(f"--splits: '{unknown[0]}' is not a split; it must be one of {', '.join(SPLITS)}.")
    if arguments.shard is not None:
        if arguments.merge:
            raise UserError('--shard prepares a part and --merge merges all parts; pass only one of them.')
        arguments.shard = parse_shard(arguments.shard)
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f'--workers is {arguments.workers}; it must be at least 1.')
    return arguments


@user_facing
def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    arguments = parse_arguments(argv)
    with obey_stop_signals():
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Prepare or merge the splits that the command line names."""
    cfg = load_config(arguments.cfg, arguments.opts)
    mano = (cfg.MANO.SOURCE, cfg.MANO.PATH)
    models = load_hands(*mano)
    colours = load_colours(arguments.colours) if arguments.colours else canonical_colours(models)
    splits = [RawSplit(arguments.data_path, name) for name in arguments.splits or raw.find_splits(arguments.data_path)]
    save_path = Path(arguments.save_path)
    check_hand_model_record(arguments.data_path, models)
    check_hand_model_record(save_path, models)
    common = {
        'format': FORMAT,
        'hand_model': models.identity,
        'renderer': arguments.renderer,
        'vertex_colours': hashlib.sha256(colours.tobytes()).hexdigest()[:12],
    }
    if arguments.hands == 'all':
        common['hands'] = 'all'  # absent from the records of 'interacting', as in those of earlier versions
    todo = [(split, settings_of(split, common)) for split in splits]
    if arguments.merge:
        merge_splits(todo, save_path)
        return
    use_one_thread()
    preparer = FramePreparer(models, colours, arguments.renderer)
    preparer.rasterize(
        torch.ones(1, 3, 3), torch.tensor([[0, 1, 2]]), torch.eye(3)[None], (4, 4)
    )  # is the renderer installed?
    save_path.mkdir(parents=True, exist_ok=True)
    claim_hand_model_record(save_path, models.identity)

    workers = arguments.workers or min(usable_cores(), MOST_WORKERS)
    if workers == 1:
        for split, settings in todo:
            prepare_split(split, save_path, settings, lambda chunks: map(preparer, chunks), arguments.shard)
        return
    with worker_pool(workers, _start_worker, mano, colours, arguments.renderer) as pool:
        for split, settings in todo:
            prepare_split(
                split,
                save_path,
                settings,
                lambda chunks: ordered_map(pool, _work, chunks, 2 * workers),
                arguments.shard,
            )
