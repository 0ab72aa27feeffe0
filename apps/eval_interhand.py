"""Evaluate a checkpoint: the field's figures, their protocol above them.

    python apps/eval_interhand.py --data_path ./data/interhand2.6m/ --model ./checkpoint/xxx
        [--root_joint 9] [--no-scale] [--split val] [--out DIR] [KEY VALUE ...]
"""

import argparse
import csv
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from yacs.config import CfgNode

from dataset.batch import BatchMaker
from dataset.interhand import InterHandDataset
from dataset.loader import evaluation_loader
from dataset.raw import check_hand_model_record
from manopth import TwoHandLayer, load_hand_models
from utils import distributed
from utils.checkpoint import load_model, to_device
from utils.errors import user_facing
from utils.evaluation import Evaluation, evaluate
from utils.files import write_atomically, write_json
from utils.hand import SIDES
from utils.metrics import Protocol, SampleErrors, format_summary


@user_facing
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data_path', required=True, help='prepared data set')
    parser.add_argument('--model', required=True, help='checkpoint file, or a run folder (its best.pth)')
    add_protocol_arguments(parser)
    args = parser.parse_intermixed_args(argv)

    model, cfg = load_model(args.model, [*args.opts, 'DATASET.PATH', args.data_path])
    protocol = Protocol(args.root_joint, not args.no_scale)
    result, dataset = evaluate_split(model, cfg, split=args.split, protocol=protocol)
    if distributed.is_main():
        report(result, dataset, title=args.model, out=args.out)
    distributed.stop()
    return 0


def add_protocol_arguments(parser: argparse.ArgumentParser) -> None:
    """What every evaluation takes: protocol, split, output, configuration keys."""
    parser.add_argument('--root_joint', type=int, choices=(0, 9), default=0, help='0 wrist (default), 9 middle MCP')
    parser.add_argument('--no-scale', action='store_true', help='no scale alignment by bone 0-9')
    parser.add_argument('--split', default='test', choices=('train', 'val', 'test'))
    parser.add_argument('--out', metavar='DIR', help='write metrics.json and per_sample.csv there')
    parser.add_argument('opts', nargs='*', metavar='KEY VALUE', help='configuration keys, e.g. DEVICE cpu')


def evaluate_split(model: torch.nn.Module, cfg: CfgNode, *, split: str, protocol: Protocol
                   ) -> tuple[Evaluation, InterHandDataset]:
    """Errors of ``model`` on a whole split, shared out over the processes of ``torchrun``."""
    device = distributed.start(cfg.DEVICE)
    hand_models = load_hand_models(cfg.MANO.SOURCE, cfg.MANO.PATH)
    check_hand_model_record(cfg.DATASET.PATH, hand_models)
    batch_maker = BatchMaker(TwoHandLayer(hand_models), image_size=cfg.MODEL.IMAGE_SIZE).to(device)
    dataset = InterHandDataset(cfg.DATASET.PATH, split, with_dense=False)
    result = evaluate(to_device(model, device), evaluation_loader(dataset, cfg), batch_maker,
                      network_root=cfg.ROOT_JOINT, protocol=protocol)
    return result, dataset


def report(result: Evaluation, dataset: InterHandDataset, *, title: str, out: str | None) -> dict:
    """Print the last stage's figures under their protocol; with ``out`` write metrics.json and per_sample.csv."""
    summary = result.summary()
    summary['protocol']['split'] = dataset.folder.name
    print(f'{title}\nprotocol: {result.protocol.describe()}; {summary["frames"]} frames of {dataset.folder}')
    print(format_summary(summary))
    if out:
        write_json(Path(out) / 'metrics.json', summary)
        write_atomically(Path(out) / 'per_sample.csv', per_sample_csv(result, dataset).encode())
        print(f'written: {Path(out) / "metrics.json"}, {Path(out) / "per_sample.csv"}')
    return summary


def per_sample_csv(result: Evaluation, dataset: InterHandDataset) -> str:
    """One row a sample: number, file, errors of each hand and of the vector between the roots."""
    text = io.StringIO()
    table = csv.writer(text)
    per_hand = SampleErrors._fields[:4]
    table.writerow(['index', 'file', *(f'{name}_{side}' for name in per_hand for side in SIDES), 'root_mm'])
    errors = result.stages[-1]
    for row, index in enumerate(result.index.tolist()):
        values = [getattr(errors, name)[row, hand].item() for name in per_hand for hand in range(2)]
        table.writerow([index, dataset.name(index), *(f'{v:.6f}' for v in (*values, errors.root_mm[row].item()))])
    return text.getvalue()


if __name__ == '__main__':
    sys.exit(main())
