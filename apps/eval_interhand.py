"""Evaluate a checkpoint: published metrics with their protocol.

    python apps/eval_interhand.py --data_path ./data/interhand2.6m/ --model ./checkpoint/xxx
        [--protocol NAME | --root_joint 9 --no-scale] [--all-protocols] [--split val] [--out DIR]
        [--image-ids FILE] [--annotation-ids FILE] [--capture ID] [--first N] [--annotations INTERHAND] [KEY VALUE ...]

Protocols: published (DIR's own, the default), intaghand, acr, internet, interwild (docs/protocols.md).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.stopping import end_at_stop_signals

if __name__ == '__main__':
    end_at_stop_signals()  # now: the imports below take seconds

from evaluation.session import add_evaluation_arguments, evaluate_split, owned_output, report
from models.checkpoint import load_model
from utils import distributed
from utils.config import flatten, refuse_pairs
from utils.errors import user_facing


@user_facing
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_path', required=True, help='prepared data set')
    parser.add_argument('--model', required=True, help='checkpoint file, or a run folder (its best.pth)')
    add_evaluation_arguments(parser)
    args = parser.parse_intermixed_args(argv)
    refuse_pairs(args.opts, {'DATASET.PATH': '--data_path'})

    model, cfg, content = load_model(args.model, [*args.opts, 'DATASET.PATH', args.data_path])
    with owned_output(args.out):
        measured = evaluate_split(model, cfg, args)
        if distributed.is_main():
            if 'format' not in content:
                print(f'{args.model} has the published form and was converted (apps/convert_checkpoint.py keeps that).')
            shares = flatten(content.get('config', {})).get('DATASET.WEIGHTS', [])  # cfg's are of the data evaluated
            config = flatten(cfg) | {'DATASET.WEIGHTS': shares}
            more = {'config': config, 'training': content.get('progress'), 'trained': content.get('record')}
            report(measured, title=args.model, out=args.out, more=more)
    distributed.stop()
    return 0


if __name__ == '__main__':
    sys.exit(main())
