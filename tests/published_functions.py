"""The published code's numbers and how ours are compared with them, for the small set of arrays that every clone has
(test_published_numbers.py) and for the whole one (test_parity.py).

Both modules import the tests of single functions from here and run them with their own fixtures: ``hands``, ``network``
and ``units``, the ``Arrays`` of the functions' inputs and results.
"""

import re
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from parity import recipe

from manopth import TwoHandLayer
from manopth.rotations import axis_angle_to_matrix, symmetric_6d_to_matrix
from models import build_criterion, losses
from models.bone_projection import bone_weights, draw
from models.mesh_losses import MeshLosses
from models.predictions import CAMERA, POSE, SHAPE, DIROutput, Target
from utils.config import load_config
from utils.hand import BONES, PUBLISHED_LEFT_MIDDLE_TIP, SIDES, TIP_VERTICES

OUR_CLASSES = [0, 2, 1]  # the published class 1 is the right hand; the swap is its own inverse
FLOORS = 20  # tolerance of an output, in units of float32's rounding noise on it


class Arrays:
    """The arrays of an .npz as tensors; ``prefix`` is put in front of every key."""

    def __init__(self, path: Path, prefix: str = '', *, every_vertex: int = 1, every_channel: int = 1):
        """every_vertex, every_channel: the file holds only every so many of the meshes and of the projected map."""
        self.file, self.prefix = np.load(path), prefix
        self.every_vertex, self.every_channel = every_vertex, every_channel

    def __call__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.file[self.prefix + key])

    def hands(self, key: str) -> torch.Tensor:
        """``key`` holds '{}' for the side -> (B, 2, ...)."""
        return torch.stack([self(key.format(side)) for side in SIDES], 1)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


# Single functions


def test_hand_layer(hands, units):
    pose, betas = (units(f'mano/{key}')[:, None].expand(-1, 2, -1) for key in ('pose6d45', 'beta'))
    left_tips = (*TIP_VERTICES[:2], PUBLISHED_LEFT_MIDDLE_TIP, *TIP_VERTICES[3:])
    posed = TwoHandLayer(hands, tip_vertices=[left_tips, TIP_VERTICES])(pose[..., :6], pose[..., 6:], betas)
    close(posed.vertices[:, :, :: units.every_vertex], units.hands('mano/{}/verts'), 5e-7)
    close(posed.joints, units.hands('mano/{}/joints'), 5e-7)


def test_hand_layer_of_the_data(hands, units):
    root, pca, betas, place = (
        units(key)[:, None] for key in ('mano_intag/R', 'mano_intag/pca', 'mano/beta', 'mano_intag/trans')
    )
    posed = TwoHandLayer(hands)(root.expand(-1, 2, -1, -1), pca.expand(-1, 2, -1), betas.expand(-1, 2, -1))
    vertices = (posed.vertices + place[:, None])[:, :, :: units.every_vertex]
    close(vertices, units.hands('mano_intag/{}/verts'), 1e-6)
    close(posed.joints + place[:, None], units.hands('mano_intag/{}/joints'), 1e-6)


def test_rotations(units):
    matrices = axis_angle_to_matrix(units('rodrigues/axis'))
    close(matrices, units('rodrigues/intag'), 2e-6)
    close(matrices.flatten(1), units('rodrigues/manopth'), 2e-6)
    close(symmetric_6d_to_matrix(units('rot6d/in')), units('rot6d/robust'), 2e-6)


def test_projecting_back(units):
    uv = units('bone_proj/uv')[:, None].repeat(1, 2, 1, 1).requires_grad_()
    feature = units('bone_proj/feat')[:, None].repeat(1, 2, 1, 1).requires_grad_()
    for size, radius, name in ((32, 2.0, 'bone_proj/out_s32_d2'), (16, 1.0, 'bone_proj/out')):
        drawn = draw(bone_weights(uv, size=size, radius=radius), feature[:, :, torch.tensor(BONES)])
        for hand in drawn.chunk(2, 1):
            close(hand[:, :: units.every_channel], units(name), 1e-5)
    weight = torch.from_numpy(recipe.uniform('unit.bp_w', (2, 1280, 16, 16))).float()
    (drawn * torch.cat([weight, weight], 1)).sum().backward()
    for ours, name in ((uv.grad, 'bone_proj/grad_uv'), (feature.grad, 'bone_proj/grad_feat')):
        theirs = units(name)
        for hand in range(2):
            close(ours[:, hand], theirs, 1e-4 * theirs.abs().max().item())


@torch.no_grad()
def test_graph_layer(network, units):
    layer = deepcopy(network.stages[0].interaction.graph[0])
    layer.norm = torch.nn.Identity()
    tokens = units('gcn/x')[:, None].expand(-1, 2, -1, -1)
    positive = layer(tokens)
    layer.bias.neg_()
    # Without its norm the layer is linear in front of the ReLU: both halves give the whole.
    close((positive - layer(-tokens))[:, 0], units('gcn/out'), 2e-5)


@torch.no_grad()
def test_transformer(network, units):
    interaction = network.stages[0].interaction
    tokens = interaction.head(interaction.transformer(units('ste/x').view(2, 2, 21, 128)))
    close(tokens.flatten(1, 2), units('ste/out'), 5e-5)


@torch.no_grad()
def test_sampling_at_the_joints(network, units):
    stage = network.stages[0]
    x = torch.from_numpy(recipe.uniform('unit.imgfeat', (2, 256, 16, 16))).float()
    uv = units('img2joint/uv')[:, None].expand(-1, 2, -1, -1)
    at_origin = SimpleNamespace(joints_uv=uv, joints=torch.zeros(2, 2, 21, 3))
    sampled = stage.tokens(x, at_origin) - stage.position(at_origin.joints)
    close(sampled[:, 0].transpose(1, 2).flatten(1), units('img2joint/out'), 5e-5)


def test_pixelwise_losses(hands, units):
    logits, labels = units('lovasz/logits'), units('lovasz/labels')
    close(losses.lovasz_softmax(logits, labels), units('lovasz/on_logits'), 1e-6)
    close(losses.lovasz_softmax(logits.softmax(1), labels), units('lovasz/on_softmax'), 1e-6)
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
    close(terms['segmentation'], units('ce/out'), 1e-6)


def test_mesh_losses(hands, units):
    close(losses.huber(*(units(f'smoothl1/{key}') for key in 'ab')), units('smoothl1/out'), 1e-8)
    ours, theirs = (units(f'mesh/{key}')[:, None].expand(-1, 2, -1, -1) for key in 'ab')
    edge, normal = ([units(f'mesh/{name}{side}') for side in ('', '_r')] for name in ('edge', 'normal'))
    for values, expected in zip(MeshLosses(hands.faces)(ours, theirs), (edge, normal)):
        close(values, torch.stack(expected), 1e-6)


# Outputs, losses and figures by their published names


def by_published_name(output: DIROutput) -> dict[str, torch.Tensor]:
    named = {'seg': output.segmentation[:, OUR_CLASSES], 'dense': output.dense}
    for stage, hands in enumerate(output.stages):
        named[f'stage{stage}/pd_offset'] = hands.offset
        for name, tensor in (
            ('mano_para', hands.parameters),
            ('proj', hands.parameters[..., CAMERA]),
            ('mano_pose', hands.parameters[..., : POSE.stop]),  # the root's rotation, then the fingers'
            ('mano_beta', hands.parameters[..., SHAPE]),
            ('joint_uv', hands.joints_uv),
            ('mesh_uv', hands.vertices_uv),
            ('joint_xyz', hands.joints),
            ('mesh_xyz', hands.vertices),
        ):
            named |= {f'stage{stage}/pd_{name}_{side}': tensor[:, hand] for hand, side in enumerate(SIDES)}
    return named


def published_term(name: str) -> str:
    hand = re.fullmatch(r'(joint|vertex)_(uv|xyz)_(left|right)_(\d)', name)
    if hand:
        return f'{"mesh" if hand[1] == "vertex" else "joint"}_{hand[3]}_{hand[2]}_{hand[4]}'
    return {'segmentation': 'seg'}.get(name, name)


def check_terms(terms: dict[str, torch.Tensor], expected: dict[str, float], tolerance: float) -> None:
    for name, value in terms.items():
        assert value.item() == pytest.approx(expected[published_term(name)], rel=tolerance), name


def losses_and_gradients(network, image, objective) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The loss terms of (criterion, target), and the gradient of their sum by parameter."""
    criterion, target = objective
    try:
        terms = criterion(network(image), target)
        sum(terms.values()).backward()
        return terms, {name: parameter.grad for name, parameter in network.named_parameters()}
    finally:
        network.zero_grad(set_to_none=True)


def losses_and_gradients_in_training_mode(network, image, objective):
    """In float64: in float32 a cell of the projected map lies on its border and moves gradients by several percent.

    -> the network after the step's forward pass, loss terms, gradients.
    """
    criterion, target = objective
    model = deepcopy(network).double().train()
    target = target.map(lambda x: x.double() if x.is_floating_point() else x)
    return model, *losses_and_gradients(model, image.double(), (deepcopy(criterion).double(), target))


def check_training_terms(terms: dict[str, torch.Tensor], expected: dict[str, float]) -> None:
    dense = ('segmentation', 'lovasz', 'dense')
    check_terms({name: value for name, value in terms.items() if name not in dense}, expected, 2e-5)
    check_terms({name: terms[name] for name in dense}, expected, 2e-3)


def check_figures(summary: dict, expected: dict[str, float]) -> None:
    for ours, theirs, unit in (
        ('joint_mm', 'joints', 'mm'),
        ('vert_mm', 'verts', 'mm'),
        ('joint_px', 'joints_2d', 'px'),
        ('vert_px', 'verts_2d', 'px'),
    ):
        for side in (*SIDES, 'all'):
            assert summary[ours][side] == pytest.approx(expected[f'{theirs}_{side}_{unit}'], abs=0.01), (ours, side)
    assert summary['root_mm'] == pytest.approx(expected['root_mm'], abs=0.01)
