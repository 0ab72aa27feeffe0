"""The skeleton of each hand over a recording, as animated meshes and BVH files need it: one rest pose, frame by frame.

Both forms hold one shape per recording, so a hand gets the mean of its betas.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from manopth import HandModel, HandPair
from manopth.lbs import HandArrays, forward_kinematics, linear_blend_skinning, skin_mesh
from manopth.rotations import axis_angle_to_matrix
from utils.hand import CHAIN_PARENTS, JOINT_NAMES, MANO_TO_JOINTS, NUM_CHAIN_JOINTS, TIP_VERTICES, WRIST

CHAIN_NAMES = tuple(JOINT_NAMES[MANO_TO_JOINTS.index(joint)] for joint in range(NUM_CHAIN_JOINTS))
CHILDREN = tuple(
    tuple(child for child, parent in enumerate(CHAIN_PARENTS) if parent == joint) for joint in range(NUM_CHAIN_JOINTS)
)
TIPS_OF = dict(zip((15, 3, 6, 12, 9), range(5)))  # outermost chain joint -> its fingertip, thumb to little finger
UPRIGHT = np.array([1.0, -1.0, -1.0])  # camera axes (y down, z forward) <-> axes of viewers (y up, z backward)
MEASURED_FRAMES = 64  # at most, spread over the recording


class Track(NamedTuple):
    """One hand over a recording: the frames in which it exists, and its rest pose (flat, in the hand model's axes)."""

    model: HandModel
    hand: int  # 0 left, 1 right
    rows: np.ndarray  # of the whole recording
    seen: np.ndarray  # (N,) rows in which the hand exists
    rest_vertices: np.ndarray  # (778, 3) m
    rest_joints: np.ndarray  # (16, 3) m

    @property
    def rest_tips(self) -> np.ndarray:
        """(5, 3) m, thumb to little finger."""
        return self.rest_vertices[list(TIP_VERTICES)]

    @property
    def frames(self) -> np.ndarray:
        """(N,) frame numbers."""
        return self.rows['frame'][self.seen]

    @property
    def times(self) -> np.ndarray:
        """(N,) s."""
        return self.rows['time_s'][self.seen]

    @property
    def wrists(self) -> np.ndarray:
        """(N, 3) m, camera axes."""
        return self.rows['joints'][:, self.hand, WRIST][self.seen].astype(np.float64)

    def axis_angle(self, joint: int) -> np.ndarray:
        """(N, 3) rad: the rotation of a chain joint in its parent's frame; of the wrist in camera axes."""
        if joint == WRIST:
            values = self.rows['global_orient'][:, self.hand]
        else:
            values = self.rows['hand_pose'][:, self.hand, 3 * joint - 3 : 3 * joint]
        return values[self.seen].astype(np.float64)

    def rotations(self, chosen: np.ndarray) -> Tensor:
        """(n, 16, 3, 3) of the hand's frames ``chosen``, positions in ``seen``."""
        rows = self.seen[chosen]
        root, fingers = self.rows['global_orient'][rows, self.hand], self.rows['hand_pose'][rows, self.hand]
        together = np.concatenate([root, fingers], -1).astype(np.float64)
        return axis_angle_to_matrix(torch.from_numpy(together).unflatten(-1, (NUM_CHAIN_JOINTS, 3)))

    def gaps(self, frames: int) -> list[tuple[int, int]]:
        """First and last number of every stretch without this hand, of a video's ``frames`` frames."""
        ends = np.concatenate([[-1], self.frames, [frames]])
        return [(int(a) + 1, int(b) - 1) for a, b in zip(ends, ends[1:]) if b - a > 1]


def track(rows: np.ndarray, models: HandPair, hand: int) -> Track | None:
    """The track of a hand, 0 left and 1 right; None if no frame has it."""
    columns = ('global_orient', 'hand_pose', 'betas', 'transl', 'joints')
    finite = [np.isfinite(rows[name][:, hand]) for name in columns]
    seen = np.logical_and.reduce([each.all(tuple(range(1, each.ndim))) for each in finite]).nonzero()[0]
    if not len(seen):
        return None
    model = models[hand]
    betas = rows['betas'][:, hand][seen].mean(0, dtype=np.float64)
    vertices = model.template + model.shape_dirs @ betas
    return Track(model, hand, rows, seen, vertices, model.joint_regressor @ vertices)


def slots(frames: np.ndarray, times: np.ndarray, *, rate: float, longest_s: float) -> np.ndarray:
    """(N,) int: the frame of a file of constant rate at which each row begins, as ``inference.media.VideoWriter`` does.

    frames, times (N,): increasing numbers and seconds. A row lasts until the next one begins, but at most
    ``longest_s`` for every frame number up to that. Rows that begin at one frame override each other.
    """
    out, left_out, now = [], 0, 0
    for number, (frame, time) in enumerate(zip(frames.tolist(), times.tolist())):
        due = round(time * rate) - left_out - now
        steps = frame - frames[number - 1] if number else frame + 1
        longest = round(longest_s * rate * max(1, int(steps)))
        left_out += max(0, due - longest)
        now += min(max(0, due), longest)
        out.append(now)
    return np.array(out, np.int64)


def posed_joints(track: Track, chosen: np.ndarray) -> Tensor:
    """(n, 21, 3) m, camera axes: the skeleton of rigid bones, fingertips included, in the order of the 21 joints."""
    rest = torch.from_numpy(track.rest_joints)
    world, chain = forward_kinematics(track.rotations(chosen), rest.expand(len(chosen), -1, -1))
    outermost = list(TIPS_OF)
    bones = torch.from_numpy(track.rest_tips) - rest[outermost]
    tips = chain[:, outermost] + (world[:, outermost] @ bones[..., None]).squeeze(-1)
    placed = torch.from_numpy(track.wrists[chosen]) - rest[WRIST]
    return torch.cat([chain, tips], 1)[:, list(MANO_TO_JOINTS)] + placed[:, None]


def posed_vertices(track: Track, chosen: np.ndarray, weights: np.ndarray) -> Tensor:
    """(n, 778, 3) m, camera axes: linear blend skinning of the rest mesh alone; weights (778, 16)."""
    rest, count = torch.from_numpy(track.rest_joints), len(chosen)
    vertices, _ = skin_mesh(
        rest_vertices=torch.from_numpy(track.rest_vertices).expand(count, -1, -1),
        rest_joints=rest.expand(count, -1, -1),
        rotations=track.rotations(chosen),
        skinning_weights=torch.from_numpy(weights),
    )
    return vertices + (torch.from_numpy(track.wrists[chosen]) - rest[WRIST])[:, None]


def true_vertices(track: Track, chosen: np.ndarray) -> Tensor:
    """(n, 778, 3) m, camera axes: the hand model's mesh, each frame with its own betas and blend shapes."""
    rows = track.seen[chosen]
    betas, transl = (track.rows[name][rows, track.hand].astype(np.float64) for name in ('betas', 'transl'))
    arrays = HandArrays.from_models([track.model], torch.float64)
    vertices, _ = linear_blend_skinning(arrays, track.rotations(chosen)[:, None], torch.from_numpy(betas)[:, None])
    return vertices[:, 0] + torch.from_numpy(transl)[:, None]


def sample(track: Track) -> np.ndarray:
    """Positions in ``track.seen`` at which a file is compared with the hand model."""
    count = len(track.seen)
    return np.linspace(0, count - 1, min(count, MEASURED_FRAMES)).round().astype(np.int64)


def deviation(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Mean and largest distance in mm of corresponding points (..., 3) m."""
    distances = torch.cat([(a - b).norm(dim=-1).flatten() for a, b in pairs]) * 1e3
    return {'mean_mm': round(float(distances.mean()), 4), 'worst_mm': round(float(distances.amax()), 4)}
