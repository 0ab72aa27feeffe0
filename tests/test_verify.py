"""dataset/verify.py finds every kind of damage in both forms, resumes, and quarantines."""

import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
from test_damage import KINDS, hole, spoil, truncate

from dataset import damage, open_split
from dataset.damage import Damage
from dataset.prepare import pack, verify
from dataset.prepare.resumable import Journal
from dataset.prepared import InterHandDataset
from utils.errors import UserError


def run(path, *more) -> int:
    return verify.main(['--path', str(path), '--workers', '1', *more])


def report(path, split='train'):
    return json.loads((path / 'verify' / f'{split}.json').read_text())


@pytest.fixture
def prepared(tiny_prepared, tmp_path):
    shutil.copytree(tiny_prepared, tmp_path / 'data')
    return tmp_path / 'data'


@pytest.fixture(scope='module')
def packed_once(tiny_prepared, tmp_path_factory):
    root = tmp_path_factory.mktemp('packed')
    assert pack.main(['--data_path', str(tiny_prepared), '--save_path', str(root), '--workers', '1']) == 0
    return root


@pytest.fixture
def packed(packed_once, tmp_path):
    shutil.copytree(packed_once, tmp_path / 'packed')
    return tmp_path / 'packed'


def write_record(root, split, *, kept, frames, skipped):
    record = {'settings': {}, 'kept': kept, 'frames': frames, 'skipped': skipped}
    (root / split / 'preparation.json').write_text(json.dumps(record))


def test_sound_sets_of_both_forms(prepared, packed, capsys):
    write_record(prepared, 'train', kept=8, frames=10, skipped={'other': 2})
    for root, form in ((prepared, 'prepared'), (packed, 'packed')):
        assert run(root) == 0
        assert f'train ({form}): 8 samples, 0 damaged' in capsys.readouterr().out
        for split, samples in (('train', 8), ('val', 3), ('test', 5)):
            found = report(root, split)
            assert (found['samples'], found['damaged'], found['whole']) == (samples, [], [])
        assert not list((root / 'verify').glob('*.partial'))


@pytest.mark.parametrize('kind, how, reason', KINDS)
def test_every_kind_of_damage_is_listed_with_its_reason(prepared, capsys, kind, how, reason):
    spoil(prepared, 'train', kind, 2, how)
    assert run(prepared, '--split', 'train') == 1
    (found,) = report(prepared)['damaged']
    assert (found['sample'], found['reason']) == (2, reason) and f'train/{kind}/2' in found['detail']
    assert f'1  {reason}' in capsys.readouterr().out
    assert run(prepared, '--split', 'val') == 0


def change_annotation(path, change):
    content = pickle.loads(path.read_bytes())
    change(content)
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda c: c['mano_params']['left']['trans'].__imul__(1000), r'translation holds .* must be in metres'),
        (lambda c: c['camera'].update(t=c['camera']['t'] * 1000), r'camera_translation holds .* must be in metres'),
        (lambda c: c['mano_params']['right'].update(pose=np.full((1, 45), 99.0)), r'pose holds 99, more than 50'),
        (lambda c: c['mano_params']['left'].update(shape=np.full((1, 10), -31.0)), r'shape holds 31, more than 30'),
        (lambda c: c['mano_params']['left']['R'].__imul__(1.1), r'root is not a rotation matrix'),
        (lambda c: c['camera'].update(R=-c['camera']['R']), r'camera_rotation is not a rotation matrix'),
        (lambda c: c['camera']['camera'].__setitem__((0, 0), 1e-3), r'focal lengths'),
        (lambda c: c['camera']['camera'].__setitem__((2, 2), 2.0), r'last row of intrinsics'),
        (lambda c: c['camera']['camera'].__setitem__((0, 2), 4000.0), r'far outside of the crop'),
        (lambda c: c['camera'].update(t=c['camera']['t'] - [0, 0, 5]), r'hand lies -.* m in front of the camera'),
    ],
)
def test_labels_out_of_range(prepared, change, message):
    change_annotation(prepared / 'train/anno/3.pkl', change)
    found = verify.check_sample(InterHandDataset(prepared, 'train'), 3)
    assert [one.reason for one in found] == [damage.BAD_LABELS]
    assert re.search(message, found[0].detail)


def test_several_damaged_files_of_a_sample(prepared):
    for kind in ('img', 'mask', 'anno'):
        spoil(prepared, 'train', kind, 7, lambda path: path.unlink())
    assert run(prepared, '--split', 'train') == 1
    assert [found['sample'] for found in report(prepared)['damaged']] == [7, 7, 7]


@pytest.mark.parametrize(
    'record, message',
    [
        ({'kept': 9, 'frames': 9, 'skipped': {}}, r'records 9 kept frames, but the split holds 8 samples'),
        ({'kept': 8, 'frames': 20, 'skipped': {'a': 3}}, r'8 frames kept and 3 skipped are not the 20'),
    ],
)
def test_counts_of_the_record(prepared, record, message):
    write_record(prepared, 'train', **record)
    assert run(prepared, '--split', 'train') == 1
    assert re.search(message, report(prepared)['whole'][0])


def test_leftovers_are_named_and_harmless(prepared, capsys):
    (prepared / 'train.partial').mkdir()
    (prepared / 'train/img/.5.jpg.0123.partial').touch()
    (prepared / 'train/img/05.jpg').touch()  # not a sample's name
    (prepared / 'train/journal.jsonl').touch()
    assert run(prepared, '--split', 'train') == 0
    assert len(report(prepared)['leftovers']) == 4 and 'unused: ' in capsys.readouterr().out


def overwrite(path, position, content):
    with open(path, 'r+b') as file:
        file.seek(position)
        file.write(content)


def test_packed_damage(packed, capsys):
    begin = int(open_split(packed, 'train').record(4)['begin'])
    overwrite(packed / 'train/samples.bin', begin + 800, bytes(1500))
    records = np.load(packed / 'train/labels.npy', mmap_mode='r+')
    records[2]['begin'] += 1
    records[6]['shape'][0, 0] = np.inf
    records.flush()
    assert run(packed, '--split', 'train') == 1
    found = report(packed)
    reasons = {(one['sample'], one['reason']) for one in found['damaged']}
    assert {(4, damage.BAD_IMAGE), (6, damage.BAD_LABELS), (2, damage.BAD_ANNOTATION)} <= reasons
    assert {sample for sample, _ in reasons} <= {2, 3, 4, 6}
    assert [sentence.split(' has ')[0][-11:] for sentence in found['whole']] == ['/labels.npy', 'samples.bin']
    before = (packed / 'train/labels.npy').read_bytes()
    assert run(packed, '--split', 'train', '--quarantine') == 2
    assert 'nothing was quarantined. Copy it again' in capsys.readouterr().err
    assert (packed / 'train/labels.npy').read_bytes() == before and not (packed / 'train/quarantine.json').exists()


@pytest.mark.parametrize(
    'spoil_whole, message',
    [
        (lambda f: (f / 'manifest.json').unlink(), 'manifest.json does not exist'),
        (lambda f: os.truncate(f / 'samples.bin', 100), 'samples.bin has 100 bytes instead of'),
        (lambda f: overwrite(f / 'labels.npy', 0, b'x'), 'labels.npy cannot be read'),
    ],
)
def test_packed_files_damaged_as_a_whole(packed, capsys, spoil_whole, message):
    spoil_whole(packed / 'train')
    assert run(packed, '--split', 'train') == 1
    assert message in capsys.readouterr().out and message in report(packed)['whole'][0]


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--path', '{tmp}/nowhere'], 'nowhere has none of the splits'),
        (['--path', '{tmp}/data', '--split', 'test'], 'data/test does not exist'),
        (['--path', '{tmp}/data', '--workers', '0'], '--workers is 0'),
        (['--path', '{tmp}/other'], 'other/train is neither a prepared nor a packed split'),
        (['--path', '{tmp}/begun'], 'begun/train is only partly prepared'),
        (['--path', '{tmp}/data', '--out', '/proc/verify'], '/proc/verify cannot be created'),
    ],
)
def test_mistakes(prepared, tmp_path, capsys, arguments, message):
    shutil.rmtree(prepared / 'test')
    for name in ('other/train', 'begun/train.partial'):
        (tmp_path / name).mkdir(parents=True)
    assert verify.main([word.format(tmp=tmp_path) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and 'Traceback' not in error


def interrupt_at_the_sixth(monkeypatch) -> list[int]:
    """Interrupt the check of the sixth sample, once -> the samples that are checked from now on, as they come."""
    real, checked = verify.check_sample, []

    def check(dataset, number):
        checked.append(number)
        if len(checked) == 6:
            raise KeyboardInterrupt
        return real(dataset, number)

    monkeypatch.setattr(verify, 'check_sample', check)
    return checked


def test_an_interrupted_verification_resumes(prepared, monkeypatch):
    monkeypatch.setattr(verify, 'CHUNK', 2)
    for number in (1, 2):
        spoil(prepared, 'train', 'img', number, truncate)
    good = (prepared / 'test/img/1.jpg').read_bytes()
    real = verify.check_sample
    checked = interrupt_at_the_sixth(monkeypatch)
    assert run(prepared, '--split', 'train') == 130
    assert len(Journal(prepared / 'verify/train.partial/journal.jsonl').chunks) == 2
    (prepared / 'train/img/1.jpg').write_bytes(good)  # repaired meanwhile
    monkeypatch.setattr(
        verify, 'check_sample', lambda dataset, number: (checked.append(number), real(dataset, number))[1]
    )
    assert run(prepared, '--split', 'train') == 1
    assert checked == [0, 1, 2, 3, 4, 5, 0, 1, 2, 4, 5, 6, 7]
    assert [found['sample'] for found in report(prepared)['damaged']] == [2]
    checked.clear()
    assert run(prepared, '--split', 'train') == 1 and len(checked) == 8  # a finished one starts anew


def test_a_resumed_verification_looks_again_at_files_that_have_changed(prepared, monkeypatch):
    monkeypatch.setattr(verify, 'CHUNK', 2)
    checked = interrupt_at_the_sixth(monkeypatch)
    assert run(prepared, '--split', 'train') == 130
    spoil(prepared, 'train', 'img', 3, truncate)
    assert run(prepared, '--split', 'train') == 1
    assert [found['sample'] for found in report(prepared)['damaged']] == [3]
    assert checked[6:] == [2, 3, 4, 5, 6, 7]


def test_a_split_in_shards_is_not_passed_over(prepared, capsys):
    (prepared / 'val').rename(prepared / 'val.shard-1-of-2')
    assert run(prepared) == 2
    assert 'val is only partly prepared' in capsys.readouterr().err


@pytest.mark.slow  # starts processes
def test_processes_find_the_same(prepared, packed):
    spoil(prepared, 'train', 'mask', 5, hole)
    assert verify.main(['--path', str(prepared), '--workers', '2']) == 1
    assert [found['sample'] for found in report(prepared)['damaged']] == [5]
    assert verify.main(['--path', str(packed), '--workers', '2']) == 0


# Quarantine.


def test_quarantined_samples_are_not_seen(prepared, tmp_path, capsys):
    write_record(prepared, 'train', kept=8, frames=10, skipped={'other': 2})
    before = open_split(prepared, 'train')
    expected = {number: before[number] for number in (0, 2, 3, 4, 6)}
    spoil(prepared, 'train', 'img', 1, lambda path: path.unlink())
    spoil(prepared, 'train', 'anno', 5, truncate)
    spoil(prepared, 'train', 'mask', 7, hole)
    with pytest.raises(UserError, match='--quarantine'):
        open_split(prepared, 'train')
    assert run(prepared, '--split', 'train', '--quarantine') == 0
    assert 'quarantined; 5 samples remain' in capsys.readouterr().out
    dataset = open_split(prepared, 'train')
    assert len(dataset) == 5
    for index, (number, sample) in enumerate(expected.items()):
        assert dataset.name(index).endswith(f'train/img/{number}.jpg')
        assert (dataset[index].image == sample.image).all() and (dataset[index].pose == sample.pose).all()
        assert dataset.entries(index) == before.entries(number)
    record = json.loads((prepared / 'train/preparation.json').read_text())
    assert record['kept'] == 5 and record['kept'] + sum(record['skipped'].values()) == record['frames']
    moved = sorted(
        path.relative_to(prepared / 'train/quarantine') for path in (prepared / 'train/quarantine').rglob('*.*')
    )
    assert list(map(str, moved)) == [
        *(f'anno/{number}.pkl' for number in (1, 5, 7)),
        *(f'dense/{number}.jpg' for number in (1, 5, 7)),
        *(f'img/{number}.jpg' for number in (5, 7)),
        *(f'mask/{number}.jpg' for number in (1, 5, 7)),
        'preparation.json',
    ]
    assert run(prepared, '--split', 'train') == 0  # sound now
    spoil(prepared, 'train', 'dense', 0, truncate)
    assert run(prepared, '--split', 'train', '--quarantine') == 0
    assert len(open_split(prepared, 'train')) == 4 and run(prepared, '--split', 'train') == 0
    assert json.loads((prepared / 'train/preparation.json').read_text())['kept'] == 4

    assert pack.main(['--data_path', str(prepared), '--save_path', str(tmp_path / 'p'), '--splits', 'train']) == 0
    assert len(open_split(tmp_path / 'p', 'train')) == 4 and run(tmp_path / 'p') == 0


def test_a_killed_quarantine_is_completed(prepared, monkeypatch):
    spoil(prepared, 'train', 'img', 1, truncate)
    real = verify._move
    monkeypatch.setattr(verify, '_move', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(prepared, '--split', 'train', '--quarantine') == 130
    assert len(open_split(prepared, 'train')) == 7
    monkeypatch.setattr(verify, '_move', real)
    assert run(prepared, '--split', 'train', '--quarantine') == 0
    assert not (prepared / 'train/img/1.jpg').exists() and len(open_split(prepared, 'train')) == 7


def test_quarantine_of_samples_that_were_packed_damaged(packed_once, tmp_path):
    """The checksums are those of the manifest; the labels were nonsense from the beginning."""
    shutil.copytree(packed_once, tmp_path / 'p')
    records = np.load(tmp_path / 'p/train/labels.npy', mmap_mode='r+')
    records[3]['translation'] *= 1000
    records.flush()
    manifest = json.loads((tmp_path / 'p/train/manifest.json').read_text())
    manifest['files']['labels.npy']['sha256'] = verify.sha256_of_file(tmp_path / 'p/train/labels.npy')
    (tmp_path / 'p/train/manifest.json').write_text(json.dumps(manifest))
    expected = open_split(tmp_path / 'p', 'train')[4]
    assert run(tmp_path / 'p', '--split', 'train', '--quarantine') == 0
    dataset = open_split(tmp_path / 'p', 'train')
    assert len(dataset) == 7 and (dataset[3].image == expected.image).all()
    assert dataset.name(3).endswith('samples.bin[4]') and run(tmp_path / 'p') == 0


def test_quarantine_refuses_what_may_pass_or_is_everything(prepared, capsys):
    spoil(prepared, 'train', 'img', 1, lambda path: (path.unlink(), path.mkdir()))
    assert run(prepared, '--split', 'train', '--quarantine') == 2
    assert 'cannot be read, perhaps for a failing disk' in capsys.readouterr().err
    for number in range(3):
        spoil(prepared, 'val', 'img', number, truncate)
    assert run(prepared, '--split', 'val', '--quarantine') == 2
    assert 'Every sample of' in capsys.readouterr().err
    assert len(open_split(prepared, 'val')) == 3


@pytest.mark.parametrize('content', ['{"damaged": 3}', '[]', '{"form', '{"format": 1, "damaged": [{"sample": "x"}]}'])
def test_damaged_list_of_quarantined_samples(prepared, content):
    (prepared / 'train/quarantine.json').write_text(content)
    with pytest.raises(UserError, match=r'train/quarantine\.json is'):
        open_split(prepared, 'train')


def test_damage_is_plain_data():
    one = Damage(3, 'a', 'b', 'c')
    assert Damage(*json.loads(json.dumps(list(one)))) == one
