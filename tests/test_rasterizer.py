import sys
import types

import numpy as np
import pytest
import torch

from utils import rasterizer as render
from utils.errors import UserError
from utils.geometry import project
from utils.rasterizer import interpolate, nearest_at, rasterize, rasterize_pytorch3d, shade, smooth_normals

HEIGHT, WIDTH = 20, 26
CAMERA = torch.tensor([[30.0, 0.0, 13.0], [0.0, 28.0, 10.0], [0.0, 0.0, 1.0]])


def naive(vertices, faces, intrinsics, height, width):
    """One image, pixel by pixel in float64: intersect the pixel's ray with every triangle."""
    face = np.full((height, width), -1)
    depth = np.zeros((height, width))
    weights = np.zeros((height, width, 3))
    margin = np.full((height, width), np.inf)  # distance of the decision from a tie
    for row in range(height):
        for column in range(width):
            ray = np.linalg.solve(intrinsics, [column + 0.5, row + 0.5, 1.0])
            best = np.inf
            for number, corners in enumerate(vertices[faces]):
                if (corners[:, 2] <= 0).any():
                    continue
                solution = np.linalg.solve(corners.T, ray)
                barycentric = solution / solution.sum()
                z = 1 / solution.sum() * ray[2]
                margin[row, column] = min(margin[row, column], np.abs(barycentric).min())
                if (barycentric >= 0).all() and 0 < z < best:
                    best = z
                    face[row, column], depth[row, column], weights[row, column] = number, z, barycentric
    return face, depth, weights, margin


def soup(seed, count=14, batch=2):
    """Random triangles in front of the camera, some of them partly outside the image."""
    generator = torch.Generator().manual_seed(seed)
    vertices = torch.rand(batch, count * 3, 3, generator=generator)
    vertices = (vertices - torch.tensor([0.5, 0.5, 0.0])) * torch.tensor([1.0, 0.9, 0.8]) + torch.tensor([0, 0, 0.7])
    return vertices, torch.arange(count * 3).view(count, 3)


@pytest.mark.parametrize('seed', [0, 1])
def test_agrees_with_a_naive_oracle(seed):
    vertices, faces = soup(seed)
    turned = CAMERA @ torch.tensor([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]])  # not triangular
    intrinsics = torch.stack([CAMERA, turned])
    out = rasterize(vertices, faces, intrinsics, (HEIGHT, WIDTH))
    for image in range(2):
        face, depth, weights, margin = naive(
            vertices[image].double().numpy(), faces.numpy(), intrinsics[image].double().numpy(), HEIGHT, WIDTH
        )
        clear = margin > 1e-3  # corners are snapped to 1/4096 pixel
        assert clear.mean() > 0.9 and (face >= 0).mean() > 0.2
        np.testing.assert_array_equal(out.face[image].numpy()[clear], face[clear])
        np.testing.assert_allclose(out.depth[image].numpy()[clear], depth[clear], atol=2e-3)
        np.testing.assert_allclose(out.barycentric[image].numpy()[clear], weights[clear], atol=5e-3)


def test_the_surface_point_of_a_pixel_projects_onto_its_centre():
    vertices, faces = soup(3)
    intrinsics = CAMERA.expand(2, 3, 3)
    out = rasterize(vertices, faces, intrinsics, (HEIGHT, WIDTH))
    points = interpolate(out, faces, vertices)
    image, row, column = (out.face >= 0).nonzero().unbind(1)
    centres = torch.stack([column, row], 1) + 0.5
    torch.testing.assert_close(project(points[image, row, column], CAMERA), centres, atol=2e-3, rtol=0)
    torch.testing.assert_close(points[..., 2], out.depth, atol=1e-5, rtol=1e-5)
    assert not points[out.face < 0].any() and not out.barycentric[out.face < 0].any()


@pytest.mark.parametrize('seed', range(3))
def test_neither_shared_edges_nor_corners_on_pixel_centres_leave_holes(seed):
    # A sheet of small triangles with corners on, near and between pixel centres, shuffled, in both windings.
    generator = torch.Generator().manual_seed(seed)
    steps = torch.arange(-2, 34) * 0.75
    y, x = torch.meshgrid(steps, steps, indexing='ij')
    jitter = torch.randint(-2, 3, (2, *x.shape), generator=generator) / 8
    grid = torch.arange(x.numel()).view(x.shape)
    a, b, c, d = (part.flatten() for part in (grid[:-1, :-1], grid[:-1, 1:], grid[1:, 1:], grid[1:, :-1]))
    faces = torch.cat([torch.stack([a, b, c], 1), torch.stack([a, d, c], 1)])
    faces = faces[torch.randperm(len(faces), generator=generator)]
    z = 1 + torch.rand(x.shape, generator=generator)
    vertices = torch.stack([(x + jitter[0]) * z, (y + jitter[1]) * z, z], -1).flatten(0, 1)[None]
    out = rasterize(vertices, faces, torch.eye(3)[None], (22, 22))
    assert (out.face >= 0).all()
    torch.testing.assert_close(out.barycentric.sum(-1), torch.ones(1, 22, 22))


def test_interpolation_is_perspective_correct():
    # A floor that recedes from the camera: the texture coordinate must follow the ray, not the screen.
    vertices = torch.tensor([[[-1.0, 0.2, 0.5], [1.0, 0.2, 0.5], [0.0, 0.2, 40.0]]])
    faces = torch.tensor([[0, 1, 2]])
    out = rasterize(vertices, faces, CAMERA[None], (HEIGHT, WIDTH))
    z = interpolate(out, faces, vertices[0, :, 2:])[0, ..., 0]
    row, column = (out.face[0] >= 0).nonzero().unbind(1)
    assert len(row) > 50
    torch.testing.assert_close(z[row, column], 28 * 0.2 / (row + 0.5 - 10), rtol=2e-3, atol=0)


def test_the_nearer_surface_hides_the_other_in_any_order_of_faces():
    square = torch.tensor([[-1.0, -1.0, 1.0], [1.0, -1.0, 1.0], [1.0, 1.0, 1.0], [-1.0, 1.0, 1.0]])
    vertices = torch.cat([square, square + torch.tensor([0.0, 0.0, 1.0])])[None]
    near, far = torch.tensor([[0, 1, 2], [0, 2, 3]]), torch.tensor([[4, 5, 6], [4, 6, 7]])
    for faces, expected in ((torch.cat([near, far]), (0, 1)), (torch.cat([far, near]), (2, 3))):
        out = rasterize(vertices, faces, CAMERA[None], (HEIGHT, WIDTH))
        assert set(out.face.unique().tolist()) == set(expected)
        torch.testing.assert_close(out.depth, torch.ones_like(out.depth))


def test_at_equal_depth_the_lower_face_number_wins_deterministically():
    vertices, faces = soup(4)
    doubled = torch.cat([faces, faces.flip(1)])
    first = rasterize(vertices, doubled, CAMERA.expand(2, 3, 3), (HEIGHT, WIDTH))
    again = rasterize(vertices, doubled, CAMERA.expand(2, 3, 3), (HEIGHT, WIDTH))
    assert first.face.max() < len(faces)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize('pixels', [[0], [19], [0, 8, 16], [1, 2, 5, 6, 9, 10], [3, 4, 17], list(range(20)), []])
@pytest.mark.parametrize('scale', [0.2, 1.0, 40.0])
def test_chosen_pixels_are_those_of_the_whole_image(monkeypatch, pixels, scale):
    vertices, faces = soup(6, count=60)
    intrinsics = (torch.diag(torch.tensor([scale, scale, 1.0])) @ CAMERA).expand(2, 3, 3)
    whole = rasterize(vertices, faces, intrinsics, (20, 20))
    rows = torch.tensor(pixels, dtype=torch.int64)
    monkeypatch.setattr(render, 'PIXELS_AT_ONCE', 50)
    for values, expected in zip(rasterize(vertices, faces, intrinsics, (20, 20), pixels=rows), whole):
        assert torch.equal(values, expected[:, rows[:, None], rows])
    assert (whole.face >= 0).any()


@pytest.mark.parametrize('seed', range(3))
def test_single_pixels_are_those_of_the_whole_image(seed):
    vertices, faces = soup(seed)
    vertices[1, :7, 2] = torch.tensor([-1.0, 0.0, torch.nan, torch.inf, 1e-9, -torch.inf, -1e-9])  # of faces to drop
    intrinsics = CAMERA.expand(2, 3, 3)
    whole = rasterize(vertices, faces, intrinsics, (HEIGHT, WIDTH))
    row, column = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing='ij')
    everywhere = torch.stack([column, row], -1).flatten(0, 1).expand(2, -1, 2)
    face, depth = nearest_at(vertices, faces, intrinsics, everywhere)
    assert (face >= 0).float().mean() > 0.2
    assert torch.equal(face, whole.face.flatten(1))
    torch.testing.assert_close(depth, whole.depth.flatten(1), rtol=1e-6, atol=0)


def test_a_pixel_outside_the_image_is_searched_too_and_may_be_empty():
    vertices, faces = soup(0)
    intrinsics = CAMERA.expand(2, 3, 3)
    shifted = intrinsics.clone()
    shifted[:, 0, 2] += 50
    inside = torch.tensor([[WIDTH // 2, HEIGHT // 2]]).expand(2, 1, 2)
    expected = nearest_at(vertices, faces, intrinsics, inside)
    got = nearest_at(vertices, faces, shifted, inside + torch.tensor([50, 0]))
    assert torch.equal(got[0], expected[0]) and torch.allclose(got[1], expected[1])
    face, depth = nearest_at(vertices, faces, intrinsics, torch.full((2, 1, 2), 10_000))
    assert face.tolist() == [[-1], [-1]] and depth.tolist() == [[0], [0]]


def test_images_of_a_batch_are_independent_also_in_small_parts(monkeypatch):
    vertices, faces = soup(5, batch=3)
    intrinsics = CAMERA.expand(3, 3, 3)
    together = rasterize(vertices, faces, intrinsics, (HEIGHT, WIDTH))
    monkeypatch.setattr(render, 'PIXELS_AT_ONCE', 37)
    in_parts = rasterize(vertices, faces, intrinsics, (HEIGHT, WIDTH))
    alone = [rasterize(vertices[i : i + 1], faces, intrinsics[i : i + 1], (HEIGHT, WIDTH)) for i in range(3)]
    for name in render.Fragments._fields:
        assert torch.equal(getattr(together, name), getattr(in_parts, name))
        assert torch.equal(getattr(together, name), torch.cat([getattr(one, name) for one in alone]))


@pytest.mark.parametrize(
    'corners',
    [
        [[0.0, 0.0, 1.0], [1.0, 0.0, 1.0], [0.0, 1.0, -1.0]],  # one corner behind the camera
        [[0.0, 0.0, -1.0], [1.0, 0.0, -1.0], [0.0, 1.0, -1.0]],
        [[0.0, 0.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]],
        [[9.0, 0.0, 1.0], [10.0, 0.0, 1.0], [9.0, 1.0, 1.0]],  # outside the image
        [[0.0, 0.0, 1.0], [0.1, 0.1, 1.0], [0.2, 0.2, 1.0]],  # no area
        [[0.0, 0.0, 1.0], [float('nan'), 0.0, 1.0], [0.0, 1.0, 1.0]],
    ],
)
def test_invisible_faces_leave_the_background(corners):
    out = rasterize(torch.tensor([corners]), torch.tensor([[0, 1, 2]]), CAMERA[None], (HEIGHT, WIDTH))
    assert (out.face == -1).all() and not out.depth.any() and not out.barycentric.any()


def test_empty_batches_and_empty_meshes():
    vertices, faces = soup(6)
    out = rasterize(vertices[:0], faces, CAMERA.expand(0, 3, 3), (HEIGHT, WIDTH))
    assert out.face.shape == (0, HEIGHT, WIDTH) and out.barycentric.shape == (0, HEIGHT, WIDTH, 3)
    out = rasterize(vertices, faces[:0], CAMERA.expand(2, 3, 3), (HEIGHT, WIDTH))
    assert (out.face == -1).all() and interpolate(out, faces[:0], vertices).shape == (2, HEIGHT, WIDTH, 3)


def test_interpolation_is_differentiable_in_the_attributes():
    vertices, faces = soup(7)
    out = rasterize(vertices, faces, CAMERA.expand(2, 3, 3), (HEIGHT, WIDTH))
    attributes = torch.rand(vertices.shape[1], 4, requires_grad=True)
    interpolate(out, faces, attributes).sum().backward()
    torch.testing.assert_close(attributes.grad.sum(), 4.0 * (out.face >= 0).sum(), rtol=1e-5, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_cpu_and_cuda_agree():
    vertices, faces = soup(9)
    here = rasterize(vertices, faces, CAMERA.expand(2, 3, 3), (HEIGHT, WIDTH))
    there = rasterize(vertices.cuda(), faces.cuda(), CAMERA.expand(2, 3, 3).cuda(), (HEIGHT, WIDTH))
    assert (here.face == there.face.cpu()).float().mean() > 0.995
    same = here.face == there.face.cpu()
    torch.testing.assert_close(here.depth[same], there.depth.cpu()[same], atol=1e-5, rtol=1e-5)


def octahedron(distance):
    corners = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])
    faces = torch.tensor([[0, 2, 4], [2, 1, 4], [1, 3, 4], [3, 0, 4], [2, 0, 5], [1, 2, 5], [3, 1, 5], [0, 3, 5]])
    return (0.3 * corners + torch.tensor([0.0, 0.0, distance]))[None], faces


def test_smooth_normals_of_a_symmetric_solid_point_away_from_its_centre():
    vertices, faces = octahedron(2.0)
    outwards = (vertices - vertices.mean(1, keepdim=True)) / 0.3
    torch.testing.assert_close(smooth_normals(vertices, faces), outwards)


def test_shading_is_brightest_where_the_surface_faces_the_camera_and_never_exceeds_the_colour():
    vertices, faces = octahedron(2.0)
    camera = torch.tensor([[60.0, 0, 16], [0, 60.0, 16], [0, 0, 1]])[None]
    out = rasterize(vertices, faces, camera, (33, 33))
    picture = shade(out, vertices, faces, torch.ones(6, 3))[0, ..., 0]
    # Lit at its six corners, of which one faces the camera.
    assert 0.9 < picture.max() <= 1 + 1e-6 and picture[15:18, 15:18].max() == picture.max()
    seen = out.face[0] >= 0
    assert picture[seen].min() >= render.AMBIENT and picture[seen].min() < 0.8 and not picture[~seen].any()


def test_a_missing_pytorch3d_is_reported_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pytorch3d', None)
    vertices, faces = soup(0)
    with pytest.raises(UserError, match='pytorch3d is not installed'):
        rasterize_pytorch3d(vertices, faces, CAMERA.expand(2, 3, 3), (HEIGHT, WIDTH))


def test_the_pytorch3d_path_uses_its_documented_screen_space_and_packed_faces(monkeypatch):
    # A stub of the documented behaviour: x left, y up, the shorter side [-1, 1], faces numbered through the batch.
    def rasterize_meshes(mesh, image_size, **_):
        vertices, faces = mesh
        height, width = image_size
        pixels = (torch.tensor([width, height]) - vertices[..., :2] * min(image_size)) / 2
        points = torch.cat([pixels, torch.ones_like(pixels[..., :1])], -1) * vertices[..., 2:]
        out = rasterize(points, faces[0], torch.eye(3).expand(len(points), 3, 3), image_size)
        packed = out.face + len(faces[0]) * torch.arange(len(points))[:, None, None]
        nothing = out.face < 0
        return (
            packed.masked_fill(nothing, -1)[..., None],
            out.depth.masked_fill(nothing, -1.0)[..., None],
            out.barycentric.masked_fill(nothing[..., None], -1.0)[..., None, :],
            None,
        )

    for name, content in {
        'pytorch3d': {},
        'pytorch3d.renderer': {},
        'pytorch3d.renderer.mesh': {},
        'pytorch3d.renderer.mesh.rasterize_meshes': {'rasterize_meshes': rasterize_meshes},
        'pytorch3d.structures': {'Meshes': lambda *arrays: arrays},
    }.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    vertices, faces = soup(8)
    ours = rasterize(vertices, faces, CAMERA.expand(2, 3, 3), (HEIGHT, WIDTH))
    theirs = rasterize_pytorch3d(vertices, faces, CAMERA.expand(2, 3, 3), (HEIGHT, WIDTH))
    assert (ours.face == theirs.face).float().mean() > 0.995
    same = ours.face == theirs.face
    torch.testing.assert_close(ours.depth[same], theirs.depth[same], atol=1e-3, rtol=0)
