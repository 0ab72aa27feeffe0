"""A second process for tests of ownership and of failing disks."""

import io
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from utils.ownership import owned


@contextmanager
def owned_elsewhere(path: Path) -> Iterator[int]:
    """Another process owns ``path`` within the block; yields its id."""
    owns, ready = os.pipe()
    leave, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(end)
            with owned(path):
                os.write(ready, b'1')
                os.read(leave, 1)  # until the other end is closed
        finally:
            os._exit(0)
    os.close(ready)
    os.close(leave)
    try:
        assert os.read(owns, 1) == b'1'
        yield pid
    finally:
        os.close(end)
        os.close(owns)
        os.waitpid(pid, 0)


def on_a_full_disk(main: Callable[[list[str]], int], arguments: list[str], *, largest: int) -> tuple[int, str]:
    """Run a command in a process whose files cannot exceed ``largest`` bytes -> exit code, stderr."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
            with open(write, 'w') as pipe, redirect_stderr(pipe), redirect_stdout(io.StringIO()):
                code = main(arguments)
        finally:
            os._exit(code)
    os.close(write)
    with open(read, 'rb') as pipe:
        text = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text
