"""Assemble the hand detector of ``apps/demo.py --detect`` from an older MediaPipe wheel. Downloads nothing itself.

    pip download --no-deps --only-binary=:all: --platform manylinux_2_28_x86_64 --python-version 3.12 --dest /tmp \\
        mediapipe==0.10.21
    python apps/assemble_detector.py /tmp/mediapipe-0.10.21-*.whl [--out misc/hand_landmarker.task]

MediaPipe 0.10.5 to 0.10.21 contain the two networks, newer wheels do not. The assembled file works with the newer ones,
which requirements-demo.txt installs. If an older MediaPipe is installed, pass its site-packages folder instead. The
networks are verified by their checksums; they are Google's, under the Apache License 2.0.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inference.detector import MODEL
from inference.detector_model import assemble
from utils.errors import printable, user_facing


@user_facing
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'wheel', type=Path, metavar='WHEEL', help='file, or the site-packages folder it is installed in'
    )
    parser.add_argument('--out', type=Path, metavar='FILE', default=MODEL, help='default: %(default)s')
    args = parser.parse_args(argv)
    assemble(args.wheel, args.out)
    print(f'{printable(args.out)}: palm detector and hand landmarks of {printable(args.wheel)}, Apache License 2.0')
    return 0


if __name__ == '__main__':
    sys.exit(main())
