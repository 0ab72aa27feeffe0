import pickle
import shutil
import time
from multiprocessing import get_context

import cv2
import numpy as np
import pytest
import torch
from prepared_tree import make_annotations
from torch.utils.data import default_collate

from dataset import loader
from dataset.augmentation import AugmentationParameters
from dataset.loader import EpochSampler, evaluation_loader, training_loader
from dataset.prepared import InterHandDataset, Sample
from utils.config import load_config
from utils.errors import UserError, user_facing
from utils.hand import LEFT, RIGHT, SIDES


@pytest.fixture
def spoilt(tiny_prepared, tmp_path):
    """A copy of the data set, for a test to spoil."""
    shutil.copytree(tiny_prepared, tmp_path / 'data')
    return tmp_path / 'data'


def config(root, **overrides):
    pairs = {'DATASET.PATH': root, 'TRAIN.BATCH_SIZE': 2, 'TRAIN.WORKERS': 0, 'EVAL.BATCH_SIZE': 2} | overrides
    return load_config(overrides=[str(x) for pair in pairs.items() for x in pair])


# Samples.


def test_a_sample_holds_what_was_written(tiny_prepared):
    dataset = InterHandDataset(tiny_prepared, 'train')
    assert len(dataset) == 8
    for index, written in enumerate(make_annotations(8)):
        sample = dataset[index]
        for name, key in (('root', 'R'), ('pose', 'pose'), ('shape', 'shape'), ('translation', 'trans')):
            expected = np.stack([written['mano_params'][side][key][0] for side in SIDES])
            np.testing.assert_array_equal(getattr(sample, name), expected)
        for name, key in (('camera_rotation', 'R'), ('camera_translation', 't'), ('intrinsics', 'camera')):
            np.testing.assert_array_equal(getattr(sample, name), written['camera'][key].astype(np.float32))
        assert all(x.dtype == torch.float32 for x in sample[3:10])
        for picture, kind in ((sample.image, 'img'), (sample.dense, 'dense')):
            assert picture.dtype == torch.uint8
            np.testing.assert_array_equal(picture, cv2.imread(str(tiny_prepared / f'train/{kind}/{index}.jpg')))
        assert sample.index == index and dataset.name(index) == str(tiny_prepared / f'train/img/{index}.jpg')


def test_channels_of_the_mask_file(tiny_prepared):
    """BGR channel 1 of the file is the right hand, channel 2 the left; ours are left, right."""
    for index in range(8):
        stored = cv2.imread(str(tiny_prepared / f'train/mask/{index}.jpg'))
        mask = InterHandDataset(tiny_prepared, 'train')[index].mask
        assert mask.shape == (256, 256, 2) and (stored[..., 1] > 50).any() and (stored[..., 2] > 50).any()
        np.testing.assert_array_equal(mask[..., LEFT], stored[..., 2])
        np.testing.assert_array_equal(mask[..., RIGHT], stored[..., 1])


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_annotations_of_other_tools_are_read_as_they_are(spoilt, protocol):
    """Any pickle protocol, float64, other leading axes, entries that are not used, folders that are not ours."""
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


def test_dense_pictures_are_left_on_the_disk_unless_asked_for(tiny_prepared):
    assert InterHandDataset(tiny_prepared, 'train', with_dense=False)[0].dense is None


def test_augmentation_is_drawn_only_where_asked_for_and_from_seed_epoch_and_index(tiny_prepared):
    ranges = loader.AugmentationRanges(180, 0.1, 10, 0.5, 0.3, 0.3, 0.05, 0.01)

    def angle(key, seed=0, ranges=ranges):
        return InterHandDataset(tiny_prepared, 'train', ranges=ranges, seed=seed)[key].augmentation.angle.item()

    assert angle(3, ranges=None) == 0 != angle(3)
    assert angle((3, 5)) == angle((3, 5)) and angle(3) == angle((3, 0))
    assert len({angle((3, 5)), angle((3, 6)), angle((4, 5)), angle((3, 5), seed=1)}) == 4


# Bad input: one sentence with the path.


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
    assert len(InterHandDataset(spoilt, 'val')) == 3  # the other splits are none the worse


def test_empty_split(tmp_path):
    for kind in ('img', 'mask', 'dense', 'anno'):
        (tmp_path / 'train' / kind).mkdir(parents=True)
    with pytest.raises(UserError, match='train holds no samples'):
        InterHandDataset(tmp_path, 'train')


@pytest.mark.parametrize('kind', ['img', 'mask', 'dense'])
@pytest.mark.parametrize(
    'content, message',
    [
        (b'', 'is missing or not a readable image'),
        (b'not a picture', 'is missing or not a readable image'),
        (None, 'is missing or not a readable image'),
        (cv2.imencode('.jpg', np.zeros((200, 256, 3), np.uint8))[1].tobytes(), 'is 256 x 200 pixels'),
        (cv2.imencode('.jpg', np.zeros((512, 512, 3), np.uint8))[1].tobytes(), 'is 512 x 512 pixels'),
    ],
)
def test_bad_picture(spoilt, kind, content, message):
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
def test_bad_annotation(spoilt, change, message):
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


def test_a_loader_process_reports_bad_input_in_one_sentence_too(spoilt, capsys):
    (spoilt / 'val/img/1.jpg').write_bytes(b'')

    batches = evaluation_loader(InterHandDataset(spoilt, 'val'), config(spoilt, **{'TRAIN.WORKERS': 1}))

    @user_facing
    def main():
        list(batches)

    assert main() == 2
    batches._iterator._shutdown_workers()  # left to the garbage collector it takes five seconds
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith('error: ')] == lines[-1:]
    assert lines[-1].startswith(f'error: {spoilt}/val/img/1.jpg is missing or not a readable image')


# Order.


def indices(sampler, epoch, step=0):
    sampler.start_at(epoch, step)
    keys = list(sampler)
    assert len(keys) == len(sampler) and all(e == epoch for _, e in keys)
    return [index for index, _ in keys]


@pytest.mark.parametrize('length, batch_size', [(8, 2), (10, 4), (7, 7), (9, 1)])
def test_an_epoch_holds_every_sample_at_most_once_in_an_order_of_its_own(length, batch_size):
    sampler = EpochSampler(length, batch_size=batch_size, seed=3)
    assert sampler.steps == length // batch_size
    epochs = [indices(sampler, epoch) for epoch in range(20)]
    for order in epochs:
        assert len(order) == sampler.steps * batch_size == len(set(order)) and set(order) <= set(range(length))
    assert len(set(map(tuple, epochs))) > 15
    assert set().union(*epochs) == set(range(length))  # what one epoch leaves out comes in another
    again = EpochSampler(length, batch_size=batch_size, seed=3)
    assert [indices(again, epoch) for epoch in range(20)] == epochs
    assert [indices(EpochSampler(length, batch_size=batch_size, seed=4), epoch) for epoch in range(20)] != epochs


@pytest.mark.parametrize('step', [0, 1, 3, 5])
def test_resuming_gives_the_rest_of_the_epoch(step):
    sampler = EpochSampler(22, batch_size=4, seed=0)
    whole = indices(sampler, 7)
    assert indices(sampler, 7, step) == whole[4 * step :]
    assert indices(EpochSampler(22, batch_size=4, seed=0), 7, step) == whole[4 * step :]
    assert indices(sampler, 8) != whole and len(indices(sampler, 8)) == 20  # the next epoch is whole again


@pytest.mark.parametrize('world', [1, 2, 4])
def test_processes_share_the_same_batches(world, monkeypatch):
    alone = indices(EpochSampler(22, batch_size=4, seed=0), 2, 1)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(loader, 'rank_and_world', lambda rank=rank: (rank, world))
        shares.append(np.reshape(indices(EpochSampler(22, batch_size=4, seed=0), 2, 1), (4, 4 // world)))
    np.testing.assert_array_equal(np.concatenate(shares, 1).ravel(), alone)


# Loaders.


def test_collating_gives_a_sample_of_batched_tensors(tiny_prepared):
    dataset = InterHandDataset(tiny_prepared, 'train')
    batch = default_collate([dataset[4], dataset[2], dataset[7]])
    assert type(batch) is Sample and type(batch.augmentation) is AugmentationParameters
    assert batch.index.tolist() == [4, 2, 7]
    for together, alone in zip((*batch[:-1], *batch.augmentation), (*dataset[2][:-1], *dataset[2].augmentation)):
        assert torch.equal(together[1], alone)


def test_training_loader_gives_the_samplers_batches_augmented(tiny_prepared):
    batches, sampler = training_loader(config(tiny_prepared, SEED=5))
    sampler.start_at(2, 1)
    found = list(batches)
    assert len(found) == len(batches) == 3
    assert torch.cat([batch.index for batch in found]).tolist() == [index for index, _ in sampler]
    assert all((batch.augmentation.angle != 0).all() and batch.dense.shape == (2, 256, 256, 3) for batch in found)
    alone = batches.dataset[found[0].index[1].item(), 2]
    assert torch.equal(found[0].augmentation.angle[1], alone.augmentation.angle)


def test_a_resumed_loader_gives_what_the_first_would_have(tiny_prepared):
    def load(epoch, step, workers):
        batches, sampler = training_loader(config(tiny_prepared, **{'TRAIN.WORKERS': workers}))
        sampler.start_at(epoch, step)
        return list(batches)

    for first, second in zip(load(1, 0, 0)[2:], load(1, 2, 1), strict=True):
        for a, b in zip((*first[:-1], *first.augmentation), (*second[:-1], *second.augmentation)):
            assert torch.equal(a, b)


def test_training_loader_reads_dense_pictures_only_if_they_count(tiny_prepared):
    batches, _ = training_loader(config(tiny_prepared, **{'LOSS.WEIGHT.DENSE': 0.0}))
    assert next(iter(batches)).dense is None


@pytest.mark.parametrize(
    'world, batch_size, message',
    [
        (1, 9, r'train holds 8 samples, fewer than TRAIN\.BATCH_SIZE 9: set it to 8 or less'),
        (2, 3, r'TRAIN\.BATCH_SIZE 3 is over all processes and cannot be split over 2'),
    ],
)
def test_batches_that_cannot_be_made(tiny_prepared, monkeypatch, world, batch_size, message):
    monkeypatch.setattr(loader, 'rank_and_world', lambda: (0, world))
    with pytest.raises(UserError, match=message):
        training_loader(config(tiny_prepared, **{'TRAIN.BATCH_SIZE': batch_size}))


def test_two_processes_load_half_a_batch_each(tiny_prepared, monkeypatch):
    whole, _ = training_loader(config(tiny_prepared, **{'TRAIN.BATCH_SIZE': 4}))
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(loader, 'rank_and_world', lambda rank=rank: (rank, 2))
        shares.append(training_loader(config(tiny_prepared, **{'TRAIN.BATCH_SIZE': 4}))[0])
    for together, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(torch.cat([part.index for part in parts]), together.index)
        angles = torch.cat([part.augmentation.angle for part in parts])
        assert torch.equal(angles, together.augmentation.angle)


def test_a_loader_process_starts_although_its_parent_has_used_opencvs_threads():
    before = cv2.getNumThreads()
    cv2.setNumThreads(2)
    try:
        cv2.resize(np.ones((1500, 1500), np.float32), (300, 300))
        time.sleep(0.2)  # they fall asleep
        process = get_context('fork').Process(target=loader._worker_setup, args=(0,))
        process.start()
        process.join(20)
        process.kill()
        assert process.exitcode == 0
    finally:
        cv2.setNumThreads(before)


def test_evaluation_leaves_nothing_out_and_augments_nothing(tiny_prepared):
    dataset = InterHandDataset(tiny_prepared, 'val', with_dense=False)
    batches = list(evaluation_loader(dataset, config(tiny_prepared)))
    assert [batch.index.tolist() for batch in batches] == [[0, 1], [2]]
    for batch in batches:
        assert not batch.augmentation.flip.any() and (batch.augmentation.angle == 0).all()
        assert (batch.augmentation.gain == 1).all() and (batch.augmentation.noise == 0).all()
        assert batch.dense is None


def test_processes_share_an_evaluation_out(tiny_prepared, monkeypatch):
    dataset, shares = InterHandDataset(tiny_prepared, 'test', with_dense=False), []
    for rank in range(2):
        monkeypatch.setattr(loader, 'rank_and_world', lambda rank=rank: (rank, 2))
        shares.append([i for batch in evaluation_loader(dataset, config(tiny_prepared)) for i in batch.index.tolist()])
    assert shares == [[0, 2, 4], [1, 3]]


def test_a_cut_picture_is_noticed_and_numbers_beyond_the_end_are_no_samples(spoilt):
    dataset, path = InterHandDataset(spoilt, 'train'), spoilt / 'train/img/2.jpg'
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=r'train/img/2\.jpg'):
        dataset[2]
    for index in (8, -1):
        with pytest.raises(IndexError):
            dataset[index]
