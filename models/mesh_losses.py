"""Losses on the edges of predicted meshes, against the true meshes."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.losses import mean_per_hand

_SHORTEST = 1e-8  # an edge or a normal below it has no direction


class MeshLosses(nn.Module):
    """Lengths and directions of the edges of all faces; faces (H, F, 3) are those of H hands.

    An edge that several faces share is computed once and counts for each of them. Points are (..., H, 3, N) inside:
    with the coordinates in rows, a reduction over them is fast.
    """

    faces: Tensor
    ends: Tensor
    edge_faces: Tensor
    edge_weights: Tensor
    side_weights: Tensor

    def __init__(self, faces: np.ndarray):
        super().__init__()
        ends, edge_faces = map(_stacked, zip(*map(edges_of_faces, faces)))
        sides = torch.from_numpy(edge_faces >= 0).float()  # (H, K, E): K faces at most share an edge
        corners = faces.shape[1] * 3
        buffers = {
            'faces': torch.tensor(faces).mT.flatten(1),  # (H, 3 F): all first corners, ...
            'ends': torch.from_numpy(ends).clamp_min(0).flatten(1),  # (H, 2 E) vertices
            'edge_faces': torch.from_numpy(edge_faces).clamp_min(0).flatten(1),  # (H, K E)
            # With these, a mean over all edges, or over all their sides, is one over the edges of all faces.
            'edge_weights': sides.sum(1, keepdim=True) * sides.shape[2] / corners,
            'side_weights': sides * sides.shape[1] * sides.shape[2] / corners,
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, vertices: Tensor, truth: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """vertices (..., B, H, V, 3), truth (B, H, V, 3), present (B, H) bool or None -> per hand, (..., H) each:

        the mean absolute difference of edge lengths, and the mean |cosine| of predicted edges and the true normal of
        their face.
        """
        edges, true_edges = self.edges(vertices), self.edges(truth)
        length = _lengths(edges)  # (..., B, H, 1, E)
        difference = (length - _lengths(true_edges)).abs() * self.edge_weights
        out_of_plane = (edges[..., None, :] * self.normals(truth)).sum(-3).abs()  # (..., B, H, K, E)
        cosine = out_of_plane / F.threshold(length, _SHORTEST, math.inf) * self.side_weights
        return mean_per_hand(difference.flatten(-2), present), mean_per_hand(cosine.flatten(-2), present)

    def edges(self, vertices: Tensor) -> Tensor:
        """(..., H, V, 3) -> (..., H, 3, E), from one end to the other."""
        one, other = _pick(vertices.mT, self.ends).chunk(2, -1)
        return other - one

    def normals(self, vertices: Tensor) -> Tensor:
        """(..., H, V, 3) -> unit normals of the faces at each edge, (..., H, 3, K, E)."""
        a, b, c = _pick(vertices.mT, self.faces).chunk(3, -1)
        normals = torch.linalg.cross(b - a, c - a, dim=-2)
        normals = normals / F.threshold(_lengths(normals), _SHORTEST, math.inf)
        return _pick(normals, self.edge_faces).unflatten(-1, self.side_weights.shape[1:])


def edges_of_faces(faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The edges of a mesh: faces (F, 3) -> ends (2, E), faces at each edge (K, E), -1 where there are fewer than K."""
    pairs = np.sort(np.stack([faces, np.roll(faces, -1, 1)], -1).reshape(-1, 2), 1)  # (3 F, 2)
    ends, edge, count = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    by_edge = np.argsort(edge.reshape(-1), kind='stable')
    first = np.repeat(np.cumsum(count) - count, count)  # where its edge's entries begin
    at_edge = np.full((count.max(), len(ends)), -1)
    at_edge[np.arange(len(by_edge)) - first, edge.reshape(-1)[by_edge]] = by_edge // 3
    return ends.T, at_edge


def _stacked(arrays: tuple[np.ndarray, ...]) -> np.ndarray:
    """Stack 2D arrays, filled up with -1 to the largest."""
    rows, columns = np.max([array.shape for array in arrays], 0)
    return np.stack(
        [np.pad(a, ((0, rows - a.shape[0]), (0, columns - a.shape[1])), constant_values=-1) for a in arrays]
    )


def _pick(points: Tensor, index: Tensor) -> Tensor:
    """Columns of each hand's points: (..., H, 3, N), index (H, M) -> (..., H, 3, M)."""
    return points.gather(-1, index[:, None].expand(*points.shape[:-1], -1))


def _lengths(vectors: Tensor) -> Tensor:
    """(..., 3, N) -> (..., 1, N), at least 1e-8: no gradient flows below. Faster here than vector_norm."""
    return (vectors * vectors).sum(-2, keepdim=True).clamp_min(_SHORTEST**2).sqrt()
