"""How scripts report a user's mistake: one sentence on stderr, exit code 2, no traceback."""

import functools
import re
import sys
from collections.abc import Callable

from manopth.errors import ManoError
from utils.stopping import Stopped, first_process, unwinding_at_stop_signals


class UserError(Exception):
    """A mistake that the user can fix. The message names the file or key, what is wrong and what to do."""


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` reports that a device or the host is out of memory, as Python, PyTorch and OpenCV put it."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == 'OutOfMemoryError'  # torch's
        or re.search(_OUT_OF_MEMORY, str(error)) is not None
    )


_OUT_OF_MEMORY = (
    "(?i)CUDA error: out of memory|can't allocate memory|not enough memory: you tried to allocate|"
    'Insufficient memory|CUDNN_STATUS_ALLOC_FAILED|CUBLAS_STATUS_ALLOC_FAILED|std::bad_alloc'
)


def user_facing(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a script's ``main``: a mistake, a full disk or too little memory -> one line and exit code 2; a stop signal
    -> one line and 128 + its number."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            with unwinding_at_stop_signals():
                return main(*args, **kwargs) or 0
        except (UserError, ManoError) as error:
            # A loader's worker process sends its whole traceback as the message; the sentence is its end.
            sentence = re.split('(?:User|Mano)Error: ', str(error))[-1].rstrip()
            print(f'error: {sentence}', file=sys.stderr)
        except OSError as error:
            if not error.filename and error.errno is None:
                raise
            where = f' ({error.filename})' if error.filename else ''
            print(
                f'error: {error.strerror}{where}; no partial file was written. Fix the cause and rerun the command.',
                file=sys.stderr,
            )
        except Stopped as stop:
            if first_process():
                print(f'\n{stop}', file=sys.stderr)
            return stop.exit_code
        except KeyboardInterrupt:
            print('\ninterrupted; finished work is kept. Rerun the same command to continue.', file=sys.stderr)
            return 130
        except Exception as error:
            if not out_of_memory(error):
                raise
            reason = str(error).splitlines()[0][:200] if str(error) else 'no more could be allocated'
            print(
                f'error: Out of memory ({reason}). Use a smaller batch (EVAL.BATCH_SIZE, TRAIN.BATCH_SIZE, --batch), '
                'fewer loader processes, or end other programs.',
                file=sys.stderr,
            )
        return 2

    return run
