"""Capture what C libraries print to standard error: for some, the only way in which they report damage."""

import fcntl
import os
import tempfile
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar('Result')

_lock = threading.Lock()


class _File:
    """A file that standard error can be redirected to; ``new`` returns what was written to it since the last call."""

    def __init__(self) -> None:
        try:
            os.fstat(2)
        except OSError:  # started without standard error
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        if hasattr(os, 'memfd_create'):
            self.descriptor = os.memfd_create('stderr')
        else:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        # Another thread's write may end late: it is appended, and found by the next call.
        fcntl.fcntl(self.descriptor, fcntl.F_SETFL, os.O_APPEND)
        self.begin = 0

    def new(self) -> bytes:
        length = os.fstat(self.descriptor).st_size - self.begin
        content = os.pread(self.descriptor, length, self.begin) if length else b''
        self.begin += length
        return content


_file: _File | None = None


def with_stderr(action: Callable[[], Result]) -> tuple[Result, str]:
    """The result of ``action`` and what was printed to standard error meanwhile, by any thread.

    Costs microseconds. Threads take turns; hand what is not yours to ``print_to_stderr``.
    """
    global _file
    with _lock:
        _file = _file or _File()
        stderr = os.dup(2)
        try:
            os.dup2(_file.descriptor, 2)
            result = action()
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        printed = _file.new()
    return result, printed.decode('utf-8', 'surrogateescape') if printed else ''


def print_to_stderr(text: str) -> None:
    """Print captured text as it was."""
    if text:
        os.write(2, text.encode('utf-8', 'surrogateescape'))


def _after_fork() -> None:
    """The file is shared with the parent process."""
    global _file
    if _file:
        os.close(_file.descriptor)
        _file = None
    _lock.release()


# No fork while standard error is redirected.
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_after_fork)
