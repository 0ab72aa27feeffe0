"""A trained network for use without this code: FOLDER/dir.onnx (ONNX, opset 18) and FOLDER/dir.pt2 (torch.export).

    python apps/export.py --model CHECKPOINT --out FOLDER [--format onnx torch_export] [KEY VALUE ...]

--format takes one or both (default: both); onnx needs `pip install -r requirements-export.txt`. A file gets its name
only once it has been run beside the network, on random images in batches of 1 and 3, and differs by less than 0.001 mm.
FOLDER/export.json says what is said here, for this network, and by how much each file differs.

Input, with any batch size B and S = MODEL.IMAGE_SIZE (256, unless the network was trained with another):

    image        (B, 3, S, S) float32  RGB, ImageNet-normalised: (value / 255 - mean) / std, mean 0.485, 0.456, 0.406,
                                       std 0.229, 0.224, 0.225; a square crop with both hands in its middle, the larger
                                       extent of the two taking 0.8 of its side

Outputs, in this order, float32, of the last refinement stage. Hand axis: 0 left, 1 right. Camera axes: x right, y down,
z forward. 21 joints: wrist, then thumb to little finger, each from base to tip:

    parameters   (B, 2, 64)            0-5 root rotation (symmetric 6D), 6-50 pose (MANO's PCA coefficients), 51-60
                                       shape (MANO's betas), 61-63 camera (scale, then translation right, down)
    offset       (B, 3)                right root - left root, in units of 0.15 m
    vertices     (B, 2, 778, 3)        m, relative to the hand's own root joint (ROOT_JOINT: 0 wrist, 9 middle MCP)
    joints       (B, 2, 21, 3)         m, likewise
    vertices_uv  (B, 2, 778, 2)        (right, down) in the crop, -1 to 1 from edge to edge: pixel = (uv + 1) * S / 2
    joints_uv    (B, 2, 21, 2)         likewise

Use:

    onnxruntime.InferenceSession('dir.onnx').run(['vertices', 'joints'], {'image': image})                # numpy arrays
    parameters, offset, vertices, joints, vertices_uv, joints_uv = torch.export.load('dir.pt2').module()(image)

A runtime for ONNX runs the network where it likes; dir.pt2 runs on the CPU.
"""

import argparse
import io
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from yacs.config import CfgNode

from inference.folding import for_inference
from models import DIR
from models.checkpoint import load_model
from models.predictions import CAMERA, POSE, ROOT_ROTATION, SHAPE, HandPrediction
from models.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from utils.config import split_off_pairs
from utils.errors import UserError, user_facing
from utils.files import write_json, written_aside
from utils.hand import HAND_SCALE, JOINT_NAMES, SIDES

EXPORT_VERSION = 1  # of export.json and of what the files take and give
OPSET = 18  # not 20: there GridSample's mode has another name, and TensorRT then samples with nearest, silently
# No output may differ from PyTorch's by as much; of trained networks, rounding makes less than a tenth of it.
LIMITS = {'mm': 0.001, 'of the largest value': 1e-4}
CHECKED_BATCHES = (1, 3)
TRACED_BATCH = 2  # other than the checked ones: a batch size that was built in shows
MOST_IMAGES = 65536  # of a batch; some bound is needed, since torch 2.6 takes no axis without one

Run = Callable[[Tensor], tuple[Tensor, ...]]  # image -> outputs in the order of OUTPUTS


class Output(NamedTuple):
    """What export.json says of an output, and in which of LIMITS' units differences of it are measured."""

    shape: tuple[str | int, ...]
    unit: str
    meaning: str
    measured_in: str = 'of the largest value'


OUTPUTS = {
    'parameters': Output(('B', 2, 64), '1', 'numbers of each hand, see parameters'),
    'offset': Output(('B', 3), f'{HAND_SCALE} m', 'right root - left root, camera axes'),
    'vertices': Output(('B', 2, 778, 3), 'm', "relative to the hand's own root joint, camera axes", 'mm'),
    'joints': Output(('B', 2, 21, 3), 'm', "relative to the hand's own root joint, camera axes", 'mm'),
    'vertices_uv': Output(('B', 2, 778, 2), 'half a crop', '(right, down): pixel = (uv + 1) * S / 2'),
    'joints_uv': Output(('B', 2, 21, 2), 'half a crop', '(right, down): pixel = (uv + 1) * S / 2'),
}
assert tuple(OUTPUTS) == HandPrediction._fields


@user_facing
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', required=True, metavar='CHECKPOINT', help='file, or a run folder (its best.pth)')
    parser.add_argument('--out', required=True, metavar='FOLDER', help='where the files go; made if missing')
    parser.add_argument(
        '--format', nargs='+', metavar='NAME', default=list(FORMATS), help=f'{", ".join(FORMATS)} (default: both)'
    )
    parser.add_argument('opts', nargs='*', metavar='KEY VALUE', help='configuration keys, e.g. MANO.PATH DIR')
    args = parser.parse_intermixed_args(argv)

    words, keys = split_off_pairs(args.format)
    formats = chosen_formats(words)
    for name, kind in formats.items():
        require_packages(name, kind)
    model, cfg, _ = load_model(args.model, [*keys, *args.opts])
    hand_model = model.hands.identity
    print(f'{args.model}: tracing; this takes a minute or two ...', flush=True)
    files = export(model, cfg.MODEL.IMAGE_SIZE, Path(args.out), formats)
    write_json(
        Path(args.out) / 'export.json',
        {
            'version': EXPORT_VERSION,
            'model': str(args.model),
            'hand_model': hand_model,
            'licence': licence(hand_model),
            'torch': torch.__version__,
            **description(cfg),
            'files': files,
        },
    )
    print(f'{Path(args.out) / "export.json"}: names, shapes and units')
    print(licence(hand_model))
    return 0


def licence(hand_model: str) -> str:
    return (
        f'The arrays of the hand model ({hand_model}) are in the exported files as constants: files that were made '
        "with MANO's may not be passed on."
    )


# ---------------------------------------------------------------------------------------------------------------------
# What can be asked for
# ---------------------------------------------------------------------------------------------------------------------


class Format(NamedTuple):
    """A kind of file."""

    file: str
    packages: tuple[str, ...]  # beyond requirements.txt
    convert: Callable[[ExportedProgram], bytes]
    load: Callable[[Path], Run]


def chosen_formats(words: list[str]) -> dict[str, Format]:
    """Raises UserError where a word is not in FORMATS, or where there is none."""
    unknown = [word for word in words if word not in FORMATS]
    if unknown or not words:
        given = ', '.join(unknown) or 'none'
        raise UserError(f'--format takes {" and ".join(FORMATS)}, one or both; it was given {given}.')
    return {word: FORMATS[word] for word in words}


def require_packages(name: str, kind: Format) -> None:
    """Raises UserError, in one sentence for all of them, where optional packages cannot be imported."""
    missing = []
    for package in kind.packages:
        try:
            import_module(package)
        except (ImportError, OSError):  # OSError: a library of the machine that it loads is not there
            missing.append(package)
    if missing:
        others = [other for other, its in FORMATS.items() if not its.packages]
        raise UserError(
            f'--format {name} needs {", ".join(missing)}, which cannot be imported: pip install -r '
            f'requirements-export.txt, or take only --format {" ".join(others)}.'
        )


def description(cfg: CfgNode) -> dict:
    """Input and outputs in words and numbers, for export.json."""
    size = cfg.MODEL.IMAGE_SIZE
    return {
        'input': {
            'name': 'image',
            'shape': ['B', 3, size, size],
            'type': 'float32',
            'channels': 'RGB',
            'mean': IMAGENET_MEAN,
            'std': IMAGENET_STD,
            'meaning': '(value / 255 - mean) / std of a square crop in the middle of which are both hands',
        },
        'outputs': [
            {'name': name, 'shape': output.shape, 'type': 'float32', 'unit': output.unit, 'meaning': output.meaning}
            for name, output in OUTPUTS.items()
        ],
        'parameters': {
            name: [numbers.start, numbers.stop]
            for name, numbers in (
                ('root_rotation_6d', ROOT_ROTATION),
                ('pose_pca', POSE),
                ('shape_betas', SHAPE),
                ('camera_scale_right_down', CAMERA),
            )
        },
        'hands': SIDES,
        'root_joint': cfg.ROOT_JOINT,
        'joints': JOINT_NAMES,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Exporting
# ---------------------------------------------------------------------------------------------------------------------


def export(model: DIR, size: int, folder: Path, formats: dict[str, Format]) -> dict[str, dict]:
    """Write and check the files of ``formats``; returns what export.json says of each, by file name.

    All of them get their names together, at the end, or none does. Raises UserError if an exporter fails or a file
    computes something else than ``model``.
    """
    with exporter('torch.export'):
        program = trace(for_inference(model), size)
    said = {}
    with ExitStack() as files:
        for name, kind in formats.items():
            path = folder / kind.file
            with exporter(name):
                content = kind.convert(program)
            file = files.enter_context(written_aside(path))
            file.write(content)
            file.flush()
            with exporter(name):
                run = kind.load(Path(file.name))
            differences = largest_differences(run, model, size)
            check(differences, path)
            print(
                f'{path}: {len(content) / 1e6:.0f} MB, largest vertex difference {differences["vertices"]:.6f} mm '
                f'(batches of {" and ".join(map(str, CHECKED_BATCHES))})',
                flush=True,
            )
            said[kind.file] = {
                'format': name,
                'batches_checked': CHECKED_BATCHES,
                'largest_differences': {
                    output: {'value': value, 'unit': OUTPUTS[output].measured_in}
                    for output, value in differences.items()
                },
            }
    return said


@contextmanager
def exporter(what: str) -> Iterator[None]:
    """Keep an exporter quiet; if it fails, let it be heard, and raise UserError."""
    chatter, level = io.StringIO(), logging.root.manager.disable
    logging.disable(logging.WARNING)  # torch's handlers hold on to the stderr that they found at import
    try:
        with (
            redirect_stdout(chatter),
            redirect_stderr(chatter),
            warnings.catch_warnings(record=True, action='default') as warned,
        ):
            yield
    except Exception:
        chatter.writelines(f'{warning.category.__name__}: {warning.message}\n' for warning in warned)
        print(f'{chatter.getvalue()}{traceback.format_exc()}', end='', file=sys.stderr)
        raise UserError(
            f'{what} of torch {torch.__version__} failed on this network (what it said stands above), and '
            'nothing was written: try the newest torch and the newest packages of '
            'requirements-export.txt.'
        ) from None
    finally:
        logging.disable(level)


class LastEstimate(nn.Module):
    """Image (B, 3, S, S) -> the outputs in the order of OUTPUTS, as a plain tuple: files know no class of ours."""

    def __init__(self, model: DIR):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model(image).stages[-1])


def trace(model: DIR, size: int) -> ExportedProgram:
    """``model`` in evaluation mode -> its graph, for images (B, 3, size, size) with any B from 1 to MOST_IMAGES."""
    images = torch.export.Dim('batch', min=1, max=MOST_IMAGES)
    with torch.no_grad():
        program = torch.export.export(
            LastEstimate(model),
            (torch.zeros(TRACED_BATCH, 3, size, size),),
            dynamic_shapes={'image': {0: images}},
            strict=False,
        )
    for node in program.graph.nodes:
        node.meta.pop('stack_trace', None)  # thousands of lines with the paths of this machine
    return program


def to_onnx(program: ExportedProgram) -> bytes:
    """Raises RuntimeError if the exporter took another opset."""
    exported = torch.onnx.export(
        program, (), input_names=['image'], output_names=list(OUTPUTS), opset_version=OPSET, dynamo=True, verbose=False
    ).model_proto
    opset = {entry.domain: entry.version for entry in exported.opset_import}['']
    if opset != OPSET:  # it does so with no more than a warning
        raise RuntimeError(f'asked for opset {OPSET}, got {opset}')
    name_batch_axis(exported.graph)
    return exported.SerializeToString()


def name_batch_axis(graph) -> None:
    """Call the first axis of the input 'batch', here and in the shapes that follow from it."""
    axis = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.value_info, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField('dim_param'):
                dim.dim_param = re.sub(rf'\b{re.escape(axis)}\b', 'batch', dim.dim_param)


def to_torch_export(program: ExportedProgram) -> bytes:
    content = io.BytesIO()
    torch.export.save(program, content)
    return content.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Checking: the file as written, in the runtime that it is for
# ---------------------------------------------------------------------------------------------------------------------


def load_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])

    def run(image: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, session.run(list(OUTPUTS), {'image': image.numpy()})))

    return run


def load_torch_export(path: Path) -> Run:
    with open(path, 'rb') as file:  # torch takes a path only if it ends in .pt2
        return torch.export.load(file).module()


def largest_differences(run: Run, model: DIR, size: int) -> dict[str, float]:
    """How far ``run`` is from ``model`` on random images: the largest of every output, in its ``measured_in``.

    NaN where either gives one, infinite where the shapes differ.
    """
    images = torch.randn(sum(CHECKED_BATCHES), 3, size, size, generator=torch.Generator().manual_seed(0))
    largest = dict.fromkeys(OUTPUTS, torch.zeros(()))
    for image in images.split(CHECKED_BATCHES):
        with torch.no_grad():
            expected, got = model(image).stages[-1]._asdict(), dict(zip(OUTPUTS, run(image)))
        for name, output in OUTPUTS.items():
            same = got[name].shape == expected[name].shape
            difference = (got[name] - expected[name]).abs().max() if same else torch.tensor(torch.inf)
            unit = 1e-3 if output.measured_in == 'mm' else expected[name].abs().max()
            largest[name] = torch.maximum(largest[name], difference / unit)  # NaN stays NaN
    return {name: value.item() for name, value in largest.items()}


def check(differences: dict[str, float], path: Path) -> None:
    """Raises UserError unless every difference is below its limit."""
    for name, difference in differences.items():
        unit = OUTPUTS[name].measured_in
        if not difference < LIMITS[unit]:
            raise UserError(
                f"The new {path} was removed: its {name} differ from PyTorch's by {difference:.2g} {unit}, "
                f'and the limit is {LIMITS[unit]} {unit}; try the newest torch and the newest packages of '
                'requirements-export.txt.'
            )


FORMATS = {
    'onnx': Format('dir.onnx', ('onnx', 'onnxscript', 'onnxruntime'), to_onnx, load_onnx),
    'torch_export': Format('dir.pt2', (), to_torch_export, load_torch_export),
}


if __name__ == '__main__':
    sys.exit(main())
