"""The network against numbers that the published code computes: see tests/parity/README.md."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mano_files import write_mano_files
from parity import recipe
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

from evaluation.metrics import JointRegressor, Protocol, sample_errors
from evaluation.summary import summarise
from manopth import HandModel, HandPair, TwoHandLayer
from models import build_criterion, published
from models.hands import load_hands
from models.predictions import Target
from utils.config import load_config
from utils.geometry import world_to_camera
from utils.hand import SIDES

PARITY = Path(__file__).parent / 'parity'
NUMBERS = json.loads((PARITY / 'numbers.json').read_text())
VERTEX_UNIT = 1e-5  # m: of the integers in figures/vertices_*


@pytest.fixture(scope='module')
def numbers():
    return Arrays(PARITY / 'numbers.npz')


@pytest.fixture(scope='module')
def units():
    return Arrays(PARITY / 'numbers.npz', 'unit/', every_vertex=8, every_channel=40)


@pytest.fixture(scope='module')
def mano_path(tmp_path_factory):
    """Folder with the made-up hands in MANO's own files."""
    arrays = np.load(PARITY / 'hands.npz')
    mirror = np.array([-1, 1, 1])  # the right hand mirrors the left, and R becomes M R M in its pose directions
    mirrored = {
        'v_template': arrays['v_template'] * mirror,
        'posedirs': arrays['posedirs'] * mirror[:, None] * np.tile(np.outer(mirror, mirror).flatten(), 15),
    }

    def hand(side: str) -> HandModel:
        own = arrays if side == 'left' else mirrored
        return HandModel(
            side=side,
            template=own['v_template'].astype(np.float64),
            faces=arrays[f'f/{side}'].astype(np.int64),
            shape_dirs=arrays['shapedirs'].astype(np.float64),
            pose_dirs=own['posedirs'].astype(np.float64),
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


# The network in evaluation mode


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
    expected = NUMBERS['frozen_norms']
    terms, gradients = losses_and_gradients(network, image, objective)
    assert len(terms) == len(expected['losses']) == 42
    check_terms(terms, expected['losses'], 1e-5)
    assert sum(terms.values()).item() == pytest.approx(expected['total'], rel=1e-5)
    check_gradients(gradients, expected['gradient_norms'], relative=2e-3)


@pytest.mark.slow
def test_losses_and_gradients_in_training_mode(network, image, objective):
    expected = NUMBERS['training']
    model, terms, gradients = losses_and_gradients_in_training_mode(network, image, objective)
    check_training_terms(terms, expected['losses'])
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
    check_figures(summarise(errors, protocol), NUMBERS['figures'][f'root{root}_scale{"On" if scale else "Off"}'])
