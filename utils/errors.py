"""How scripts report a user's mistake: one sentence on stderr, exit code 2, no traceback."""

import functools
import re
import sys
from collections.abc import Callable

from manopth.errors import ManoError
from utils.stopping import Stopped


class UserError(Exception):
    """A mistake that the user can fix. The message names the file or key, what is wrong and what to do."""


def user_facing(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a script's ``main``: UserError, ManoError or a full disk -> one line and exit code 2; a stop signal
    -> 128 + its number (Ctrl-C: 130)."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except (UserError, ManoError) as error:
            # A loader's worker process sends its whole traceback as the message; the sentence is its end.
            sentence = re.split('(?:User|Mano|Damage)Error: ', str(error))[-1].rstrip()
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
            print(f'\nstopped by {stop}; finished work is kept. Rerun the same command to continue.', file=sys.stderr)
            return 128 + stop.number
        except KeyboardInterrupt:
            print('\ninterrupted; finished work is kept. Rerun the same command to continue.', file=sys.stderr)
            return 130
        return 2

    return run
