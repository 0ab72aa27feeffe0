"""Files of hands and their motion for other programs: MANO parameters (npz), animated meshes (glb), skeletons (bvh)."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch

from inference.media import LONGEST_HOLD
from inference.motion.bvh import write_bvh
from inference.motion.gltf import write_glb, written_weights
from inference.motion.parameters import ROW, row, write_image_npz, write_npz
from inference.motion.skeleton import Track, deviation, posed_joints, posed_vertices, sample, track, true_vertices
from inference.reconstruct import Reconstruction
from manopth import HandPair
from utils.hand import SIDES

FORMATS = ('npz', 'glb', 'bvh')
NPZ, GLB = 'hands.npz', 'hands.glb'
MOTION_FILES = frozenset([NPZ, GLB, *(f'{side}.bvh' for side in SIDES)])
IMAGE_RATE = 30.0  # frames/s stated in the BVH files of an image, which have one frame


class MotionRecorder:
    """Collects the hands of a video, frame by frame, in a file without a name; memory does not grow with the frames.

    Without a file, nothing is collected.
    """

    def __init__(self, file: BinaryIO | None, models: HandPair):
        self.file, self.models, self.count = file, models, 0
        self.last: tuple[int, float] | None = None  # number and time of the last frame
        self.summary: dict[str, Any] = {}  # what video.json records, after the files are written

    def add(self, hands: Reconstruction | None, *, frame: int, time_s: float, filled: bool = False) -> None:
        """hands: one reconstruction, without the leading axis and on the CPU, None where the frame shows none; frame
        and time_s increase; filled: the hands are interpolated."""
        self.last = frame, time_s
        if self.file is not None and hands is not None:
            self.file.write(row(hands, self.models, frame=frame, time_s=time_s, filled=filled).tobytes())
            self.count += 1


@contextmanager
def motion_recorder(
    folder: Path, formats: tuple[str, ...], models: HandPair, *, rate: float
) -> Iterator[MotionRecorder]:
    """Record a video's hands in the block; at its end, write them to ``folder`` in each of ``formats``.

    rate: frames/s of the BVH files. Nothing is written if the block fails or adds no frame, and no
    file if no frame shows hands.
    """
    if not formats:
        yield MotionRecorder(None, models)
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        recorder = MotionRecorder(cast(BinaryIO, file), models)
        yield recorder
        if recorder.last is not None:
            file.flush()
            count = recorder.count
            rows = np.memmap(file, ROW, 'r', shape=(count,)) if count else np.zeros(0, ROW)
            recorder.summary = {'motion': write_motion(folder, formats, rows, models, rate=rate, last=recorder.last)}


def write_motion(
    folder: Path, formats: tuple[str, ...], rows: np.ndarray, models: HandPair, *, rate: float, last: tuple[int, float]
) -> dict[str, Any]:
    """Write a recording in each of ``formats`` -> how far the files are from the hands, and where hands are missing.

    last: number and time in seconds of the video's last frame.
    """
    tracks = [each for hand in range(2) if (each := track(rows, models, hand)) is not None]
    present = {each.model.side: each for each in tracks}
    summary: dict[str, Any] = {
        'formats': list(formats),
        'gaps': {side: present[side].gaps(last[0] + 1) if side in present else None for side in SIDES},
    }
    if 'npz' in formats and tracks:
        write_npz(folder / NPZ, rows, models)
    if 'glb' in formats and tracks:
        summary['glb'] = {'units': 'm', **_glb_deviation(tracks)}
        write_glb(folder / GLB, tracks, interval=1 / rate, hand_model=models.identity, **summary['glb'])
    if 'bvh' in formats:
        for each in tracks:
            write_bvh(folder / f'{each.model.side}.bvh', each, rate=rate, longest_s=LONGEST_HOLD, last=last)
        if tracks:
            summary['bvh'] = {'units': 'cm', 'frames_per_second': rate, **_bvh_deviation(tracks)}
    return summary


def write_image_motion(folder: Path, formats: tuple[str, ...], hands: Reconstruction, models: HandPair) -> None:
    """Write the files of an image, hands.npz and BVH files of one frame; ``write_image_files`` writes its hands.glb."""
    image_row = row(hands, models)
    if 'npz' in formats:
        write_image_npz(folder / NPZ, image_row, models)
    if 'bvh' in formats:
        for hand, side in enumerate(SIDES):
            if (each := track(image_row, models, hand)) is not None:
                write_bvh(folder / f'{side}.bvh', each, rate=IMAGE_RATE, longest_s=LONGEST_HOLD, durable=False)


def _glb_deviation(tracks: list[Track]) -> dict[str, Any]:
    """Distance of the skinned mesh from the hand model's, which has blend shapes for the pose and betas per frame."""
    pairs = []
    for each in tracks:
        chosen, weights = sample(each), written_weights(each.model.skinning_weights)
        pairs.append((posed_vertices(each, chosen, weights), true_vertices(each, chosen)))
    return deviation(pairs)


def _bvh_deviation(tracks: list[Track]) -> dict[str, Any]:
    """Distance of the skeleton's joints and end sites from the 21 joints."""
    pairs = []
    for each in tracks:
        chosen = sample(each)
        rows = each.rows['joints'][each.seen[chosen], each.hand].astype(np.float64)
        pairs.append((posed_joints(each, chosen), torch.from_numpy(rows)))
    return deviation(pairs)
