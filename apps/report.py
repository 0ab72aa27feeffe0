"""Write an HTML report on evaluated runs: metrics, distributions, joints, interaction, learning curves, 3D samples.

    python apps/report.py RUN [RUN ...] [--out report.html]

RUN is a metrics.json, or a folder that contains metrics.json or eval/metrics.json (`apps/eval_interhand.py --out`). The
report also reads per_sample.csv and samples.npz beside it, and the log.jsonl of the evaluated run. If one is missing,
the page prints the command that creates it. The page is self-contained: it loads no other file and no network resource.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.report.inputs import read_evaluated
from evaluation.report.page import report_page
from evaluation.runs import read_runs
from utils.errors import user_facing
from utils.files import write_atomically
from utils.ownership import owned


@user_facing
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='run folder, evaluation folder or metrics.json')
    parser.add_argument('--out', default='report.html', metavar='FILE', help='default: %(default)s')
    args = parser.parse_args(argv)

    with owned(args.out):
        page = report_page(read_evaluated(read_runs(args.runs))).encode('utf-8', errors='replace')
        write_atomically(args.out, page)
    print(f'written: {args.out} ({len(page) / 1e6:.1f} MB)')
    return 0


if __name__ == '__main__':
    sys.exit(main())
