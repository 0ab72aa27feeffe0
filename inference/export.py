"""Write a trained network as ONNX or torch.export, and check each file against PyTorch before it gets its name."""

import hashlib
import io
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from yacs.config import CfgNode

from inference.folding import for_inference
from models import DIR
from models.predictions import CAMERA, POSE, ROOT_ROTATION, SHAPE, DIROutput, HandPrediction, JointConfidence
from models.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from utils.errors import UserError
from utils.files import atomic_file
from utils.hand import HAND_SCALE, JOINT_NAMES, SIDES

EXPORT_VERSION = 1  # of export.json and of the files' inputs and outputs
OPSET = 18  # not 20: GridSample's mode is named differently there, and TensorRT silently samples with nearest
# Every output must be closer to PyTorch's than this; rounding stays below a tenth of it on trained networks.
LIMITS = {'mm': 0.001, 'of the largest value': 1e-4}
CHECKED_BATCHES = (1, 3)
TRACED_BATCH = 2  # differs from the checked ones, so that a hard-coded batch size shows
MOST_IMAGES = 65536  # of a batch

Run = Callable[[Tensor], tuple[Tensor, ...]]  # image -> outputs in the order of ``values_of``


class Output(NamedTuple):
    """Description of an output in export.json, and the unit of LIMITS in which its differences are measured."""

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
# Of networks with MODEL.PRESENCE and MODEL.CONFIDENCE.
OPTIONAL_OUTPUTS = {
    'presence': Output(('B', 2), '1', 'probability that the hand is in the image'),
    'visible': Output(('B', 2, 21), '1', 'probability that the joint is neither hidden nor outside the crop'),
    'deviation': Output(('B', 2, 21), 'm', 'standard deviation of each coordinate of a joint; not of the root joint'),
}
assert tuple(OUTPUTS) == HandPrediction._fields


def values_of(output: DIROutput) -> dict[str, Tensor]:
    """The values that files yield, by name and in their order."""
    values = output.stages[-1]._asdict()
    if output.presence is not None:
        values['presence'] = output.presence.sigmoid()
    if output.confidence is not None:
        values |= {'visible': output.confidence.visible.sigmoid(), 'deviation': output.confidence.deviation}
    return values


def output_of(values: Sequence[Tensor]) -> DIROutput:
    """Inverse of ``values_of`` for what a file yielded: an output with the last estimate alone."""
    hands, rest = HandPrediction(*values[: len(OUTPUTS)]), list(values[len(OUTPUTS) :])
    presence = rest.pop(0).logit() if len(rest) % 2 else None
    confidence = JointConfidence(rest[0].logit(), rest[1]) if rest else None
    return DIROutput([hands], segmentation=None, dense=None, presence=presence, confidence=confidence)


def outputs_of(cfg: CfgNode) -> dict[str, Output]:
    """The outputs of a network with this configuration."""
    names = [*OUTPUTS, *['presence'] * cfg.MODEL.PRESENCE, *['visible', 'deviation'] * cfg.MODEL.CONFIDENCE]
    return {name: (OUTPUTS | OPTIONAL_OUTPUTS)[name] for name in names}


def licence(hand_model: str) -> str:
    return (
        f'The exported files contain the arrays of the hand model ({hand_model}) as constants. Files with MANO arrays '
        'may not be passed on.'
    )


# ---------------------------------------------------------------------------------------------------------------------
# Formats
# ---------------------------------------------------------------------------------------------------------------------


class Format(NamedTuple):
    """A file format."""

    file: str
    packages: tuple[str, ...]  # beyond requirements.txt
    convert: Callable[[ExportedProgram, list[str]], bytes]  # with the names of the outputs
    load: Callable[[Path], Run]


def chosen_formats(words: list[str]) -> dict[str, Format]:
    """Look up the words of --format. Raises UserError for an unknown one, or if there is none."""
    unknown = [word for word in words if word not in FORMATS]
    if unknown or not words:
        given = ', '.join(unknown) or 'none'
        raise UserError(f'--format must be {" or ".join(FORMATS)}, or both, not {given}.')
    return {word: FORMATS[word] for word in words}


def require_packages(name: str, kind: Format) -> None:
    """Raises UserError if optional packages cannot be imported, naming all of them."""
    missing = []
    for package in kind.packages:
        try:
            import_module(package)
        except (ImportError, OSError):  # OSError: a system library is missing
            missing.append(package)
    if missing:
        others = [other for other, its in FORMATS.items() if not its.packages]
        raise UserError(
            f'--format {name} needs {", ".join(missing)}, which cannot be imported: pip install -r '
            f'requirements-export.txt, or use only --format {" ".join(others)}.'
        )


def description(cfg: CfgNode) -> dict:
    """Describe input and outputs for export.json."""
    size = cfg.MODEL.IMAGE_SIZE
    return {
        'input': {
            'name': 'image',
            'shape': ['B', 3, size, size],
            'type': 'float32',
            'channels': 'RGB',
            'mean': IMAGENET_MEAN,
            'std': IMAGENET_STD,
            'meaning': '(value / 255 - mean) / std of a square crop centred on both hands',
        },
        'outputs': [
            {'name': name, 'shape': output.shape, 'type': 'float32', 'unit': output.unit, 'meaning': output.meaning}
            for name, output in outputs_of(cfg).items()
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


def write_files(model: DIR, cfg: CfgNode, folder: Path, formats: dict[str, Format]) -> dict[str, dict]:
    """Write and check the files of ``formats`` -> their entries in export.json, by file name.

    The files are renamed together at the end, or not at all. Raises UserError if an exporter fails or a file's outputs
    differ from the network's.
    """
    size, outputs = cfg.MODEL.IMAGE_SIZE, outputs_of(cfg)
    with exporter('torch.export'):
        program = trace(for_inference(model), size)
    entries = {}
    with ExitStack() as files:
        for name, kind in formats.items():
            path = folder / kind.file
            with exporter(name):
                content = kind.convert(program, list(outputs))
            file = files.enter_context(atomic_file(path))
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
            entries[kind.file] = {
                'format': name,
                'sha256': hashlib.sha256(content).hexdigest(),
                'batches_checked': CHECKED_BATCHES,
                'largest_differences': {
                    output: {'value': value, 'unit': outputs[output].measured_in}
                    for output, value in differences.items()
                },
            }
    return entries


@contextmanager
def exporter(what: str) -> Iterator[None]:
    """Silence an exporter; if it fails, print its output and raise UserError."""
    chatter, level = io.StringIO(), logging.root.manager.disable
    logging.disable(logging.WARNING)  # torch's handlers keep the stderr of import time
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
            f'{what} of torch {torch.__version__} failed on this network (its output is above). No file was written. '
            'Try the newest torch and the newest packages of requirements-export.txt.'
        ) from None
    finally:
        logging.disable(level)


class LastEstimate(nn.Module):
    """Image (B, 3, S, S) -> a plain tuple in the order of ``values_of``, since files cannot hold our classes."""

    def __init__(self, model: DIR):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(values_of(self.model(image)).values())


def trace(model: DIR, size: int) -> ExportedProgram:
    """Trace ``model``, in evaluation mode, for images (B, 3, size, size) with any B from 1 to MOST_IMAGES."""
    images = torch.export.Dim('batch', min=1, max=MOST_IMAGES)
    with torch.no_grad():
        program = torch.export.export(
            LastEstimate(model),
            (torch.zeros(TRACED_BATCH, 3, size, size),),
            dynamic_shapes={'image': {0: images}},
            strict=False,
        )
    for node in program.graph.nodes:
        node.meta.pop('stack_trace', None)  # thousands of lines with local paths
    return program


def to_onnx(program: ExportedProgram, names: list[str]) -> bytes:
    """Serialise as ONNX. Raises RuntimeError if the exporter chose another opset."""
    exporting = torch.onnx.export(
        program, (), input_names=['image'], output_names=names, opset_version=OPSET, dynamo=True, verbose=False
    )
    assert exporting is not None  # None only where torch writes the file itself
    exported = exporting.model_proto
    opset = {entry.domain: entry.version for entry in exported.opset_import}['']
    if opset != OPSET:  # the exporter only warns
        raise RuntimeError(f'asked for opset {OPSET}, got {opset}')
    name_batch_axis(exported.graph)
    return exported.SerializeToString()


def name_batch_axis(graph) -> None:
    """Name the first axis of the input 'batch', also in the shapes derived from it."""
    axis = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.value_info, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField('dim_param'):
                dim.dim_param = re.sub(rf'\b{re.escape(axis)}\b', 'batch', dim.dim_param)


def to_torch_export(program: ExportedProgram, names: list[str]) -> bytes:
    content = io.BytesIO()
    torch.export.save(program, content)
    return content.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Checking: the written file in its own runtime
# ---------------------------------------------------------------------------------------------------------------------


def load_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])

    def run(image: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, session.run(None, {'image': image.numpy()})))

    return run


def load_torch_export(path: Path) -> Run:
    """Load a file of this process's own: ``torch.export.load`` unpickles parts of it and may run code from it."""
    with open(path, 'rb') as file:  # torch accepts a path only if it ends in .pt2
        return torch.export.load(file).module()


def largest_differences(run: Run, model: DIR, size: int) -> dict[str, float]:
    """Largest difference of each output between ``run`` and ``model`` on random images, in its ``measured_in``.

    NaN if either yields NaN, infinite if the shapes differ.
    """
    images = torch.randn(sum(CHECKED_BATCHES), 3, size, size, generator=torch.Generator().manual_seed(0))
    largest: dict[str, Tensor] = {}
    for image in images.split(CHECKED_BATCHES):
        with torch.no_grad():
            expected = values_of(model(image))
            got = dict(zip(expected, run(image), strict=True))
        for name, value in expected.items():
            same = got[name].shape == value.shape
            difference = (got[name] - value).abs().max() if same else torch.tensor(torch.inf)
            unit = 1e-3 if _unit(name) == 'mm' else value.abs().max()
            # NaN stays NaN.
            largest[name] = torch.maximum(largest.get(name, torch.zeros(())), difference / unit)
    return {name: value.item() for name, value in largest.items()}


def _unit(name: str) -> str:
    return (OUTPUTS | OPTIONAL_OUTPUTS)[name].measured_in


def check(differences: dict[str, float], path: Path) -> None:
    """Raises UserError unless every difference is below its limit."""
    for name, difference in differences.items():
        unit = _unit(name)
        if not difference < LIMITS[unit]:
            raise UserError(
                f"The new {path} was removed: its {name} differ from PyTorch's by {difference:.2g} {unit}, "
                f'more than the limit of {LIMITS[unit]} {unit}. Try the newest torch and the newest packages of '
                'requirements-export.txt.'
            )


FORMATS = {
    'onnx': Format('dir.onnx', ('onnx', 'onnxscript', 'onnxruntime'), to_onnx, load_onnx),
    'torch_export': Format('dir.pt2', (), to_torch_export, load_torch_export),
}
