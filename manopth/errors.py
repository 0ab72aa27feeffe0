"""The one error type of this package."""


class ManoError(Exception):
    """A file or an argument cannot be used. The message names it, states what is wrong and how to fix it."""
