"""Fit hand-model parameters to frames that have only 3D joints: own captures, or InterHand2.6M without NeuralAnnot.

    python dataset/fit_mano.py --data_path INTERHAND

reads the 42 annotated joints of every time step that has an image and writes the missing
annotations/<split>/InterHand2.6M_<split>_MANO_NeuralAnnot.json, with ..._fit_residuals.csv beside it.
"""

import argparse
import csv
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.hand_model_record import HAND_MODEL_RECORD, check_hand_model_record, claim_hand_model_record
from dataset.prepare.raw import SPLITS, RawSplit, RecordError, annotation_file, find_splits
from manopth import HandPair
from manopth.fitting import fittable
from manopth.recordings import Fit, fit_time_steps
from models.hands import load_hands
from utils.config import add_config_arguments, load_config
from utils.distributed import choose_device
from utils.errors import UserError, user_facing
from utils.files import read_json, remove_stale_partials, write_atomically
from utils.hand import NUM_JOINTS, SIDES
from utils.ownership import owned
from utils.stopping import check_stop, obey_stop_signals, saying_kept

DECIMALS = 7  # of rad and m in the file
NAMES_SHOWN = 3
TOO_FEW = 'too few valid joints'
RESIDUAL_COLUMNS = ('capture', 'frame', 'hand', 'valid_joints', 'mean_mm', 'worst_mm', 'note')

TimeStep = tuple[str, str]  # capture, frame


class Joints(NamedTuple):
    """The annotated joints of T time steps."""

    names: list[TimeStep]
    points: np.ndarray  # (T, 2, 21, 3) m, world
    valid: np.ndarray  # (T, 2, 21) bool
    unreadable: dict[TimeStep, str]  # time steps with images but without usable joints, and why


def read_joints(split: RawSplit) -> Joints:
    """The joints of every time step that has an image, in the order of capture and frame."""
    names = sorted(
        {(frame.capture, str(frame.frame_idx)) for frame in split.iterate_frames()},
        key=lambda name: (len(name[0]), name[0], int(name[1])),
    )
    read, unreadable = {}, {}
    for name in names:
        try:
            read[name] = split.joints(*name)
        except RecordError as error:
            unreadable[name] = str(error)
    points = np.array([points for points, _ in read.values()]).reshape(-1, 2, NUM_JOINTS, 3)
    valid = np.array([valid for _, valid in read.values()], dtype=bool).reshape(-1, 2, NUM_JOINTS)
    return Joints(list(read), points, valid, unreadable)


def missing_fits(split: RawSplit, names: list[TimeStep]) -> np.ndarray:
    """(T, 2) bool: hands without usable parameters in the split's annotation file."""
    if not split.file('MANO_NeuralAnnot').exists():
        return np.ones((len(names), 2), dtype=bool)

    def lacking(name: TimeStep) -> list[bool]:
        try:
            fits = split.mano(*name)
        except RecordError:
            return [True, True]
        return [not fit or not all(np.isfinite(values).all() for values in fit) for fit in map(fits.get, SIDES)]

    return np.array([lacking(name) for name in names], dtype=bool).reshape(-1, 2)


def fit_split(split: RawSplit, models: HandPair, *, overwrite: bool, device: str) -> str:
    """Fit the missing hands of a split, write annotation file and residuals -> summary lines for the user.

    Owns the annotation file from reading to writing. Raises UserError if another process does.
    """
    with owned(split.file('MANO_NeuralAnnot')):
        remove_stale_partials(split.file('MANO_NeuralAnnot').parent)
        return _fit_split(split, models, overwrite=overwrite, device=device)


def _fit_split(split: RawSplit, models: HandPair, *, overwrite: bool, device: str) -> str:
    joints = read_joints(split)
    valid = torch.from_numpy(joints.valid)
    path = split.file('MANO_NeuralAnnot')
    everything = np.ones((len(joints.names), 2), dtype=bool)
    lacking = torch.from_numpy(everything if overwrite else missing_fits(split, joints.names))
    wanted = fittable(valid) & lacking
    too_few = lacking & ~fittable(valid) & valid.any(-1)
    kept = int((fittable(valid) & ~lacking).sum())
    report = [f'{split.split}: {len(joints.names)} time steps']
    if kept:
        report.append(f'{kept} hands have parameters already and are kept (--overwrite fits them again)')

    rows = wanted.any(1).nonzero().squeeze(1)
    names = [joints.names[row] for row in rows.tolist()]
    numbers = {capture: number for number, capture in enumerate(dict.fromkeys(capture for capture, _ in names))}
    with tqdm(total=len(rows), desc=f'fitting {split.split}', unit=' time steps', disable=None) as bar:

        def progress(count: int) -> None:
            bar.update(count)
            check_stop()

        fit = fit_time_steps(
            models,
            torch.from_numpy(joints.points)[rows],
            valid[rows],
            torch.tensor([numbers[capture] for capture, _ in names], dtype=torch.long),
            device=device,
            progress=progress,
        )

    mean, worst = fit.residual.nanmean(-1), fit.residual.nan_to_num(-1).amax(-1)
    table = {(*name, side): (0, '', '', reason) for name, reason in joints.unreadable.items() for side in SIDES}
    for row, hand in too_few.nonzero().tolist():
        table[(*joints.names[row], SIDES[hand])] = (int(valid[row, hand].sum()), '', '', TOO_FEW)
    fitted: dict[tuple[str, str, str], float] = {}
    for place, hand in wanted[rows].nonzero().tolist():
        key = (*names[place], SIDES[hand])
        fitted[key] = float(mean[place, hand])
        seen = int(valid[rows[place], hand].sum())
        table[key] = (seen, f'{mean[place, hand]:.3f}', f'{worst[place, hand]:.3f}', 'fitted')
    if fitted or overwrite or not path.exists():
        content = {} if overwrite or not path.exists() else read_json(path)
        _insert(content, joints.names, names, fit, wanted[rows])
        _write_residuals(path.with_name(f'InterHand2.6M_{split.split}_fit_residuals.csv'), table, fresh=overwrite)
        # First: parameters without a record of their hand model would pass as official.
        claim_hand_model_record(split.root, models.identity, replace=True)
        write_atomically(path, json.dumps(content, separators=(',', ':')).encode())
    return '\n'.join(
        [
            ', '.join(report),
            *_summary(fitted, [joints.names[i] for i, _ in too_few.nonzero().tolist()], list(joints.unreadable)),
        ]
    )


def _insert(
    content: dict[str, Any], all_names: list[TimeStep], names: list[TimeStep], fit: Fit, wanted: Tensor
) -> None:
    """Insert the fits into the annotation file's nested dictionaries; a hand without one becomes null."""
    for capture, frame in all_names:
        entry = content.setdefault(capture, {}).get(frame) or {}
        content[capture][frame] = {side: entry.get(side) for side in ('right', 'left')}
    pose, shape, trans = (values.numpy().round(DECIMALS) for values in fit[:3])
    for place, hand in wanted.nonzero().tolist():
        capture, frame = names[place]
        content[capture][frame][SIDES[hand]] = {
            key: values[place, hand].tolist() for key, values in (('pose', pose), ('shape', shape), ('trans', trans))
        }


def _write_residuals(path: Path, table: dict[tuple[str, str, str], tuple], *, fresh: bool) -> None:
    """Write one line per hand; lines of earlier runs stay unless ``fresh`` or fitted again."""
    rows: dict[tuple[str, ...], tuple] = {}
    if path.exists() and not fresh:
        with open(path, newline='') as file:
            header, *lines = list(csv.reader(file)) or [[]]
        if tuple(header) == RESIDUAL_COLUMNS:
            rows = {tuple(line[:3]): tuple(line[3:]) for line in lines if len(line) == len(RESIDUAL_COLUMNS)}
    rows |= dict(table.items())
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows([RESIDUAL_COLUMNS, *((*key, *row) for key, row in rows.items())])
    write_atomically(path, text.getvalue().encode())


def _summary(
    fitted: dict[tuple[str, str, str], float], too_few: list[TimeStep], unreadable: list[TimeStep]
) -> list[str]:
    def shown(names: list[TimeStep]) -> str:
        first = ', '.join(f'{capture}/{frame}' for capture, frame in names[:NAMES_SHOWN])
        return first + (', ...' if len(names) > NAMES_SHOWN else '')

    lines = []
    if fitted:
        values = np.array(list(fitted.values()))
        worst = sorted(fitted, key=lambda name: fitted[name], reverse=True)[:NAMES_SHOWN]
        lines.append(
            f'  {len(values)} hands fitted; residual over the valid joints: mean {values.mean():.2f} mm, '
            f'median {np.median(values):.2f} mm, worst {values.max():.2f} mm'
        )
        named = [f'{capture}/{frame} {side} {fitted[capture, frame, side]:.2f} mm' for capture, frame, side in worst]
        lines.append(f'  worst (capture/frame hand): {", ".join(named)}')
    else:
        lines = ['  nothing to fit']
    if too_few:
        lines.append(f'  {len(too_few)} hands with {TOO_FEW} are null (capture/frame): {shown(too_few)}')
    if unreadable:
        lines.append(f'  {len(unreadable)} time steps have images but no usable joints: {shown(unreadable)}')
    return lines


def check_mixing(data_path: Path, kept: list[Path], models: HandPair) -> None:
    """Refuse to mix fits of one hand model with parameters of another.

    Raises UserError if annotation files that stay were made with another hand, or are official and this one is not.
    """
    if not kept:
        return
    check_hand_model_record(data_path, models)
    if not (data_path / HAND_MODEL_RECORD).exists() and models[0].name != 'mano':
        raise UserError(
            f'{kept[0]} holds parameters of the official hand model, which cannot be mixed with those of '
            f'{models[0].name}. Use the official files (MANO.SOURCE files), or move that file away.'
        )


def _splits(text: str) -> list[str]:
    splits = text.split(',')
    if not set(splits) <= set(SPLITS):
        raise argparse.ArgumentTypeError(f"'{text}': pass some of {','.join(SPLITS)}, separated by commas")
    return splits


@user_facing
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_path', type=Path, required=True, help='folder with images/ and annotations/')
    parser.add_argument('--splits', type=_splits, metavar='train,val,test', help='default: all that exist')
    parser.add_argument('--overwrite', action='store_true', help='fit every hand, also those with parameters')
    add_config_arguments(parser)
    options = parser.parse_intermixed_args(arguments)
    cfg = load_config(options.cfg, options.opts)
    device = str(choose_device(cfg.DEVICE))
    models = load_hands(cfg.MANO.SOURCE, cfg.MANO.PATH)

    there = find_splits(options.data_path)
    splits = [RawSplit(options.data_path, name) for name in options.splits or there]
    redone = {split.split for split in splits} if options.overwrite else set()
    files = (annotation_file(options.data_path, name, 'MANO_NeuralAnnot') for name in there if name not in redone)
    kept = [path for path in files if path.exists()]
    check_mixing(options.data_path, kept, models)
    with obey_stop_signals():
        for split in splits:
            with saying_kept(f'Splits reported above are kept; nothing of {split.split} was written.'):
                report = fit_split(split, models, overwrite=options.overwrite, device=device)
            print(report, flush=True)
