"""Checkpoints: tensors, numbers and strings only, written atomically, loaded safely and strictly.

A checkpoint records its configuration and the identity of its hand model, but none of that model's arrays.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from yacs.config import CfgNode

from manopth import HandPair
from models import DIR, build_model, efficientnet_lite, published
from models.hands import load_hands
from utils import distributed
from utils.config import flatten, load_config, refuse_other_network
from utils.errors import UserError
from utils.files import partial_path
from utils.safetensors_file import SUFFIX, read_safetensors, write_safetensors
from utils.tensor_files import check_archive, read_tensors, write_tensors

Network = TypeVar('Network', bound=torch.nn.Module)
FORMAT = 'dir-checkpoint-1'
SHIPPED = Path(__file__).resolve().parents[1] / 'checkpoint' / 'dir_synthetic.safetensors'  # docs/model_card.md
BEST, LATEST, PREVIOUS = 'best.pth', 'latest.pth', 'previous.pth'  # of a run folder
REST = 'published_rest'  # entries of a published checkpoint that have no counterpart in the network
_REST = f'{REST}.'  # prefix of their names in safetensors files, beside the network's own
TRAINING_STATE = ('optimizer', 'average')  # entries that only a resumed run needs
_DEEPEST = 8  # levels of a configuration or record
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
    content = {'format': FORMAT, 'model': model.state_dict(), 'config': to_plain(cfg), 'hand_model': hand_model, **more}
    write_checkpoint(path, content)


def write_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write the content of a checkpoint, as safetensors if the path ends with .safetensors.

    That format holds the network and what fits into JSON. Raises UserError for anything else, e.g. optimizer state.
    """
    if Path(path).suffix != SUFFIX:
        write_tensors(path, content)
        return
    parts = dict(content)
    tensors = parts.pop('model') | {_REST + key: value for key, value in parts.pop(REST, {}).items()}
    metadata: dict[str, str] = {}
    for key, value in parts.items():
        try:
            metadata[key] = value if key == 'format' else json.dumps(value)
        except TypeError:
            raise UserError(f'{path}: a safetensors file cannot hold {key}. Write a .pth file instead.') from None
    write_safetensors(path, tensors, metadata)


def read_content(path: str | Path) -> Any:
    """The content of a .pth or .safetensors file, whoever wrote it; of a folder, its best.pth."""
    path = checkpoint_file(path)
    if path.suffix != SUFFIX:
        return read_tensors(path)
    tensors, metadata = read_safetensors(path)
    if metadata.get('format') != FORMAT:
        return tensors
    content: dict[str, Any] = {'format': FORMAT}
    for key in metadata.keys() - content.keys():
        try:
            content[key] = json.loads(metadata[key])
        except (ValueError, RecursionError):
            raise UserError(f'The checkpoint {path} is damaged: its metadata {key} is not JSON.') from None
    content['model'] = {key: value for key, value in tensors.items() if not key.startswith(_REST)}
    rest = {key.removeprefix(_REST): value for key, value in tensors.items() if key.startswith(_REST)}
    return content | ({REST: rest} if rest else {})


def save_rotating(path: str | Path, *, model: torch.nn.Module, cfg: CfgNode, hand_model: str, **more: Any) -> None:
    """``save_checkpoint``, keeping the file that it replaces as previous.pth, if that one is sound.

    A kill between any two steps leaves at least as many sound checkpoints as there were.
    """
    path = Path(path)
    with _second_name(path) as old:
        save_checkpoint(path, model=model, cfg=cfg, hand_model=hand_model, **more)
        if old is not None:
            os.replace(old, path.with_name(PREVIOUS))


@contextmanager
def _second_name(path: Path) -> Iterator[Path | None]:
    """Another name of a sound checkpoint (a copy, where the file system has no hard links), removed afterwards.

    None if ``path`` is missing or damaged.
    """
    try:
        check_archive(path)
    except UserError:
        yield None
        return
    name = partial_path(path.with_name(PREVIOUS))
    try:
        try:
            os.link(path, name)
        except OSError:
            shutil.copyfile(path, name)
        yield name
    finally:
        name.unlink(missing_ok=True)


def has_checkpoint(folder: str | Path) -> bool:
    """Whether ``folder`` holds a run that ``read_newest_sound`` would look at."""
    return any((Path(folder) / name).exists() for name in (LATEST, PREVIOUS))


def refuse_finished(folder: str | Path) -> None:
    """Raise UserError if only the result of a run is left in ``folder``: a new run would overwrite it."""
    if (Path(folder) / BEST).exists() and not has_checkpoint(folder):
        raise UserError(
            f'{folder} holds the {BEST} of a run, but no {LATEST} to continue from. Choose another OUTPUT_DIR, or move '
            f'{BEST} away.'
        )


def read_newest_sound(folder: str | Path) -> tuple[dict[str, Any], Path]:
    """Read latest.pth or, if it is missing or damaged, previous.pth -> (content, its path).

    The main process prints a line for each file passed over. Raises UserError with every reason if neither is sound.
    """
    refused = []
    for name in (LATEST, PREVIOUS):
        path = Path(folder) / name
        try:
            content = read_checkpoint(path)
        except UserError as error:
            refused.append(str(error))
            continue
        if distributed.is_main():
            for reason in refused:
                print(f'{reason} Continuing from {path}.', flush=True)
        return content, path
    raise UserError(f'{folder} holds no checkpoint to continue from. {" ".join(refused)}')


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read one of this project's checkpoints, .pth or .safetensors, to the CPU; of a folder, its best.pth.

    Its checksum is verified and parameter names of earlier versions are updated. Raises UserError if the file is
    missing, damaged, or has another format.
    """
    path = checkpoint_file(path)
    return _require_ours(read_content(path), path)


def checkpoint_file(path: str | Path) -> Path:
    """The file itself, or best.pth of a run folder."""
    return Path(path) / BEST if Path(path).is_dir() else Path(path)


def _require_ours(content: Any, path: Path) -> dict[str, Any]:
    if not isinstance(content, dict) or content.get('format') != FORMAT:
        instead = f"it has neither the format {FORMAT} nor the published form {{'net': ...}}"
        if published.is_published(content):
            instead = 'it has the published form: apps/convert_checkpoint.py converts it'
        raise UserError(f'{path} is not a checkpoint of this project; {instead}.')
    required = {'model': _is_state, 'config': _is_plain_mapping, 'hand_model': lambda value: isinstance(value, str)}
    optional = {'average': _is_state, REST: _is_state, 'progress': _is_plain_mapping, 'record': _is_plain_mapping}
    checks = required | {key: check for key, check in optional.items() if key in content}
    if bad := [key for key, check in checks.items() if not check(content.get(key))]:
        raise UserError(f'{path} is not a whole checkpoint: its entry {bad[0]!r} is missing or malformed.')
    backbone = flatten(content['config']).get('MODEL.BACKBONE')
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


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in value.items()
    )


def _is_plain_mapping(value: Any) -> bool:
    return isinstance(value, dict) and _is_plain(value)


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether ``value`` consists of text, numbers and a few levels of containers."""
    if isinstance(value, dict):
        return depth < _DEEPEST and all(isinstance(k, str) and _is_plain(v, depth + 1) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return depth < _DEEPEST and all(_is_plain(item, depth + 1) for item in value)
    return value is None or isinstance(value, (str, int, float))


def in_half_precision(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """float32 tensors as float16, but for those with values beyond its range: a batch norm's variance may be large."""
    most = torch.finfo(torch.float16).max
    fits = {key for key, value in state.items() if value.dtype == torch.float32 and not (value.abs() > most).any()}
    return {key: value.half() if key in fits else value for key, value in state.items()}


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
    _check_fit(model.state_dict(), state, path=path)
    model.load_state_dict(state)


def _check_fit(own: dict[str, torch.Tensor], state: dict[str, torch.Tensor], *, path: str | Path) -> None:
    odd = [
        f'{key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}'
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape
    ]
    odd += [  # other precisions are converted
        f'{key} is {state[key].dtype}, not {own[key].dtype}'
        for key in own.keys() & state.keys()
        if own[key].is_floating_point() != state[key].is_floating_point() or state[key].is_complex()
    ]
    odd += [f'{key} is missing' for key in own.keys() - state.keys()]
    odd += [f'{key} is not part of this network' for key in state.keys() - own.keys()]
    if odd:
        more = f' and {len(odd) - 3} more' if len(odd) > 3 else ''
        raise UserError(
            f'{path} does not fit this network: {"; ".join(sorted(odd)[:3])}{more}. Use the '
            'configuration it was trained with.'
        )


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
    path = checkpoint_file(path)
    content = read_content(path)
    if published.is_published(content):
        model, cfg, rest = published.load_published(content, path=path, overrides=overrides)
        return Loaded(model, cfg, {REST: rest, 'hand_model': model.hands.identity})
    content = _require_ours(content, path)
    try:
        trained = load_config(None, base=content['config'])
    except UserError as error:
        raise UserError(f'{path} cannot be used: {error}') from None
    cfg = load_config(None, overrides, base=content['config'])
    refuse_other_network(trained, cfg, path=path)
    hand_models = load_hands(cfg.MANO.SOURCE, cfg.MANO.PATH)
    check_hand_model(content, hand_models, path=path)
    with torch.device('meta'):  # shapes only: a small file may describe a network of many gigabytes
        described = build_model(cfg, hand_models, pretrained=False).state_dict()
    _check_fit(described, content['model'], path=path)
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
