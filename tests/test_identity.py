import json
import pickle
import shutil
import time

import pytest
from prepared_tree import make_annotations, write_prepared

from dataset import open_split, pack
from dataset.identity import PROBES, check_data_identity, data_identity, probe_indices
from dataset.prepared import RECORD, PreparedSplit
from utils.errors import UserError


@pytest.fixture(scope='module')
def original(tmp_path_factory):
    """A prepared set of 6 samples with a record, for reading only."""
    root = tmp_path_factory.mktemp('identity') / 'prepared'
    folder = write_prepared(root, 'train', 6)
    (folder / RECORD).write_text(json.dumps({'settings': {}, 'kept': 6, 'skipped_image_ids': {'dark': [3]}}))
    return root


@pytest.fixture
def copy(original, tmp_path):
    shutil.copytree(original, tmp_path / 'copy')
    return tmp_path / 'copy'


def identity(root):
    return data_identity(open_split(root, 'train', with_mask=False, with_dense=False))


def refusal(before, after) -> str:
    with pytest.raises(UserError, match='latest.pth was trained (on|with)') as refused:
        check_data_identity(before, after, split='train', path='latest.pth')
    assert '\n' not in str(refused.value) and 'DATASET.PATH' in str(refused.value)
    return str(refused.value)


def test_identity_is_plain_and_belongs_to_the_content(original, copy):
    found = identity(original)
    assert found['samples'] == 6 and json.loads(json.dumps(found)) == found
    assert identity(copy) == found
    check_data_identity(found, identity(copy), split='train', path='latest.pth')


@pytest.mark.parametrize('options', [[], ['--masks', 'bits'], ['--no-targets']])
def test_a_packed_copy_has_the_same_identity(original, tmp_path, options):
    assert pack.main(['--data_path', str(original), '--save_path', str(tmp_path), '--workers', '1', *options]) == 0
    assert identity(tmp_path) == identity(original)


def test_another_number_of_samples_is_named(original, tmp_path):
    write_prepared(tmp_path, 'train', 5)
    assert '6 samples then, 5 now' in refusal(identity(original), identity(tmp_path))


def test_other_kept_frames_are_named(original, copy):
    record = json.loads((copy / 'train' / RECORD).read_text())
    (copy / 'train' / RECORD).write_text(json.dumps(record | {'skipped_image_ids': {'dark': [4]}}))
    assert f'its {RECORD} has changed' in refusal(identity(original), identity(copy))


def test_another_order_is_named(original, copy):
    annotations = copy / 'train' / 'anno'
    (annotations / '2.pkl').rename(annotations / 'x')
    (annotations / '4.pkl').rename(annotations / '2.pkl')
    (annotations / 'x').rename(annotations / '4.pkl')
    assert 'sample 2 has other labels' in refusal(identity(original), identity(copy))


def test_other_labels_are_named_without_a_record(original, copy, tmp_path):
    (copy / 'train' / RECORD).unlink()
    # As packed by an earlier version.
    check_data_identity(identity(original), identity(copy), split='train', path='latest.pth')
    write_prepared(tmp_path, 'train', 6, seed=1)
    assert 'sample 0 has other labels' in refusal(identity(copy), identity(tmp_path))


def test_a_damaged_sample_does_not_count_as_other_data(original, copy):
    (copy / 'train' / 'anno' / '3.pkl').write_bytes(b'torn')
    damaged = identity(copy)
    check_data_identity(identity(original), damaged, split='train', path='latest.pth')
    check_data_identity(damaged, identity(original), split='train', path='latest.pth')
    assert damaged['digest'] != identity(original)['digest']


def test_several_sets_are_compared_one_by_one(original, tmp_path):
    write_prepared(tmp_path, 'train', 5)
    first, second = identity(original), identity(tmp_path)
    joined = open_split(tmp_path, 'train')
    joined.parts = [open_split(root, 'train') for root in (original, tmp_path)]
    check_data_identity([first, second], data_identity(joined), split='train', path='latest.pth')
    check_data_identity(first, [first], split='train', path='latest.pth')
    assert 'data set 1 of 2' in refusal([first, second], [second, first])
    assert 'with the split train of 2 data sets, but 1 in DATASET.PATH hold one now' in refusal(
        [first, second], [first]
    )


def test_checkpoints_without_an_identity_fit_any_data(original):
    check_data_identity(None, identity(original), split='train', path='latest.pth')


@pytest.mark.parametrize(
    'recorded', [3, 'text', {}, {'samples': 'x', 'probes': []}, {'samples': 6, 'probes': 'x'}, [None]]
)
def test_a_malformed_identity_is_refused(original, recorded):
    assert 'the recorded identity is damaged' in refusal(recorded, identity(original))


def test_probes_cover_the_set():
    assert probe_indices(1) == [0] and probe_indices(3) == [0, 1, 2]
    many = probe_indices(400_000)
    assert len(set(many)) == PROBES and many[0] == 0 and many[-1] == 399_999


def test_a_large_set_takes_less_than_a_second(tmp_path, original):
    """400,000 samples, of which only the probed annotations exist, beside a record as long as a million ids."""
    folder = tmp_path / 'train'
    (folder / 'anno').mkdir(parents=True)
    (folder / RECORD).write_text(json.dumps({'skipped_image_ids': 'x' * 8_000_000}))
    annotation = pickle.dumps(make_annotations(1)[0])
    for index in probe_indices(400_000):
        (folder / 'anno' / f'{index}.pkl').write_bytes(annotation)
    dataset = open_split(original, 'train')
    PreparedSplit.__init__(dataset, folder, 400_000)
    begin = time.process_time()
    found = data_identity(dataset)
    assert time.process_time() - begin < 1 and '' not in found['probes'] and found['samples'] == 400_000
