"""The network against numbers that the published code computes: see tests/parity/README.md."""

import json
import re
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mano_files import write_mano_files
from parity import recipe

from evaluation.metrics import JointRegressor, Protocol, sample_errors
from evaluation.summary import summarise
from manopth import HandModel, HandPair, TwoHandLayer
from manopth.rotations import axis_angle_to_matrix, symmetric_6d_to_matrix
from models import build_criterion, losses, published
from models.bone_projection import bone_weights, draw
from models.hands import load_hands
from models.predictions import DIROutput, Target
from utils.config import load_config
from utils.geometry import world_to_camera
from utils.hand import BONES, PUBLISHED_LEFT_MIDDLE_TIP, SIDES, TIP_VERTICES

PARITY = Path(__file__).parent / 'parity'
NUMBERS = json.loads((PARITY / 'numbers.json').read_text())
OUR_CLASSES = [0, 2, 1]  # the published class 1 is the right hand; the swap is its own inverse
FLOORS = 20  # tolerance of an output, in units of float32's rounding noise on it
VERTEX_UNIT = 1e-5  # m: of the integers in figures/vertices_*


class Arrays:
    """The arrays of numbers.npz as tensors."""

    def __init__(self):
        self.file = np.load(PARITY / 'numbers.npz')

    def __call__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.file[key])

    def hands(self, key: str) -> torch.Tensor:
        """``key`` holds '{}' for the side -> (B, 2, ...)."""
        return torch.stack([self(key.format(side)) for side in SIDES], 1)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.fixture(scope='module')
def numbers():
    return Arrays()


@pytest.fixture(scope='module')
def mano_path(tmp_path_factory):
    """Folder with the made-up hands in MANO's own files."""
    arrays = np.load(PARITY / 'hands.npz')

    def hand(side: str) -> HandModel:
        own = {name: arrays[f'{name}/{side}'].astype(np.float64) for name in ('v_template', 'posedirs')}
        return HandModel(
            side=side,
            template=own['v_template'],
            faces=arrays[f'f/{side}'].astype(np.int64),
            shape_dirs=arrays['shapedirs'].astype(np.float64),
            pose_dirs=own['posedirs'],
            joint_regressor=arrays['J_regressor'].astype(np.float64),
            skinning_weights=arrays['weights'].astype(np.float64),
            pose_mean=arrays[f'hands_mean/{side}'].astype(np.float64),
            pose_components=arrays[f'hands_components/{side}'].astype(np.float64),
            name='made up',
        )

    return str(write_mano_files(tmp_path_factory.mktemp('mano'), HandPair(*map(hand, SIDES))))


@pytest.fixture(scope='module')
def hands(mano_path):
    return load_hands('files', mano_path)


@pytest.fixture(scope='module')
def names():
    """{published name: (shape, type, where its value comes from)}"""
    table = {}
    for line in (PARITY / 'names.txt').read_text().splitlines():
        name, shape, kind, source = line.split()
        table[name] = (() if shape == '-' else tuple(map(int, shape.split('x'))), kind, source)
    return table


@pytest.fixture(scope='module')
def weights(names, hands):
    """All entries of the published checkpoint."""
    arrays, net = published.hand_arrays(hands), {}
    for name, (shape, _, source) in names.items():
        if source == 'mano':
            net[name] = arrays[name]
        elif name == 'seg_loss.weight':
            net[name] = torch.tensor([0.1, 0.45, 0.45])
        elif name.endswith('img_gird'):
            centres = torch.arange(round(shape[0] ** 0.5)) + 0.5
            net[name] = torch.cartesian_prod(centres, centres).flip(1)
        else:
            net[name] = torch.from_numpy(recipe.parameter(name, shape))
    return net


@pytest.fixture(scope='module')
def network(weights, mano_path):
    """The published network with these weights, in evaluation mode; tests leave it as it was."""
    return published.load_published({'net': weights}, path='DIR.pth', overrides=['MANO.PATH', mano_path])[0]


@pytest.fixture(scope='module')
def image():
    return torch.from_numpy(recipe.image())


# The checkpoint's names


def test_names_shapes_and_types_are_the_published_ones(names, weights):
    assert len(names) == 963
    assert published.published_shapes() == {name: shape for name, (shape, *_) in names.items()}
    assert {name: str(value.dtype).removeprefix('torch.') for name, value in weights.items()} == {
        name: kind for name, (_, kind, _) in names.items()
    }


def test_every_published_name_is_used_once_or_dropped_for_a_reason(names):
    used = [name for entry in published.entries(list(names)) for name in entry.published]
    assert sorted(used + [name for name in names if published.why_dropped(name)]) == sorted(names)


# Single functions


def test_hand_layer(hands, numbers):
    pose, betas = (numbers(f'unit/mano/{key}')[:, None].expand(-1, 2, -1) for key in ('pose6d45', 'beta'))
    left_tips = (*TIP_VERTICES[:2], PUBLISHED_LEFT_MIDDLE_TIP, *TIP_VERTICES[3:])
    posed = TwoHandLayer(hands, tip_vertices=[left_tips, TIP_VERTICES])(pose[..., :6], pose[..., 6:], betas)
    close(posed.vertices[:, :, ::8], numbers.hands('unit/mano/{}/verts'), 5e-7)
    close(posed.joints, numbers.hands('unit/mano/{}/joints'), 5e-7)


def test_hand_layer_of_the_data(hands, numbers):
    root, pca, betas, place = (
        numbers(f'unit/{key}')[:, None] for key in ('mano_intag/R', 'mano_intag/pca', 'mano/beta', 'mano_intag/trans')
    )
    posed = TwoHandLayer(hands)(root.expand(-1, 2, -1, -1), pca.expand(-1, 2, -1), betas.expand(-1, 2, -1))
    close((posed.vertices + place[:, None])[:, :, ::8], numbers.hands('unit/mano_intag/{}/verts'), 1e-6)
    close(posed.joints + place[:, None], numbers.hands('unit/mano_intag/{}/joints'), 1e-6)


def test_rotations(numbers):
    matrices = axis_angle_to_matrix(numbers('unit/rodrigues/axis'))
    close(matrices, numbers('unit/rodrigues/intag'), 2e-6)
    close(matrices.flatten(1), numbers('unit/rodrigues/manopth'), 2e-6)
    close(symmetric_6d_to_matrix(numbers('unit/rot6d/in')), numbers('unit/rot6d/robust'), 2e-6)


def test_projecting_back(numbers):
    uv = numbers('unit/bone_proj/uv')[:, None].repeat(1, 2, 1, 1).requires_grad_()
    feature = numbers('unit/bone_proj/feat')[:, None].repeat(1, 2, 1, 1).requires_grad_()
    for size, radius, name in ((32, 2.0, 'out_s32_d2'), (16, 1.0, 'out')):
        drawn = draw(bone_weights(uv, size=size, radius=radius), feature[:, :, torch.tensor(BONES)])
        for hand in drawn.chunk(2, 1):
            close(hand[:, ::40], numbers(f'unit/bone_proj/{name}'), 1e-5)
    weight = torch.from_numpy(recipe.uniform('unit.bp_w', (2, 1280, 16, 16))).float()
    (drawn * torch.cat([weight, weight], 1)).sum().backward()
    for ours, name in ((uv.grad, 'grad_uv'), (feature.grad, 'grad_feat')):
        theirs = numbers(f'unit/bone_proj/{name}')
        for hand in range(2):
            close(ours[:, hand], theirs, 1e-4 * theirs.abs().max().item())


@torch.no_grad()
def test_graph_layer(network, numbers):
    layer = deepcopy(network.stages[0].interaction.graph[0])
    layer.norm = torch.nn.Identity()
    tokens = numbers('unit/gcn/x')[:, None].expand(-1, 2, -1, -1)
    positive = layer(tokens)
    layer.bias.neg_()
    # Without its norm the layer is linear in front of the ReLU: both halves give the whole.
    close((positive - layer(-tokens))[:, 0], numbers('unit/gcn/out'), 2e-5)


@torch.no_grad()
def test_transformer(network, numbers):
    interaction = network.stages[0].interaction
    tokens = interaction.head(interaction.transformer(numbers('unit/ste/x').view(2, 2, 21, 128)))
    close(tokens.flatten(1, 2), numbers('unit/ste/out'), 5e-5)


@torch.no_grad()
def test_sampling_at_the_joints(network, numbers):
    stage = network.stages[0]
    x = torch.from_numpy(recipe.uniform('unit.imgfeat', (2, 256, 16, 16))).float()
    uv = numbers('unit/img2joint/uv')[:, None].expand(-1, 2, -1, -1)
    at_origin = SimpleNamespace(joints_uv=uv, joints=torch.zeros(2, 2, 21, 3))
    sampled = stage.tokens(x, at_origin) - stage.position(at_origin.joints)
    close(sampled[:, 0].transpose(1, 2).flatten(1), numbers('unit/img2joint/out'), 5e-5)


def test_pixelwise_losses(hands, numbers):
    logits, labels = numbers('unit/lovasz/logits'), numbers('unit/lovasz/labels')
    close(losses.lovasz_softmax(logits, labels), numbers('unit/lovasz/on_logits'), 1e-6)
    close(losses.lovasz_softmax(logits.softmax(1), labels), numbers('unit/lovasz/on_softmax'), 1e-6)
    criterion = build_criterion(load_config(None, ['LOSS.WEIGHT.SEGMENTATION', '1']), hands)
    joints = torch.zeros(2, 2, 21, 3)
    target = Target(
        vertices=torch.zeros(2, 2, 778, 3),
        joints=joints,
        vertices_uv=joints,
        joints_uv=joints,
        segmentation=labels,
        dense=torch.zeros(2, 3, 8, 8),
    )
    terms = criterion(DIROutput([], logits, torch.zeros(2, 3, 8, 8)), target)
    close(terms['segmentation'], numbers('unit/ce/out'), 1e-6)


def test_mesh_losses(hands, numbers):
    close(losses.huber(*(numbers(f'unit/smoothl1/{key}') for key in 'ab')), numbers('unit/smoothl1/out'), 1e-8)
    faces = torch.from_numpy(hands.faces)
    ours, theirs = (
        losses.face_edges(numbers(f'unit/mesh/{key}')[:, None].expand(-1, 2, -1, -1), faces) for key in 'ab'
    )
    edge, normal = ([numbers(f'unit/mesh/{name}{side}') for side in ('', '_r')] for name in ('edge', 'normal'))
    close(losses.edge_length_loss(ours, theirs), torch.stack(edge), 1e-6)
    close(losses.normal_loss(ours, theirs), torch.stack(normal), 1e-6)


# The network in evaluation mode


def by_published_name(output: DIROutput) -> dict[str, torch.Tensor]:
    named = {'seg': output.segmentation[:, OUR_CLASSES], 'dense': output.dense}
    for stage, hands in enumerate(output.stages):
        named[f'stage{stage}/pd_offset'] = hands.offset
        for name, tensor in (
            ('mano_para', hands.parameters),
            ('joint_uv', hands.joints_uv),
            ('mesh_uv', hands.vertices_uv),
            ('joint_xyz', hands.joints),
            ('mesh_xyz', hands.vertices),
        ):
            named |= {f'stage{stage}/pd_{name}_{side}': tensor[:, hand] for hand, side in enumerate(SIDES)}
    return named


@torch.no_grad()
@pytest.mark.parametrize('root, every', [(0, 1), (9, 16)])
def test_outputs_of_every_stage(network, image, numbers, monkeypatch, root, every):
    monkeypatch.setattr(network.hand_head, 'root_joint', root)
    outputs, compared = by_published_name(network(image)), 0
    for name in (key.removeprefix(f'root{root}/') for key in numbers.file if key.startswith(f'root{root}/')):
        ours = outputs[name][:, ::every] if 'mesh' in name else outputs[name]
        close(ours, numbers(f'root{root}/{name}'), FLOORS * NUMBERS['rounding'][name])
        compared += 1
    assert compared >= 24


# Losses and gradients


def published_term(name: str) -> str:
    hand = re.fullmatch(r'(joint|vertex)_(uv|xyz)_(left|right)_(\d)', name)
    if hand:
        return f'{"mesh" if hand[1] == "vertex" else "joint"}_{hand[3]}_{hand[2]}_{hand[4]}'
    return {'segmentation': 'seg'}.get(name, name)


@pytest.fixture(scope='module')
def objective(hands):
    """(criterion, target): the published numbers centre the targets on joint 9 and the hands on the wrist."""
    found = {name: torch.from_numpy(value) for name, value in recipe.targets().items()}

    def both(name: str) -> torch.Tensor:
        return torch.stack([found[f'{name}_{side}'] for side in SIDES], 1)

    target = Target(
        vertices=both('mesh_3d'),
        joints=both('joint_3d'),
        vertices_uv=both('mesh_2d'),
        joints_uv=both('joint_2d'),
        segmentation=torch.tensor(OUR_CLASSES)[found['seg']],
        dense=found['dense'],
    )
    return build_criterion(load_config(None, ['ROOT_JOINT', '9']), hands), target


def check_terms(terms: dict[str, torch.Tensor], expected: dict[str, float], tolerance: float) -> None:
    for name, value in terms.items():
        assert value.item() == pytest.approx(expected[published_term(name)], rel=tolerance), name


def check_gradients(ours: dict[str, torch.Tensor], expected: dict[str, float | None], *, relative: float) -> None:
    """Norms of the gradients of every published parameter; what is not compared has none, and a reason for it."""
    compared = set()
    for entry in published.entries(list(expected)):
        if entry.key not in ours:  # running statistics
            continue
        for name, gradient in zip(entry.published, entry.to_published(ours[entry.key])):
            norm = expected[name]
            assert gradient.norm().item() == pytest.approx(norm, abs=relative * max(norm, 1e-4)), name
            compared.add(name)
    assert all(published.why_dropped(name) and not expected[name] for name in expected.keys() - compared)


def test_losses_and_gradients_with_frozen_norms(network, image, objective):
    expected, (criterion, target) = NUMBERS['frozen_norms'], objective
    try:
        terms = criterion(network(image), target)
        total = sum(terms.values())
        total.backward()
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    finally:
        network.zero_grad(set_to_none=True)
    assert len(terms) == len(expected['losses']) == 42
    check_terms(terms, expected['losses'], 1e-5)
    assert total.item() == pytest.approx(expected['total'], rel=1e-5)
    check_gradients(gradients, expected['gradient_norms'], relative=2e-3)


@pytest.mark.slow
def test_losses_and_gradients_in_training_mode(network, image, objective):
    """In float64: in float32 a cell of the projected map lies on its border and moves gradients by several percent."""
    expected, (criterion, target) = NUMBERS['training'], objective
    model = deepcopy(network).double().train()
    target = Target(*(x.double() if x.is_floating_point() else x for x in target))
    terms = deepcopy(criterion).double()(model(image.double()), target)
    sum(terms.values()).backward()
    dense = ('segmentation', 'lovasz', 'dense')
    check_terms({name: value for name, value in terms.items() if name not in dense}, expected['losses'], 2e-5)
    check_terms({name: terms[name] for name in dense}, expected['losses'], 2e-3)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    check_gradients(gradients, expected['gradient_norms'], relative=1e-2)
    after = model.state_dict()
    for entry in published.entries(list(expected['running_statistics'])):
        for name, value in zip(entry.published, entry.to_published(after[entry.key])):
            if name in expected['running_statistics']:
                found = [value.mean().item(), value.std().item(), value.abs().max().item()]
                assert found == pytest.approx(expected['running_statistics'][name], rel=2e-3, abs=1e-5), name


# The evaluation


@pytest.mark.parametrize('root', [0, 9])
@pytest.mark.parametrize('scale', [True, False])
def test_evaluation_figures(hands, numbers, root, scale):
    labels = {
        name: numbers(f'figures/{name}')
        for name in ('root', 'pose', 'shape', 'translation', 'camera_rotation', 'camera_translation', 'intrinsics')
    }
    posed = TwoHandLayer(hands)(labels['root'], labels['pose'], labels['shape'])
    true_vertices = world_to_camera(
        posed.vertices + labels['translation'][:, :, None], labels['camera_rotation'], labels['camera_translation']
    )
    protocol = Protocol(root, scale)
    errors = sample_errors(
        JointRegressor(hands),
        VERTEX_UNIT * numbers.hands('figures/vertices_{}').float(),
        numbers('figures/offset'),
        true_vertices=true_vertices,
        intrinsics=labels['intrinsics'],
        network_root=0,
        protocol=protocol,
    )
    summary, expected = summarise(errors, protocol), NUMBERS['figures'][f'root{root}_scale{"On" if scale else "Off"}']
    for ours, theirs in (
        ('joint_mm', 'joints_{}_mm'),
        ('vert_mm', 'verts_{}_mm'),
        ('joint_px', 'joints_2d_{}_px'),
        ('vert_px', 'verts_2d_{}_px'),
    ):
        for side in (*SIDES, 'all'):
            assert summary[ours][side] == pytest.approx(expected[theirs.format(side)], abs=0.01), (ours, side)
    assert summary['root_mm'] == pytest.approx(expected['root_mm'], abs=0.01)
