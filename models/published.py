"""Convert the published checkpoint ``{'net': state_dict}`` to our state_dict and back, name by name.

Every published name is used exactly once or dropped: MANO arrays (licensed, and constants of the hand model), the
ImageNet classifier ``backbone.fc`` and the transformer's block 0 (never run), ``e_0`` (logits of a softmax over one
entry: always 1), pixel grids and class weights (constants). Segmentation class 1 is the right hand in the published
network and the left hand in ours.

A converted checkpoint keeps the dropped entries except the MANO arrays, so that converting back is exact to the bit.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from manopth import HandPair
from models import DIR, build_model
from models.bone_projection import ProjectedConvolution
from models.criterion import SEGMENTATION_CLASS_WEIGHTS
from models.hands import load_hands
from models.refinement import JOINT_FEATURES
from utils.config import flatten, load_config, of_network, refuse_other_network
from utils.errors import UserError
from utils.hand import PUBLISHED_LEFT_MIDDLE_TIP, SIDES

# The published file records no configuration: it is that of configs/dir_interhand.yaml but for one fingertip.
CONFIGURATION = ['MODEL.LEFT_MIDDLE_TIP', str(PUBLISHED_LEFT_MIDDLE_TIP), 'MODEL.PRETRAINED', 'false']
# Keys of the network that may differ: how it is trained, and one fingertip. All others are constants in the published
# code, so another network cannot be written in its form.
_FREE = ('MODEL.PRETRAINED', 'MODEL.BACKBONE_WEIGHTS', 'MODEL.INIT', 'MODEL.DETACH', 'MODEL.LEFT_MIDDLE_TIP')
_COUNTER = 'num_batches_tracked'  # ending: of each hand's norm there, of both hands' together here
_INTEGERS = (_COUNTER, 'th_faces')  # endings of the names of int64 tensors; all others are float32
_NAMES_SHOWN = 20  # per kind, in an error message
_SAME_HAND = 1e-6  # relative to an array's largest entry: float32 rounding


@dataclass(frozen=True)
class Entry:
    """One of our tensors, the published tensors that it is made of, and the (linear) maps both ways."""

    key: str
    published: tuple[str, ...]
    to_ours: Callable[..., Tensor]
    to_published: Callable[[Tensor], tuple[Tensor, ...]]


def _same(key: str, published: str) -> Entry:
    return Entry(key, (published,), lambda x: x, lambda y: (y,))


def _per_hand(key: str, published: str, *, stack: bool = False) -> Entry:
    """``published`` contains '{side}'; the two tensors are concatenated (or stacked) along the first axis."""
    names = tuple(published.format(side=side) for side in ('left', 'right'))
    if key.endswith(_COUNTER):
        return Entry(key, names, lambda left, right: left, lambda y: (y, y.clone()))
    if stack:
        return Entry(key, names, lambda left, right: torch.stack([left, right]), lambda y: y.unbind(0))
    return Entry(key, names, lambda left, right: torch.cat([left, right]), lambda y: y.chunk(2))


_NORM = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
_AFFINE = ('weight', 'bias')


def _residual(ours: str, theirs: str) -> list[Entry]:
    names: list[tuple[str, str, tuple[str, ...]]] = [(f'{3 * i}', f'bn{i + 1}', _NORM) for i in range(3)]
    names += [(f'{3 * i + 2}', f'conv{i + 1}.conv', _AFFINE) for i in range(3)] + [('skip', 'skip_layer.conv', _AFFINE)]
    return [_same(f'{ours}.{a}.{leaf}', f'{theirs}.{b}.{leaf}') for a, b, leaves in names for leaf in leaves]


_Layers = tuple[tuple[int, tuple[str, ...]], ...]
_CONV_NORM_CONV: _Layers = ((0, _AFFINE), (1, _NORM), (3, _AFFINE))


def _sequential(
    ours: str, theirs: str, entry: Callable[[str, str], Entry] = _same, layers: _Layers = _CONV_NORM_CONV
) -> list[Entry]:
    return [entry(f'{ours}.{i}.{leaf}', f'{theirs}.{i}.{leaf}') for i, leaves in layers for leaf in leaves]


def _swap_last_classes(entry: Entry) -> Entry:
    order = [0, 2, 1]
    return Entry(entry.key, entry.published, lambda x: x[order], lambda y: (y[order],))


def _stage(index: int, number: int) -> list[Entry]:
    ours, decoder = f'stages.{index}', 'decoder'
    theirs = f'{decoder}.projecter_{number}'
    entries = _residual(f'{ours}.skip', f'{decoder}.skip_layer{number}')
    entries += _residual(f'{ours}.fuse_skip', f'{decoder}.fusion_layer{number}')
    entries += _residual(f'{ours}.enhance_map', f'{decoder}.enhance_layer{number}')
    entries += _sequential(f'{ours}.sampled', f'{theirs}.img2joint_{{side}}.filters', _per_hand)
    entries += _sequential(f'{ours}.position', f'{theirs}.pos_emb_{{side}}', _per_hand)
    entries += _sequential(f'{ours}.interaction.global_position', f'{theirs}.global_pos_emb')
    for layer in range(4):
        graph, gconv = f'{ours}.interaction.graph.{layer}', f'{theirs}.gcn_{{side}}.gconv_layers.{layer}'
        entries.append(
            Entry(
                f'{graph}.weight',
                tuple(f'{gconv.format(side=s)}.gconv.W' for s in ('left', 'right')),
                lambda left, right: torch.stack([torch.cat([w[0], w[1]], -1) for w in (left, right)]),
                lambda y: tuple(torch.stack(hand.chunk(2, -1)) for hand in y),
            )
        )
        entries.append(_per_hand(f'{graph}.bias', f'{gconv}.gconv.bias', stack=True))
        entries.append(_per_hand(f'{graph}.neighbour_logits', f'{gconv}.gconv.e_1'))
        entries += [_per_hand(f'{graph}.norm.{leaf}', f'{gconv}.bn.{leaf}') for leaf in _NORM]
    transformer, ste = f'{ours}.interaction.transformer', f'{theirs}.interaction'
    entries.append(
        Entry(
            f'{transformer}.position',
            (f'{ste}.spatial_pos_embed',),
            lambda x: x.view(2, 21, -1),
            lambda y: (y.reshape(1, 42, -1),),
        )
    )
    names = {
        'norm1': 'norm1',
        'qkv': 'attn.qkv',
        'out': 'attn.proj',
        'norm2': 'norm2',
        'mlp.0': 'mlp.fc1',
        'mlp.2': 'mlp.fc2',
    }
    entries += [
        _same(f'{transformer}.blocks.{block}.{a}.{leaf}', f'{ste}.STEblocks.{block + 1}.{b}.{leaf}')
        for block in range(3)
        for a, b in names.items()
        for leaf in _AFFINE
    ]
    entries += [_same(f'{transformer}.norm.{leaf}', f'{ste}.spatial_norm.{leaf}') for leaf in _AFFINE]
    entries += [
        _same(f'{ours}.interaction.head.{i}.{leaf}', f'{ste}.head.{i}.{leaf}') for i in (0, 1) for leaf in _AFFINE
    ]
    entries += [
        _per_hand(f'{ours}.parameters_head.{leaf}', f'{theirs}.regressor.mano_{{side}}.{leaf}', stack=True)
        for leaf in _AFFINE
    ]
    entries += [_same(f'{ours}.offset_head.{leaf}', f'{theirs}.regressor.offset.{leaf}') for leaf in _AFFINE]
    entries += _sequential(f'{ours}.projected', f'{theirs}.proj_feat_emb')
    entries.append(
        Entry(
            f'{ours}.projection.weight',
            (f'{theirs}.fusion.0.weight',),
            lambda x: ProjectedConvolution.from_conv_weight(x, JOINT_FEATURES),
            lambda y: (ProjectedConvolution.as_conv_weight(y),),
        )
    )
    entries.append(_same(f'{ours}.projection.bias', f'{theirs}.fusion.0.bias'))
    entries += [_same(f'{ours}.fuse.0.{leaf}', f'{theirs}.fusion.1.{leaf}') for leaf in _NORM]
    entries += [_same(f'{ours}.fuse.2.{leaf}', f'{theirs}.fusion.3.{leaf}') for leaf in _AFFINE]
    return entries


def entries(keys: Iterable[str]) -> list[Entry]:
    """The complete map. ``keys``: all of either network; the backbone's are the same in both and read from there."""
    table = [_same(key, key) for key in keys if key.startswith('backbone.') and not key.startswith('backbone.fc.')]
    table += _sequential('initial_regressor.attention', 'init_regressor.attention_{side}', _per_hand)
    table += [
        _per_hand(f'initial_regressor.parameters_head.{leaf}', f'init_regressor.mano_{{side}}.{leaf}', stack=True)
        for leaf in _AFFINE
    ]
    table += [_same(f'initial_regressor.offset_head.{leaf}', f'init_regressor.offset.{leaf}') for leaf in _AFFINE]
    table += _stage(0, 4) + _stage(1, 3)
    heads = 'dense_heads'
    table += _sequential(f'{heads}.trunk', 'decoder.conv_final', layers=((0, ('weight',)), (1, _NORM), (3, _AFFINE)))
    seg = _sequential(f'{heads}.segmentation', 'decoder.seg')
    table += [_swap_last_classes(e) if '.3.' in e.key else e for e in seg]
    table += _sequential(f'{heads}.dense', 'decoder.dense')
    return table


def why_dropped(key: str) -> str | None:
    """Why a published name has no counterpart in our network; None if it has one or is unknown."""
    if '.mano_layer_' in key:
        return 'MANO array: read from the hand model'
    if key.startswith('backbone.fc.'):
        return 'ImageNet classifier, unused'
    if '.STEblocks.0.' in key:
        return 'transformer block that never runs'
    if key.endswith('.gconv.e_0'):
        return 'logit of a softmax over one entry, no effect'
    if key.endswith('.img_gird') or key == 'seg_loss.weight':
        return 'constant'
    return None


def is_published(content: Any) -> bool:
    """Whether a file's content has the published form; ``load_published`` checks the names in it."""
    return isinstance(content, dict) and isinstance(content.get('net'), dict)


def load_published(
    content: dict[str, Any], *, path: str | Path, overrides: Iterable[str] = ()
) -> tuple[DIR, CfgNode, dict[str, Tensor]]:
    """Content of a published file -> (our network in evaluation mode, its configuration, the dropped entries).

    Raises UserError for names that are missing or unknown, for other shapes or types, and if its hand model is not
    that of MANO.PATH.
    """
    net, state = content['net'], published_state(content, path=path)
    cfg = load_config(None, [*CONFIGURATION, *overrides])
    refuse_other_network(load_config(None, CONFIGURATION), cfg, path=path)
    hand_models = load_hands(cfg.MANO.SOURCE, cfg.MANO.PATH)
    if key := differing_array(net, hand_models):
        raise UserError(
            f'{path} was trained on another hand model than that of {cfg.MANO.PATH} ({key} differs). Set MANO.PATH '
            'to the files it was trained on.'
        )
    model = build_model(cfg, hand_models, pretrained=False)
    model.load_state_dict(state)
    back, arrays = to_published(state), hand_arrays(hand_models)
    rest = {
        key: value
        for key, value in net.items()
        if key not in arrays and not (key in back and torch.equal(back[key], value))
    }
    return model.eval(), cfg, rest


def published_state(content: dict[str, Any], *, path: str | Path) -> dict[str, Tensor]:
    """Our state_dict from a published file's content. Raises UserError for missing, unknown or misshapen names."""
    _check_names(content['net'], path)
    return to_ours(content['net'])


def differing_array(net: dict[str, Tensor], hand_models: HandPair) -> str | None:
    """The first MANO array of a published network that is not this hand model's; None if all agree."""
    for key, array in hand_arrays(hand_models).items():
        if not torch.allclose(net[key], array, rtol=0, atol=_SAME_HAND * max(array.abs().max().item(), 1)):
            return key
    return None


def to_ours(net: dict[str, Tensor]) -> dict[str, Tensor]:
    """A complete published ``net`` dictionary -> our state_dict."""
    return {entry.key: entry.to_ours(*(net[name] for name in entry.published)) for entry in entries(net)}


def to_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state_dict -> the entries of the published one that it determines."""
    return {
        name: value.contiguous()
        for entry in entries(state)
        for name, value in zip(entry.published, entry.to_published(state[entry.key]))
    }


def whole_published(state: dict[str, Tensor], cfg: CfgNode, rest: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Our state_dict -> all 963 entries of the published one, MANO arrays from MANO.PATH included.

    rest: the dropped entries that a converted checkpoint keeps; without them, the parts that never run are zeros.
    Raises UserError if the configuration or the names are not the published network's.
    """
    wanted, is_now = flatten(load_config(None, CONFIGURATION)), flatten(cfg)
    fixed = (key for key in is_now if of_network(key) and key not in _FREE)
    other = [f'{key} is {is_now[key]}, not {wanted[key]}' for key in fixed if is_now[key] != wanted[key]]
    other += sorted(f'it lacks {key}' for key in state.keys() - {entry.key for entry in entries(state)})[:_NAMES_SHOWN]
    if other:
        raise UserError(
            f'The published code cannot run this network: {"; ".join(other)}. Keep it in the form of this project.'
        )
    net = to_published(state)
    whole = net | _idle_parts(net)
    if odd := [key for key, value in (rest or {}).items() if key not in whole or value.shape != whole[key].shape]:
        raise UserError(f'The published network has no {odd[0]} of this shape. Convert the published file again.')
    kept = {
        key: value.to(whole[key].dtype)  # those of a checkpoint in half precision
        for key, value in (rest or {}).items()
        if key not in net or key.endswith(_COUNTER)
    }
    return whole | kept | hand_arrays(load_hands(cfg.MANO.SOURCE, cfg.MANO.PATH))


def hand_arrays(hand_models: HandPair) -> dict[str, Tensor]:
    """The 60 MANO arrays of a published checkpoint: ten per hand in each of three modules."""
    arrays = {}
    for side, hand in zip(SIDES, hand_models):
        by_name = {
            'betas': np.zeros((1, 10)),
            'shapedirs': hand.shape_dirs,
            'posedirs': hand.pose_dirs,
            'v_template': hand.template[None],
            'J_regressor': hand.joint_regressor,
            'weights': hand.skinning_weights,
            'hands_mean': hand.pose_mean[None],
            'comps': hand.pose_components,
            'selected_comps': hand.pose_components,
            'faces': hand.faces,
        }
        for place in ('init_regressor', 'decoder.projecter_4.regressor', 'decoder.projecter_3.regressor'):
            for name, array in by_name.items():
                kind = torch.int64 if name == 'faces' else torch.float32
                arrays[f'{place}.mano_layer_{side}.th_{name}'] = torch.from_numpy(array.copy()).to(kind)
    return arrays


def _idle_parts(net: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries that the published network never uses: zeros, and its constants."""
    idle = {
        'backbone.fc.weight': torch.zeros(1000, 2048),
        'backbone.fc.bias': torch.zeros(1000),
        'seg_loss.weight': torch.tensor(SEGMENTATION_CLASS_WEIGHTS),
    }
    for key, value in net.items():
        if '.STEblocks.1.' in key:
            idle[key.replace('.STEblocks.1.', '.STEblocks.0.')] = torch.zeros_like(value)
        elif key.endswith('.gconv.e_1'):
            idle[f'{key[:-1]}0'] = torch.ones(1, 21)
    for number, size in ((4, 16), (3, 32)):
        centres = torch.arange(size) + 0.5
        idle[f'decoder.projecter_{number}.img_gird'] = torch.cartesian_prod(centres, centres).flip(1)
    return idle


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Name -> shape of all 963 entries."""
    hand_models = load_hands('standin')  # of MANO's shapes
    with torch.device('meta'):  # shapes only
        state = build_model(load_config(None, CONFIGURATION), hand_models).state_dict()
    net = to_published(state)
    return {key: tuple(value.shape) for key, value in (net | _idle_parts(net) | hand_arrays(hand_models)).items()}


def _check_names(net: dict[str, Any], path: str | Path) -> None:
    """Raise UserError, listing names, unless ``net`` holds tensors of the published names, shapes and types."""
    shapes = published_shapes()
    tensors = {key: value for key, value in net.items() if isinstance(value, Tensor)}
    odd = [
        f'{key} is {tuple(tensors[key].shape)}, not {shape}'
        for key, shape in shapes.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    other_types = [
        f'{key} is {tensors[key].dtype}'
        for key in shapes.keys() & tensors.keys()
        if tensors[key].dtype != (torch.int64 if key.endswith(_INTEGERS) else torch.float32)
    ]
    problems = {
        'missing': sorted(shapes.keys() - tensors.keys()),
        'unknown': sorted(map(str, net.keys() - shapes.keys())),
        'misshapen': odd,
        'of another type': sorted(other_types),
    }
    listed = [
        f'{len(names)} {what}: {", ".join(names[:_NAMES_SHOWN])}{", ..." if len(names) > _NAMES_SHOWN else ""}'
        for what, names in problems.items()
        if names
    ]
    if listed:
        raise UserError(
            f'{path} is not the published DIR checkpoint, which has {len(shapes)} names ({"; ".join(listed)}).'
        )
