"""Damaged samples in training and evaluation: retried, replaced or left out, counted, and refused past the limit."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from prepared_tree import write_prepared
from tiny import TRAINING

import train
from dataset import damage, open_split
from dataset.augmentation import AugmentationRanges
from dataset.damage import (
    Damage,
    DamageError,
    DamageRecord,
    TooMuchDamageError,
    joint_folder,
    read_patiently,
    read_quarantine,
    refuse_damage,
    replacement,
    set_folders_of,
    tolerated,
)
from dataset.loader import evaluation_loader, evaluation_split, training_loader
from dataset.prepare import pack
from dataset.prepared import InterHandDataset
from dataset.subsets import choose
from utils.config import load_config

RANGES = AugmentationRanges(180.0, 0.1, 10.0, 0.5, 0.3, 0.3, 0.05, 0.01)


@pytest.fixture
def data(tiny_prepared, tmp_path):
    """A copy of the data set that a test may damage."""
    shutil.copytree(tiny_prepared, tmp_path / 'data')
    return tmp_path / 'data'


def hole(path):
    """Zero bytes in the middle, as a parallel download leaves them."""
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-500])


def resize(path):
    path.write_bytes(cv2.imencode('.jpg', np.zeros((200, 256, 3), np.uint8))[1].tobytes())


def not_finite(path):
    content = path.read_bytes()
    value = InterHandDataset(path.parents[2], path.parents[1].name).labels(int(path.stem))[1][0, 0]
    assert content.count(value.tobytes()) == 1
    path.write_bytes(content.replace(value.tobytes(), np.float32('inf').tobytes()))


KINDS = [
    ('img', lambda path: path.unlink(), damage.MISSING),
    ('img', hole, damage.BAD_IMAGE),
    ('mask', truncate, damage.BAD_IMAGE),
    ('dense', lambda path: path.write_bytes(b''), damage.BAD_IMAGE),
    ('img', resize, damage.WRONG_SIZE),
    ('anno', not_finite, damage.BAD_LABELS),
    ('anno', truncate, damage.BAD_ANNOTATION),
    ('anno', lambda path: path.unlink(), damage.MISSING),
    ('anno', lambda path: (path.unlink(), path.mkdir()), damage.UNREADABLE),
]


def spoil(root, split, kind, index, how):
    how(root / split / kind / f'{index}.{"pkl" if kind == "anno" else "jpg"}')


@pytest.mark.parametrize('kind, how, reason', KINDS)
def test_every_kind_of_damage_is_replaced_counted_and_left_out(data, kind, how, reason):
    splits = {mode: open_split(data, 'train', on_damage=mode) for mode in ('raise', 'replace', 'leave out')}
    spoil(data, 'train', kind, 2, how)
    with pytest.raises(DamageError, match=f'train/{kind}/2') as error:
        splits['raise'].__getitems__([1, 2])
    assert error.value.reason == reason
    replaced, rest = (splits[mode].__getitems__([1, 2, 3]) for mode in ('replace', 'leave out'))
    assert rest.index.tolist() == [1, 3] and len(rest.image) == len(rest.pose) == len(rest.augmentation.angle) == 2
    assert replaced.index[[0, 2]].tolist() == [1, 3] and replaced.index[1] != 2 and len(replaced.image) == 3
    alone = splits['raise'][replaced.index[1].item()]
    assert torch.equal(replaced.image[1], alone.image) and torch.equal(replaced.pose[1], alone.pose)
    for found in (replaced.damage, rest.damage):
        (one,) = found
        assert (one.sample, one.reason) == (2, reason) and one.file.endswith('train/img/2.jpg')
    assert splits['leave out'].__getitems__([2]).index.shape == (0,)


def test_replacements_depend_on_seed_epoch_and_index_alone(data):
    for index in (0, 5, 6):
        spoil(data, 'train', 'img', index, truncate)

    def read(keys, seed=0):
        return open_split(data, 'train', ranges=RANGES, seed=seed, on_damage='replace').__getitems__(keys)

    whole = read([(index, 3) for index in range(8)])
    assert not {0, 5, 6} & set(whole.index.tolist())
    for index in range(8):
        alone = read([(index, 3)])
        assert alone.index[0] == whole.index[index] and torch.equal(alone.image[0], whole.image[index])
        assert torch.equal(alone.augmentation.angle[0], whole.augmentation.angle[index])
    by_epoch = [read([(0, epoch)]).index.item() for epoch in range(20)]
    assert len(set(by_epoch)) > 2 and by_epoch != [read([(0, epoch)], seed=1).index.item() for epoch in range(20)]


def test_replacements_are_spread_over_the_set():
    chosen = [replacement(range(100, 200), seed=0, epoch=0, index=index, attempt=0) for index in range(1000)]
    assert min(chosen) >= 100 and max(chosen) < 200 and len(set(chosen)) == 100
    tries = [replacement(range(10**6), seed=0, epoch=0, index=5, attempt=attempt) for attempt in range(50)]
    assert len(set(tries)) == 50


def test_search_for_a_replacement_ends(data):
    dataset = open_split(data, 'val', on_damage='replace')
    for index in range(3):
        spoil(data, 'val', 'img', index, truncate)
    with pytest.raises(Exception, match=r'val/img/1\.jpg is damaged, and no readable sample was found') as error:
        dataset[1]
    assert not isinstance(error.value, DamageError)


def test_packed_damage_is_replaced(tiny_prepared, tmp_path):
    assert pack.main(['--data_path', str(tiny_prepared), '--save_path', str(tmp_path), '--workers', '1']) == 0
    folder = tmp_path / 'train'
    clean = open_split(tmp_path, 'train', on_damage='replace')
    begin = int(clean.record(4)['begin'])
    with open(folder / 'samples.bin', 'r+b') as file:
        file.seek(begin + 800)
        file.write(bytes(1500))
    records = np.load(folder / 'labels.npy', mmap_mode='r+')
    records[1]['pose'][0, 3] = np.nan
    records[2]['begin'] = 10**15  # out of range
    records[3]['mask_bytes'] = 2**32 - 1
    records.flush()
    batch = open_split(tmp_path, 'train', on_damage='replace').__getitems__(list(range(8)))
    reasons = {one.sample: one.reason for one in batch.damage}
    assert reasons == {1: damage.BAD_LABELS, 2: damage.BAD_ANNOTATION, 3: damage.BAD_ANNOTATION, 4: damage.BAD_IMAGE}
    assert set(batch.index.tolist()) <= {0, 5, 6, 7}
    os.truncate(folder / 'samples.bin', 100)  # while it is open
    with pytest.raises(Exception, match='no readable sample was found'):
        clean[0]


# Errors of disks and networks.


def failing(monkeypatch, number, times):
    """``times`` errors ``number``, without pauses."""
    monkeypatch.setattr(damage.time, 'sleep', lambda seconds: None)
    calls = []

    def read():
        calls.append(1)
        if len(calls) <= times:
            raise OSError(number, os.strerror(number), 'file')
        return len(calls)

    return read


@pytest.mark.parametrize('number', [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_passing_errors_are_retried(monkeypatch, number):
    assert read_patiently(failing(monkeypatch, number, 3), 'x') == 4
    with pytest.raises(DamageError, match='file cannot be read') as error:
        read_patiently(failing(monkeypatch, number, 4), 'x')
    assert error.value.reason == damage.UNREADABLE


def test_other_errors_are_not_retried(monkeypatch):
    with pytest.raises(DamageError, match=r'cannot be read \(Permission denied\)'):
        read_patiently(failing(monkeypatch, errno.EACCES, 1), 'x')
    with pytest.raises(OSError, match='Too many open files'):  # not the sample's fault
        read_patiently(failing(monkeypatch, errno.EMFILE, 1), 'x')


@pytest.mark.parametrize('form', ['prepared', 'packed'])
def test_a_stale_file_is_opened_again(tiny_prepared, tmp_path, monkeypatch, form):
    root = tiny_prepared
    if form == 'packed':
        root = tmp_path
        assert pack.main(['--data_path', str(tiny_prepared), '--save_path', str(root), '--workers', '1']) == 0
    expected = open_split(root, 'val')[1]
    failures = [errno.ESTALE, errno.EIO]
    monkeypatch.setattr(damage.time, 'sleep', lambda seconds: None)
    if form == 'packed':
        real = os.pread

        def pread(*arguments):
            if failures:
                raise OSError(failures.pop(), 'failed')
            return real(*arguments)

        monkeypatch.setattr(os, 'pread', pread)
    else:
        real_read = InterHandDataset.image

        def image(self, *arguments):
            if failures:
                raise OSError(failures.pop(), 'failed')
            return real_read(self, *arguments)

        monkeypatch.setattr(InterHandDataset, 'image', image)
    found = open_split(root, 'val', on_damage='replace')[1]
    assert not failures and found.damage == () and torch.equal(found.image, expected.image)


# The limit, and the record of a run.


@pytest.mark.parametrize('share, samples, most', [(0.0, 10**6, 0), (0.001, 8, 1), (0.001, 400_001, 401), (1.0, 7, 7)])
def test_limit(share, samples, most):
    assert tolerated(share, samples) == most


def one(sample):
    return damage.Damage(sample, f'img/{sample}.jpg', damage.BAD_IMAGE, f'img/{sample}.jpg is damaged.')


def record_of(path, *, step=0, share=0.02, readable=(), log=None):
    split = SimpleNamespace(folder=path.parent / 'train', is_readable=lambda index: index in readable)
    dataset = type('Split', (), {'__len__': lambda self: 100, **vars(split)})()
    dataset.is_readable = split.is_readable
    return DamageRecord(dataset, path, step=step, share=share, log=log)


def test_record_lists_each_sample_once_and_refuses_too_many(tmp_path):
    path, lines = tmp_path / 'damaged.json', []
    record = record_of(path, log=lambda kind, step, **values: lines.append((kind, step, values)))
    record.note([], step=1, epoch=0)
    assert not path.exists()
    record.note([one(7)], step=2, epoch=0)
    record.note([one(3), one(7)], step=4, epoch=1)
    assert [(kind, step, values['sample']) for kind, step, values in lines] == [('damage', 2, '7'), ('damage', 4, '3')]
    content = json.loads(path.read_text())
    assert [entry['sample'] for entry in content['damaged']] == [7, 3] and content['tolerated'] == 2
    with pytest.raises(TooMuchDamageError, match=r'At least 3 of 100 .*TOLERATED_DAMAGE allows 2\. The first: img/7'):
        record.note([one(50)], step=5, epoch=1)


def test_resumed_record_is_as_it_was_at_that_step(tmp_path):
    path = tmp_path / 'damaged.json'
    record = record_of(path, share=0.5, log=lambda *_, **__: None)
    for step in (2, 4, 6):
        record.note([one(step)], step=step, epoch=0)
    assert [entry.sample for entry in record_of(path, step=5, share=0.5).found] == [2, 4]
    repaired = record_of(path, step=5, share=0.5, readable={2}, log=lambda *_, **__: None)
    assert [entry.sample for entry in repaired.found] == [4]
    with pytest.raises(TooMuchDamageError):
        record_of(path, step=4, share=0.0)
    fresh = record_of(path, log=lambda *_, **__: None)
    assert fresh.found == [] and json.loads(path.read_text())['damaged'] == []
    path.write_text('{"damaged": [{}]}')
    with pytest.raises(Exception, match=r'damaged\.json is not a list of damaged samples'):
        record_of(path, step=3)


# Loaders, subsets and evaluation.


def config(root, **overrides):
    pairs = {'DATASET.PATH': root, 'TRAIN.BATCH_SIZE': 2, 'TRAIN.WORKERS': 0, 'EVAL.BATCH_SIZE': 2} | overrides
    return load_config(overrides=[str(x) for pair in pairs.items() for x in pair])


@pytest.mark.parametrize('workers', [0, 1])
def test_loaders_pass_damage_on(data, workers):
    for split in ('train', 'val'):
        spoil(data, split, 'img', 1, truncate)
    loader, _ = training_loader(config(data, **{'TRAIN.WORKERS': workers}))
    batches = list(loader)
    assert all(len(batch.index) == 2 and 1 not in batch.index for batch in batches)
    assert {found.sample for batch in batches for found in batch.damage} == {1}
    cfg = config(data, **{'EVAL.BATCH_SIZE': 1, 'TRAIN.WORKERS': workers})
    judged = list(evaluation_loader(evaluation_split(cfg, 'val'), cfg))
    assert [batch.index.tolist() for batch in judged] == [[0], [], [2]]
    assert [[found.sample for found in batch.damage] for batch in judged] == [[], [1], []]


def test_subsets_keep_damaged_samples_for_the_evaluation_to_list(data):
    spoil(data, 'test', 'anno', 1, truncate)
    assert choose(open_split(data, 'test'), captures=['0']).indices == [0, 1, 2, 3, 4]


DEMO = {
    'MODEL.STAGES': '0',
    'TRAIN.BATCH_SIZE': '4',
    'TRAIN.EPOCHS': '2',
    'TRAIN.WORKERS': '0',
    'TRAIN.PICTURES': '2',
    'TRAIN.LOG_EVERY': '1',
}


def run(data, out, *more):
    pairs = DEMO | {'DATASET.PATH': str(data), 'OUTPUT_DIR': str(out)}
    return train.main([*TRAINING, *(word for pair in pairs.items() for word in pair), *more])


def lines(out, kind):
    found = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]
    return [line for line in found if line['kind'] == kind]


@pytest.mark.slow  # three short trainings
def test_training_goes_on_over_damage_and_stops_past_the_limit(tmp_path, capsys):
    data = tmp_path / 'data'
    for seed, (split, count) in enumerate((('train', 8), ('val', 3))):
        write_prepared(data, split, count, seed=seed)
    for split in ('train', 'val'):
        spoil(data, split, 'img', 1, hole)
    assert run(data, tmp_path / 'run') == 0
    (line,) = lines(tmp_path / 'run', 'damage')
    assert line['sample'] == '1' and line['reason'] == damage.BAD_IMAGE and line['damaged_so_far'] == 1
    (entry,) = json.loads((tmp_path / 'run/damaged.json').read_text())['damaged']
    assert (entry['sample'], entry['step']) == (1, line['step'])
    assert [line['damaged'] for line in lines(tmp_path / 'run', 'val_damage')] == [1]
    assert len(lines(tmp_path / 'run', 'train')) == 4
    assert '1 damaged sample was left out' in capsys.readouterr().out

    assert run(data, tmp_path / 'strict', 'DATASET.TOLERATED_DAMAGE', '0') == 2
    error = capsys.readouterr().err
    assert 'error: At least 1 of 8 samples of' in error and 'Traceback' not in error
    assert run(data, tmp_path / 'strict', '--resume', 'DATASET.TOLERATED_DAMAGE', '0.001') == 0
    weights = [torch.load(tmp_path / name / 'latest.pth', weights_only=True)['model'] for name in ('run', 'strict')]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert lines(tmp_path / 'strict', 'damage') == [line]


def test_too_much_damage_in_one_of_several_sets_names_its_own_command():
    folder = joint_folder(['data/real', 'data/synthetic'], 'train')
    assert set_folders_of(folder) == ['data/real', 'data/synthetic'] and set_folders_of(Path('a/b/val')) == ['a/b']
    damage = Damage(7, 'data/synthetic/train/img/7.jpg', 'missing file', 'data/synthetic/train/img/7.jpg is missing.')
    with pytest.raises(TooMuchDamageError, match='--path data/synthetic --split train lists all of that set'):
        refuse_damage([damage], most=0, samples=9, folder=folder)
    damage = damage._replace(file='data/real2/train/img/7.jpg')  # begins as another set's
    with pytest.raises(TooMuchDamageError, match='--path data/real2 --split'):
        refuse_damage([damage], most=0, samples=9, folder=joint_folder(['data/real', 'data/real2'], 'train'))


def test_a_sample_of_several_damaged_files_is_quarantined_once(tmp_path):
    entries = [{'sample': 1, 'reason': 'damaged image'}, {'sample': 1, 'reason': 'missing file'}]
    (tmp_path / 'quarantine.json').write_text(json.dumps({'format': 1, 'damaged': entries}))
    assert read_quarantine(tmp_path) == [1]
