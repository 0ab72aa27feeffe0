"""The one error type of this package."""


class ManoError(Exception):
    """A file or an argument is unusable. The message names it, states what is wrong and how to fix it."""
