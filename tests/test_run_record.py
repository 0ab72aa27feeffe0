import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from utils import run_record as module
from utils.files import read_json
from utils.run_record import code_version, command_line, record_rows, run_record, write_run_record

DATA = {'train': [{'samples': 40, 'digest': 'abc' * 10}, {'samples': 2, 'digest': 'def' * 10}]}


@pytest.fixture
def start(monkeypatch):
    """Start a run -> its record."""
    monkeypatch.setattr(sys, 'argv', ['train.py', '--cfg', 'my configs/a.yaml'])

    def start(**more):
        return run_record(seed=3, hand_model='standin', data=DATA, device='cpu', **more)

    return start


def test_the_record_is_plain_and_complete(start, tmp_path):
    record = start()
    assert json.loads(json.dumps(record)) == record
    torch.save(record, tmp_path / 'a.pth')
    assert torch.load(tmp_path / 'a.pth', weights_only=True) == record
    (session,) = record['sessions']
    assert session['command'] == "train.py --cfg 'my configs/a.yaml'"
    assert session['packages']['torch'] == torch.__version__ and session['packages']['numpy'] == np.__version__
    assert session['packages']['opencv'] == cv2.__version__ and session['machine']['device'].startswith('cpu')
    write_run_record(tmp_path, record, config={'SEED': 3})
    assert read_json(tmp_path / 'run.json') == record | {'config': {'SEED': 3}}


def test_sessions_are_kept_and_equal_ones_counted(start, monkeypatch):
    record = start()
    again = start(previous=record)
    assert len(again['sessions']) == 1 and again['sessions'][0]['starts'] == 2
    assert again['sessions'][0]['started'] == record['sessions'][0]['started']
    monkeypatch.setattr(sys, 'argv', ['train.py', '--resume'])
    third = start(previous=again)
    assert [session['starts'] for session in third['sessions']] == [2, 1]
    assert ('command', 'train.py --resume') in record_rows(third)
    assert dict(record_rows(third))['started'].endswith(', 3 starts')
    assert len(record['sessions']) == 1 and record['sessions'][0]['starts'] == 1  # not changed


def test_rows_name_everything(start):
    rows = dict(record_rows(start()))
    assert rows.keys() == {'started', 'command', 'code', 'packages', 'machine', 'seed', 'hand model', 'data, train'}
    assert rows['data, train'] == '40 samples, digest abcabcabcabc; 2 samples, digest defdefdefdef'
    assert 'seed' not in dict(record_rows(run_record(hand_model='x', data={}, device='cpu')))


@pytest.mark.parametrize(
    'record',
    [
        None,
        3,
        [],
        {},
        {'sessions': 3},
        {'sessions': [3, None]},
        {'sessions': [{'code': [], 'machine': 'x', 'starts': 'y'}]},
    ],
)
def test_missing_and_foreign_records_are_shown_as_none(record, start):
    assert record_rows(record) == [('record', 'none')]
    if isinstance(record, dict):
        assert start(previous=record)['sessions'][-1]['command'].startswith('train.py')


def git(folder: Path, *arguments: str) -> str:
    identity = ['-c', 'user.name=a', '-c', 'user.email=a@b.c', '-c', 'commit.gpgsign=false']
    done = subprocess.run(['git', '-C', folder, *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with a tracked file a.py, in place of this one."""
    monkeypatch.setattr(module, '_CHECKOUT', tmp_path)
    git(tmp_path, 'init', '-q')
    (tmp_path / 'a.py').write_text('1\n')
    git(tmp_path, 'add', 'a.py')
    git(tmp_path, 'commit', '-qm', 'First')
    return tmp_path


def test_code_version_is_the_commit_of_the_checkout(checkout, monkeypatch):
    commit = git(checkout, 'rev-parse', 'HEAD')
    monkeypatch.chdir('/')  # the working folder does not matter
    monkeypatch.setenv('GIT_DIR', '/nowhere')  # nor a hook's variables
    assert code_version() == {'commit': commit, 'changed': False}
    (checkout / 'notes.txt').write_text('untracked\n')
    assert code_version()['changed'] is False
    (checkout / 'a.py').write_text('2\n')
    assert code_version() == {'commit': commit, 'changed': True}


def test_code_version_is_unknown_elsewhere(checkout, monkeypatch):
    unknown = {'commit': 'unknown', 'changed': 'unknown'}
    unpacked = checkout / 'unpacked'  # inside a repository of something else
    unpacked.mkdir()
    monkeypatch.setattr(module, '_CHECKOUT', unpacked)
    assert code_version() == unknown
    monkeypatch.setattr(module, '_CHECKOUT', checkout)
    monkeypatch.setenv('PATH', str(unpacked))  # no git
    assert code_version() == unknown


def test_a_repository_without_commits_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(module, '_CHECKOUT', tmp_path)
    git(tmp_path, 'init', '-q')
    assert code_version()['commit'] == 'unknown'


def test_command_lines_that_are_not_utf8_are_kept_readable():
    line = command_line(['train.py', b'caf\xe9'.decode(errors='surrogateescape')])
    assert line == "train.py 'caf\ufffd'" and line.encode()
