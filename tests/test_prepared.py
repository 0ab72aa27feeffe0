import pickle
import shutil

import cv2
import numpy as np
import pytest
import torch
from prepared_tree import make_annotations
from torch.utils.data import default_collate

from dataset.augmentation import AugmentationParameters, AugmentationRanges
from dataset.damage import DamageError
from dataset.prepared import LABEL_SHAPES, InterHandDataset, Sample
from utils.errors import UserError
from utils.hand import LEFT, RIGHT, SIDES


@pytest.fixture
def spoilt(tiny_prepared, tmp_path):
    """A copy of the data set that a test may damage."""
    shutil.copytree(tiny_prepared, tmp_path / 'data')
    return tmp_path / 'data'


# Samples.


def tensors_of(sample):
    return [*(value for value in sample if isinstance(value, torch.Tensor)), *sample.augmentation]


def test_a_sample_holds_the_written_values(tiny_prepared):
    dataset = InterHandDataset(tiny_prepared, 'train')
    assert len(dataset) == 8
    for index, written in enumerate(make_annotations(8)):
        sample = dataset[index]
        for name, key in (('root', 'R'), ('pose', 'pose'), ('shape', 'shape'), ('translation', 'trans')):
            expected = np.stack([written['mano_params'][side][key][0] for side in SIDES])
            np.testing.assert_array_equal(getattr(sample, name), expected)
        for name, key in (('camera_rotation', 'R'), ('camera_translation', 't'), ('intrinsics', 'camera')):
            np.testing.assert_array_equal(getattr(sample, name), written['camera'][key].astype(np.float32))
        assert all(getattr(sample, name).dtype == torch.float32 for name in LABEL_SHAPES)
        assert sample.present.tolist() == [True, True]
        for image, kind in ((sample.image, 'img'), (sample.dense, 'dense')):
            assert image.dtype == torch.uint8
            np.testing.assert_array_equal(image, cv2.imread(str(tiny_prepared / f'train/{kind}/{index}.jpg')))
        assert sample.index == index and dataset.name(index) == str(tiny_prepared / f'train/img/{index}.jpg')


def test_channels_of_the_mask_file(tiny_prepared):
    """In the file, BGR channel 1 is the right hand and channel 2 the left; samples hold left, right."""
    for index in range(8):
        stored = cv2.imread(str(tiny_prepared / f'train/mask/{index}.jpg'))
        mask = InterHandDataset(tiny_prepared, 'train')[index].mask
        assert mask.shape == (256, 256, 2) and (stored[..., 1] > 50).any() and (stored[..., 2] > 50).any()
        np.testing.assert_array_equal(mask[..., LEFT], stored[..., 2])
        np.testing.assert_array_equal(mask[..., RIGHT], stored[..., 1])


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_annotations_of_other_tools_are_read(spoilt, protocol):
    """Any pickle protocol, float64, other leading axes, missing unused entries, additional files and folders."""
    expected = InterHandDataset(spoilt, 'train').labels(0)
    content = make_annotations(1)[0]
    for hand in content['mano_params'].values():
        hand.update({key: value.astype(np.float64).squeeze() for key, value in hand.items()})
    del content['image'], content['annotation'], content['inter_idx']
    content['mano_params']['left']['shape'] = content['mano_params']['left']['shape'].tolist()
    (spoilt / 'train/anno/0.pkl').write_bytes(pickle.dumps(content, protocol))
    (spoilt / 'train/hms').mkdir()
    (spoilt / 'train/img/.DS_Store').touch()
    (spoilt / 'train/img/note.txt').touch()
    for array, known in zip(InterHandDataset(spoilt, 'train').labels(0), expected):
        np.testing.assert_array_equal(array, known)


def test_dense_maps_are_read_only_on_request(tiny_prepared):
    assert InterHandDataset(tiny_prepared, 'train', with_dense=False)[0].dense is None


def test_augmentation_is_drawn_on_request_from_seed_epoch_and_index(tiny_prepared):
    ranges = AugmentationRanges(180, 0.1, 10, 0.5, 0.3, 0.3, 0.05, 0.01)

    def angle(key, seed=0, ranges=ranges):
        return InterHandDataset(tiny_prepared, 'train', ranges=ranges, seed=seed)[key].augmentation.angle.item()

    assert angle(3, ranges=None) == 0 != angle(3)
    assert angle((3, 5)) == angle((3, 5)) and angle(3) == angle((3, 0))
    assert len({angle((3, 5)), angle((3, 6)), angle((4, 5)), angle((3, 5), seed=1)}) == 4


def test_collating_samples_batches_their_tensors(tiny_prepared):
    dataset = InterHandDataset(tiny_prepared, 'train')
    batch = default_collate([dataset[4], dataset[2], dataset[7]])
    assert type(batch) is Sample and type(batch.augmentation) is AugmentationParameters
    assert batch.index.tolist() == [4, 2, 7]
    for together, alone in zip(tensors_of(batch), tensors_of(dataset[2]), strict=True):
        assert torch.equal(together[1], alone)


# Invalid input is reported in one sentence with the path.


@pytest.mark.parametrize(
    'path, spoil, message',
    [
        ('train', lambda p: shutil.rmtree(p), r'data/train does not exist: set DATASET\.PATH'),
        ('train', lambda p: p.rename(p.with_name('train.partial')), r'data/train is only partly prepared'),
        ('train/mask', lambda p: shutil.rmtree(p), r'train/mask is missing'),
        ('train/img/3.jpg', lambda p: p.unlink(), r'train/img has gaps: 1 .* the first is number 3'),
        ('train/img/7.jpg', lambda p: p.unlink(), r'train/img has gaps: 1 .* the first is number 7'),
        ('train/anno/0.pkl', lambda p: p.unlink(), r'train/anno has gaps: 1 .* the first is number 0'),
        ('train/dense/9.jpg', lambda p: p.touch(), r'train/img has gaps: 2 .* the first is number 8'),
        ('train/mask/5.jpg', lambda p: p.rename(p.with_name('5.png')), r'train/mask has gaps: 1 .* number 5'),
    ],
)
def test_incomplete_split(spoilt, path, spoil, message):
    spoil(spoilt / path)
    with pytest.raises(UserError, match=message):
        InterHandDataset(spoilt, 'train')
    assert len(InterHandDataset(spoilt, 'val')) == 3  # the other splits are unaffected


def test_empty_split(tmp_path):
    for kind in ('img', 'mask', 'dense', 'anno'):
        (tmp_path / 'train' / kind).mkdir(parents=True)
    with pytest.raises(UserError, match='train holds no samples'):
        InterHandDataset(tmp_path, 'train')


@pytest.mark.parametrize('kind', ['img', 'mask', 'dense'])
@pytest.mark.parametrize(
    'content, message',
    [
        (b'', 'is empty'),
        (b'not an image', 'is not an image'),
        (None, 'is missing'),
        (cv2.imencode('.jpg', np.zeros((200, 256, 3), np.uint8))[1].tobytes(), 'is 256 x 200 pixels'),
        (cv2.imencode('.jpg', np.zeros((512, 512, 3), np.uint8))[1].tobytes(), 'is 512 x 512 pixels'),
    ],
)
def test_invalid_image(spoilt, kind, content, message):
    dataset, path = InterHandDataset(spoilt, 'train'), spoilt / f'train/{kind}/2.jpg'
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=f'train/{kind}/2.jpg {message}'):
        dataset[2]
    assert dataset[1].index == 1


def with_camera_nan(content):
    content['camera']['t'][1] = np.nan
    return content


def with_infinite_pose(content):
    content['mano_params']['right']['pose'][0, 4] = np.inf
    return content


def without(*keys):
    def change(content):
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        return content

    return change


def with_pose_of(size):
    def change(content):
        content['mano_params']['left']['pose'] = np.zeros((1, size), np.float32)
        return content

    return change


@pytest.mark.parametrize(
    'change, message',
    [
        (with_camera_nan, 'holds NaN or infinity'),
        (with_infinite_pose, 'holds NaN or infinity'),
        (without('camera'), 'is not a prepared annotation'),
        (without('mano_params', 'left'), 'is not a prepared annotation'),
        (without('mano_params', 'right', 'trans'), 'is not a prepared annotation'),
        (with_pose_of(48), 'is not a prepared annotation'),
        (lambda c: c | {'camera': None}, 'is not a prepared annotation'),
        (lambda c: [c], 'is not a prepared annotation'),
        (lambda c: None, 'is not a prepared annotation'),
        (lambda c: np.zeros(3), 'is not a prepared annotation'),
        (lambda c: 'text', 'is not a prepared annotation'),
        (lambda c: c | {'camera': {'R': 'x', 't': 'y', 'camera': 'z'}}, 'is not a prepared annotation'),
        (lambda c: c | {'code': shutil.rmtree}, r'was refused: it refers to shutil\.'),
    ],
)
def test_invalid_annotation(spoilt, change, message):
    path = spoilt / 'train/anno/6.pkl'
    path.write_bytes(pickle.dumps(change(make_annotations(7)[6])))
    with pytest.raises(UserError, match=rf'train/anno/6\.pkl {message}'):
        InterHandDataset(spoilt, 'train')[6]


def test_truncated_and_missing_annotation(spoilt):
    path, dataset = spoilt / 'train/anno/6.pkl', InterHandDataset(spoilt, 'train')
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match=r'train/anno/6\.pkl .*truncated or damaged'):
        dataset[6]
    path.unlink()
    with pytest.raises(UserError, match=r'train/anno/6\.pkl does not exist'):
        dataset[6]


def test_truncated_images_and_indices_out_of_range_are_errors(spoilt):
    dataset, path = InterHandDataset(spoilt, 'train'), spoilt / 'train/img/2.jpg'
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=r'train/img/2\.jpg'):
        dataset[2]
    for index in (8, -1):
        with pytest.raises(IndexError):
            dataset[index]


@pytest.mark.parametrize('suffix', ['.jpg', '.png'])
def test_a_size_is_refused_before_the_image_takes_memory(tiny_prepared, tmp_path, monkeypatch, suffix):
    """A few bytes can announce gigabytes."""
    shutil.copytree(tiny_prepared / 'val', tmp_path / 'val')
    (tmp_path / 'val/img/0.jpg').write_bytes(cv2.imencode(suffix, np.zeros((600, 512, 3), np.uint8))[1].tobytes())
    monkeypatch.setattr('dataset.prepared.decode_image', lambda content: pytest.fail('decoded'))
    with pytest.raises(DamageError, match='is 512 x 600 pixels, but prepared crops are 256 x 256'):
        InterHandDataset(tmp_path, 'val').image('img', 0)
