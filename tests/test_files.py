import os
import signal

import pytest

from utils.errors import UserError
from utils.files import atomic_file, partial_path, read_json, remove_stale_partials, write_atomically, write_json


def test_files_are_replaced_atomically_and_folders_created(tmp_path):
    path = tmp_path / 'a' / 'b.bin'
    write_atomically(path, b'old')
    write_atomically(path, b'new')
    assert path.read_bytes() == b'new' and os.listdir(path.parent) == ['b.bin']


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / 'b.bin'
    write_atomically(path, b'old')

    def full(_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space left'):
        write_atomically(path, b'new')
    assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['b.bin']


def test_json_round_trip_and_damage(tmp_path):
    write_json(tmp_path / 'a.json', {'x': [1, 2.5, None]})
    assert read_json(tmp_path / 'a.json') == {'x': [1, 2.5, None]}
    (tmp_path / 'a.json').write_text('{"x": [1,')
    with pytest.raises(UserError, match='a.json is not valid JSON'):
        read_json(tmp_path / 'a.json')
    with pytest.raises(UserError, match='nowhere.json does not exist'):
        read_json(tmp_path / 'nowhere.json')


def test_nan_and_infinity_become_null(tmp_path):
    write_json(tmp_path / 'a.json', {'x': [1.5, float('nan'), (float('inf'),)], 'y': {'z': -float('inf')}})
    assert read_json(tmp_path / 'a.json') == {'x': [1.5, None, [None]], 'y': {'z': None}}
    assert 'NaN' not in (tmp_path / 'a.json').read_text()


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    names = ['latest.pth', 'overlay.mp4', 'a b\n.csv', '.hidden', 'x.1', 'no suffix']
    stale = [partial_path(tmp_path / name) for name in names]
    stale += [partial_path(tmp_path / name, keep_suffix=True) for name in names]
    stale += [tmp_path / '.overlay.0123456789abcdef.partial.mp4']
    kept = [
        *names,
        '.a.partial',
        '.a.0123.partial',
        'a.0123456789abcdef.partial',
        '.a.0123456789abcdef.partial.b.c',
        '.git',
    ]
    for path in (*stale, *(tmp_path / name for name in kept)):
        path.write_bytes(b'x')
    folder = tmp_path / '.b.0123456789abcdef.partial'
    folder.mkdir()
    assert remove_stale_partials(tmp_path) == sorted(stale)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, folder.name}
    assert remove_stale_partials(tmp_path) == [] and remove_stale_partials(tmp_path / 'missing') == []


def test_subfolders_are_cleaned_on_request(tmp_path):
    inner = tmp_path / 'video' / '2'
    inner.mkdir(parents=True)
    stale = partial_path(inner / 'joints.csv')
    stale.write_bytes(b'half a table')
    assert remove_stale_partials(tmp_path) == []
    assert remove_stale_partials(tmp_path, recursive=True) == [stale]


def test_temporary_files_of_one_file_can_be_removed_alone(tmp_path):
    mine, other = partial_path(tmp_path / 'a'), partial_path(tmp_path / 'a.b', keep_suffix=True)
    for path in (mine, other):
        path.touch()
    assert remove_stale_partials(tmp_path, of='a') == [mine] and other.exists()
    assert remove_stale_partials(tmp_path, of='a.b') == [other]


def test_a_killed_write_leaves_a_file_that_is_recognised(tmp_path):
    child = os.fork()
    if child == 0:
        with atomic_file(tmp_path / 'a.csv') as file:
            file.write(b'half')
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(os.listdir(tmp_path)) == 1
    remove_stale_partials(tmp_path)
    assert os.listdir(tmp_path) == []
