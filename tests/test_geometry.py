import math

import cv2
import numpy as np
import pytest
import torch
from test_batch import MOVES

from manopth.rotations import axis_angle_to_matrix
from utils.geometry import (
    from_uv,
    mirror_image_matrix,
    project,
    rotation_z,
    similarity_about_centre,
    to_uv,
    warp,
    world_to_camera,
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def map_pixels(image_map, pixels):
    """Affine map (3, 3) on pixels (N, 2)."""
    return pixels @ image_map[:2, :2].T + image_map[:2, 2]


def test_projection_matches_opencv():
    points = normal(50, 3) * 0.1 + torch.tensor([0, 0, 1.0])
    intrinsics = torch.tensor([[480.0, 0, 130], [0, 490, 120], [0, 0, 1]], dtype=torch.float64)
    expected, _ = cv2.projectPoints(points.numpy(), np.zeros(3), np.zeros(3), intrinsics.numpy(), None)
    np.testing.assert_allclose(project(points, intrinsics), expected[:, 0], atol=1e-9)


def test_projection_accepts_any_intrinsics_and_leading_axes():
    points, intrinsics = normal(2, 3, 5, 3) + torch.tensor([0, 0, 8.0]), normal(2, 3, 3, 3, seed=1)
    intrinsics[..., 2, 2] += 9
    pixels = project(points, intrinsics)
    assert pixels.shape == (2, 3, 5, 2)
    for b, h, n in np.ndindex(2, 3, 5):
        image = intrinsics[b, h] @ points[b, h, n]
        torch.testing.assert_close(pixels[b, h, n], image[:2] / image[2])
    assert project(points[:0], intrinsics[:0]).shape == (0, 3, 5, 2)


@pytest.mark.parametrize('size', [256, 128])
def test_uv_round_trip(size):
    pixels = torch.tensor([[0.0, 0.0], [size, size], [size / 2, 3.25]])
    uv = to_uv(pixels, size)
    torch.testing.assert_close(uv[:2], torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    torch.testing.assert_close(from_uv(uv, size), pixels)


def test_uv_refers_to_the_256_crop_by_default():
    assert to_uv(torch.tensor(64.0)) == -0.5 and from_uv(torch.tensor(-0.5)) == 64


@pytest.mark.parametrize('shape', [(), (5,), (2, 7)])
def test_world_to_camera(shape):
    rotation, translation = axis_angle_to_matrix(normal(4, 3)), normal(4, 3, seed=1)
    points = normal(4, *shape, 3, seed=2)
    there = world_to_camera(points, rotation, translation)
    assert there.shape == points.shape
    for index in np.ndindex(4, *shape):
        torch.testing.assert_close(there[index], rotation[index[0]] @ points[index] + translation[index[0]])
    back = world_to_camera(there, rotation.mT, -(rotation.mT @ translation[..., None]).squeeze(-1))
    torch.testing.assert_close(back, points)


def test_rotation_z_rotates_right_to_down():
    down = rotation_z(torch.tensor(math.pi / 2, dtype=torch.float64)) @ torch.tensor([1.0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(down, torch.tensor([0.0, 1, 0], dtype=torch.float64))
    angles = normal(2, 3)
    about_z = torch.stack([torch.zeros_like(angles), torch.zeros_like(angles), angles], -1)
    torch.testing.assert_close(rotation_z(angles), axis_angle_to_matrix(about_z))


@pytest.mark.parametrize('size', [256, 100])
def test_similarity_matches_opencv_about_the_centre(size):
    scale, angle, shift = normal(4).exp(), normal(4, seed=1), 20 * normal(4, 2, seed=2)
    maps = similarity_about_centre(scale, angle, shift, size)
    for i in range(4):
        expected = cv2.getRotationMatrix2D((size / 2, size / 2), -math.degrees(angle[i]), scale[i].item())
        expected[:, 2] += shift[i].numpy()
        np.testing.assert_allclose(maps[i], np.vstack([expected, [0, 0, 1]]), atol=1e-9)
    centre = torch.tensor([[size / 2, size / 2]], dtype=torch.float64)
    torch.testing.assert_close(map_pixels(maps[0], centre), centre + shift[0])


def test_similarity_of_no_change_is_exactly_the_identity():
    still = similarity_about_centre(torch.ones(2), torch.zeros(2), torch.zeros(2, 2))
    assert torch.equal(still, torch.eye(3).expand(2, 3, 3))


@pytest.mark.parametrize('size', [256, 10])
def test_mirror_maps_pixel_centres_to_pixel_centres(size):
    mirror = mirror_image_matrix(size)
    assert torch.equal(mirror @ mirror, torch.eye(3))
    row = torch.arange(float(size))
    pixels = torch.stack([row, torch.full_like(row, 3)], -1)
    assert torch.equal(map_pixels(mirror, pixels), pixels.flip(0))


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('mirrored', [False, True])
def test_rotating_hands_and_intrinsics_moves_the_pixels_by_the_image_map(seed, mirrored):
    """X' = R_z M X with K' = A K (R_z M)^-1 projects to A applied to the old pixels, exactly."""
    points = 0.1 * normal(30, 3, seed=seed) + torch.tensor([0.02, -0.03, 0.8])
    intrinsics = torch.tensor([[400.0, 3, 120], [0, 410, 130], [0, 0, 1]], dtype=torch.float64)
    scale, angle, shift = normal(seed=seed).exp(), 3 * normal(seed=seed + 10), 20 * normal(2, seed=seed + 20)
    image_map, turn = similarity_about_centre(scale, angle, shift), rotation_z(angle)
    if mirrored:
        image_map = image_map @ mirror_image_matrix().double()
        turn = turn @ torch.diag(torch.tensor([-1.0, 1, 1], dtype=torch.float64))
    pixels = project(points @ turn.mT, image_map @ intrinsics @ torch.linalg.inv(turn))
    torch.testing.assert_close(pixels, map_pixels(image_map, project(points, intrinsics)), atol=1e-9, rtol=0)


@pytest.mark.parametrize('size', [256, 96, 512])
def test_chosen_pixels_of_a_warp_are_those_of_the_whole(size):
    images = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    image_map = similarity_about_centre(torch.tensor([0.9, 1.1]), torch.tensor([0.3, -2.0]), torch.ones(2, 2))
    pixels = torch.tensor([0, 3, 4, 50, size - 1])
    whole, chosen = warp(images, image_map, size=size), warp(images, image_map, size=size, pixels=pixels)
    assert torch.equal(chosen, whole[:, :, pixels[:, None], pixels])


MOVE = {'flip': False, 'scale': 1.0, 'angle': 0.0, 'shift': (0.0, 0.0)}


@pytest.mark.parametrize('size', [256, 128, 64])
@pytest.mark.parametrize('move', MOVES)
def test_warp_matches_opencv(move, size):
    flip, scale, angle, shift = (move.get(name, default) for name, default in MOVE.items())
    image_map = similarity_about_centre(*(torch.tensor(value, dtype=torch.float64) for value in (scale, angle, shift)))
    if flip:
        image_map = image_map @ mirror_image_matrix().double()
    random = np.random.default_rng(0)
    image = cv2.GaussianBlur(random.uniform(0, 255, (256, 256)).astype(np.float32), (0, 0), 6)
    fewer = np.diag([size / 256, size / 256, 1])
    fewer[:2, 2] = 0.5 * size / 256 - 0.5
    expected = cv2.warpAffine(image, (fewer @ image_map.numpy())[:2], (size, size), flags=cv2.INTER_LINEAR)
    warped = warp(torch.from_numpy(image)[None, None], image_map.float()[None], size=size)[0, 0].numpy()
    # OpenCV rounds positions to 1/32 pixel, which shows at the edge of the image, where black meets grey.
    inside = (
        cv2.erode((expected > 0).astype(np.uint8), np.ones((5, 5)), borderType=cv2.BORDER_CONSTANT, borderValue=0) > 0
    )
    assert inside.mean() > 0.5
    np.testing.assert_allclose(warped[inside], expected[inside], atol=0.5)
    np.testing.assert_allclose(warped[~inside], expected[~inside], atol=10)
