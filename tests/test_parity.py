"""The network against numbers that the published code computes from made-up weights, hands and images.

The numbers lie outside the repository: in shared/parity next to it, or where the environment's DIR_PARITY says.
"""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from published_functions import (  # noqa: F401  (pytest collects the tests)
    FLOORS,
    OUR_CLASSES,
    Arrays,
    by_published_name,
    check_figures,
    check_terms,
    check_training_terms,
    close,
    losses_and_gradients,
    losses_and_gradients_in_training_mode,
    test_graph_layer,
    test_hand_layer,
    test_hand_layer_of_the_data,
    test_mesh_losses,
    test_pixelwise_losses,
    test_projecting_back,
    test_rotations,
    test_sampling_at_the_joints,
    test_transformer,
)
from torch.utils.data import default_collate

from apps import eval_interhand
from dataset.augmentation import parameters
from dataset.batch import BatchMaker
from dataset.prepared import InterHandDataset
from evaluation.metrics import JointRegressor, Protocol, sample_errors
from evaluation.summary import summarise
from manopth import ManoLayer
from models import build_criterion, published
from models.hands import load_hands
from models.predictions import Target
from models.preprocessing import IMAGENET_STD, Preprocessing
from utils.config import load_config
from utils.errors import UserError
from utils.hand import HAND_SCALE, SIDES

PARITY = Path(os.environ.get('DIR_PARITY') or Path(__file__).resolve().parents[2] / 'shared' / 'parity')
pytestmark = pytest.mark.skipif(
    not (PARITY / 'recipe.py').is_file(),
    reason=f"the published network's numbers are not here: no {PARITY} (DIR_PARITY)",
)
GREY_LEVELS = 1.5  # half a level where the published loader rounds after a warp, and a JPEG decoder's own


def read(name: str):
    return json.loads((PARITY / name).read_text())


def module(name: str):
    spec = importlib.util.spec_from_file_location(f'parity_{name}', PARITY / f'{name}.py')
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope='module')
def hands():
    return load_hands('files', str(PARITY))


@pytest.fixture(scope='module')
def units():
    return Arrays(PARITY / 'units.npz')


@pytest.fixture(scope='module')
def floor():
    return {name: FLOORS * value['max_abs'] for name, value in read('noise_floor.json').items()}


@pytest.fixture(scope='module')
def weights():
    """All 963 entries of the published checkpoint, with the recipe's values."""
    return {key: torch.from_numpy(value) for key, value in module('make_checkpoint').state_dict().items()}


@pytest.fixture(scope='module')
def network(weights):
    """The published network with the recipe's weights, in evaluation mode; tests leave it as it was."""
    return published.load_published({'net': weights}, path='DIR.pth', overrides=['MANO.PATH', str(PARITY)])[0]


@pytest.fixture(scope='module')
def image():
    return Arrays(PARITY / 'input.npz')('img')


# The map


def test_every_published_name_is_used_once_or_dropped_for_a_reason():
    keys = [entry['key'] for entry in read('official_keys.json')]
    assert len(keys) == len(set(keys)) == 963
    used = [name for entry in published.entries(keys) for name in entry.published]
    dropped = [key for key in keys if published.why_dropped(key)]
    assert sorted(used + dropped) == sorted(keys)


def test_the_map_covers_the_network_and_goes_both_ways(network):
    shapes = {entry['key']: entry['shape'] for entry in read('official_keys.json')}
    table, state = published.entries(shapes), network.state_dict()
    assert sorted(entry.key for entry in table) == sorted(state)
    for entry in table:
        back = entry.to_published(state[entry.key])
        assert [list(tensor.shape) for tensor in back] == [shapes[name] for name in entry.published], entry.key
        assert torch.equal(entry.to_ours(*back), state[entry.key]), entry.key


def test_missing_unknown_and_misshapen_names_are_listed(weights):
    weights = weights | {'decoder.seg.3.bias': torch.zeros(4)}
    weights['decoder.more'] = weights.pop('decoder.dense.3.bias')
    with pytest.raises(
        UserError,
        match=r'DIR.pth is not .* 963 names .*1 missing: decoder.dense.3.bias; 1 unknown: '
        r'decoder.more; 1 misshapen: decoder.seg.3.bias is \(4,\), not \(3,\)',
    ):
        published.load_published({'net': weights}, path='DIR.pth', overrides=['MANO.PATH', str(PARITY)])


def test_the_names_and_shapes_that_are_asked_for_are_the_published_ones():
    assert published.published_shapes() == {entry['key']: tuple(entry['shape']) for entry in read('official_keys.json')}


def test_other_hands_than_the_files_are_noticed(weights):
    key = 'decoder.projecter_3.regressor.mano_layer_left.th_v_template'
    with pytest.raises(UserError, match=f'trained on another hand model .*{key} differs.*MANO.PATH'):
        published.load_published(
            {'net': weights | {key: weights[key] + 1e-4}}, path='DIR.pth', overrides=['MANO.PATH', str(PARITY)]
        )


def test_what_never_runs_is_filled_in_with_the_published_constants(weights, network):
    cfg = load_config(None, [*published.CONFIGURATION, 'MANO.PATH', str(PARITY)])
    made = published.whole_published(network.state_dict(), cfg)
    assert made.keys() == weights.keys()
    for key, value in made.items():
        assert value.shape == weights[key].shape and value.dtype == weights[key].dtype, key
        idle = published.why_dropped(key) in (
            'ImageNet classifier, unused',
            'transformer block that never runs',
            'logit of a softmax over one entry, no effect',
        )
        assert idle or torch.equal(value, weights[key]), key


# Single functions: see also published_functions


@pytest.mark.parametrize('side', SIDES)
def test_one_hand_layer(units, side):
    layer = ManoLayer(
        side=side,
        mano_root=PARITY,
        ncomps=45,
        flat_hand_mean=False,
        root_rot_mode='rot6d',
        robust_rot=True,
        correct_left_shape=True,
    )
    vertices, joints = layer(units('mano/pose6d45'), units('mano/beta'))
    close(vertices / 1000, units(f'mano/{side}/verts'), 5e-7)
    close(joints / 1000, units(f'mano/{side}/joints'), 5e-7)


# The network in evaluation mode


def features(network, number: int) -> dict[str, tuple[torch.nn.Module, object]]:
    """Published name of an intermediate map -> our module and how to see its output as theirs."""
    stage, projecter = network.stages[4 - number], f'projecter_{number}'
    table = {
        f'decoder.skip_layer{number}': (stage.skip, lambda x: x),
        f'decoder.fusion_layer{number}': (stage.fuse_skip, lambda x: x),
        f'decoder.enhance_layer{number}': (stage.enhance_map, lambda x: x),
        f'{projecter}.fusion': (stage.fuse, lambda x: x),
        f'{projecter}.interaction': (stage.interaction, lambda x: x.flatten(1, 2)),
        f'{projecter}.pos_emb_left': (stage.position, lambda x: x[:, 0].transpose(1, 2)),
    }
    for hand, side in enumerate(SIDES):
        table[f'{projecter}.img2joint_{side}'] = (stage.sampled, lambda x, h=hand: x[:, h].transpose(1, 2).flatten(1))
        table[f'{projecter}.gcn_{side}'] = (stage.interaction.graph, lambda x, h=hand: x[:, h])
    return table


@torch.no_grad()
def test_outputs_and_intermediate_maps(network, image, floor):
    table = (
        features(network, 4)
        | features(network, 3)
        | {
            'c3': (network.backbone, lambda maps: maps[2]),
            'c4': (network.backbone, lambda maps: maps[3]),
            'init_regressor.attention_left': (network.initial_regressor.attention, lambda x: x[:, :1]),
            'init_regressor.attention_right': (network.initial_regressor.attention, lambda x: x[:, 1:]),
            'decoder.conv_final': (network.dense_heads.trunk, lambda x: x),
        }
    )
    seen, hooks = {}, []
    for name, (part, view) in table.items():
        hooks.append(
            part.register_forward_hook(
                lambda _module, _inputs, out, name=name, view=view: seen.__setitem__(name, view(out))
            )
        )
    try:
        outputs = by_published_name(network(image))
    finally:
        for hook in hooks:
            hook.remove()
    expected = Arrays(PARITY / 'eval_outputs.npz')
    assert len(expected.file) >= 45
    for name in expected.file:
        close(outputs[name], expected(name), floor[name])
    maps = Arrays(PARITY / 'eval_features.npz')
    assert seen.keys() == table.keys()
    for name, ours in seen.items():
        close(ours, maps(name), floor[name])


@torch.no_grad()
def test_outputs_centred_on_another_joint(network, image, floor, monkeypatch):
    monkeypatch.setattr(network.hand_head, 'root_joint', 9)
    outputs, expected = by_published_name(network(image)), Arrays(PARITY / 'eval_outputs_root9.npz')
    assert len(expected.file) >= 45
    for name in expected.file:
        close(outputs[name], expected(name), floor[name])


# Losses and gradients


@pytest.fixture(scope='module')
def objective(hands):
    """(criterion, target): these numbers were made with targets centred on joint 9 and hands centred on the wrist."""
    arrays = Arrays(PARITY / 'targets.npz')
    labels = torch.tensor(OUR_CLASSES)[arrays('seg')[:, 0].long()]
    target = Target(
        arrays.hands('mesh_3d_{}'),
        arrays.hands('joint_3d_{}'),
        arrays.hands('mesh_2d_{}')[..., :2],
        arrays.hands('joint_2d_{}')[..., :2],
        labels,
        arrays('dense'),
    )
    return build_criterion(load_config(None, ['ROOT_JOINT', '9']), hands), target


def compare_gradients(ours: dict[str, torch.Tensor], reference: dict, *, relative: float) -> int:
    """Gradient norms of every published parameter -> how many were left uncompared without a reason."""
    keys, compared = [entry['key'] for entry in read('official_keys.json')], 0
    for entry in published.entries(keys):
        if entry.key not in ours:  # running statistics
            continue
        for name, gradient in zip(entry.published, entry.to_published(ours[entry.key])):
            expected = reference[name]['l2']
            assert gradient.norm().item() == pytest.approx(expected, abs=relative * max(expected, 1e-4)), name
            compared += 1
    unused = [name for name, gradient in reference.items() if gradient is None or not gradient['l2']]
    assert all(published.why_dropped(name) for name in unused)
    return len(reference) - compared - len(unused)


def test_losses_and_gradients_with_frozen_norms(network, image, objective):
    reference = read('train_bn_frozen.json')
    terms, gradients = losses_and_gradients(network, image, objective)
    assert len(terms) == len(reference['losses']) == 42
    check_terms(terms, reference['losses'], 1e-5)
    assert sum(terms.values()).item() == pytest.approx(reference['total'], rel=1e-5)
    assert compare_gradients(gradients, reference['grads'], relative=2e-3) == 0


def test_losses_and_gradients_in_training_mode(network, image, objective):
    reference = read('train.json')
    _, terms, gradients = losses_and_gradients_in_training_mode(network, image, objective)
    assert len(terms) == len(reference['losses']) == 42
    check_training_terms(terms, reference['losses'])
    assert compare_gradients(gradients, reference['grads'], relative=1e-2) == 0


@torch.no_grad()
def test_losses_and_running_statistics_in_training_mode(network, image, objective):
    reference, (criterion, target) = read('train.json'), objective
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    try:
        terms = criterion(network.train()(image), target)
        state = network.state_dict()
        tables = {
            name: (entry, position)
            for entry in published.entries(reference['bn_after'])
            if entry.key in state
            for position, name in enumerate(entry.published)
        }
        after = {
            name: entry.to_published(state[entry.key])[position].double()
            for name, (entry, position) in tables.items()
            if name in reference['bn_after']
        }
    finally:
        network.eval()
        for name, buffer in network.named_buffers():
            buffer.copy_(buffers[name])
    # In float32 one cell of the drawn map lies on its border: segmentation and dense are compared in float64 only.
    stages = {name: value for name, value in terms.items() if name[-1].isdigit()}
    assert len(stages) == 39
    check_terms(stages, reference['losses'], 2e-5)
    assert after.keys() == reference['bn_after'].keys()
    for name, ours in after.items():
        expected = reference['bn_after'][name]
        for figure, value in (('mean', ours.mean()), ('std', ours.std()), ('absmax', ours.abs().max())):
            assert value.item() == pytest.approx(expected[figure], rel=2e-3, abs=1e-5), f'{name} {figure}'


# Data and figures


def make_batch(hands, split: str, indices, **augmentation):
    data = InterHandDataset(PARITY / 'data' / 'interhand2.6m', split)
    samples = [data[index]._replace(augmentation=parameters(**augmentation)) for index in indices]
    return BatchMaker(hands)(default_collate(samples))


def test_items_of_the_test_split(hands):
    batch, items = make_batch(hands, 'test', range(16)), Arrays(PARITY / 'data/dataset_test_items.npz')
    close(batch.target.joints, items.hands('joint_3d_{}'), 1e-6)
    close(batch.target.vertices, items.hands('mesh_3d_{}'), 1e-6)
    close(batch.target.joints_uv, items.hands('joint_2d_{}')[..., :2], 2e-6)
    close(batch.target.vertices_uv, items.hands('mesh_2d_{}')[..., :2], 2e-6)
    close(batch.intrinsics, items('camera'), 1e-5)
    close(Preprocessing().normalise(batch.image[:4]), items('img'), GREY_LEVELS / 255 / min(IMAGENET_STD))
    close(batch.target.dense[:4], items('dense'), GREY_LEVELS / 255)
    labels = torch.tensor(OUR_CLASSES)[items('seg')[:, 0].long()]
    assert (labels != batch.target.segmentation).float().mean() < 1e-4


@pytest.mark.parametrize('case', range(4))
def test_training_items_under_fixed_augmentation(hands, case):
    items = Arrays(PARITY / 'data/dataset_train_fixed_aug.npz')
    scale, degrees, right, down, flip = items.file['cfgs'][case].tolist()
    batch = make_batch(
        hands, 'train', range(2), scale=scale, angle=float(np.radians(degrees)), shift=(right, down), flip=bool(flip)
    )
    for sample in range(2):

        def theirs(name, sample=sample):
            return items(f'cfg{case}/sample{sample}/{name}')

        for hand, side in enumerate(SIDES):
            for points, name in ((batch.target.vertices_uv, 'mesh'), (batch.target.joints_uv, 'joint')):
                close(points[sample, hand] * 128, theirs(f'{name}_2d_{side}')[:, :2] * 128, 1e-3)  # pixels
            # x and y come from the published approximate back-projection and differ; depths do not.
            close(batch.target.vertices[sample, hand, :, 2], theirs(f'mesh_3d_{side}')[:, 2], 1e-6)
        close(Preprocessing().normalise(batch.image)[sample], theirs('img'), GREY_LEVELS / 255 / min(IMAGENET_STD))
        close(batch.target.dense[sample], theirs('dense'), GREY_LEVELS / 255)
        labels = torch.tensor(OUR_CLASSES)[theirs('seg')[0].long()]
        assert (labels != batch.target.segmentation[sample]).float().mean() < 5e-4


@pytest.mark.parametrize('root', [0, 9])
@pytest.mark.parametrize('scale', [True, False])
def test_evaluation_figures(hands, root, scale):
    items, outputs = Arrays(PARITY / 'data/dataset_test_items.npz'), Arrays(PARITY / 'eval_net_outputs16.npz')
    expected = read('eval.json')['runs'][f'root{root}_scale{"On" if scale else "Off"}']
    protocol = Protocol(root, scale)
    errors = sample_errors(
        JointRegressor(hands),
        outputs.hands('stage2/pd_mesh_xyz_{}'),
        outputs('stage2/pd_offset'),
        true_vertices=items.hands('mesh_3d_{}'),
        intrinsics=items('camera'),
        network_root=0,
        protocol=protocol,
    )
    check_figures(summarise(errors, protocol), expected)


@torch.no_grad()
def test_the_road_from_file_to_estimate(network, hands):
    """Two samples from their files through the network, against what the published network made of them."""
    outputs = Arrays(PARITY / 'eval_net_outputs16.npz')
    batch = make_batch(hands, 'test', range(2))
    hands = network(network.preprocess.normalise(batch.image)).stages[-1]
    close(hands.vertices, outputs.hands('stage2/pd_mesh_xyz_{}')[:2], 1e-3)
    close(hands.offset * HAND_SCALE, outputs('stage2/pd_offset')[:2] * HAND_SCALE, 1e-3)


def test_the_published_file_gives_the_published_figures_in_every_protocol(weights, tmp_path, capsys):
    """All the way: file, conversion, images, network, figures, through the command that people type."""
    torch.save({'net': weights}, tmp_path / 'DIR.pth')
    assert (
        eval_interhand.main(
            [
                '--data_path',
                str(PARITY / 'data' / 'interhand2.6m'),
                '--model',
                str(tmp_path / 'DIR.pth'),
                '--all-protocols',
                '--out',
                str(tmp_path),
                'MANO.PATH',
                str(PARITY),
                'TRAIN.WORKERS',
                '0',
                'DEVICE',
                'cpu',
            ]
        )
        == 0
    )
    assert 'was converted' in capsys.readouterr().out
    runs = read('eval.json')['runs']
    for summary in json.loads((tmp_path / 'metrics.json').read_text())['protocols']:
        protocol = summary['protocol']
        check_figures(summary, runs[f'root{protocol["root_joint"]}_scale{"On" if protocol["scale"] else "Off"}'])
