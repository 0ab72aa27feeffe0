"""The one way in which a script tells its user about a mistake: one sentence, exit code 2, no traceback."""

import functools
import re
import sys
from collections.abc import Callable

from manopth.errors import ManoError


class UserError(Exception):
    """Something the user can put right. The message names the file or key, what is wrong and what to do."""


def user_facing(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a script's ``main``: a UserError or a full disk becomes one line on stderr and exit code 2, Ctrl-C 130."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        try:
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
                f'error: {error.strerror}{where}; nothing was left half-written, mend it and start again.',
                file=sys.stderr,
            )
        except KeyboardInterrupt:
            print('\ninterrupted; what was finished is kept, the same command goes on from there.', file=sys.stderr)
            return 130
        return 2

    return run
