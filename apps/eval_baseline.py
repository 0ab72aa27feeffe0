"""Evaluate the best constant prediction: mean training parameters and mean training offset.

    python apps/eval_baseline.py --data_path ./data/interhand2.6m/ [--root_joint 9] [--no-scale] [KEY VALUE ...]

A network that does not beat it has learned nothing. Whatever the image, both hands have the mean root rotation in
camera axes, the mean pose, the mean shape and the mean vector between the roots.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.stopping import end_at_stop_signals

if __name__ == '__main__':
    end_at_stop_signals()  # now: the imports below take seconds

from dataset import open_split
from evaluation.baseline import ConstantPrediction, mean_prediction
from evaluation.session import add_evaluation_arguments, evaluate_split, owned_output, report
from evaluation.summary import format_damage
from manopth import TwoHandLayer
from models.hand_head import HandHead
from models.hands import load_hands
from utils import distributed
from utils.config import flatten, load_config, refuse_pairs
from utils.errors import user_facing


@user_facing
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_path', required=True, help='prepared data set; the means are over its training split')
    parser.add_argument('--cfg', metavar='FILE', help='YAML file that overrides the defaults of utils/config.py')
    add_evaluation_arguments(parser)
    args = parser.parse_intermixed_args(argv)
    refuse_pairs(args.opts, {'DATASET.PATH': '--data_path'})

    cfg = load_config(args.cfg, [*args.opts, 'DATASET.PATH', args.data_path])
    hand_layer = TwoHandLayer(load_hands(cfg.MANO.SOURCE, cfg.MANO.PATH))
    labels = open_split(cfg.DATASET.PATH, 'train', with_mask=False, with_dense=False)
    with owned_output(args.out):
        mean = mean_prediction(
            labels,
            hand_layer,
            root_joint=cfg.ROOT_JOINT,
            workers=cfg.TRAIN.WORKERS,
            tolerated_damage=cfg.DATASET.TOLERATED_DAMAGE,
        )
        model = ConstantPrediction(HandHead(hand_layer, root_joint=cfg.ROOT_JOINT), mean.parameters, mean.offset)
        measured = evaluate_split(model, cfg, args)
        if distributed.is_main():
            if mean.damage:
                print(f'from the means of {labels.folder}, {format_damage(mean.damage)}', end='')
            report(measured, title='best constant prediction', out=args.out, more={'config': flatten(cfg)})
    distributed.stop()
    return 0


if __name__ == '__main__':
    sys.exit(main())
