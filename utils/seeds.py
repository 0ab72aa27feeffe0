"""Seeds that follow from several numbers."""

import numpy as np


def seed_of(*key: int) -> int:
    """A seed of 63 bits from all numbers of ``key`` but zeros at its end; sums of multiples would meet each other."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1
