"""Appearance of synthetic hands: skin, nails and creases, forearms, light and backgrounds.

Skin is painted once per person into texels: every face of the mesh has a small grid over its barycentric coordinates,
so that a pixel's colour is one look-up. Colours are linear light, BGR, in [0, 1].
"""

from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from manopth import HandModel, HandPair
from utils.hand import BONES, MANO_TO_JOINTS, NUM_VERTICES, TIP_VERTICES
from utils.rasterizer import rasterize, smooth_normals

TEXELS = 8  # along a face's edge of about 6 mm: finer than a pixel of the images
SKIN_TONES_BGR = (
    np.array(
        [
            (176, 200, 235),
            (150, 182, 224),
            (132, 168, 214),
            (110, 150, 200),
            (92, 130, 182),
            (72, 106, 156),
            (56, 84, 128),
            (44, 64, 100),
        ]
    )
    / 255.0
)
POLISHED, HAIRY, WATCHES, BARE_FOREARMS = 0.15, 0.35, 0.25, 0.3  # shares of people
RINGS, TATTOOS = 0.2, 0.08  # shares of hands
METALS_BGR = np.array([(90, 190, 230), (205, 205, 210), (120, 150, 220), (60, 60, 65)]) / 255  # gold, silver ...
FOREARM_RINGS, FOREARM_LENGTH, LARGEST_BEND = 11, 0.31, np.radians(60)
WRIST_CORNERS = 16  # of the hole at the wrist
NUM_FOREARM_VERTICES = WRIST_CORNERS * FOREARM_RINGS
NUM_FOREARM_FACES = 2 * WRIST_CORNERS * FOREARM_RINGS
# Right hand at rest: where the nail of the thumb looks is not where those of the fingers look.
NAIL_DIRECTIONS = np.array([[0.30, 0.62, 0.72]] + [[0.0, 1.0, 0.0]] * 4)
MIRROR = np.array([-1.0, 1.0, 1.0])


def to_linear(colour: np.ndarray) -> np.ndarray:
    """Display values in [0, 1] -> linear light; a square approximates sRGB's curve."""
    return np.square(colour)


# ---------------------------------------------------------------------------------------------------------------------
# Skin
# ---------------------------------------------------------------------------------------------------------------------


class SkinChart(NamedTuple):
    """The part of a hand that each texel shows, (N = faces * TEXELS**2,) float32; shares and masks lie in [0, 1]."""

    palm: np.ndarray  # 1 on the palm's side
    back: np.ndarray  # 1 on the back
    joint: np.ndarray  # m along the finger from the nearest joint
    palm_line: np.ndarray  # m from the nearest of the long creases
    knuckle: np.ndarray  # m from the nearest knuckle
    pad: np.ndarray  # 1 at the fingertips, palm's side
    tendon: np.ndarray  # 1 on the ridges of the back
    nail: np.ndarray  # 1 in the nail, 0 at its outline
    outline: np.ndarray  # 1 at the nail's outline
    nail_share: np.ndarray  # along the last bone, for the white edge
    ring_finger: np.ndarray  # 0 thumb to 4 little where a ring would sit, else -1
    coarse: np.ndarray  # noise in [-1, 1], features of a centimetre
    fine: np.ndarray  # noise, features of two millimetres
    rim: np.ndarray  # (16,) palm's share round the wrist, in the order of ``wrist_loop``


def _texel_weights() -> np.ndarray:
    """(TEXELS**2, 3) barycentric coordinates of the texels' centres."""
    first, second = np.meshgrid((np.arange(TEXELS) + 0.5) / TEXELS, (np.arange(TEXELS) + 0.5) / TEXELS, indexing='ij')
    return np.stack([first, second, 1 - first - second], -1).reshape(-1, 3).astype(np.float32)


def chart_skin(model: HandModel) -> SkinChart:
    """Assign every texel to a part of the hand; computed once, since it is the same for all people."""
    rng = np.random.default_rng(model.side == 'left')
    mirror = MIRROR if model.side == 'left' else np.ones(3)
    vertices = model.template * mirror
    normals = smooth_normals(torch.from_numpy(vertices)[None], torch.tensor(model.faces))[0].numpy()
    normals = normals * (-1 if model.side == 'left' else 1)  # mirrored faces turn the other way round
    joints = np.concatenate([model.joint_regressor @ model.template, model.template[list(TIP_VERTICES)]])
    joints = joints[list(MANO_TO_JOINTS)] * mirror

    weights = _texel_weights()
    point = np.einsum('kc,fcx->fkx', weights, vertices[model.faces].astype(np.float32)).reshape(-1, 3)
    normal = np.einsum('kc,fcx->fkx', weights, normals[model.faces].astype(np.float32)).reshape(-1, 3)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    starts, ends = (joints[[bone[end] for bone in BONES]].astype(np.float32) for end in (0, 1))
    axes = ends - starts
    lengths = np.linalg.norm(axes, axis=1)
    # The nearest bone of a whole face is the nearest of its texels, to a texel or two.
    centre = point.reshape(len(model.faces), -1, 3).mean(1)
    along = ((centre[:, None] - starts) * axes).sum(-1) / lengths**2
    offset = centre[:, None] - starts - along.clip(0, 1)[..., None] * axes
    bone = np.repeat((offset**2).sum(-1).argmin(1), TEXELS**2)
    finger, part = bone // 4, bone % 4
    unit, length = axes / lengths[:, None], lengths[bone]
    nail_direction = NAIL_DIRECTIONS[finger]
    side = _unit(np.cross(unit[bone], nail_direction))
    sideways = _dot(normal, side)[:, 0]
    upward = np.where((finger == 0) & (part > 0), _dot(normal, nail_direction)[:, 0], normal[:, 1])
    along = _dot(point - starts[bone], unit[bone])[:, 0]

    palm, back = _step(-upward, -0.25, 0.35), _step(upward, 0.1, 0.7)
    last, share = part == 3, along / length
    joint = np.where(part > 0, np.minimum(np.abs(along), np.abs(along - np.where(last, 9, length))), 9)
    coarse = 0.6 * _value_noise(point, 0.014, rng) + 0.4 * _value_noise(point, 0.005, rng)
    plane = point[:, [0, 2]] + 0.0015 * coarse[:, None]
    palm_line = np.minimum.reduce([_distance_to_line(plane, line) for line in _palm_lines(joints)])
    knuckle = np.minimum.reduce([np.linalg.norm(point - joints[i], axis=1) for i in (5, 9, 13, 17)])
    inside = np.minimum.reduce([(share - 0.42) / 0.10, (1.03 - share) / 0.06, (0.80 - np.abs(sideways)) / 0.12])
    on_nail = last & (upward > 0.25)
    chart = SkinChart(
        palm,
        back,
        joint,
        np.where(part > 0, 9, palm_line),
        knuckle,
        last * palm * _step(share, 0.3, 1),
        (part == 0) * back * _bump(sideways, 0.25),
        on_nail * _step(inside, 0, 1),
        on_nail * _bump(inside, 0.5),
        share,
        np.where((part == 1) & (np.abs(share - 0.42) < 0.08), finger, -1),
        coarse,
        _value_noise(point, 0.0016, rng),
        _step(-normals[list(wrist_loop(model)), 1], -0.25, 0.35),
    )
    return SkinChart(*(field.astype(np.float32) for field in chart))


def _value_noise(point: np.ndarray, cell: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise (N,) in [-1, 1] with features of the size ``cell``, trilinear in a random lattice."""
    lattice = rng.uniform(-1, 1, (32, 32, 32)).astype(np.float32)
    at = point / cell + 64
    low = np.floor(at).astype(int)
    share = (at - low).astype(np.float32)
    share = share * share * (3 - 2 * share)
    total = np.zeros(len(point), np.float32)
    for corner in np.ndindex(2, 2, 2):
        weight = np.where(corner, share, 1 - share).prod(1)
        total += weight * lattice[tuple(((low + corner) % 32).T)]
    return total


def _bump(distance: np.ndarray, width: float) -> np.ndarray:
    return np.exp(-np.square(distance / width))


def _step(value: np.ndarray, low: float, high: float) -> np.ndarray:
    share = ((value - low) / (high - low)).clip(0, 1)
    return share * share * (3 - 2 * share)


def _palm_lines(joints: np.ndarray) -> list[np.ndarray]:
    """The three long creases of a palm as polylines (K, 2) in the plane x, z of the rest pose."""
    wrist, index, middle, ring, little = (joints[i, [0, 2]] for i in (0, 5, 9, 13, 17))

    def place(knuckle, towards_wrist, sideways=0.0):
        across = (index - little) / np.linalg.norm(index - little)
        return knuckle + towards_wrist * (wrist - knuckle) + sideways * across

    heart = [place(little, 0.22, -0.008), place(ring, 0.20), place(middle, 0.14), place((index + middle) / 2, -0.02)]
    head = [place(index, 0.22, 0.012), place(middle, 0.32), place(ring, 0.42), place(little, 0.52)]
    life = [
        place(index, 0.24, 0.012),
        *(place(middle, share, side) for share, side in ((0.45, 0.006), (0.70, 0.002), (0.92, 0.010))),
    ]
    return [np.array(line) for line in (heart, head, life)]


def _distance_to_line(point: np.ndarray, line: np.ndarray) -> np.ndarray:
    best = np.full(len(point), np.inf)
    for start, end in zip(line[:-1], line[1:]):
        axis = end - start
        along = ((point - start) @ axis / (axis @ axis)).clip(0, 1)
        best = np.minimum(best, np.linalg.norm(point - start - along[:, None] * axis, axis=1))
    return best


class Person(NamedTuple):
    """The appearance of a subject."""

    skin: np.ndarray  # (2 * faces with forearms, TEXELS**2, 3) linear BGR: left hand, left forearm, right hand, forearm
    shirt: np.ndarray  # (3,) display BGR
    pattern: int  # of the shirt: 0 plain, 1 stripes, 2 checks


def paint_person(
    charts: tuple[SkinChart, SkinChart], rng: np.random.Generator, *, varied: bool = True, adorned: bool = True
) -> Person:
    """Paint a random person: skin, nails, creases, sleeves.

    ``charts`` of the left and the right hand. ``varied`` people differ more in colour and texture and some have veins
    and freckles; ``adorned`` ones have rings, watches, tattoos, nail polish, body hair and any sleeves.
    """
    tone = rng.uniform(0, len(SKIN_TONES_BGR) - 1)
    low = int(tone)
    back_colour = (1 - tone + low) * SKIN_TONES_BGR[low] + (tone - low) * SKIN_TONES_BGR[low + 1]
    back_colour = (back_colour * rng.uniform(0.94, 1.06, 3)).clip(0, 1)
    if varied:
        back_colour = (back_colour * rng.uniform(0.78, 1.1) * rng.uniform(0.95, 1.05, 3)).clip(0, 1)
    # A palm has little pigment: hardly lighter on fair skin, much lighter on dark.
    palm_colour = back_colour + (np.array([150, 172, 222]) / 255 - back_colour) * 0.35 + np.array([0.02, 0.02, 0.05])
    back_colour, palm_colour = back_colour.astype(np.float32), palm_colour.astype(np.float32)
    shirt, pattern = _muted(rng, 0.05, 0.7), int(rng.integers(3))
    crease, wrinkle, red = rng.uniform(0.22, 0.40), rng.uniform(0.08, 0.2), rng.uniform(0.04, 0.10)
    blotchy, nail_base = rng.uniform(0.03, 0.10), 0.55 * back_colour + 0.45 * np.array([0.78, 0.78, 0.92], np.float32)
    nail_length, sleeve = rng.uniform(0.86, 0.94), int(rng.integers(2, FOREARM_RINGS + 1))
    veins = freckles = hair = 0.0
    polish = watch = None
    if varied:
        blotchy, crease = rng.uniform(0.02, 0.16), rng.uniform(0.12, 0.45)
        veins = rng.uniform(0.04, 0.14) if rng.random() < 0.4 else 0.0
        freckles = rng.uniform(0.1, 0.3) if rng.random() < 0.2 else 0.0
    if adorned:
        polish = rng.uniform(0, 1, 3) if rng.random() < POLISHED else None
        hair = rng.uniform(0.1, 0.45) if rng.random() < HAIRY else 0.0
        watch = (int(rng.integers(2)), rng.uniform(0.02, 0.9, 3)) if rng.random() < WATCHES else None
        sleeve = FOREARM_RINGS + 1 if rng.random() < BARE_FOREARMS else int(rng.integers(0, FOREARM_RINGS + 1))
        shirt = rng.uniform(0.02, 0.95, 3).astype(np.float32) if rng.random() < 0.4 else shirt

    parts = []
    for side, chart in enumerate(charts):
        palm, back = chart.palm[:, None], chart.back
        colour = back_colour + palm * (palm_colour - back_colour)
        dark = 1 + blotchy * chart.coarse + 0.06 * chart.fine + 0.05 * chart.tendon
        dark -= crease * chart.palm * (_bump(chart.joint, 0.0010) + _bump(chart.palm_line, 0.0011))
        wrinkles = 0.5 + 0.5 * np.cos(chart.joint * np.float32(2 * np.pi / 0.0024) + 1.5 * chart.coarse)
        dark -= wrinkle * wrinkles * _bump(chart.joint, 0.0055) * back
        if hair:
            dark -= hair * back * (chart.fine > 0.45)
        if veins:
            dark -= veins * back * _bump(chart.coarse - 0.1, 0.06)
        if freckles:
            dark -= freckles * back * (chart.fine * chart.coarse > 0.16)
        blush = red * (back * (_bump(chart.knuckle - 0.008, 0.008) + _bump(chart.joint, 0.006)) + chart.pad)
        colour *= dark[:, None] * (1 - blush[:, None] * np.array([1.2, 1.0, 0.1], np.float32))
        nail_colour = (nail_base if polish is None else polish) + 0.18 * _step(
            chart.nail_share, nail_length - 0.03, nail_length
        )[:, None]
        colour *= 1 - 0.25 * chart.outline[:, None]
        colour += chart.nail[:, None] * (nail_colour - colour)
        if adorned and rng.random() < TATTOOS:
            ink = back * _step(np.abs(chart.coarse - rng.uniform(-0.3, 0.3)), 0.22, 0.16)
            colour += rng.uniform(0.5, 0.9) * ink[:, None] * (_muted(rng, 0.02, 0.35) - colour)
        if adorned and rng.random() < RINGS:
            metal = METALS_BGR[rng.integers(len(METALS_BGR))] * rng.uniform(0.6, 1.1)
            colour[chart.ring_finger == rng.integers(1, 5)] = metal
        forearm = _paint_forearm(back_colour, palm_colour, chart.rim, shirt, sleeve, rng)
        if watch and watch[0] == side:
            forearm[2 * WRIST_CORNERS : 4 * WRIST_CORNERS] = to_linear(watch[1])
        parts += [to_linear(colour.clip(0, 1)).reshape(-1, TEXELS**2, 3), forearm]
    return Person(np.concatenate(parts).astype(np.float32), shirt, pattern)


def _paint_forearm(
    back: np.ndarray, palm: np.ndarray, rim: np.ndarray, shirt: np.ndarray, sleeve: int, rng: np.random.Generator
) -> np.ndarray:
    """(NUM_FOREARM_FACES, TEXELS**2, 3): skin continued from the wrist up to ring ``sleeve``, then cloth."""
    noise = rng.standard_normal((NUM_FOREARM_FACES, TEXELS**2, 1), dtype=np.float32)
    ring, corner = np.divmod(np.arange(NUM_FOREARM_FACES) // 2, WRIST_CORNERS)
    between = (rim + np.roll(rim, -1)) / 2
    inner = (between[corner] * np.maximum(0.4, 1 - ring / 5))[:, None, None]
    skin = (back + inner * (palm - back)) * (1 + np.float32(0.03) * noise)
    return to_linear(np.where(ring[:, None, None] < sleeve, skin, shirt * (1 + np.float32(0.08) * noise)).clip(0, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Forearms
# ---------------------------------------------------------------------------------------------------------------------


def wrist_loop(model: HandModel) -> tuple[int, ...]:
    """The 16 vertices around the open wrist, in order."""
    faces = model.faces
    edges = {tuple(edge) for edge in np.stack([faces, np.roll(faces, -1, 1)], -1).reshape(-1, 2).tolist()}
    following = {end: start for start, end in edges if (end, start) not in edges}  # seen from the missing side
    loop = [min(following)]
    while following[loop[-1]] != loop[0]:
        loop.append(following[loop[-1]])
    return tuple(loop)


def arm_faces(models: HandPair) -> Tensor:
    """Faces (F, 3) of left hand, left forearm, right hand, right forearm over the vertices of ``with_forearms``."""
    parts = []
    for side, model in enumerate(models):
        first = side * (NUM_VERTICES + NUM_FOREARM_VERTICES)
        rings = np.concatenate([wrist_loop(model), NUM_VERTICES + np.arange(NUM_FOREARM_VERTICES)])
        rings = rings.reshape(FOREARM_RINGS + 1, WRIST_CORNERS)
        a, b = rings[:-1], np.roll(rings[:-1], -1, 1)
        c, d = rings[1:], np.roll(rings[1:], -1, 1)
        tube = np.stack([np.stack([a, b, c], -1), np.stack([b, d, c], -1)], 2).reshape(-1, 3)
        parts += [first + model.faces, first + tube]
    return torch.from_numpy(np.concatenate(parts))


def with_forearms(vertices: Tensor, joints: Tensor, elbows: np.ndarray, loops) -> Tensor:
    """Grow a forearm from each wrist towards its elbow.

    vertices (T, 2, 778, 3), joints (T, 2, 21, 3), elbows (2, 3), all m in one frame, loops the ``wrist_loop`` of each
    hand -> (T, 2 * (778 + rings), 3).
    A wrist bends by LARGEST_BEND at most, so the elbow is a wish.
    """
    arms = []
    for side, corners in enumerate(loops):
        hand, wrist = vertices[:, side].numpy(), joints[:, side, 0].numpy()
        loop = hand[:, list(corners)]  # (T, 16, 3)
        centre = loop.mean(1)
        out = centre - wrist
        knuckles = joints[:, side, [5, 9, 13, 17]].numpy().mean(1)
        out = _unit(_unit(out) + _unit(wrist - knuckles))
        wish = _unit(elbows[side] - wrist)
        axis = np.cross(out, wish)
        angle = np.arctan2(np.linalg.norm(axis, axis=-1), (out * wish).sum(-1))
        axis = _unit(axis)
        offset, place, rings = loop - centre[:, None], centre, []
        for ring in range(1, FOREARM_RINGS + 1):
            bend = (np.minimum(angle, LARGEST_BEND) * min(1.0, ring / 4))[:, None]
            length, swell = (
                FOREARM_LENGTH / FOREARM_RINGS,
                1 + 0.45 * float(_step(np.array(ring / FOREARM_RINGS), 0.1, 1)),
            )
            if ring >= FOREARM_RINGS - 1:  # the elbow is round and closed
                length, swell = (0.014, 1.1) if ring < FOREARM_RINGS else (0.012, 0.0)
            place = place + _spin(out, axis, bend) * length
            rings.append(place[:, None] + swell * _spin(offset, axis[:, None], bend[:, None]))
        arms += [hand, np.concatenate(rings, 1)]
    return torch.from_numpy(np.concatenate(arms, 1)).float()


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.maximum(np.sqrt(_dot(vector, vector)), 1e-9)


def _dot(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(..., 3), (..., 3) -> (..., 1). Several times as fast as a sum over an axis of three."""
    return np.einsum('...c,...c->...', first, second)[..., None]


def _spin(vector: np.ndarray, axis: np.ndarray, angle: np.ndarray) -> np.ndarray:
    along = (vector * axis).sum(-1, keepdims=True)
    return vector * np.cos(angle) + np.cross(axis, vector) * np.sin(angle) + axis * along * (1 - np.cos(angle))


# ---------------------------------------------------------------------------------------------------------------------
# Light
# ---------------------------------------------------------------------------------------------------------------------


UNUSUAL_LIGHT = 0.3  # share of the sequences


class Light(NamedTuple):
    """World axes; linear intensities."""

    direction: np.ndarray  # (3,) unit, towards the lamp
    lamp: np.ndarray  # (3,) BGR
    ambient: np.ndarray  # (3,) BGR
    gloss: float


def sample_light(rng: np.random.Generator, *, varied: bool = True) -> Light:
    """A lamp above the hands in front of the person; ``varied``, it may be anywhere, coloured, dim or glaring."""
    direction = _unit(np.array([rng.uniform(-0.9, 0.9), -rng.uniform(0.2, 1.2), -rng.uniform(0.5, 1.2)]))
    if varied and rng.random() < UNUSUAL_LIGHT:
        tint = 1 + rng.uniform(-0.3, 0.3, 3)
        return Light(
            _unit(rng.normal(size=3)),
            rng.uniform(0.3, 1.7) * tint,
            rng.uniform(0.12, 0.6) * (2 - tint),
            rng.uniform(0.02, 0.25),
        )
    tint = 1 + rng.uniform(-0.10, 0.10, 3)
    return Light(
        direction, rng.uniform(0.65, 1.1) * tint, rng.uniform(0.22, 0.42) * (2 - tint), rng.uniform(0.02, 0.10)
    )


def draw_hands(
    image: np.ndarray, vertices: Tensor, faces: Tensor, intrinsics: np.ndarray, skin: np.ndarray, light: Light
) -> np.ndarray:
    """Render a closed mesh over an image.

    image (H, W, 3) display values float32; vertices (V, 3) m in camera axes; intrinsics (3, 3); skin
    (F, TEXELS**2, 3); light with its direction in camera axes. Only the box that the mesh covers is worked on.
    Returns the image, changed.
    """
    height, width = image.shape[:2]
    points = vertices.double().numpy()
    pixels = points @ intrinsics.T
    pixels = pixels[:, :2] / pixels[:, 2:]
    low = np.floor(pixels.min(0)).astype(int) - 2
    high = np.ceil(pixels.max(0)).astype(int) + 3
    (left, top), (right, bottom) = low.clip(0), np.minimum(high, (width, height))
    if right - left < 2 or bottom - top < 2:
        return image
    moved = intrinsics.copy()
    moved[:2] -= (np.array([[left], [top]]) - 0.5) * intrinsics[2]  # pixel centres lie at 0.5 there
    # The mesh is closed, so faces that look away are never seen; leaving them out halves the work.
    first, second, third = (vertices[faces[:, corner]] for corner in range(3))
    front = (torch.linalg.cross(second - first, third - first) * first).sum(1) < 0
    faces, skin, normals = faces[front], skin[front.numpy()], smooth_normals(vertices[None], faces)[0].numpy()
    fragments = rasterize(vertices[None], faces, torch.from_numpy(moved).float()[None], (bottom - top, right - left))

    # One row for each pixel with skin; flat indices and take are several times as fast as pairs and brackets.
    face = fragments.face.numpy().ravel()
    seen = np.flatnonzero(face >= 0)
    face, weights = face.take(seen), fragments.barycentric.numpy().reshape(-1, 3).take(seen, 0)
    row, column = np.divmod(seen, right - left)
    texel = np.minimum((weights[:, :2] * TEXELS).astype(np.int64), TEXELS - 1)
    albedo = skin.reshape(-1, 3).take((face * TEXELS + texel[:, 0]) * TEXELS + texel[:, 1], 0)

    corners = normals[faces.numpy()].reshape(-1, 9)
    normal = _unit(np.einsum('nk,nkc->nc', weights, corners.take(face, 0).reshape(-1, 3, 3)))
    eye = np.ones((len(seen), 3), np.float32)
    eye[:, 0] = (column + (0.5 - moved[0, 2])) / moved[0, 0]
    eye[:, 1] = (row + (0.5 - moved[1, 2])) / moved[1, 1]
    eye = _unit(eye)

    direction, lamp, ambient = (v.astype(np.float32) for v in (light.direction, light.lamp, light.ambient))
    cosine = (normal @ direction)[:, None]
    open_sky = 1 - _crevices(fragments.depth[0].numpy()).ravel().take(seen)[:, None]
    # Light wraps round skin and comes out red where it fades.
    wrap = np.array([0.08, 0.12, 0.28], np.float32)
    wrapped = ((cosine + wrap) * (lamp / (1 + wrap))).clip(0)
    gloss = _dot(normal, _unit(direction - eye)).clip(0)
    for _ in range(4):  # to the power of 16
        gloss *= gloss
    sky = (0.65 - 0.35 * normal[:, 1:2]) * open_sky
    shaded = albedo * (wrapped * (0.35 + 0.65 * open_sky) + ambient * sky) + np.float32(light.gloss) * gloss * open_sky

    layer = np.zeros((len(fragments.face.view(-1)), 4), np.float32)
    layer[seen] = np.concatenate([np.sqrt(shaded), np.ones_like(shaded[:, :1])], 1)
    # Soft outlines instead of stairs.
    smooth = cv2.GaussianBlur(layer.reshape(bottom - top, right - left, 4), (3, 3), 0.55)
    box = image[top:bottom, left:right]
    box *= 1 - smooth[..., 3:]
    box += smooth[..., :3]
    return image


def _crevices(depth: np.ndarray) -> np.ndarray:
    """Share of the sky that nearer skin hides from each pixel, 0 to 0.85, by its depth behind the local mean."""
    seen_depth = np.stack([depth, depth > 0], -1, dtype=np.float32)
    hidden = np.zeros_like(depth)
    for size, reach, weight in ((7, 0.006, 0.45), (21, 0.018, 0.55)):
        near = cv2.blur(seen_depth, (size, size))
        behind = depth - near[..., 0] / np.maximum(near[..., 1], np.float32(1e-3))
        hidden += weight * (behind / reach).clip(0, 1)
    return np.minimum(hidden, 0.85)


# ---------------------------------------------------------------------------------------------------------------------
# What is behind
# ---------------------------------------------------------------------------------------------------------------------

SHOULDERS = np.array([[0.19, -0.30, 0.36], [-0.19, -0.30, 0.36]])  # m from the hands, world axes: left, right


def _smooth_field(size: tuple[int, int], cells: int, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) in [0, 1]: random colours on a coarse grid, interpolated."""
    coarse = rng.random((max(2, cells * size[0] // 512), max(2, cells * size[1] // 512), 3)).astype(np.float32)
    coarse = 0.7 * coarse.mean(-1, keepdims=True) + 0.3 * coarse  # rooms are mostly grey
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)


def _muted(rng: np.random.Generator, low: float, high: float, *shape: int) -> np.ndarray:
    """Plausible object colours (*shape, 3): a brightness with some tint."""
    grey, tint = rng.uniform(low, high, (*shape, 1)), rng.uniform(low, high, (*shape, 3))
    return (grey + rng.beta(1, 2) * (tint - grey)).astype(np.float32)


def _studio(size, rng):
    """A dark room with many small lamps, as in InterHand2.6M."""
    image = rng.uniform(0.0, 0.06) + 0.06 * _smooth_field(size, 4, rng)
    pitch, shear = rng.uniform(70, 120), rng.uniform(-0.3, 0.3)
    jitter = rng.uniform(-8, 8, (12, 12, 2))
    for i, j in np.ndindex(12, 12):
        x, y = (i - 2) * pitch + shear * j * pitch + jitter[i, j, 0], (j - 2) * pitch + jitter[i, j, 1]
        if 0 <= x < size[1] and 0 <= y < size[0] and rng.random() < 0.55:
            cv2.circle(image, (int(x), int(y)), int(rng.integers(2, 6)), (0.9, 0.95, 0.95), -1, cv2.LINE_AA)
    return cv2.GaussianBlur(image, (0, 0), 1.5)


def _gradient(size, rng):
    angle, ends = rng.uniform(0, 2 * np.pi), _muted(rng, 0.05, 0.9, 2)
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    share = (np.cos(angle) * (x / size[1] - 0.5) + np.sin(angle) * (y / size[0] - 0.5) + 0.7) / 1.4
    return (ends[0] + share[..., None] * (ends[1] - ends[0])).astype(np.float32)


def _blobs(size, rng):
    image = _gradient(size, rng)
    for _ in range(rng.integers(6, 20)):
        centre = (int(rng.integers(size[1])), int(rng.integers(size[0])))
        axes = tuple(int(v) for v in rng.integers(10, 110, 2))
        cv2.ellipse(image, centre, axes, float(rng.uniform(0, 180)), 0, 360, _muted(rng, 0.05, 0.9).tolist(), -1)
    return cv2.GaussianBlur(image, (0, 0), rng.uniform(1, 14))


def _clouds(size, rng):
    image = sum(weight * _smooth_field(size, cells, rng) for cells, weight in ((3, 0.5), (9, 0.3), (40, 0.2)))
    return image * _muted(rng, 0.4, 1.2)


def _stripes(size, rng):
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    ends, image = _muted(rng, 0.05, 0.85, 2), 0
    for _ in range(rng.integers(1, 3)):
        angle, period = rng.uniform(0, np.pi), rng.uniform(14, 90)
        wave = np.sin((np.cos(angle) * x + np.sin(angle) * y) * (2 * np.pi / period))
        image = image + (0.5 + 0.5 * np.clip(3 * wave, -1, 1))[..., None]
    return (ends[0] + np.clip(image / 2, 0, 1) * (ends[1] - ends[0])).astype(np.float32)


def _room(size, rng):
    """Textured patches, such as furniture and walls."""
    image = _clouds(size, rng)
    for _ in range(rng.integers(4, 12)):
        top, left = int(rng.integers(-40, size[0])), int(rng.integers(-40, size[1]))
        high, wide = (int(v) for v in rng.integers(40, 260, 2))
        box = image[max(top, 0) : top + high, max(left, 0) : left + wide]
        if box.size:
            grain = rng.standard_normal(box.shape[:2], dtype=np.float32)[..., None]
            box[:] = _muted(rng, 0.05, 0.85) + np.float32(0.06) * grain
    return cv2.GaussianBlur(image, (0, 0), rng.uniform(0.6, 4))


BACKGROUNDS = ((_studio, 0.40), (_gradient, 0.20), (_blobs, 0.12), (_clouds, 0.12), (_stripes, 0.05), (_room, 0.11))


def sample_background(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Display values (H, W, 3) float32 in [0, 1]."""
    chances = np.array([chance for _, chance in BACKGROUNDS])
    draw = BACKGROUNDS[rng.choice(len(BACKGROUNDS), p=chances / chances.sum())][0]
    image = draw(size, rng)
    return image.astype(np.float32).clip(0, 1)


def draw_torso(image: np.ndarray, project, elbows: np.ndarray, person: Person, rng: np.random.Generator) -> None:
    """Paint chest and upper arms over a background, in place.

    ``project``: (N, 3) m from the hands -> pixels (N, 2); elbows (2, 3) m in those axes too.
    """
    angle = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    rings = [
        np.stack([wide * np.cos(angle), np.full(16, down), 0.40 + 0.11 * np.sin(angle)], 1)
        for down, wide in ((-0.36, 0.08), (-0.31, 0.19), (-0.1, 0.20), (0.2, 0.18), (0.6, 0.19))
    ]
    outline = cv2.convexHull(project(np.concatenate(rings)).astype(np.float32)).astype(np.int32)
    mask = np.zeros(image.shape[:2], np.uint8)
    cv2.fillPoly(mask, [outline], 255, cv2.LINE_AA)
    shoulders, elbows = project(SHOULDERS), project(elbows)
    metre = np.linalg.norm(np.subtract(*project(np.array([[0, 0, 0.3], [0, 1, 0.3]]))))
    for shoulder, elbow in zip(shoulders, elbows):
        start, end = ((int(x), int(y)) for x, y in (shoulder, elbow))
        cv2.line(mask, start, end, 255, max(int(0.10 * metre), 1), cv2.LINE_AA)
    folds = cv2.resize(
        rng.uniform(0.85, 1.15, (7, 7)).astype(np.float32), image.shape[1::-1], interpolation=cv2.INTER_CUBIC
    )[..., None]
    frequency = 2 * np.pi / rng.uniform(22, 50)
    for axis in range(person.pattern):
        bands = np.sin(frequency * np.arange(image.shape[1 - axis])) > 0.3
        folds *= 1 - np.float32(0.35) * bands.reshape(*((1, -1, 1), (-1, 1, 1))[axis])
    share = cv2.GaussianBlur(mask, (5, 5), 1.2)[..., None].astype(np.float32) / 255
    shirt = (folds * np.float32(rng.uniform(0.5, 0.9)) * person.shirt).clip(0, 1)
    image += share * (shirt - image)
