"""Tensors with text metadata as safetensors, which other frameworks and model hubs read; the format holds no code.

https://huggingface.co/docs/safetensors/index#format. The metadata gain ``sha256``, of everything else in the file,
since the format itself has no checksum.
"""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import write_atomically

SUFFIX = '.safetensors'
_CHECKSUM = 'sha256'


def write_safetensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write ``tensors``, to the bit, and ``metadata``, atomically."""
    _require_package(path)
    from safetensors.torch import save

    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}  # no shared storage
    write_atomically(path, save(own, metadata | {_CHECKSUM: _checksum(own, metadata)}))


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors to the CPU, and the metadata without the checksum, which is verified if there is one.

    The package compares all announced sizes with the file's length before anything is allocated. Raises UserError if
    the file is missing or damaged.
    """
    _require_package(path)
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise UserError(f'The checkpoint {path} does not exist.')
    try:
        with safe_open(path, framework='pt') as file:
            metadata = dict(file.metadata() or {})
            # Copies: the originals are mapped from the file and would change with it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f'The checkpoint {path} cannot be read: it is truncated, damaged, or no safetensors file ({reason[:120]}).'
        ) from None
    recorded = metadata.pop(_CHECKSUM, None)
    if recorded is not None and recorded != _checksum(tensors, metadata):
        raise UserError(f'The checkpoint {path} is damaged: its SHA-256 is not the recorded one.')
    return tensors, metadata


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _require_package(path: str | Path) -> None:
    try:
        import safetensors.torch  # noqa: F401
    except ImportError:
        raise UserError(f'{path} needs the package safetensors: pip install -r requirements.txt.') from None
