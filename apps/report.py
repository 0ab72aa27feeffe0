"""Where a network fails, on one HTML page: figures, distributions, joints, interaction, curves, samples in 3D.

    python apps/report.py RUN [RUN ...] [--out report.html]

RUN is a metrics.json or a folder with one in it or in its eval/ (`apps/eval_interhand.py --out`). What lies beside it
is read too: per_sample.csv, samples.npz, and the log.jsonl of the run that was evaluated. What is missing is left out,
and the page says which command makes it. The page needs no network and no other file.
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


@user_facing
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='run folder, evaluation folder or metrics.json')
    parser.add_argument('--out', default='report.html', metavar='FILE', help='default: %(default)s')
    args = parser.parse_args(argv)

    page = report_page(read_evaluated(read_runs(args.runs))).encode('utf-8', errors='replace')
    write_atomically(args.out, page)
    print(f'written: {args.out} ({len(page) / 1e6:.1f} MB)')
    return 0


if __name__ == '__main__':
    sys.exit(main())
