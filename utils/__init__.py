"""The ground floor: it imports nothing of this repository. Import it before PyTorch: it bounds how long threads spin.

PyTorch's wheels for Linux bundle GNU's OpenMP (libgomp), whose threads spin for milliseconds while they wait for one
another. Beside another busy process, each of the many barriers of a step then waits for a thread that is not running
while its sibling burns the core it needs: measured on two cores, a step takes 25 times as long. GOMP_SPINCOUNT makes
them sleep earlier. libgomp reads it once, when PyTorch is loaded; processes that are started later inherit it. It is
left alone where the user has chosen a policy. benchmarks/busy.py measures the trade.
"""

import os

SPIN_COUNT = 5000
_CHOICES = ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY', 'KMP_')


def bound_spinning(environment: os._Environ | dict[str, str]) -> None:
    """Set GOMP_SPINCOUNT unless a variable that controls how OpenMP's threads wait is set."""
    if not any(name.startswith(_CHOICES) for name in environment):
        environment['GOMP_SPINCOUNT'] = str(SPIN_COUNT)


bound_spinning(os.environ)
