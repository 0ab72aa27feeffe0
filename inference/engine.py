"""Choose what computes a network's estimates: PyTorch, or the graph that apps/export.py wrote, through ONNX Runtime."""

import importlib.util
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from yacs.config import CfgNode

from inference.export import EXPORT_VERSION, FORMATS, Run, description
from models.checkpoint import checkpoint_file
from utils.errors import UserError, printable
from utils.files import read_json, sha256_of_file

ENGINES = ('auto', 'torch', 'onnx')
EXPORT_RECORD = 'export.json'
_ONNX = FORMATS['onnx']


class Engine(NamedTuple):
    """What computes the estimates."""

    run: Run | None  # None: the network itself
    description: str


class _UnusableGraph(Exception):
    """Why no exported graph can take the network's place."""


def export_folder(checkpoint: str | Path) -> Path:
    """Where apps/export.py writes by default, and where ``choose_engine`` looks: best.pth -> best_export/."""
    file = checkpoint_file(checkpoint)
    return file.with_name(f'{file.stem}_export')


def choose_engine(name: str, checkpoint: str | Path, *, cfg: CfgNode, hand_model: str, device: torch.device) -> Engine:
    """Choose the fastest engine that computes the same estimates up to rounding.

    name: 'auto', 'torch' or 'onnx'. 'auto' is ONNX Runtime on a CPU, if it is installed and the checkpoint has been
    exported; otherwise PyTorch. cfg: of the loaded network. Raises UserError for an unknown name, or if 'onnx' cannot
    be used.
    """
    if name not in ENGINES:
        raise UserError(f'The engine must be one of {", ".join(ENGINES)}, not {name}.')
    if name == 'torch':
        return Engine(None, 'PyTorch')
    try:
        return _exported_graph(checkpoint, cfg, hand_model, device)
    except _UnusableGraph as reason:
        if name == 'onnx':
            raise UserError(f'ONNX Runtime cannot be used: {reason}') from None
        return Engine(None, f'PyTorch ({reason})' if device.type == 'cpu' else 'PyTorch')


def _exported_graph(checkpoint: str | Path, cfg: CfgNode, hand_model: str, device: torch.device) -> Engine:
    if device.type != 'cpu':
        raise _UnusableGraph(f'exported graphs run on the CPU here, not on {device}.')
    if cfg.EVAL.PRECISION == 'bfloat16':
        raise _UnusableGraph('exported graphs compute in float32, and EVAL.PRECISION is bfloat16.')
    folder = export_folder(checkpoint)
    path = folder / _ONNX.file
    export = f'python apps/export.py --model {printable(checkpoint)} --format onnx'
    if not path.exists():
        raise _UnusableGraph(f'ONNX Runtime is faster: to use it, run {export}')
    if importlib.util.find_spec('onnxruntime') is None:
        raise _UnusableGraph(f'{path} needs onnxruntime: pip install -r requirements-export.txt')
    try:
        record = read_json(folder / EXPORT_RECORD)
    except UserError as error:
        raise _UnusableGraph(f'{error} Export again: {export}') from None
    if not _describes(record, checkpoint, cfg, hand_model):
        raise _UnusableGraph(f'{path} was exported from another network or version; export again: {export}')
    if record['files'][_ONNX.file].get('sha256') != sha256_of_file(path):
        raise _UnusableGraph(f'{path} is damaged; export again: {export}')
    return Engine(_ONNX.load(path), f'ONNX Runtime ({path})')


def _describes(record: Any, checkpoint: str | Path, cfg: CfgNode, hand_model: str) -> bool:
    """Whether export.json is that of this checkpoint, configured as it is now."""
    expected = exported_from(sha256_of_file(checkpoint_file(checkpoint)), cfg, hand_model)
    try:
        return _agrees(record, expected) and isinstance(record['files'][_ONNX.file], dict)
    except (LookupError, TypeError):
        return False


def exported_from(weights_sha256: str, cfg: CfgNode, hand_model: str) -> dict[str, Any]:
    """What export.json records of the network, as JSON; a graph is valid for this network only."""
    origin = {'version': EXPORT_VERSION, 'weights_sha256': weights_sha256, 'hand_model': hand_model}
    return origin | json.loads(json.dumps(description(cfg)))


def files_of_earlier_export(path: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """The files that export.json at ``path`` lists and that exist, if it is that of the same network; {} otherwise."""
    try:
        record = read_json(path) if path.exists() else {}
        files = record['files'] if _agrees(record, expected) else {}
        return {name: entry for name, entry in files.items() if (path.parent / name).exists()}
    except (UserError, LookupError, TypeError, AttributeError):
        return {}


def _agrees(record: Any, expected: dict[str, Any]) -> bool:
    return {name: record[name] for name in expected} == expected
