"""A batched z-buffer in plain torch, CPU or CUDA, and the pictures made with it. No compiled extension.

Camera axes x right, y down, z forward, metres. Pixel (row i, column j) is sampled at the projected point
(j + 0.5, i + 0.5), as the renderer of the field's own preparation does. Surfaces have no back: nothing is culled.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from manopth import HandPair
from utils.errors import UserError
from utils.geometry import project
from utils.hand import NUM_VERTICES

SUBPIXELS = 4096  # corners are snapped to this fraction of a pixel, see ``rasterize``
PIXELS_AT_ONCE = 1 << 20  # (face, pixel) pairs held in memory together, about 100 MB
HAND_COLOURS_BGR = ((214, 150, 80), (86, 133, 235))  # left blue, right orange
AMBIENT = 0.35  # share of the light that does not depend on the surface's direction


class Fragments(NamedTuple):
    """What each pixel sees."""

    face: Tensor  # (B, H, W) int64 row of ``faces``, -1 where nothing is seen
    barycentric: Tensor  # (B, H, W, 3) weights of the face's corners, perspective-correct, 0 in the background
    depth: Tensor  # (B, H, W) m, 0 in the background


@torch.no_grad()
def rasterize(vertices: Tensor, faces: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> Fragments:
    """The nearest face at every pixel.

    vertices (B, V, 3) m in camera axes, faces (F, 3), intrinsics (B, 3, 3), size (height, width). Faces with a corner
    at or behind the camera, or not finite, are dropped. At equal depth the lower face number wins: deterministic.

    Corners are snapped to a fine grid. Edge functions of such numbers, and their roots along a line of pixels, are
    exact in float64 (for corners up to 16,000 pixels away), so the two faces of a shared edge agree on its pixels and
    no hole can open between them.
    """
    (height, width), batch, device = size, len(vertices), vertices.device
    homogeneous = vertices.double() @ intrinsics.double().transpose(1, 2)
    usable = (vertices[..., 2] > 0) & (homogeneous[..., 2] > 0) & homogeneous.isfinite().all(-1)
    homogeneous = torch.where(usable[..., None], homogeneous, 1.0)  # any harmless place: the face is dropped below
    pixels = ((homogeneous[..., :2] / homogeneous[..., 2:] - 0.5) * SUBPIXELS).round() / SUBPIXELS
    # Samples now lie at integers. Every quantity is (3 corners, B F): faces last, which is what vectorises.
    x, y, depth, divisor, usable = (
        _at_corners(values, faces)
        for values in (pixels[..., 0], pixels[..., 1], vertices[..., 2].double(), homogeneous[..., 2], usable)
    )

    left, right = x.amin(0).ceil().clamp_min(0), x.amax(0).floor().clamp_max(width - 1)
    top, bottom = y.amin(0).ceil().clamp_min(0), y.amax(0).floor().clamp_max(height - 1)
    kept = (usable.all(0) & (right >= left) & (bottom >= top)).nonzero().squeeze(1)
    x, y, depth, divisor, left, right, top, bottom = (
        _take(values, kept) for values in (x, y, depth, divisor, left, right, top, bottom)
    )
    edges = _edge_functions(x - left, y - top)
    # On the screen depth is the ratio of two affine functions, mixed from those of the edges.
    ratio = torch.stack([(edges * (depth / divisor)).sum(1), (edges / divisor).sum(1)], 1)  # (3 coefficients, 2, N)
    image = torch.div(kept, len(faces), rounding_mode='floor')
    first_pixel = (image * height + top.long()) * width + left.long()

    # Faces -> lines of pixels, and on each line the span in which all three edge functions are >= 0.
    face, down = _expand((bottom - top + 1).long())
    line = _take(first_pixel, face) + down * width
    slope, step, value = _take(edges, face)
    value = value + step * down
    root = -value / slope
    begin = torch.where(slope > 0, root.ceil(), torch.where((slope == 0) & (value < 0), torch.inf, 0.0))
    end = torch.where(slope < 0, root.floor(), torch.inf)
    begin, end = begin.amax(0).clamp_min(0), end.amin(0).minimum(_take(right - left, face))
    spans = (end >= begin).nonzero().squeeze(1)
    length = _take(end - begin + 1, spans).long()
    face, line, down = (_take(values, spans) for values in (face, line, down))
    begin = _take(begin, spans)
    slope, step, value = _take(ratio, face)
    spans_depth = torch.cat([slope, value + step * down + slope * begin])  # (4, spans): two slopes, two values
    line = line + begin.long()

    # Spans -> pixels; the nearest face of each is the least key.
    nearest = torch.full((batch * height * width,), _NOTHING, device=device)
    for part in _parts_of_bounded_sum(length, PIXELS_AT_ONCE):
        span, across = _expand(length[part])
        span = span + part.start
        slope, slope_below, value, value_below = _take(spans_depth, span)
        z = ((value + slope * across) / (value_below + slope_below * across)).float()
        # The bits of a positive float32 sort like the number.
        key = z.view(torch.int32).long() << 32 | _take(face, span)
        nearest.scatter_reduce_(0, _take(line, span) + across, key, 'amin')

    seen = (nearest != _NOTHING).nonzero().squeeze(1)
    nearest = _take(nearest, seen)
    face = nearest & 0xFFFFFFFF
    offset = seen - _take(first_pixel - left.long(), face)
    down = torch.div(offset, width, rounding_mode='floor')
    across = offset - down * width - _take(left, face)
    slope, step, value = _take(edges, face)
    weights = (slope * across + step * down + value) / _take(divisor, face)
    out = Fragments(
        torch.full((batch * height * width,), -1, device=device),
        vertices.new_zeros(batch * height * width, 3),
        vertices.new_zeros(batch * height * width),
    )
    out.face[seen] = _take(kept, face) % len(faces)
    out.barycentric[seen] = (weights / weights.sum(0)).to(vertices.dtype).T
    out.depth[seen] = (nearest >> 32).int().view(torch.float32).to(vertices.dtype)
    return Fragments(*(values.unflatten(0, (batch, height, width)) for values in out))


_NOTHING = torch.iinfo(torch.int64).max


def _at_corners(values: Tensor, faces: Tensor) -> Tensor:
    """Values of the vertices (B, V) -> of the faces' corners (3, B F)."""
    return _take(values, faces.T.flatten()).unflatten(1, (3, -1)).transpose(0, 1).flatten(1)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """``values[..., index]``; gather is four times as fast on a CPU."""
    return values.gather(-1, index.expand(*values.shape[:-1], -1))


def _expand(count: Tensor) -> tuple[Tensor, Tensor]:
    """count (N,) -> owner (sum,), which n each item belongs to, and its number 0, 1, ... among that owner's items."""
    owner = torch.repeat_interleave(count)
    return owner, torch.arange(len(owner), device=count.device) - _take(count.cumsum(0) - count, owner)


def _parts_of_bounded_sum(count: Tensor, limit: int) -> list[slice]:
    """Consecutive parts of ``count`` whose sums stay near ``limit``: memory stays bounded when faces are large."""
    if not len(count):
        return []
    total = count.cumsum(0)
    steps = torch.arange(limit, int(total[-1]) + limit, limit, device=count.device)
    stops = torch.searchsorted(total, steps).add(1).clamp_max(len(count)).tolist()
    return [slice(begin, stop) for begin, stop in zip([0, *stops], stops) if begin < stop]


def _edge_functions(x: Tensor, y: Tensor) -> Tensor:
    """Corners (3, N) -> (3 coefficients, 3 edges, N): a x + b y + c is >= 0 inside, whichever way the face turns.

    Divided by their sum the three values are the barycentric weights on the screen; edge i lies opposite of corner i.
    A face without area gets -1 everywhere: nothing is inside.
    """
    (x1, y1), (x2, y2) = (x.roll(-1, 0), y.roll(-1, 0)), (x.roll(1, 0), y.roll(1, 0))
    edges = torch.stack([y1 - y2, x2 - x1, x1 * y2 - x2 * y1])
    area = edges[2].sum(0)
    nothing = edges.new_tensor([0.0, 0.0, -1.0])[:, None, None]
    return torch.where(area == 0, nothing, edges * area.sign())


def interpolate(fragments: Fragments, faces: Tensor, attributes: Tensor) -> Tensor:
    """Attributes of the vertices, (B, V, C) or (V, C), at every pixel -> (B, H, W, C), 0 in the background.

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
    values = sum(weights[:, k : k + 1] * table.index_select(0, corners[:, k]) for k in range(3))
    return table.new_zeros(len(face), table.shape[1]).index_copy(0, seen, values).unflatten(0, (batch, height, width))


def two_hand_faces(models: HandPair) -> Tensor:
    """Faces (3076, 3) of both hands as one mesh: the left hand's, then the right's, for ``vertices.flatten(1, 2)``."""
    return as_one_mesh(*(torch.tensor(model.faces) for model in models))


def as_one_mesh(left_faces: Tensor, right_faces: Tensor) -> Tensor:
    """Faces (F, 3) of each hand -> (2 F, 3) for ``vertices.flatten(1, 2)``."""
    return torch.cat([left_faces, right_faces + NUM_VERTICES])


def smooth_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Unit normals (B, V, 3) of the vertices: the mean of the adjacent faces' normals, weighted by area."""
    a, b, c = vertices[:, faces].unbind(2)
    normals = torch.linalg.cross(b - a, c - a)
    total = torch.zeros_like(vertices)
    for corner in range(3):
        total = total.index_add(1, faces[:, corner], normals)
    return F.normalize(total, dim=-1, eps=1e-20)


def shade(fragments: Fragments, vertices: Tensor, faces: Tensor, colours: Tensor) -> Tensor:
    """Lambert shading with a light at the camera, at the vertices and interpolated (Gouraud) -> (B, H, W, C).

    vertices (B, V, 3) m in camera axes, colours (V, C) or (B, V, C) in [0, 1].
    """
    # The inside of an open wrist faces away: it is lit as well.
    cosine = F.cosine_similarity(smooth_normals(vertices, faces), -vertices, dim=-1)[..., None].abs()
    return interpolate(fragments, faces, colours * (AMBIENT + (1 - AMBIENT) * cosine))


def overlay(
    image: np.ndarray,
    vertices: Tensor,
    intrinsics: Tensor,
    faces: Tensor,
    *,
    alpha: float = 0.8,
    colours_bgr=HAND_COLOURS_BGR,
    smooth_edges: int = 2,
) -> np.ndarray:
    """Draw both meshes over a picture, each hand in its colour.

    image (H, W, 3) uint8 BGR, vertices (2, 778, 3) m in camera axes, intrinsics (3, 3) of this picture, faces (F, 3) of
    both hands as one mesh (``two_hand_faces``). ``alpha`` is the meshes' opacity; ``smooth_edges`` the number of
    samples across a pixel. Returns a new picture.
    """
    mesh, faces = vertices.detach().float().reshape(1, -1, 3), faces.to(vertices.device)
    whole, (left, top, right, bottom) = image.copy(), _window(mesh[0], intrinsics, image.shape[:2])
    if right <= left or bottom <= top:
        return whole
    image, (height, width) = whole[top:bottom, left:right], (bottom - top, right - left)
    moved = intrinsics.new_tensor([[1, 0, -left], [0, 1, -top], [0, 0, 1]])
    finer = torch.diag(intrinsics.new_tensor([smooth_edges, smooth_edges, 1.0])) @ moved @ intrinsics
    fragments = rasterize(mesh, faces, finer[None], (height * smooth_edges, width * smooth_edges))
    colours = torch.tensor(colours_bgr, device=mesh.device, dtype=mesh.dtype).repeat_interleave(NUM_VERTICES, 0)
    covered = (fragments.face >= 0)[..., None].to(mesh)
    layers = torch.cat([shade(fragments, mesh, faces, colours), covered], -1).permute(0, 3, 1, 2)
    layers = F.avg_pool2d(layers, smooth_edges)[0].permute(1, 2, 0).cpu().numpy()
    drawn, coverage = layers[..., :3], layers[..., 3:]  # colours are already multiplied by the coverage
    image[...] = (image * (1 - alpha * coverage) + alpha * drawn).round().clip(0, 255)
    return whole


def _window(vertices: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the part of a (height, width) picture in which (V, 3) m can be seen.

    Hands are small in most pictures, and work and memory go with the part that is drawn.
    """
    height, width = size
    if bool((vertices[:, 2] <= 0).any()):
        return 0, 0, width, height
    pixels = project(vertices, intrinsics.to(vertices))
    low, high = pixels.amin(0).floor().clamp(-1, 1e6).long() - 1, pixels.amax(0).ceil().clamp(-1, 1e6).long() + 1
    left, top, right, bottom = *low.clamp_min(0).tolist(), *high.tolist()
    return left, top, min(right, width), min(bottom, height)


def rasterize_pytorch3d(vertices: Tensor, faces: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> Fragments:
    """``rasterize`` by way of pytorch3d, for comparison. Raises UserError where pytorch3d is not installed."""
    try:
        from pytorch3d.renderer.mesh.rasterize_meshes import rasterize_meshes
        from pytorch3d.structures import Meshes
    except ImportError:
        raise UserError(
            'the renderer pytorch3d is not installed: build it as https://github.com/facebookresearch/'
            'pytorch3d/blob/main/INSTALL.md says, or leave it at torch, which needs nothing.'
        ) from None
    height, width = size
    homogeneous = vertices @ intrinsics.transpose(1, 2)
    pixels = homogeneous[..., :2] / homogeneous[..., 2:]
    # Its screen has x to the left and y up; the shorter side spans [-1, 1].
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
