import json

import numpy as np
import pytest
from raw_tree import CAMERAS, annotation_file, make_raw_tree, write_kind

from dataset.hand_model_record import check_hand_model_record, write_hand_model_record
from dataset.prepare.raw import RawSplit, RecordError, find_splits, full_entries
from models.hands import load_hands
from utils.errors import UserError
from utils.hand import LEFT, RIGHT


@pytest.fixture
def tree(tmp_path):
    return tmp_path, make_raw_tree(tmp_path, steps=2)


def test_frames_are_joined_by_image_id_whatever_the_order(tree):
    root, content = tree
    content['data']['annotations'][0] |= {'hand_type': 'right', 'hand_type_valid': False}
    image_id = content['data']['annotations'][0]['image_id']
    write_kind(root, 'data', content)
    frames = RawSplit(root, 'train').frames
    assert [f.id for f in frames] == [image['id'] for image in content['data']['images']]
    assert [(f.id, f.hand_type_valid) for f in frames if f.hand_type != 'interacting'] == [(image_id, False)]
    for frame in frames:
        image, annotation = full_entries(frame)
        assert image in content['data']['images'] and annotation in content['data']['annotations']
        assert image['id'] == frame.id == annotation['image_id']
        assert (frame.capture, frame.camera, frame.width) == ('0', image['camera'], image['width'])


def test_an_image_without_annotation_has_no_hand_type(tree):
    root, content = tree
    gone = content['data']['annotations'].pop()['image_id']
    write_kind(root, 'data', content)
    frame = next(f for f in RawSplit(root, 'train').frames if f.id == gone)
    assert frame.hand_type == '' and not frame.hand_type_valid and full_entries(frame)[1] == {}


def test_missing_images_are_found_whatever_is_in_their_place(tree):
    root = tree[0]
    split = RawSplit(root, 'train')
    assert split.missing_images(split.frames) == []
    gone, link, folder, there = (split.image_path(frame) for frame in split.frames)
    gone.unlink()
    link.unlink()
    link.symlink_to(root / 'nowhere')
    folder.unlink()
    folder.mkdir()
    elsewhere = there.rename(root / 'elsewhere.jpg')
    there.symlink_to(elsewhere)
    assert split.missing_images(split.frames) == split.frames[:3]
    for name in CAMERAS:
        (gone.parents[1] / f'cam{name}').rename(root / name)
    (gone.parents[1] / f'cam{CAMERAS[0]}').write_bytes(b'')
    assert split.missing_images(reversed(split.frames)) == split.frames[::-1]


def test_the_camera_is_at_the_position_in_the_file_and_looks_along_z(tree):
    root, content = tree
    for name in CAMERAS:
        camera = RawSplit(root, 'train').camera(0, name)
        position = np.array(content['camera']['0']['campos'][name]) / 1000  # m
        np.testing.assert_allclose(camera.rotation @ position + camera.translation, 0, atol=1e-12)
        ahead = position + camera.rotation[2] * 0.5
        pixel = camera.intrinsics @ (camera.rotation @ ahead + camera.translation)
        np.testing.assert_allclose(pixel, [*np.array(content['camera']['0']['princpt'][name]) / 2, 0.5], atol=1e-9)


@pytest.mark.parametrize('nested', [True, False])
def test_joints_come_in_our_order_in_metres_with_zeros_where_invalid(tree, nested):
    root, content = tree
    entry = content['joint_3d']['0']['100']
    valid = np.ones(42, bool)
    valid[3] = False  # base of the right thumb
    entry['joint_valid'] = [[bool(v)] for v in valid] if nested else [int(v) for v in valid]
    entry['world_coord'][20], entry['world_coord'][41] = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]  # wrists
    entry['world_coord'][25] = [7.0, 8.0, None]  # tip of the left index
    write_kind(root, 'joint_3d', content)
    points, mask = RawSplit(root, 'train').joints(0, 100)
    assert points.shape == (2, 21, 3) and mask.shape == (2, 21)
    np.testing.assert_allclose(points[RIGHT, 0], [0.001, 0.002, 0.003])
    np.testing.assert_allclose(points[LEFT, 0], [0.004, 0.005, 0.006])
    np.testing.assert_allclose(points[RIGHT, 4], np.array(entry['world_coord'][0]) / 1000)  # thumb tip is first there
    np.testing.assert_allclose(points[LEFT, 5], np.array(entry['world_coord'][28]) / 1000)
    assert np.argwhere(~mask).tolist() == [[LEFT, 8], [RIGHT, 1]]
    assert not points[~mask].any() and np.isfinite(points).all()


def test_fits_are_arrays_per_side_and_none_where_there_is_none(tree):
    root, content = tree
    content['MANO_NeuralAnnot']['0']['100']['left'] = None
    write_kind(root, 'MANO_NeuralAnnot', content)
    split = RawSplit(root, 'train')
    fits = split.mano(0, 100)
    assert fits['left'] is None
    np.testing.assert_array_equal(fits['right'].pose, content['MANO_NeuralAnnot']['0']['100']['right']['pose'])
    assert [part.shape for part in fits['right']] == [(48,), (10,), (3,)]
    assert split.mano('0', '999') == split.mano('77', 100) == {'left': None, 'right': None}


@pytest.mark.parametrize('word', ['NaN', 'null', '-Infinity', 'Infinity'])
def test_numbers_that_are_none_spoil_their_own_record_only(tree, word):
    root, content = tree
    content['MANO_NeuralAnnot']['0']['100']['left']['pose'][7] = 123456.5
    content['camera']['0']['focal'][CAMERAS[0]][1] = 123456.5
    for kind in ('MANO_NeuralAnnot', 'camera'):
        annotation_file(root, kind).write_text(json.dumps(content[kind]).replace('123456.5', word))
    split = RawSplit(root, 'train')
    assert np.flatnonzero(~np.isfinite(split.mano(0, 100)['left'].pose)).tolist() == [7]
    assert np.isfinite(split.mano(0, 103)['left'].pose).all()
    with pytest.raises(RecordError, match=f'_camera.json: camera {CAMERAS[0]} of capture 0 is not made of finite'):
        split.camera(0, CAMERAS[0])
    assert np.isfinite(split.camera(0, CAMERAS[1]).intrinsics).all()


@pytest.mark.parametrize('capture, camera', [(0, '999'), (9, CAMERAS[0])])
def test_an_unknown_camera_is_named(tree, capture, camera):
    with pytest.raises(RecordError, match=f'no complete camera {camera} of capture {capture}'):
        RawSplit(tree[0], 'train').camera(capture, camera)


def test_records_of_another_shape_are_named(tree):
    root, content = tree
    content['MANO_NeuralAnnot']['0']['100']['right']['pose'].pop()
    content['joint_3d']['0']['100']['world_coord'].pop()
    for kind in ('MANO_NeuralAnnot', 'joint_3d'):
        write_kind(root, kind, content)
    split = RawSplit(root, 'train')
    with pytest.raises(RecordError, match='capture 0, frame 100 does not hold 48'):
        split.mano(0, 100)
    with pytest.raises(RecordError, match='capture 0, frame 100 does not hold 42 joints'):
        split.joints(0, 100)
    with pytest.raises(RecordError, match='has no capture 0, frame 55'):
        split.joints(0, 55)


READERS = {
    'data': lambda s: s.frames,
    'camera': lambda s: s.camera(0, CAMERAS[0]),
    'joint_3d': lambda s: s.joints(0, 100),
    'MANO_NeuralAnnot': lambda s: s.mano(0, 100),
}


@pytest.mark.parametrize('kind', READERS)
@pytest.mark.parametrize('damage', ['missing', 'empty', 'truncated', 'another file', 'another encoding'])
def test_a_bad_file_is_one_sentence_that_names_it(tree, kind, damage):
    path = annotation_file(tree[0], kind)
    content = path.read_bytes()
    if damage == 'missing':
        path.unlink()
    else:
        path.write_bytes(
            {
                'empty': b'',
                'truncated': content[: len(content) // 2],
                'another file': b'[1, 2, 3]',
                'another encoding': content.replace(b'"', b'"\xe9'),  # Latin-1
            }[damage]
        )
    with pytest.raises(UserError) as error:
        READERS[kind](RawSplit(tree[0], 'train'))
    assert str(path) in str(error.value) and '\n' not in str(error.value) and 'get it again' in str(error.value)


def test_another_encoding_in_a_field_that_nothing_reads_is_one_sentence(tree):
    path = annotation_file(tree[0], 'data')
    path.write_bytes(path.read_bytes().replace(b'{"id"', b'{"note": "caf\xe9", "id"', 1))
    frame = next(iter(RawSplit(tree[0], 'train').iterate_frames()))
    with pytest.raises(UserError, match=f'entry of {frame.file_name} in data.json cannot be used.*get it again'):
        full_entries(frame)


def test_a_field_of_another_type_is_named(tree):
    root, content = tree
    content['data']['images'][1]['frame_idx'] = None
    write_kind(root, 'data', content)
    with pytest.raises(UserError, match='image number 1 cannot be used.*frame_idx'):
        list(RawSplit(root, 'train').iterate_frames())


def test_splits_are_found_by_their_annotations(tree, tmp_path):
    assert find_splits(tree[0]) == ['train']
    make_raw_tree(tmp_path, steps=1, split='test')
    assert find_splits(tmp_path) == ['train', 'test']
    with pytest.raises(UserError, match='no split val; it has train, test'):
        RawSplit(tmp_path, 'val')
    with pytest.raises(UserError, match='does not exist'):
        find_splits(tmp_path / 'nowhere')
    with pytest.raises(UserError, match='no annotations/train'):
        find_splits(tmp_path / 'images')
    (tmp_path / 'images' / 'test').rename(tmp_path / 'elsewhere')
    with pytest.raises(UserError, match='Unpack the images of test there'):
        RawSplit(tmp_path, 'test')


def test_the_hand_model_record_tells_hands_apart(tmp_path):
    hands = load_hands('standin')
    check_hand_model_record(tmp_path, hands)  # none: real data
    write_hand_model_record(tmp_path, hands)
    check_hand_model_record(tmp_path, hands)
    (tmp_path / 'hand_model.json').write_text('{"hand_model": "mano:0:1"}')
    with pytest.raises(UserError, match='hand model mano:0:1, but MANO.SOURCE and MANO.PATH select standin'):
        check_hand_model_record(tmp_path, hands)
    (tmp_path / 'hand_model.json').write_text('{"hand')
    with pytest.raises(UserError, match='hand_model.json is not valid JSON'):
        check_hand_model_record(tmp_path, hands)
