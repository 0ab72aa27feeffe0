import numpy as np
import pytest
import torch

from manopth import ManoError, TwoHandLayer
from manopth.lbs import HandArrays, forward_kinematics
from manopth.rotations import axis_angle_to_matrix, cross_product_matrix
from manopth.tables import CHAIN_PARENTS, LEFT, MANO_TO_JOINTS, PUBLISHED_LEFT_MIDDLE_TIP, RIGHT, TIP_VERTICES

MIRROR = torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64)  # of points
MIRROR_TURN = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)  # of axis-angles
TIPS = [4, 8, 12, 16, 20]


def parameters(batch=2, seed=0, dtype=torch.float64):
    """root (B, 2, 3), PCA pose (B, 2, 45), betas (B, 2, 10)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        scale * torch.randn(batch, 2, size, generator=generator, dtype=dtype)
        for size, scale in ((3, 1.0), (45, 0.5), (10, 1.0))
    ]


def naive_hand(model, root, axis_angles, betas):
    """Skinning by definition, one vertex and one joint at a time -> (778, 3), (16, 3)."""
    turns = torch.from_numpy(np.concatenate([root[None], axis_angles.reshape(15, 3)]))
    rotations = torch.linalg.matrix_exp(cross_product_matrix(turns)).numpy()
    shaped = model.template + model.shape_dirs @ betas
    rest = model.joint_regressor @ shaped
    posed = shaped + model.pose_dirs @ np.concatenate([(r - np.eye(3)).ravel() for r in rotations[1:]])
    places = []
    for joint, parent in enumerate(CHAIN_PARENTS):
        local = np.eye(4)
        local[:3, :3] = rotations[joint]
        local[:3, 3] = rest[joint] - (rest[parent] if parent >= 0 else 0)
        places.append(places[parent] @ local if parent >= 0 else local)
    vertices = np.zeros_like(posed)
    for v in range(len(posed)):
        for joint in np.flatnonzero(model.skinning_weights[v]):
            moved = places[joint][:3, :3] @ (posed[v] - rest[joint]) + places[joint][:3, 3]
            vertices[v] += model.skinning_weights[v, joint] * moved
    return vertices, np.array([place[:3, 3] for place in places])


@pytest.fixture(scope='module')
def layer(standin):
    return TwoHandLayer(standin, dtype=torch.float64)


def test_both_hands_equal_naive_skinning(standin, layer):
    root, pose, betas = parameters()
    hands = layer(root, pose, betas)
    axis_angles = layer.pose_from_pca(pose)
    for sample, hand in ((0, LEFT), (1, RIGHT)):
        model = standin[hand]
        expected = model.pose_mean + pose[sample, hand].numpy() @ model.pose_components
        np.testing.assert_allclose(axis_angles[sample, hand], expected, atol=1e-14)
        vertices, chain = naive_hand(model, root[sample, hand].numpy(), expected, betas[sample, hand].numpy())
        np.testing.assert_allclose(hands.vertices[sample, hand], vertices, atol=1e-12)
        joints = np.concatenate([chain, vertices[list(TIP_VERTICES)]])[list(MANO_TO_JOINTS)]
        np.testing.assert_allclose(hands.joints[sample, hand], joints, atol=1e-12)


def test_forward_kinematics_of_a_straight_chain():
    """Every joint turned by 90 degrees about z: a finger of three unit bones folds into a square."""
    rest = torch.zeros(16, 3, dtype=torch.float64)
    for joint, parent in enumerate(CHAIN_PARENTS[1:], 1):
        rest[joint] = rest[parent] + torch.tensor([1.0, 0, 0])
    quarter = axis_angle_to_matrix(torch.tensor([0, 0, np.pi / 2], dtype=torch.float64)).expand(16, 3, 3)
    turned, joints = forward_kinematics(quarter, rest)
    folded = torch.tensor([[0.0, 1, 0], [-1, 1, 0], [-1, 0, 0]], dtype=torch.float64)
    for first in (1, 4, 7, 10, 13):
        torch.testing.assert_close(joints[first : first + 3], folded)
    torch.testing.assert_close(turned[3], torch.eye(3, dtype=torch.float64))


def test_zero_pose_is_the_rest_mesh(standin, layer):
    zero = torch.zeros(1, 2, 45, dtype=torch.float64)
    hands = layer(zero[..., :3], zero, zero[..., :10], use_pca=False)
    for hand, model in enumerate(standin):
        torch.testing.assert_close(hands.vertices[0, hand], torch.tensor(model.template), atol=1e-15, rtol=0)
        chain = torch.from_numpy(model.joint_regressor @ model.template)
        knuckles = hands.joints[0, hand, [0, 5, 9, 17, 13, 1]]
        torch.testing.assert_close(knuckles, chain[[0, 1, 4, 7, 10, 13]], atol=1e-15, rtol=0)


def test_all_pose_representations_agree(layer):
    root, pose, betas = parameters()
    hands = layer(root, pose, betas)
    axis_angle = layer.pose_from_pca(pose)
    fingers = axis_angle_to_matrix(axis_angle.unflatten(-1, (15, 3)))
    matrix = axis_angle_to_matrix(root)
    six = matrix[..., :2].mT.flatten(-2)
    for other in (
        layer(root, axis_angle, betas, use_pca=False),
        layer(root, fingers, betas),
        layer(matrix, pose, betas),
        layer(six, pose, betas),
        layer(six, fingers, betas, use_pca=False),
    ):
        torch.testing.assert_close(other, hands, atol=1e-12, rtol=0)


def test_mirrored_parameters_yield_the_mirrored_other_hand(layer):
    root, pose, betas = parameters()
    hands = layer(root, pose, betas)
    # PCA coefficients and betas are the same on both hands; rotations change sign about y and z.
    swapped = layer(root.flip(1) * MIRROR_TURN, pose.flip(1), betas.flip(1))
    for points, other in zip(hands, swapped):
        torch.testing.assert_close(other, points.flip(1) * MIRROR, atol=1e-12, rtol=0)


def test_root_rotation_turns_the_hand_about_its_wrist(layer):
    root, pose, betas = parameters()
    straight, turned = layer(torch.zeros_like(root), pose, betas), layer(root, pose, betas)
    wrist = straight.joints[:, :, :1]
    torch.testing.assert_close(turned.joints[:, :, :1], wrist)
    rest = layer(torch.zeros_like(root), torch.zeros_like(pose), betas, use_pca=False)
    torch.testing.assert_close(rest.joints[:, :, :1], wrist)  # it depends on the shape, not on the fingers
    matrix = axis_angle_to_matrix(root)
    for before, after in zip(straight, turned):
        torch.testing.assert_close((before - wrist) @ matrix.mT + wrist, after, atol=1e-12, rtol=0)


@pytest.mark.parametrize('joint', [0, 9, 20])
def test_recentring_moves_each_hand_rigidly(layer, joint):
    plain, centred = (layer(*parameters(), root_joint=j) for j in (None, joint))
    assert (centred.joints[:, :, joint] == 0).all()
    offset = plain.joints[:, :, joint : joint + 1]
    assert (offset.abs() > 0).any()
    for before, after in zip(plain, centred):
        torch.testing.assert_close(after + offset, before, atol=1e-14, rtol=0)


def test_tips_are_the_named_vertices(standin):
    own = (TIP_VERTICES, TIP_VERTICES)
    published = ((*TIP_VERTICES[:2], PUBLISHED_LEFT_MIDDLE_TIP, *TIP_VERTICES[3:]), TIP_VERTICES)
    for given, expected in ((TIP_VERTICES, own), (published, published)):
        hands = TwoHandLayer(standin, tip_vertices=given)(*parameters(dtype=torch.float32))
        for hand in (LEFT, RIGHT):
            assert torch.equal(hands.joints[:, hand, TIPS], hands.vertices[:, hand, list(expected[hand])])
    assert not torch.equal(hands.vertices[:, LEFT, 444], hands.vertices[:, LEFT, 445])


def test_empty_batch(layer):
    hands = layer(*parameters(batch=0))
    assert hands.vertices.shape == (0, 2, 778, 3) and hands.joints.shape == (0, 2, 21, 3)


def test_batch_entries_are_independent(layer):
    together = layer(*parameters(batch=3))
    for i in range(3):
        alone = layer(*(p[i : i + 1] for p in parameters(batch=3)))
        torch.testing.assert_close(alone.vertices[0], together.vertices[i], atol=1e-14, rtol=0)


def test_single_precision_is_accurate_to_a_micrometre(standin, layer):
    exact = layer(*parameters(batch=8))
    single = TwoHandLayer(standin)(*(p.float() for p in parameters(batch=8)))
    for a, b in zip(single, exact):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, atol=1e-6, rtol=0)


@pytest.mark.parametrize('scale', [1.0, 0.0])  # 0: every rotation at its singular point
def test_gradients_equal_finite_differences(layer, scale):
    root, pose, betas = (scale * p[:1] for p in parameters())

    def some_numbers(changes):
        """Root, some joint angles and betas of both hands -> a tip, a joint and two vertices of each."""
        turn, fingers, shape = changes.split([3, 3, 2], -1)
        hands = layer(
            root + turn,
            torch.cat([pose[..., :3] + fingers, pose[..., 3:]], -1),
            torch.cat([betas[..., :2] + shape, betas[..., 2:]], -1),
            use_pca=False,
        )
        return torch.cat([hands.joints[:, :, [8, 6]], hands.vertices[:, :, [0, 500]]], 2)

    assert torch.autograd.gradcheck(some_numbers, torch.zeros(1, 2, 8, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize('still', [[0.0, 0, 0], [1.0, 0, 0, 0, 1, 0]])
def test_gradients_are_finite_at_the_rest_pose(standin, still):
    layer = TwoHandLayer(standin)
    root = torch.tensor(still).repeat(1, 2, 1).requires_grad_()
    pose, betas = (torch.zeros(1, 2, n, requires_grad=True) for n in (45, 10))
    hands = layer(root, pose, betas, use_pca=False, root_joint=0)
    (hands.vertices.square().sum() + hands.joints.sum()).backward()
    for gradient in (root.grad, pose.grad, betas.grad):
        assert gradient.isfinite().all() and (gradient != 0).any()


def test_hand_arrays_are_not_saved_in_checkpoints(standin):
    layer = TwoHandLayer(standin)
    assert not layer.state_dict() and not list(layer.parameters())
    assert {name for name, _ in layer.named_buffers()} >= set(HandArrays._fields)


def test_models_in_the_wrong_order_are_refused(standin):
    with pytest.raises(ManoError, match=r'models are \(right, left\); pass them as \(left, right\)'):
        TwoHandLayer(standin[::-1])
