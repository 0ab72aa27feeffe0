"""Hands that no person has, as an untrained or diverging network predicts them: values and gradients stay finite."""

import math

import numpy as np
import pytest
import torch

from evaluation.metrics import GRID, JointRegressor, box_iou, procrustes_errors, sample_errors
from manopth import TwoHandLayer
from manopth.alignment import align
from manopth.rotations import (
    axis_angle_to_matrix,
    gram_schmidt_6d_to_matrix,
    matrix_to_axis_angle,
    matrix_to_quaternion,
    nearest_rotation,
    symmetric_6d_to_matrix,
    unit_vectors,
)
from models import losses
from models.bone_projection import bone_weights, joint_weights
from models.criterion import DIRCriterion
from models.hand_head import HandHead
from models.placement import nearest_camera, place_hands
from models.predictions import CAMERA, NUM_PARAMETERS, POSE, ROOT_ROTATION, SHAPE, DIROutput, Target
from utils.geometry import CROP_SIZE, crop_matrix, project, scale_to_truth
from utils.hand import NUM_JOINTS, NUM_VERTICES

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
TERMS = (
    'joint_uv',
    'vertex_uv',
    'joint_xyz',
    'vertex_xyz',
    'edge',
    'normal',
    'offset',
    'segmentation',
    'lovasz',
    'dense',
)
MOST = 1e15  # a gradient whose square, which Adam keeps, is still a float32


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def assert_gentle(function, *inputs: torch.Tensor) -> None:
    """Values finite; gradients, against random weights of the outputs, finite and far from overflow."""
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert all(x.isfinite().all() for x in outputs)
    total = sum((x.float() * torch.randn(x.shape)).sum() for x in outputs)
    for gradient in torch.autograd.grad(total, inputs, allow_unused=True):
        assert gradient is None or (gradient.isfinite().all() and gradient.abs().amax() < MOST)


def adversarial_vectors(count: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """(..., size): zeros, powers of ten from 1e-30 to 1e9, repeated, opposite and nearly equal entries, mixed."""
    scale = 10.0 ** torch.randint(-30, 10, (count, 1)) * torch.randint(0, 2, (count, size))
    values = torch.randn(count, size) * scale
    values[::3] = torch.randn(count, size)[::3]
    half = size // 2
    values[1::5, half : 2 * half] = values[1::5, :half]
    values[2::5, half : 2 * half] = -values[2::5, :half]
    values[3::5, half : 2 * half] = values[3::5, :half] * (1 + 1e-7 * torch.randn(len(values[3::5]), half))
    values[4::25] = 0
    return values.to(dtype)


# Rotations


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('to_matrix', [symmetric_6d_to_matrix, gram_schmidt_6d_to_matrix])
def test_any_6d_yields_columns_of_length_one_or_zero(to_matrix, dtype):
    six = adversarial_vectors(2000, 6, dtype)
    columns = to_matrix(six).float().norm(dim=-2)
    off = 2e-2 if dtype == torch.bfloat16 else 1e-3
    assert (columns < 1 + off).all()
    if to_matrix is symmetric_6d_to_matrix:  # the other's y is shorter where rounding decides about its z
        assert ((columns - 1).abs() < off).logical_or(columns == 0).all()
    for row in six[:200]:
        assert_gentle(to_matrix, row)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_any_axis_angle_and_any_matrix(dtype):
    for size in (0.0, 1e-30, 1e-9, 1e-4, 0.0316, 3.14, math.pi, 2 * math.pi, 1e3):
        axis_angle = (size * torch.nn.functional.normalize(torch.randn(20, 3), dim=-1)).to(dtype)
        assert_gentle(axis_angle_to_matrix, axis_angle)
        assert_gentle(lambda x: matrix_to_axis_angle(axis_angle_to_matrix(x)), axis_angle)
    half_turns = torch.diag_embed(torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1], [0, 0, 0]])).to(
        dtype
    )
    for matrix in (half_turns, adversarial_vectors(200, 9, dtype).clamp(-10, 10).unflatten(-1, (3, 3))):
        assert_gentle(matrix_to_axis_angle, matrix)
        assert_gentle(matrix_to_quaternion, matrix)
        assert_gentle(nearest_rotation, matrix)


def test_a_matrix_that_is_not_finite_has_no_nearest_rotation_and_spoils_no_other():
    matrix = torch.eye(3).repeat(3, 1, 1)
    matrix[1, 0, 0], matrix[2, 0, 0] = math.nan, math.inf
    for argument in (matrix, matrix.clone().requires_grad_()):
        nearest = nearest_rotation(argument)
        assert torch.equal(nearest[0], torch.eye(3)) and nearest[1:].isnan().all()


def test_unit_vectors_equal_the_plain_division_where_there_is_a_direction():
    vectors = torch.randn(1000, 3) * 10.0 ** torch.randint(-7, 9, (1000, 1))
    expected = torch.nn.functional.normalize(vectors, dim=-1, eps=1e-8)
    assert torch.equal(unit_vectors(vectors), expected)
    vectors.requires_grad_()
    wanted = torch.randn(1000, 3)
    ours, theirs = (
        torch.autograd.grad((f(vectors) * wanted).sum(), vectors)[0]
        for f in (unit_vectors, lambda x: torch.nn.functional.normalize(x, dim=-1, eps=1e-8))
    )
    length = vectors.detach().norm(dim=-1, keepdim=True)
    torch.testing.assert_close(ours * length, theirs * length, atol=1e-6, rtol=0)
    assert unit_vectors(torch.tensor([[0.0, 0, 0], [1e-9, 0, 0], [1e30, 0, 0]])).tolist() == [[0, 0, 0]] * 3


# Alignment


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('scale', [False, True])
@pytest.mark.parametrize(
    'kind', ['identical', 'zero', 'collinear', 'planar', 'two points', 'equal to the target', 'mirrored']
)
def test_alignment_of_degenerate_points(kind, scale, dtype):
    target = torch.randn(4, NUM_JOINTS, 3)
    source = {
        'identical': torch.randn(4, 1, 3).expand(4, NUM_JOINTS, 3),
        'zero': torch.zeros(4, NUM_JOINTS, 3),
        'collinear': torch.randn(4, NUM_JOINTS, 1) * torch.randn(4, 1, 3),
        'planar': torch.randn(4, NUM_JOINTS, 3) * torch.tensor([1.0, 1, 0]),
        'two points': torch.randn(4, 2, 3).repeat(1, 11, 1)[:, :NUM_JOINTS],
        'equal to the target': target,
        'mirrored': target * torch.tensor([-1.0, 1, 1]),
    }[kind]
    for a, b in ((source, target), (target, source), (source, source)):
        assert_gentle(lambda x, y: align(x, y, scale=scale).apply(x), a.to(dtype), b.to(dtype))


def test_alignment_gradient_is_the_numerical_one():
    source, target = torch.randn(2, 5, 3).double(), torch.randn(2, 5, 3).double()
    planar = source * torch.tensor([1.0, 1, 0])  # a plane determines the rotation; a line does not
    for points in (source, planar):
        assert torch.autograd.gradcheck(
            lambda x, y: align(x, y, scale=True).apply(x), (points.requires_grad_(), target.requires_grad_())
        )


def test_coinciding_sources_align_to_the_centre_of_the_target():
    target = torch.randn(2, NUM_JOINTS, 3)
    aligned = align(torch.full((2, NUM_JOINTS, 3), 0.3), target, scale=True).apply(torch.full((2, NUM_JOINTS, 3), 0.3))
    torch.testing.assert_close(aligned, target.mean(1, keepdim=True).expand_as(aligned))


def test_a_prediction_that_is_not_finite_has_no_aligned_error(standin):
    regressor, true = JointRegressor(standin), torch.randn(3, 2, NUM_VERTICES, 3)
    vertices = true.clone()
    vertices[1, 0, 5] = math.nan
    for error in procrustes_errors(regressor, vertices, true_vertices=true):
        assert error[1, 0].isnan() and error[[0, 2]].isfinite().all() and error[1, 1].isfinite()


# Projection, boxes and bones


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_points_on_and_behind_the_camera_plane_project_to_finite_pixels(dtype):
    depths = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-7, -1e-7, 1e-3, -1e-3, -1.0, 1.0])
    points = torch.cat([torch.randn(10, 2), depths[:, None]], 1).to(dtype)
    intrinsics = torch.tensor([[600.0, 1, 128], [0, 600, 128], [0, 0, 1]]).to(dtype)
    assert_gentle(project, points, intrinsics)
    plain = (points @ intrinsics.T)[..., :2] / (points @ intrinsics.T)[..., 2:]
    assert torch.equal(project(points, intrinsics)[6:], plain[6:])


def test_a_box_without_area_becomes_one_of_a_pixel():
    assert np.isfinite(crop_matrix(np.full((5, 2), 7.0))).all()
    np.testing.assert_allclose(crop_matrix(np.full((5, 2), 7.0), share=1) @ [7, 7, 1], [128, 128, 1])
    np.testing.assert_allclose(crop_matrix(np.array([[7.0, 7], [7.5, 7.0]]), share=1)[0, 0], CROP_SIZE)


def test_boxes_without_area_do_not_overlap():
    point, line = torch.full((1, 2, 5, 2), 3.0), torch.zeros(1, 2, 5, 2)
    line[..., 0] = torch.arange(5.0)
    assert box_iou(torch.cat([point, line])).tolist() == [0, 0]
    assert box_iou(torch.tensor([[[[0.0, 0], [2, 2]], [[1.0, 1], [1, 1]]]])).tolist() == [0]


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('weigh', [bone_weights, joint_weights])
def test_joints_anywhere_draw_finite_maps(weigh, dtype):
    uv = torch.randn(8, 2, NUM_JOINTS, 2)
    uv[0] = 0  # on the corner of four cells
    uv[1] = 0.125  # on the centre of one
    uv[2, :, 1:] = uv[2, :, :1] + 1e-7 * torch.randn(2, NUM_JOINTS - 1, 2)
    uv[3, :, 9] = uv[3, :, 0]
    uv[4] *= 1e6
    uv[5] *= 1e15
    uv[6] = torch.arange(21.0)[:, None] / 1e3  # collinear
    uv[7] *= 1e-20
    assert_gentle(lambda x: weigh(x, size=8, radius=1.0), uv.to(dtype))


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_scale_alignment_of_a_bone_without_length_leaves_the_size(dtype):
    joints, truth = torch.randn(5, 2, NUM_JOINTS, 3), torch.randn(5, 2, NUM_JOINTS, 3)
    joints[0, :, 9] = joints[0, :, 0]
    joints[1] = 0
    joints[2, :, 9] = joints[2, :, 0] + 1e-30
    truth[3, :, 9] = truth[3, :, 0]
    joints, truth = joints.to(dtype), truth.to(dtype)
    assert_gentle(lambda x: x * scale_to_truth(x, truth), joints)
    factor = scale_to_truth(joints, truth)[..., 0, 0]
    assert (factor[:3] == 1).all() and (factor[3] == 0).all() and (factor[4] > 0).all()


# Losses, on the whole way from parameters


DEGENERATE = {
    'all zero': lambda p: p.zero_(),
    'zero rotation': lambda p: p[..., ROOT_ROTATION].zero_(),
    'parallel rotation': lambda p: p[..., 3:6].copy_(p[..., :3]),
    'opposite rotation': lambda p: p[..., 3:6].copy_(-p[..., :3]),
    'nearly parallel rotation': lambda p: p[..., 3:6].copy_(p[..., :3] * (1 + 1e-7)),
    'tiny rotation': lambda p: p[..., ROOT_ROTATION].mul_(1e-12),
    'no pose': lambda p: p[..., POSE].zero_(),
    'fingers turned by pi': lambda p: p[..., POSE].fill_(math.pi),
    'wild pose': lambda p: p[..., POSE].mul_(1e3),
    'wild shape': lambda p: p[..., SHAPE].mul_(1e3),
    'all on one pixel': lambda p: p[..., CAMERA].mul_(torch.tensor([0.0, 1.0, 1.0])),
    'far outside': lambda p: p[..., CAMERA].fill_(1e6),
    'camera behind': lambda p: p[..., CAMERA].fill_(-5.0),
}


def random_target(vertices, joints) -> Target:
    place = torch.tensor([0.0, 0.0, 0.6])
    return Target(
        vertices.detach() + place,
        joints.detach() + place,
        torch.randn(len(joints), 2, NUM_VERTICES, 2),
        torch.randn(len(joints), 2, NUM_JOINTS, 2),
        torch.zeros(len(joints), 16, 16, dtype=torch.long),  # no hand in the mask
        torch.rand(len(joints), 3, 16, 16),
    )


@pytest.mark.parametrize('scale_to_truth', [False, True])
@pytest.mark.parametrize('kind', DEGENERATE)
def test_losses_of_degenerate_hands(standin, kind, scale_to_truth):
    head = HandHead(TwoHandLayer(standin), root_joint=0)
    criterion = DIRCriterion(
        standin,
        weights=dict.fromkeys(TERMS, 1.0),
        root_joint=0,
        scale_to_truth=scale_to_truth,
        lovasz_on_probabilities=True,
    )
    parameters, offset = torch.randn(2, 2, NUM_PARAMETERS), torch.randn(2, 3)
    truth = random_target(*head(parameters, offset)[2:4])
    DEGENERATE[kind](parameters)
    maps = torch.randn(2, 3, 8, 8)

    def objective(parameters, offset, maps):
        return tuple(criterion(DIROutput([head(parameters, offset)], maps, maps), truth).values())

    assert_gentle(objective, parameters, offset, maps)
    assert_gentle(lambda *x: objective(*(y.bfloat16() for y in x)), parameters, offset, maps)


@pytest.mark.parametrize('kind', ['a point', 'wrist is middle MCP', 'a line', 'the truth'])
def test_losses_of_collapsed_meshes(standin, kind):
    """Meshes that no parameters yield, on the prediction's side and on the truth's."""
    head = HandHead(TwoHandLayer(standin), root_joint=0)
    criterion = DIRCriterion(standin, weights=dict.fromkeys(TERMS, 1.0), root_joint=0, scale_to_truth=True)
    hands = head(torch.randn(2, 2, NUM_PARAMETERS), torch.randn(2, 3))
    target = random_target(hands.vertices, hands.joints)

    def collapse(points):
        change = {'a point': 0.0, 'a line': torch.tensor([1.0, 0, 0])}.get(kind, 1.0)
        points = points * change
        if kind == 'wrist is middle MCP' and points.shape[2] == NUM_JOINTS:
            points = torch.cat([points[:, :, :9], points[:, :, :1], points[:, :, 10:]], 2)
        return points

    collapsed = target._replace(vertices=collapse(target.vertices), joints=collapse(target.joints))
    for truth in (target, collapsed):

        def objective(vertices, joints, truth=truth):
            odd = hands.detach()._replace(vertices=collapse(vertices), joints=collapse(joints))
            return tuple(criterion(DIROutput([odd], None, None), truth).values())

        assert_gentle(objective, hands.vertices.detach(), hands.joints.detach())


@pytest.mark.parametrize('labels', ['no hand', 'one hand', 'no known class'])
@pytest.mark.parametrize('scores', [0.0, 1e4, -1e4])
def test_lovasz_of_empty_masks(labels, scores):
    truth = torch.full((2, 8, 8), {'no hand': 0, 'one hand': 1, 'no known class': 7}[labels])
    assert_gentle(lambda x: losses.lovasz_softmax(x.softmax(1), truth), torch.randn(2, 3, 8, 8) + scores)
    assert_gentle(lambda x: losses.lovasz_softmax(x, truth), torch.full((2, 3, 8, 8), scores))


# Metrics and placement


@pytest.mark.parametrize('protocol', GRID, ids=lambda p: p.describe())
@pytest.mark.parametrize('kind', ['a point', 'a line', 'wrist is middle MCP', 'huge', 'on the camera plane'])
def test_errors_of_degenerate_predictions(standin, protocol, kind):
    regressor, template = JointRegressor(standin), torch.from_numpy(np.stack([m.template for m in standin])).float()
    true = template + torch.tensor([0.0, 0.0, 0.6])
    predicted = {
        'a point': torch.zeros(2, NUM_VERTICES, 3),
        'a line': template * torch.tensor([1.0, 0, 0]),
        'wrist is middle MCP': template - template[:, :1],
        'huge': template * 1e6,
        'on the camera plane': template - torch.tensor([0.0, 0.0, 0.6]),
    }[kind]
    intrinsics = torch.tensor([[[600.0, 0, 128], [0, 600, 128], [0, 0, 1]]])
    errors = sample_errors(
        regressor, predicted[None], torch.zeros(1, 3),
        true_vertices=true[None], intrinsics=intrinsics, network_root=0, protocol=protocol,
    )  # fmt: skip
    assert all(value.isfinite().all() for value in errors.values())
    for error in procrustes_errors(regressor, predicted[None], true_vertices=true[None]):
        assert error.isfinite().all()


def test_hands_without_any_annotated_joint_have_no_joint_error(standin):
    regressor = JointRegressor(standin)
    vertices = torch.from_numpy(np.stack([m.template for m in standin])).float()[None] + torch.tensor([0, 0, 0.6])
    errors = sample_errors(
        regressor, vertices, torch.zeros(1, 3), true_vertices=vertices, intrinsics=torch.eye(3)[None], network_root=0,
        protocol=GRID[0]._replace(joints='annotated'), annotated=torch.full((1, 2, NUM_JOINTS, 3), math.nan),
    )  # fmt: skip
    assert errors['joint_mm'].isnan().all() and errors['root_mm'].isnan().all() and errors['joint_px'].isnan().all()
    joints, _ = procrustes_errors(
        regressor, vertices, true_vertices=vertices, true_joints=torch.full((1, 2, NUM_JOINTS, 3), math.nan)
    )
    assert joints.isnan().all()


@pytest.mark.parametrize('kind', ['a point', 'a line', 'huge', 'tiny'])
@pytest.mark.parametrize('scale', [0.0, -1.0, 1e-30, 1e12])
def test_placement_of_degenerate_hands(kind, scale):
    joints = torch.randn(3, 2, NUM_JOINTS, 3) * {'a point': 0.0, 'huge': 1e6, 'tiny': 1e-12}.get(kind, 1.0)
    joints = joints * (torch.tensor([1.0, 0, 0]) if kind == 'a line' else 1)
    camera = torch.cat([torch.full((3, 2, 1), scale), torch.randn(3, 2, 2)], -1)
    intrinsics = torch.tensor([[600.0, 0, 128], [0, 600, 128], [0, 0, 1]]).expand(3, 3, 3)
    for offset in (torch.zeros(3, 3), torch.randn(3, 3), torch.full((3, 3), -1e6)):
        placement = place_hands(joints, camera, offset, intrinsics)
        assert placement.roots.isfinite().all() and placement.residual_px.isfinite().all()
    assert nearest_camera(joints, torch.randn(3, 2, NUM_JOINTS, 2)).isfinite().all()
