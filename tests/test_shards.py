import json
import os
import shutil

import cv2
import numpy as np
import pytest
from raw_tree import make_raw_tree, write_kind
from test_preparation import contents, prepare, record

from dataset.prepare import shards
from dataset.prepare import split as preparation
from dataset.prepare.resumable import Journal
from dataset.prepare.shards import Shard, find_shards, parse_shard
from dataset.prepared import InterHandDataset
from utils.errors import UserError

CHUNK = 2
DARK, GONE = (2, 11), (5, 9)  # images; the second of the dark ones is also too wide


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(preparation, 'CHUNK', CHUNK)


@pytest.fixture(scope='module')
def example(tmp_path_factory):
    """A raw tree in which something is skipped in every shard, the result of a single run, and three shards."""
    root = tmp_path_factory.mktemp('shards')
    content = make_raw_tree(root / 'raw', steps=7)
    images, annotations = content['data']['images'], {a['image_id']: a for a in content['data']['annotations']}
    annotations[images[3]['id']]['hand_type'] = annotations[images[12]['id']]['hand_type'] = 'left'
    content['data']['annotations'].remove(annotations[images[7]['id']])  # damaged: no annotation
    write_kind(root / 'raw', 'data', content)
    path = [root / 'raw' / 'images' / 'train' / image['file_name'] for image in images]
    for number in DARK:
        cv2.imwrite(str(path[number]), np.zeros((334, 512, 3), np.uint8))
    for number in GONE:
        path[number].unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, 'CHUNK', CHUNK)
        assert prepare(root / 'raw', root / 'whole') == 0
        for number in (3, 1, 2):
            assert prepare(root / 'raw', root / 'parts', '--shard', f'{number}/3') == 0
    return root


@pytest.fixture
def parts(example, tmp_path):
    return shutil.copytree(example / 'parts', tmp_path / 'parts')


def merge(example, save_path, *extra) -> int:
    return prepare(example / 'raw', save_path, '--merge', *extra)


def test_merged_shards_are_what_one_run_writes_and_nothing_is_copied(example, parts, capsys):
    with pytest.raises(UserError, match='train is prepared in shards.*--merge'):
        InterHandDataset(parts, 'train')
    assert find_shards(parts / 'train') == {Shard(number, 3): True for number in (1, 2, 3)}
    kept = [len(os.listdir(parts / f'train.shard-{number}-of-3' / 'img')) for number in (1, 2, 3)]
    assert sum(kept) == 7 and all(0 < k < 4 for k in kept)  # something is skipped in each
    third = (parts / 'train.shard-3-of-3' / 'mask' / '0.jpg').stat().st_ino
    assert merge(example, parts) == 0
    assert 'train: 7 of 14 frames kept' in capsys.readouterr().out
    assert contents(parts) == contents(example / 'whole')
    assert sorted(path.name for path in parts.iterdir()) == ['hand_model.json', 'train']
    assert (parts / 'train' / 'mask' / f'{sum(kept[:2])}.jpg').stat().st_ino == third
    assert InterHandDataset(parts, 'train')[6].index == 6
    for extra in (('--merge',), ('--shard', '2/3'), ()):
        assert prepare(example / 'raw', parts, *extra) == 0
        assert 'already complete' in capsys.readouterr().out
        assert contents(parts) == contents(example / 'whole')


def test_images_are_copied_where_links_are_unsupported(example, parts, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, 'Operation not permitted')

    monkeypatch.setattr(os, 'link', refuse)
    assert merge(example, parts) == 0
    assert contents(parts) == contents(example / 'whole')


def test_empty_shards_do_no_harm(example, tmp_path):
    for number in range(1, 9):  # there are six chunks
        assert prepare(example / 'raw', tmp_path, '--shard', f'{number}/8') == 0
    assert merge(example, tmp_path) == 0
    assert contents(tmp_path) == contents(example / 'whole')


@pytest.mark.parametrize('frames, of', [(0, 3), (1, 1), (7, 3), (1000, 64), (999, 7)])
def test_shards_are_balanced_whole_chunks_without_gap_or_overlap(frames, of):
    bounds = [Shard(number, of).bounds(frames, 32) for number in range(1, of + 1)]
    assert [begin for begin, _ in bounds] == [0, *(end for _, end in bounds[:-1])] and bounds[-1][1] == frames
    assert all(begin % 32 == 0 or begin == frames for begin, _ in bounds)
    chunks = [-(-(end - begin) // 32) for begin, end in bounds]
    assert max(chunks) - min(chunks) <= 1


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_an_interrupted_shard_resumes(example, parts, monkeypatch, capsys):
    folder, calls = parts / 'train.shard-2-of-3', []
    shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        patch.setattr(preparation, 'finish', interrupt)
        assert prepare(example / 'raw', parts, '--shard', '2/3') == 130
    assert not folder.exists() and merge(example, parts) == 2
    assert 'of 3 shards, unfinished: 2; run these again (--shard i/3)' in capsys.readouterr().err
    monkeypatch.setattr(preparation, 'frame_task', lambda *a: calls.append(a))
    assert prepare(example / 'raw', parts, '--shard', '2/3') == 0
    assert not calls and contents(folder) == contents(example / 'parts' / folder.name)


@pytest.mark.parametrize('samples', [0, 1, 3, 6])
def test_a_merge_interrupted_among_the_samples_loses_nothing_and_resumes(example, parts, monkeypatch, samples):
    take_over, calls = shards._take_over, []

    def interrupted(folder, number, partial, index):
        calls.append(index)
        if len(calls) > samples:
            (partial / 'anno' / f'{index}.pkl').write_bytes(b'half a fi')
            raise KeyboardInterrupt
        take_over(folder, number, partial, index)

    monkeypatch.setattr(shards, '_take_over', interrupted)
    assert merge(example, parts) == 130
    assert not (parts / 'train').exists()
    for folder in parts.glob('train.shard-*'):
        assert contents(folder) == contents(example / 'parts' / folder.name)
    monkeypatch.setattr(shards, '_take_over', take_over)
    assert merge(example, parts) == 0
    assert contents(parts) == contents(example / 'whole')


def test_a_merge_interrupted_before_its_last_rename_resumes(example, parts, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shards, 'finish', interrupt)
        assert merge(example, parts) == 130
    monkeypatch.setattr(shards, '_take_over', None)  # all of them are there
    assert merge(example, parts) == 0
    assert contents(parts) == contents(example / 'whole')


@pytest.mark.parametrize('again', [('--merge',), ()])
def test_a_merge_interrupted_while_it_removes_the_shards_resumes(example, parts, monkeypatch, again):
    def half(folder):
        os.unlink(folder / 'preparation.json')
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, 'rmtree', half)
        assert merge(example, parts) == 130
    assert len(list(parts.glob('train.shard-*'))) == 3
    assert prepare(example / 'raw', parts, *again) == 0
    assert contents(parts) == contents(example / 'whole')


def test_a_merge_starts_again_when_a_shard_has_been_prepared_again(example, parts, tmp_path, monkeypatch):
    raw = shutil.copytree(example / 'raw', tmp_path / 'raw')
    with monkeypatch.context() as patch:
        patch.setattr(shards, 'finish', interrupt)
        assert prepare(raw, parts, '--merge') == 130
    images = json.loads((raw / 'annotations/train/InterHand2.6M_train_data.json').read_text())['images']
    cv2.imwrite(str(raw / 'images' / 'train' / images[0]['file_name']), np.zeros((334, 512, 3), np.uint8))
    shutil.rmtree(parts / 'train.shard-1-of-3')
    assert prepare(raw, parts, '--shard', '1/3') == 0 and prepare(raw, parts, '--merge') == 0
    assert prepare(raw, tmp_path / 'whole') == 0
    path = parts / 'train' / 'preparation.json'  # names the tree that a shard was prepared from
    path.write_text(path.read_text().replace(str(example / 'raw'), str(raw)))
    assert record(parts)['kept'] == 6 and contents(parts) == contents(tmp_path / 'whole')


def test_heavy_damage_is_refused_in_its_shard_and_in_the_whole(example, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('dataset.prepare.skips.TOLERATED_FRAMES', 0)
    monkeypatch.setattr('dataset.prepare.skips.TOLERATED_SHARE', 0.2)
    shutil.rmtree(parts / 'train.shard-2-of-3')
    assert prepare(example / 'raw', parts, '--shard', '2/3') == 2
    assert '2 of 4 frames of train, shard 2/3 in' in capsys.readouterr().err
    assert prepare(example / 'raw', tmp_path, '--shard', '1/3') == 0  # none
    shutil.copytree(example / 'parts', parts, dirs_exist_ok=True)
    shutil.rmtree(parts / 'train.shard-2-of-3.partial')
    assert merge(example, parts) == 2
    assert '4 of 14 frames of train in' in capsys.readouterr().err and not (parts / 'train.partial').exists()
    monkeypatch.setattr('dataset.prepare.skips.TOLERATED_SHARE', 0.3)
    assert merge(example, parts) == 0


def test_damaged_annotations_are_refused_before_the_first_image(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('dataset.prepare.skips.TOLERATED_FRAMES', 0)
    assert prepare(example / 'raw', tmp_path, '--shard', '1/3') == 2
    assert '1 of 14 frames of train in' in capsys.readouterr().err


def edit_record(parts, change) -> None:
    path = parts / 'train.shard-2-of-3' / 'preparation.json'
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def spoil_shard_above_all(parts):
    return ('--shard', '4/3'), '--shard is 4/3; it must be i/n with i from 1 to n'


def spoil_shard_zero(parts):
    return ('--shard', '0/3'), '--shard is 0/3'


def spoil_shard_word(parts):
    return ('--shard', 'x'), '--shard is x;'


def spoil_both(parts):
    return ('--merge', '--shard', '1/3'), 'pass only one of them'


def spoil_no_shards(parts):
    for folder in parts.glob('train.*'):
        shutil.rmtree(folder)
    return ('--merge',), 'has no shards of train'


def spoil_missing(parts):
    shutil.rmtree(parts / 'train.shard-1-of-3')
    (parts / 'train.shard-2-of-3').rename(parts / 'train.shard-2-of-3.partial')
    return ('--merge',), 'of 3 shards, missing: 1; unfinished: 2'


def spoil_other_count(parts):
    (parts / 'train.shard-4-of-5.partial').mkdir()
    return ('--merge',), 'into 3 and into 5 shards'


def spoil_other_count_now(parts):
    return ('--shard', '1/4'), 'into 3 and into 4 shards'


def spoil_no_shard_now(parts):
    return (), 'holds shards of train: merge them with --merge'


def spoil_settings(parts):
    edit_record(parts, lambda content: content['settings'].update(renderer='pytorch3d'))
    return ('--merge',), 'train.shard-2-of-3 was created with other settings (renderer was pytorch3d, now torch)'


def spoil_record(parts):
    edit_record(parts, lambda content: content.pop('shard'))
    return ('--merge',), 'is not the record of a shard (Object missing required field `shard`)'


def spoil_record_of_another(parts):
    edit_record(parts, lambda content: content['shard'].update(number=1))
    return ('--merge',), 'that is not this shard'


def spoil_count(parts):
    edit_record(parts, lambda content: content.update(kept=content['kept'] + 1))
    return ('--merge',), 'that is not this shard'


def spoil_overlap(parts):
    edit_record(
        parts,
        lambda content: content['shard'].update(begin=content['shard']['begin'] - 2, end=content['shard']['end'] - 2),
    )
    return ('--merge',), 'does not fit the other shards'


def spoil_selection(parts):
    for number, end in zip((1, 2, 3), (4, 8, 12)):
        path = parts / f'train.shard-{number}-of-3' / 'preparation.json'
        content = json.loads(path.read_text())
        content['shard'] |= {'selected': 12, 'begin': end - 4, 'end': end}
        content['skipped_image_ids']['hands behind the camera'] = [0] * (
            4 - content['kept'] - sum(map(len, content['skipped_image_ids'].values()))
        )
        path.write_text(json.dumps(content))
    return ('--merge',), 'the annotation files have changed'


def spoil_file_missing(parts):
    (parts / 'train.shard-2-of-3' / 'dense' / '0.jpg').unlink()
    return ('--merge',), '1 missing, 0 too many'


def spoil_file_renamed(parts):
    folder = parts / 'train.shard-2-of-3' / 'dense'
    (folder / '0.jpg').rename(folder / '00.jpg')
    return ('--merge',), '1 missing, 1 too many'


def spoil_counts_beyond_memory(parts):
    path = parts / 'train.shard-2-of-3' / 'preparation.json'
    content = json.loads(path.read_text())
    content['shard']['end'] += 10**15
    content['kept'] += 10**15
    path.write_text(json.dumps(content))
    return ('--merge',), 'files that preparation.json records: 1,000,000,000,000,000 missing'


def spoil_folder_missing(parts):
    shutil.rmtree(parts / 'train.shard-2-of-3' / 'mask')
    return ('--merge',), 'mask does not hold the'


def spoil_annotation(parts):
    shutil.copy(parts / 'train.shard-3-of-3/anno/1.pkl', parts / 'train.shard-3-of-3/anno/0.pkl')
    return ('--merge',), 'is not the annotation of sample 0'


def spoil_begun_whole(parts):
    Journal(parts / 'train.partial' / 'journal.jsonl').begin({'format': 1})
    return ('--merge',), 'train.partial was begun by a command without --shard'


def spoil_begun_whole_now(parts):
    shutil.rmtree(parts / 'train.shard-2-of-3')
    Journal(parts / 'train.partial' / 'journal.jsonl').begin({'format': 1})
    return ('--shard', '2/3'), 'train.partial was begun by a command without --shard'


def spoil_merge_without_shards(parts):
    Journal(parts / 'train.partial' / 'journal.jsonl').begin({'merge': {}})
    for folder in parts.glob('train.shard-*'):
        shutil.rmtree(folder)
    return (), 'is an interrupted merge of shards'


@pytest.mark.parametrize(
    'spoil',
    [value for name, value in list(globals().items()) if name.startswith('spoil_')],
    ids=lambda f: f.__name__.removeprefix('spoil_'),
)
def test_bad_input_is_one_sentence_and_exit_code_2(example, parts, spoil, capsys):
    extra, message = spoil(parts)
    before = contents(parts)
    assert prepare(example / 'raw', parts, *extra) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1 and message in errors[0]
    assert not (parts / 'train').exists()
    assert before.items() <= contents(parts).items()


def test_many_missing_shards_are_not_all_listed(example, tmp_path, capsys):
    (tmp_path / 'train.shard-1-of-64').mkdir()
    assert merge(example, tmp_path) == 2
    assert 'of 64 shards, missing: 2, 3, 4' in (error := capsys.readouterr().err) and ', 21, ...; run' in error


def test_shards_are_written_as_a_fraction():
    assert parse_shard('3/64') == Shard(3, 64) and str(Shard(3, 64)) == '3/64'
