"""Signals that ask a run to stop, and worker processes that neither die of them nor outlive their parent.

A process meets a stop signal in one of three ways: before its work begins it ends at once (``end_at_stop_signals``);
while nothing can be lost it unwinds (``Stopped``); while there is a state to save it notes the request
(``StopRequest``) and leaves at the next safe place. The exit code is 128 + the signal's number each time.
"""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

# SLURM's scancel and time limit send TERM, `sbatch --signal=USR1@60` USR1, a closed terminal HUP, Ctrl-C INT.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1') if hasattr(signal, name)
)
PARENT_CHECKS_S = 1.0
CHILD_CHECKS_S = 0.2
RESEND_S, RESENDING_S = 0.05, 5.0
# Callbacks of weak references run in these modules, among other code.
_CALLBACKS = ('weakref', '_weakrefset', 'multiprocessing.util', 'torch.utils.weak')
_resent: dict[int, tuple[float, float]] = {}  # signal -> since when it is sent again, and when the next one is due
_watched: set[int] = set()  # ids of the processes that already watch their launcher


class Stopped(BaseException):
    """A stop signal ended the command; ``user_facing`` prints this as one sentence and returns ``exit_code``."""

    def __init__(self, number: int, kept: str = 'Finished work is kept; rerun the same command to continue.'):
        self.number = number
        super().__init__(f'Stopped by {signal.Signals(number).name}. {kept}')

    @property
    def exit_code(self) -> int:
        return exit_code(self.number)


def exit_code(number: int) -> int:
    """128 + the signal's number, as a shell reports a process that the signal ended: 143 for TERM."""
    return 128 + number


def under_torchrun() -> bool:
    return 'TORCHELASTIC_RUN_ID' in os.environ


def first_process() -> bool:
    """Whether this process prints, before it has joined the others of ``torchrun``."""
    return os.environ.get('RANK', '0') == '0'


def end_at_stop_signals() -> None:
    """End the process at a stop signal, with one sentence. Call it before slow imports: nothing can be lost yet.

    An exception would not do: it could be raised, and swallowed, anywhere in the imported code.
    """
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner and first_process():
            os.write(2, f'Stopped by {signal.Signals(number).name} before the work began.\n'.encode())
        os._exit(exit_code(number))

    _handle(end)
    _follow_launcher()


@contextmanager
def unwinding_at_stop_signals() -> Iterator[None]:
    """Raise ``Stopped`` at a stop signal within the block; the previous handlers return after it."""
    owner = os.getpid()

    def unwind(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            return  # a worker that has not shielded itself yet
        if not _postponed(number, frame):
            raise Stopped(number)

    with _restoring_handlers():
        _handle(unwind)
        _follow_launcher()
        yield


class StopRequest:
    """A stop signal asks for a stop at the next safe place; the next Ctrl-C after ``patience_s`` stops at once.

    Every other further signal is ignored: one to a process group arrives twice, since torchrun and schedulers forward
    theirs. Under torchrun that includes Ctrl-C.
    """

    def __init__(self, patience_s: float = 1.0):
        self.number: int | None = None  # of the first signal
        self._first, self._patience_s, self._interruptible, self._owner = 0.0, patience_s, False, os.getpid()
        _handle(self._ask)

    @property
    def requested(self) -> bool:
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number; 0 if there was none."""
        return 0 if self.number is None else exit_code(self.number)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within the block nothing can be lost: a stop signal, also an earlier one, raises ``Stopped`` at once."""
        self._interruptible = True  # first: a signal between the two lines must not be missed
        try:
            if self.number is not None:
                raise Stopped(self.number)
            yield
        finally:
            self._interruptible = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return  # a worker that has not shielded itself yet
        if self.number is None:
            if self._interruptible and _postponed(number, frame):
                return
            self.number, self._first = number, time.monotonic()
            if self._interruptible:
                raise Stopped(number)
        elif number == signal.SIGINT and not under_torchrun() and time.monotonic() - self._first > self._patience_s:
            raise KeyboardInterrupt


def _postponed(number: int, frame: FrameType | None) -> bool:
    """Whether an exception raised in ``frame`` would be printed and forgotten; if so, send the signal once more soon.

    That is what happens to those of destructors and of callbacks of weak references. One that does not end within
    ``RESENDING_S`` is interrupted nevertheless.
    """
    now = time.monotonic()
    while frame is not None:
        if frame.f_code.co_name == '__del__' or frame.f_globals.get('__name__') in _CALLBACKS:
            break
        frame = frame.f_back
    begin, due = _resent.get(number, (now, now))
    if frame is None or now - begin > RESENDING_S:
        _resent.pop(number, None)
        return False
    if now >= due:  # else the last one is still under way
        _resent[number] = (begin, now + RESEND_S)
        again = threading.Timer(RESEND_S, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
    return True


def _handle(handler: Callable[[int, FrameType | None], None]) -> None:
    with suppress(ValueError):  # not the main thread, which alone may set handlers
        for number in STOP_SIGNALS:
            if number != signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup: the caller wants this process to survive a closed terminal
            signal.signal(number, handler)


@contextmanager
def _restoring_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        with suppress(ValueError):  # not the main thread, which alone may set handlers
            for number, handler in before.items():
                signal.signal(number, handler)


_obeyed: StopRequest | None = None  # of the innermost ``obey_stop_signals``


@contextmanager
def obey_stop_signals() -> Iterator[None]:
    """Within the block, a stop signal makes the next ``check_stop`` raise ``Stopped``; then the old handlers return."""
    global _obeyed
    outer = _obeyed
    with _restoring_handlers():
        _obeyed = StopRequest()
        try:
            yield
        finally:
            _obeyed = outer


def requested_stop() -> int | None:
    """The stop signal that has arrived within ``obey_stop_signals``."""
    return None if _obeyed is None else _obeyed.number


def check_stop() -> None:
    """Raise ``Stopped`` if a stop signal has arrived within ``obey_stop_signals``: call it between units of work."""
    if (number := requested_stop()) is not None:
        raise Stopped(number)


def run_passing_stops(command: Sequence[str], **options: Any) -> int:
    """Run a command to its end, with ``subprocess.Popen``'s options -> its exit code, negative for a signal's number.

    A stop signal within ``obey_stop_signals`` is passed on to it, once: a group's signal has reached it already.
    """
    process = subprocess.Popen(command, **options)
    passed_on = False
    while process.poll() is None:
        try:
            process.wait(CHILD_CHECKS_S)
        except subprocess.TimeoutExpired:
            if not passed_on and (number := requested_stop()) is not None:
                process.send_signal(number)
                passed_on = True
    return process.returncode


def output_of(command: Sequence[str | os.PathLike[str]], **options: Any) -> str:
    """Run a command to its end, with ``subprocess.Popen``'s options -> its standard output.

    A stop signal, or any other exception here, ends it with TERM, so that it clears up too. Raises RuntimeError with
    the last line that it wrote if it fails.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    try:
        output, errors = process.communicate()
    except BaseException:
        process.terminate()
        process.communicate()
        raise
    if process.returncode:
        last = next((line for line in reversed(errors.splitlines()) if line.strip()), 'it wrote nothing')
        raise RuntimeError(f'exit code {process.returncode}: {last.removeprefix("error: ")}')
    return output


@contextmanager
def saying_kept(kept: str = 'No figures were written.') -> Iterator[None]:
    """Within the block, ``Stopped`` tells this instead of promising that a rerun continues."""
    try:
        yield
    except Stopped as stop:
        raise Stopped(stop.number, kept) from None


@contextmanager
def holding_stop_signals() -> Iterator[None]:
    """Block stop signals in this thread, and so in the processes that it forks, which then call ``shield_worker``.

    Other threads may still receive one for this process.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def shield_worker(parent: int | None = None) -> None:
    """Call first in a worker process: ignore stop signals, which are for the parent, and end when the parent does.

    The parent itself can end it with TERM, as multiprocessing does, but only on Linux. parent: its process id, if the
    worker may have been orphaned before this call; by default the current parent.
    """
    for number in STOP_SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, 'sigtimedwait'):  # which tells who sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = os.getppid() if parent is None else parent
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: Linux, when the forking thread ends
    creator = multiprocessing.parent_process()  # not the parent where a server forks
    threading.Thread(target=_end_with, args=(parent, creator and creator.pid), daemon=True).start()


def _end_with(parent: int, creator: int | None) -> None:
    """End with the parent, also where ``prctl`` is missing or came too late, or at its or the creator's TERM."""
    while os.getppid() == parent:
        if not hasattr(signal, 'sigtimedwait'):
            time.sleep(PARENT_CHECKS_S)
        elif (sent := signal.sigtimedwait([signal.SIGTERM], PARENT_CHECKS_S)) and sent.si_pid in (parent, creator):
            break
    os._exit(1)


def _follow_launcher() -> None:
    """Ask this process of ``torchrun`` to stop when its launcher is killed, which nobody else would tell it."""
    if under_torchrun() and os.getpid() not in _watched:
        _watched.add(os.getpid())
        threading.Thread(target=_stop_with, args=(os.getppid(),), daemon=True).start()


def _stop_with(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(PARENT_CHECKS_S)
    print('torchrun has ended; this process stops, too.', file=sys.stderr)
    os.kill(os.getpid(), signal.SIGTERM)
