"""Generate synthetic data: ``python dataset/synthesize.py --help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.stopping import end_at_stop_signals

if __name__ == '__main__':
    end_at_stop_signals()  # now: the imports below take seconds

from dataset.synthetic.synthesize import main

if __name__ == '__main__':
    sys.exit(main())
