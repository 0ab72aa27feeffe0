"""Loader processes that die, hang or run out of memory, and their end."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from dataset.loader import Loader, WorkerError

ROOT = Path(__file__).resolve().parents[1]


class Numbers(Dataset):
    """40 samples; the 20th raises ``error`` if there is one."""

    def __init__(self, error: Exception | None = None):
        self.error = error

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == 20 and self.error:
            raise self.error
        return torch.tensor(index)


def loader(error: Exception | None = None, *, workers: int = 1, limit_s: float = 60.0) -> Loader:
    return Loader(Numbers(error), num_workers=workers, limit_s=limit_s, batch_size=2)


def processes() -> list:
    return multiprocessing.active_children()


def test_the_processes_last_until_the_loader_is_closed():
    numbers = loader(workers=2)
    whole = [batch.tolist() for batch in numbers]
    first = {process.pid for process in processes()}
    assert whole == [[i, i + 1] for i in range(0, 40, 2)] and len(first) == 2
    assert [batch.tolist() for batch in numbers] == whole
    assert {process.pid for process in processes()} == first
    numbers.close()
    assert processes() == []
    assert [batch.tolist() for batch in numbers] == whole  # with new ones
    numbers.close()
    numbers.close()
    assert processes() == []


@pytest.mark.parametrize('reaped', [True, False])
def test_a_killed_process_is_reported_when_the_next_batch_is_asked_for(reaped):
    numbers = loader()
    batches = iter(numbers)
    next(batches)
    (process,) = processes()
    process.kill()
    if reaped:  # PyTorch itself does not notice this one
        process.join()
    for _ in range(20):  # where PyTorch would raise, in whatever is at work
        time.sleep(0.005)
    with pytest.raises(WorkerError, match='A loader process ended .*[Kk]illed.* fewer loader processes than 1'):
        list(batches)
    numbers.close()
    assert processes() == []


def test_a_process_killed_while_its_batch_is_waited_for():
    class Slow(Numbers):
        def __getitem__(self, index):
            if index == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            return torch.tensor(index)

    numbers = Loader(Slow(), num_workers=1, limit_s=60.0, batch_size=2)
    begin = time.monotonic()
    with pytest.raises(WorkerError, match='A loader process ended'):
        list(numbers)
    assert time.monotonic() - begin < 20
    numbers.close()


def test_a_hanging_process_is_reported_within_the_limit_and_ended():
    numbers = loader(limit_s=0.5)
    batches = iter(numbers)
    next(batches)
    (process,) = processes()
    os.kill(process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(WorkerError, match=r'No loader process delivered a batch for 0.5 s.*TRAIN\.WORKER_TIMEOUT'):
        list(batches)
    numbers.close()
    assert processes() == [] and time.monotonic() - begin < 10


def test_a_process_killed_with_the_lock_of_the_shared_event_blocks_nobody():
    """PyTorch reads that event when it reports a dead worker."""
    numbers = loader()
    batches = iter(numbers)
    next(batches)
    event = numbers._iterator._workers_done_event
    lock = getattr(event, 'shared', event)._cond._lock
    holder = multiprocessing.get_context('fork').Process(target=lock.acquire)
    holder.start()
    holder.join()
    reader = threading.Thread(target=event.is_set, daemon=True)
    reader.start()
    reader.join(5)
    assert not reader.is_alive()
    for process in processes():
        process.kill()
    numbers.failed = True
    numbers.close()


@pytest.mark.parametrize(
    'error, message',
    [
        ('unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)', 'shm-size'),
        ('received 0 items of ancdata', 'ulimit -n'),
        ('unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)', 'ulimit -n'),
    ],
)
def test_pytorch_messages_become_advice(error, message):
    numbers = loader(RuntimeError(error))
    with pytest.raises(WorkerError, match=message) as caught:
        list(numbers)
    assert '\n' not in str(caught.value)
    numbers.close()


def test_other_errors_stay_what_they_are():
    for workers in (0, 1):
        numbers = loader(RuntimeError('something else'), workers=workers)
        with pytest.raises(RuntimeError, match='something else') as caught:
            list(numbers)
        assert not isinstance(caught.value, WorkerError)
        numbers.close()


@pytest.mark.slow  # PyTorch is imported in a process of its own
@pytest.mark.skipif(not shutil.which('unshare') or os.geteuid() != 0, reason='needs root to mount a file system')
def test_a_small_shared_memory_is_reported(tmp_path):
    code = (
        'import sys, torch; from dataset.loader import Loader; from utils.errors import user_facing\n'
        'class Large(torch.utils.data.Dataset):\n'
        '    def __len__(self): return 8\n'
        '    def __getitem__(self, index): return torch.ones(1_000_000)\n'
        'sys.exit(user_facing(lambda: len(list(Loader(Large(), num_workers=2, batch_size=1))) and None)())'
    )
    command = f'mount -t tmpfs -o size=2m tmpfs /dev/shm && exec {sys.executable} -c "$CODE"'
    done = subprocess.run(
        ['unshare', '-m', 'sh', '-c', command],
        cwd=ROOT,
        env=os.environ | {'CODE': code},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if 'unshare' in done.stderr or 'mount' in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 2, done.stderr
    assert 'ran out of shared memory (/dev/shm: 2 MB)' in done.stderr and 'Traceback' not in done.stderr
