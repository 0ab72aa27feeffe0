import shutil

import numpy as np
import pytest
import torch
from prepared_tree import write_prepared
from raw_tree import make_raw_tree, write_kind

from dataset import interhand, open_split
from dataset.prepared import InterHandDataset
from dataset.subsets import AnnotatedJoints, choose, read_ids
from utils.errors import UserError


@pytest.fixture(scope='module')
def dataset(tiny_prepared):
    """Five samples: image ids 1000 .. 1004, annotation ids 5000 .. 5004, capture 0."""
    return InterHandDataset(tiny_prepared, 'test')


@pytest.fixture
def ids(tmp_path):
    def write(text: str):
        (tmp_path / 'ids.txt').write_text(text)
        return tmp_path / 'ids.txt'

    return write


# Filters


def test_without_filters_the_whole_split_is_selected_without_description(dataset):
    assert choose(dataset) == ([0, 1, 2, 3, 4], None)


def test_image_and_annotation_ids(dataset, ids):
    by_image = choose(dataset, image_ids=ids('1003\n1001\n7\n'))
    assert by_image.indices == [1, 3] and '3 listed' in by_image.description and 'image ids' in by_image.description
    by_annotation = choose(dataset, annotation_ids=ids('5000, 5004'))
    assert by_annotation.indices == [0, 4] and 'annotation ids' in by_annotation.description


def test_filters_combine_and_first_applies_last(dataset, ids):
    subset = choose(dataset, image_ids=ids('1000 1002 1003 1004'), captures=['0'], first=2)
    assert subset.indices == [0, 2]
    assert [word in subset.description for word in ('image ids', 'capture 0', 'first 2')] == [True] * 3
    assert choose(dataset, first=3) == ([0, 1, 2], 'first 3')
    assert choose(dataset, first=99).indices == [0, 1, 2, 3, 4]


def test_filters_without_matches_are_rejected(dataset, ids):
    message = r'No sample of .*test passes the filters \(image ids of .*ids.txt \(2 listed\)'
    with pytest.raises(UserError, match=message):
        choose(dataset, image_ids=ids('1 2'))
    with pytest.raises(UserError, match='no capture 9; it has 0'):
        choose(dataset, captures=['9'])
    with pytest.raises(UserError, match='--first is 0'):
        choose(dataset, first=0)


@pytest.mark.parametrize('text', ['1\n2\n3\n', '1 2 3', '1,2,3', '[1, 2, 3]', ' 1,\t2\n\n3', '["1", 2, 3]'])
def test_ids_in_every_supported_format(ids, text):
    assert read_ids(ids(text)) == {1, 2, 3}


@pytest.mark.parametrize(
    'text', ['a b', '1.5', '[1, null]', '[1, 2', '[[1]]', '[1.7]', '[true]', '[1e999]', '[' * 9999]
)
def test_invalid_id_lists_are_rejected(ids, text):
    with pytest.raises(UserError, match=r'ids.txt is not a list of ids') as refused:
        read_ids(ids(text))
    assert '\n' not in str(refused.value)


def test_missing_and_binary_id_lists_are_rejected(tmp_path):
    with pytest.raises(UserError, match='no.txt does not exist'):
        read_ids(tmp_path / 'no.txt')
    (tmp_path / 'b.txt').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(UserError, match='b.txt is not a list of ids'):
        read_ids(tmp_path / 'b.txt')


# Annotated joints


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """(raw folder, content of its annotation files, prepared split) with one invalid joint."""
    root = tmp_path_factory.mktemp('annotated')
    content = make_raw_tree(root / 'raw', steps=2)
    content['joint_3d']['0']['100']['joint_valid'][3] = [False]  # right thumb, nearest to the wrist
    write_kind(root / 'raw', 'joint_3d', content)
    assert (
        interhand.main(
            [
                '--data_path',
                str(root / 'raw'),
                '--save_path',
                str(root / 'data'),
                '--workers',
                '1',
                'MANO.SOURCE',
                'standin',
            ]
        )
        == 0
    )
    return root / 'raw', content, InterHandDataset(root / 'data', 'train')


def test_annotated_joints_are_those_of_the_files_in_camera_axes(prepared):
    raw, content, dataset = prepared
    found = AnnotatedJoints(dataset, raw)(torch.arange(len(dataset)))
    assert found.shape == (len(dataset), 2, 21, 3) and found.dtype == torch.float32 and len(dataset) > 1
    cameras = content['camera']['0']
    for index in range(len(dataset)):
        image = dataset.entries(index)['image']
        world = np.array(content['joint_3d']['0'][str(image['frame_idx'])]['world_coord'])
        rotation, position = (np.array(cameras[key][image['camera']]) for key in ('camrot', 'campos'))
        camera = (world - position) @ rotation.T / 1000
        np.testing.assert_allclose(found[index, 0, 0], camera[41], atol=1e-6)  # the left wrist is last
        np.testing.assert_allclose(found[index, 1, 8], camera[4], atol=1e-6)  # right index tip
        assert int(found[index].isnan().any(-1).sum()) == (image['frame_idx'] == 100)
    first = next(i for i in range(len(dataset)) if dataset.entries(i)['image']['frame_idx'] == 100)
    assert found[first, 1, 1].isnan().all()


def test_annotations_of_another_data_set_are_rejected(prepared, tmp_path):
    dataset = prepared[2]
    make_raw_tree(tmp_path, steps=1)
    joints = AnnotatedJoints(dataset, tmp_path)
    other = next(i for i in range(len(dataset)) if dataset.entries(i)['image']['frame_idx'] != 100)
    with pytest.raises(UserError, match=r'joint_3d.json has no capture 0, frame .*needed for .*jpg'):
        joints(torch.tensor([other]))
    with pytest.raises(UserError, match='nowhere does not exist'):
        AnnotatedJoints(dataset, tmp_path / 'nowhere')


def test_ids_and_annotations_belong_to_one_data_set(tiny_prepared, tmp_path, ids):
    """Ids and captures may coincide: another set's samples would be chosen, or compared with other frames."""
    write_prepared(tmp_path / 'other', 'test', 2)
    both = open_split([str(tiny_prepared), str(tmp_path / 'other')], 'test')
    assert len(choose(both, first=6).indices) == 6
    for words in ({'image_ids': ids('1000')}, {'annotation_ids': ids('5000')}, {'captures': ['0']}):
        with pytest.raises(UserError, match=r'Ids and captures belong to one data set, but these are 2 \('):
            choose(both, **words)
    with pytest.raises(UserError, match='Annotation files belong to one data set'):
        AnnotatedJoints(both, tmp_path)


def test_annotated_joints_need_no_images(prepared, tmp_path):
    shutil.copytree(prepared[0] / 'annotations', tmp_path / 'annotations')
    assert AnnotatedJoints(prepared[2], tmp_path)(torch.arange(1)).shape == (1, 2, 21, 3)


def test_samples_without_their_origin_are_rejected(dataset, tmp_path):
    make_raw_tree(tmp_path, steps=1, split='test')
    with pytest.raises(UserError, match='lacks its camera'):
        AnnotatedJoints(dataset, tmp_path)(torch.tensor([0]))
