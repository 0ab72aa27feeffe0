"""Verify a prepared or packed data set: ``python dataset/verify.py --help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.prepare.verify import main

if __name__ == '__main__':
    sys.exit(main())
