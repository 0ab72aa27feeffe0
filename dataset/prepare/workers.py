"""Worker processes of the data commands: they ignore stop signals, which are for the parent, and end when it does."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TypeVar

from utils.distributed import use_one_thread
from utils.errors import UserError
from utils.stopping import check_stop, holding_stop_signals, shield_worker

Task = TypeVar('Task')
Result = TypeVar('Result')


@contextmanager
def worker_pool(workers: int, initialize: Callable[..., None] | None = None, *arguments) -> Iterator[Executor]:
    """A pool of processes with one thread each; ``initialize(*arguments)`` runs first in each of them.

    Raises UserError if a worker is killed, and Stopped if a stop signal has reached it before it was shielded.
    """
    context = get_context('spawn')  # forking a process that has used torch may hang
    with holding_stop_signals():  # this starts multiprocessing's resource tracker, which SIGHUP and SIGUSR1 would end
        executor = ProcessPoolExecutor(workers, context, _start, (os.getpid(), initialize, arguments))
    try:
        yield executor
    except (BrokenProcessPool, MemoryError):
        check_stop()
        raise UserError(
            f'A worker process was killed, perhaps for lack of memory. Use fewer than --workers {workers}. '
            'Finished work is kept; rerun the same command to continue.'
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def _start(parent: int, initialize: Callable[..., None] | None, arguments: tuple) -> None:
    shield_worker(parent)
    use_one_thread()
    if initialize:
        initialize(*arguments)


def ordered_map(executor: Executor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """``executor.map`` that submits at most ``ahead`` items in advance, so that memory stays bounded."""
    waiting: deque[Future] = deque()
    for item in items:
        with holding_stop_signals():  # submitting starts processes, which are shielded only once they run
            waiting.append(executor.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def results_in_order(
    function: Callable[[Task], Result], tasks: Sequence[Task], *, workers: int, ahead: int = 2
) -> Generator[Result, None, None]:
    """``function`` of each task, in order, by ``workers`` processes, or in this one where more would not help.

    ahead: tasks submitted in advance, per process. Close the generator to end the processes early.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(function, tasks)
        return
    with worker_pool(workers) as pool:
        yield from ordered_map(pool, function, tasks, ahead * workers)
