"""How scripts report a user's mistake: one sentence on stderr, exit code 2, no traceback."""

import functools
import io
import os
import re
import sys
from collections.abc import Callable

from manopth.errors import ManoError

_UNPRINTABLE = re.compile('[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]')  # controls, line ends, text direction


class UserError(Exception):
    """A mistake that the user can fix. The message names the file or key, what is wrong and what to do."""


def printable(path: str | os.PathLike[str]) -> str:
    """A file name as one line of valid text: undecodable bytes and control characters become escapes such as \\xe4."""
    text = os.fsencode(path).decode('utf-8', 'backslashreplace')
    return _UNPRINTABLE.sub(lambda found: found[0].encode('unicode_escape').decode(), text)


def user_facing(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a script's ``main``: UserError, ManoError or a full disk -> one line and exit code 2; Ctrl-C -> 130.

    What standard output cannot encode is printed as escapes.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # and not a test's or notebook's own stream
                stream.reconfigure(errors='backslashreplace')  # file names need not be valid text
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
                f'error: {error.strerror}{where}; no partial file was written. Fix the cause and rerun the command.',
                file=sys.stderr,
            )
        except KeyboardInterrupt:
            print('\ninterrupted; finished work is kept. Rerun the same command to continue.', file=sys.stderr)
            return 130
        return 2

    return run
