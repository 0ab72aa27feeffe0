"""Skeletal motion of one hand as a BVH file: 16 joints and 5 end sites, centimetres and degrees, y up.

The root is the wrist. Every joint rotates by Rz Rx Ry of its channels in its parent's frame; with all channels at zero,
the skeleton is the flat hand in the hand model's axes. The frame rate is constant: see ``slots``.
"""

from pathlib import Path

import numpy as np

from inference.motion.skeleton import CHAIN_NAMES, CHILDREN, TIPS_OF, UPRIGHT, Track, slots
from utils.files import atomic_file
from utils.hand import CHAIN_PARENTS, WRIST

UNITS_PER_M = 100.0  # centimetres, as motion capture software expects
DECIMALS = 6  # of centimetres and degrees
BLOCK = 1024  # frames in memory at a time
_LOCK = 1e-9  # cosine of the middle angle below which the outer two turn about the same axis


def write_bvh(
    path: Path,
    track: Track,
    *,
    rate: float,
    longest_s: float,
    last: tuple[int, float] | None = None,
    durable: bool = True,
) -> None:
    """Write the motion of one hand atomically. Where the hand is missing its last pose is held; before that, its first.

    rate: frames/s of the file; longest_s: see ``slots``; last: number and time in seconds of the recording's last
    frame, if that is behind the track's.
    """
    frames, times = track.rows['frame'], track.rows['time_s']
    if last is not None and last[0] > frames[-1]:
        frames, times = np.append(frames, last[0]), np.append(times, last[1])
    begins = slots(frames, times, rate=rate, longest_s=longest_s)
    count = int(begins[-1]) + 1
    begins = begins[track.seen]
    begins[0] = 0
    repeats = np.diff(begins, append=count)
    order = _depth_first(WRIST)
    before = np.zeros((0, 3 * len(order)))
    line = ' '.join([f'%.{DECIMALS}f'] * (3 + 3 * len(order))) + '\n'
    with atomic_file(path, durable=durable) as file:
        lines = [
            'HIERARCHY',
            *_hierarchy(track, WRIST, ''),
            'MOTION',
            f'Frames: {count}',
            f'Frame Time: {1 / rate:.10f}',
        ]
        file.write(('\n'.join(lines) + '\n').encode())
        for start in range(0, len(begins), BLOCK):
            block = np.arange(start, min(start + BLOCK, len(begins)))
            rotations = track.rotations(block).numpy()
            rotations[:, WRIST] *= UPRIGHT[:, None]
            angles = np.degrees(euler_zxy(rotations[:, order])).reshape(len(block), -1)
            angles = np.unwrap(np.concatenate([before, angles]), axis=0, period=360)[len(before) :]
            before = angles[-1:]
            wrists = track.wrists[block] * UPRIGHT * UNITS_PER_M
            for values, count in zip(np.concatenate([wrists, angles], 1).tolist(), repeats[block].tolist()):
                file.write((line % tuple(values)).encode() * count)


def euler_zxy(rotations: np.ndarray) -> np.ndarray:
    """Angles (..., 3) rad about z, x and y with R = Rz Rx Ry; rotations (..., 3, 3)."""
    cosine = np.hypot(rotations[..., 0, 1], rotations[..., 1, 1])
    x = np.arctan2(rotations[..., 2, 1], cosine)
    locked = cosine < _LOCK  # then only a sum of the others is determined: all of it is put into z
    z = np.where(
        locked,
        np.arctan2(rotations[..., 1, 0], rotations[..., 0, 0]),
        np.arctan2(-rotations[..., 0, 1], rotations[..., 1, 1]),
    )
    y = np.where(locked, 0, np.arctan2(-rotations[..., 2, 0], rotations[..., 2, 2]))
    return np.stack([z, x, y], -1)


def _depth_first(joint: int) -> list[int]:
    """A joint and its descendants in the order of the file."""
    return [joint, *(later for child in CHILDREN[joint] for later in _depth_first(child))]


def _hierarchy(track: Track, joint: int, indent: str) -> list[str]:
    name = f'{track.model.side}_{CHAIN_NAMES[joint]}'
    if joint == WRIST:
        kind, channels, offset = 'ROOT', 'CHANNELS 6 Xposition Yposition Zposition', np.zeros(3)
    else:
        kind, channels = 'JOINT', 'CHANNELS 3'
        offset = track.rest_joints[joint] - track.rest_joints[CHAIN_PARENTS[joint]]
    inside = indent + '\t'
    lines = [f'{indent}{kind} {name}', indent + '{']
    lines += [inside + _offset(offset), f'{inside}{channels} Zrotation Xrotation Yrotation']
    for child in CHILDREN[joint]:
        lines += _hierarchy(track, child, inside)
    if joint in TIPS_OF:
        tip = track.rest_tips[TIPS_OF[joint]] - track.rest_joints[joint]
        lines += [inside + 'End Site', inside + '{', f'{inside}\t{_offset(tip)}', inside + '}']
    return [*lines, indent + '}']


def _offset(metres: np.ndarray) -> str:
    return 'OFFSET ' + ' '.join(f'{value * UNITS_PER_M:.{DECIMALS}f}' for value in metres)
