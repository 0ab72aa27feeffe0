"""Files of hands for other programs, read back by readers that share no code with their writers."""

import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

from inference.media import LONGEST_HOLD, VideoWriter
from inference.motion import FORMATS, motion_recorder, write_image_motion
from inference.motion.bvh import euler_zxy
from inference.motion.gltf import write_glb
from inference.motion.parameters import ROW, write_npz
from inference.motion.skeleton import slots, track
from inference.reconstruct import Reconstruction
from manopth import ManoLayer, TwoHandLayer
from manopth.rotations import axis_angle_to_matrix
from manopth.standin import pose_from_angles
from utils.errors import UserError
from utils.hand import CHAIN_PARENTS, JOINT_NAMES, MANO_TO_JOINTS, SIDES
from utils.stopping import Stopped

RATE = 25.0


def smooth_hands(standin, frames: int, *, one_shape: bool = True) -> Reconstruction:
    """Hands that close and turn, (frames, 2, ...), as the network's predictions are placed in an image."""
    rng, phase = np.random.default_rng(5), np.linspace(0, 3, frames)[:, None, None]
    flexion = 0.6 + 0.5 * np.sin(phase + rng.uniform(0, 6, (2, 5, 3))[None].reshape(2, 1, 15)[:, 0])[..., None]
    flexion = flexion.reshape(frames, 2, 5, 3)
    spread = 0.1 * np.sin(phase + rng.uniform(0, 6, (2, 5)))
    pose = np.stack(
        [pose_from_angles(flexion[:, hand], spread[:, hand], side=side) for hand, side in enumerate(SIDES)], 1
    )
    mean = np.stack([model.pose_mean for model in standin])
    components = np.stack([model.pose_components for model in standin])
    coefficients = torch.from_numpy(
        np.einsum('bhk,hnk->bhn', pose - mean, np.linalg.inv(components).transpose(0, 2, 1))
    )
    root = axis_angle_to_matrix(torch.from_numpy(rng.normal(size=(2, 3)) * 2 + 2.5 * phase * rng.normal(size=(2, 3))))
    betas = torch.from_numpy(rng.normal(size=(1 if one_shape else frames, 1, 10))).expand(frames, 2, -1)
    hands = TwoHandLayer(standin, dtype=torch.float64)(root, coefficients, betas, root_joint=0)
    places = torch.from_numpy(np.array([[-0.1, 0, 0.6], [0.1, 0.02, 0.7]]) + 0.1 * np.sin(phase))[:, :, None]
    zeros = torch.zeros(frames)
    values = dict.fromkeys(Reconstruction._fields[: -len(Reconstruction._field_defaults)], zeros) | {
        'vertices': hands.vertices + places,
        'joints': hands.joints + places,
        'root_rotation': root,
        'pose': coefficients,
        'shape': betas,
        'intrinsics': torch.tensor([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]]).expand(frames, -1, -1),
    }
    hands = Reconstruction(**{name: value.float() for name, value in values.items()})
    return hands._replace(present=torch.ones(frames, 2, dtype=torch.bool))


@pytest.fixture(scope='module')
def hands(standin):
    return smooth_hands(standin, 12)


def record(folder: Path, hands: Reconstruction, standin, *, frames=None, times=None, formats=FORMATS, rate=RATE):
    """Write the files of a video of these hands -> what video.json records."""
    frames = range(len(hands.joints)) if frames is None else frames
    with motion_recorder(folder, formats, standin, rate=rate) as motion:
        for number, frame in enumerate(frames):
            time = frame / rate if times is None else times[number]
            motion.add(hands.one(number), frame=frame, time_s=time)
    return motion.summary


# hands.npz


def posed_by_manolayer(arrays, standin, hand: int) -> torch.Tensor:
    """Vertices (T, 778, 3) m of hands.npz through the published layer's interface."""
    layer = ManoLayer(
        side=str(arrays['side'][hand]),
        model=standin[hand],
        use_pca=False,
        flat_hand_mean=bool(arrays['flat_hand_mean']),
        dtype=torch.float64,
    )
    pose = np.concatenate([arrays['global_orient'], arrays['hand_pose']], -1)
    pose, betas, transl = (
        torch.from_numpy(np.atleast_3d(values[..., hand, :]).reshape(-1, values.shape[-1])).double()
        for values in (pose, arrays['betas'], arrays['transl'])
    )
    return layer(pose, betas, transl)[0] / 1000


def test_parameters_reproduce_the_meshes_of_a_video_in_a_mano_layer(standin, tmp_path):
    hands = smooth_hands(standin, 6, one_shape=False)
    record(tmp_path, hands, standin, frames=[0, 1, 2, 5, 6, 9], formats=('npz',))
    assert [path.name for path in tmp_path.iterdir()] == ['hands.npz']
    with np.load(tmp_path / 'hands.npz', allow_pickle=False) as file:
        arrays = dict(file)
    assert {name: arrays[name].shape for name in ROW.names} == {
        'frame': (6,),
        'time_s': (6,),
        'filled': (6,),
        'global_orient': (6, 2, 3),
        'hand_pose': (6, 2, 45),
        'betas': (6, 2, 10),
        'transl': (6, 2, 3),
        'joints': (6, 2, 21, 3),
        'intrinsics': (6, 3, 3),
    }
    assert arrays['frame'].tolist() == [0, 1, 2, 5, 6, 9] and arrays['time_s'][3] == 5 / RATE
    assert arrays['side'].tolist() == list(SIDES) and arrays['joint_names'].tolist() == list(JOINT_NAMES)
    assert arrays['hand_model'] == standin.identity and arrays['format'] == 'dir-mano-1'
    for hand in range(2):
        away = posed_by_manolayer(arrays, standin, hand) - hands.vertices[:, hand]
        assert away.norm(dim=-1).max() < 1e-6  # m; 0.01 mm is the promise
    assert np.array_equal(arrays['joints'], hands.joints)


def test_an_image_has_the_same_arrays_without_frames_and_a_skeleton_of_one_frame(standin, tmp_path, hands):
    write_image_motion(tmp_path, FORMATS, hands.one(3), standin)
    with np.load(tmp_path / 'hands.npz', allow_pickle=False) as file:
        arrays = dict(file)
    assert 'frame' not in arrays and 'time_s' not in arrays
    assert arrays['hand_pose'].shape == (2, 45) and arrays['intrinsics'].shape == (3, 3)
    for hand in range(2):
        assert (posed_by_manolayer(arrays, standin, hand) - hands.vertices[3, hand]).norm(dim=-1).max() < 1e-6
    assert {path.name for path in tmp_path.iterdir()} == {'hands.npz', 'left.bvh', 'right.bvh'}
    assert len(read_bvh(tmp_path / 'left.bvh').values) == 1


# BVH


class Bvh:
    """A plain reader of BVH files: names, parents, offsets, channels and values."""

    def __init__(self, text: str):
        words = iter(text.split())
        self.names, self.parents, self.offsets, self.channels = [], [], [], []
        above = []
        for word in words:
            if word in ('ROOT', 'JOINT', 'End'):
                self.names.append(next(words))
                self.parents.append(above[-1] if above else -1)
                self.channels.append([])
            elif word == '{':
                above.append(len(self.names) - 1)
            elif word == '}':
                above.pop()
            elif word == 'OFFSET':
                self.offsets.append([float(next(words)) for _ in range(3)])
            elif word == 'CHANNELS':
                self.channels[-1] = [next(words) for _ in range(int(next(words)))]
            elif word == 'MOTION':
                break
        assert next(words) == 'Frames:'
        count = int(next(words))
        assert (next(words), next(words)) == ('Frame', 'Time:')
        self.frame_time = float(next(words))
        self.values = np.array([float(word) for word in words]).reshape(count, sum(map(len, self.channels)))

    def positions(self, frame: int) -> dict[str, np.ndarray]:
        """Position of every joint, and of the end sites as 'Site of <joint>', in the file's units."""
        values, out, turns = iter(self.values[frame]), [], []
        for name, parent, offset, channels in zip(self.names, self.parents, self.offsets, self.channels):
            move, turn = np.array(offset), np.eye(3)
            for channel in channels:
                value, axis = next(values), 'XYZ'.index(channel[0])
                if channel.endswith('position'):
                    move[axis] += value
                else:
                    turn = turn @ self.about(axis, np.radians(value))
            if parent >= 0:
                move, turn = out[parent][1] + turns[parent] @ move, turns[parent] @ turn
                name = f'Site of {out[parent][0]}' if name == 'Site' else name
            out.append((name, move))
            turns.append(turn)
        return dict(out)

    @staticmethod
    def about(axis: int, angle: float) -> np.ndarray:
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[[a, b], [a, b]] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        return turn


def read_bvh(path: Path) -> Bvh:
    return Bvh(path.read_text())


def in_camera_axes(position: np.ndarray) -> np.ndarray:
    """cm, y up -> m, y down."""
    return position * [0.01, -0.01, -0.01]


def test_joints_of_a_bvh_file_are_those_of_the_hands(standin, tmp_path, hands):
    summary = record(tmp_path, hands, standin, formats=('bvh',))
    assert {path.name for path in tmp_path.iterdir()} == {'left.bvh', 'right.bvh'}
    ends, worst = [], 0.0
    for hand, side in enumerate(SIDES):
        bvh = read_bvh(tmp_path / f'{side}.bvh')
        assert len(bvh.values) == 12 and bvh.frame_time == pytest.approx(1 / RATE, abs=1e-9)
        assert len(bvh.names) == 21 and bvh.names.count('Site') == 5
        for frame in range(12):
            positions = bvh.positions(frame)
            for joint, name in enumerate(JOINT_NAMES):
                truth = hands.joints[frame, hand, joint].double().numpy()
                if name.endswith('tip'):
                    found = positions[f'Site of {side}_{name[:-3]}3']
                    ends.append(np.linalg.norm(in_camera_axes(found) - truth) * 1000)
                else:
                    found = positions[f'{side}_{name}']
                    worst = max(worst, np.linalg.norm(in_camera_axes(found) - truth) * 1000)
    assert worst < 0.001  # mm; 0.01 is the promise
    # Fingertips lie on the skin, which may bend with several bones; those of the stand-in hand are rigid.
    assert max(ends) < 0.01 and summary['motion']['bvh']['worst_mm'] == pytest.approx(max(ends), abs=1e-3)
    assert summary['motion']['bvh']['units'] == 'cm'
    for side in SIDES:  # no channel jumps by a turn
        assert np.abs(np.diff(read_bvh(tmp_path / f'{side}.bvh').values[:, 3:], axis=0)).max() < 180


def test_frames_without_hands_at_either_end_are_gaps(standin, tmp_path, hands):
    with motion_recorder(tmp_path, ('npz', 'bvh'), standin, rate=30.0) as recorder:
        for frame in range(5):
            recorder.add(hands.one(0) if 0 < frame < 3 else None, frame=frame, time_s=frame / 30, filled=frame == 2)
    assert recorder.summary['motion']['gaps'] == {side: [(0, 0), (3, 4)] for side in SIDES}
    arrays = np.load(tmp_path / 'hands.npz')
    assert arrays['frame'].tolist() == [1, 2] and arrays['filled'].tolist() == [False, True]
    assert len(read_bvh(tmp_path / 'left.bvh').values) == 5


def test_a_video_without_hands_is_recorded_as_one(standin, tmp_path):
    with motion_recorder(tmp_path, FORMATS, standin, rate=RATE) as recorder:
        for frame in range(3):
            recorder.add(None, frame=frame, time_s=frame / RATE)
    assert recorder.summary['motion'] == {'formats': list(FORMATS), 'gaps': {'left': None, 'right': None}}
    assert list(tmp_path.iterdir()) == []


def test_euler_angles_restore_rotations_where_two_axes_coincide():
    rng = np.random.default_rng(0)
    triples = np.concatenate(
        [rng.uniform(-np.pi, np.pi, (200, 3)), [[0.4, np.pi / 2, 0.3], [1, -np.pi / 2, -2], [0, 0, 0]]]
    )

    def compose(z, x, y):
        return Bvh.about(2, z) @ Bvh.about(0, x) @ Bvh.about(1, y)

    turns = np.stack([compose(*triple) for triple in triples])
    again = np.stack([compose(*triple) for triple in euler_zxy(turns)])
    assert np.abs(again - turns).max() < 1e-8


def test_a_bvh_file_has_a_constant_rate_and_holds_what_is_missing(standin, tmp_path, hands):
    few = hands.map(lambda values: values[:5].clone())
    few.joints[3, 1] = np.nan  # one hand is missing in one frame
    few.joints[0, 0] = np.nan
    summary = record(tmp_path, few, standin, frames=[0, 1, 4, 5, 6], formats=('bvh',))
    assert summary['motion']['gaps'] == {'left': [(0, 0), (2, 3)], 'right': [(2, 3), (5, 5)]}
    left, right = (read_bvh(tmp_path / f'{side}.bvh').values for side in SIDES)
    assert len(left) == len(right) == 7
    assert [np.array_equal(right[k], right[k - 1]) for k in range(1, 7)] == [False, True, True, False, True, False]
    assert [np.array_equal(left[k], left[k - 1]) for k in range(1, 7)] == [True, True, True, False, False, False]


def test_frames_of_a_bvh_file_are_those_of_the_overlay():
    class Counter:
        def __init__(self):
            self.images = []

        def write(self, image):
            self.images.append(int(image[0, 0, 0]))

    rng = np.random.default_rng(1)
    for times in (
        np.arange(20) / 25,
        np.cumsum(rng.choice([0.01, 0.04, 0.13], 60)),
        np.array([0.0, 0.04, 0.08, 500.0, 500.04, 1e6, 1e6 + 1]),
        np.array([0.3, 0.31, 0.9]),
    ):
        counter = Counter()
        writer = VideoWriter(counter, rate=25.0, width=1, height=1)
        for number, time in enumerate(times):
            writer.write(np.full((1, 1, 3), number, np.uint8), time)
        writer.finish()
        begins = slots(np.arange(len(times)), times, rate=25.0, longest_s=LONGEST_HOLD)
        begins[0] = 0
        held = [int(np.flatnonzero(begins <= slot)[-1]) for slot in range(begins[-1] + 1)]
        assert held == counter.images


# GLB


class Glb:
    """A plain reader of GLB files that skins a mesh at a time."""

    NUMBERS = {5126: '<f4', 5123: '<u2', 5121: 'u1'}
    SIZES = {'SCALAR': 1, 'VEC3': 3, 'VEC4': 4, 'MAT4': 16}

    def __init__(self, path: Path):
        content = path.read_bytes()
        magic, version, length = struct.unpack_from('<4sII', content)
        assert (magic, version, length) == (b'glTF', 2, len(content))
        text_length, kind = struct.unpack_from('<I4s', content, 12)
        assert kind == b'JSON' and text_length % 4 == 0
        self.json = json.loads(content[20 : 20 + text_length])
        binary_length, kind = struct.unpack_from('<I4s', content, 20 + text_length)
        assert kind == b'BIN\0' and binary_length == self.json['buffers'][0]['byteLength']
        self.binary = content[28 + text_length :]
        assert len(self.binary) == binary_length

    def array(self, accessor: int) -> np.ndarray:
        entry = self.json['accessors'][accessor]
        view = self.json['bufferViews'][entry['bufferView']]
        size = entry['count'] * self.SIZES[entry['type']]
        kind = np.dtype(self.NUMBERS[entry['componentType']])
        assert size * kind.itemsize == view['byteLength'] and view['byteOffset'] % 4 == 0
        values = np.frombuffer(self.binary, kind, size, view['byteOffset']).reshape(entry['count'], -1)
        for bound, of in (('min', np.min), ('max', np.max)):
            if bound in entry:
                assert np.array_equal(of(values, 0), np.array(entry[bound], kind))
        return values

    def node(self, name: str) -> int:
        return next(number for number, node in enumerate(self.json['nodes']) if node.get('name') == name)

    def world(self, time: float) -> list[np.ndarray]:
        """(4, 4) of every node."""
        nodes = [dict(node) for node in self.json['nodes']]
        animation = self.json['animations'][0]
        for channel in animation['channels']:
            sampler = animation['samplers'][channel['sampler']]
            times, values = (
                self.array(sampler['input'])[:, 0].astype(float),
                self.array(sampler['output']).astype(float),
            )
            place = np.interp(time, times, np.arange(len(times)))
            low, share = int(place), place - int(place)
            value = values[low] * (1 - share) + values[min(low + 1, len(values) - 1)] * share
            nodes[channel['target']['node']][channel['target']['path']] = value
        local = [self.matrix(node) for node in nodes]
        parents = {child: number for number, node in enumerate(nodes) for child in node.get('children', [])}
        world: list[np.ndarray] = []
        for number, matrix in enumerate(local):
            world.append(world[parents[number]] @ matrix if number in parents else matrix)
        return world

    @staticmethod
    def matrix(node: dict) -> np.ndarray:
        x, y, z, w = np.array(node.get('rotation', [0, 0, 0, 1])) / np.linalg.norm(node.get('rotation', [0, 0, 0, 1]))
        matrix = np.eye(4)
        matrix[:3, :3] = [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
        matrix[:3, 3] = node.get('translation', [0, 0, 0])
        return matrix

    def skinned(self, side: str, time: float) -> np.ndarray:
        """(778, 3) in the file's axes: y up."""
        node = self.json['nodes'][self.node(side)]
        primitive = self.json['meshes'][node['mesh']]['primitives'][0]['attributes']
        skin, world = self.json['skins'][node['skin']], self.world(time)
        inverse = self.array(skin['inverseBindMatrices']).reshape(-1, 4, 4).transpose(0, 2, 1)
        moves = np.stack([world[joint] @ each for joint, each in zip(skin['joints'], inverse)])
        points = np.pad(self.array(primitive['POSITION']).astype(float), ((0, 0), (0, 1)), constant_values=1)
        blended = (moves[self.array(primitive['JOINTS_0'])] * self.array(primitive['WEIGHTS_0'])[..., None, None]).sum(
            1
        )
        return (blended @ points[..., None])[:, :3, 0]


def blended(model, betas, rotations, transl) -> np.ndarray:
    """Linear blend skinning of the shaped hand without pose blend shapes, vertex by vertex: (778, 3) m."""
    rest = model.template + model.shape_dirs @ betas
    joints = model.joint_regressor @ rest
    world: list[np.ndarray] = []
    for joint, parent in enumerate(CHAIN_PARENTS):
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = rotations[joint], joints[joint] - (joints[parent] if joint else 0)
        world.append(world[parent] @ matrix if joint else matrix)
    out = np.zeros_like(rest)
    for joint, matrix in enumerate(world):
        out += model.skinning_weights[:, joint, None] * ((rest - joints[joint]) @ matrix[:3, :3].T + matrix[:3, 3])
    return out + transl


def test_an_animated_glb_skins_as_linear_blend_skinning_and_states_how_far_the_hands_are(standin, tmp_path, hands):
    summary = record(tmp_path, hands, standin, formats=('npz', 'glb'))['motion']['glb']
    glb, upright = Glb(tmp_path / 'hands.glb'), np.array([1, -1, -1])
    arrays = np.load(tmp_path / 'hands.npz')
    away = []
    for frame in range(12):
        for hand, side in enumerate(SIDES):
            pose = np.append(arrays['global_orient'][frame, hand], arrays['hand_pose'][frame, hand]).reshape(16, 3)
            rotations = axis_angle_to_matrix(torch.from_numpy(pose).double()).numpy()
            found = glb.skinned(side, arrays['time_s'][frame]) * upright
            reference = blended(standin[hand], arrays['betas'][frame, hand], rotations, arrays['transl'][frame, hand])
            assert np.linalg.norm(found - reference, axis=-1).max() < 2e-6  # m
            away.append(np.linalg.norm(found - hands.vertices[frame, hand].numpy(), axis=-1) * 1000)
    assert summary['mean_mm'] == pytest.approx(np.mean(away), abs=1e-3)
    assert summary['worst_mm'] == pytest.approx(np.max(away), abs=1e-2)
    assert np.mean(away) < 1 and np.max(away) < 8  # the pose blend shapes, which glTF cannot hold
    assert glb.json['scenes'][0]['extras'] == {'hand_model': standin.identity, **summary}
    names = [glb.json['nodes'][node]['name'] for node in glb.json['skins'][1]['joints']]
    assert names == [f'right_{JOINT_NAMES[MANO_TO_JOINTS.index(joint)]}' for joint in range(16)]


def test_trimesh_reads_an_animated_glb(standin, tmp_path, hands):
    record(tmp_path, hands, standin, formats=('glb',))
    scene = trimesh.load(tmp_path / 'hands.glb')
    assert set(scene.geometry) == set(SIDES)
    for side, model in zip(SIDES, standin):
        mesh = scene.geometry[side]
        assert mesh.vertices.shape == (778, 3) and np.array_equal(mesh.faces, model.faces)
        assert (mesh.face_normals * mesh.vertex_normals[mesh.faces[:, 0]]).sum(1).mean() > 0.8


def test_an_animated_glb_holds_a_hand_that_is_missing(standin, tmp_path, hands):
    record(tmp_path, hands, standin, frames=[0, 1, *range(6, 16)], formats=('glb',))
    glb = Glb(tmp_path / 'hands.glb')
    before, after = glb.skinned('left', 1 / RATE), glb.skinned('left', 6 / RATE)
    assert np.abs(before - after).max() > 1e-3
    assert np.abs(glb.skinned('left', 5 / RATE) - before).max() < 1e-6
    times = glb.array(glb.json['animations'][0]['samplers'][0]['input'])[:, 0]
    assert len(times) == 13 and (np.diff(times) > 0).all()


def test_quaternions_do_not_change_their_sign_from_frame_to_frame(standin, tmp_path):
    record(tmp_path, smooth_hands(standin, 40), standin, formats=('glb',))
    glb = Glb(tmp_path / 'hands.glb')
    for sampler in glb.json['animations'][0]['samplers']:
        values = glb.array(sampler['output'])
        if values.shape[1] == 4:
            assert np.abs(np.linalg.norm(values, axis=1) - 1).max() < 1e-6
            assert ((values[1:] * values[:-1]).sum(1) > 0.5).all()


# Clips


def test_a_hand_that_never_appears_has_no_skeleton(standin, tmp_path, hands):
    only_right = hands.map(torch.clone)
    only_right.joints[:, 0] = np.nan
    summary = record(tmp_path, only_right, standin)['motion']
    assert {path.name for path in tmp_path.iterdir()} == {'hands.npz', 'hands.glb', 'right.bvh'}
    assert summary['gaps'] == {'left': None, 'right': []}
    assert [mesh['name'] for mesh in Glb(tmp_path / 'hands.glb').json['meshes']] == ['right']
    assert np.isnan(np.load(tmp_path / 'hands.npz')['joints'][:, 0]).all()


def test_a_hand_that_is_taken_to_be_absent_is_missing_in_every_file(standin, tmp_path, hands):
    present = torch.ones_like(hands.present)
    present[7:, 0] = False
    summary = record(tmp_path, hands._replace(present=present), standin)['motion']
    assert summary['gaps'] == {'left': [(7, len(present) - 1)], 'right': []}
    arrays = np.load(tmp_path / 'hands.npz')
    for name in ('global_orient', 'hand_pose', 'betas', 'transl', 'joints'):
        missing = np.isnan(arrays[name]).reshape(len(present), 2, -1)
        assert (missing.all(2) == ~present.numpy()).all() and (missing.any(2) == ~present.numpy()).all()


@pytest.mark.parametrize('error', [UserError('no'), Stopped(15), OSError(28, 'No space left on device')])
def test_nothing_is_written_of_a_clip_that_fails_or_has_no_frame(standin, tmp_path, hands, error):
    with pytest.raises(type(error)), motion_recorder(tmp_path, FORMATS, standin, rate=RATE) as motion:
        motion.add(hands.one(0), frame=0, time_s=0.0)
        raise error
    with motion_recorder(tmp_path, FORMATS, standin, rate=RATE) as motion:
        pass
    assert motion.summary == {} and list(tmp_path.iterdir()) == []


def test_one_frame_is_a_clip(standin, tmp_path, hands):
    record(tmp_path, hands, standin, frames=[0])
    glb = Glb(tmp_path / 'hands.glb')
    found = glb.skinned('right', 0.0) * [1, -1, -1]
    assert np.linalg.norm(found - hands.vertices[0, 1].numpy(), axis=-1).mean() < 1e-3
    assert len(read_bvh(tmp_path / 'right.bvh').values) == 1


def test_time_stamps_far_from_zero_stay_in_order(standin, tmp_path, hands):
    times = 4e6 + np.arange(12) / RATE  # float32 has steps of 0.25 s there
    record(tmp_path, hands, standin, times=times, formats=('glb',))
    glb = Glb(tmp_path / 'hands.glb')
    assert (np.diff(glb.array(glb.json['animations'][0]['samplers'][0]['input'])[:, 0]) > 0).all()


def test_memory_does_not_grow_with_the_clip(standin, tmp_path, hands):
    with motion_recorder(tmp_path, ('npz',), standin, rate=RATE) as motion:
        motion.add(hands.one(0), frame=0, time_s=0.0)
    rows = np.zeros(1, ROW)
    with np.load(tmp_path / 'hands.npz') as arrays:
        for name in ROW.names:
            rows[name] = arrays[name]
    peaks = []
    for count in (1100, 6600):
        with open(tmp_path / 'rows', 'wb') as file:
            for frame in range(count):
                rows['frame'], rows['time_s'] = frame, frame / 30
                file.write(rows.tobytes())
        mapped = np.memmap(tmp_path / 'rows', ROW, 'r')
        each = track(mapped, standin, 1)
        tracemalloc.start()
        write_glb(tmp_path / 'hands.glb', [each], interval=1 / 30)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (tmp_path / 'hands.glb').stat().st_size < 60_000 + 280 * count
    grown = (peaks[1] - peaks[0]) / 5500
    assert grown < 300  # bytes a frame, of 1,044: columns of one joint at a time

    long = np.memmap(tmp_path / 'rows', ROW, 'w+', shape=(100_000,))
    tracemalloc.start()
    write_npz(tmp_path / 'hands.npz', long, standin)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 36 * 2**20 < long.nbytes / 2.5  # NumPy's buffers of 16 MiB
