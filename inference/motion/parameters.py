"""MANO parameters of a recording in the form that other programs read: axis-angle, translation, betas (hands.npz).

A recording is a structured array with one row per frame, in memory or mapped from a file (docs/formats.md).
"""

from pathlib import Path
from typing import Any

import numpy as np

from inference.reconstruct import Reconstruction
from manopth import HandModel, HandPair
from manopth.rotations import matrix_to_axis_angle
from utils.files import atomic_file
from utils.hand import JOINT_NAMES, SIDES, WRIST

FORMAT = 'dir-mano-1'  # of hands.npz; increment it when the meaning of a value changes
# Axis 0 of the values is the hand: left, right. Camera axes, metres, radians; NaN for a hand that is missing.
ROW = np.dtype(
    [
        ('frame', '<i8'),
        ('time_s', '<f8'),
        ('filled', '?'),  # interpolated, not predicted
        ('global_orient', '<f4', (2, 3)),
        ('hand_pose', '<f4', (2, 45)),  # relative to the flat hand: the model's mean pose is included
        ('betas', '<f4', (2, 10)),
        ('transl', '<f4', (2, 3)),  # added to the posed hand, which turns about its wrist
        ('joints', '<f4', (2, 21, 3)),
        ('intrinsics', '<f4', (3, 3)),
    ]
)
_OF_FRAMES = ('frame', 'time_s', 'filled')


def row(
    hands: Reconstruction, models: HandPair, *, frame: int = 0, time_s: float = 0.0, filled: bool = False
) -> np.ndarray:
    """(1,) of ROW from one reconstruction, without the leading axis and on the CPU."""
    out = np.zeros(1, ROW)
    out['frame'], out['time_s'], out['filled'] = frame, time_s, filled
    out['global_orient'] = matrix_to_axis_angle(hands.root_rotation.double()).numpy()
    out['joints'], out['betas'], out['intrinsics'] = (
        values.numpy() for values in (hands.joints, hands.shape, hands.intrinsics)
    )
    for hand, model in enumerate(models):
        coefficients, betas = hands.pose[hand].double().numpy(), hands.shape[hand].double().numpy()
        out['hand_pose'][0, hand] = model.pose_mean + coefficients @ model.pose_components
        out['transl'][0, hand] = hands.joints[hand, WRIST].double().numpy() - rest_wrist(model, betas)
        if not hands.present[hand]:
            for name in ('global_orient', 'hand_pose', 'betas', 'transl', 'joints'):
                out[name][0, hand] = np.nan
    return out


def rest_wrist(model: HandModel, betas: np.ndarray) -> np.ndarray:
    """(3,) m: the wrist of the unposed hand, about which ``global_orient`` turns; betas (10,)."""
    return model.joint_regressor[WRIST] @ (model.template + model.shape_dirs @ betas)


def write_npz(
    path: Path,
    rows: np.ndarray | np.void,
    models: HandPair,
    *,
    without: tuple[str, ...] = (),
    more: dict[str, np.ndarray] | None = None,
    durable: bool = True,
) -> None:
    """Write a recording as an .npz file without pickle, atomically; a mapped one passes through memory in parts.

    without: columns of ROW to leave out; more: further arrays.
    """
    arrays: dict[str, Any] = {name: rows[name] for name in ROW.names or () if name not in without} | (more or {})
    with atomic_file(path, durable=durable) as file:
        np.savez(
            file,
            format=np.array(FORMAT),
            hand_model=np.array(models.identity),
            side=np.array(SIDES),
            joint_names=np.array(JOINT_NAMES),
            flat_hand_mean=np.array(True),
            correct_left_shape=np.array(True),
            **arrays,
        )


def write_image_npz(path: Path, image_row: np.ndarray, models: HandPair) -> None:
    """Write the only row of an image's recording, without the axis of frames."""
    write_npz(path, image_row[0], models, without=_OF_FRAMES, durable=False)
