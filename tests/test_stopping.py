"""Stop signals: what they do to a process before, during and after its work, and to its workers."""

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from multiprocessing import get_context
from pathlib import Path

import pytest

from utils import stopping
from utils.errors import user_facing
from utils.stopping import (
    STOP_SIGNALS,
    Stopped,
    StopRequest,
    holding_stop_signals,
    output_of,
    saying_kept,
    shield_worker,
    unwinding_at_stop_signals,
)

ROOT = Path(__file__).resolve().parents[1]
ALL = pytest.mark.parametrize('number', STOP_SIGNALS, ids=lambda number: number.name)


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def script(code: str, **environment: str) -> subprocess.Popen:
    """A process that runs ``code``; returns when it has printed its first line."""
    process = subprocess.Popen(
        [sys.executable, '-c', code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    process.first_line = process.stdout.readline().strip()
    return process


def gone(pid: int, within_s: float = 25.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            if 'State:\tZ' in Path(f'/proc/{pid}/status').read_text():
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


# Before the work


@ALL
def test_a_signal_before_the_work_ends_the_process_with_its_exit_code(number):
    process = script(
        'from utils.stopping import end_at_stop_signals as e; e(); print("ready", flush=True); import time; '
        'time.sleep(30)'
    )
    process.send_signal(number)
    output, errors = process.communicate(timeout=25)
    assert process.returncode == 128 + number
    assert errors == f'Stopped by {number.name} before the work began.\n' and output == ''


def test_nohup_is_respected():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    signal.raise_signal(signal.SIGHUP)
    assert not stop.requested


def test_a_process_of_torchrun_stops_when_its_launcher_is_killed(tmp_path):
    """Nobody else would tell it: it would go on, and keep its run folder."""
    code = (
        'import sys, time; from utils import stopping; stopping.PARENT_CHECKS_S = 0.05\n'
        'stopping.end_at_stop_signals(); print("ready", flush=True); time.sleep(30)'
    )
    launcher = script(
        f'import subprocess, sys; p = subprocess.Popen([sys.executable, "-c", {code!r}], stdout=subprocess.PIPE)\n'
        'p.stdout.readline(); print(p.pid, flush=True); p.wait()',
        TORCHELASTIC_RUN_ID='none',
    )
    launcher.kill()
    launcher.wait()
    assert gone(int(launcher.first_line))
    assert 'Stopped by SIGTERM' in launcher.stderr.read()


# While nothing can be lost


@ALL
def test_a_command_ends_in_one_sentence(number, capsys):
    @user_facing
    def main():
        signal.raise_signal(number)
        raise AssertionError('not reached')

    before = signal.getsignal(number)
    assert main() == 128 + number
    assert capsys.readouterr().err.strip().splitlines() == [
        f'Stopped by {number.name}. Finished work is kept; rerun the same command to continue.'
    ]
    assert signal.getsignal(number) == before


def test_only_the_first_process_of_torchrun_prints_it(monkeypatch, capsys):
    monkeypatch.setenv('RANK', '1')
    assert user_facing(lambda: signal.raise_signal(signal.SIGTERM))() == 143
    assert capsys.readouterr().err == ''


# While there is a state to save


@ALL
def test_a_signal_is_noted_and_further_ones_do_no_harm(number):
    stop = StopRequest()
    assert not stop.requested and stop.exit_code == 0
    for sent in (number, *STOP_SIGNALS):
        signal.raise_signal(sent)
    assert stop.requested and stop.exit_code == 128 + number


def test_a_later_ctrl_c_ends_at_once(monkeypatch):
    stop = StopRequest(patience_s=0.0)
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')  # which forwards the first one
    signal.raise_signal(signal.SIGINT)
    assert stop.exit_code == 143


@ALL
def test_an_interruptible_block_is_left_at_once(number):
    stop = StopRequest()
    with pytest.raises(Stopped, match=f'Stopped by {number.name}'), stop.interruptible():
        signal.raise_signal(number)
        raise AssertionError('not reached')
    entered = False
    with pytest.raises(Stopped), stop.interruptible():  # it is not entered again
        entered = True
    assert not entered
    signal.raise_signal(number)  # outside, it is only noted


# Workers


def send(pid: int, number: int) -> None:
    """From a process that is not the worker's parent."""
    subprocess.run(['kill', f'-{int(number)}', str(pid)], check=True)


def sleep_shielded(ready, unshielded_s: float = 0.0):
    time.sleep(unshielded_s)
    shield_worker()
    ready.set()
    time.sleep(30)


def start(unshielded_s: float = 0.0):
    context = get_context('fork')
    ready = context.Event()
    process = context.Process(target=sleep_shielded, args=(ready, unshielded_s), daemon=True)
    process.start()
    return process, ready


class Closing:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


def drop_an_object():
    Closing()


def drop_what_a_weak_reference_watches():
    watched = type('Watched', (), {})()
    weakref.finalize(watched, signal.raise_signal, signal.SIGTERM)


@pytest.mark.parametrize('block', [unwinding_at_stop_signals, lambda: StopRequest().interruptible()])
@pytest.mark.parametrize('drop', [drop_an_object, drop_what_a_weak_reference_watches])
def test_a_signal_within_a_destructor_is_not_lost(block, drop, capfd):
    """Python prints what is raised there, and goes on."""
    with pytest.raises(Stopped), block():
        drop()
        time.sleep(25)
    assert capfd.readouterr().err == ''


class Waiting:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # does not begin a second series
        time.sleep(25)


def test_a_destructor_that_does_not_end_is_interrupted(monkeypatch):
    forgotten = []
    monkeypatch.setattr(sys, 'unraisablehook', forgotten.append)
    monkeypatch.setattr(stopping, 'RESENDING_S', 0.5)
    begin, request = time.monotonic(), StopRequest()
    with request.interruptible():
        Waiting()
    assert request.number == signal.SIGTERM and time.monotonic() - begin < 20
    assert [each.exc_type for each in forgotten] == [Stopped]  # Python prints it, and goes on


def test_a_shielded_worker_survives_every_stop_signal_but_its_parents():
    process, ready = start()
    assert ready.wait(25)
    for number in STOP_SIGNALS:
        send(process.pid, number)
    time.sleep(0.1)
    assert process.is_alive()
    process.terminate()  # TERM
    process.join(5)
    assert not process.is_alive()


def test_a_worker_survives_a_signal_that_comes_before_its_shield():
    with holding_stop_signals():
        process, ready = start(unshielded_s=0.3)
    for number in STOP_SIGNALS:
        send(process.pid, number)
    assert ready.wait(25)
    assert process.is_alive()
    process.kill()
    process.join()


def test_held_signals_arrive_after_the_block():
    stop = StopRequest()
    with holding_stop_signals():
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        time.sleep(0.01)
        assert not stop.requested
    assert stop.requested


@pytest.mark.parametrize('prctl', [True, False])
def test_a_worker_ends_when_its_parent_is_killed(prctl):
    no_prctl = 'class Broken:\n    def CDLL(self, name): raise OSError\nstopping.ctypes = Broken()\n'
    parent = script(
        'import time; from multiprocessing import get_context; from utils import stopping\n'
        f'stopping.PARENT_CHECKS_S = 0.05\n{"" if prctl else no_prctl}'
        'def work():\n    stopping.shield_worker(); print("shielded\\n", end="", flush=True); time.sleep(30)\n'
        'p = get_context("fork").Process(target=work); p.start(); print(f"{p.pid}\\n", end="", flush=True); p.join()'
    )
    lines = {parent.first_line, parent.stdout.readline().strip()}
    (worker,) = lines - {'shielded'}
    parent.kill()
    parent.wait()
    assert gone(int(worker))


def test_a_worker_whose_parent_has_ended_before_its_shield_ends_too():
    context = get_context('fork')
    process = context.Process(target=shield_then_sleep, args=(2**22 + 1,))  # no process has this id
    process.start()
    process.join(5)
    assert process.exitcode == 1


def shield_then_sleep(parent: int):
    shield_worker(parent)
    time.sleep(30)


def test_the_output_of_a_command_or_the_last_line_of_its_failure():
    assert output_of([sys.executable, '-c', 'print(3)']) == '3\n'
    for code, line in (
        ('1 / 0', 'ZeroDivisionError'),
        ('import sys; sys.exit("error: no data")', ': no data'),
        ('exit(3)', '3: it wrote'),
    ):
        with pytest.raises(RuntimeError, match=f'exit code [13]: .*|{line}') as caught:
            output_of([sys.executable, '-c', code])
        assert line in str(caught.value) and 'error: ' not in str(caught.value)


CLEARING_UP = """
import os, time
from utils.errors import user_facing
@user_facing
def main():
    try:
        os.mkdir({path!r})
        time.sleep(60)
    finally:
        os.rmdir({path!r})
main()
"""


def test_a_stop_lets_a_measuring_process_clear_up(tmp_path):
    path = tmp_path / 'temporary'
    code = (
        'import sys\nfrom utils.errors import user_facing\nfrom utils.stopping import output_of, saying_kept\n'
        f'def main():\n  print(1, flush=True)\n  with saying_kept("Nothing."):\n'
        f'    output_of([sys.executable, "-c", {CLEARING_UP.format(path=str(path))!r}])\nsys.exit(user_facing(main)())'
    )
    process = script(code)
    deadline = time.monotonic() + 30
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143 and errors.strip() == 'Stopped by SIGTERM. Nothing.'
    assert not path.exists()


def test_a_stop_tells_what_is_kept():
    with pytest.raises(Stopped, match='Stopped by SIGTERM. No figures were written.'), saying_kept():
        raise Stopped(signal.SIGTERM)


def test_importing_it_does_not_import_torch():
    """A signal during the import of torch must find the handler in place."""
    process = script('import sys; from utils import stopping; print("torch" in sys.modules)')
    process.communicate()
    assert process.first_line == 'False'
