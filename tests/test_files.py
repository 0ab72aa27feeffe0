import os

import pytest

from utils.errors import UserError
from utils.files import read_json, write_atomically, write_json


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
