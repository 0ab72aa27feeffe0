"""Both hands over a recording as one animated GLB (glTF 2.0): skinned meshes, moved by their skeletons.

Per hand: a mesh in the flat rest pose with the hand model's skinning weights, 16 joint nodes named ``left_wrist``,
``left_thumb_1`` ..., and an animation of their rotations and of the wrist's position. A node above the wrists turns
camera axes upright (y up), as in the hands.glb of an image. trimesh, which writes that one, has no animation.
"""

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inference.motion.skeleton import CHAIN_NAMES, CHILDREN, Track
from utils.drawing import HAND_COLOURS_BGR
from utils.errors import UserError, printable
from utils.files import atomic_file
from utils.hand import CHAIN_PARENTS, NUM_CHAIN_JOINTS, WRIST
from utils.rasterizer import smooth_normals

INFLUENCES = 4  # joints per vertex: more than one set of four is not read everywhere
HALF_TURN_ABOUT_X = [1.0, 0.0, 0.0, 0.0]  # quaternion x, y, z, w
LARGEST_FILE = 2**32 - 1  # bytes: the format's lengths have 32 bits
_ELEMENTS = {'SCALAR': 1, 'VEC3': 3, 'VEC4': 4, 'MAT4': 16}
_COMPONENTS = {'<f4': 5126, '<u2': 5123, 'u1': 5121}
_VERTICES, _INDICES = 34962, 34963  # targets of a buffer view


@dataclass(frozen=True)
class _Array:
    """An array of the binary part: its size is known before it is computed, so that one is in memory at a time."""

    count: int
    type: str  # glTF's
    component: str  # NumPy's
    values: Callable[[], np.ndarray]
    target: int | None = None
    bounds: dict[str, list[float]] | None = None  # smallest and largest value, where glTF demands them

    @property
    def bytes(self) -> int:
        return self.count * _ELEMENTS[self.type] * np.dtype(self.component).itemsize

    @property
    def padding(self) -> int:
        return -self.bytes % 4


class _Document:
    """The lists of a glTF file; ``add`` appends to one and returns the new entry's index."""

    def __init__(self) -> None:
        self.lists: dict[str, list[dict[str, Any]]] = {}
        self.arrays: list[_Array] = []
        self.length = 0  # of the binary part

    def add(self, kind: str, **entry: Any) -> int:
        self.lists.setdefault(kind, []).append(entry)
        return len(self.lists[kind]) - 1

    def add_array(self, array: _Array) -> int:
        """Add an accessor with a buffer view of its own."""
        view = {'buffer': 0, 'byteOffset': self.length, 'byteLength': array.bytes}
        if array.target:
            view['target'] = array.target
        self.arrays.append(array)
        self.length += array.bytes + array.padding
        return self.add(
            'accessors',
            bufferView=self.add('bufferViews', **view),
            componentType=_COMPONENTS[array.component],
            count=array.count,
            type=array.type,
            **(array.bounds or {}),
        )

    def write(self, path: Path, **more: Any) -> None:
        content = {'asset': {'version': '2.0', 'generator': 'DIR two hands'}, 'buffers': [{'byteLength': self.length}]}
        text = json.dumps(content | self.lists | more, separators=(',', ':'), allow_nan=False).encode()
        text += b' ' * (-len(text) % 4)
        total = 12 + 8 + len(text) + 8 + self.length
        if total > LARGEST_FILE:
            raise UserError(f'{printable(path)} would exceed the 4 GiB of a GLB. Process fewer frames (--frames).')
        with atomic_file(path) as file:
            file.write(struct.pack('<4sII', b'glTF', 2, total))
            file.write(struct.pack('<I4s', len(text), b'JSON') + text)
            file.write(struct.pack('<I4s', self.length, b'BIN\0'))
            for array in self.arrays:
                values = np.ascontiguousarray(array.values(), array.component).reshape(-1)
                if values.nbytes != array.bytes:
                    raise ValueError(f'an array of {values.nbytes} bytes was announced as {array.bytes}')
                file.write(values.tobytes() + b'\0' * array.padding)


def write_glb(path: Path, tracks: Iterable[Track], *, interval: float, **extras: Any) -> None:
    """Write the hands atomically, at their own time stamps.

    interval (s): how long before a missing hand returns its last pose is held. extras: recorded in the file.
    """
    document = _Document()
    upright = document.add('nodes', name='hands', rotation=HALF_TURN_ABOUT_X, children=[])
    roots, channels, samplers = [upright], list[dict[str, Any]](), list[dict[str, Any]]()
    for track in tracks:
        first = len(document.lists['nodes'])
        _add_joints(document, track)
        document.lists['nodes'][upright]['children'].append(first + WRIST)
        roots.append(_add_skinned_mesh(document, track, first))
        _add_motion(document, track, first, interval, channels, samplers)
    animations = [{'name': 'motion', 'channels': channels, 'samplers': samplers}]
    document.write(path, scene=0, scenes=[{'nodes': roots, 'extras': extras}], animations=animations)


def _add_joints(document: _Document, track: Track) -> None:
    """Add the 16 joint nodes in the order of the chain, in the pose of the hand's first frame."""
    first = len(document.lists['nodes'])
    for joint in range(NUM_CHAIN_JOINTS):
        if joint == WRIST:
            place = track.wrists[0]
        else:
            place = track.rest_joints[joint] - track.rest_joints[CHAIN_PARENTS[joint]]
        node = {
            'name': f'{track.model.side}_{CHAIN_NAMES[joint]}',
            'translation': place.tolist(),
            'rotation': quaternions(track.axis_angle(joint)[:1])[0].tolist(),
        }
        if CHILDREN[joint]:
            node['children'] = [first + child for child in CHILDREN[joint]]
        document.add('nodes', **node)


def _add_skinned_mesh(document: _Document, track: Track, first: int) -> int:
    """Add mesh, material and skin; ``first``: the wrist's node -> the mesh's node."""
    side, vertices = track.model.side, track.rest_vertices.astype('<f4')
    faces = track.model.faces.astype('<u2')
    rest = torch.from_numpy(track.rest_vertices)[None]
    normals = smooth_normals(rest, torch.tensor(track.model.faces))[0].numpy()
    joints, weights = strongest_influences(track.model.skinning_weights)
    inverse = np.tile(np.eye(4, dtype='<f4'), (NUM_CHAIN_JOINTS, 1, 1))
    inverse[:, 3, :3] = -track.rest_joints  # column-major: the last row in memory is the translation
    count = len(vertices)
    bounds = {'min': vertices.min(0).tolist(), 'max': vertices.max(0).tolist()}
    attributes = {
        'POSITION': _Array(count, 'VEC3', '<f4', lambda: vertices, _VERTICES, bounds),
        'NORMAL': _Array(count, 'VEC3', '<f4', lambda: normals, _VERTICES),
        'JOINTS_0': _Array(count, 'VEC4', 'u1', lambda: joints, _VERTICES),
        'WEIGHTS_0': _Array(count, 'VEC4', '<f4', lambda: weights, _VERTICES),
    }
    colour = [(channel / 255) ** 2.2 for channel in HAND_COLOURS_BGR[track.hand][::-1]]  # glTF's factors are linear
    material = document.add(
        'materials',
        name=side,
        doubleSided=True,
        pbrMetallicRoughness={'baseColorFactor': [*colour, 1.0], 'metallicFactor': 0.0, 'roughnessFactor': 0.8},
    )
    primitive = {
        'attributes': {name: document.add_array(array) for name, array in attributes.items()},
        'indices': document.add_array(_Array(faces.size, 'SCALAR', '<u2', lambda: faces, _INDICES)),
        'material': material,
    }
    skin = document.add(
        'skins',
        joints=list(range(first, first + NUM_CHAIN_JOINTS)),
        skeleton=first,
        inverseBindMatrices=document.add_array(_Array(NUM_CHAIN_JOINTS, 'MAT4', '<f4', lambda: inverse)),
    )
    return document.add('nodes', name=side, mesh=document.add('meshes', name=side, primitives=[primitive]), skin=skin)


def _add_motion(
    document: _Document,
    track: Track,
    first: int,
    interval: float,
    channels: list[dict[str, Any]],
    samplers: list[dict[str, Any]],
) -> None:
    """Append one sampler and channel for the wrist's position and for the rotation of each joint."""
    keys, times = key_frames(track, interval)
    count = len(keys)
    bounds = {'min': [float(times[0])], 'max': [float(times[-1])]}
    clock = document.add_array(_Array(count, 'SCALAR', '<f4', lambda: times, bounds=bounds))
    moves = [('translation', WRIST, _Array(count, 'VEC3', '<f4', lambda: track.wrists[keys]))]
    for joint in range(NUM_CHAIN_JOINTS):
        turns = _Array(count, 'VEC4', '<f4', partial(_turns, track, joint, keys))
        moves.append(('rotation', joint, turns))
    for what, joint, array in moves:
        channels.append({'sampler': len(samplers), 'target': {'node': first + joint, 'path': what}})
        samplers.append({'input': clock, 'output': document.add_array(array), 'interpolation': 'LINEAR'})


def _turns(track: Track, joint: int, keys: np.ndarray) -> np.ndarray:
    return quaternions(track.axis_angle(joint))[keys]


def key_frames(track: Track, interval: float) -> tuple[np.ndarray, np.ndarray]:
    """Positions in ``track.seen`` (K,) and their times (K,) s, float32 and strictly increasing.

    Where frames are missing, the pose before is repeated one ``interval`` before the hand returns, so that viewers,
    which interpolate, hold it until then.
    """
    positions, times = np.arange(len(track.seen)), track.times
    before = np.flatnonzero(np.diff(track.frames) > 1)
    held = np.maximum(times[before + 1] - interval, (times[before] + times[before + 1]) / 2)
    positions, times = np.insert(positions, before + 1, before), np.insert(times, before + 1, held)
    rounded = times.astype('<f4')
    for number in range(1, len(rounded)):
        if rounded[number] <= rounded[number - 1]:  # so late that float32 does not tell them apart
            rounded[number] = np.nextafter(rounded[number - 1], np.float32(np.inf))
    return positions, rounded


def quaternions(axis_angle: np.ndarray) -> np.ndarray:
    """Axis-angle (N, 3) rad -> unit quaternions (N, 4) x, y, z, w, each in the half-sphere of the one before."""
    angle = np.linalg.norm(axis_angle, axis=-1, keepdims=True)
    turns = np.concatenate([axis_angle * (np.sinc(angle / (2 * np.pi)) / 2), np.cos(angle / 2)], -1)
    opposite = (turns[1:] * turns[:-1]).sum(-1) < 0
    turns[1:][np.cumsum(opposite) % 2 == 1] *= -1
    return turns


def strongest_influences(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Skinning weights (V, 16) -> the 4 strongest joints (V, 4) uint8 and their weights (V, 4) float32, of sum 1.

    Joints without influence are 0, as glTF demands.
    """
    joints = np.argsort(-weights, axis=1, kind='stable')[:, :INFLUENCES]
    chosen = np.take_along_axis(weights, joints, 1).clip(0)
    chosen = (chosen / chosen.sum(1, keepdims=True)).astype('<f4')
    return np.where(chosen > 0, joints, 0).astype('u1'), chosen


def written_weights(weights: np.ndarray) -> np.ndarray:
    """Skinning weights (V, 16) as they are written."""
    out, vertices = np.zeros(weights.shape), np.arange(len(weights))
    for joints, chosen in zip(*(values.T for values in strongest_influences(weights))):
        out[vertices, joints] += chosen
    return out
