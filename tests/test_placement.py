import pytest
import torch

from evaluation.metrics import placement_error
from manopth import TwoHandLayer
from models.placement import FARTHEST, NEAREST, nearest_camera, place_hands
from utils.geometry import CROP_SIZE, project, to_uv
from utils.hand import HAND_SCALE


def scene(standin, *, seed: int = 0, count: int = 16, root_joint: int = 0):
    """True hands of a close camera with a full 3 x 3 matrix -> joints, camera, offset, intrinsics, roots."""
    g = torch.Generator().manual_seed(seed)
    turn, pose, shape = (
        scale * torch.randn(count, 2, size, generator=g) for scale, size in ((1, 3), (0.5, 45), (1, 10))
    )
    joints = TwoHandLayer(standin)(turn, pose, shape, root_joint=root_joint).joints
    left = torch.tensor([0.0, 0.0, 0.45]) + 0.05 * torch.randn(count, 3, generator=g)
    offset = torch.tensor([0.6, 0.0, 0.0]) + 0.4 * torch.randn(count, 3, generator=g)
    roots = torch.stack([left, left + offset * HAND_SCALE], 1)
    intrinsics = torch.tensor([[330.0, 9.0, 120.0], [-4.0, 350.0, 131.0], [0.0, 0.01, 1.0]]).expand(count, 3, 3)
    uv = to_uv(project(joints + roots[:, :, None], intrinsics[:, None]))
    return joints, nearest_camera(joints, uv), offset, intrinsics, roots


@pytest.mark.parametrize('root_joint', [0, 9])
def test_true_hands_and_their_nearest_cameras_give_the_true_place(standin, root_joint):
    joints, camera, offset, intrinsics, roots = scene(standin, root_joint=root_joint)
    placement = place_hands(joints, camera, offset, intrinsics)
    distance, depth = placement_error(placement, roots)
    assert distance.max() < 1e-4  # m, where perspective alone moves joints by pixels
    assert (depth <= distance).all()
    assert placement.residual_px.min() > 1  # that is what weak perspective cannot say


def test_distance_grows_with_the_focal_length_that_is_assumed(standin):
    joints, camera, offset, intrinsics, _ = scene(standin)
    longer = torch.diag(torch.tensor([2.0, 2.0, 1.0])) @ intrinsics
    longer[:, :2, 2] = intrinsics[:, :2, 2]
    near, far = (place_hands(joints, camera, offset, k).roots[..., 2].mean() for k in (intrinsics, longer))
    assert 1.8 < far / near < 2.2


def test_an_error_of_the_camera_moves_the_hands_as_far_as_it_says(standin):
    joints, camera, offset, intrinsics, roots = scene(standin)
    moved = camera.clone()
    moved[..., 1] += 0.1  # both hands, to the right in the picture
    place = place_hands(joints, moved, offset, intrinsics).roots
    pixels = 0.1 * CROP_SIZE / 2
    expected = pixels * roots[..., 2].mean(1) / 330
    ratio = (place - roots)[..., 0].mean(1) / expected  # not quite 1: turned joints, a place off the axis
    assert abs(ratio.mean() - 1) < 0.05 and (ratio - 1).abs().max() < 0.3


@pytest.mark.parametrize('scale', [0.0, -3.0, 1e-8, 1e6])
def test_whatever_an_untrained_network_says_gives_a_place_before_the_camera(standin, scale):
    joints, camera, offset, intrinsics, _ = scene(standin)
    camera = torch.cat([torch.full_like(camera[..., :1], scale), 5 * camera[..., 1:]], -1)
    placement = place_hands(joints, camera, 100 * offset, intrinsics)
    assert placement.roots.isfinite().all() and placement.residual_px.isfinite().all()
    assert ((placement.roots[:, 0, 2] >= NEAREST * 0.999) & (placement.roots[:, 0, 2] <= FARTHEST)).all()


def test_hands_without_size_are_far_off_where_the_network_sees_them(standin):
    joints, _, offset, intrinsics, _ = scene(standin)
    seen = torch.tensor([[0.0, 0.3, -0.4], [0.0, 0.3, -0.4]]).expand(len(joints), 2, 3)
    roots = place_hands(joints, seen, offset, intrinsics).roots
    assert torch.allclose(roots[:, 0, 2], torch.tensor(FARTHEST))
    uv = to_uv(project(roots, intrinsics))
    assert (uv - seen[..., 1:]).abs().max() < 0.05


def test_no_hands_give_no_places():
    assert place_hands(
        torch.zeros(0, 2, 21, 3), torch.zeros(0, 2, 3), torch.zeros(0, 3), torch.zeros(0, 3, 3)
    ).roots.shape == (0, 2, 3)
