import json
import os
import pickle
import shutil
import zlib

import numpy as np
import pytest
import torch
from prepared_tree import write_prepared

from dataset import open_split
from dataset.augmentation import AugmentationRanges
from dataset.hand_model_record import claim_hand_model_record
from dataset.loader import evaluation_loader, training_loader
from dataset.packed import PackedDataset, pack_bits, unpack_bits
from dataset.prepare import pack
from dataset.prepared import InterHandDataset
from dataset.subsets import choose
from dataset.targets import classify_mask
from utils.config import load_config
from utils.errors import UserError

WIDE = AugmentationRanges(180.0, 0.1, 10.0, 0.5, 0.3, 0.3, 0.05, 0.01)


def run(*arguments) -> int:
    return pack.main([*map(str, arguments), '--workers', '1'])


@pytest.fixture(scope='module')
def packed(tiny_prepared, tmp_path_factory):
    root = tmp_path_factory.mktemp('packed')
    assert run('--data_path', tiny_prepared, '--save_path', root) == 0
    return root


@pytest.fixture
def spoilt(packed, tmp_path):
    shutil.copytree(packed, tmp_path / 'packed')
    return tmp_path / 'packed'


def leaves(sample):
    for value in sample:
        if isinstance(value, torch.Tensor):
            yield value
        else:
            yield from leaves(value)


def same(a, b) -> bool:
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(leaves(a), leaves(b), strict=True))


def test_packed_is_the_folder_to_the_bit(tiny_prepared, packed):
    for split in ('train', 'val', 'test'):
        folder, few_files = (open_split(root, split, ranges=WIDE, seed=3) for root in (tiny_prepared, packed))
        assert (type(folder), type(few_files)) == (InterHandDataset, PackedDataset)
        assert len(folder) == len(few_files)
        for index in range(len(folder)):
            assert same(folder[index, 2], few_files[index, 2])
            assert folder.entries(index) == few_files.entries(index)
        keys = [(index, 1) for index in range(len(folder))]
        assert same(folder.__getitems__(keys), few_files.__getitems__(keys))
    assert sorted(path.name for path in (packed / 'train').iterdir()) == ['labels.npy', 'manifest.json', 'samples.bin']


def test_both_forms_give_the_same_batches(tiny_prepared, packed):
    def batches(root, workers):
        cfg = load_config(overrides=['DATASET.PATH', str(root), 'TRAIN.BATCH_SIZE', '3', 'TRAIN.WORKERS', workers])
        return list(training_loader(cfg)[0])

    ours, packed_ones = batches(tiny_prepared, '0'), batches(packed, '1')
    assert len(ours) == len(packed_ones) == 2
    assert all(same(a, b) for a, b in zip(ours, packed_ones))


def test_masks_as_bits_keep_every_class(tiny_prepared, tmp_path):
    out = tmp_path / 'bits'
    assert run('--data_path', tiny_prepared, '--save_path', out, '--masks', 'bits', '--splits', 'test') == 0
    folder, bits = (open_split(root, 'test') for root in (tiny_prepared, out))
    for index in range(len(folder)):
        classes = [classify_mask(torch.from_numpy(data.mask(index)).permute(2, 0, 1)[None]) for data in (folder, bits)]
        assert torch.equal(*classes) and classes[0].unique().tolist() == [0, 1, 2]
    files = [path for kind in ('img', 'mask', 'dense') for path in (tiny_prepared / 'test' / kind).iterdir()]
    assert (out / 'test/samples.bin').stat().st_size < sum(path.stat().st_size for path in files)


def test_bits_go_there_and_back():
    mask = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (256, 256, 2))
    mask[..., 1][mask[..., 0] > 0] = 0  # one hand a pixel
    np.testing.assert_array_equal(unpack_bits(pack_bits(mask)), mask)
    both = np.full((256, 256, 2), 255, np.uint8)
    assert unpack_bits(pack_bits(both))[..., 0].all() and not unpack_bits(pack_bits(both))[..., 1].any()  # left first
    for wrong in (b'nothing', zlib.compress(b'short')):
        with pytest.raises((zlib.error, ValueError)):
            unpack_bits(wrong)


def test_without_targets_it_says_how_to_go_on(tiny_prepared, tmp_path):
    assert run('--data_path', tiny_prepared, '--save_path', tmp_path / 'bare', '--no-targets', '--splits', 'train') == 0
    with pytest.raises(UserError, match=r'without mask images: set DATASET.TARGETS render'):
        open_split(tmp_path / 'bare', 'train')
    with pytest.raises(UserError, match=r'without dense images'):
        open_split(tmp_path / 'bare', 'train', with_mask=False)
    bare = open_split(tmp_path / 'bare', 'train', with_mask=False, with_dense=False)
    assert torch.equal(bare[1].image, open_split(tiny_prepared, 'train')[1].image)


def test_subsets_and_workers_read_the_packed_form(tiny_prepared, packed):
    dataset = open_split(packed, 'test')
    assert choose(dataset, captures=['0'], first=2).indices == [0, 1]
    assert pickle.loads(pickle.dumps(dataset))[3].index == 3  # as a process that is spawned gets it
    assert len(pickle.dumps(dataset)) < 2000
    _ = dataset[0]
    assert len(pickle.dumps(dataset)) < 2000  # the maps stay behind
    cfg = load_config(overrides=['EVAL.BATCH_SIZE', '2', 'TRAIN.WORKERS', '2'])
    assert torch.cat([batch.index for batch in evaluation_loader(dataset, cfg)]).tolist() == [0, 1, 2, 3, 4]


def interrupt_packing(monkeypatch, *, at_call: int) -> list[int]:
    """Interrupt the packing of a sample, once -> the samples that are packed from now on, as they come."""
    real, calls = pack._Packer._pack, []

    def interrupted(packer, index):
        calls.append(index)
        if len(calls) == at_call:
            raise KeyboardInterrupt
        return real(packer, index)

    monkeypatch.setattr(pack._Packer, '_pack', interrupted)
    return calls


def test_killed_packing_goes_on(tiny_prepared, packed, tmp_path, monkeypatch):
    """After every chunk, and with half-written ends."""
    monkeypatch.setattr(pack, 'CHUNK', 3)
    calls = interrupt_packing(monkeypatch, at_call=7)
    assert run('--data_path', tiny_prepared, '--save_path', tmp_path, '--splits', 'train') == 130
    partial = tmp_path / 'train.partial'
    for name in ('labels.npy', 'samples.bin'):
        with open(partial / name, 'ab') as file:
            file.write(b'\0' * 100)  # part of a record, part of a picture
    with pytest.raises(UserError, match='only partly packed'):
        open_split(tmp_path, 'train')
    calls.clear()
    assert run('--data_path', tiny_prepared, '--save_path', tmp_path, '--splits', 'train') == 0
    assert calls == [6, 7]
    for name in ('labels.npy', 'samples.bin', 'manifest.json'):
        assert (tmp_path / 'train' / name).read_bytes() == (packed / 'train' / name).read_bytes()
    assert not partial.exists()


def test_power_cut_that_lost_pictures_costs_only_those(tiny_prepared, packed, tmp_path, monkeypatch):
    def power_cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pack, 'CHUNK', 3)
    monkeypatch.setattr(pack, 'publish', power_cut)
    assert run('--data_path', tiny_prepared, '--save_path', tmp_path, '--splits', 'train') == 130
    monkeypatch.undo()
    blob = tmp_path / 'train.partial' / 'samples.bin'
    os.truncate(blob, blob.stat().st_size // 2)
    assert run('--data_path', tiny_prepared, '--save_path', tmp_path, '--splits', 'train') == 0
    assert (tmp_path / 'train/samples.bin').read_bytes() == (packed / 'train/samples.bin').read_bytes()


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (lambda f: (f / 'samples.bin').unlink(), r'train/samples\.bin is missing: copy it again'),
        (lambda f: os.truncate(f / 'samples.bin', 1000), r'samples\.bin has 1,000 bytes instead of'),
        (lambda f: os.truncate(f / 'labels.npy', 500), r'labels\.npy has 500 bytes instead of'),
        (lambda f: (f / 'manifest.json').write_text('{"format": "dir-packed-7"}'), r'of format dir-packed-7'),
        (lambda f: (f / 'manifest.json').write_text('[]'), r'of format None'),
        (lambda f: (f / 'manifest.json').write_text('{"format": "dir-packed-1"}'), r'lacks some of its entries'),
        (lambda f: (f / 'manifest.json').write_text('{"form'), r'not valid JSON'),
        (lambda f: change_manifest(f, samples=1), r'does not hold the labels of 1 samples'),
        (lambda f: change_manifest(f, samples=10**19), r'records 10{19} samples, for which labels\.npy is too short'),
        (lambda f: overwrite(f / 'labels.npy', 0, b'x'), r'labels\.npy cannot be read'),
        (lambda f: overwrite(f / 'labels.npy', 6, b'\2\0\xff\xff\xff\xff'), r'announces 4,294,967,295 bytes of itself'),
        (
            lambda f: overwrite(f / 'samples.bin', 0, bytes(3000)),
            r'The img image of .*samples\.bin\[0\] is not an image',
        ),
    ],
)
def test_damage_is_one_sentence(spoilt, spoil, message):
    spoil(spoilt / 'train')
    with pytest.raises(UserError, match=message):
        _ = open_split(spoilt, 'train')[0]


def overwrite(path, position, content):
    with open(path, 'r+b') as file:
        file.seek(position)
        file.write(content)


def change_manifest(folder, **entries):
    content = json.loads((folder / 'manifest.json').read_text())
    (folder / 'manifest.json').write_text(json.dumps(content | entries))


def test_verify_finds_a_changed_byte(packed, spoilt, capsys):
    assert run('--verify', packed) == 0
    assert 'as it was packed' in capsys.readouterr().out
    overwrite(spoilt / 'test/samples.bin', 5000, b'\x01\x02\x03')
    assert run('--verify', spoilt) == 2
    assert 'test/samples.bin is damaged (its SHA-256' in capsys.readouterr().err


def test_packing_again_or_differently(tiny_prepared, spoilt, capsys):
    assert run('--data_path', tiny_prepared, '--save_path', spoilt) == 0
    assert 'already complete' in capsys.readouterr().out
    assert run('--data_path', tiny_prepared, '--save_path', spoilt, '--masks', 'bits') == 2
    assert 'mask was jpeg, now bits' in capsys.readouterr().err


def test_a_set_that_was_prepared_in_another_way_is_not_complete(tiny_prepared, spoilt, tmp_path, capsys):
    again = tmp_path / 'again'
    shutil.copytree(tiny_prepared, again)
    path = again / 'test/preparation.json'
    record = {'settings': {'vertex_colours': 'a'}, 'kept': 5, 'skipped': {}}
    path.write_text(json.dumps(record))
    (spoilt / 'test/preparation.json').write_text(json.dumps(record | {'kept': 4, 'skipped': {'quarantined': 1}}))
    assert run('--data_path', again, '--save_path', spoilt, '--splits', 'test') == 0
    path.write_text(json.dumps(record | {'settings': {'vertex_colours': 'b'}}))
    assert run('--data_path', again, '--save_path', spoilt, '--splits', 'test') == 2
    assert "preparation was {'vertex_colours': 'a'}, now {'vertex_colours': 'b'}" in capsys.readouterr().err
    path.unlink()  # prepared by another tool: there is nothing to compare
    assert run('--data_path', again, '--save_path', spoilt, '--splits', 'test') == 0


def test_another_set_that_was_prepared_alike_is_neither_complete_nor_continued(
    tiny_prepared, spoilt, tmp_path, monkeypatch, capsys
):
    """Both by another tool, which leaves no record."""
    write_prepared(tmp_path / 'other', 'train', 8, seed=7)
    assert run('--data_path', tmp_path / 'other', '--save_path', spoilt) == 2
    assert 'labels was' in capsys.readouterr().err
    monkeypatch.setattr(pack, 'CHUNK', 3)
    interrupt_packing(monkeypatch, at_call=6)
    words = ('--save_path', tmp_path / 'out', '--splits', 'train')
    assert run('--data_path', tiny_prepared, *words) == 130
    assert run('--data_path', tmp_path / 'other', *words) == 2
    assert 'labels was' in capsys.readouterr().err
    assert run('--data_path', tiny_prepared, *words) == 0


def test_data_of_a_known_and_of_an_unknown_hand_model_stay_apart(tiny_prepared, tmp_path, capsys):
    for name, split in (('known', 'train'), ('unknown', 'val')):
        shutil.copytree(tiny_prepared / split, tmp_path / name / split)
    claim_hand_model_record(tmp_path / 'known', 'mine')
    for first, second in (('known', 'unknown'), ('unknown', 'known')):
        out = tmp_path / f'{first}-first'
        assert run('--data_path', tmp_path / first, '--save_path', out) == 0
        assert run('--data_path', tmp_path / second, '--save_path', out) == 2
        assert 'mine' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('kind', 'entry', 'message'),
    [
        ('image', [1, 2], 'its image is a list, not a dictionary'),
        ('annotation', np.arange(3.0), 'its annotation is a ndarray'),
        ('image', {'note': b'abc'}, 'cannot be kept as JSON (it holds bytes)'),
        ('image', {(1, 2): 3}, 'cannot be kept as JSON'),
    ],
)
def test_entries_that_are_no_plain_dictionaries_are_named(tiny_prepared, tmp_path, capsys, kind, entry, message):
    shutil.copytree(tiny_prepared / 'val', tmp_path / 'data/val')
    path = tmp_path / 'data/val/anno/1.pkl'
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()) | {kind: entry}))
    assert run('--data_path', tmp_path / 'data', '--save_path', tmp_path / 'out') == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'Pass --data_path and --save_path, or --verify'),
        (['--data_path', 'nowhere', '--save_path', 'there'], 'nowhere has none of the splits'),
        (['--verify', 'nowhere'], 'nowhere has none of the splits'),
        (['--data_path', '{data}', '--save_path', '{data}'], 'is the data set itself'),
        (['--data_path', '{data}', '--save_path', '{tmp}', '--splits', 'val'], 'val/img/1.jpg is not an image'),
    ],
)
def test_mistakes(tiny_prepared, tmp_path, capsys, arguments, message):
    shutil.copytree(tiny_prepared, tmp_path / 'data')
    (tmp_path / 'data/val/img/1.jpg').write_bytes(b'no picture')
    assert run(*[text.format(data=tmp_path / 'data', tmp=tmp_path / 'out') for text in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and 'Traceback' not in error
    assert not (tmp_path / 'out/val').exists()


def test_other_tools_entries_become_json(tiny_prepared, tmp_path):
    shutil.copytree(tiny_prepared / 'val', tmp_path / 'data/val')
    path = tmp_path / 'data/val/anno/0.pkl'
    content = pickle.loads(path.read_bytes())
    content['annotation'] = {'id': np.int64(7), 'bbox': np.arange(4.0)}
    del content['image']
    path.write_bytes(pickle.dumps(content))
    assert run('--data_path', tmp_path / 'data', '--save_path', tmp_path / 'out') == 0
    assert open_split(tmp_path / 'out', 'val').entries(0) == {
        'image': {},
        'annotation': {'id': 7, 'bbox': [0.0, 1.0, 2.0, 3.0]},
    }


def test_two_processes_pack_the_same_bytes_as_one(tiny_prepared, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, 'CHUNK', 3)
    arguments = ['--data_path', str(tiny_prepared), '--save_path', str(tmp_path), '--splits', 'train', '--workers', '2']
    assert pack.main(arguments) == 0
    for name in ('labels.npy', 'samples.bin', 'manifest.json'):
        assert (tmp_path / 'train' / name).read_bytes() == (packed / 'train' / name).read_bytes()
