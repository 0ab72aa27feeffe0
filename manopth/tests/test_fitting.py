from dataclasses import replace

import numpy as np
import pytest
import torch

from manopth import ManoError, TwoHandLayer, fitting
from manopth.alignment import align
from manopth.fitting import HandParameters, PointModel
from manopth.rotations import axis_angle_to_matrix
from manopth.standin import pose_from_angles, standin_pair
from manopth.tables import NUM_JOINTS, SIDES

MIRROR = torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64)


@pytest.fixture(scope='module')
def models():
    return standin_pair()


@pytest.fixture(scope='module')
def point_model(models):
    return PointModel.from_models(models)


def natural_hands(count: int, subjects: int = 2, seed: int = 0) -> tuple[HandParameters, torch.Tensor]:
    """Hands with flexed and spread fingers anywhere in space -> (parameters, subject (B,))."""
    rng = np.random.default_rng(seed)
    flexion, spread = rng.uniform(0, 1.3, (count, 2, 5, 3)), rng.uniform(-0.12, 0.12, (count, 2, 5))
    flexion[:, :, 0] *= 0.4
    pose = np.stack([pose_from_angles(flexion[:, i], spread[:, i], side=side) for i, side in enumerate(SIDES)], 1)
    subject = torch.arange(count) % subjects
    betas = torch.from_numpy(rng.normal(size=(subjects, 1, 10))).expand(-1, 2, -1)[subject]
    root = axis_angle_to_matrix(torch.from_numpy(rng.normal(size=(count, 2, 3)) * 2))
    trans = torch.from_numpy(rng.normal(size=(count, 2, 3)) * 0.3)
    return HandParameters(root, torch.from_numpy(pose).double().unflatten(-1, (15, 3)), betas, trans), subject


def vertices_of(models, hands: HandParameters) -> torch.Tensor:
    posed = TwoHandLayer(models, dtype=torch.float64)(hands.root, hands.pose.flatten(2), hands.betas, use_pca=False)
    return posed.vertices + hands.trans[:, :, None]


def all_valid(joints):
    return torch.ones(joints.shape[:3], dtype=torch.bool)


def test_points_equal_the_joints_of_the_hand_layer(models, point_model):
    hands, _ = natural_hands(3)
    posed = TwoHandLayer(models, dtype=torch.float64)(hands.root, hands.pose.flatten(2), hands.betas, use_pca=False)
    torch.testing.assert_close(fitting.place_points(point_model, hands), posed.joints + hands.trans[:, :, None])


def test_derivatives_equal_autograd(models):
    rng = np.random.default_rng(1)  # large pose blend shapes, so that their derivatives count
    rough = tuple(replace(m, pose_dirs=rng.normal(size=m.pose_dirs.shape) * 0.01) for m in models)
    model, (hands, _) = PointModel.from_models(rough), natural_hands(2)

    def points(change):  # the same change for both time steps and hands: root 3, pose 45, trans 3, betas 10
        turn = axis_angle_to_matrix(change[:3]).expand(2, 2, 3, 3)
        moved = HandParameters(
            hands.root @ turn,
            hands.pose + change[3:48].view(15, 3),
            hands.betas + change[51:],
            hands.trans + change[48:51],
        )
        return fitting.LinearisedPoints(model, moved).points

    expected = torch.autograd.functional.jacobian(points, torch.zeros(61, dtype=torch.float64))
    state = fitting.LinearisedPoints(model, hands)
    torch.testing.assert_close(torch.cat([state.by_pose(), state.by_shape()], -1), expected)


@pytest.mark.parametrize('angle', [0.0, 1e-3, 0.5, 3.0])
def test_right_jacobian(angle):
    axis_angle = angle * torch.nn.functional.normalize(torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64), dim=0)
    rotation = axis_angle_to_matrix(axis_angle)
    change = torch.autograd.functional.jacobian(axis_angle_to_matrix, axis_angle)  # (3, 3, 3 parameters)
    spin = torch.einsum('ba,bce->ace', rotation, change)  # skew matrices R^T dR
    expected = torch.stack([spin[2, 1], spin[0, 2], spin[1, 0]])
    torch.testing.assert_close(fitting.right_jacobian(axis_angle), expected)


def test_rigid_alignment_ignores_weightless_points():
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(4, 21, 3, generator=generator, dtype=torch.float64)
    rotation = axis_angle_to_matrix(torch.randn(4, 3, generator=generator, dtype=torch.float64) * 2)
    shift = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    target = source @ rotation.mT + shift[:, None]
    target[:, 7:] = torch.nan
    weight = torch.ones(4, 21, dtype=torch.float64)
    weight[:, 7:] = 0
    found = align(source, target, weight=weight)
    for got, expected in zip((found.rotation, found.translation), (rotation, shift)):
        torch.testing.assert_close(got, expected)
    nothing = align(source, target, weight=weight * 0).rotation
    torch.testing.assert_close(nothing @ nothing.mT, torch.eye(3, dtype=torch.float64).expand(4, 3, 3))


def test_synthetic_hands_are_recovered(models, point_model):
    truth, subject = natural_hands(24, subjects=2)
    joints = fitting.place_points(point_model, truth)
    found = fitting.fit_hands(point_model, joints, all_valid(joints), subject=subject)
    residual = (fitting.place_points(point_model, found) - joints).norm(dim=-1) * 1e3
    assert residual.mean() < 0.6 and residual.mean(-1).max() < 1.2  # mm
    distance = (vertices_of(models, found) - vertices_of(models, truth)).norm(dim=-1) * 1e3
    assert distance.mean() < 1.0 and distance.mean(-1).max() < 1.8
    for number in (0, 1):  # both hands share one shape at all time steps of a subject
        assert (found.betas[subject == number] == found.betas[number, 0]).all()

    betas = truth.betas
    known = fitting.fit_hands(point_model, joints, all_valid(joints), betas=betas)
    assert torch.equal(known.betas, betas)
    assert (fitting.place_points(point_model, known) - joints).norm(dim=-1).mean() * 1e3 < 0.6


def test_invalid_joints_are_ignored(models, point_model):
    truth, subject = natural_hands(8, subjects=1)
    joints = fitting.place_points(point_model, truth)
    valid = all_valid(joints)
    valid[:, :, [3, 4, 8, 12, 20]] = False
    valid[0, 0, 9] = False
    broken = torch.where(valid[..., None], joints, torch.nan)
    far_off = torch.where(valid[..., None], joints, 1e3)
    found, same = (fitting.fit_hands(point_model, data, valid, subject=subject) for data in (broken, far_off))
    for a, b in zip(found, same):
        assert torch.equal(a, b)
    residual = (fitting.place_points(point_model, found) - joints).norm(dim=-1)[valid] * 1e3
    assert residual.mean() < 0.6
    # Only the fingertip positions are unknown, so the mesh stays close.
    distance = (vertices_of(models, found) - vertices_of(models, truth)).norm(dim=-1) * 1e3
    assert distance.mean() < 4.0


def test_hand_without_valid_joints_does_not_affect_the_other(point_model):
    truth, _ = natural_hands(2, subjects=1)
    joints = fitting.place_points(point_model, truth)
    alone, subject = all_valid(joints), torch.zeros(2, dtype=torch.long)
    alone[:, 0] = False
    found = fitting.fit_hands(point_model, torch.where(alone[..., None], joints, 1.0), alone, subject=subject)
    assert all(value.isfinite().all() for value in found)
    residual = (fitting.place_points(point_model, found) - joints).norm(dim=-1)[:, 1] * 1e3
    assert residual.mean() < 0.6


def test_single_outlier_does_not_bend_the_hand(point_model):
    truth, subject = natural_hands(6, subjects=1)
    joints = fitting.place_points(point_model, truth)
    disturbed = joints.clone()
    disturbed[:, :, 7, 0] += 0.08
    found = fitting.fit_hands(point_model, disturbed, all_valid(joints), subject=subject)
    distance = (fitting.place_points(point_model, found) - joints).norm(dim=-1) * 1e3
    others = [j for j in range(NUM_JOINTS) if j not in (5, 6, 7, 8)]
    assert distance[:, :, others].mean() < 2.0
    assert distance[:, :, 7].mean() < 20.0


def test_mirrored_joints_yield_the_mirrored_fit(models, point_model):
    truth, subject = natural_hands(4, subjects=1)
    joints = fitting.place_points(point_model, truth)
    mirrored = (joints * MIRROR).flip(1)  # the hands swap
    found = fitting.fit_hands(point_model, joints, all_valid(joints), subject=subject)
    other = fitting.fit_hands(point_model, mirrored, all_valid(joints), subject=subject)
    back = (vertices_of(models, other) * MIRROR).flip(1)
    torch.testing.assert_close(back, vertices_of(models, found), atol=2e-4, rtol=0)


def test_flexion_axes_curl_the_fingers_towards_the_palm(models):
    for model, outwards in zip(models, (1.0, -1.0)):
        frames = fitting.finger_frames(model)
        unit = np.broadcast_to(np.eye(3), frames.shape)
        np.testing.assert_allclose(frames @ frames.transpose(0, 2, 1), unit, atol=1e-12)
        along_finger = frames[:12, 2]
        assert (along_finger[:, 0] * outwards > 0.5).all()
        towards = np.cross(frames[:12, 0], along_finger)  # where flexion moves the fingertip
        assert (towards[:, 1] < -0.5).all()  # both palms look down at rest


def test_fittable_needs_enough_joints_and_palm_joints():
    valid = torch.ones(3, 21, dtype=torch.bool)
    valid[1, list(fitting.PALM_JOINTS[2:])] = False
    valid[2, :12] = False
    assert fitting.fittable(valid).tolist() == [True, False, False]


def test_empty_batch_of_time_steps(point_model):
    joints = torch.zeros(0, 2, 21, 3, dtype=torch.float64)
    found = fitting.fit_hands(point_model, joints, all_valid(joints), subject=torch.zeros(0, dtype=torch.long))
    assert [len(value) for value in found] == [0, 0, 0, 0]


def test_exactly_one_of_subject_and_betas_is_required(point_model):
    joints = torch.zeros(1, 2, 21, 3, dtype=torch.float64)
    subject, betas = torch.zeros(1, dtype=torch.long), torch.zeros(1, 2, 10, dtype=torch.float64)
    for arguments in ({}, {'subject': subject, 'betas': betas}):
        with pytest.raises(ManoError, match='fit_hands: pass either subject'):
            fitting.fit_hands(point_model, joints, all_valid(joints), **arguments)
