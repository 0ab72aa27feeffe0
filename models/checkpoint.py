"""Checkpoints: tensors, numbers and strings only, written atomically, loaded safely and strictly.

A checkpoint records its configuration and the identity of its hand model, but none of that model's arrays.
"""

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from yacs.config import CfgNode

from manopth import HandPair
from models import DIR, build_model, efficientnet_lite, published
from models.hands import load_hands
from utils.config import flatten, load_config
from utils.errors import UserError
from utils.files import atomic_file

Network = TypeVar('Network', bound=torch.nn.Module)
FORMAT = 'dir-checkpoint-1'
# Prefixes of parameter names in checkpoints of earlier versions -> what they are called now.
_RENAMED = {
    'backbone.stem.0.': 'backbone.conv1.',
    'backbone.stem.1.': 'backbone.bn1.',
    **{f'backbone.layers.{index}.': f'backbone.layer{index + 1}.' for index in range(4)},
    'lead_in.': 'neck.',
}
# The same for networks on EfficientNet-Lite0, whose blocks earlier versions grouped by stride.
_RENAMED_LITE = {
    **{f'backbone.layers.0.{index}.': f'backbone.features.{index}.' for index in range(3)},
    'backbone.layers.1.': 'backbone.features.3.',
    **{f'backbone.layers.{2 + index // 2}.{index % 2}.': f'backbone.features.{4 + index}.' for index in range(4)},
    'lead_in.': 'neck.',
}
_AVERAGED = 'module.'  # prefix of the parameter names in the state of torch's AveragedModel


def save_checkpoint(path: str | Path, *, model: torch.nn.Module, cfg: CfgNode, hand_model: str, **more: Any) -> None:
    """Write a checkpoint. ``more``: optimizer state, epoch, ... as tensors, numbers, strings and containers of them."""
    write_tensors(
        path, {'format': FORMAT, 'model': model.state_dict(), 'config': to_plain(cfg), 'hand_model': hand_model, **more}
    )


def write_tensors(path: str | Path, content: dict[str, Any]) -> None:
    """``torch.save`` to a temporary file, then rename it; raises UserError if the disk is full."""
    try:
        with atomic_file(path) as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch raises this on a full disk
        raise UserError(
            f'Could not write {path} ({str(error).splitlines()[0]}): is the disk full? The previous checkpoint is '
            'untouched.'
        ) from None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read one of this project's checkpoints to the CPU; of a folder, its best.pth.

    Parameter names of earlier versions are updated. Raises UserError if the file is missing, damaged, or has another
    format.
    """
    return _require_ours(read_tensors(path), path)


def _require_ours(content: Any, path: str | Path) -> dict[str, Any]:
    if not isinstance(content, dict) or content.get('format') != FORMAT:
        instead = f"it has neither the format {FORMAT} nor the published form {{'net': ...}}"
        if published.is_published(content):
            instead = 'it has the published form: apps/convert_checkpoint.py converts it'
        raise UserError(f'{path} is not a checkpoint of this project; {instead}.')
    config = content.get('config')
    backbone = flatten(config).get('MODEL.BACKBONE') if isinstance(config, dict) else None
    names = _RENAMED_LITE if backbone == efficientnet_lite.NAME else _RENAMED
    states = {part: _renamed(content[part], names) for part in ('model', 'average') if part in content}
    return content | states


def _renamed(state: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A state_dict of an earlier version, of the network or its moving average, with today's parameter names."""
    return {_new_name(key, names): value for key, value in state.items()}


def _new_name(key: str, names: dict[str, str]) -> str:
    average = _AVERAGED if key.startswith(_AVERAGED) else ''
    name = key.removeprefix(average)
    for old, new in names.items():
        if name.startswith(old):
            return average + new + name.removeprefix(old)
    return key


def read_tensors(path: str | Path) -> Any:
    """Read a file written by ``torch.save`` to the CPU, without running code from it; of a folder, its best.pth.

    Raises UserError if it is missing, damaged, or holds more than tensors, numbers, strings and containers of them.
    """
    path = Path(path)
    if path.is_dir():
        path = path / 'best.pth'
    if not path.is_file():
        raise UserError(f'The checkpoint {path} does not exist.')
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, zipfile.BadZipFile, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f'The checkpoint {path} cannot be read: it is truncated, damaged, or holds more than tensors, numbers and '
            f'strings ({reason[:120]}).'
        ) from None


def check_hand_model(content: dict[str, Any], hand_models: HandPair, *, path: str | Path) -> None:
    """Raise UserError unless the checkpoint was trained on this hand model."""
    if content['hand_model'] != hand_models.identity:
        raise UserError(
            f'{path} was trained on the hand model {content["hand_model"]}, but this run uses {hand_models.identity}: '
            'its parameters are incompatible with this hand model. Set MANO.SOURCE and MANO.PATH to the one it was '
            'trained on.'
        )


def load_state(model: torch.nn.Module, state: dict[str, torch.Tensor], *, path: str | Path) -> None:
    """Load ``state`` strictly; raises UserError that names the keys which do not fit."""
    own = model.state_dict()
    odd = [
        f'{key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}'
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape
    ]
    odd += [f'{key} is missing' for key in own.keys() - state.keys()]
    odd += [f'{key} is not part of this network' for key in state.keys() - own.keys()]
    if odd:
        more = f' and {len(odd) - 3} more' if len(odd) > 3 else ''
        raise UserError(
            f'{path} does not fit this network: {"; ".join(sorted(odd)[:3])}{more}. Use the '
            'configuration it was trained with.'
        )
    model.load_state_dict(state)


class Loaded(NamedTuple):
    """A trained network and the rest of its checkpoint."""

    model: DIR  # in evaluation mode, on the CPU
    cfg: CfgNode  # its own configuration with the overrides
    content: dict[str, Any]  # the rest of the checkpoint: progress, optimizer state ...


def load_model(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Load a trained network with its own configuration plus ``overrides`` (KEY VALUE ...).

    Reads this project's checkpoints and the published one, which it converts. Raises UserError for a file that cannot
    be read, is neither, or was trained on another hand model, and for overrides that change the network.
    """
    content = read_tensors(path)
    if published.is_published(content):
        model, cfg, rest = published.load_published(content, path=path, overrides=overrides)
        return Loaded(model, cfg, {'published_rest': rest, 'hand_model': model.hands.identity})
    content = _require_ours(content, path)
    cfg = load_config(None, overrides, base=content['config'])
    trained, now = flatten(load_config(None, base=content['config'])), flatten(cfg)
    changed = [key for key in now if now[key] != trained[key] and (key.startswith('MODEL.') or key == 'ROOT_JOINT')]
    if changed:
        raise UserError(
            f'{path} was trained with {changed[0]} {trained[changed[0]]}, which is part of the network and '
            'cannot be changed afterwards (--root_joint sets the root joint of an evaluation).'
        )
    hand_models = load_hands(cfg.MANO.SOURCE, cfg.MANO.PATH)
    check_hand_model(content, hand_models, path=path)
    model = build_model(cfg, hand_models, pretrained=False)
    load_state(model, content['model'], path=path)
    return Loaded(model.eval(), cfg, {key: value for key, value in content.items() if key != 'model'})


def to_device(model: Network, device: torch.device) -> Network:
    """Move a network, in channels-last order where its convolutions are faster: on CUDA; depthwise ones on a CPU."""
    convolutions = (module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    depthwise = any(1 < layer.groups == layer.in_channels for layer in convolutions)
    order = torch.channels_last if device.type == 'cuda' or depthwise else torch.contiguous_format
    return model.to(device).to(memory_format=order)


def to_plain(cfg: CfgNode) -> dict[str, Any]:
    """Convert the configuration to plain dictionaries, which load with ``weights_only=True``."""
    return {key: to_plain(value) if isinstance(value, CfgNode) else value for key, value in cfg.items()}
