"""Penetration depth of two hand meshes: exact, and cheap enough for every batch of an evaluation.

Coordinates come first and faces or points last, which vectorises best: points (3, P), and surfaces (3 coordinates,
3 corners, N, F), N closed meshes of F faces. ``row`` (P,) is the surface that each point is measured against.
"""

import itertools
import math

import numpy as np
import torch
from torch import Tensor, nn

from manopth import HandPair
from manopth.rotations import axis_angle_to_matrix
from utils.hand import NUM_VERTICES

# rad. Related hands share coordinates to the bit, so rays along the camera axes would meet edges: rotate both first.
SKEW = (0.61, -0.37, 0.23)
SLABS = [normal for normal in itertools.product((-1, 0, 1), repeat=3) if normal > (0, 0, 0)]  # 13: one of each pair +-
ON_EDGE = 1e-9  # m: a ray this close to an edge is not trusted
# Points tested at once, each against all faces of a hand: 1.6 MB per tensor fits into a CPU's cache.
POINTS_AT_ONCE = {'cpu': 128, 'cuda': 8192}


class PenetrationDepth(nn.Module):
    """Penetration depth between both hands.

    The open wrists are closed with flat faces, so that each hand bounds a volume. Where a hand overlaps itself, as a
    fist may, it is one volume with all of its skin as its surface.
    """

    corners: Tensor

    def __init__(self, hand_models: HandPair):
        super().__init__()
        faces = np.stack([close_surface(model.faces) + hand * NUM_VERTICES for hand, model in enumerate(hand_models)])
        self.register_buffer('corners', torch.from_numpy(faces).permute(2, 0, 1).contiguous(), persistent=False)

    @torch.no_grad()
    def forward(self, vertices: Tensor) -> Tensor:
        """vertices (B, 2, 778, 3) m, both hands in one frame, any axes -> (B,) m.

        The largest distance to the surface of a hand among the vertices of the other hand that lie inside it; 0 where
        there is none, NaN where a vertex is not finite. Not differentiable.
        """
        finite = vertices.isfinite().flatten(1).all(1)
        hands = torch.where(finite[:, None, None, None], vertices, 0).double()
        hands = (hands - hands.mean((1, 2), keepdim=True)) @ axis_angle_to_matrix(hands.new_tensor(SKEW))
        # Row 2 b + h: hand h of sample b is the surface, the vertices of its other hand are the points.
        first = torch.arange(len(hands), device=hands.device)[:, None, None] * 2 * NUM_VERTICES
        corners = (self.corners[:, None] + first).flatten(1, 2)
        surfaces = hands.flatten(0, 2).T.index_select(1, corners.flatten()).unflatten(1, corners.shape)
        hull, points = hands.flatten(0, 1), hands.flip(1).flatten(0, 1)
        row, vertex = within_slabs(points, hull).nonzero().unbind(1)
        points = points[row, vertex].T.contiguous()

        inside = (winding_number(points, surfaces, row) > 0.5).nonzero().squeeze(1)
        points, row = points.index_select(1, inside), row.index_select(0, inside)
        depth = hands.new_zeros(len(hands)).scatter_reduce(0, row // 2, surface_distance(points, surfaces, row), 'amax')
        return torch.where(finite, depth, torch.nan).to(vertices.dtype)


def close_surface(faces: np.ndarray) -> np.ndarray:
    """Faces (F, 3) of a mesh with one hole -> (F + n - 2, 3): a fan over the n vertices of the hole's rim closes it."""
    edges = np.stack([faces, np.roll(faces, -1, 1)], -1).reshape(-1, 2)
    code, reverse = (pairs @ [faces.max() + 1, 1] for pairs in (edges, edges[:, ::-1]))
    rim = edges[~np.isin(code, reverse)]  # edges without a face on the other side
    apex = rim.min()
    start, end = rim[(rim != apex).all(1)].T
    return np.concatenate([faces, np.stack([np.full_like(start, apex), end, start], 1)])


def within_slabs(points: Tensor, hull: Tensor) -> Tensor:
    """points (N, P, 3), hull (N, V, 3) -> (N, P): False where one of 26 planes has the point on one side and the hull
    on the other, so that it cannot be inside."""
    normals = points.new_tensor(SLABS).T
    points, hull = points @ normals, hull @ normals
    return ((points > hull.amin(1, keepdim=True)) & (points < hull.amax(1, keepdim=True))).all(-1)


def winding_number(points: Tensor, surfaces: Tensor, row: Tensor) -> Tensor:
    """Winding number of each point's surface around it, (P,): 0 outside, 1 inside, more where it overlaps itself.

    It is the sum of the faces' solid angles over 4 pi, and on a closed surface also the number of faces through which a
    ray from the point leaves less those through which it enters. Rays along z are counted: few faces lie over a point,
    and counting does not round. Where a ray passes an edge so closely that rounding might choose the face, the solid
    angles are summed.
    """
    low, high = surfaces[:2].amin(1), surfaces[:2].amax(1)  # (2 axes, N, F)
    number, unsure = points.new_zeros(len(row)), torch.zeros_like(row)
    for part in _parts(torch.arange(len(row), device=row.device)):
        x, y, _ = points[:, part, None]
        (x_low, y_low), (x_high, y_high) = (bounds.index_select(1, row[part]) for bounds in (low, high))
        under = (x >= x_low) & (x <= x_high) & (y >= y_low) & (y <= y_high)
        point, corners = _pairs(under, part, surfaces, row)
        crossing, near_edge = cross_faces(points.index_select(1, point), corners)
        number.index_add_(0, point, crossing)
        unsure.index_add_(0, point, near_edge.long())
    for part in _parts(unsure.nonzero().squeeze(1)):
        angles = solid_angle(points[:, part, None], surfaces.index_select(2, row[part]))
        number[part] = angles.sum(1) / (4 * math.pi)
    return number


def cross_faces(points: Tensor, corners: Tensor) -> tuple[Tensor, Tensor]:
    """Rays from points (3, ...) along +z against faces (3 coordinates, 3 corners, ...).

    -> 1 where the ray leaves through the face, -1 where it enters, 0 where it misses (...); whether it passes too close
    to an edge to decide, bool (...).
    """
    x, y, z = corners - points[:, None]
    x_next, y_next = x.roll(-1, 0), y.roll(-1, 0)
    areas = x * y_next - x_next * y  # spanned by the point and each edge: all of one sign where the ray's line meets
    side = areas.sum(0).sign()
    within, margin = side * areas, ON_EDGE * torch.hypot(x_next - x, y_next - y)
    meets = (within > margin).all(0)
    near_edge = (within >= -margin).all(0) & ~meets
    above = (within * z.roll(1, 0)).sum(0) > 0  # an edge's area weights the opposite corner
    return torch.where(meets & above, side, 0), near_edge


def solid_angle(points: Tensor, corners: Tensor) -> Tensor:
    """Solid angles (...) sr of faces (3 coordinates, 3 corners, ...) seen from points (3, ...), > 0 from behind.

    Van Oosterom and Strackee, The Solid Angle of a Plane Triangle, IEEE Trans. Biomed. Eng. 30 (1983), eq. 8.
    """
    a, b, c = (corners - points[:, None]).unbind(1)
    la, lb, lc = _length(a), _length(b), _length(c)
    triple = (a * torch.linalg.cross(b, c, dim=0)).sum(0)
    return 2 * torch.atan2(triple, la * lb * lc + (a * b).sum(0) * lc + (b * c).sum(0) * la + (c * a).sum(0) * lb)


def surface_distance(points: Tensor, surfaces: Tensor, row: Tensor) -> Tensor:
    """Distance (P,) from each point to its surface."""
    centres = surfaces.mean(1)
    radii = _length(surfaces - centres[:, None]).amax(0)
    distance = points.new_full((len(row),), torch.inf)
    for part in _parts(torch.arange(len(row), device=row.device)):
        to_centre = _length(centres.index_select(1, row[part]) - points[:, part, None])
        # Centres are on the surface: faces whose bounding sphere is farther away than the nearest centre are out.
        near = to_centre - radii.index_select(0, row[part]) <= to_centre.amin(1, keepdim=True)
        point, corners = _pairs(near, part, surfaces, row)
        distance.scatter_reduce_(0, point, triangle_distance(points.index_select(1, point), corners), 'amin')
    return distance


def triangle_distance(points: Tensor, corners: Tensor) -> Tensor:
    """Distances (...) from points (3, ...) to triangles (3 coordinates, 3 corners, ...), degenerate ones included.

    To the plane where the point lies over the triangle, to the nearest edge elsewhere (Ericson, Real-Time Collision
    Detection, 2005, 5.1.5 and 5.1.2).
    """
    edges, offset = corners.roll(-1, 1) - corners, points[:, None] - corners
    share = (offset * edges).sum(0) / edges.square().sum(0).clamp_min(torch.finfo(points.dtype).tiny)
    to_edge = _length(offset - share.clamp(0, 1) * edges).amin(0)
    normal = torch.linalg.cross(edges[:, 0], edges[:, 1], dim=0)
    over = ((torch.linalg.cross(normal[:, None], edges, dim=0) * offset).sum(0) > 0).all(0)
    to_plane = (offset[:, 0] * normal).sum(0).abs() / _length(normal)
    return torch.where(over, to_plane, to_edge)


def _parts(numbers: Tensor) -> tuple[Tensor, ...]:
    return numbers.split(POINTS_AT_ONCE['cpu' if numbers.device.type == 'cpu' else 'cuda'])


def _pairs(chosen: Tensor, part: Tensor, surfaces: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of points ``part`` (p,) and chosen faces (p, F): point number (K,) and corners of the face (3, 3, K).

    Indices in one flat axis and index_select: ten times as fast on a CPU as an index per axis.
    """
    point, face = chosen.nonzero().unbind(1)
    point = part.index_select(0, point)
    face = face + row.index_select(0, point) * surfaces.shape[3]
    return point, surfaces.flatten(2).index_select(2, face)


def _length(vectors: Tensor) -> Tensor:
    """(3, ...) -> (...); torch's own norm over a leading axis is ten times as slow on a CPU."""
    return vectors.square().sum(0).sqrt()
