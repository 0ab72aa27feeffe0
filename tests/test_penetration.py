"""Penetration depth against loops in NumPy over every vertex and every face."""

import numpy as np
import pytest
import torch

from dataset.synthetic.poses import sample_path
from evaluation.penetration import (
    ON_EDGE,
    PenetrationDepth,
    close_surface,
    cross_faces,
    solid_angle,
    surface_distance,
    triangle_distance,
    winding_number,
    within_slabs,
)
from manopth import TwoHandLayer
from manopth.rotations import axis_angle_to_matrix
from utils.hand import LEFT, RIGHT

TOLERANCE = {'rtol': 0, 'atol': 1e-12}  # m
INTO = {'clasp': 0.002, 'crossedfingers': -0.005, 'holdfist': 0.015, 'stacked': 0.05}  # m


@pytest.fixture(scope='module')
def penetration(standin) -> PenetrationDepth:
    return PenetrationDepth(standin)


@pytest.fixture(scope='module')
def closed(standin) -> list[np.ndarray]:
    return [close_surface(model.faces) for model in standin]


@pytest.fixture(scope='module')
def layer(standin) -> TwoHandLayer:
    return TwoHandLayer(standin)


def random_hands(layer, count: int, *, seed: int, spread: float = 0.03) -> torch.Tensor:
    """Both hands in any pose and turn, mostly through each other (count, 2, 778, 3); fingers overlap as well."""
    g = torch.Generator().manual_seed(seed)
    root, pose, betas, move = (torch.randn(count, 2, size, generator=g) for size in (3, 45, 10, 3))
    vertices = layer(2 * root, layer.pose_mean + 0.4 * pose, betas, use_pca=False).vertices.double()
    return vertices - vertices.mean(2, keepdim=True) + spread * move[:, :, None].double()


@pytest.fixture(scope='module')
def scenes(standin) -> torch.Tensor:
    """Natural placements, the right hand moved into the left one by INTO (4, 2, 778, 3) float64, as from a camera."""
    rng = np.random.default_rng(3)
    paths = [sample_path(1, name, rng, standin, torch.zeros(2, 10), varied=False) for name in INTO]
    hands = torch.cat([path.vertices for path in paths]).double()
    way = (hands[:, LEFT] - hands[:, RIGHT]).mean(1)
    way = way / way.norm(dim=1, keepdim=True) * torch.tensor(list(INTO.values())).double()[:, None]
    hands[:, RIGHT] += way[:, None]
    return hands + torch.tensor([0.05, -0.03, 0.8])


def naive_winding(points: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Solid angles of all faces (F, 3, 3) at points (P, 3), summed over 4 pi."""
    numbers = []
    for point in points:
        a, b, c = (triangles - point).transpose(1, 2, 0)
        la, lb, lc = (np.sqrt((x * x).sum(0)) for x in (a, b, c))
        top = sum(a[k] * (b[k - 2] * c[k - 1] - b[k - 1] * c[k - 2]) for k in range(3))
        bottom = la * lb * lc + (a * b).sum(0) * lc + (b * c).sum(0) * la + (c * a).sum(0) * lb
        numbers.append(np.arctan2(top, bottom).sum() / (2 * np.pi))
    return np.array(numbers)


def naive_distance(point: np.ndarray, triangles: np.ndarray) -> float:
    """To the nearest of triangles (F, 3, 3): over the face by barycentric coordinates, else to the three segments."""
    a, u, v = triangles[:, 0], triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    gram = np.stack([np.stack([(u * u).sum(1), (u * v).sum(1)], 1), np.stack([(u * v).sum(1), (v * v).sum(1)], 1)], 1)
    right = np.stack([((point - a) * u).sum(1), ((point - a) * v).sum(1)], 1)
    s, t = np.linalg.solve(gram, right[..., None])[..., 0].T
    within = (s >= 0) & (t >= 0) & (s + t <= 1)
    candidates = [np.linalg.norm(a + s[:, None] * u + t[:, None] * v - point, axis=1)[within]]
    for k in range(3):
        start, way = triangles[:, k], triangles[:, (k + 1) % 3] - triangles[:, k]
        share = (((point - start) * way).sum(1) / (way * way).sum(1)).clip(0, 1)
        candidates.append(np.linalg.norm(start + share[:, None] * way - point, axis=1))
    return np.concatenate(candidates).min()


def naive_depth(hands: np.ndarray, closed: list[np.ndarray]) -> tuple[float, int]:
    """hands (2, 778, 3) -> depth m, number of vertices inside the other hand."""
    depths = [0.0]
    for own, other in ((LEFT, RIGHT), (RIGHT, LEFT)):
        triangles = hands[other][closed[other]]
        inside = hands[own][naive_winding(hands[own], triangles) > 0.5]
        depths += [naive_distance(point, triangles) for point in inside]
    return max(depths), len(depths) - 1


@pytest.mark.parametrize('hand', [LEFT, RIGHT])
def test_closed_hands_are_closed(standin, closed, hand):
    faces, model = closed[hand], standin[hand]
    np.testing.assert_array_equal(faces[: len(model.faces)], model.faces)
    assert len(faces) == 2 * len(model.template) - 4, 'Euler: a sphere'
    edges = [(a, b) for face in faces.tolist() for a, b in zip(face, face[1:] + face[:1])]
    assert len(set(edges)) == len(edges) and set(edges) == {(b, a) for a, b in edges}
    volume = np.linalg.det(model.template[faces]).sum() / 6
    assert 1e-4 < volume < 1e-3, 'outward, and about a third of a litre'


def test_any_hole_is_closed():
    cube = np.array(
        [
            [0, 2, 1],
            [0, 3, 2],
            [4, 5, 6],
            [4, 6, 7],
            [0, 1, 5],
            [0, 5, 4],
            [1, 2, 6],
            [1, 6, 5],
            [2, 3, 7],
            [2, 7, 6],
            [3, 0, 4],
            [3, 4, 7],
        ]
    )
    corners = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1.0]])
    for lost in ([0, 1], [4, 5], [7]):
        faces = close_surface(np.delete(cube, lost, 0))
        assert len(faces) == 12 and np.isclose(np.linalg.det(corners[faces]).sum() / 6, 1)


def test_no_array_of_the_hands_enters_a_checkpoint(penetration):
    assert not penetration.state_dict() and len(list(penetration.buffers())) == 1


def test_depth_equals_loops_in_numpy(penetration, closed, scenes):
    expected, inside = zip(*(naive_depth(hands.numpy(), closed) for hands in scenes))
    np.testing.assert_allclose(penetration(scenes).numpy(), expected, rtol=0, atol=1e-10)
    within = within_slabs(scenes.flip(1).flatten(0, 1), scenes.flatten(0, 1)).view(len(scenes), -1).sum(1)
    assert min(inside) == 0 and within[np.argmin(inside)] > 20, 'fingers between fingers'
    assert max(inside) > 100 and sum(0 < depth < 0.003 for depth in expected), 'barely and deeply'


def test_no_pruning_changes_an_answer(layer, closed):
    """Winding number and distance of points in, at and round a hand as from all its faces, whatever is skipped."""
    g = torch.Generator().manual_seed(0)
    numbers = []
    for hands in random_hands(layer, 20, seed=1):
        for own, other in ((LEFT, RIGHT), (RIGHT, LEFT)):
            near = hands[own][within_slabs(hands[own][None], hands[other][None])[0]]
            ends = hands[other][torch.randint(778, (2, 30), generator=g)]
            points = torch.cat([hands[own][::50], near[:: 1 + len(near) // 20], ends.mean(0)])
            surface = hands[other][torch.from_numpy(closed[other])].permute(2, 1, 0)[:, :, None]  # (3, 3, 1, F)
            row, columns = torch.zeros(len(points), dtype=torch.long), points.T.contiguous()
            number = solid_angle(columns[:, :, None], surface).sum(1) / (4 * torch.pi)
            torch.testing.assert_close(winding_number(columns, surface, row), number, rtol=0, atol=1e-9)
            assert within_slabs(points[None], hands[other][None])[0, number > 0.5].all()
            inside = number > 0.5
            distance = triangle_distance(columns[:, inside, None], surface).amin(1)
            torch.testing.assert_close(
                surface_distance(columns[:, inside], surface, row[inside]), distance, **TOLERANCE
            )
            numbers.append(number.round())
    values, counts = torch.cat(numbers).unique(return_counts=True)
    counts = dict(zip(values.tolist(), counts.tolist()))
    assert counts[0] > 300 and counts[1] > 300 and counts[2] > 5, 'also where a hand overlaps itself'


def test_a_ray_through_vertices_and_edges_is_not_relied_on(layer, closed):
    hand = random_hands(layer, 1, seed=2)[0, RIGHT]
    surface = hand[torch.from_numpy(closed[RIGHT])].permute(2, 1, 0)[:, :, None]
    edges = surface[:, :2, 0, ::16].mean(1)
    through = torch.cat([hand[::8].T, edges, edges + torch.tensor([[0.1 * ON_EDGE], [0], [0]])], 1)
    points = through - torch.tensor([0, 0, 0.004])[:, None]
    near_edge = cross_faces(points[:, :, None], surface.expand(-1, -1, points.shape[1], -1))[1]
    assert near_edge.any(1).all()
    expected = solid_angle(points[:, :, None], surface).sum(1) / (4 * torch.pi)
    number = winding_number(points, surface, torch.zeros(points.shape[1], dtype=torch.long))
    torch.testing.assert_close(number, expected, rtol=0, atol=1e-9)
    assert (expected > 0.5).sum() > 20 and (expected < 0.5).sum() > 20


def test_distance_to_a_triangle_in_every_region_and_without_area():
    g = torch.Generator().manual_seed(0)
    corners, points = torch.randn(3, 3, 300, generator=g).double(), 2 * torch.randn(3, 300, generator=g).double()
    points[:, :60] = corners[:, :, :60].mean(1) + 0.3 * torch.randn(3, 60, generator=g)
    expected = [naive_distance(p.numpy(), c.T[None].numpy()) for p, c in zip(points.T, corners.unbind(2))]
    np.testing.assert_allclose(triangle_distance(points, corners).numpy(), expected, atol=1e-9)
    corners[:, 2] = 0.3 * corners[:, 0] + 0.7 * corners[:, 1]  # a segment
    way = corners[:, 1] - corners[:, 0]
    share = (((points - corners[:, 0]) * way).sum(0) / way.square().sum(0)).clamp(0, 1)
    torch.testing.assert_close(triangle_distance(points, corners), (corners[:, 0] + share * way - points).norm(dim=0))
    torch.testing.assert_close(
        triangle_distance(points, corners[:, :1].expand(-1, 3, -1)), (corners[:, 0] - points).norm(dim=0)
    )


@pytest.mark.parametrize('mirrored', [False, True])
@pytest.mark.parametrize('depth', [2e-4, 6e-4])
def test_a_fingertip_pushed_through_a_face_by_a_known_depth(penetration, standin, mirrored, depth):
    left, right = (torch.tensor(model.template) for model in standin)
    tip = right[:, 0].argmin()  # the right fingers point along -x
    faces = torch.tensor(standin[LEFT].faces)
    normals = torch.linalg.cross(left[faces[:, 1]] - left[faces[:, 0]], left[faces[:, 2]] - left[faces[:, 0]])
    centres = left[faces].mean(1)
    normals = normals / normals.norm(dim=1, keepdim=True)
    # A face in the middle of the palm, which looks down -y.
    at = (centres - left.mean(0)).norm(dim=1).where(normals[:, 1] < -0.9, torch.inf).argmin()
    normal = normals[at]
    # Turn -x of the right hand against the normal.
    other = torch.linalg.cross(normal, torch.tensor([0.0, 0, 1]).double())
    turn = torch.stack([normal, other / other.norm(), torch.linalg.cross(normal, other / other.norm())], 1)
    right = (right - right[tip]) @ turn.T + centres[at] - depth * normal
    hands = torch.stack([left, right])[None]
    if mirrored:
        hands = hands.flip(1) * torch.tensor([-1.0, 1, 1])
    torch.testing.assert_close(penetration(hands), torch.tensor([depth]).double(), rtol=0, atol=1e-9)
    out = (depth + 1e-5) * normal * (torch.tensor([-1.0, 1, 1]) if mirrored else 1)
    hands[:, LEFT if mirrored else RIGHT] += out
    assert penetration(hands) == 0


def test_hands_apart_have_no_depth(penetration, scenes):
    scenes = scenes.clone()
    scenes[:, RIGHT] += torch.tensor([0.4, 0, 0])
    assert not penetration(scenes).any()


def test_one_hand_within_itself_touches_but_has_no_depth(penetration, standin):
    """The same mesh twice: every vertex lies on the other's surface."""
    model = standin[RIGHT]
    both = PenetrationDepth((model, model))(torch.tensor(model.template).expand(1, 2, -1, -1))
    torch.testing.assert_close(both, torch.zeros(1).double(), **TOLERANCE)


def test_mirrored_and_renamed_hands_are_as_deep(penetration, layer):
    hands = random_hands(layer, 12, seed=4)
    depth = penetration(hands)
    assert (depth > 0.004).sum() > 6
    torch.testing.assert_close(penetration(hands.flip(1) * torch.tensor([-1.0, 1, 1])), depth, **TOLERANCE)


def test_a_motion_of_the_scene_changes_nothing(penetration, layer):
    hands = random_hands(layer, 12, seed=5)
    depth = penetration(hands)
    turn = axis_angle_to_matrix(torch.randn(12, 1, 3, generator=torch.Generator().manual_seed(0)).double())
    moved = hands @ turn + torch.tensor([0.2, -0.1, 0.9])
    torch.testing.assert_close(penetration(moved), depth, **TOLERANCE)
    torch.testing.assert_close(penetration(2 * moved), 2 * depth, **TOLERANCE)


def test_batches_may_be_split_and_be_empty(penetration, layer):
    hands = random_hands(layer, 9, seed=6)
    depth = penetration(hands)
    torch.testing.assert_close(torch.cat([penetration(part) for part in hands.split(2)]), depth, **TOLERANCE)
    single = penetration(hands.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), depth, rtol=0, atol=1e-6)
    for dtype in (torch.float32, torch.float64):
        empty = penetration(hands[:0].to(dtype))
        assert empty.shape == (0,) and empty.dtype == dtype


def test_hands_that_are_not_finite_have_no_number(penetration, layer):
    hands = random_hands(layer, 3, seed=7)
    depth = penetration(hands)
    hands[0, 1, 5, 2], hands[2, 0, 7, 0] = torch.nan, -torch.inf
    broken = penetration(hands)
    assert broken[[0, 2]].isnan().all()
    torch.testing.assert_close(broken[1], depth[1], **TOLERANCE)
    assert penetration(torch.zeros(1, 2, 778, 3)) == 0, 'collapsed to a point'


def test_no_gradient_is_kept(penetration, scenes):
    assert not penetration(scenes[:1].clone().requires_grad_()).requires_grad
