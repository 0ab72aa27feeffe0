"""The published checkpoint's names <-> ours: an explicit map in which every published name is used exactly once.

Dropped, and why: MANO arrays (licensed, and a constant of the hand model), the ImageNet classifier ``backbone.fc`` and
the transformer's block 0 (never run), ``e_0`` (logits of a softmax over one entry: always 1), pixel grids and class
weights (constants). Segmentation class 1 is the right hand there and the left hand here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.backbone import ours as backbone_key
from models.bone_projection import ProjectedConvolution
from models.refinement import JOINT_FEATURES


@dataclass(frozen=True)
class Entry:
    """One of our tensors, the published ones behind it, and the (linear) maps both ways."""

    key: str
    published: tuple[str, ...]
    to_ours: Callable[..., Tensor]
    to_published: Callable[[Tensor], tuple[Tensor, ...]]


def _same(key: str, published: str) -> Entry:
    return Entry(key, (published,), lambda x: x, lambda y: (y,))


def _per_hand(key: str, published: str, *, stack: bool = False) -> Entry:
    """``published`` contains '{side}'; the two tensors are concatenated (or stacked) along the first axis."""
    names = tuple(published.format(side=side) for side in ('left', 'right'))
    if key.endswith('num_batches_tracked'):
        return Entry(key, names, lambda left, right: left, lambda y: (y, y.clone()))
    if stack:
        return Entry(key, names, lambda left, right: torch.stack([left, right]), lambda y: y.unbind(0))
    return Entry(key, names, lambda left, right: torch.cat([left, right]), lambda y: y.chunk(2))


_NORM = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
_AFFINE = ('weight', 'bias')


def _residual(ours: str, theirs: str) -> list[Entry]:
    names = [(f'{3 * i}', f'bn{i + 1}', _NORM) for i in range(3)]
    names += [(f'{3 * i + 2}', f'conv{i + 1}.conv', _AFFINE) for i in range(3)] + [('skip', 'skip_layer.conv', _AFFINE)]
    return [_same(f'{ours}.{a}.{leaf}', f'{theirs}.{b}.{leaf}') for a, b, leaves in names for leaf in leaves]


def _sequential(ours: str, theirs: str, entry=_same, layers=((0, _AFFINE), (1, _NORM), (3, _AFFINE))) -> list[Entry]:
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
        entries.append(Entry(
            f'{graph}.weight', tuple(f'{gconv.format(side=s)}.gconv.W' for s in ('left', 'right')),
            lambda left, right: torch.stack([torch.cat([w[0], w[1]], -1) for w in (left, right)]),
            lambda y: tuple(torch.stack(hand.chunk(2, -1)) for hand in y)))
        entries.append(_per_hand(f'{graph}.bias', f'{gconv}.gconv.bias', stack=True))
        entries.append(_per_hand(f'{graph}.neighbour_logits', f'{gconv}.gconv.e_1'))
        entries += [_per_hand(f'{graph}.norm.{leaf}', f'{gconv}.bn.{leaf}') for leaf in _NORM]
    transformer, ste = f'{ours}.interaction.transformer', f'{theirs}.interaction'
    entries.append(Entry(f'{transformer}.position', (f'{ste}.spatial_pos_embed',),
                         lambda x: x.view(2, 21, -1), lambda y: (y.reshape(1, 42, -1),)))
    names = {'norm1': 'norm1', 'qkv': 'attn.qkv', 'out': 'attn.proj', 'norm2': 'norm2', 'mlp.0': 'mlp.fc1',
             'mlp.2': 'mlp.fc2'}
    entries += [_same(f'{transformer}.blocks.{block}.{a}.{leaf}', f'{ste}.STEblocks.{block + 1}.{b}.{leaf}')
                for block in range(3) for a, b in names.items() for leaf in _AFFINE]
    entries += [_same(f'{transformer}.norm.{leaf}', f'{ste}.spatial_norm.{leaf}') for leaf in _AFFINE]
    entries += [_same(f'{ours}.interaction.head.{i}.{leaf}', f'{ste}.head.{i}.{leaf}')
                for i in (0, 1) for leaf in _AFFINE]
    entries += [_per_hand(f'{ours}.parameters_head.{leaf}', f'{theirs}.regressor.mano_{{side}}.{leaf}', stack=True)
                for leaf in _AFFINE]
    entries += [_same(f'{ours}.offset_head.{leaf}', f'{theirs}.regressor.offset.{leaf}') for leaf in _AFFINE]
    entries += _sequential(f'{ours}.projected', f'{theirs}.proj_feat_emb')
    entries.append(Entry(f'{ours}.projection.weight', (f'{theirs}.fusion.0.weight',),
                         lambda x: ProjectedConvolution.from_conv_weight(x, JOINT_FEATURES),
                         lambda y: (ProjectedConvolution.as_conv_weight(y),)))
    entries.append(_same(f'{ours}.projection.bias', f'{theirs}.fusion.0.bias'))
    entries += [_same(f'{ours}.fuse.0.{leaf}', f'{theirs}.fusion.1.{leaf}') for leaf in _NORM]
    entries += [_same(f'{ours}.fuse.2.{leaf}', f'{theirs}.fusion.3.{leaf}') for leaf in _AFFINE]
    return entries


def entries(published_keys) -> list[Entry]:
    """The whole map; the backbone's names follow torchvision's and are taken from ``published_keys``."""
    table = [_same(f'backbone.{backbone_key(key[9:])}', key) for key in published_keys
             if key.startswith('backbone.') and not key.startswith('backbone.fc.')]
    table += _sequential('initial_regressor.attention', 'init_regressor.attention_{side}', _per_hand)
    table += [_per_hand(f'initial_regressor.parameters_head.{leaf}', f'init_regressor.mano_{{side}}.{leaf}', stack=True)
              for leaf in _AFFINE]
    table += [_same(f'initial_regressor.offset_head.{leaf}', f'init_regressor.offset.{leaf}') for leaf in _AFFINE]
    table += _stage(0, 4) + _stage(1, 3)
    heads = 'dense_heads'
    table += _sequential(f'{heads}.trunk', 'decoder.conv_final', layers=((0, ('weight',)), (1, _NORM), (3, _AFFINE)))
    seg = _sequential(f'{heads}.segmentation', 'decoder.seg')
    table += [_swap_last_classes(e) if '.3.' in e.key else e for e in seg]
    table += _sequential(f'{heads}.dense', 'decoder.dense')
    return table


def why_dropped(key: str) -> str | None:
    """The reason why a published name has no counterpart here; None if it is not one of those."""
    if '.mano_layer_' in key:
        return 'MANO array: comes from the hand model'
    if key.startswith('backbone.fc.'):
        return 'ImageNet classifier, unused'
    if '.STEblocks.0.' in key:
        return 'transformer block that never runs'
    if key.endswith('.gconv.e_0'):
        return 'logit of a softmax over one entry, no effect'
    if key.endswith('.img_gird') or key == 'seg_loss.weight':
        return 'constant'
    return None


def to_ours(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published ``net`` dictionary -> our state_dict. Raises KeyError listing missing or unknown names."""
    table = entries(published)
    used = {name for entry in table for name in entry.published}
    missing = sorted(used - published.keys())
    unknown = sorted(key for key in published.keys() - used if why_dropped(key) is None)
    if missing or unknown:
        raise KeyError(f'missing: {missing}; unknown: {unknown}')
    return {entry.key: entry.to_ours(*(published[name] for name in entry.published)) for entry in table}
