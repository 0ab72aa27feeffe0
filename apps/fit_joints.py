"""Fit MANO to the 3D joints of any hand tracker: 21 joints per hand and frame -> parameters and residuals.

    python apps/fit_joints.py JOINTS --order NAME --units mm|m [--side left|right] [--out FILE.npz] [KEY VALUE ...]

JOINTS is a file of one of these forms, T frames:
    .npy, .npz   (T, 2, 21, 3) for both hands, left first; (T, 21, 3) with --side for one hand; without T for one frame.
                 Of several arrays in an .npz, joints is read, and frame and time_s where they exist.
    .csv         a row per frame of 126 numbers, or 63 with --side; columns frame and time_s may come first, named in a
                 first line. The demo's joints.csv is one (--order ours --units m).
NaN, empty cells, and several joints of a hand at exactly (0, 0, 0) are missing joints; the fit ignores them. All frames
and both hands share one shape: a file shows one person. Axes are kept, but must be right-handed.

Orders: ours, openpose and mediapipe (the same: wrist, thumb to little finger, each from base to tip), mano (the 16
joints of the kinematic chain, then 5 fingertips), interhand (each finger from tip to base, then the wrist; of 42
joints, the right hand first).

FILE.npz (default: JOINTS_mano.npz) has the form of the demo's hands.npz, with residual_mm for every joint and note for
every hand without a fit (docs/formats.md). MANO.SOURCE standin fits the stand-in hand instead of the licensed files.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.stopping import end_at_stop_signals

end_at_stop_signals()  # until main handles them

import numpy as np
import torch
from tqdm import tqdm

from dataset.joint_files import NO_JOINTS, ORDERS, UNITS, JointTrack, implausible, read_joint_file
from inference.motion.parameters import ROW, write_npz
from manopth import HandPair
from manopth.fitting import MIN_VALID_JOINTS, MIN_VALID_PALM_JOINTS, fittable
from manopth.recordings import Fit, fit_time_steps
from models.hands import load_hands
from utils.config import add_config_arguments, load_config
from utils.distributed import choose_device
from utils.errors import UserError, printable, user_facing
from utils.files import remove_stale_partials
from utils.hand import SIDES
from utils.ownership import owned
from utils.stopping import check_stop, obey_stop_signals

TOO_FEW = 'too few valid joints'
HIGH_RESIDUAL_MM = 12.0  # mean residual above which order, side or axes are probably wrong; fits of hands have 1 to 6
FRAMES_SHOWN = 10


@user_facing
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('joints', type=Path, metavar='JOINTS', help='.npy, .npz or .csv file')
    parser.add_argument('--order', required=True, choices=ORDERS, help='order of the 21 joints')
    parser.add_argument('--units', required=True, choices=UNITS)
    parser.add_argument('--side', choices=SIDES, help='for a file of one hand')
    parser.add_argument('--out', type=Path, metavar='FILE.npz', help='default: JOINTS_mano.npz, beside JOINTS')
    add_config_arguments(parser)
    options = parser.parse_intermixed_args(arguments)
    if options.joints.is_dir():
        raise UserError(f'{printable(options.joints)} is a folder. Pass a file of joints.')
    out = options.out or options.joints.with_name(f'{options.joints.stem}_mano.npz')
    if out.suffix.lower() != '.npz':
        raise UserError(f'--out {printable(out)} must end in .npz.')
    if out.resolve() == options.joints.resolve():
        raise UserError(f'--out {printable(out)} would overwrite the joints. Choose another name.')
    cfg = load_config(options.cfg, options.opts)
    device = str(choose_device(cfg.DEVICE))
    models = load_hands(cfg.MANO.SOURCE, cfg.MANO.PATH)
    with obey_stop_signals():
        track = read_joint_file(options.joints, order=options.order, units=options.units, side=options.side)
        note = reasons_to_skip(track)
        if not (note == '').any():
            reasons = ', '.join(sorted(set(note.flat)))
            raise UserError(
                f'No hand in {printable(options.joints)} can be fitted ({reasons}): a hand needs {MIN_VALID_JOINTS} '
                f'joints, {MIN_VALID_PALM_JOINTS} of them wrist or knuckles, that do not coincide.'
            )
        with owned(out):
            remove_stale_partials(out.parent, of=out.name)
            fit = fit_track(track, note, models, device)
            rows = as_rows(track, fit, models)
            write_npz(out, rows, models, without=('time_s', 'filled', 'intrinsics'), more=columns(track, fit, note))
    print(summary(track, fit, note))
    print(f'written: {printable(out)}')


def reasons_to_skip(track: JointTrack) -> np.ndarray:
    """(T, 2) of text: why a hand is not fitted; '' if it is."""
    note = implausible(track.points)
    few = ~fittable(torch.from_numpy(track.valid)).numpy()
    note[(note == '') & few] = TOO_FEW
    return note


def fit_track(track: JointTrack, note: np.ndarray, models: HandPair, device: str) -> Fit:
    """Fit every hand without a note, with one shape."""
    valid = torch.from_numpy(track.valid & (note == '')[..., None])
    points = torch.from_numpy(np.nan_to_num(track.points))
    with tqdm(total=len(points), desc='fitting', unit='frame', disable=None) as bar:

        def progress(count: int) -> None:
            bar.update(count)
            check_stop()

        person = torch.zeros(len(points), dtype=torch.long)
        return fit_time_steps(models, points, valid, person, device=device, progress=progress)


def as_rows(track: JointTrack, fit: Fit, models: HandPair) -> np.ndarray:
    """The fit as a recording, (T,) of ROW."""
    rows = np.zeros(len(track.points), ROW)
    rows['frame'] = track.frame
    mean = np.stack([model.pose_mean for model in models])
    rows['global_orient'], rows['hand_pose'] = fit.pose[..., :3].numpy(), fit.pose[..., 3:].numpy() + mean
    rows['betas'], rows['transl'], rows['joints'] = fit.shape.numpy(), fit.trans.numpy(), fit.joints.numpy()
    return rows


def columns(track: JointTrack, fit: Fit, note: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of the file beside the parameters."""
    times = {} if track.time_s is None else {'time_s': track.time_s}
    return {**times, 'residual_mm': fit.residual.numpy().astype(np.float32), 'note': note}


def summary(track: JointTrack, fit: Fit, note: np.ndarray) -> str:
    lines = [f'{len(note)} frames']
    for hand, side in enumerate(SIDES):
        fitted = note[:, hand] == ''
        if fitted.any():
            mean = fit.residual[torch.from_numpy(fitted), hand].nanmean(-1).numpy()
            worst = int(mean.argmax())
            lines.append(
                f'  {side}: {len(mean)} fitted; residual over the valid joints: mean {mean.mean():.2f} mm, median '
                f'{np.median(mean):.2f} mm, worst {mean[worst]:.2f} mm (frame {track.frame[fitted][worst]})'
            )
            if np.median(mean) > HIGH_RESIDUAL_MM:
                lines.append(f'  Warning: these are no good fits of a {side} hand. Check --order, --side and the axes.')
        for reason in sorted(set(note[~fitted, hand]) - {NO_JOINTS}):
            frames = track.frame[note[:, hand] == reason]
            more = ', ...' if len(frames) > FRAMES_SHOWN else ''
            lines.append(
                f'  {side}: {len(frames)} skipped, {reason}: frame {", ".join(map(str, frames[:FRAMES_SHOWN]))}{more}'
            )
        absent = int((note[:, hand] == NO_JOINTS).sum())
        if 0 < absent < len(note):
            lines.append(f'  {side}: {absent} frames without joints')
    return '\n'.join(lines)


if __name__ == '__main__':
    sys.exit(main())
