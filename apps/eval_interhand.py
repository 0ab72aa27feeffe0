"""Evaluate a checkpoint: the field's figures, their protocol above them.

    python apps/eval_interhand.py --data_path ./data/interhand2.6m/ --model ./checkpoint/xxx
        [--protocol NAME | --root_joint 9 --no-scale] [--all_protocols] [--split val] [--out DIR]
        [--image_ids FILE] [--annotation_ids FILE] [--capture ID] [--first N] [--annotations INTERHAND] [KEY VALUE ...]

Protocols: published (DIR's own, the default), intaghand, acr, internet, interwild (docs/protocols.md).
"""

import argparse
import csv
import io
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from yacs.config import CfgNode

from dataset.batch import BatchMaker, build_batch_maker
from dataset.hand_model_record import check_hand_model_record
from dataset.loader import evaluation_loader, evaluation_split
from dataset.prepared import PreparedSplit
from dataset.subsets import AnnotatedJoints, Subset, choose
from evaluation.evaluate import Evaluation, evaluate
from evaluation.metrics import GRID, NEEDS_SUBSET, PROTOCOLS, Protocol
from evaluation.runs import METRICS_VERSION
from evaluation.samples import write_chosen_samples
from evaluation.summary import PER_HAND, format_breakdown, format_grid, format_summary
from models.checkpoint import load_model, to_device
from models.hands import load_hands
from utils import distributed
from utils.config import flatten
from utils.errors import UserError, user_facing
from utils.files import write_atomically, write_json
from utils.hand import SIDES


class Measured(NamedTuple):
    """An evaluation and what it was made on."""

    result: Evaluation
    protocol_name: str
    dataset: PreparedSplit
    subset: Subset
    model: torch.nn.Module
    batch_maker: BatchMaker


@user_facing
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_path', required=True, help='prepared data set')
    parser.add_argument('--model', required=True, help='checkpoint file, or a run folder (its best.pth)')
    add_evaluation_arguments(parser)
    args = parser.parse_intermixed_args(argv)

    model, cfg, content = load_model(args.model, [*args.opts, 'DATASET.PATH', args.data_path])
    measured = evaluate_split(model, cfg, args)
    if distributed.is_main():
        if 'format' not in content:
            print(f'{args.model} has the published form and was converted (apps/convert_checkpoint.py keeps that).')
        report(
            measured, title=args.model, out=args.out, more={'config': flatten(cfg), 'training': content.get('progress')}
        )
    distributed.stop()
    return 0


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """What every evaluation takes: protocol, split and part of it, output, configuration keys."""
    parser.add_argument('--protocol', choices=PROTOCOLS, default='published', help='default: %(default)s')
    parser.add_argument('--root_joint', type=int, choices=(0, 9), help='0 wrist, 9 middle MCP; goes over --protocol')
    parser.add_argument('--no-scale', action='store_true', help='no scale alignment by bone 0-9')
    parser.add_argument('--all_protocols', action='store_true', help='besides, root {0, 9} x scale {on, off}')
    parser.add_argument(
        '--annotations',
        metavar='INTERHAND',
        help='folder with annotations/ as downloaded, for protocols with annotated joints (internet)',
    )
    parser.add_argument('--split', default='test', choices=('train', 'val', 'test'))
    parser.add_argument('--image_ids', metavar='FILE', help='only these: image ids of data.json, text or JSON list')
    parser.add_argument(
        '--annotation_ids',
        metavar='FILE',
        help='only these: annotation ids, as the lists of human-annotated frames (aid_human_annot_test.txt) hold',
    )
    parser.add_argument('--capture', action='append', default=[], metavar='ID', help='only this capture (repeatable)')
    parser.add_argument('--first', type=int, metavar='N', help='only the first N of what is left')
    parser.add_argument('--out', metavar='DIR', help='write metrics.json, per_sample.csv and samples.npz there')
    parser.add_argument('opts', nargs='*', metavar='KEY VALUE', help='configuration keys, e.g. DEVICE cpu')


def chosen_protocol(args: argparse.Namespace) -> tuple[str, Protocol]:
    """Name and choices; --root_joint and --no-scale go over the named one. Raises UserError if it lacks its data."""
    named = protocol = PROTOCOLS[args.protocol]
    if args.root_joint is not None:
        protocol = protocol._replace(root_joint=args.root_joint)
    if args.no_scale:
        protocol = protocol._replace(scale=False)
    if protocol.joints == 'annotated' and not args.annotations:
        raise UserError(
            f'--protocol {args.protocol} takes annotated joints as the truth, which a prepared data set '
            'does not hold: give --annotations INTERHAND, the folder with annotations/ as downloaded.'
        )
    if protocol == named:
        if args.protocol in NEEDS_SUBSET and not (args.image_ids or args.annotation_ids):
            raise UserError(
                f'--protocol {args.protocol} is defined on {NEEDS_SUBSET[args.protocol]}: give their list '
                'with --annotation_ids FILE (or --image_ids FILE).'
            )
        return args.protocol, protocol
    same = (name for name, other in PROTOCOLS.items() if other == protocol and name not in NEEDS_SUBSET)
    return next(same, 'custom'), protocol


def evaluate_split(model: torch.nn.Module, cfg: CfgNode, args: argparse.Namespace) -> Measured:
    """Errors of ``model`` on what ``args`` asks for, shared out over the processes of ``torchrun``."""
    name, protocol = chosen_protocol(args)
    device = distributed.start(cfg.DEVICE)
    hand_models = load_hands(cfg.MANO.SOURCE, cfg.MANO.PATH)
    check_hand_model_record(cfg.DATASET.PATH, hand_models)
    batch_maker = build_batch_maker(cfg, hand_models).to(device)
    dataset = evaluation_split(cfg, args.split)
    subset = choose(
        dataset, image_ids=args.image_ids, annotation_ids=args.annotation_ids, captures=args.capture, first=args.first
    )
    result = evaluate(
        to_device(model, device),
        evaluation_loader(dataset, cfg, subset.indices),
        batch_maker,
        precision=cfg.EVAL.PRECISION,
        network_root=cfg.ROOT_JOINT,
        protocol=protocol,
        grid=GRID if args.all_protocols else (),
        details=True,
        annotated=AnnotatedJoints(dataset, args.annotations) if protocol.joints == 'annotated' else None,
    )
    return Measured(result, name, dataset, subset, model, batch_maker)


def report(measured: Measured, *, title: str, out: str | None, more: dict) -> dict:
    """Print the last stage's figures under their protocol; with ``out`` write what the report is made of."""
    result, name, dataset, subset, model, batch_maker = measured
    summary = result.report()
    summary['protocol'] |= {'name': name, 'split': dataset.folder.name}
    summary['subset'] = subset.description and {
        'description': subset.description,
        'frames': len(subset.indices),
        'of': len(dataset),
    }
    part = f' ({subset.description}; the split has {len(dataset)})' if subset.description else ''
    frames = f'{summary["frames"]} frames of {dataset.folder}{part}'
    print(f'{title}\nprotocol {name}: {result.protocol.describe()}; {frames}')
    print(format_summary(summary))
    print(f'\n{format_breakdown(summary)}')
    if result.grid:
        print(f'\n{format_grid(summary["protocols"])}')
    if out:
        source = {'version': METRICS_VERSION, 'model': title, 'data': str(dataset.folder)}
        write_json(Path(out) / 'metrics.json', source | summary | more)
        write_atomically(Path(out) / 'per_sample.csv', per_sample_csv(result, dataset).encode())
        write_chosen_samples(Path(out) / 'samples.npz', model, dataset, batch_maker, result)
        print(f'written to {out}: metrics.json, per_sample.csv, samples.npz; python apps/report.py {out} shows them')
    return summary


def per_sample_csv(result: Evaluation, dataset: PreparedSplit) -> str:
    """One row a sample: number, file, errors of each hand and of the vector between the roots, and what goes with them.

    Empty where something is not annotated.
    """
    errors, details = result.stages[-1], result.details
    columns = {f'{name}_{side}': getattr(errors, name)[:, hand] for name in PER_HAND for hand, side in enumerate(SIDES)}
    columns['root_mm'] = errors.root_mm
    columns |= {
        f'{name}_{side}': getattr(details, name)[:, hand]
        for name in ('pa_joint_mm', 'pa_vert_mm', 'placement_mm', 'visible')
        for hand, side in enumerate(SIDES)
    }
    columns |= {
        name: getattr(details, name) for name in ('box_iou', 'distance_mm', 'penetration_mm', 'true_penetration_mm')
    }
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(['index', 'file', *columns])
    for index, *values in zip(result.index.tolist(), *(column.tolist() for column in columns.values())):
        table.writerow([index, dataset.name(index), *('' if v != v else f'{v:.6f}' for v in values)])
    return text.getvalue()


if __name__ == '__main__':
    sys.exit(main())
