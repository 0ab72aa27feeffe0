"""Checkpoints: tensors, numbers and strings only, written aside and renamed, loaded safely and strictly.

A checkpoint records its configuration and which hand model it was trained on; no array of that model is in it.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from yacs.config import CfgNode

from manopth import HandPair
from models import DIR, build_model, published
from models.hands import load_hands
from utils.config import flatten, load_config
from utils.errors import UserError
from utils.files import written_aside

Network = TypeVar('Network', bound=torch.nn.Module)
FORMAT = 'dir-checkpoint-1'


def save_checkpoint(path: str | Path, *, model: torch.nn.Module, cfg: CfgNode, hand_model: str, **more: Any) -> None:
    """Write a checkpoint; ``more`` (optimizer state, epoch, figures): tensors, numbers, strings and containers."""
    write_tensors(
        path, {'format': FORMAT, 'model': model.state_dict(), 'config': to_plain(cfg), 'hand_model': hand_model, **more}
    )


def write_tensors(path: str | Path, content: dict[str, Any]) -> None:
    """``torch.save``, written aside and renamed; raises UserError where the disk is full."""
    try:
        with written_aside(path) as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch's way of saying that the disk is full
        raise UserError(
            f'{path} could not be written ({str(error).splitlines()[0]}): is the disk full? The previous '
            'checkpoint is untouched.'
        ) from None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of one of this project's checkpoints, on the CPU; a folder stands for the best.pth in it.

    Raises UserError if it is missing, cut short, or not one of ours.
    """
    return _require_ours(read_tensors(path), path)


def _require_ours(content: Any, path: str | Path) -> dict[str, Any]:
    if not isinstance(content, dict) or content.get('format') != FORMAT:
        instead = f"has neither its format {FORMAT} nor the published form {{'net': ...}}"
        if published.is_published(content):
            instead = 'has the published form: apps/convert_checkpoint.py makes one of it'
        raise UserError(f'{path} is not a checkpoint of this project; it {instead}.')
    return content


def read_tensors(path: str | Path) -> Any:
    """What a file written by ``torch.save`` holds, read safely, on the CPU; a folder stands for the best.pth in it.

    Raises UserError if it is missing, cut short, or holds more than tensors, numbers, strings and containers of them.
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
            f'The checkpoint {path} cannot be read: it is cut short, damaged, or holds more than tensors, '
            f'numbers and strings ({reason[:120]}).'
        ) from None


def check_hand_model(content: dict[str, Any], hand_models: HandPair, *, path: str | Path) -> None:
    """Raises UserError unless the checkpoint was trained on these hands."""
    if content['hand_model'] != hand_models.identity:
        raise UserError(
            f'{path} was trained on the hand model {content["hand_model"]}, but this run uses {hand_models.identity}: '
            'its numbers mean nothing on other hands. Set MANO.SOURCE and MANO.PATH to the hands it was trained on.'
        )


def load_state(model: torch.nn.Module, state: dict[str, torch.Tensor], *, path: str | Path) -> None:
    """Strict loading; raises UserError naming what does not fit."""
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
    """A trained network and what its checkpoint says of it."""

    model: DIR  # in evaluation mode, on the CPU
    cfg: CfgNode  # its own configuration with the overrides
    content: dict[str, Any]  # the rest of the checkpoint: progress, optimizer state ...


def load_model(path: str | Path, overrides: list[str] = ()) -> Loaded:
    """A trained network with its own configuration plus ``overrides`` (KEY VALUE ...).

    Takes this project's checkpoints and, converting it, the published one. Raises UserError for a file that cannot be
    read, is neither, or was trained on another hand model, and for overrides that would make it another network.
    """
    content = read_tensors(path)
    if published.is_published(content):
        model, cfg, rest = published.load_published(content, path=path, overrides=overrides)
        return Loaded(model, cfg, {'published_rest': rest, 'hand_model': model.hands.identity})
    _require_ours(content, path)
    cfg = load_config(None, overrides, base=content['config'])
    trained, now = flatten(load_config(None, base=content['config'])), flatten(cfg)
    changed = [key for key in now if now[key] != trained[key] and (key.startswith('MODEL.') or key == 'ROOT_JOINT')]
    if changed:
        raise UserError(
            f'{path} was trained with {changed[0]} {trained[changed[0]]}, which is part of the network and '
            'cannot be changed afterwards (for the protocol of an evaluation there is --root_joint).'
        )
    hand_models = load_hands(cfg.MANO.SOURCE, cfg.MANO.PATH)
    check_hand_model(content, hand_models, path=path)
    model = build_model(cfg, hand_models, pretrained=False)
    load_state(model, content['model'], path=path)
    return Loaded(model.eval(), cfg, {key: value for key, value in content.items() if key != 'model'})


def to_device(model: Network, device: torch.device) -> Network:
    """Move a network; on CUDA in channels-last order, which its convolutions run faster in. A CPU prefers the other."""
    return model.to(device, memory_format=torch.channels_last if device.type == 'cuda' else torch.contiguous_format)


def to_plain(cfg: CfgNode) -> dict[str, Any]:
    """The configuration as plain dictionaries, which load with ``weights_only=True``."""
    return {key: to_plain(value) if isinstance(value, CfgNode) else value for key, value in cfg.items()}
