import pytest

from manopth import HandPair
from manopth.standin import standin_pair


@pytest.fixture(scope='session')
def standin() -> HandPair:
    """(left, right) stand-in hand models."""
    return standin_pair()
