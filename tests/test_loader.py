import shutil
import time
from multiprocessing import get_context

import cv2
import numpy as np
import pytest
import torch

from dataset import loader
from dataset.loader import EpochSampler, evaluation_loader, training_loader
from dataset.prepared import InterHandDataset
from utils.config import load_config
from utils.distributed import use_one_thread
from utils.errors import UserError, user_facing


def config(root, **overrides):
    pairs = {'DATASET.PATH': root, 'TRAIN.BATCH_SIZE': 2, 'TRAIN.WORKERS': 0, 'EVAL.BATCH_SIZE': 2} | overrides
    return load_config(overrides=[str(x) for pair in pairs.items() for x in pair])


# Order.


def indices(sampler, epoch, step=0):
    sampler.start_at(epoch, step)
    keys = list(sampler)
    assert len(keys) == len(sampler) and all(e == epoch for _, e in keys)
    return [index for index, _ in keys]


@pytest.mark.parametrize('length, batch_size', [(8, 2), (10, 4), (7, 7), (9, 1)])
def test_each_epoch_has_its_own_order_without_repetitions(length, batch_size):
    sampler = EpochSampler(length, batch_size=batch_size, seed=3)
    assert sampler.steps == length // batch_size
    epochs = [indices(sampler, epoch) for epoch in range(20)]
    for order in epochs:
        assert len(order) == sampler.steps * batch_size == len(set(order)) and set(order) <= set(range(length))
    assert len(set(map(tuple, epochs))) > 15
    assert set().union(*epochs) == set(range(length))  # what one epoch drops is in another
    again = EpochSampler(length, batch_size=batch_size, seed=3)
    assert [indices(again, epoch) for epoch in range(20)] == epochs
    assert [indices(EpochSampler(length, batch_size=batch_size, seed=4), epoch) for epoch in range(20)] != epochs


@pytest.mark.parametrize('step', [0, 1, 3, 5])
def test_resuming_yields_the_rest_of_the_epoch(step):
    sampler = EpochSampler(22, batch_size=4, seed=0)
    whole = indices(sampler, 7)
    assert indices(sampler, 7, step) == whole[4 * step :]
    assert indices(EpochSampler(22, batch_size=4, seed=0), 7, step) == whole[4 * step :]
    assert indices(sampler, 8) != whole and len(indices(sampler, 8)) == 20  # the next epoch is complete again


@pytest.mark.parametrize('world', [1, 2, 4])
def test_processes_share_the_same_batches(world, monkeypatch):
    alone = indices(EpochSampler(22, batch_size=4, seed=0), 2, 1)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(loader, 'rank_and_world', lambda rank=rank: (rank, world))
        shares.append(np.reshape(indices(EpochSampler(22, batch_size=4, seed=0), 2, 1), (4, 4 // world)))
    np.testing.assert_array_equal(np.concatenate(shares, 1).ravel(), alone)


# Loaders.


def test_training_loader_yields_the_augmented_batches_of_its_sampler(tiny_prepared):
    batches, sampler = training_loader(config(tiny_prepared, SEED=5))
    sampler.start_at(2, 1)
    found = list(batches)
    assert len(found) == len(batches) == 3
    assert torch.cat([batch.index for batch in found]).tolist() == [index for index, _ in sampler]
    assert all((batch.augmentation.angle != 0).all() and batch.dense.shape == (2, 256, 256, 3) for batch in found)
    alone = batches.dataset[found[0].index[1].item(), 2]
    assert torch.equal(found[0].augmentation.angle[1], alone.augmentation.angle)


def tensors_of(batch):
    return [*(value for value in batch if isinstance(value, torch.Tensor)), *batch.augmentation]


def test_a_resumed_loader_yields_the_same_batches(tiny_prepared):
    def load(epoch, step, workers):
        batches, sampler = training_loader(config(tiny_prepared, **{'TRAIN.WORKERS': workers}))
        sampler.start_at(epoch, step)
        return list(batches)

    for first, second in zip(load(1, 0, 0)[2:], load(1, 2, 1), strict=True):
        for a, b in zip(tensors_of(first), tensors_of(second), strict=True):
            assert torch.equal(a, b)


def test_training_loader_reads_dense_maps_only_if_they_are_learned(tiny_prepared):
    batches, _ = training_loader(config(tiny_prepared, **{'LOSS.WEIGHT.DENSE': 0.0}))
    assert next(iter(batches)).dense is None


@pytest.mark.parametrize(
    'world, batch_size, message',
    [
        (1, 9, r'train holds 8 samples, fewer than TRAIN\.BATCH_SIZE 9: set it to 8 or less'),
        (2, 3, r'TRAIN\.BATCH_SIZE 3 is over all processes and cannot be split over 2'),
    ],
)
def test_invalid_batch_sizes(tiny_prepared, monkeypatch, world, batch_size, message):
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


def test_a_loader_process_starts_after_its_parent_has_used_opencv_threads():
    before = cv2.getNumThreads()
    cv2.setNumThreads(2)
    try:
        cv2.resize(np.ones((1500, 1500), np.float32), (300, 300))
        time.sleep(0.2)  # until they sleep
        process = get_context('fork').Process(target=use_one_thread)
        process.start()
        process.join(60)
        process.kill()
        assert process.exitcode == 0
    finally:
        cv2.setNumThreads(before)


def test_evaluation_reads_every_sample_without_augmentation(tiny_prepared):
    dataset = InterHandDataset(tiny_prepared, 'val', with_dense=False)
    batches = list(evaluation_loader(dataset, config(tiny_prepared)))
    assert [batch.index.tolist() for batch in batches] == [[0, 1], [2]]
    for batch in batches:
        assert not batch.augmentation.flip.any() and (batch.augmentation.angle == 0).all()
        assert (batch.augmentation.gain == 1).all() and (batch.augmentation.noise == 0).all()
        assert batch.dense is None


def test_processes_split_an_evaluation(tiny_prepared, monkeypatch):
    dataset, shares = InterHandDataset(tiny_prepared, 'test', with_dense=False), []
    for rank in range(2):
        monkeypatch.setattr(loader, 'rank_and_world', lambda rank=rank: (rank, 2))
        shares.append([i for batch in evaluation_loader(dataset, config(tiny_prepared)) for i in batch.index.tolist()])
    assert shares == [[0, 2, 4], [1, 3]]


def test_a_loader_process_reports_invalid_input_in_one_sentence(tiny_prepared, tmp_path, capsys):
    shutil.copytree(tiny_prepared / 'val', tmp_path / 'val')
    (tmp_path / 'val/img/1.jpg').write_bytes(b'')

    batches = evaluation_loader(InterHandDataset(tmp_path, 'val'), config(tmp_path, **{'TRAIN.WORKERS': 1}))

    @user_facing
    def main():
        list(batches)

    assert main() == 2
    batches._iterator._shutdown_workers()  # the garbage collector would take five seconds
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith('error: ')] == lines[-1:]
    assert lines[-1].startswith(f'error: {tmp_path}/val/img/1.jpg is empty')
