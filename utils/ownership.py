"""One owner per folder: a lock that ends with the process that holds it, on local disks and over NFS alike."""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import UserError

_held: set[Path] = set()  # by this process, whose own POSIX locks never exclude each other
_POLL_S = 0.2
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
_LOCKED = (errno.EACCES, errno.EAGAIN)


def lock_path(folder: str | Path) -> Path:
    """The lock file of ``folder``: beside it, since the folder may be renamed or not exist yet.

    Inside it where the parent is read-only, such as a volume of a container.
    """
    folder = Path(os.path.realpath(folder))  # two links to one folder have one lock
    if folder.is_dir() and not os.access(folder.parent, os.W_OK):
        return folder / '.lock'
    return folder.with_name(f'.{folder.name}.lock')


@contextmanager
def owned(folder: str | Path, *, wait_s: float = 0.0) -> Iterator[None]:
    """Own ``folder`` within the block. Raises UserError, naming host and process, while another process owns it.

    wait_s: how long to wait for that process to end before giving up.

    The lock is a POSIX record lock (``fcntl``): the kernel drops it when the process ends, however it ends, and forked
    workers do not inherit it, so a stale lock file excludes nobody. NFS passes such locks to the server, which drops
    those of a dead client once its lease expires (NFSv4: 90 s by default). Where a file system has no locks, a
    warning is printed and the folder is used without one.
    """
    path = lock_path(folder)
    if path in _held:
        raise UserError(f'{folder} is already in use by this process.')
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, owner = _acquire(path, folder, until=time.monotonic() + wait_s), os.getpid()
    _held.add(path)
    try:
        yield
    finally:
        if os.getpid() == owner:  # and not a forked worker that leaves the block
            path.unlink(missing_ok=True)  # while still locked: whoever opened it meanwhile notices that it is gone
            os.close(descriptor)
            _held.discard(path)


def _acquire(path: Path, folder: str | Path, *, until: float) -> int:
    announced = False
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except PermissionError:
            if not path.exists():
                raise
            raise UserError(
                f'{folder} has a lock file of another user, {path}. Remove it if no process of that user writes there.'
            ) from None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                print(
                    f'Warning: the file system of {path.parent} has no locks ({error.strerror}); make sure that no '
                    'other process writes there.',
                    file=sys.stderr,
                )
            elif error.errno not in _LOCKED:
                os.close(descriptor)
                raise
            else:
                holder = _describe(descriptor)
                os.close(descriptor)
                if time.monotonic() < until:
                    if not announced:
                        print(f'Waiting for {folder}, which is in use by {holder}.', file=sys.stderr)
                    announced = True
                    time.sleep(_POLL_S)
                    continue
                raise UserError(
                    f'{folder} is in use by {holder}. Wait for it or stop it, or choose another folder.'
                ) from None
        try:
            same = os.path.samestat(os.fstat(descriptor), os.stat(path))
        except FileNotFoundError:
            same = False
        if same:
            break
        os.close(descriptor)  # its owner has removed this file meanwhile
    owner = {
        'host': socket.gethostname(),
        'pid': os.getpid(),
        'since': time.strftime('%Y-%m-%d %H:%M:%S'),
        'command': ' '.join(sys.argv)[:200],
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(owner).encode(), 0)
    return descriptor


def _describe(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
        return f'process {owner["pid"]} on {owner["host"]} since {owner["since"]} ({owner["command"]})'
    except (OSError, ValueError, KeyError, TypeError):  # OSError: SMB keeps others from reading what is locked
        return 'another process'
