import json
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from raw_tree import CAMERAS, annotation_file, make_raw_tree, write_kind

from dataset import interhand
from dataset.prepare import split as preparation
from dataset.prepare.raw import RawSplit
from dataset.prepare.skips import pickle_annotation
from dataset.prepared import FOLDERS
from dataset.vertex_colours import canonical_colours, load_colours
from manopth import TwoHandLayer, safe_pickle
from manopth.rotations import axis_angle_to_matrix
from models.hands import load_hands
from utils.errors import UserError
from utils.geometry import crop_matrix, project
from utils.rasterizer import interpolate, rasterize

STEPS = 4
ROOT = Path(__file__).resolve().parents[1]


def prepare(data_path, save_path, *extra) -> int:
    return interhand.main(
        [
            '--data_path',
            str(data_path),
            '--save_path',
            str(save_path),
            '--workers',
            '1',
            *extra,
            'MANO.SOURCE',
            'standin',
        ]
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def record(save_path: Path) -> dict:
    return json.loads((save_path / 'train' / 'preparation.json').read_text())


@pytest.fixture(scope='module')
def models():
    return load_hands('standin')


@pytest.fixture(scope='module')
def raw(tmp_path_factory):
    root = tmp_path_factory.mktemp('raw')
    make_raw_tree(root, steps=STEPS)
    return root


@pytest.fixture(scope='module')
def prepared(raw, tmp_path_factory):
    """The command line itself, with two processes."""
    save_path = tmp_path_factory.mktemp('prepared') / 'new'
    command = [
        sys.executable,
        'dataset/interhand.py',
        '--data_path',
        raw,
        '--save_path',
        save_path,
        '--splits',
        'train',
        'MANO.SOURCE',
        'standin',
        '--workers',
        '2',
    ]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert f'train: {2 * STEPS} of {2 * STEPS} frames kept' in done.stdout
    return save_path / 'train'


def test_the_command_writes_the_interchange_form(prepared, raw):
    assert {p.name for p in prepared.parent.iterdir()} == {'train', 'hand_model.json'}
    assert {p.name for p in prepared.iterdir()} == {*FOLDERS, 'preparation.json'}
    for folder, suffix in FOLDERS.items():
        assert {p.name for p in (prepared / folder).iterdir()} == {f'{i}.{suffix}' for i in range(2 * STEPS)}
    data = json.loads(annotation_file(raw, 'data').read_text())
    for index, image in enumerate(data['images']):
        anno = safe_pickle.load(prepared / 'anno' / f'{index}.pkl')
        assert anno['inter_idx'] == index and anno['image'] == image
        assert anno['annotation'] in data['annotations'] and anno['annotation']['image_id'] == image['id']
        for side in ('left', 'right'):
            parameters = anno['mano_params'][side]
            assert {k: v.shape for k, v in parameters.items()} == {
                'R': (1, 3, 3),
                'pose': (1, 45),
                'shape': (1, 10),
                'trans': (1, 3),
            }
            assert all(v.dtype == np.float32 for v in parameters.values())
        assert {k: (v.shape, v.dtype.name) for k, v in anno['camera'].items()} == {
            'R': ((3, 3), 'float32'),
            't': ((3,), 'float32'),
            'camera': ((3, 3), 'float64'),
        }
        for folder in ('img', 'mask', 'dense'):
            assert cv2.imread(str(prepared / folder / f'{index}.jpg')).shape == (256, 256, 3)


def test_one_process_writes_the_same_bytes_as_two(prepared, raw, tmp_path):
    assert prepare(raw, tmp_path) == 0
    assert contents(tmp_path) == contents(prepared.parent)


def prepared_vertices(anno, models):
    """The labels: (1, 1556, 3) m in camera axes, from the stored parameters."""
    sides = [anno['mano_params'][side] for side in ('left', 'right')]
    root, pose, shape, trans = (
        torch.from_numpy(np.concatenate([one[k] for one in sides]))[None] for k in ('R', 'pose', 'shape', 'trans')
    )
    world = TwoHandLayer(models)(root, pose, shape).vertices + trans[:, :, None]
    rotation, translation = torch.from_numpy(anno['camera']['R']), torch.from_numpy(anno['camera']['t'])
    return (world @ rotation.T + translation).flatten(1, 2)


def test_stored_parameters_project_to_the_crop_of_the_original_fits(prepared, raw, models):
    split = RawSplit(raw, 'train')
    layer = TwoHandLayer(models, dtype=torch.float64)
    for index, frame in enumerate(split.frames):
        anno = safe_pickle.load(prepared / 'anno' / f'{index}.pkl')
        intrinsics = anno['camera']['camera']
        pixels = project(prepared_vertices(anno, models).double(), torch.from_numpy(intrinsics))[0].numpy()
        extent = pixels.max(0) - pixels.min(0)
        np.testing.assert_allclose(extent.max(), 0.8 * 256, atol=1e-3)
        np.testing.assert_allclose((pixels.max(0) + pixels.min(0)) / 2, 128, atol=1e-3)

        fits, camera = split.mano(frame.capture, frame.frame_idx), split.camera(frame.capture, frame.camera)
        pose, shape, trans = (
            torch.from_numpy(np.stack([fits[side][k] for side in ('left', 'right')]))[None] for k in range(3)
        )
        axis_angle, root = pose[..., 3:] + layer.pose_mean, axis_angle_to_matrix(pose[..., :3])
        world = layer(root, axis_angle, shape, use_pca=False).vertices + trans[:, :, None]
        seen = world.flatten(0, 2).numpy() @ camera.rotation.T + camera.translation
        whole = project(torch.from_numpy(seen), torch.from_numpy(camera.intrinsics)).numpy()
        to_crop = intrinsics @ np.linalg.inv(camera.intrinsics)
        np.testing.assert_allclose(whole @ to_crop[:2, :2].T + to_crop[:2, 2], pixels, atol=2e-2)


def test_masks_and_colours_are_the_visible_surface_and_survive_jpeg(prepared, models):
    faces, colours = torch.from_numpy(models.mesh_faces), canonical_colours(models)
    for index in range(2 * STEPS):
        anno = safe_pickle.load(prepared / 'anno' / f'{index}.pkl')
        intrinsics = torch.tensor(anno['camera']['camera'])[None].float()
        fragments = rasterize(prepared_vertices(anno, models), faces, intrinsics, (256, 256))
        face = fragments.face[0].numpy()
        mask = cv2.imread(str(prepared / 'mask' / f'{index}.jpg'))
        label = np.where(mask[..., 1:].max(-1) <= 50, 0, np.where(mask[..., 2] > mask[..., 1], 1, 2))  # 1 left, 2 right
        expected = np.where(face < 0, 0, np.where(face < 1538, 1, 2))
        assert (label != expected).sum() <= 2
        assert min((label == 1).sum(), (label == 2).sum()) > 500
        dense = cv2.imread(str(prepared / 'dense' / f'{index}.jpg')).astype(float)
        truth = 255 * interpolate(fragments, faces, torch.from_numpy(np.concatenate([colours, colours])))[0].numpy()
        assert np.abs(dense - truth)[face >= 0].mean() < 6 and np.abs(dense - truth)[face < 0].mean() < 2


def test_the_crop_shows_the_image_through_the_crop_matrix(prepared, raw):
    split = RawSplit(raw, 'train')
    for index, frame in enumerate(split.frames[:2]):
        anno = safe_pickle.load(prepared / 'anno' / f'{index}.pkl')
        image = cv2.imread(str(split.image_path(frame))).astype(np.float32)
        crop = cv2.imread(str(prepared / 'img' / f'{index}.jpg')).astype(np.float32)
        back = np.linalg.inv(anno['camera']['camera'] @ np.linalg.inv(split.camera(0, frame.camera).intrinsics))
        column, row = np.meshgrid(np.arange(256), np.arange(256))
        x, y = (back[k, k] * np.stack([column, row])[k] + back[k, 2] for k in range(2))
        x, y = x.astype(np.float32), y.astype(np.float32)
        expected = cv2.remap(image, x, y, cv2.INTER_LINEAR)
        inside = (x > 1) & (y > 1) & (x < frame.width - 2) & (y < frame.height - 2)
        assert inside.mean() > 0.3 and np.abs(expected - crop)[inside].mean() < 4


def test_crop_is_a_square_about_the_box_of_all_points():
    points = np.array([[10.0, 100.0], [60.0, 120.0], [30.0, 104.0]])
    mapped = points @ crop_matrix(points)[:2, :2].T + crop_matrix(points)[:2, 2]
    np.testing.assert_allclose([mapped.min(0), mapped.max(0)], [[25.6, 128 - 40.96], [230.4, 128 + 40.96]])


def test_pickles_name_numpy_so_that_every_numpy_reads_them(prepared):
    content = (prepared / 'anno' / '0.pkl').read_bytes()
    assert b'numpy._core' not in content and b'numpy.core' in content
    assert pickle.loads(content)['camera']['R'].shape == (3, 3)
    text = {'image': {'file_name': 'cnumpy/_core'}}
    assert pickle.loads(pickle_annotation(text)) == text


@pytest.fixture
def tree(tmp_path):
    return tmp_path / 'raw', make_raw_tree(tmp_path / 'raw', steps=6), tmp_path / 'out'


def test_every_reason_to_skip_is_counted_and_listed_and_leaves_no_gap(tree):
    root, content, save_path = tree
    images, annotations = content['data']['images'], {a['image_id']: a for a in content['data']['annotations']}
    path = [root / 'images' / 'train' / image['file_name'] for image in images]
    fits = content['MANO_NeuralAnnot']['0']
    annotations[images[0]['id']]['hand_type'] = 'right'
    annotations[images[1]['id']]['hand_type_valid'] = 0
    fits['103']['left'] = None  # images 2, 3
    fits['106']['right']['trans'][1] = None  # 4, 5
    content['data']['annotations'].remove(annotations[images[6]['id']])
    path[7].unlink()
    path[8].write_bytes(path[8].read_bytes()[:4000])
    cv2.imwrite(str(path[9]), np.full((10, 20, 3), 99, np.uint8))
    cv2.imwrite(str(path[10]), np.full((334, 512, 3), 9, np.uint8))
    for kind in ('data', 'MANO_NeuralAnnot'):
        write_kind(root, kind, content)
    assert prepare(root, save_path) == 0
    found = record(save_path)
    ids = [image['id'] for image in images]
    assert found['skipped_image_ids'] == {
        'hands not interacting': [ids[0]],
        'hand type not valid': [ids[1]],
        'a hand without MANO parameters': ids[2:4],
        'damaged MANO parameters': ids[4:6],
        'no annotation': [ids[6]],
        'picture missing': [ids[7]],
        'picture unreadable': [ids[8]],
        'picture of another size': [ids[9]],
        'mean grey value below 10': [ids[10]],
    }
    assert found['skipped'] == {reason: len(listed) for reason, listed in found['skipped_image_ids'].items()}
    assert (found['frames'], found['kept']) == (12, 1)
    assert set(found['damaged']) == {images[n]['file_name'] for n in (4, 5, 6, 7, 8, 9)}
    assert safe_pickle.load(save_path / 'train' / 'anno' / '0.pkl')['image']['id'] == ids[11]
    assert len(list((save_path / 'train' / 'img').iterdir())) == 1


def test_hands_behind_the_camera_and_damaged_cameras_are_listed(tree):
    root, content, save_path = tree
    content['camera']['0']['focal'][CAMERAS[1]] = [None, 1200]
    content['MANO_NeuralAnnot']['0']['103']['left']['trans'][2] -= 5.0
    for kind in ('camera', 'MANO_NeuralAnnot'):
        write_kind(root, kind, content)
    assert prepare(root, save_path) == 0
    assert record(save_path)['skipped'] == {'damaged camera': 6, 'hands behind the camera': 1}
    assert record(save_path)['kept'] == 5


@pytest.mark.parametrize('stop_after, finished', [(1, 0), (3, 3), (7, 6), (11, 9)])  # samples written, frames noted
def test_an_interrupted_run_resumes_to_the_same_files(tree, monkeypatch, stop_after, finished):
    root, content, save_path = tree
    dark = root / 'images' / 'train' / content['data']['images'][2]['file_name']
    cv2.imwrite(str(dark), np.zeros((334, 512, 3), np.uint8))
    monkeypatch.setattr(preparation, 'CHUNK', 3)
    assert prepare(root, save_path.with_name('whole')) == 0
    write, calls = preparation.write_frame, []

    def interrupted(folder, index, sample):
        calls.append(index)
        if len(calls) == stop_after:
            (folder / 'img' / f'{index}.jpg').write_bytes(b'half a fi')
            raise KeyboardInterrupt
        write(folder, index, sample)

    monkeypatch.setattr(preparation, 'write_frame', interrupted)
    assert prepare(root, save_path) == 130
    assert not (save_path / 'train').exists()
    with open(save_path / 'train.partial' / 'journal.jsonl', 'ab') as journal:
        journal.write(b'{"next": 99, "ski')  # a line that a kill truncated
    monkeypatch.setattr(preparation, 'write_frame', write)
    prepared_again = []
    real_task = preparation.frame_task
    monkeypatch.setattr(preparation, 'frame_task', lambda *a: prepared_again.append(a) or real_task(*a))
    assert prepare(root, save_path) == 0
    assert len(prepared_again) == 12 - finished
    assert contents(save_path) == contents(save_path.with_name('whole'))


def test_rerunning_changes_nothing(tree, capsys):
    root, _, save_path = tree
    assert prepare(root, save_path) == 0
    before = contents(save_path)
    assert prepare(root, save_path) == 0
    assert 'already complete' in capsys.readouterr().out and contents(save_path) == before


def write_colours(path, array):
    path.write_bytes(pickle.dumps(array))
    return str(path)


def test_vertex_colours_of_the_user_are_painted(tree):
    root, _, save_path = tree
    colours = np.tile(np.array([0.2, 0.5, 0.9], np.float32), (778, 1))
    assert prepare(root, save_path, '--colours', write_colours(save_path.with_name('v_color.pkl'), colours)) == 0
    dense = cv2.imread(str(save_path / 'train' / 'dense' / '0.jpg'))
    hand = cv2.imread(str(save_path / 'train' / 'mask' / '0.jpg')).max(-1) > 50
    np.testing.assert_allclose(np.median(dense[hand], 0), [51, 128, 230], atol=3)


def test_canonical_colours_span_the_box_of_the_hand(models):
    colours = canonical_colours(models)
    assert colours.shape == (778, 3) and colours.dtype == np.float32
    np.testing.assert_allclose([colours.min(0), colours.max(0)], [[0, 0, 0], [1, 1, 1]], atol=1e-6)


@pytest.mark.parametrize(
    'array, message',
    [
        (np.zeros((777, 3), np.float32), r'shape \(778, 3\)'),
        (np.zeros((778, 3), int), 'float array'),
        ({'a': 1}, 'holds dict'),
        (np.full((778, 3), 255.0), r'\[0, 1\]'),
        (np.full((778, 3), np.nan), r'\[0, 1\]'),
    ],
)
def test_bad_vertex_colours_are_refused(tmp_path, array, message):
    with pytest.raises(UserError, match=message):
        load_colours(write_colours(tmp_path / 'v_color.pkl', array))


def spoil_nothing_left(root, content, save_path):
    for annotation in content['data']['annotations']:
        annotation['hand_type'] = 'left'
    write_kind(root, 'data', content)
    return 'No frame of train can be prepared. train: 0 of 12 frames kept 12 hands not interacting.', ()


def spoil_half_download(root, content, save_path):
    for image in content['data']['images'][1:]:
        (root / 'images' / 'train' / image['file_name']).unlink()
    return '11 of 12 frames of train', ()


def spoil_many_damaged(root, content, save_path):
    for image in content['data']['images'][1:]:
        (root / 'images' / 'train' / image['file_name']).write_bytes(b'')
    return '.jpg: empty', ()


def spoil_fits_missing(root, content, save_path):
    annotation_file(root, 'MANO_NeuralAnnot').unlink()
    return 'MANO_NeuralAnnot.json is missing', ()


def spoil_data_truncated(root, content, save_path):
    path = annotation_file(root, 'data')
    path.write_bytes(path.read_bytes()[:1000])
    return 'data.json cannot be read', ()


def spoil_no_images(root, content, save_path):
    (root / 'images').rename(root / 'pictures')
    return 'Unpack the images of train', ()


def spoil_split(root, content, save_path):
    return "'training' is not a split", ('--splits', 'training')


def spoil_absent_split(root, content, save_path):
    return 'has no split val', ('--splits', 'train', 'val')


def spoil_workers(root, content, save_path):
    return '--workers is 0', ('--workers', '0')


def spoil_colours(root, content, save_path):
    return 'does not exist', ('--colours', str(save_path / 'nowhere.pkl'))


def spoil_other_hand(root, content, save_path):
    (root / 'hand_model.json').write_text('{"hand_model": "mano:1:2"}')
    return 'generated with the hand model mano:1:2', ()


def spoil_foreign_folder(root, content, save_path):
    (save_path / 'train' / 'img').mkdir(parents=True)
    return 'was not prepared by this command', ()


def spoil_other_settings(root, content, save_path):
    assert prepare(root, save_path) == 0
    colours = write_colours(save_path.with_name('v_color.pkl'), np.zeros((778, 3)))
    return 'created with other settings (vertex_colours was', ('--colours', colours)


def spoil_pytorch3d(root, content, save_path):
    return 'pytorch3d is not installed', ('--renderer', 'pytorch3d')


@pytest.mark.parametrize(
    'spoil',
    [value for name, value in list(globals().items()) if name.startswith('spoil_')],
    ids=lambda f: f.__name__.removeprefix('spoil_'),
)
def test_bad_input_is_one_sentence_and_exit_code_2(tree, spoil, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pytorch3d', None)
    root, content, save_path = tree
    message, extra = spoil(root, content, save_path)
    before = contents(save_path) if save_path.exists() else {}
    capsys.readouterr()
    assert prepare(root, save_path, *extra) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1 and message in errors[0]
    if 'train/preparation.json' not in before:
        assert not (save_path / 'train' / 'preparation.json').exists()
    else:
        assert contents(save_path) == before


def test_a_partial_run_with_other_settings_is_not_resumed(tree, monkeypatch, capsys):
    root, _, save_path = tree
    monkeypatch.setattr(preparation, 'CHUNK', 3)
    monkeypatch.setattr(preparation, 'finish', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    assert prepare(root, save_path) == 130
    before = contents(save_path)
    colours = write_colours(save_path.with_name('v_color.pkl'), np.zeros((778, 3)))
    assert prepare(root, save_path, '--colours', colours) == 2
    assert 'train.partial was created with other settings' in capsys.readouterr().err
    assert contents(save_path) == before


def test_a_disk_that_vanishes_stops_the_run_without_skipping(tree, monkeypatch, capsys):
    root, _, save_path = tree
    monkeypatch.setattr(preparation, 'CHUNK', 4)
    write = preparation.write_frame

    def vanish(folder, index, sample):
        write(folder, index, sample)
        if index == 3:
            (root / 'images' / 'train').rename(root / 'images' / 'unplugged')
            (root / 'images' / 'train').mkdir()

    monkeypatch.setattr(preparation, 'write_frame', vanish)
    assert prepare(root, save_path) == 2
    assert 'Check the disk' in capsys.readouterr().err
    (root / 'images' / 'train').rmdir()
    (root / 'images' / 'unplugged').rename(root / 'images' / 'train')
    monkeypatch.setattr(preparation, 'write_frame', write)
    assert prepare(root, save_path) == 0
    assert record(save_path)['kept'] == 12 and record(save_path)['skipped'] == {}


def test_synthetic_data_generated_again_are_not_taken_for_those_before(tree, capsys):
    """Another generator draws other images with annotation files of the same size."""
    root, _, save_path = tree
    (root / 'synthesized.json').write_text('{"generator": 1}')
    assert prepare(root, save_path) == 0
    (root / 'synthesized.json').write_text('{"generator": 2}')
    assert prepare(root, save_path) == 2
    assert 'train was created with other settings (source was' in capsys.readouterr().err


def test_a_folder_of_an_earlier_version_knows_less_of_its_source(tree, capsys):
    root, _, save_path = tree
    (root / 'synthesized.json').write_text('{}')
    assert prepare(root, save_path) == 0
    record = json.loads((save_path / 'train/preparation.json').read_text())
    del record['settings']['source']['synthesized']
    (save_path / 'train/preparation.json').write_text(json.dumps(record))
    assert prepare(root, save_path) == 0
    assert 'train is already complete' in capsys.readouterr().out
