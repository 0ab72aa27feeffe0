"""Export a trained network: FOLDER/dir.onnx (ONNX, opset 18) and FOLDER/dir.pt2 (torch.export) run without this code.

    python apps/export.py --model CHECKPOINT [--out FOLDER] [--format onnx torch_export] [KEY VALUE ...]

FOLDER is by default beside the checkpoint (best_export/ of best.pth), where apps/demo.py finds dir.onnx and uses it.
--format selects one or both (default: both); onnx needs `pip install -r requirements-export.txt`. A file is kept only
if its vertices differ from the network's by less than 0.001 mm on random images in batches of 1 and 3.
FOLDER/export.json describes inputs and outputs for this network and each file's differences.

Input, with any batch size B and S = MODEL.IMAGE_SIZE (256, unless the network was trained with another):

    image        (B, 3, S, S) float32  RGB, ImageNet-normalised: (value / 255 - mean) / std, mean 0.485, 0.456, 0.406,
                                       std 0.229, 0.224, 0.225; a square crop centred on both hands, whose larger
                                       extent spans 0.8 of its side

Outputs, in this order, float32, of the last refinement stage. Hand axis: 0 left, 1 right. Camera axes: x right, y down,
z forward. 21 joints: wrist, then thumb to little finger, each from base to tip:

    parameters   (B, 2, 64)            0-5 root rotation (symmetric 6D), 6-50 pose (MANO's PCA coefficients), 51-60
                                       shape (MANO's betas), 61-63 camera (scale, then translation right, down)
    offset       (B, 3)                right root - left root, in units of 0.15 m
    vertices     (B, 2, 778, 3)        m, relative to the hand's own root joint (ROOT_JOINT: 0 wrist, 9 middle MCP)
    joints       (B, 2, 21, 3)         m, likewise
    vertices_uv  (B, 2, 778, 2)        (right, down) in the crop, -1 to 1 from edge to edge: pixel = (uv + 1) * S / 2
    joints_uv    (B, 2, 21, 2)         likewise

and of networks with MODEL.PRESENCE and MODEL.CONFIDENCE:

    presence     (B, 2)                probability that the hand is in the image; the other numbers of an absent hand
                                       mean nothing
    visible      (B, 2, 21)            probability that the joint is neither hidden nor outside the crop
    deviation    (B, 2, 21)            m, standard deviation of each coordinate relative to the root joint

Use:

    onnxruntime.InferenceSession('dir.onnx').run(['vertices', 'joints'], {'image': image})                # numpy arrays
    parameters, offset, vertices, joints, vertices_uv, joints_uv = torch.export.load('dir.pt2').module()(image)

A runtime for ONNX runs the network where it likes; dir.pt2 runs on the CPU. Load only a .pt2 file that you wrote
yourself: ``torch.export.load`` unpickles parts of it, and a crafted file runs code. ONNX files hold no code.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils  # noqa: F401  # before PyTorch, see there

# isort: split
import torch

from inference.engine import EXPORT_RECORD, export_folder, exported_from, files_of_earlier_export
from inference.export import FORMATS, chosen_formats, licence, require_packages, write_files
from models.checkpoint import checkpoint_file, load_model
from utils.config import split_off_pairs
from utils.errors import UserError, user_facing
from utils.files import sha256_of_file, write_json


@user_facing
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', required=True, metavar='CHECKPOINT', help='file, or a run folder (its best.pth)')
    parser.add_argument('--out', type=Path, metavar='FOLDER', help='default: beside the checkpoint')
    parser.add_argument(
        '--format', nargs='+', metavar='NAME', default=list(FORMATS), help=f'{", ".join(FORMATS)} (default: both)'
    )
    parser.add_argument('opts', nargs='*', metavar='KEY VALUE', help='configuration keys, e.g. MANO.PATH DIR')
    args = parser.parse_intermixed_args(argv)

    words, keys = split_off_pairs(args.format)
    formats = chosen_formats(words)
    for name, kind in formats.items():
        require_packages(name, kind)
    path = checkpoint_file(args.model)
    digest = sha256_of_file(path) if path.is_file() else None
    model, cfg, _ = load_model(path, [*keys, *args.opts])
    if digest is None or digest != sha256_of_file(path):  # export.json vouches for the checkpoint of a graph
        raise UserError(f'{path} was replaced while it was read, as by a training. Export it again.')
    hand_model, folder = model.hands.identity, args.out or export_folder(args.model)
    print(f'{args.model}: tracing; this takes a minute or two ...', flush=True)
    about = exported_from(digest, cfg, hand_model)
    earlier = files_of_earlier_export(folder / EXPORT_RECORD, about)
    files = earlier | write_files(model, cfg, folder, formats)
    write_json(
        folder / EXPORT_RECORD,
        {'model': str(args.model), 'licence': licence(hand_model), 'torch': torch.__version__, **about, 'files': files},
    )
    print(f'{folder / EXPORT_RECORD}: names, shapes and units')
    print(licence(hand_model))
    return 0


if __name__ == '__main__':
    sys.exit(main())
