"""Several data sets in one training: order, weights, figures of each set, refusals."""

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from prepared_tree import write_prepared
from tiny import TRAINING

import train
from dataset import loader, mixture, open_split, pack
from dataset.hand_model_record import write_hand_model_record
from dataset.loader import EpochSampler, evaluation_split, training_loader
from dataset.mixture import MixedSplit, WeightedOrder, sample_ranges
from dataset.prepared import PreparedSplit
from utils.config import load_config
from utils.errors import UserError


@pytest.fixture(scope='module')
def sets(tiny_prepared, tmp_path_factory) -> list[Path]:
    """A prepared set of 8, 3 and 5 samples, and a packed one of 3 train and 2 val samples."""
    root = tmp_path_factory.mktemp('second')
    for seed, (split, count) in enumerate((('train', 3), ('val', 2)), 10):
        write_prepared(root / 'files', split, count, seed=seed)
    packing = ['--data_path', str(root / 'files'), '--save_path', str(root / 'packed'), '--workers', '1']
    assert pack.main([*packing, '--splits', 'train', 'val']) == 0
    return [tiny_prepared, root / 'packed']


def config(folders, **overrides):
    pairs = {'DATASET.PATH': f'[{", ".join(map(str, folders))}]', 'TRAIN.BATCH_SIZE': 2, 'TRAIN.WORKERS': 0} | overrides
    return load_config(overrides=[str(x) for pair in pairs.items() for x in pair])


# The configuration.


def test_a_list_is_written_as_text_or_yaml_and_one_folder_is_no_list(tmp_path):
    (tmp_path / 'sets.yaml').write_text('DATASET:\n  PATH: [a, 2024]\n  WEIGHTS: [3, 1]\n')
    from_yaml = load_config(tmp_path / 'sets.yaml')
    assert from_yaml.DATASET.PATH == ['a', '2024'] and from_yaml.DATASET.WEIGHTS == [3.0, 1.0]
    for text in ('[a, 2024]', "['a', '2024']", '["a","2024"]'):
        assert load_config(overrides=['DATASET.PATH', text]).DATASET.PATH == ['a', '2024']
    assert load_config(overrides=['DATASET.PATH', '[a]']).DATASET.PATH == 'a'
    assert load_config(base={'DATASET': {'PATH': ['a', 'b']}}).DATASET.PATH == ['a', 'b']


@pytest.mark.parametrize(
    'words, message',
    [
        (['DATASET.PATH', '[]'], 'DATASET.PATH is an empty list'),
        (['DATASET.PATH', '[a, [b]]'], 'DATASET.PATH must be a name or a list of names'),
        (['DATASET.PATH', '[a, b]', 'DATASET.WEIGHTS', '[1]'], 'DATASET.WEIGHTS has 1 entries for 2 sets'),
        (['DATASET.PATH', 'a', 'DATASET.WEIGHTS', '[1, 2]'], 'DATASET.WEIGHTS has 2 entries for 1 sets'),
        (['DATASET.PATH', '[a, b]', 'DATASET.WEIGHTS', '[1, 0]'], 'must be above 0'),
        (['DATASET.PATH', '[a, b]', 'DATASET.WEIGHTS', '[1, -2]'], 'must be above 0'),
        (['DATASET.PATH', '[a, b]', 'DATASET.WEIGHTS', '[x, y]'], 'DATASET.WEIGHTS must be a list'),
    ],
)
def test_invalid_lists_and_weights(words, message):
    with pytest.raises(UserError, match=message):
        load_config(overrides=words)


# The split.


def test_a_mixture_holds_the_samples_of_its_sets_in_order(sets):
    whole = open_split([str(folder) for folder in sets], 'train')
    first, second = (open_split(folder, 'train') for folder in sets)
    assert isinstance(whole, MixedSplit) and len(whole) == 11
    assert sample_ranges(whole) == {str(sets[0]): range(8), str(sets[1]): range(8, 11)} and sample_ranges(first) == {}
    for index in range(11):
        part, own = (first, index) if index < 8 else (second, index - 8)
        ours, theirs = whole[index], part[own]
        for name in ('image', 'mask', 'dense', 'pose', 'intrinsics'):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        assert ours.index == index and whole.entries(index) == part.entries(own) and whole.name(index) == part.name(own)
    assert [whole.siblings(index) for index in (0, 7, 8, 10)] == [range(8)] * 2 + [range(8, 11)] * 2
    assert whole.folder.name == 'train' and all(str(folder) in str(whole.folder) for folder in sets)
    with pytest.raises(IndexError):
        whole[11]


def test_a_damaged_sample_is_reported_with_its_set(sets, tmp_path):
    shutil.copytree(sets[0], tmp_path / 'damaged')
    (tmp_path / 'damaged/train/img/2.jpg').write_bytes(b'')
    whole = open_split([str(sets[1]), str(tmp_path / 'damaged')], 'train')
    with pytest.raises(UserError, match=f'{tmp_path}/damaged/train/img/2.jpg'):
        whole.image('img', 3 + 2)
    assert whole.name(3 + 2) == f'{tmp_path}/damaged/train/img/2.jpg'


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda folders, tmp: [*folders, folders[0]], 'names .* twice'),
        (lambda folders, tmp: [folders[0], f'{folders[0]}/../{folders[0].name}'], 'twice, once as'),
        (lambda folders, tmp: [*folders, tmp / 'nowhere'], 'nowhere/train does not exist'),
        (lambda folders, tmp: [*folders, only_val(folders[0], tmp)], 'only_val/train does not exist'),
    ],
    ids=['twice', 'twice by another path', 'missing', 'without train'],
)
def test_unusable_sets_are_refused(sets, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        training_loader(config(change(sets, tmp_path)))


def only_val(source, tmp_path):
    shutil.copytree(source / 'val', tmp_path / 'only_val' / 'val')
    return tmp_path / 'only_val'


def test_every_sets_hand_model_is_checked(sets, standin, tmp_path):
    shutil.copytree(sets[0], tmp_path / 'own')
    write_hand_model_record(tmp_path / 'own', standin)
    folders = [str(sets[1]), str(tmp_path / 'own')]
    mixture.check_hand_model_records(folders, standin)
    (tmp_path / 'own/hand_model.json').write_text('{"hand_model": "mano:other"}')
    with pytest.raises(UserError, match='own was generated with the hand model mano:other'):
        mixture.check_hand_model_records(folders, standin)


def test_evaluation_uses_the_sets_that_hold_the_split(sets):
    assert len(evaluation_split(config(sets), 'val')) == 5
    alone = evaluation_split(config(sets), 'test')  # the packed set has none
    assert not isinstance(alone, MixedSplit) and len(alone) == 5
    with pytest.raises(UserError, match='does not exist'):
        evaluation_split(config([sets[1], f'{sets[1]}/../packed2']), 'test')


@pytest.mark.parametrize('name', ['test.partial', 'test.shard-1-of-2'])
def test_a_set_whose_split_is_unfinished_is_not_passed_over(sets, tmp_path, name):
    for split in ('train', 'val'):
        shutil.copytree(sets[1] / split, tmp_path / split)
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match='only partly|prepared in shards'):
        evaluation_split(config([sets[0], tmp_path]), 'test')


# The order.


class Numbered(PreparedSplit):
    """A split that has a length only."""

    def __init__(self, name: str, length: int):
        super().__init__(Path(name) / 'train', length)


def mixed(*lengths: int) -> MixedSplit:
    return MixedSplit([Numbered(f'set{number}', length) for number, length in enumerate(lengths)])


def test_without_weights_every_sample_is_drawn_once(sets):
    _, sampler = training_loader(config(sets, **{'TRAIN.BATCH_SIZE': 1}))
    sampler.start_at(3)
    draws = list(sampler)
    assert sorted(index for index, _ in draws) == list(range(11)) and {key for _, key in draws} == {3}


@pytest.mark.parametrize('weights', [[3.0, 1.0], [1.0, 1.0], [0.1, 0.7], [1.0, 5000.0]])
def test_an_epoch_is_as_long_as_all_sets_and_shared_by_weight(weights):
    whole, (a, b) = mixed(1000, 6000), weights
    order = WeightedOrder(whole, weights, seed=1)
    for epoch in (0, 1, 5):
        draws = order(epoch)
        first = sum(index < 1000 for index, _ in draws)
        assert len(draws) == 7000 and first == pytest.approx(7000 * a / (a + b), abs=1)
        assert len(set(draws)) == 7000  # a sample drawn twice has another augmentation


def test_a_set_repeats_only_when_it_is_exhausted_over_the_ends_of_epochs_too():
    order = WeightedOrder(mixed(10, 50), [1.0, 2.0], seed=4)  # 20 and 40 of an epoch's 60
    seen = [draw for epoch in range(5) for draw in order(epoch)]
    small = Counter(index for index, _ in seen if index < 10)
    assert set(small.values()) == {10}  # 100 draws
    large = [Counter(index for index, key in seen if index >= 10 and key == number) for number in range(4)]
    assert all(set(counter.values()) == {1} and len(counter) == 50 for counter in large)
    assert sorted(key for _, key in order(1) if _ < 10) == [2] * 10 + [3] * 10


def test_the_order_follows_from_seed_and_epoch():
    order, again, other = (WeightedOrder(mixed(30, 20), [1.0, 3.0], seed=seed) for seed in (0, 0, 1))
    assert again(7) == order(7) and order(7) != order(8) and other(7) != order(7)
    assert Counter(order(7)) != Counter(order(8))
    places = [place for place, (index, _) in enumerate(order(0)) if index < 30]
    assert 15 < np.mean(places) < 35  # the sets are mixed, not one after the other


def test_a_weight_too_small_for_one_sample_is_refused():
    with pytest.raises(UserError, match=r'DATASET.WEIGHTS 0.001 of set1 is less than one of the 50 samples'):
        WeightedOrder(mixed(30, 20), [1.0, 0.001], seed=0)


@pytest.mark.parametrize('world', [1, 2, 4])
def test_weighted_batches_resume_and_do_not_depend_on_the_number_of_processes(world, monkeypatch):
    def sampler():
        whole = mixed(30, 20)
        return EpochSampler(50, batch_size=8, seed=0, order=WeightedOrder(whole, [1.0, 3.0], seed=0))

    alone = sampler()
    alone.start_at(2)
    complete = list(alone)
    alone.start_at(2, 4)
    assert list(alone) == complete[32:] and len(complete) == 48
    shares = []
    for rank in range(world):
        monkeypatch.setattr(loader, 'rank_and_world', lambda rank=rank: (rank, world))
        one = sampler()
        one.start_at(2)
        shares.append(np.reshape(list(one), (6, 8 // world, 2)))
    np.testing.assert_array_equal(np.concatenate(shares, 1).reshape(-1, 2), complete)


def test_repeated_samples_are_augmented_differently(sets):
    batches, _ = training_loader(config(sets, **{'DATASET.WEIGHTS': '[1, 9]', 'TRAIN.BATCH_SIZE': 11}))
    (batch,) = batches
    drawn = Counter(batch.index.tolist())
    index = max(drawn, key=lambda number: drawn[number])
    assert index >= 8 and drawn[index] >= 3
    angles = batch.augmentation.angle[batch.index == index]
    assert len(set(angles.tolist())) == drawn[index]


# Training.


@pytest.mark.slow
def test_training_on_two_sets_resumes_exactly_and_reports_each(sets, tmp_path, capsys):
    """Slow: three trainings."""
    # fmt: off
    words = [
        *TRAINING, 'MODEL.STAGES', '0', 'TRAIN.BATCH_SIZE', '5', 'TRAIN.EPOCHS', '2', 'TRAIN.PICTURES', '0',
        'TRAIN.SAVE_EVERY', '1', 'TRAIN.VALIDATE_EVERY', '1', 'DATASET.PATH', f'[{sets[0]}, {sets[1]}]',
        'DATASET.WEIGHTS', '[1, 2]',
    ]
    # fmt: on
    whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
    assert train.main([*words, 'OUTPUT_DIR', str(whole)]) == 0
    printed = capsys.readouterr()
    assert all(f'{folder}: joint ' in printed.out + printed.err for folder in sets)
    records = [json.loads(line) for line in (whole / 'log.jsonl').read_text().splitlines()]
    last = {record['kind']: record for record in records}
    assert [last[f'val_set{number}']['set'] for number in (0, 1)] == [str(folder) for folder in sets]
    assert [last[f'val_set{number}']['frames'] for number in (0, 1)] == [3, 2]
    together = (3 * last['val_set0']['joint_mm_all'] + 2 * last['val_set1']['joint_mm_all']) / 5
    assert last['val_stage0']['joint_mm_all'] == pytest.approx(together)

    steps, train_step = itertools.count(1), train.train_step

    def third_step_fails(*args, **options):
        if next(steps) == 3:
            raise UserError('Enough.')
        return train_step(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'train_step', third_step_fails)
        assert train.main([*words, 'OUTPUT_DIR', str(stopped)]) == 2
    assert train.main([*words, 'OUTPUT_DIR', str(stopped), '--resume']) == 0
    first, second = (torch.load(folder / 'latest.pth', weights_only=True)['model'] for folder in (whole, stopped))
    assert all(torch.equal(first[key], second[key]) for key in first)
