"""A procedurally generated stand-in hand with MANO's array sizes and conventions, for use without the licensed files.

The surface is a smooth union of tapered capsules: the flesh around bones whose lengths come from a short table of
anatomical measures. A mesh of MANO's size is laid out as rings around palm and fingers and relaxed onto that surface.
Skinning weights, joint regressor, shape and pose directions are derived from the skeleton. Nothing here was measured
on, or fitted to, MANO.

Rest axes of the right hand: fingers to -x, palm to -y, thumb to +z. The mesh is built in millimetres, the hand model
is in metres. The left hand is the mirror image in x, vertex by vertex.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from manopth.assets import HandModel, HandPair
from manopth.errors import ManoError
from manopth.tables import CHAIN_PARENTS, FINGERS, NUM_CHAIN_JOINTS, PUBLISHED_LEFT_MIDDLE_TIP, SIDES, TIP_VERTICES

NAME = 'standin-v1'  # change it whenever the arrays change
LONG_FINGERS = FINGERS[1:]
FINGER_CHAINS = {
    'thumb': (13, 14, 15),
    'index': (1, 2, 3),
    'middle': (4, 5, 6),
    'ring': (10, 11, 12),
    'little': (7, 8, 9),
}


Vector = tuple[float, float, float]
Point = Vector | np.ndarray


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector, axis=-1, keepdims=True)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1)


def _smooth_step(x: np.ndarray) -> np.ndarray:
    x = np.clip(x, 0.0, 1.0)
    return x * x * (3 - 2 * x)


# ---------------------------------------------------------------------------------------------------------------------
# Anatomy of the right hand (mm)
# ---------------------------------------------------------------------------------------------------------------------

WRIST = (96.0, 6.0, 6.0)
OPENING_X = 113.0  # the mesh ends here, in the plane across the forearm


@dataclass(frozen=True)
class _Finger:
    """Dimensions of one finger (mm)."""

    base: Vector  # base joint
    directions: tuple[Vector, ...]  # of the three bones, any length
    palmar: Vector  # approximate direction that the pad faces
    lengths: Vector
    half_widths: tuple[float, float, float, float]  # at the three joints and at the centre of the fingertip
    flatness: float  # thickness / width

    @cached_property
    def frames(self) -> np.ndarray:
        """(3, 3, 3): unit vectors of each bone: along it, towards its palmar side, along its flexion axis."""
        along = _unit(np.array(self.directions))
        palmar = np.array(self.palmar)
        palmar = _unit(palmar - (along @ palmar)[:, None] * along)
        return np.stack([along, palmar, np.cross(along, palmar)], 1)

    @cached_property
    def joints(self) -> np.ndarray:
        """(4, 3): the three joints and the tip."""
        steps = self.frames[:, 0] * np.array(self.lengths)[:, None]
        return np.array(self.base) + np.concatenate([np.zeros((1, 3)), steps.cumsum(0)])


def _long_finger(
    base: Vector, degrees_to_thumb: float, lengths: Vector, half_widths: tuple[float, float, float, float]
) -> _Finger:
    a = np.radians(degrees_to_thumb)
    directions = tuple((-np.cos(a), -droop, np.sin(a)) for droop in (0.03, 0.06, 0.09))
    return _Finger(base, directions, (0.0, -1.0, 0.0), lengths, half_widths, 0.95)


ANATOMY = {
    'thumb': _Finger(
        (74.0, -4.0, 27.0),
        ((-0.62, -0.36, 0.70), (-0.76, -0.20, 0.62), (-0.82, -0.14, 0.55)),
        (-0.30, -0.62, -0.72),
        (43.0, 33.0, 28.0),
        (13.0, 11.0, 10.4, 8.4),
        0.92,
    ),
    'index': _long_finger((6.0, 4.0, 26.0), 8.5, (41.0, 25.0, 22.5), (9.6, 8.9, 8.0, 6.7)),
    'middle': _long_finger((1.0, 5.0, 3.0), 1.0, (44.5, 28.0, 23.5), (9.8, 9.1, 8.2, 6.9)),
    'ring': _long_finger((10.0, 4.0, -18.5), -7.5, (41.0, 26.5, 23.5), (9.2, 8.5, 7.7, 6.5)),
    'little': _long_finger((24.0, 0.5, -37.0), -17.0, (33.0, 19.0, 20.5), (8.3, 7.5, 6.8, 5.8)),
}
# Capsules of the palm: (start, end, radius at start, at end). The first four are the metacarpals.
METACARPALS = (
    ((84.0, 5.0, 17.0), (6.0, 2.5, 26.0), 11.0, 10.6),
    ((84.0, 6.0, 8.0), (1.0, 3.5, 3.0), 11.0, 10.6),
    ((84.0, 5.0, -3.0), (10.0, 2.5, -18.5), 11.0, 10.0),
    ((84.0, 3.0, -11.0), (24.0, -1.0, -37.0), 11.0, 9.4),
)
PALM_FLESH = (
    ((80.0, -4.0, 16.0), (48.0, -13.0, 38.0), 11.5, 11.5),  # ball of the thumb
    ((82.0, -2.0, -12.0), (42.0, -6.0, -32.0), 11.5, 10.0),  # ball of the little finger
    ((62.0, -5.0, 28.0), (20.0, -3.5, 32.0), 7.0, 5.0),  # web of the thumb
)
FOREARM = ((150.0, 5.0, 5.0), (86.0, 4.0, 5.0), 29.5, 28.0)
FOREARM_FLATNESS = 0.64
WEB_RADII, WEB_REACH, WEB_DROP = (7.5, 5.5), 9.0, 3.0  # from the midpoint of two finger bases forwards, lowered by this
SEAM_IN_PART, SEAM_BETWEEN_PARTS = 1.2, 3.0  # width of the blend between capsules
# Half the length of the transition from bone to bone at each joint (mm).
JOINT_SEAMS = dict.fromkeys(LONG_FINGERS, (12.0, 7.5, 6.5)) | {'thumb': (16.0, 10.0, 8.0)}
SKIN_SHARING = 4.0  # width of the transition between neighbouring fingers (mm)


@lru_cache(maxsize=1)
def _skeleton() -> tuple[np.ndarray, np.ndarray]:
    """Rest joints (16, 3) m; frames (16, 3, 3): unit vectors along a bone, towards the palm, along its flexion axis."""
    joints, frames = np.zeros((NUM_CHAIN_JOINTS, 3)), np.zeros((NUM_CHAIN_JOINTS, 3, 3))
    joints[0], frames[0] = WRIST, np.diag([-1.0, -1.0, 1.0])
    for name, chain in FINGER_CHAINS.items():
        joints[list(chain)], frames[list(chain)] = ANATOMY[name].joints[:3], ANATOMY[name].frames
    return joints * 1e-3, frames


# ---------------------------------------------------------------------------------------------------------------------
# Surface
# ---------------------------------------------------------------------------------------------------------------------


class _Capsules(NamedTuple):
    start: np.ndarray  # (C, 3)
    end: np.ndarray  # (C, 3)
    radii: np.ndarray  # (C, 2)
    normal: np.ndarray  # (C, 3) direction in which the cross-section is flattened, normal to the axis
    flatness: np.ndarray  # (C,)
    member: np.ndarray  # (C, G) 1 where the capsule belongs to part g


def _flesh() -> _Capsules:
    capsules: list[tuple] = []
    parts: list[int] = []

    def add(
        part: int, start: Point, end: Point, *radii: float, normal: Point = (0.0, -1.0, 0.0), flatness: float = 1.0
    ) -> None:
        capsules.append((start, end, radii, normal, flatness))
        parts.append(part)

    for part, finger in enumerate(ANATOMY[name] for name in FINGERS):
        ends = finger.joints[1:].copy()
        along, palmar, _ = finger.frames[2]
        ball = finger.half_widths[3]
        ends[2] -= ball * along
        for number in range(3):
            add(
                part,
                finger.joints[number],
                ends[number],
                *finger.half_widths[number : number + 2],
                normal=finger.frames[number, 1],
                flatness=finger.flatness,
            )
        pad = finger.joints[3] - 1.55 * ball * along + 0.16 * ball * palmar
        add(part, pad + along, pad - 5 * along, 0.98 * ball, 0.98 * ball, normal=palmar, flatness=finger.flatness)
    for start, end, *radii in METACARPALS:
        add(len(FINGERS), start, end, *radii)
    start, end, *radii = FOREARM
    add(len(FINGERS) + 1, start, end, *radii, flatness=FOREARM_FLATNESS)
    for part, (start, end, *radii) in enumerate(PALM_FLESH, len(FINGERS) + 2):
        add(part, start, end, *radii)
    for first, second in pairwise(ANATOMY[name] for name in LONG_FINGERS):  # the webs between the fingers
        root = (np.array(first.base) + second.base) / 2 - (0.0, WEB_DROP, 0.0)
        front = root + WEB_REACH * _unit(first.frames[0, 0] + second.frames[0, 0])
        add(max(parts) + 1, root, front, *WEB_RADII)
    columns = [np.array(column, float) for column in zip(*capsules, strict=True)]
    return _Capsules._make([*columns, np.eye(max(parts) + 1)[parts]])


def _distance(points: np.ndarray, flesh: _Capsules) -> tuple[np.ndarray, np.ndarray]:
    """Signed distance (N,) of points (N, 3) to the surface, negative inside, and its gradient (N, 3); mm.

    Approximate away from the surface: space is stretched along a capsule's normal until it is round, and minima are
    soft. All terms are products of points and capsules, so no array is larger than (N, C).
    """
    axis = flesh.end - flesh.start
    squared_length = _dot(axis, axis)
    projection = points @ axis.T - _dot(flesh.start, axis)
    along = np.clip(projection / squared_length, 0, 1)
    squared = _dot(points, points)[:, None] - 2 * points @ flesh.start.T + _dot(flesh.start, flesh.start)
    squared += along * (along * squared_length - 2 * projection)
    height = points @ flesh.normal.T - _dot(flesh.start, flesh.normal)
    stretch = flesh.flatness**-2 - 1
    length = np.sqrt(np.maximum(squared + stretch * height * height, 1e-12))
    distance = length - (flesh.radii[:, 0] + along * (flesh.radii[:, 1] - flesh.radii[:, 0]))

    nearest = distance.min(1, keepdims=True)
    inner = np.exp(-np.minimum((distance - nearest) / SEAM_IN_PART, 500))
    inner_sum = inner @ flesh.member
    part_distance = nearest - SEAM_IN_PART * np.log(inner_sum)
    nearest = part_distance.min(1, keepdims=True)
    outer = np.exp(-(part_distance - nearest) / SEAM_BETWEEN_PARTS)
    outer_sum = outer.sum(1, keepdims=True)
    share = inner * ((outer / outer_sum / inner_sum) @ flesh.member.T) / length
    gradient = share.sum(1, keepdims=True) * points - share @ flesh.start - (share * along) @ axis
    gradient += (share * stretch * height) @ flesh.normal
    return (nearest - SEAM_BETWEEN_PARTS * np.log(outer_sum))[:, 0], gradient


# ---------------------------------------------------------------------------------------------------------------------
# Mesh
# ---------------------------------------------------------------------------------------------------------------------

# A ring around a long finger has ten vertices, counted from its thumb side over the back: 0 thumb side, 1-4 back, 5 far
# side, 6-9 palm. Where two fingers meet, vertex 5 of one faces vertex 0 of the other.
FINGER_ANGLES = np.radians([0, 38, 72, 108, 142, 180, 218, 252, 288, 322])
FINGER_RINGS = {'thumb': (13, 12, 12, 11, 10, 10, 10)} | {
    name: (10,) * count for name, count in zip(LONG_FINGERS, (8, 9, 8, 7), strict=True)
}
FINGER_STARTS = {'thumb': 22.0, 'index': 23.0, 'middle': 25.0, 'ring': 23.0, 'little': 18.0}  # mm from the base joint
TIP_RING = 6
# Rings from the wrist opening to the fingers, counted like those of the fingers. Together the counts add up to MANO's
# 778 vertices; with 16 vertices around the opening there are 1538 faces.
PALM_RINGS = (16, 20, 24, 24, 24, 24, 24, 24, 24, 24, 27, 28, 28)
PALM_END = 0.93  # position of the last ring between opening (0) and fingers (1)
# The thumb grows from a hole between these rings (all of one size) and these vertices of them.
HOLE_RINGS, HOLE_CORNERS = (3, 7), (-3, 0)

RELAXATION_ROUNDS, FLIP_ROUNDS, STEPS_PER_ROUND = 9, (1, 4, 7), 5
TIP_PULL = 4.5  # weight of a fingertip in the relaxation: small faces there keep it round


class _Mesh(NamedTuple):
    points: np.ndarray  # (V, 3)
    faces: np.ndarray  # (F, 3)
    finger: np.ndarray  # (V,) finger on whose tube the vertex was laid out, -1 for the palm
    tips: list[int]  # thumb to little
    beside_middle_tip: int


class _Draft:
    """A mesh under construction."""

    def __init__(self) -> None:
        self.points: list[np.ndarray] = []
        self.faces: list[tuple[int, int, int]] = []
        self.finger: list[int] = []

    def add(self, points: np.ndarray, finger: int = -1) -> list[int]:
        first = len(self.points)
        self.points.extend(points)
        self.finger.extend([finger] * len(points))
        return list(range(first, len(self.points)))

    def quad(self, a: int, b: int, c: int, d: int) -> None:
        self.faces += [(a, b, c), (a, c, d)]

    def strip(self, lower: list[int], upper: list[int]) -> None:
        """Triangulate between two closed rings, both counter-clockwise as seen from the upper end."""
        low, up = (np.array([self.points[i] for i in ring]) for ring in (lower, upper))
        gaps = np.linalg.norm((up - up.mean(0)) - (low[0] - low.mean(0)), axis=1)
        start = int(gaps.round(6).argmin())
        upper = upper[start:] + upper[:start]
        i = j = 0
        while i < len(lower) or j < len(upper):
            # Always advance on the ring that lags behind, which distributes the extra triangles evenly.
            if j == len(upper) or (i < len(lower) and (2 * i + 1) * len(upper) <= (2 * j + 1) * len(lower)):
                self.faces.append((lower[i % len(lower)], lower[(i + 1) % len(lower)], upper[j % len(upper)]))
                i += 1
            else:
                self.faces.append((lower[i % len(lower)], upper[(j + 1) % len(upper)], upper[j % len(upper)]))
                j += 1


def _finger_ring(finger: _Finger, station: float, angles: np.ndarray) -> np.ndarray:
    """Ring (N, 3) around a finger, ``station`` mm from its base joint along its bones."""
    starts = np.concatenate([[0.0], np.cumsum(finger.lengths)])
    bone = min(int(np.searchsorted(starts, station, side='right')) - 1, 2)
    along, palmar, across = finger.frames[bone]
    radius = np.interp(station, starts, finger.half_widths)
    section = np.cos(angles)[:, None] * across - finger.flatness * np.sin(angles)[:, None] * palmar
    return finger.joints[bone] + (station - starts[bone]) * along + radius * section


def _grow_finger(draft: _Draft, number: int, root: list[int]) -> tuple[list[int], int]:
    """Grow the rings and the closed tip of a finger from a root ring -> (last ring, tip vertex)."""
    name = FINGERS[number]
    finger, sizes = ANATOMY[name], FINGER_RINGS[name]
    ball = finger.half_widths[3]
    ring = root
    stations = np.linspace(FINGER_STARTS[name], sum(finger.lengths) - 0.85 * ball, len(sizes) + 1)[1:]
    for station, size in zip(stations, sizes, strict=True):
        angles = FINGER_ANGLES if size == len(FINGER_ANGLES) else 2 * np.pi * np.arange(size) / size
        lower, ring = ring, draft.add(_finger_ring(finger, station, angles), number)
        draft.strip(lower, ring)
    angles = 2 * np.pi * (np.arange(TIP_RING) + 0.25) / TIP_RING
    cap = draft.add(_finger_ring(finger, sum(finger.lengths) - 0.28 * ball, angles), number)
    draft.strip(ring, cap)
    (tip,) = draft.add(finger.joints[3:], number)
    draft.faces += [(cap[i], cap[(i + 1) % TIP_RING], tip) for i in range(TIP_RING)]
    return cap, tip


def _layout() -> _Mesh:
    """The mesh before relaxation: final connectivity, approximate shape."""
    draft = _Draft()
    roots = {
        name: draft.add(_finger_ring(ANATOMY[name], FINGER_STARTS[name], FINGER_ANGLES), FINGERS.index(name))
        for name in LONG_FINGERS
    }
    outline = [roots['index'][0]] + [i for name in LONG_FINGERS for i in roots[name][1:5]]
    outline += [roots['little'][5]] + [i for name in reversed(LONG_FINGERS) for i in roots[name][6:]]
    for first, second in pairwise(LONG_FINGERS):
        a, b = roots[first], roots[second]
        draft.quad(a[5], a[4], b[1], b[0])
        draft.quad(a[6], a[5], b[0], b[9])

    distal = np.array([draft.points[i] for i in [*outline, outline[0]]])
    rings = []
    for place, count in zip(np.linspace(0, PALM_END, len(PALM_RINGS)), PALM_RINGS, strict=True):
        phase = np.arange(count) / count
        turn = 2 * np.pi * phase
        _, y, z = FOREARM[0]
        opening = np.stack(
            [
                np.full(count, OPENING_X),
                y + FOREARM_FLATNESS * FOREARM[3] * np.sin(turn),
                z + FOREARM[3] * np.cos(turn),
            ],
            1,
        )
        towards = np.stack([np.interp(phase, np.linspace(0, 1, len(distal)), distal[:, k]) for k in range(3)], 1)
        rings.append(draft.add((1 - place) * opening + place * towards))
    first_ring, last_ring = HOLE_RINGS
    low, high = HOLE_CORNERS
    for number, (lower, upper) in enumerate(zip(rings, [*rings[1:], outline], strict=True)):
        if not first_ring <= number < last_ring:
            draft.strip(lower, upper)
            continue
        for corner in range(high, len(lower) + low):
            draft.quad(lower[corner], lower[corner + 1], upper[corner + 1], upper[corner])

    hole = [rings[number][high] for number in range(first_ring, last_ring)]
    hole += [rings[last_ring][corner] for corner in range(high, low, -1)]
    hole += [rings[number][low] for number in range(last_ring, first_ring, -1)]
    hole += [rings[first_ring][corner] for corner in range(low, high)]
    grown = [_grow_finger(draft, number, roots.get(name, hole)) for number, name in enumerate(FINGERS)]

    faces = np.array(draft.faces)
    used = np.isin(np.arange(len(draft.points)), faces)  # ring vertices inside the hole are not
    compact = used.cumsum() - 1
    beside = grown[FINGERS.index('middle')][0][1]
    return _Mesh(
        np.array(draft.points)[used],
        compact[faces],
        np.array(draft.finger)[used],
        [int(compact[tip]) for _, tip in grown],
        int(compact[beside]),
    )


def _flip_edges(points: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Flip edges whose opposite angles sum to more than pi (Delaunay criterion), unless that folds the surface."""
    faces = faces.copy()
    count = len(points)

    def angle(corner: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        x, y = points[left] - points[corner], points[right] - points[corner]
        return np.arctan2(np.linalg.norm(np.cross(x, y), axis=1), _dot(x, y))

    def normal(i: np.ndarray, j: np.ndarray, k: np.ndarray) -> np.ndarray:
        return _unit(np.cross(points[j] - points[i], points[k] - points[i]))

    for _ in range(12):
        start, stop, opposite = (np.roll(faces, -k, 1).ravel() for k in range(3))  # half-edge e is part of face e // 3
        key, twin_key = start * count + stop, stop * count + start
        order = key.argsort()
        twin = order[np.searchsorted(key, twin_key, sorter=order).clip(max=len(key) - 1)]
        half = np.flatnonzero((key[twin] == twin_key) & (start < stop))
        twin = twin[half]
        a, b, c, d = start[half], stop[half], opposite[half], opposite[twin]
        excess = angle(c, a, b) + angle(d, a, b) - np.pi
        before, after = (normal(a, b, c), normal(b, a, d)), (normal(a, d, c), normal(d, b, c))
        unfolded = (_dot(*after) > 0.4) & (_dot(before[0] + before[1], after[0] + after[1]) > 2)
        edges: set[int] = set(key.tolist())
        touched: set[int] = set()
        for e in np.argsort(-excess, kind='stable'):
            if excess[e] <= 1e-6:
                break
            pair = {half[e] // 3, twin[e] // 3}
            new = {c[e] * count + d[e], d[e] * count + c[e]}
            if unfolded[e] and not pair & touched and not new & edges:
                faces[half[e] // 3], faces[twin[e] // 3] = (a[e], d[e], c[e]), (d[e], b[e], c[e])
                edges |= new
                touched |= pair
        if not touched:
            break
    return faces


def _edges(faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and end vertices of every edge, in both directions."""
    ahead = np.roll(faces, -1, 1)
    return np.concatenate([faces, ahead], None), np.concatenate([ahead, faces], None)


def _relaxed_mesh() -> _Mesh:
    """The rest mesh: on the surface, with triangles of even size."""
    mesh, flesh = _layout(), _flesh()
    points, faces, tips = mesh.points, mesh.faces, mesh.tips
    opening = np.flatnonzero(points[:, 0] == OPENING_X)
    outwards = np.array([ANATOMY[name].frames[2, 0] for name in FINGERS])
    pull = np.ones(len(points))
    pull[tips] = TIP_PULL

    def project(points: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
        for _ in range(steps):
            distance, gradient = _distance(points, flesh)
            step = distance / np.maximum(_dot(gradient, gradient), 0.25)
            points = points - step.clip(-6, 6)[:, None] * gradient
            points[opening, 0] = OPENING_X
        return points, _unit(gradient)

    points, normals = project(points, 4)
    for round_number in range(RELAXATION_ROUNDS):
        start, stop = _edges(faces)
        for _ in range(STEPS_PER_ROUND):
            # Weighting by squared length shortens long edges and evens them out.
            weights = np.zeros((len(points), len(points)))
            weights[start, stop] = ((points[start] - points[stop]) ** 2).sum(1) * pull[stop]
            move = 0.5 * (weights @ points / weights.sum(1, keepdims=True) - points)
            # A tip moves to the farthest point of its finger instead.
            move[tips] = 3 * outwards
            move -= _dot(move, normals)[:, None] * normals
            move[opening] = 0
            points, normals = project(points + move, 1)
        if round_number in FLIP_ROUNDS:
            faces = _flip_edges(points, faces)
    return mesh._replace(points=project(points, 3)[0], faces=faces)


# ---------------------------------------------------------------------------------------------------------------------
# Hand model (m)
# ---------------------------------------------------------------------------------------------------------------------


def _skinning_weights(points: np.ndarray, faces: np.ndarray, finger: np.ndarray) -> np.ndarray:
    """(V, 16): weights shared smoothly between neighbouring fingers and from bone to bone along each finger."""
    joints, frames = _skeleton()
    finger_distances, beyond_root = [], []
    for name in FINGERS:
        chain = FINGER_CHAINS[name]
        stops = [*joints[list(chain)], ANATOMY[name].joints[3] * 1e-3]
        if name != 'thumb':  # the metacarpals keep the thumb from influencing the palm
            stops.insert(0, joints[0])
        finger_distances.append(np.min([_segment_distance(points, a, b) for a, b in pairwise(stops)], 0))
        beyond_root.append((points - joints[chain[0]]) @ frames[chain[0], 0])
    distances = np.array(finger_distances)
    shares = np.exp((distances.min(0) - distances) / (SKIN_SHARING * 1e-3))
    shares /= shares.sum(0)
    for number in range(len(FINGERS)):  # away from its root, the tube of a finger moves with that finger alone
        own = (finger == number) * _smooth_step((beyond_root[number] - 0.020) / 0.012)
        shares = (1 - own) * shares
        shares[number] += own

    weights = np.zeros((len(points), NUM_CHAIN_JOINTS))
    for name, passed in zip(FINGERS, shares, strict=True):
        for part, joint in enumerate(FINGER_CHAINS[name]):
            # Along the bisector of the two bones, so that the transition is perpendicular to the bend.
            bones = [joint] if part == 0 else [CHAIN_PARENTS[joint], joint]
            along = (points - joints[joint]) @ frames[bones, 0].mean(0)
            through = passed * _smooth_step(0.5 + along / (2e-3 * JOINT_SEAMS[name][part]))
            weights[:, joint] += through
            if part > 0:
                weights[:, CHAIN_PARENTS[joint]] -= through
            passed = through
    weights[:, 0] = 1 - weights[:, 1:].sum(1)
    adjacency = np.zeros((len(points), len(points)))
    adjacency[_edges(faces)] = 1
    for _ in range(2):
        weights = 0.5 * (weights + adjacency @ weights / adjacency.sum(1, keepdims=True))
    weights[points[:, 0] == points[:, 0].max()] = np.eye(NUM_CHAIN_JOINTS)[0]  # the opening does not move
    weights[weights < 0.01] = 0
    return weights / weights.sum(1, keepdims=True)


def _segment_distance(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    axis = end - start
    along = np.clip((points - start) @ axis / (axis @ axis), 0, 1)
    return np.linalg.norm(points - start - along[:, None] * axis, axis=1)


def _joint_regressor(points: np.ndarray, finger: np.ndarray) -> np.ndarray:
    """(16, V): weights of the vertices around each joint, such that their weighted mean is the joint."""
    joints, _ = _skeleton()
    regressor = np.zeros((NUM_CHAIN_JOINTS, len(points)))
    owner = {joint: number for number, name in enumerate(FINGERS) for joint in FINGER_CHAINS[name]}
    for joint, place in enumerate(joints):
        reach = 0.014 if joint == 0 else 0.009 if CHAIN_PARENTS[joint] == 0 else 0.007
        distance = np.linalg.norm(points - place, axis=1)
        weight = np.exp(-0.5 * ((distance - distance.min()) / reach) ** 2)
        weight[(weight < 0.02) | ((finger != owner.get(joint, -1)) & (finger >= 0))] = 0
        weight /= weight.sum()
        # The smallest relative change after which the weights sum to 1 and the mean is the joint.
        constraints = np.concatenate([(points - place).T, np.ones((1, len(points)))])
        missing = np.array([0.0, 0.0, 0.0, 1.0]) - constraints @ weight
        regressor[joint] = weight * (1 + np.linalg.solve((constraints * weight) @ constraints.T, missing) @ constraints)
    return regressor


def _shape_directions(points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(V, 3, 10) m per unit of beta: bones grow in length and girth and shift their descendants."""
    joints, frames = _skeleton()

    def grow(
        length: dict[int, float] | None = None,
        girth: dict[int, float] | None = None,
        palm: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ) -> np.ndarray:
        """Relative growth of bones in length and girth, of the palm along x (length), y (thickness), z (width)."""
        shift, stretch = np.zeros((NUM_CHAIN_JOINTS, 3)), np.zeros((NUM_CHAIN_JOINTS, 3, 3))
        stretch[0] = np.diag(palm)
        for joint, parent in enumerate(CHAIN_PARENTS[1:], 1):
            along = np.outer(frames[joint, 0], frames[joint, 0])
            stretch[joint] = (length or {}).get(joint, 0) * along + (girth or {}).get(joint, 0) * (np.eye(3) - along)
            shift[joint] = shift[parent] + stretch[parent] @ (joints[joint] - joints[parent])
        moved = shift + np.einsum('jac,vjc->vja', stretch, points[:, None] - joints)
        return np.einsum('vj,vja->va', weights, moved)

    def each(joints: tuple[int, ...], amount: float) -> dict[int, float]:
        return dict.fromkeys(joints, amount)

    thumb, index, _, ring, little = (FINGER_CHAINS[name] for name in FINGERS)
    long = sum((FINGER_CHAINS[name] for name in LONG_FINGERS), ())
    ends = tuple(chain[2] for chain in FINGER_CHAINS.values())
    return np.stack(
        [
            0.045 * points,  # size
            grow(each(long + thumb, 0.012), each(long + thumb, -0.055), (0.012, -0.05, -0.03)),  # slender
            grow(each(long, 0.045)),  # long fingers
            grow(palm=(-0.005, 0.0, 0.045)),  # broad palm
            grow(each(thumb, 0.05), each(thumb, 0.04)),  # large thumb
            grow(girth=each(long + thumb, 0.03), palm=(0.0, 0.07, 0.0)),  # fleshy
            grow(each(index, 0.03) | each(ring, -0.03)),  # index longer than ring
            grow(each(little, 0.06), each(little, 0.02)),  # large little finger
            grow(each(ends, -0.02), each(ends, -0.08)),  # fine tips
            grow(palm=(0.035, 0.0, 0.0)),  # long palm
        ],
        -1,
    )


def _pose_directions(points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(V, 3, 135): correct the volume loss of linear blend skinning at bent joints.

    Half-way between two bones, blending shrinks the section by cos(t / 2), about 1 - 0.29 (1 - cos t), in the plane of
    the bend. With K the cross product matrix of the axis, <K^2 / 2, R - I> = 1 - cos t and <K / 2, R - I> = sin t.
    """
    joints, frames = _skeleton()
    directions = np.zeros((len(points), 3, 15, 3, 3))
    for chain in FINGER_CHAINS.values():
        for part, joint in enumerate(chain):
            _, palmar, axis = frames[joint]
            beyond = weights[:, chain[part:]].sum(1)
            seam = 4 * beyond * (1 - beyond)
            height, side = (points - joints[joint]) @ palmar, (points - joints[joint]) @ axis
            share = 0.5 - 0.35 * np.tanh(height / 0.005)  # knuckles need most of it, creases little
            swell = seam * np.clip(0.29 * share * height, -0.003, 0.003)
            bulge = seam * np.clip(0.08 * side, -0.001, 0.001) * _smooth_step(0.5 + height / 0.012)
            cross = np.cross(np.eye(3), axis)
            directions[:, :, joint - 1] = np.multiply.outer(
                np.outer(swell, palmar), cross @ cross / 2
            ) + np.multiply.outer(np.outer(bulge, axis), cross / 2)
    return directions.reshape(len(points), 3, 135)


# ---------------------------------------------------------------------------------------------------------------------
# Poses
# ---------------------------------------------------------------------------------------------------------------------

# Plausible ranges (low, high) of the arguments of `pose_from_angles`, rad.
FLEXION_LIMITS = np.radians(
    [[[-15, 35], [-5, 55], [-15, 75]]] + 3 * [[[-20, 90], [0, 105], [0, 70]]] + [[[-20, 90], [0, 100], [0, 70]]]
)
SPREAD_LIMITS = np.radians([[-20, 35], [-8, 18], [-10, 10], [-8, 15], [-8, 25]])
TWIST_LIMITS = np.radians([[-10, 35], [-5, 5], [-5, 5], [-5, 5], [-8, 8]])

RELAXED_FLEXION = ((5, 12, 18), (22, 30, 14), (28, 34, 16), (32, 36, 17), (34, 34, 17))  # degrees
RELAXED_SPREAD, RELAXED_TWIST = (6, -2, 0, -1, 0), (10, 0, 0, 0, 0)


def pose_from_angles(
    flexion: np.ndarray, spread: np.ndarray, *, side: str, twist: np.ndarray | None = None
) -> np.ndarray:
    """Anatomical joint angles -> axis-angle pose (..., 45) rad of the 15 finger joints, in chain order.

    flexion (..., 5, 3) rad, thumb to little, base to tip: positive curls towards the palm.
    spread (..., 5) rad at the base joints: positive moves away from the middle finger; the middle finger itself towards
    the thumb; the thumb away from the index and out of the palm.
    twist (..., 5) rad at the base joints, about the finger's own axis: positive turns the pad towards the thumb, and
    the thumb's pad towards the fingers, as in opposition.

    Base joints apply flexion, then spread about the moved axis, then twist: R = R_f R_s R_t. Each axis is anatomical,
    not that of the coordinate system. Raises ManoError if side is neither 'left' nor 'right'.
    """
    _check_side(side)
    flexion, spread = np.asarray(flexion, float), np.asarray(spread, float)
    twist = np.zeros_like(spread) if twist is None else np.asarray(twist, float)
    pose = np.zeros((*np.broadcast_shapes(flexion.shape[:-2], spread.shape[:-1], twist.shape[:-1]), 15, 3))
    for number, name in enumerate(FINGERS):
        for part, joint in enumerate(FINGER_CHAINS[name]):
            axes = _turning_axes(name, joint)
            turn = _quaternion(axes['flexion'], flexion[..., number, part])
            if part == 0:
                turn = _quaternion_product(turn, _quaternion(axes['spread'], spread[..., number]))
                turn = _quaternion_product(turn, _quaternion(axes['twist'], twist[..., number]))
            pose[..., joint - 1, :] = _axis_angle(turn)
    if side == 'left':
        pose *= (1.0, -1.0, -1.0)
    return pose.reshape(*pose.shape[:-2], 45)


def _turning_axes(name: str, joint: int) -> dict[str, np.ndarray]:
    """Rotation axes of a right-hand joint, signed as in `pose_from_angles`."""
    along, palmar, across = _skeleton()[1][joint]
    return {
        'flexion': across,
        'spread': palmar if name in ('ring', 'little') else -palmar,
        'twist': -along if name == 'thumb' else along,
    }


def _quaternion(axis: np.ndarray, angle: np.ndarray) -> np.ndarray:
    half = 0.5 * angle[..., None]
    return np.concatenate([np.cos(half), np.sin(half) * axis], -1)


def _quaternion_product(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    real = p[..., :1] * q[..., :1] - _dot(p[..., 1:], q[..., 1:])[..., None]
    vector = p[..., :1] * q[..., 1:] + q[..., :1] * p[..., 1:] + np.cross(p[..., 1:], q[..., 1:])
    return np.concatenate([real, vector], -1)


def _axis_angle(quaternion: np.ndarray) -> np.ndarray:
    quaternion = np.where(quaternion[..., :1] < 0, -quaternion, quaternion)
    length = np.linalg.norm(quaternion[..., 1:], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(length, quaternion[..., :1])
    return quaternion[..., 1:] * np.where(length < 1e-9, 2.0, angle / np.maximum(length, 1e-9))


def _pose_components() -> np.ndarray:
    """(45, 45) orthonormal rows: common movements first, then the remainder of each joint's axes (Gram-Schmidt)."""

    def movement(**turns: Sequence[tuple[int, int, float]]) -> np.ndarray:
        """Pose vector of flexion, spread or twist = [(finger, part, amount), ...]."""
        pose = np.zeros((15, 3))
        for kind, entries in turns.items():
            for number, part, amount in entries:
                name = FINGERS[number]
                joint = FINGER_CHAINS[name][part]
                pose[joint - 1] += amount * _turning_axes(name, joint)[kind]
        return pose.ravel()

    def curl(*amounts: float, parts: tuple[float, float, float] = (0.9, 1.0, 0.6)) -> list[tuple[int, int, float]]:
        return [(number, part, amount * parts[part]) for number, amount in enumerate(amounts) for part in range(3)]

    rows = [
        movement(flexion=curl(0.2, 1, 1, 1, 1)),  # to a fist
        movement(flexion=curl(0, 1, 1, 1, 1, parts=(1, -0.7, -0.5))),  # from hooked to bent at the knuckles
        # thumb opposed
        movement(flexion=[(0, 0, 0.6), (0, 1, 0.5), (0, 2, 0.4)], spread=[(0, 0, 0.5)], twist=[(0, 0, 0.5)]),
        movement(flexion=curl(0, -1, -0.1, 0.5, 0.8)),  # pointing
        movement(spread=[(1, 0, 0.8), (2, 0, 0.1), (3, 0, 0.6), (4, 0, 1.0)]),  # fanned
        movement(flexion=curl(0, 0.6, -1, -0.2, 0.6)),
        movement(flexion=[(0, 1, 0.6), (0, 2, 1)]),  # thumb curled
        movement(spread=[(0, 0, 1)]),  # thumb out
        movement(flexion=curl(0, 0.2, -0.6, 1, -0.8)),
    ]
    rows += [movement(flexion=[(number, part, 1)]) for part in (1, 0, 2) for number in (1, 2, 3, 4, 0)]
    rows += [movement(**{kind: [(number, 0, 1)]}) for kind in ('spread', 'twist') for number in (0, 1, 4, 3, 2)]
    rows += [
        movement(**{kind: [(number, part, 1)]})
        for kind in ('spread', 'twist')
        for part in (1, 2)
        for number in range(5)
    ]
    basis = np.zeros((0, 45))
    for row in rows:
        for _ in range(2):  # a single pass leaves rounding errors
            row = row - (basis @ row) @ basis
        if np.linalg.norm(row) > 1e-6:
            basis = np.concatenate([basis, _unit(row)[None]])
    return basis


# ---------------------------------------------------------------------------------------------------------------------
# The two hands
# ---------------------------------------------------------------------------------------------------------------------


def _on_grid(array: np.ndarray, step: float) -> np.ndarray:
    """Round to multiples of a step: rounding errors differ between machines, but the digest must not."""
    return np.round(array / step) * step + 0.0


def _rows_on_grid(array: np.ndarray) -> np.ndarray:
    """``_on_grid`` for rows that sum to 1: a power-of-two step keeps sums exact, the largest entry absorbs the rest."""
    array = _on_grid(array, 2.0**-20)
    largest = array.argmax(1)[:, None]
    rest = np.take_along_axis(array, largest, 1) + 1 - array.sum(1, keepdims=True)
    np.put_along_axis(array, largest, rest, 1)
    return array


def _numbering(mesh: _Mesh) -> np.ndarray:
    """(V,) new index of each vertex: fingertips at MANO's indices, all others in order."""
    fixed = dict(zip(mesh.tips, TIP_VERTICES, strict=True)) | {mesh.beside_middle_tip: PUBLISHED_LEFT_MIDDLE_TIP}
    free = (i for i in range(len(mesh.points)) if i not in fixed.values())
    return np.array([fixed[i] if i in fixed else next(free) for i in range(len(mesh.points))])


@lru_cache(maxsize=1)
def right_hand_arrays() -> dict[str, np.ndarray]:
    """Generate the arrays of the right hand, keyed by the fields of HandModel."""
    mesh = _relaxed_mesh()
    number = _numbering(mesh)
    order = number.argsort()
    points, finger = _on_grid(mesh.points[order] * 1e-3, 1e-8), mesh.finger[order]
    faces = number[mesh.faces]
    faces = np.take_along_axis(faces, (faces.argmin(1)[:, None] + np.arange(3)) % 3, 1)
    faces = faces[np.lexsort(faces.T[::-1])].astype(np.int64)
    weights = _rows_on_grid(_skinning_weights(points, faces, finger))
    relaxed = pose_from_angles(
        np.radians(RELAXED_FLEXION), np.radians(RELAXED_SPREAD), side='right', twist=np.radians(RELAXED_TWIST)
    )
    return {
        'template': points,
        'faces': faces,
        'skinning_weights': weights,
        'joint_regressor': _rows_on_grid(_joint_regressor(points, finger)),
        'shape_dirs': _on_grid(_shape_directions(points, weights), 1e-9),
        'pose_dirs': _on_grid(_pose_directions(points, weights), 1e-9),
        'pose_mean': _on_grid(relaxed, 1e-9),
        'pose_components': _on_grid(_pose_components(), 1e-12),
    }


def _check_side(side: str) -> None:
    if side not in SIDES:
        raise ManoError(f"side is '{side}'; it must be 'left' or 'right'.")


@lru_cache(maxsize=2)
def standin_hand(side: str) -> HandModel:
    """The stand-in hand of one side, 'left' or 'right', with read-only arrays; cached.

    Raises ManoError for any other side.
    """
    _check_side(side)
    arrays = dict(right_hand_arrays())
    if side == 'left':
        mirror, turned = np.array([-1.0, 1.0, 1.0]), np.tile([1.0, -1.0, -1.0], 15)
        arrays['template'] = arrays['template'] * mirror
        arrays['faces'] = arrays['faces'][:, [0, 2, 1]]
        arrays['shape_dirs'] = arrays['shape_dirs'] * mirror[:, None]
        # Their inputs are mirrored, too: R -> M R M.
        arrays['pose_dirs'] = arrays['pose_dirs'] * mirror[:, None] * np.tile(np.outer(mirror, mirror).ravel(), 15)
        arrays['pose_mean'] = arrays['pose_mean'] * turned
        arrays['pose_components'] = arrays['pose_components'] * turned
    for array in arrays.values():
        array.setflags(write=False)
    return HandModel(side=side, name=NAME, **arrays)


def standin_pair() -> HandPair:
    """Both stand-in hands."""
    return HandPair(standin_hand('left'), standin_hand('right'))
