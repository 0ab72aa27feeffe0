import math

import pytest
import torch
import torch.nn.functional as F

from manopth.rotations import (
    axis_angle_to_matrix,
    cross_product_matrix,
    gram_schmidt_6d_to_matrix,
    matrix_to_axis_angle,
    matrix_to_quaternion,
    nearest_rotation,
    symmetric_6d_to_matrix,
    unit_vectors,
)

ANGLES = [0.0, 1e-20, 1e-12, 1e-7, 1e-4, 0.0316, 0.0317, 0.5, 2.0, 3.0, math.pi - 1e-4, math.pi - 1e-8, math.pi, 5.0]


def directions(count=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, 3, generator=generator, dtype=torch.float64), dim=-1)


def random_matrices(count=200, seed=1):
    generator = torch.Generator().manual_seed(seed)
    q = F.normalize(torch.randn(count, 4, generator=generator, dtype=torch.float64), dim=-1)
    return axis_angle_to_matrix(2 * torch.acos(q[:, :1]) * F.normalize(q[:, 1:], dim=-1))


def assert_rotations(matrix, atol):
    identity = torch.eye(3, dtype=matrix.dtype).expand_as(matrix)
    torch.testing.assert_close(matrix @ matrix.mT, identity, atol=atol, rtol=0)
    determinant = torch.linalg.det(matrix)
    torch.testing.assert_close(determinant, torch.ones_like(determinant), atol=atol, rtol=0)


@pytest.mark.parametrize('angle', ANGLES)
def test_axis_angle_is_the_matrix_exponential(angle):
    axis_angle = angle * directions()
    matrix = axis_angle_to_matrix(axis_angle)
    torch.testing.assert_close(matrix, torch.linalg.matrix_exp(cross_product_matrix(axis_angle)), atol=1e-13, rtol=0)
    torch.testing.assert_close(axis_angle_to_matrix(axis_angle.float()).double(), matrix, atol=1e-6, rtol=0)
    assert_rotations(matrix, 1e-14)


def test_cross_product_matrix_is_the_cross_product():
    a, b = directions(seed=2), directions(seed=3)
    torch.testing.assert_close((cross_product_matrix(a) @ b[..., None]).squeeze(-1), torch.linalg.cross(a, b))


@pytest.mark.parametrize('angle', ANGLES)
def test_axis_angle_gradient_is_correct_at_every_angle(angle):
    assert torch.autograd.gradcheck(axis_angle_to_matrix, (angle * directions(3)).requires_grad_())
    wanted = torch.randn(20, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    double = (angle * directions(20)).requires_grad_()
    single = double.detach().float().requires_grad_()
    for axis_angle in (double, single):
        (axis_angle_to_matrix(axis_angle) * wanted).sum().backward()
    torch.testing.assert_close(single.grad.double(), double.grad, atol=1e-5, rtol=0)


@pytest.mark.parametrize('function', [axis_angle_to_matrix, unit_vectors])
def test_further_derivatives_and_transforms_are_those_of_autograd(function):
    vectors = 2 * directions(3)
    assert torch.autograd.gradgradcheck(function, vectors.clone().requires_grad_())
    expected = torch.autograd.functional.jacobian(function, vectors[0])
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(torch.func.vmap(transform(function))(vectors)[0], expected)


@pytest.mark.parametrize('function', [axis_angle_to_matrix, unit_vectors])
def test_a_gradient_within_autocast_keeps_its_type(function):
    vectors = directions(3).float().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16):
        function(vectors).pow(3).sum().backward()
    assert vectors.grad.dtype == torch.float32 and vectors.grad.isfinite().all()


def test_gradient_at_zero_equals_the_generators():
    zero = torch.zeros(3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(axis_angle_to_matrix, zero)
    expected = torch.stack([cross_product_matrix(axis) for axis in torch.eye(3, dtype=torch.float64)], -1)
    torch.testing.assert_close(jacobian, expected, atol=0, rtol=0)


@pytest.mark.parametrize('angle', [a for a in ANGLES if a < math.pi - 1e-9])
def test_axis_angle_round_trip(angle):
    axis_angle = angle * directions()
    back = matrix_to_axis_angle(axis_angle_to_matrix(axis_angle))
    torch.testing.assert_close(back, axis_angle, atol=1e-12, rtol=1e-7)


def test_matrix_round_trip():
    half_turns = axis_angle_to_matrix(math.pi * torch.cat([directions(), torch.eye(3, dtype=torch.float64)]))
    for matrix in (random_matrices(), half_turns, torch.eye(3, dtype=torch.float64)):
        back = matrix_to_axis_angle(matrix)
        assert (back.norm(dim=-1) <= math.pi + 1e-12).all()
        torch.testing.assert_close(axis_angle_to_matrix(back), matrix, atol=1e-12, rtol=0)
        single = axis_angle_to_matrix(matrix_to_axis_angle(matrix.float()))
        torch.testing.assert_close(single.double(), matrix, atol=3e-6, rtol=0)


@pytest.mark.parametrize('angle', [1e-3, 1.0, 3.0, math.pi - 1e-3])
def test_matrix_to_axis_angle_gradient_inverts_axis_angle_to_matrix(angle):
    """The Jacobian of the round trip is the identity."""

    def round_trip(axis_angle):
        return matrix_to_axis_angle(axis_angle_to_matrix(axis_angle))

    for axis_angle in angle * directions(3):
        jacobian = torch.autograd.functional.jacobian(round_trip, axis_angle)
        torch.testing.assert_close(jacobian, torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)


def test_matrix_to_axis_angle_gradient_is_finite_at_zero_and_at_half_turns():
    matrix = axis_angle_to_matrix(torch.tensor([[0.0, 0, 0], [math.pi, 0, 0], [0, math.pi, 0]])).requires_grad_()
    matrix_to_axis_angle(matrix).sum().backward()
    assert matrix.grad.isfinite().all()


def test_quaternion_has_unit_length_and_rotates_vectors_alike():
    matrix, point = random_matrices(), directions(200, seed=5)
    q = matrix_to_quaternion(matrix)
    torch.testing.assert_close(q.norm(dim=-1), torch.ones(200, dtype=torch.float64))
    real, vector = q[:, :1], q[:, 1:]
    turned = point + 2 * torch.linalg.cross(vector, torch.linalg.cross(vector, point) + real * point)
    torch.testing.assert_close(turned, (matrix @ point[..., None]).squeeze(-1))


@pytest.mark.parametrize('to_matrix', [symmetric_6d_to_matrix, gram_schmidt_6d_to_matrix])
def test_6d_yields_rotations_and_reproduces_those_it_comes_from(to_matrix):
    generator = torch.Generator().manual_seed(4)
    assert_rotations(to_matrix(torch.randn(100, 6, generator=generator, dtype=torch.float64)), 1e-12)
    matrix = random_matrices()
    torch.testing.assert_close(to_matrix(matrix[..., :2].mT.flatten(-2)), matrix, atol=1e-12, rtol=0)
    scaled = (matrix[..., :2] * torch.tensor([0.3, 7.0])).mT.flatten(-2)  # lengths do not matter
    torch.testing.assert_close(to_matrix(scaled), matrix, atol=1e-12, rtol=0)


def test_symmetric_6d_splits_the_error_between_its_columns():
    a, b = directions(50, seed=6), directions(50, seed=7)
    matrix = symmetric_6d_to_matrix(torch.cat([a, b], -1))
    x, y, z = matrix.unbind(-1)
    torch.testing.assert_close((x * a).sum(-1), (y * b).sum(-1))  # both are turned by the same angle
    torch.testing.assert_close(F.normalize(x + y, dim=-1), F.normalize(a + b, dim=-1))  # about the common bisector
    torch.testing.assert_close((z * a).sum(-1), torch.zeros(50, dtype=torch.float64))  # within their plane
    swapped = symmetric_6d_to_matrix(torch.cat([b, a], -1))
    torch.testing.assert_close(swapped, torch.stack([y, x, -z], -1))


def test_gram_schmidt_keeps_the_first_direction_and_the_plane():
    a, b = directions(50, seed=6), directions(50, seed=7)
    matrix = gram_schmidt_6d_to_matrix(torch.cat([a, b], -1))
    torch.testing.assert_close(matrix[..., 0], a)
    assert ((matrix[..., 1] * b).sum(-1) > 0).all()
    torch.testing.assert_close((matrix[..., 2] * b).sum(-1), torch.zeros(50, dtype=torch.float64))


@pytest.mark.parametrize('to_matrix', [symmetric_6d_to_matrix, gram_schmidt_6d_to_matrix])
@pytest.mark.parametrize(
    'six',
    [
        [0, 0, 0, 0, 0, 0],
        [1, 2, 3, 0, 0, 0],
        [0, 0, 0, 1, 2, 3],
        [1, 2, 3, 1, 2, 3],
        [1, 2, 3, 2, 4, 6],
        [1, 2, 3, -1, -2, -3],
        [1e-12, 0, 0, 0, 1e-12, 0],
        [1, 2, 3, 1, 2, 3.000001],
    ],
)
def test_degenerate_6d_has_finite_values_and_gradients(to_matrix, six):
    six = torch.tensor(six, dtype=torch.float32, requires_grad=True)
    matrix = to_matrix(six)
    assert matrix.isfinite().all()
    assert (matrix.norm(dim=-2) < 1 + 1e-6).all()
    (matrix * torch.arange(9.0).view(3, 3)).sum().backward()
    assert six.grad.isfinite().all()


@pytest.mark.parametrize('to_matrix', [symmetric_6d_to_matrix, gram_schmidt_6d_to_matrix])
def test_6d_gradients(to_matrix):
    six = torch.randn(4, 6, generator=torch.Generator().manual_seed(8), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(to_matrix, six)


def test_nearest_rotation_is_the_closest_of_many():
    matrix = torch.randn(20, 3, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    nearest = nearest_rotation(matrix)
    assert_rotations(nearest, 1e-12)
    distance = (nearest - matrix).norm(dim=(-2, -1))
    others = (random_matrices(500)[:, None] - matrix).norm(dim=(-2, -1))
    assert (distance <= others).all()
    torch.testing.assert_close(nearest_rotation(random_matrices()), random_matrices(), atol=1e-12, rtol=0)


def test_nearest_rotation_gradient():
    matrix = torch.randn(6, 3, 3, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
    rotations = random_matrices(4)  # their singular values coincide
    assert torch.autograd.gradcheck(nearest_rotation, torch.cat([matrix, rotations]).requires_grad_())
    zero = torch.zeros(1, 3, 3, requires_grad=True)
    nearest_rotation(zero).sum().backward()
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize('shape', [(), (0,), (2, 5), (1, 0, 3)])
def test_leading_axes_are_arbitrary(shape):
    assert axis_angle_to_matrix(torch.zeros(*shape, 3)).shape == (*shape, 3, 3)
    matrix = torch.eye(3).expand(*shape, 3, 3)
    assert matrix_to_axis_angle(matrix).shape == (*shape, 3)
    assert matrix_to_quaternion(matrix).shape == (*shape, 4)
    assert nearest_rotation(matrix).shape == (*shape, 3, 3)
    six = matrix[..., :2].mT.flatten(-2)
    for to_matrix in (symmetric_6d_to_matrix, gram_schmidt_6d_to_matrix):
        torch.testing.assert_close(to_matrix(six), matrix.contiguous())
