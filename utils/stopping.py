"""Signals that ask a run to stop, and worker processes that neither die of them nor outlive their parent."""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# SLURM's scancel and time limit send TERM, `sbatch --signal=USR1@60` USR1, a closed terminal HUP, Ctrl-C INT.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1') if hasattr(signal, name)
)
_PARENT_CHECKS_S = 1.0


class Stopped(Exception):
    """A stop signal was obeyed at a safe place; ``user_facing`` turns it into exit code 128 + ``number``."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopRequest:
    """A stop signal asks for a stop at the next safe place; the next Ctrl-C after ``patience_s`` stops at once.

    A signal to a process group often arrives twice, since torchrun and schedulers forward theirs.
    """

    def __init__(self, patience_s: float = 1.0):
        self.number: int | None = None  # of the first signal
        self._first, self._patience_s = 0.0, patience_s
        for number in STOP_SIGNALS:
            signal.signal(number, self._ask)

    @property
    def requested(self) -> bool:
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as a shell reports a process that the signal ended: 143 for TERM."""
        return 0 if self.number is None else 128 + self.number

    def _ask(self, number: int, frame) -> None:
        if self.number is None:
            self.number, self._first = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._first > self._patience_s:
            raise KeyboardInterrupt


_obeyed: StopRequest | None = None  # of the innermost ``obey_stop_signals``


@contextmanager
def obey_stop_signals() -> Iterator[None]:
    """Within the block, a stop signal makes the next ``check_stop`` raise Stopped; then the old handlers return.

    A signal that was ignored before (nohup, a shell's background job) stays ignored.
    """
    global _obeyed
    before, outer = {number: signal.getsignal(number) for number in STOP_SIGNALS}, _obeyed
    try:
        _obeyed = StopRequest()
        for number in (number for number, handler in before.items() if handler is signal.SIG_IGN):
            signal.signal(number, signal.SIG_IGN)
        yield
    finally:
        _obeyed = outer
        for number, handler in before.items():
            signal.signal(number, handler)


def check_stop() -> None:
    """Raises Stopped if a stop signal has arrived within ``obey_stop_signals``: call it between two units of work."""
    if _obeyed is not None and _obeyed.number is not None:
        raise Stopped(_obeyed.number)


@contextmanager
def blocked_stop_signals() -> Iterator[None]:
    """Hold stop signals back within the block: processes started in it are born deaf to them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def shield_worker(parent: int | None = None) -> None:
    """Call first in a worker process: ignore stop signals, which are for the parent, and end when the parent does.

    parent: its process id, if the worker may have been orphaned before this call; by default the current parent.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid() if parent is None else parent
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: Linux, when the forking thread ends
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """The portable form, and the one for a parent that died before ``prctl``."""
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECKS_S)
    os._exit(1)
