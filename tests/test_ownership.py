import errno
import fcntl
import json
import os
import socket
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.ownership import lock_path, owned


def own(folder: Path, seconds: float, ready) -> None:
    with owned(folder):
        ready.set()
        time.sleep(seconds)


@pytest.fixture
def other():
    """Start another process that owns a folder, for some seconds."""
    context, started = get_context('fork'), []

    def start(folder: Path, seconds: float = 30.0):
        ready = context.Event()
        process = context.Process(target=own, args=(folder, seconds, ready))
        started.append(process)
        process.start()
        assert ready.wait(10)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def test_a_second_process_is_refused_by_host_and_process(other, tmp_path):
    owner = other(tmp_path / 'run')
    with (
        pytest.raises(UserError, match=f'process {owner.pid} on {socket.gethostname()} since'),
        owned(tmp_path / 'run'),
    ):
        pass
    with owned(tmp_path / 'run2'):  # another folder is free
        pass


def test_one_folder_by_two_names_has_one_owner(other, tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'link').symlink_to('run')
    other(tmp_path / 'run')
    for name in ('link', 'run/../link', './run/'):
        with pytest.raises(UserError, match='is in use by process'), owned(tmp_path / name):
            pass


def test_a_process_does_not_own_a_folder_twice(tmp_path):
    with owned(tmp_path / 'run'):
        with pytest.raises(UserError, match='already in use by this process'), owned(tmp_path / 'run'):
            pass
        with pytest.raises(UserError), owned(tmp_path / 'run'):
            pass
    with owned(tmp_path / 'run'):
        pass
    assert list(tmp_path.iterdir()) == []  # no lock file stays


def test_a_killed_owner_and_a_stale_file_exclude_nobody(other, tmp_path):
    owner = other(tmp_path / 'run')
    owner.kill()
    owner.join()
    assert json.loads(lock_path(tmp_path / 'run').read_text())['pid'] == owner.pid  # stale
    with owned(tmp_path / 'run'):
        assert json.loads(lock_path(tmp_path / 'run').read_text())['pid'] == os.getpid()
    lock_path(tmp_path / 'run').write_text('no JSON')
    with owned(tmp_path / 'run'):
        pass


def test_waiting_for_the_previous_owner(other, tmp_path, capsys):
    other(tmp_path / 'run', seconds=1)
    begin = time.monotonic()
    with owned(tmp_path / 'run', wait_s=60):
        assert 0.1 < time.monotonic() - begin < 50
    assert capsys.readouterr().err.count('Waiting for') == 1
    other(tmp_path / 'run')
    with pytest.raises(UserError, match='is in use by'), owned(tmp_path / 'run', wait_s=0.1):
        pass


def test_the_lock_lies_inside_a_folder_whose_parent_is_read_only(tmp_path, monkeypatch):
    (tmp_path / 'run').mkdir()
    monkeypatch.setattr(os, 'access', lambda path, mode: Path(path) != tmp_path)
    assert lock_path(tmp_path / 'run') == tmp_path / 'run' / '.lock'
    with owned(tmp_path / 'run'):
        assert lock_path(tmp_path / 'run').exists()
    assert list((tmp_path / 'run').iterdir()) == []


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(fcntl, 'lockf', refuse)
    with owned(tmp_path / 'run'):
        pass
    assert 'has no locks (No locks available)' in capsys.readouterr().err


@pytest.mark.parametrize('number', [errno.EIO, errno.EBADF])
def test_an_error_of_the_disk_is_no_owner(tmp_path, monkeypatch, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, 'lockf', refuse)
    with pytest.raises(OSError, match=os.strerror(number)), owned(tmp_path / 'run', wait_s=60):
        pass


def test_an_owner_whose_name_cannot_be_read_is_waited_for(tmp_path, monkeypatch, capsys):
    """As over SMB, where a locked file cannot be read."""
    real, tries = fcntl.lockf, []

    def lockf(descriptor, how):
        tries.append(how)
        if len(tries) < 3:
            raise OSError(errno.EACCES, 'Permission denied')
        real(descriptor, how)

    def pread(*args):
        raise PermissionError(errno.EACCES, 'Permission denied')

    monkeypatch.setattr(fcntl, 'lockf', lockf)
    monkeypatch.setattr(os, 'pread', pread)
    with owned(tmp_path / 'run', wait_s=60):
        assert len(tries) == 3
    assert 'in use by another process' in capsys.readouterr().err


def test_a_lock_file_of_another_user_is_named(tmp_path, monkeypatch):
    path = lock_path(tmp_path / 'run')
    path.touch()
    real = os.open

    def refuse(name, *args, **options):
        if Path(name) == path:
            raise PermissionError(errno.EACCES, 'Permission denied')
        return real(name, *args, **options)

    monkeypatch.setattr(os, 'open', refuse)
    with pytest.raises(UserError, match=rf'lock file of another user, {path}'), owned(tmp_path / 'run'):
        pass
