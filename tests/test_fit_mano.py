import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.prepare import fit_mano
from dataset.prepare.raw import RawSplit
from manopth import TwoHandLayer
from manopth.recordings import fit_time_steps
from manopth.standin import pose_from_angles
from models.hands import load_hands
from utils.errors import UserError
from utils.hand import INTERHAND_TO_JOINTS, LEFT, RIGHT, SIDES

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = Path(os.environ.get('DIR_INTERHAND_SAMPLE', ROOT.parent / 'shared' / 'interhand_sample'))


@pytest.fixture(scope='module')
def models():
    return load_hands('standin')


@pytest.fixture(scope='module')
def layer(models):
    return TwoHandLayer(models, dtype=torch.float64)


@pytest.fixture(scope='module')
def example(layer):
    """Six time steps, joints (6, 2, 21, 3) m and vertices (6, 2, 778, 3), of two captures with a person each."""
    rng = np.random.default_rng(3)
    flexion, spread = rng.uniform(0, 1.2, (6, 2, 5, 3)), rng.uniform(-0.1, 0.1, (6, 2, 5))
    flexion[:, :, 0] *= 0.4
    pose = np.stack([pose_from_angles(flexion[:, i], spread[:, i], side=side) for i, side in enumerate(SIDES)], 1)
    betas = torch.from_numpy(rng.normal(size=(2, 1, 10))).expand(-1, 2, -1).repeat_interleave(3, 0)
    hands = layer(torch.from_numpy(rng.normal(size=(6, 2, 3)) * 1.5), torch.from_numpy(pose), betas, use_pca=False)
    trans = torch.from_numpy(rng.normal(size=(6, 2, 1, 3)) * 0.1) + torch.tensor([0.0, 0.0, 1.0])
    return hands.joints + trans, hands.vertices + trans


NAMES = [('0', '10'), ('0', '11'), ('0', '200'), ('1', '10'), ('1', '20'), ('1', '30')]


def write_raw_tree(root: Path, joints, valid=None, split='test') -> Path:
    """The annotation files that the fit reads, in InterHand2.6M's layout: millimetres, right hand first, tips first."""
    valid = np.ones((len(joints), 2, 21), bool) if valid is None else valid
    order = np.argsort(INTERHAND_TO_JOINTS)
    data, steps = {'images': [], 'annotations': []}, {}
    for number, (capture, frame) in enumerate(NAMES):
        points = np.concatenate([np.asarray(joints[number, side])[order] for side in (RIGHT, LEFT)]) * 1000
        seen = np.concatenate([valid[number, side][order] for side in (RIGHT, LEFT)])
        steps.setdefault(capture, {})[frame] = {
            'world_coord': np.where(seen[:, None], points, 1.0).tolist(),
            'joint_valid': seen[:, None].tolist(),
            'hand_type': 'interacting',
            'hand_type_valid': True,
        }
        for camera in ('400001', '400002'):  # two images of every time step
            identity = len(data['images'])
            data['images'].append(
                {
                    'id': identity,
                    'file_name': f'{identity}.jpg',
                    'width': 334,
                    'height': 512,
                    'subject': 0,
                    'capture': int(capture),
                    'seq_name': 's',
                    'camera': camera,
                    'frame_idx': int(frame),
                }
            )
            data['annotations'].append(
                {
                    'id': identity,
                    'image_id': identity,
                    'bbox': [0, 0, 1, 1],
                    'joint_valid': [1] * 42,
                    'hand_type': 'interacting',
                    'hand_type_valid': 1,
                }
            )
    folder = root / 'annotations' / split
    folder.mkdir(parents=True)
    (root / 'images' / split).mkdir(parents=True)
    for kind, content in (('data', data), ('joint_3d', steps)):
        (folder / f'InterHand2.6M_{split}_{kind}.json').write_text(json.dumps(content))
    return root


def read_back(layer, root: Path, split='test'):
    """Joints and vertices of the annotation file, through the project's reader and hand layer; NaN where null."""
    raw, mean = RawSplit(root, split), layer.pose_mean
    joints, vertices = [], []
    for name in NAMES:
        fits = raw.mano(*name)
        values = [
            [getattr(fits[side], key) if fits[side] else np.full(size, np.nan) for side in SIDES]
            for key, size in (('pose', 48), ('shape', 10), ('trans', 3))
        ]
        pose, shape, trans = (torch.from_numpy(np.array(v))[None] for v in values)
        hands = layer(pose[..., :3], mean + pose[..., 3:], shape, use_pca=False)
        joints.append(hands.joints[0] + trans[0, :, None])
        vertices.append(hands.vertices[0] + trans[0, :, None])
    return torch.stack(joints), torch.stack(vertices)


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / 'dataset' / 'fit_mano.py'), *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {'OMP_NUM_THREADS': '1'},
    )


def residuals(root: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    path = root / 'annotations' / 'test' / 'InterHand2.6M_test_fit_residuals.csv'
    with open(path, newline='') as file:
        return {(row['capture'], row['frame'], row['hand']): row for row in csv.DictReader(file)}


def fit(root: Path, *extra) -> int:
    return fit_mano.main(['--data_path', str(root), *extra, 'MANO.SOURCE', 'standin', 'DEVICE', 'cpu'])


def test_script_writes_the_real_format(tmp_path, example, layer):
    root = write_raw_tree(tmp_path / 'raw', example[0])
    done = run('--data_path', root, 'MANO.SOURCE', 'standin')
    assert done.returncode == 0, done.stderr
    assert '12 hands fitted' in done.stdout

    joints, vertices = read_back(layer, root)
    assert (joints - example[0]).norm(dim=-1).mean() < 1e-3
    assert (vertices - example[1]).norm(dim=-1).mean() < 1.5e-3
    content = json.loads((root / 'annotations/test/InterHand2.6M_test_MANO_NeuralAnnot.json').read_text())
    assert [(capture, frame) for capture in content for frame in content[capture]] == NAMES
    hand = content['1']['20']['right']
    assert {key: len(value) for key, value in hand.items()} == {'pose': 48, 'shape': 10, 'trans': 3}
    shapes = {
        capture: {tuple(entry[side]['shape']) for entry in content[capture].values() for side in SIDES}
        for capture in content
    }
    assert len(shapes['0']) == len(shapes['1']) == 1 and shapes['0'] != shapes['1']  # one person a capture

    table = residuals(root)
    measured = (joints - example[0]).norm(dim=-1).mean(-1) * 1e3
    for number, name in enumerate(NAMES):
        for hand, side in enumerate(SIDES):
            assert float(table[(*name, side)]['mean_mm']) == pytest.approx(measured[number, hand].item(), abs=2e-3)


def test_hands_without_enough_joints_are_null_and_listed(tmp_path, example, layer, capsys):
    valid = np.ones((6, 2, 21), bool)
    valid[0, LEFT] = False  # a missing hand
    valid[1, RIGHT, 5:] = False  # a hand with five joints
    valid[2, :, [4, 8]] = False
    root = write_raw_tree(tmp_path / 'raw', example[0], valid)
    assert fit(root) == 0
    raw = RawSplit(root, 'test')
    assert raw.mano('0', '10')['left'] is None and raw.mano('0', '10')['right'] is not None
    assert raw.mano('0', '11')['right'] is None and raw.mano('0', '11')['left'] is not None
    joints, _ = read_back(layer, root)
    assert (joints - example[0])[2].norm(dim=-1)[torch.from_numpy(valid[2])].mean() < 1e-3
    out = capsys.readouterr().out
    assert '10 hands fitted' in out and '1 hands with too few valid joints are null (capture/frame): 0/11' in out
    table = residuals(root)
    assert table['0', '11', 'right']['note'] == fit_mano.TOO_FEW and table['0', '200', 'left']['valid_joints'] == '19'
    assert ('0', '10', 'left') not in table


def test_existing_fits_are_kept_and_only_gaps_are_filled(tmp_path, example, capsys):
    root = write_raw_tree(tmp_path / 'raw', example[0])
    assert fit(root) == 0
    path = root / 'annotations/test/InterHand2.6M_test_MANO_NeuralAnnot.json'
    first = path.read_bytes()
    assert fit(root) == 0
    assert path.read_bytes() == first
    assert '12 hands have parameters already' in capsys.readouterr().out

    content = json.loads(first)
    content['0']['10']['left'] = None
    content['0']['11']['right']['trans'] = [9.0, 9.0, 9.0]  # whatever it is, it is the user's
    content['1']['30']['left']['pose'][5] = float('nan')
    del content['1']['20']
    content['7'] = {'1': {'left': None, 'right': None}}  # a time step without images
    path.write_text(json.dumps(content))
    assert fit(root) == 0
    out = capsys.readouterr().out
    assert '4 hands fitted' in out and '8 hands have parameters already' in out
    filled = json.loads(path.read_bytes())
    assert filled['0']['11']['right']['trans'] == [9.0, 9.0, 9.0]
    assert filled['7'] == content['7']
    for capture, frame, side in (('0', '10', 'left'), ('1', '20', 'left'), ('1', '20', 'right'), ('1', '30', 'left')):
        before = json.loads(first)[capture][frame][side]['trans']
        np.testing.assert_allclose(filled[capture][frame][side]['trans'], before, atol=5e-3)
    assert len(residuals(root)) == 12  # the first run's lines are still there

    assert fit(root, '--overwrite', '--splits', 'test') == 0
    assert json.loads(path.read_bytes()) == json.loads(first)
    assert not list(path.parent.glob('*.partial')) and not list(path.parent.glob('.*'))


def test_fits_of_different_hands_are_not_mixed(tmp_path, example, models, capsys):
    root = write_raw_tree(tmp_path / 'raw', example[0])
    assert fit(root) == 0
    record = root / 'hand_model.json'
    path = root / 'annotations/test/InterHand2.6M_test_MANO_NeuralAnnot.json'
    assert models[0].digest in record.read_text()
    record.unlink()  # without it the file passes as the official one
    before = path.read_bytes()
    assert fit(root) == 2
    assert 'official' in capsys.readouterr().err and path.read_bytes() == before
    record.write_text('{"hand_model": "another:1:2"}')
    assert fit(root) == 2
    assert 'another:1:2' in capsys.readouterr().err and path.read_bytes() == before
    assert fit(root, '--overwrite') == 0
    assert models[0].digest in record.read_text()


def test_a_time_step_without_joints_is_counted(tmp_path, example, capsys):
    root = write_raw_tree(tmp_path / 'raw', example[0])
    path = root / 'annotations/test/InterHand2.6M_test_joint_3d.json'
    steps = json.loads(path.read_text())
    del steps['0']['11']
    path.write_text(json.dumps(steps))
    assert fit(root) == 0
    out = capsys.readouterr().out
    assert '10 hands fitted' in out and '1 time steps have images but no usable joints: 0/11' in out


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--data_path', '{}/nowhere'], 'nowhere does not exist'),
        (['--data_path', '{}', '--splits', 'val'], 'val'),
        (['--data_path', '{}', '--splits', 'vall'], 'separated by commas'),
        (['--data_path', '{}', 'DEVICE', 'abacus'], 'DEVICE abacus'),
        (['--data_path', '{}', 'MANO.SORCE', 'standin'], 'MANO.SOURCE'),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, example, capsys, arguments, message):
    root = write_raw_tree(tmp_path, example[0])
    try:
        code = fit_mano.main([argument.format(root) for argument in arguments] + ['MANO.SOURCE', 'standin'])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and 'Traceback' not in error


def test_script_without_hand_model_or_joints(tmp_path, example, capsys):
    root = write_raw_tree(tmp_path, example[0])
    assert fit_mano.main(['--data_path', str(root), 'MANO.PATH', str(tmp_path / 'no_mano')]) == 2
    error = capsys.readouterr().err
    assert 'MANO_LEFT.pkl is missing' in error and 'Traceback' not in error
    path = root / 'annotations/test/InterHand2.6M_test_joint_3d.json'
    path.write_text(path.read_text()[:500])
    with pytest.raises(UserError, match='joint_3d'):
        fit_mano.read_joints(RawSplit(root, 'test'))


def test_no_time_steps(models):
    fit = fit_time_steps(
        models, torch.zeros(0, 2, 21, 3), torch.zeros(0, 2, 21, dtype=torch.bool), torch.zeros(0, dtype=torch.long)
    )
    assert fit.pose.shape == (0, 2, 48)


@pytest.mark.skipif(not SAMPLE.is_dir(), reason=f'{SAMPLE} (real frames, set DIR_INTERHAND_SAMPLE) is not there')
def test_real_interacting_frames(tmp_path):
    root = tmp_path / 'sample'
    shutil.copytree(SAMPLE, root, copy_function=shutil.copyfile)
    os.chmod(root, 0o755)
    for folder in root.rglob('*/'):
        os.chmod(folder, 0o755)
    assert fit(root) == 0
    table = residuals(root)
    interacting = [float(row['mean_mm']) for (_, frame, _), row in table.items() if frame in ('69148', '44669')]
    assert len(interacting) == 4 and len(table) == 6
    assert np.mean(interacting) < 4.0
    assert max(float(row['mean_mm']) for row in table.values()) < 8.0
