"""Data with single hands and without hands: preparing, shards, packing, verifying, mixing."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from prepared_tree import write_prepared
from raw_tree import make_raw_tree, write_kind
from test_preparation import contents, prepare, record
from test_verify import change_annotation, report
from test_verify import run as run_verify
from torch.utils.data import default_collate

from dataset import open_split
from dataset.batch import BatchMaker
from dataset.identity import data_identity
from dataset.packed import PackedDataset, visible_hands
from dataset.prepare import pack, verify
from dataset.prepare import split as preparation
from dataset.prepare.frames import CROPS_WITHOUT_HANDS, crop_without_hands
from dataset.prepare.resumable import Journal
from dataset.prepared import InterHandDataset
from manopth import TwoHandLayer, safe_pickle
from utils.geometry import CROP_SIZE, project
from utils.hand import LEFT, RIGHT, SIDES

# By time step, each seen by two cameras: hand type, and the hands that the annotations have a fit of.
STEPS = (
    ('left', ('left',)),
    ('right', ('left', 'right')),
    ('none', ()),
    ('left', ('right',)),
    ('both', SIDES),
    ('interacting', SIDES),
    ('interacting', ('right',)),
    ('right', ('right',)),
)
KEPT = ('left', 'left', 'right', 'right', 'none', 'none', 'interacting', 'interacting', 'right', 'right')
SKIPPED = {'a hand without MANO parameters': 4, 'unknown hand type': 2}
SHOWN = {'left': [LEFT], 'right': [RIGHT], 'interacting': [LEFT, RIGHT], 'none': []}
ABSENT = {1: ('left',), 2: ('right',), 3: SIDES, 5: ('left',)}


def write_raw(root):
    content = make_raw_tree(root, steps=len(STEPS))
    frames = list(content['joint_3d']['0'])
    types = dict(zip(frames, STEPS, strict=True))
    frame_of = {image['id']: str(image['frame_idx']) for image in content['data']['images']}
    for annotation in content['data']['annotations']:
        annotation['hand_type'] = types[frame_of[annotation['image_id']]][0]
    for frame, (_, fitted) in types.items():
        for side in set(SIDES) - set(fitted):
            content['MANO_NeuralAnnot']['0'][frame][side] = None
    for kind in ('data', 'MANO_NeuralAnnot'):
        write_kind(root, kind, content)
    return content


@pytest.fixture(scope='module')
def raw(tmp_path_factory):
    root = tmp_path_factory.mktemp('raw')
    write_raw(root)
    return root


@pytest.fixture(scope='module')
def prepared(raw, tmp_path_factory):
    """Chunks of three frames."""
    save_path = tmp_path_factory.mktemp('prepared')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, 'CHUNK', 3)
        assert prepare(raw, save_path, '--hands', 'all') == 0
    return save_path


@pytest.fixture(scope='module')
def some_absent(tmp_path_factory):
    """A set of another tool: no record."""
    root = tmp_path_factory.mktemp('absent')
    write_prepared(root, 'train', 6, absent=ABSENT)
    return root


@pytest.fixture(scope='module')
def packed(some_absent, tmp_path_factory):
    root = tmp_path_factory.mktemp('packed')
    assert run_pack(some_absent, root) == 0
    return root


def run_pack(source, target, *more):
    return pack.main(['--data_path', str(source), '--save_path', str(target), '--workers', '1', *more])


def annotation(root, index):
    return safe_pickle.load(root / 'train' / 'anno' / f'{index}.pkl')


# Preparing


def test_all_keeps_single_hands_and_images_without_hands(prepared):
    found = record(prepared)
    assert found['skipped'] == SKIPPED and not found['damaged']
    assert (found['frames'], found['kept']) == (2 * len(STEPS), len(KEPT))
    assert found['settings']['hands'] == 'all'
    assert found['kept_by_hand_type'] == {'interacting': 2, 'left': 2, 'right': 4, 'none': 2}
    dataset = InterHandDataset(prepared, 'train')
    for index, hand_type in enumerate(KEPT):
        content, present = annotation(prepared, index), np.isin([LEFT, RIGHT], SHOWN[hand_type])
        assert content['annotation']['hand_type'] == hand_type
        # A fit of a hand that the image does not show is not stored.
        assert [content['mano_params'][side] is not None for side in SIDES] == present.tolist()
        assert dataset[index].present.tolist() == present.tolist()
        assert (visible_hands(dataset.mask(index)).sum((0, 1)) > 500).tolist() == present.tolist()
        assert (dataset.image('dense', index).max() > 50) == present.any()


def test_the_crop_of_a_single_hand_is_cut_around_it(prepared, standin):
    layer = TwoHandLayer(standin)
    dataset = InterHandDataset(prepared, 'train')
    for index, hand_type in enumerate(KEPT):
        sample, shown = dataset[index], SHOWN[hand_type]
        if not shown:
            continue
        hands = layer(sample.root[None], sample.pose[None], sample.shape[None]).vertices[0]
        world = (hands + sample.translation[:, None])[shown].flatten(0, 1)
        points = world @ sample.camera_rotation.T + sample.camera_translation
        pixels = project(points.double(), sample.intrinsics.double())
        low, high = pixels.amin(0), pixels.amax(0)
        assert (high - low).max().item() == pytest.approx(0.8 * CROP_SIZE, abs=1e-2)
        torch.testing.assert_close((low + high) / 2, torch.full((2,), 128.0).double(), atol=1e-2, rtol=0)


def test_only_interacting_hands_are_kept_by_default(raw, tmp_path, capsys):
    assert prepare(raw, tmp_path) == 0
    assert 'train: 2 of 16 frames kept\n' in capsys.readouterr().out
    found = record(tmp_path)
    assert found['skipped'] == {'hands not interacting': 12, 'a hand without MANO parameters': 2}
    # To the letter what earlier versions record.
    assert set(found) == {'settings', 'frames', 'kept', 'skipped', 'damaged', 'skipped_image_ids'}
    assert 'hands' not in found['settings']


@pytest.mark.parametrize(
    'first, then, message',
    [((), ('--hands', 'all'), 'hands was not set, now all'), (('--hands', 'all'), (), 'hands was all, now not set')],
)
def test_other_hands_are_other_settings(raw, tmp_path, capsys, monkeypatch, first, then, message):
    """Of a complete folder, an unfinished one, and a shard."""
    assert prepare(raw, tmp_path / 'whole', *first) == 0
    assert prepare(raw, tmp_path / 'shards', *first, '--shard', '1/1') == 0
    monkeypatch.setattr(preparation, 'finish', lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert prepare(raw, tmp_path / 'begun', *first) == 130
    monkeypatch.undo()
    capsys.readouterr()
    for folder, more in (('whole', ()), ('begun', ()), ('shards', ('--merge',))):
        assert prepare(raw, tmp_path / folder, *then, *more) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize('stop_after', [2, 5, 9])
def test_an_interrupted_preparation_counts_what_it_kept_before(raw, prepared, tmp_path, monkeypatch, stop_after):
    monkeypatch.setattr(preparation, 'CHUNK', 3)
    write, calls = preparation.write_frame, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(preparation, 'write_frame', interrupted)
    assert prepare(raw, tmp_path, '--hands', 'all') == 130
    monkeypatch.setattr(preparation, 'write_frame', write)
    assert prepare(raw, tmp_path, '--hands', 'all') == 0
    assert contents(tmp_path) == contents(prepared)


def test_merged_shards_are_what_one_run_writes(raw, prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preparation, 'CHUNK', 3)
    for number in (3, 1, 2):
        assert prepare(raw, tmp_path, '--hands', 'all', '--shard', f'{number}/3') == 0
    capsys.readouterr()
    assert prepare(raw, tmp_path, '--hands', 'all', '--merge') == 0
    message = 'train: 10 of 16 frames kept (2 interacting, 2 left, 4 right, 2 without hands)\n'
    assert message in capsys.readouterr().out
    assert contents(tmp_path) == contents(prepared)


def test_a_shard_whose_counts_do_not_add_up_is_refused(raw, tmp_path, capsys):
    assert prepare(raw, tmp_path, '--hands', 'all', '--shard', '1/1') == 0
    path = tmp_path / 'train.shard-1-of-1' / 'preparation.json'
    whole = json.loads(path.read_text())
    for counts in ({'left': 3}, None, {}):
        path.write_text(json.dumps(whole | {'kept_by_hand_type': counts}))
        capsys.readouterr()
        assert prepare(raw, tmp_path, '--hands', 'all', '--merge') == 2
        assert 'kept_by_hand_type does not add up to the 10 frames kept' in capsys.readouterr().err


def test_a_hand_behind_the_camera_that_is_not_shown_does_not_matter(tmp_path):
    content = write_raw(tmp_path / 'raw')
    frames = list(content['MANO_NeuralAnnot']['0'].values())
    frames[1]['left']['trans'][2] -= 5.0  # of images that show the right hand
    frames[7]['right']['trans'][2] -= 5.0
    write_kind(tmp_path / 'raw', 'MANO_NeuralAnnot', content)
    assert prepare(tmp_path / 'raw', tmp_path / 'out', '--hands', 'all') == 0
    assert record(tmp_path / 'out')['skipped'] == SKIPPED | {'hands behind the camera': 2}


def test_crops_without_hands_follow_from_the_file_name_and_are_as_large_as_those_of_hands():
    size = (512, 334)
    maps = np.array([crop_without_hands(f'Capture0/x/cam1/image{number}.jpg', size) for number in range(200)])
    assert np.array_equal(maps[7], crop_without_hands('Capture0/x/cam1/image7.jpg', size))
    sides = CROP_SIZE / maps[:, 0, 0] / min(size)
    low, high = CROPS_WITHOUT_HANDS
    assert low <= sides.min() < low + 0.1 and high - 0.1 < sides.max() <= high
    centres = np.linalg.inv(maps) @ [128, 128, 1]
    assert (centres[:, :2] > 0.2 * np.array(size)).all() and (centres[:, :2] < 0.8 * np.array(size)).all()
    assert len(np.unique(centres.round(), axis=0)) > 190


# Packing


@pytest.mark.parametrize('options', [(), ('--masks', 'bits')])
def test_packed_is_the_folder_to_the_bit(some_absent, tmp_path, options):
    assert run_pack(some_absent, tmp_path, *options) == 0
    folder, few_files = open_split(some_absent, 'train'), open_split(tmp_path, 'train')
    assert isinstance(few_files, PackedDataset) and few_files.manifest['hands'] == 'all'
    for index in range(6):
        for ours, theirs in zip(folder.labels(index), few_files.labels(index), strict=True):
            assert ours.tobytes() == theirs.tobytes()
        a, b = folder[index], few_files[index]
        assert torch.equal(a.present, b.present) and torch.equal(a.image, b.image)
        assert a.present.tolist() == [side not in ABSENT.get(index, ()) for side in SIDES]
        assert np.array_equal(visible_hands(folder.mask(index)), visible_hands(few_files.mask(index)))
    assert data_identity(folder) == data_identity(few_files)
    assert pack.main(['--verify', str(tmp_path)]) == 0


def test_a_prepared_set_and_its_packed_copy_have_the_same_identity(prepared, tmp_path):
    assert run_pack(prepared, tmp_path) == 0
    assert data_identity(open_split(prepared, 'train')) == data_identity(open_split(tmp_path, 'train'))
    assert '' not in data_identity(open_split(tmp_path, 'train'))['probes']
    assert run_pack(prepared, tmp_path) == 0  # already complete


def test_a_set_in_which_no_sample_lacks_a_hand_is_packed_as_before(tiny_prepared, tmp_path):
    assert run_pack(tiny_prepared, tmp_path, '--splits', 'val') == 0
    manifest = json.loads((tmp_path / 'val' / 'manifest.json').read_text())
    assert list(manifest) == ['format', 'samples', 'mask', 'dense', 'files']


def test_interrupted_packing_resumes(some_absent, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, 'CHUNK', 2)
    note = Journal.note

    def stop_at_the_second(journal, chunk):
        note(journal, chunk)
        if len(journal.chunks) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, 'note', stop_at_the_second)
    assert run_pack(some_absent, tmp_path) == 130
    monkeypatch.setattr(Journal, 'note', note)
    assert run_pack(some_absent, tmp_path) == 0
    assert contents(tmp_path) == contents(packed)


def test_without_the_manifests_permission_an_absent_hand_is_damage(packed, tmp_path):
    shutil.copytree(packed, tmp_path / 'packed')
    path = tmp_path / 'packed/train/manifest.json'
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != 'hands'}))
    assert run_verify(tmp_path / 'packed') == 1
    assert {one['sample'] for one in report(tmp_path / 'packed')['damaged']} == set(ABSENT)


# Verifying


def test_sets_with_absent_hands_are_sound_in_both_forms(some_absent, packed, prepared, tmp_path):
    for number, root in enumerate((some_absent, packed, prepared)):
        assert run_verify(root, '--out', str(tmp_path / str(number))) == 0


@pytest.mark.parametrize(
    'index, side, key, value, message',
    [
        (1, 'right', 'trans', np.full((1, 3), 900.0), r'translation holds .* must be in metres'),
        (2, 'left', 'pose', np.full((1, 45), np.nan), r'NaN or infinity'),
        (5, 'right', 'R', 2 * np.eye(3)[None], r'root is not a rotation matrix'),
    ],
)
def test_the_labels_of_the_other_hand_are_checked(some_absent, tmp_path, index, side, key, value, message):
    shutil.copytree(some_absent, tmp_path / 'data')
    change_annotation(tmp_path / f'data/train/anno/{index}.pkl', lambda c: c['mano_params'][side].update({key: value}))
    (found,) = verify.check_sample(InterHandDataset(tmp_path / 'data', 'train'), index)
    assert found.reason == 'labels not finite or out of range'
    assert re.search(message, found.detail)


@pytest.mark.parametrize('side', SIDES)
def test_a_mask_that_shows_an_absent_hand_is_damage(some_absent, tmp_path, side):
    shutil.copytree(some_absent, tmp_path / 'data')
    change_annotation(tmp_path / 'data/train/anno/0.pkl', lambda c: c['mano_params'].update({side: None}))
    assert run_verify(tmp_path / 'data') == 1
    (found,) = report(tmp_path / 'data')['damaged']
    assert found['sample'] == 0 and f'shows the {side} hand, which its labels lack' in found['detail']


def test_quarantine_leaves_out_a_damaged_single_hand(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / 'data')
    os.truncate(tmp_path / 'data/train/img/2.jpg', 300)
    assert run_verify(tmp_path / 'data', '--quarantine') == 0
    found = record(tmp_path / 'data')
    assert found['kept'] + sum(found['skipped'].values()) == found['frames'] and 'kept_by_hand_type' not in found
    dataset = InterHandDataset(tmp_path / 'data', 'train')
    present = [dataset[index].present.tolist() for index in range(len(dataset))]
    assert present == [[hand in SHOWN[kind] for hand in (LEFT, RIGHT)] for kind in KEPT[:2] + KEPT[3:]]
    assert run_verify(tmp_path / 'data') == 0


# Mixing


def test_a_mixture_of_sets_with_and_without_absent_hands_trains(tiny_prepared, packed, standin):
    mixture = open_split([str(tiny_prepared), str(packed)], 'train')
    samples = default_collate([mixture[index] for index in range(6, 12)])
    assert samples.present.tolist() == [[True, True]] * 3 + [[False, True], [True, False], [False, False]]
    target = BatchMaker(standin)(samples).target
    assert target.present is not None and all(x is None or x.isfinite().all() for x in target)
    assert len(data_identity(mixture)) == 2
