"""One evaluation as the commands run it: arguments, protocol, split, printed figures and files."""

import argparse
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from yacs.config import CfgNode

from dataset.batch import BatchMaker, build_batch_maker
from dataset.identity import data_identity
from dataset.loader import evaluation_loader, evaluation_split
from dataset.mixture import check_hand_model_records
from dataset.prepared import PreparedSplit
from dataset.subsets import AnnotatedJoints, Subset, choose
from evaluation.evaluate import Evaluation, evaluate
from evaluation.metrics import GRID, NEEDS_SUBSET, PROTOCOLS, Protocol
from evaluation.runs import METRICS_VERSION
from evaluation.samples import chosen_samples_npz, per_sample_csv
from evaluation.summary import format_breakdown, format_damage, format_grid, format_summary
from models.checkpoint import to_device
from models.hands import load_hands
from utils import distributed
from utils.config import add_flag
from utils.errors import UserError
from utils.files import atomic_file, json_bytes, remove_stale_partials
from utils.ownership import owned
from utils.run_record import record_rows, run_record
from utils.stopping import first_process


class Measured(NamedTuple):
    """An evaluation with its data and model."""

    result: Evaluation
    protocol_name: str
    dataset: PreparedSplit
    subset: Subset
    model: torch.nn.Module
    batch_maker: BatchMaker


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every evaluation: protocol, split and subset, output, configuration keys."""
    parser.add_argument('--protocol', choices=PROTOCOLS, default='published', help='default: %(default)s')
    parser.add_argument('--root_joint', type=int, choices=(0, 9), help='0 wrist, 9 middle MCP; overrides --protocol')
    parser.add_argument(
        '--no-scale', action='store_true', help='without scale alignment by bone 0-9; overrides --protocol'
    )
    add_flag(parser, '--all-protocols', action='store_true', help='also root {0, 9} x scale {on, off}')
    parser.add_argument(
        '--annotations',
        metavar='INTERHAND',
        help='folder with the downloaded annotations/, for protocols with annotated joints (internet)',
    )
    parser.add_argument('--split', default='test', choices=('train', 'val', 'test'))
    add_flag(parser, '--image-ids', metavar='FILE', help='only these image ids of data.json, a text file or JSON list')
    add_flag(
        parser,
        '--annotation-ids',
        metavar='FILE',
        help='only these annotation ids, e.g. the human-annotated frames (aid_human_annot_test.txt)',
    )
    parser.add_argument('--capture', action='append', default=[], metavar='ID', help='only this capture (repeatable)')
    parser.add_argument('--first', type=int, metavar='N', help='only the first N of the remaining samples')
    parser.add_argument('--out', metavar='DIR', help='write metrics.json, per_sample.csv and samples.npz there')
    parser.add_argument('opts', nargs='*', metavar='KEY VALUE', help='configuration keys, e.g. DEVICE cpu')


@contextmanager
def owned_output(out: str | None) -> Iterator[None]:
    """Own the output folder of an evaluation, in the first of several processes.

    Raises UserError if it is in use or no folder.
    """
    if out and os.path.lexists(out) and not os.path.isdir(out):
        raise UserError(f'--out {out} is not a folder. Choose another name.')
    with ExitStack() as stack:
        if out and first_process():
            stack.enter_context(owned(out))
            remove_stale_partials(out)
        yield


def chosen_protocol(args: argparse.Namespace) -> tuple[str, Protocol]:
    """Name and protocol of the arguments. Raises UserError if the protocol's data is missing."""
    named = protocol = PROTOCOLS[args.protocol]
    if args.root_joint is not None:
        protocol = protocol._replace(root_joint=args.root_joint)
    if args.no_scale:
        protocol = protocol._replace(scale=False)
    if protocol.joints == 'annotated' and not args.annotations:
        raise UserError(
            f'--protocol {args.protocol} compares with annotated joints, which a prepared data set lacks. '
            'Pass --annotations INTERHAND, the folder with the downloaded annotations/.'
        )
    if protocol == named:
        if args.protocol in NEEDS_SUBSET and not (args.image_ids or args.annotation_ids):
            raise UserError(
                f'--protocol {args.protocol} is defined on {NEEDS_SUBSET[args.protocol]} only. Pass their list '
                'with --annotation-ids FILE or --image-ids FILE.'
            )
        return args.protocol, protocol
    same = (name for name, other in PROTOCOLS.items() if other == protocol and name not in NEEDS_SUBSET)
    return next(same, 'custom'), protocol


def evaluate_split(model: torch.nn.Module, cfg: CfgNode, args: argparse.Namespace) -> Measured:
    """Evaluate ``model`` as ``args`` specify, distributed over the processes of ``torchrun``."""
    name, protocol = chosen_protocol(args)
    device = distributed.start(cfg.DEVICE)
    hand_models = load_hands(cfg.MANO.SOURCE, cfg.MANO.PATH)
    check_hand_model_records(cfg.DATASET.PATH, hand_models)
    batch_maker = build_batch_maker(cfg, hand_models).to(device)
    dataset = evaluation_split(cfg, args.split)
    subset = choose(
        dataset, image_ids=args.image_ids, annotation_ids=args.annotation_ids, captures=args.capture, first=args.first
    )
    with closing(evaluation_loader(dataset, cfg, subset.indices)) as loader:
        result = evaluate(
            to_device(model, device),
            loader,
            batch_maker,
            precision=cfg.EVAL.PRECISION,
            tolerated_damage=cfg.DATASET.TOLERATED_DAMAGE,
            network_root=cfg.ROOT_JOINT,
            protocol=protocol,
            grid=GRID if args.all_protocols else (),
            details=True,
            annotated=AnnotatedJoints(dataset, args.annotations) if protocol.joints == 'annotated' else None,
        )
    return Measured(result, name, dataset, subset, model, batch_maker)


def report(measured: Measured, *, title: str, out: str | None, more: dict[str, Any]) -> dict[str, Any]:
    """Print the last stage's figures with their protocol; with ``out``, write the files that the report reads.

    more: further keys of metrics.json, among them the record of the training as ``trained``. Returns the figures.
    """
    result, name, dataset, subset, model, batch_maker = measured
    summary = result.report()
    summary['protocol'] |= {'name': name, 'split': dataset.folder.name}
    summary['subset'] = subset.description and {
        'description': subset.description,
        'frames': len(subset.indices),
        'of': len(dataset),
    }
    summary['damaged'] = [one._asdict() for one in result.damage]
    if sets := result.summary_of_sets(dataset):
        summary['sets'] = sets
    part = f' ({subset.description}; the split has {len(dataset)})' if subset.description else ''
    frames = f'{summary["frames"]} frames of {dataset.folder}{part}'
    print(f'{title}\nprotocol {name}: {result.protocol.describe()}; {frames}')
    print(format_damage(result.damage), end='')
    print(format_summary(summary))
    for folder, figures in sets.items():
        print(f'\n{figures["frames"]} frames of {folder}\n{format_summary(figures)}')
    print(f'\n{format_breakdown(summary)}')
    if result.grid:
        print(f'\n{format_grid(summary["protocols"])}')
    evaluated = run_record(
        hand_model=batch_maker.hands.identity,
        data={dataset.folder.name: data_identity(dataset)},
        device=batch_maker.device,
    )
    for what, record in (('trained', more.get('trained')), ('evaluated', evaluated)):
        print(f'\n{what}:', *(f'    {row.title + ":":12} {row.text}' for row in record_rows(record)), sep='\n')
    if out:
        source = {'version': METRICS_VERSION, 'model': title, 'data': str(dataset.folder), 'evaluated': evaluated}
        write_evaluation(
            Path(out),
            {
                'metrics.json': json_bytes(source | summary | more),
                'per_sample.csv': per_sample_csv(result, dataset).encode(),
                'samples.npz': chosen_samples_npz(model, dataset, batch_maker, result),
            },
        )
        print(f'written to {out}: metrics.json, per_sample.csv, samples.npz; python apps/report.py {out} shows them')
    return summary


def write_evaluation(out: Path, contents: dict[str, bytes | None]) -> None:
    """Write the files of one evaluation, None for one that it lacks; the first appears last.

    So files of two evaluations never stand beside each other: a kill leaves either set, or none with ``metrics.json``.
    """
    first = next(iter(contents))
    with ExitStack() as stack:  # which renames in the opposite order
        for name, content in contents.items():
            if content is not None:
                file = stack.enter_context(atomic_file(out / name))
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # a full disk must show before the previous evaluation goes
        (out / first).unlink(missing_ok=True)
        for name in (name for name, content in contents.items() if content is None):
            (out / name).unlink(missing_ok=True)
