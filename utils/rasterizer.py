"""A batched mesh rasterizer (z-buffer) with Lambert shading in plain torch, CPU or CUDA, without compiled extension.

Camera axes x right, y down, z forward, metres. Pixel (row i, column j) is sampled at the projected point
(j + 0.5, i + 0.5), as the renderer of the field's preparation does. No face is culled.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError

SUBPIXELS = 4096  # corners are snapped to this fraction of a pixel, see ``rasterize``
PIXELS_AT_ONCE = 1 << 20  # (face, pixel) pairs held in memory together, about 100 MB
AMBIENT = 0.35  # share of the light that does not depend on the surface's direction


class Fragments(NamedTuple):
    """The visible surface at each pixel."""

    face: Tensor  # (B, H, W) int64 row of ``faces``, -1 in the background
    barycentric: Tensor  # (B, H, W, 3) weights of the face's corners, perspective-correct, 0 in the background
    depth: Tensor  # (B, H, W) m, 0 in the background


@torch.no_grad()
def rasterize(
    vertices: Tensor, faces: Tensor, intrinsics: Tensor, size: tuple[int, int], *, pixels: Tensor | None = None
) -> Fragments:
    """Find the nearest face at every pixel.

    vertices (B, V, 3) m in camera axes, faces (F, 3), intrinsics (B, 3, 3), size (height, width). Faces with a corner
    at or behind the camera, or not finite, are dropped. At equal depth the lower face number wins: deterministic.
    pixels (n,) int64, increasing: compute only these rows and columns -> (B, n, n), the same values as in the whole.

    Corners are snapped to a fine grid. On it, edge functions and their roots along a row of pixels are exact in float64
    (for corners up to 16,000 pixels away), so two faces that share an edge agree on its pixels and leave no hole.
    """
    (height, width), batch, device = size, len(vertices), vertices.device
    rows, columns = size if pixels is None else (len(pixels), len(pixels))  # that are computed
    numbers = None if pixels is None else torch.searchsorted(pixels, torch.arange(max(size) + 1, device=device))

    def number(pixel: Tensor) -> Tensor:
        """Number of the first computed row or column at or after ``pixel``, as a float."""
        return pixel if numbers is None else _take(numbers, pixel.clamp(0, len(numbers) - 1).long()).to(pixel.dtype)

    def pixel_of(number: Tensor) -> Tensor:
        return number if pixels is None else _take(pixels, number)

    x, y, depth, divisor, usable = _projected_corners(vertices, faces, intrinsics)
    left, right = x.amin(0).ceil().clamp_min(0), x.amax(0).floor().clamp_max(width - 1)
    top, bottom = y.amin(0).ceil().clamp_min(0), y.amax(0).floor().clamp_max(height - 1)
    first_row, row_count = number(top), number(bottom + 1) - number(top)
    kept = (usable.all(0) & (number(right + 1) > number(left)) & (row_count > 0)).nonzero().squeeze(1)
    x, y, depth, divisor, left, right, top, first_row, row_count = (
        _take(values, kept) for values in (x, y, depth, divisor, left, right, top, first_row, row_count)
    )
    edges = _edge_functions(x - left, y - top)
    ratio = _depth_ratio(edges, depth, divisor)
    image = torch.div(kept, len(faces), rounding_mode='floor')

    # Faces -> rows of pixels, and in each row the span in which all three edge functions are >= 0.
    face, down = _expand(row_count.long())
    line = _take(image * rows + first_row.long(), face) + down
    if pixels is not None:
        down = pixel_of(line % rows) - _take(top.long(), face)
    slope, step, value = _take(edges, face)
    value = value + step * down
    root = -value / slope
    begin = torch.where(slope > 0, root.ceil(), torch.where((slope == 0) & (value < 0), torch.inf, 0.0))
    end = torch.where(slope < 0, root.floor(), torch.inf)
    begin, end = begin.amax(0).clamp_min(0), end.amin(0).minimum(_take(right - left, face))
    at_left = _take(left, face)
    first_column, length = number(at_left + begin), number(at_left + end + 1)  # ``length`` is still the column after
    spans = (length > first_column).nonzero().squeeze(1)
    length = _take(length - first_column, spans).long()
    face, line, down = (_take(values, spans) for values in (face, line, down))
    begin, at_left, first_column = (_take(values, spans) for values in (begin, at_left, first_column))
    slope, step, value = _take(ratio, face)
    spans_depth = torch.cat([slope, value + step * down + slope * begin])  # (4, spans): two slopes, two values
    place, start = line * columns + first_column.long(), (at_left + begin).long()

    # Spans -> pixels; the smallest key at a pixel belongs to its nearest face.
    nearest = torch.full((batch * rows * columns,), _NOTHING, device=device)
    for part in _parts_of_bounded_sum(length, PIXELS_AT_ONCE):
        span, across = _expand(length[part])
        span = span + part.start
        at = _take(place, span) + across
        if pixels is not None:
            across = pixel_of(at % columns) - _take(start, span)
        slope, slope_below, value, value_below = _take(spans_depth, span)
        z = (value + slope * across) / (value_below + slope_below * across)
        key = _sort_key(z, _take(face, span))
        nearest.scatter_reduce_(0, at, key, 'amin')

    seen = (nearest != _NOTHING).nonzero().squeeze(1)
    face, seen_depth = _face_and_depth(_take(nearest, seen))
    line = torch.div(seen, columns, rounding_mode='floor')
    down, across = pixel_of(line % rows) - _take(top, face), pixel_of(seen - line * columns) - _take(left, face)
    slope, step, value = _take(edges, face)
    weights = (slope * across + step * down + value) / _take(divisor, face)
    out = Fragments(
        torch.full((batch * rows * columns,), -1, device=device),
        vertices.new_zeros(batch * rows * columns, 3),
        vertices.new_zeros(batch * rows * columns),
    )
    out.face[seen] = _take(kept, face) % len(faces)
    out.barycentric[seen] = (weights / weights.sum(0)).to(vertices.dtype).T
    out.depth[seen] = seen_depth.to(vertices.dtype)
    return Fragments(*(values.unflatten(0, (batch, rows, columns)) for values in out))


@torch.no_grad()
def nearest_at(vertices: Tensor, faces: Tensor, intrinsics: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """``rasterize`` at a few pixels of each image alone: pixels (B, P, 2) int64 columns and rows -> face, depth (B, P).

    Any integers, also outside an image. face: -1 where there is none, with depth 0.
    """
    batch, count = pixels.shape[:2]
    x, y, depth, divisor, usable = _projected_corners(vertices, faces, intrinsics)
    column, row = pixels.to(x.dtype)[..., None].unbind(2)  # (B, P, 1) each
    bounds = (x.amin(0), x.amax(0), y.amin(0), y.amax(0), usable.all(0))
    left, right, top, bottom, kept = (values.view(batch, 1, -1) for values in bounds)
    near = kept & (left <= column) & (column <= right) & (top <= row) & (row <= bottom)
    image, point, face = near.nonzero().unbind(1)
    which, at = image * len(faces) + face, image * count + point
    x, y, depth, divisor = (_take(values, which) for values in (x, y, depth, divisor))
    # Relative to its pixel, an edge function's constant is its value there.
    edges = _edge_functions(x - _take(column.flatten(), at), y - _take(row.flatten(), at))
    inside = (edges[2] >= 0).all(0).nonzero().squeeze(1)
    numerator, denominator = _take(_depth_ratio(edges, depth, divisor)[2], inside)
    key = _sort_key(numerator / denominator, _take(face, inside))
    nearest = torch.full((batch * count,), _NOTHING, device=vertices.device)
    nearest.scatter_reduce_(0, _take(at, inside), key, 'amin')
    seen = nearest != _NOTHING
    face, depth = _face_and_depth(nearest)
    face, depth = torch.where(seen, face, -1), torch.where(seen, depth, 0).to(vertices.dtype)
    return face.view(batch, count), depth.view(batch, count)


_NOTHING = torch.iinfo(torch.int64).max


def _sort_key(depth: Tensor, face: Tensor) -> Tensor:
    """int64 that is smallest for the nearest face: the bits of positive float32 numbers sort as the numbers do."""
    return depth.float().view(torch.int32).long() << 32 | face


def _face_and_depth(key: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of ``_sort_key``."""
    return key & 0xFFFFFFFF, (key >> 32).int().view(torch.float32)


class _Corners(NamedTuple):
    """The corners of the faces on the screen, where samples lie at integers. Each is (3 corners, B F): the long axis
    last, so that it vectorises."""

    x: Tensor
    y: Tensor
    depth: Tensor  # m
    divisor: Tensor  # of the projection
    usable: Tensor  # bool


def _projected_corners(vertices: Tensor, faces: Tensor, intrinsics: Tensor) -> _Corners:
    homogeneous = vertices.double() @ intrinsics.double().transpose(1, 2)
    usable = (vertices[..., 2] > 0) & (homogeneous[..., 2] > 0) & homogeneous.isfinite().all(-1)
    homogeneous = torch.where(usable[..., None], homogeneous, 1.0)  # any valid place: the face is dropped
    projected = ((homogeneous[..., :2] / homogeneous[..., 2:] - 0.5) * SUBPIXELS).round() / SUBPIXELS
    values = (projected[..., 0], projected[..., 1], vertices[..., 2].double(), homogeneous[..., 2], usable)
    return _Corners(*(_at_corners(each, faces) for each in values))


def _depth_ratio(edges: Tensor, depth: Tensor, divisor: Tensor) -> Tensor:
    """(3 coefficients, 2, N): on the screen, depth is the ratio of two affine functions, combined from the edges'."""
    return torch.stack([(edges * (depth / divisor)).sum(1), (edges / divisor).sum(1)], 1)


def _at_corners(values: Tensor, faces: Tensor) -> Tensor:
    """Gather values of the vertices (B, V) at the corners of the faces (3, B F)."""
    return _take(values, faces.T.flatten()).unflatten(1, (3, -1)).transpose(0, 1).flatten(1)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """``values[..., index]`` by gather, which is four times as fast on a CPU."""
    return values.gather(-1, index.expand(*values.shape[:-1], -1))


def _expand(count: Tensor) -> tuple[Tensor, Tensor]:
    """count (N,) -> owner (sum,) of each item, and the number 0, 1, ... of the item among those of its owner."""
    owner = torch.repeat_interleave(count)
    return owner, torch.arange(len(owner), device=count.device) - _take(count.cumsum(0) - count, owner)


def _parts_of_bounded_sum(count: Tensor, limit: int) -> list[slice]:
    """Split ``count`` into consecutive parts with sums near ``limit``, which bounds memory when faces are large."""
    if not len(count):
        return []
    total = count.cumsum(0)
    steps = torch.arange(limit, int(total[-1]) + limit, limit, device=count.device)
    stops = torch.searchsorted(total, steps).add(1).clamp_max(len(count)).tolist()
    return [slice(begin, stop) for begin, stop in zip([0, *stops], stops) if begin < stop]


def _edge_functions(x: Tensor, y: Tensor) -> Tensor:
    """Corners (3, N) -> (3 coefficients, 3 edges, N): a x + b y + c is >= 0 inside, for either winding of the face.

    Divided by their sum, the three values are the screen-space barycentric weights; edge i is opposite corner i. A face
    without area has -1 everywhere: nothing is inside.
    """
    (x1, y1), (x2, y2) = (x.roll(-1, 0), y.roll(-1, 0)), (x.roll(1, 0), y.roll(1, 0))
    edges = torch.stack([y1 - y2, x2 - x1, x1 * y2 - x2 * y1])
    area = edges[2].sum(0)
    nothing = edges.new_tensor([0.0, 0.0, -1.0])[:, None, None]
    return torch.where(area == 0, nothing, edges * area.sign())


def interpolate(fragments: Fragments, faces: Tensor, attributes: Tensor) -> Tensor:
    """Interpolate vertex attributes (B, V, C) or (V, C) at every pixel -> (B, H, W, C), 0 in the background.

    Differentiable in ``attributes``.
    """
    batch, height, width = fragments.face.shape
    face = fragments.face.flatten()
    seen = (face >= 0).nonzero().squeeze(1)
    corners = faces.index_select(0, face.index_select(0, seen))
    if attributes.ndim == 3:
        corners = corners + torch.div(seen, height * width, rounding_mode='floor')[:, None] * attributes.shape[1]
    table = attributes.flatten(0, -2)
    weights = fragments.barycentric.flatten(0, 2).index_select(0, seen).to(table.dtype)
    a, b, c = (weights[:, k : k + 1] * table.index_select(0, corners[:, k]) for k in range(3))
    values = a + b + c
    return table.new_zeros(len(face), table.shape[1]).index_copy(0, seen, values).unflatten(0, (batch, height, width))


def smooth_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Unit vertex normals (B, V, 3): the area-weighted mean of the normals of adjacent faces."""
    a, b, c = vertices[:, faces].unbind(2)
    normals = torch.linalg.cross(b - a, c - a)
    total = torch.zeros_like(vertices)
    for corner in range(3):
        total = total.index_add(1, faces[:, corner], normals)
    return F.normalize(total, dim=-1, eps=1e-20)


def shade(fragments: Fragments, vertices: Tensor, faces: Tensor, colours: Tensor) -> Tensor:
    """Gouraud shading with a Lambert light at the camera -> (B, H, W, C).

    vertices (B, V, 3) m in camera axes, colours (V, C) or (B, V, C) in [0, 1].
    """
    # Both sides are lit: the inside of the open wrist is visible, too.
    cosine = F.cosine_similarity(smooth_normals(vertices, faces), -vertices, dim=-1)[..., None].abs()
    return interpolate(fragments, faces, colours * (AMBIENT + (1 - AMBIENT) * cosine))


def rasterize_pytorch3d(vertices: Tensor, faces: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> Fragments:
    """``rasterize`` with PyTorch3D, for comparison. Raises UserError if PyTorch3D is not installed."""
    try:
        from pytorch3d.renderer.mesh.rasterize_meshes import rasterize_meshes
        from pytorch3d.structures import Meshes
    except ImportError:
        raise UserError(
            'The renderer pytorch3d is not installed: build it as described in https://github.com/facebookresearch/'
            'pytorch3d/blob/main/INSTALL.md, or use the renderer torch, which needs no extra package.'
        ) from None
    height, width = size
    homogeneous = vertices @ intrinsics.transpose(1, 2)
    pixels = homogeneous[..., :2] / homogeneous[..., 2:]
    # In screen space x points left and y up; the shorter side spans [-1, 1].
    screen = (pixels.new_tensor([width, height]) - 2 * pixels) / min(size)
    mesh = Meshes(torch.cat([screen, vertices[..., 2:]], -1), faces.expand(len(vertices), -1, -1))
    face, depth, barycentric, _ = rasterize_meshes(
        mesh, image_size=size, blur_radius=0.0, faces_per_pixel=1, perspective_correct=True, cull_backfaces=False
    )
    face, depth, barycentric = face[..., 0], depth[..., 0], barycentric[..., 0, :]
    background = face < 0
    return Fragments(
        torch.where(background, -1, face % len(faces)),
        torch.where(background[..., None], 0.0, barycentric),
        torch.where(background, 0.0, depth),
    )


RENDERERS = {'torch': rasterize, 'pytorch3d': rasterize_pytorch3d}
