"""Generate synthetic data in InterHand2.6M's layout, so that every tool runs without the real data set.

    python dataset/synthesize.py --save_path data/synthetic_raw --frames 2300 --seed 0

Two hands of a synthetic person interact in front of several cameras. A few per cent of the images are the edge cases of
the real data set: a single hand, an invalid type, an almost black image. --single and --empty add images of a single
hand in all poses and views, and of none: the latter have the hand_type 'none', which InterHand2.6M lacks, and no hand
parameters.
"""

import argparse
import json
import re
import shutil
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from tqdm import tqdm

from dataset.hand_model_record import write_hand_model_record
from dataset.prepare.raw import NO_HANDS, annotation_file
from dataset.prepare.resumable import JOURNAL, Journal, already_complete, growing, publish, refuse_other_settings
from dataset.prepare.split import SYNTHESIZED as RECORD
from dataset.prepare.workers import results_in_order
from dataset.prepared import partial_folder
from dataset.synthetic import camera_faults, clutter
from dataset.synthetic.appearance import (
    SHOULDERS,
    Light,
    Person,
    SkinChart,
    arm_faces,
    chart_skin,
    draw_hands,
    draw_torso,
    paint_person,
    sample_background,
    sample_light,
    with_forearms,
    wrist_loop,
)
from dataset.synthetic.poses import ELBOWS, GRIPS, RATE, HandPath, ease, sample_path, sample_placement_name
from manopth import HandPair, TwoHandLayer
from models.hands import load_hands
from utils.config import add_config_arguments, add_flag, load_config, split_off_pairs
from utils.distributed import torch_threads, usable_cores
from utils.errors import UserError, user_facing
from utils.files import read_json, remove_stale_partials, write_atomically
from utils.hand import INTERHAND_TO_JOINTS, LEFT, NUM_JOINTS, RIGHT, SIDES
from utils.stopping import check_stop, obey_stop_signals

SPLITS = ('train', 'val', 'test')
IMAGES_PER_CAPTURE = {'train': 100, 'val': 30, 'test': 30}
IMAGES_PER_VARIED_CAPTURE = 60
MOST_CAPTURES = {'train': 24, 'val': 6, 'test': 8}  # without the group 'persons', which lifts the limit
# What --without switches off: many and varied people; continuous, interlocked and distant poses; steep, rolled and
# egocentric cameras; lamps and camera faults; objects, adornments and busy backgrounds.
GROUPS = ('persons', 'poses', 'views', 'light', 'clutter')
PLAIN = 0.25  # share of the images without camera faults and objects
VIEWS = 3  # cameras that see one time step
STEPS = 6  # time steps of a sequence
# Of kinds that need many scenes: sides and poses of single hands; nothing moves where there are no hands.
SHORT_STEPS = {'any single': 2, 'empty': 1}
CLIP_RATE = 30  # time steps per second of a clip; sequences have RATE
CLIP_WANDER = 0.04, 0.7  # m, standard deviation of the places that the hands of a clip move to; s from one to the next
CAMERAS, GREY_CAMERAS = 14, 0.12  # of a capture; share of those without colour
EDGE_CASE_SHARES = {'single': 0.03, 'invalid': 0.01, 'black': 0.01}  # of the images of a split
FEWEST_WITH_EDGE_CASES = 8  # a smaller split has no edge cases; from here on at least one of each kind
HANDS_AT = np.array([0.0, 0.0, 1.05])  # m, world: about where the real set's hands are
IMAGE_SIZES = ((512, 334), (334, 512))  # height, width
DARKEST_GREY, BLACKEST_GREY, BLACK_GAIN = 13.0, 5.0, 0.05  # of 255: preparation drops images below a mean of 10
GENERATOR = 2  # increment it when the images or labels of a seed change; 1 drew images half a pixel up and left
HANGING = np.array([0.0, 0.8, 0.02])  # m from the shoulder: where an arm ends whose hand is out of sight
WITH_PENETRATION = ('interacting', 'invalid', 'single')  # kinds of sequences; in others no two hands are seen
TORSO_SHOWN = 0.6  # share of the sequences with somebody's chest behind the hands


class Settings(NamedTuple):
    """Everything that determines the data set."""

    frames: tuple[int, int, int]  # images of train, val, test
    seed: int
    camera_spread: float  # degrees
    source: str
    path: str
    without: tuple[str, ...] = ()  # groups that are switched off, in the order of GROUPS
    clip: int = 0  # time steps of a sequence that one camera sees at CLIP_RATE; 0: STEPS at RATE, seen by VIEWS cameras
    single: float = 0.0  # share of the images with a single hand
    empty: float = 0.0  # share of the images without hands

    @property
    def interval(self) -> int:
        """From time step to time step, in numbers of the frames: of 30 a second, the real data set has every sixth."""
        return 1 if self.clip else round(CLIP_RATE / RATE)

    def has(self, group: str) -> bool:
        assert group in GROUPS
        return group not in self.without


class Sequence(NamedTuple):
    """One task: consecutive time steps of one capture."""

    split: str
    number: int  # within the split
    capture: int
    kind: str  # 'interacting', 'invalid', 'single' (a gesture), 'any single' or 'empty'
    first_frame: int  # its number within the capture
    first_id: int  # of its images, within the split
    views: tuple[int, ...]  # cameras of each time step
    black: tuple[int, ...]  # which of its images are almost black


# ---------------------------------------------------------------------------------------------------------------------
# Plan
# ---------------------------------------------------------------------------------------------------------------------


def plan(settings: Settings) -> list[Sequence]:
    """The sequences to generate. Splits share no captures, and so no subjects and cameras."""
    sequences, next_capture = [], 0
    for split, images in zip(SPLITS, settings.frames):
        if not images:
            continue
        rng = np.random.default_rng([settings.seed, SPLITS.index(split)])
        singles = round(settings.single * images)
        empties = min(round(settings.empty * images), images - singles)
        edge_cases = {
            kind: max(1, round(share * images)) if images >= FEWEST_WITH_EDGE_CASES and not settings.clip else 0
            for kind, share in EDGE_CASE_SHARES.items()
        }
        others = images - singles - empties
        edge_cases['single'] = 0 if settings.single else min(edge_cases['single'], others)
        edge_cases['invalid'] = min(edge_cases['invalid'], others - edge_cases['single'])
        runs = []  # (kind, views of each step)
        for kind, count in (
            ('interacting', others - edge_cases['single'] - edge_cases['invalid']),
            ('single', edge_cases['single']),
            ('invalid', edge_cases['invalid']),
            ('any single', singles),
            ('empty', empties),
        ):
            cameras, length = (1, settings.clip) if settings.clip else (VIEWS, SHORT_STEPS.get(kind, STEPS))
            steps = [min(cameras, count - begin) for begin in range(0, count, cameras)]
            runs += [(kind, tuple(steps[begin : begin + length])) for begin in range(0, len(steps), length)]
        per_capture, most = IMAGES_PER_CAPTURE[split], MOST_CAPTURES[split]
        if settings.has('persons'):
            per_capture, most = min(per_capture, IMAGES_PER_VARIED_CAPTURE), images
        captures = min(len(runs), most, max(2, images // per_capture))
        black = set(
            rng.permutation(sum(sum(views) for kind, views in runs if kind == 'interacting'))[: edge_cases['black']]
        )
        frames, first_id = dict.fromkeys(range(captures), 100), 0
        for number, (kind, views) in enumerate(runs):
            capture = number % captures
            dark = tuple(i for i in range(sum(views)) if first_id + i in black)
            sequences.append(
                Sequence(split, number, next_capture + capture, kind, frames[capture], first_id, views, dark)
            )
            frames[capture] += settings.interval * len(views)
            first_id += sum(views)
        next_capture += captures
    return sequences


# ---------------------------------------------------------------------------------------------------------------------
# Cameras
# ---------------------------------------------------------------------------------------------------------------------


class Camera(NamedTuple):
    """X_camera = rotation (X_world - position), metres."""

    name: str
    rotation: np.ndarray  # (3, 3)
    position: np.ndarray  # (3,) m, world
    focal: np.ndarray  # (2,) pixels
    centre: np.ndarray  # (2,) pixels, the principal point
    size: tuple[int, int]  # height, width
    grey: bool  # the real set's cameras 41xxxx have no colour
    gain: float

    @property
    def intrinsics(self) -> np.ndarray:
        return np.array([[self.focal[0], 0, self.centre[0]], [0, self.focal[1], self.centre[1]], [0, 0, 1]])

    def project(self, points: np.ndarray) -> np.ndarray:
        """World (N, 3) m -> pixels (N, 2)."""
        image = (points - self.position) @ self.rotation.T @ self.intrinsics.T
        return image[:, :2] / image[:, 2:]


# Cumulative shares of the cameras of the group 'views'; the rest stands on the dome.
EGOCENTRIC, STEEP, ROLLED = 0.12, 0.24, 0.36
EYES = np.array([0.0, -0.42, 0.30])  # m from the hands, world axes


def _camera_place(rng: np.random.Generator, spread: float, *, varied: bool) -> tuple[np.ndarray, float]:
    """Offset (3,) m of a camera from the hands, and its roll in degrees."""
    chance = rng.random() if varied else 1.0
    roll = rng.normal(0, 4)
    if chance < EGOCENTRIC:
        return EYES + rng.uniform(-1, 1, 3) * np.array([0.08, 0.10, 0.10]), rng.normal(0, 10)
    azimuth, elevation = rng.uniform(-spread, spread), rng.uniform(-spread / 3, spread / 2)
    if chance < STEEP:
        azimuth, elevation = rng.uniform(-1, 1) * min(180.0, 1.5 * spread), rng.uniform(-35, 75)
    elif chance < ROLLED:
        roll = rng.normal(0, 40)
    azimuth, elevation = np.radians([azimuth, elevation])
    away = np.array([np.sin(azimuth) * np.cos(elevation), -np.sin(elevation), -np.cos(azimuth) * np.cos(elevation)])
    return rng.uniform(0.92, 1.2) * away, roll


def sample_camera(rng: np.random.Generator, spread: float, taken: set[str], *, varied: bool = True) -> Camera:
    """A camera that looks at the hands.

    Most stand on a dome in front of the person: azimuth within +-``spread`` degrees, elevation from a third of it below
    to half of it above. If ``varied``, some are steep or further round, some are rolled, and some are at the person's
    eyes, with a focal length that shows the hands as large as the others do.
    """
    offset, roll_degrees = _camera_place(rng, spread, varied=varied)
    position = HANDS_AT + offset
    forward = HANDS_AT + rng.uniform(-0.01, 0.01, 3) - position
    forward /= np.linalg.norm(forward)
    right = np.cross([0.0, 1.0, 0.0], forward)
    right /= np.linalg.norm(right)
    roll = np.radians(roll_degrees)
    down = np.cross(forward, right)
    right, down = np.cos(roll) * right + np.sin(roll) * down, np.cos(roll) * down - np.sin(roll) * right
    size = IMAGE_SIZES[int(rng.random() < 0.5)]
    focal = rng.uniform(1200, 1330) * min(1.0, float(np.linalg.norm(offset)) / 0.92)
    grey = bool(rng.random() < GREY_CAMERAS)
    name = None
    while name is None or name in taken:
        name = f'{41 if grey else 40}{rng.integers(10000):04d}'
    taken.add(name)
    return Camera(
        name,
        np.stack([right, down, forward]),
        position,
        focal + rng.uniform(-1, 1, 2),
        np.array(size[::-1]) / 2 + rng.uniform(-12, 12, 2),
        size,
        grey,
        rng.uniform(0.9, 1.1),
    )


@lru_cache(maxsize=64)
def capture_cameras(settings: Settings, capture: int) -> tuple[Camera, ...]:
    """The cameras of one capture."""
    rng = np.random.default_rng([settings.seed, 3, capture])
    taken: set[str] = set()
    return tuple(
        sample_camera(rng, settings.camera_spread, taken, varied=settings.has('views')) for _ in range(CAMERAS)
    )


def choose_cameras(cameras: tuple[Camera, ...], points: np.ndarray, count: int, rng: np.random.Generator) -> list[int]:
    """Cameras that see a time step: at random, those that see all ``points`` (N, 3) before the others."""
    share_outside = []
    for camera in cameras:
        pixels = camera.project(points)
        share_outside.append(((pixels < 4) | (pixels > np.array(camera.size[::-1]) - 4)).any(1).mean())
    order = rng.permutation(len(cameras))
    return sorted(order[np.argsort(np.array(share_outside)[order], kind='stable')[:count]].tolist())


# ---------------------------------------------------------------------------------------------------------------------
# One sequence
# ---------------------------------------------------------------------------------------------------------------------


class Actors(NamedTuple):
    """The hands that every sequence shares."""

    models: HandPair
    layer: TwoHandLayer
    charts: tuple[SkinChart, SkinChart]
    loops: tuple[tuple[int, ...], tuple[int, ...]]  # round the wrists
    faces: torch.Tensor  # of hands and forearms


@lru_cache(maxsize=1)
def _actors(source: str, path: str) -> Actors:
    models = load_hands(source, path)
    charts = chart_skin(models.left), chart_skin(models.right)
    return Actors(
        models, TwoHandLayer(models), charts, (wrist_loop(models.left), wrist_loop(models.right)), arm_faces(models)
    )


@lru_cache(maxsize=32)
def _person(settings: Settings, capture: int) -> tuple[Person, torch.Tensor]:
    """Appearance and shape (2, 10) of the capture's subject."""
    rng = np.random.default_rng([settings.seed, 4, capture])
    varied = settings.has('persons')
    deviation, limit = (1.0, 2.2) if varied else (0.7, 1.6)
    betas = (deviation * rng.normal(size=10)).clip(-limit, limit).round(4)
    charts = _actors(settings.source, settings.path).charts
    person = paint_person(charts, rng, varied=varied, adorned=settings.has('clutter'))
    return person, torch.from_numpy(betas).float().expand(2, 10)


class Scene(NamedTuple):
    """A sequence before rendering; V vertices and F faces of the visible arms. World axes, metres."""

    name: str
    hand_type: str
    shown: tuple[int, ...]  # LEFT, RIGHT, both or none
    path: HandPath
    mesh: torch.Tensor  # (T, V, 3)
    faces: torch.Tensor  # (F, 3)
    skin: np.ndarray  # (F, texels, 3)
    light: Light
    elbows: np.ndarray  # (T, 2, 3)
    torso: bool  # whether the person's chest is behind the hands
    cluttered: float  # share of the backgrounds with clutter


def set_scene(settings: Settings, sequence: Sequence, rng: np.random.Generator) -> Scene:
    """Draw the motion and light of a sequence."""
    actors = _actors(settings.source, settings.path)
    person, betas = _person(settings, sequence.capture)
    single, empty, steps = sequence.kind in ('single', 'any single'), sequence.kind == 'empty', len(sequence.views)
    any_placement = sequence.kind in ('interacting', 'any single')
    placement = sample_placement_name(rng, varied=settings.has('poses')) if any_placement else 'gesture'
    while settings.clip and placement in GRIPS:  # in which fingers open and close at once
        placement = sample_placement_name(rng, varied=settings.has('poses'))
    shown: tuple[int, ...] = (int(rng.integers(2)),) if single else () if empty else (LEFT, RIGHT)
    hand_type = SIDES[shown[0]] if single else NO_HANDS if empty else 'interacting'
    rate = CLIP_RATE if settings.clip else RATE
    path = sample_path(steps, placement, rng, actors.models, betas, varied=settings.has('poses'), rate=rate)

    # The middle of the hands wanders a little about one place of the world.
    if settings.clip:
        wander = _smooth_wander(steps, rng)
    else:
        wander = np.cumsum(rng.normal(0, 0.004, (steps, 3)), 0) + rng.normal(0, 0.006, 3)
    points = path.vertices[:, list(shown or (LEFT, RIGHT))].flatten(1, 2)
    middle = (points.amin(1) + points.amax(1)) / 2
    shift = (torch.from_numpy(HANDS_AT + wander).float() - middle)[:, None, None]
    path = path._replace(vertices=path.vertices + shift, joints=path.joints + shift)

    arms = with_forearms(path.vertices, path.joints, HANDS_AT + ELBOWS + rng.normal(0, 0.04, (2, 3)), actors.loops)
    both = arms.unflatten(1, (2, -1))
    mesh, faces, skin = arms, actors.faces, person.skin
    if single:
        mesh, half = both[:, shown[0]], len(faces) // 2
        faces, skin = faces.unflatten(0, (2, half))[shown[0]] - shown[0] * mesh.shape[1], skin[shown[0] * half :][:half]
    elbows = both[:, :, -1].double().numpy()
    if sequence.kind in ('any single', 'empty'):
        for side in {LEFT, RIGHT} - set(shown):  # the arm hangs down, out of sight from the elbow on
            elbows[:, side] = HANDS_AT + SHOULDERS[side] + HANGING
    what = hand_type if empty else f'{hand_type}_{placement}' if single else f'dh_{placement}'
    return Scene(
        f'{sequence.number:04d}_{what}',
        hand_type,
        shown,
        path,
        mesh,
        faces,
        skin,
        sample_light(rng, varied=settings.has('light')),
        elbows,
        bool(rng.random() < TORSO_SHOWN),
        clutter.CLUTTERED_WITHOUT_HANDS if empty else clutter.CLUTTERED,
    )


def _smooth_wander(steps: int, rng: np.random.Generator) -> np.ndarray:
    """(steps, 3) m: from one random place to the next."""
    deviation, seconds = CLIP_WANDER
    at = np.arange(steps) / (seconds * CLIP_RATE)
    before = at.astype(int)
    places, share = rng.normal(0, deviation, (before[-1] + 2, 3)), ease(at - before)[:, None]
    return (1 - share) * places[before] + share * places[before + 1]


def paint_backdrop(
    scene: Scene, step: int, camera: Camera, person: Person, rng: np.random.Generator, *, cluttered: bool
) -> np.ndarray:
    """A camera's background, display values (H, W, 3)."""
    image = sample_background(camera.size, rng)
    if cluttered and rng.random() < scene.cluttered:
        clutter.clutter_background(image, rng)
    if scene.torso and camera.rotation[2, 2] > 0.2:  # from behind, the chest would hide the hands
        draw_torso(image, lambda points: camera.project(HANDS_AT + points), scene.elbows[step] - HANDS_AT, person, rng)
    return image


def photograph(scene: Scene, step: int, camera: Camera, backdrop: np.ndarray) -> np.ndarray:
    """Render the hands, if any, over a copy of their background, display values (H, W, 3)."""
    if not scene.shown:
        return backdrop.copy()
    rotation, position = torch.from_numpy(camera.rotation).float(), torch.from_numpy(camera.position).float()
    light = scene.light._replace(direction=camera.rotation @ scene.light.direction)
    return draw_hands(
        backdrop.copy(), (scene.mesh[step] - position) @ rotation.T, scene.faces, camera.intrinsics, scene.skin, light
    )


@torch_threads(1)  # sums must not depend on the machine; several processes are faster anyway
@torch.no_grad()
def make_sequence(settings: Settings, sequence: Sequence, root: Path) -> dict:
    """Generate one sequence: write its images under ``root`` -> its part of the annotation files."""
    rng = np.random.default_rng([settings.seed, 5, SPLITS.index(sequence.split), sequence.number])
    scene = set_scene(settings, sequence, rng)
    layer, (person, betas) = _actors(settings.source, settings.path).layer, _person(settings, sequence.capture)
    cameras, backdrops = capture_cameras(settings, sequence.capture), {}
    type_valid = sequence.kind != 'invalid'
    # Objects and camera faults are drawn anew for each image: in a clip they would flicker.
    plain_share = 1.0 if settings.clip else PLAIN
    clip_cameras = None
    record: dict[str, Any] = {
        'capture': sequence.capture,
        'images': [],
        'annotations': [],
        'joint_3d': {},
        'mano': {},
        'penetration_mm': [
            round(1000 * float(depth), 3) for depth in scene.path.penetration if sequence.kind in WITH_PENETRATION
        ],
    }
    for step, views in enumerate(sequence.views):
        frame = sequence.first_frame + settings.interval * step
        joints, joint_valid = world_joints(scene.path, step, scene.shown)
        record['joint_3d'][str(frame)] = {
            'world_coord': joints.tolist(),
            'joint_valid': joint_valid.tolist(),
            'hand_type': scene.hand_type,
            'hand_type_valid': type_valid,
        }
        record['mano'][str(frame)] = {
            SIDES[side]: mano_annotation(scene.path, step, side, betas, layer) if side in scene.shown else None
            for side in (RIGHT, LEFT)
        }
        # Where hands are; without any, where they would be.
        points = scene.path.vertices[step, list(scene.shown or (LEFT, RIGHT))].flatten(0, 1).numpy()
        if settings.clip and clip_cameras is None:
            clip_cameras = choose_cameras(cameras, points, views, rng)
        for index in clip_cameras or choose_cameras(cameras, points, views, rng):
            camera, number = cameras[index], len(record['images'])
            if index not in backdrops:
                backdrops[index] = paint_backdrop(scene, step, camera, person, rng, cluttered=settings.has('clutter'))
            backdrop, plain = backdrops[index], rng.random() < plain_share
            objects = not plain and settings.has('clutter')
            if objects and rng.random() < clutter.HELD:
                backdrop = backdrop.copy()
                clutter.draw_objects(backdrop, camera.project(points), rng)
            image = photograph(scene, step, camera, backdrop)
            if objects and rng.random() < clutter.IN_FRONT:
                clutter.draw_objects(image, camera.project(points), rng)
            faulty = not plain and settings.has('light')
            file_name = f'Capture{sequence.capture}/{scene.name}/cam{camera.name}/image{frame}.jpg'
            write_image(
                root / 'images' / sequence.split / file_name,
                develop(image, camera, black=number in sequence.black, faulty=faulty, rng=rng),
                quality=camera_faults.jpeg_quality(rng) if faulty else camera_faults.JPEG_QUALITY,
            )
            record['images'].append(
                {
                    'id': sequence.first_id + number,
                    'file_name': file_name,
                    'width': camera.size[1],
                    'height': camera.size[0],
                    'capture': sequence.capture,
                    'subject': sequence.capture,
                    'seq_name': scene.name,
                    'camera': camera.name,
                    'frame_idx': frame,
                }
            )
            record['annotations'].append(
                {
                    'id': sequence.first_id + number,
                    'image_id': sequence.first_id + number,
                    'bbox': box_of(camera.project(points), camera.size) if scene.shown else [0.0] * 4,
                    'joint_valid': joint_valid.astype(int).tolist(),
                    'hand_type': scene.hand_type,
                    'hand_type_valid': int(type_valid),
                }
            )
    return record


def write_image(path: Path, image: np.ndarray, *, quality: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not cv2.imwrite, which does not notice a full disk.
    path.write_bytes(cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes())


def world_joints(path: HandPath, step: int, shown: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(42, 3) mm in the real set's order, right hand first, each finger from its tip, 1.0 where there is no hand; and
    (42, 1) bool which of them are valid."""
    joints, valid = np.ones((2 * NUM_JOINTS, 3)), np.zeros((2 * NUM_JOINTS, 1), bool)
    for side in shown:
        rows = np.array(INTERHAND_TO_JOINTS) + (NUM_JOINTS if side == LEFT else 0)
        joints[rows] = 1000 * path.joints[step, side].double().numpy()
        valid[rows] = True
    return joints.round(4), valid


def mano_annotation(path: HandPath, step: int, side: int, betas: torch.Tensor, layer: TwoHandLayer) -> dict:
    """pose (48) relative to the mean pose, shape (10), trans (3) m: turned about the wrist, then moved."""
    relative = path.pose[step, side] - layer.pose_mean[side]
    rest_wrist = layer.rest_joints[side, 0] + betas[side] @ layer.joint_shape_dirs[side, :, :3]
    trans = path.joints[step, side, 0] - rest_wrist
    return {
        'pose': torch.cat([path.root[step, side], relative]).double().numpy().round(7).tolist(),
        'shape': betas[side].double().numpy().round(4).tolist(),
        'trans': trans.double().numpy().round(7).tolist(),
    }


def box_of(pixels: np.ndarray, size: tuple[int, int]) -> list[float]:
    """[x, y, w, h] of pixels (N, 2), clipped to the image."""
    limits = np.array(size[::-1]) - 1.0
    low, high = pixels.min(0).clip(0, limits), pixels.max(0).clip(0, limits)
    return [*low.round(3).tolist(), *(high - low).round(3).tolist()]


@lru_cache(maxsize=1)
def _grain() -> np.ndarray:
    return (1.6 * np.random.default_rng(0).standard_normal((640, 640, 1))).astype(np.float32)


def develop(image: np.ndarray, camera: Camera, *, black: bool, faulty: bool, rng: np.random.Generator) -> np.ndarray:
    """Display values (H, W, 3) -> uint8 BGR as this camera stores it."""
    if faulty:
        image = camera_faults.blur(camera_faults.expose(image, rng), rng)
    values: np.ndarray = np.float32(255 * camera.gain) * image
    top, left = rng.integers(0, 640 - max(image.shape[:2]), 2)
    strength = 1 + (camera_faults.noise_level(rng) / 1.6 if faulty else 0.0)
    values += np.float32(strength) * _grain()[top : top + image.shape[0], left : left + image.shape[1]]
    grey = cv2.cvtColor(values, cv2.COLOR_BGR2GRAY)
    if camera.grey:
        values = cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR)
    mean = float(grey.mean())
    if black:
        values *= min(BLACK_GAIN, BLACKEST_GREY / max(mean, 1.0))
    elif mean < DARKEST_GREY + 2:
        values += DARKEST_GREY + 2 - mean
    return values.clip(0, 255).round().astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# The whole set
# ---------------------------------------------------------------------------------------------------------------------


def write_annotations(root: Path, split: str, records: list[dict], settings: Settings) -> None:
    """Write the four annotation files of a split."""
    (root / 'annotations' / split).mkdir(parents=True, exist_ok=True)
    data: dict[str, list] = {'images': [], 'annotations': []}
    cameras: dict[str, dict] = {}
    joints: dict[str, dict] = {}
    mano: dict[str, dict] = {}
    for record in records:
        capture = str(record['capture'])
        data['images'] += record['images']
        data['annotations'] += record['annotations']
        joints.setdefault(capture, {}).update(record['joint_3d'])
        mano.setdefault(capture, {}).update(record['mano'])
        cameras[capture] = {'campos': {}, 'camrot': {}, 'focal': {}, 'princpt': {}}
        for camera in capture_cameras(settings, record['capture']):
            cameras[capture]['campos'][camera.name] = (1000 * camera.position).tolist()
            cameras[capture]['camrot'][camera.name] = camera.rotation.tolist()
            cameras[capture]['focal'][camera.name] = camera.focal.tolist()
            cameras[capture]['princpt'][camera.name] = camera.centre.tolist()
    for name, content in (('data', data), ('camera', cameras), ('joint_3d', joints), ('MANO_NeuralAnnot', mano)):
        write_atomically(annotation_file(root, split, name), json.dumps(content).encode())


def synthesize(save_path: Path, settings: Settings, *, workers: int) -> list[dict]:
    """Generate the whole tree at ``save_path``; it does not depend on ``workers``. Returns the sequences' records.

    It grows in ``<save_path>.partial``; a second call with the same settings resumes. A complete data set with the same
    settings stays as it is, and the records are empty. Raises UserError if ``save_path`` is in use or holds anything
    else, or if the unfinished folder has other settings.
    """
    save_path = save_path.resolve()
    models = load_hands(settings.source, settings.path)
    about = settings._asdict() | {'hand_model': models.identity, 'generator': GENERATOR}
    about = json.loads(json.dumps(about))  # as files hold it
    about.pop('path')
    for name in ('clip', 'single', 'empty'):
        if not about[name]:
            about.pop(name)  # data sets of earlier versions do not record it
    with growing(save_path):
        if save_path.is_dir() and not any(save_path.iterdir()):
            save_path.rmdir()
        if already_complete(save_path, about, recorded=_recorded_settings):
            (save_path / JOURNAL).unlink(missing_ok=True)
            return []
        sequences, unfinished = plan(settings), partial_folder(save_path)
        if (unfinished / 'settings.json').exists():
            raise UserError(f'{unfinished} was begun by another version of this program. Remove it and rerun.')
        with Journal(unfinished / JOURNAL) as journal:
            if not journal.chunks:
                shutil.rmtree(unfinished / 'images', ignore_errors=True)  # perhaps of other settings
                journal.begin(about)
            refuse_other_settings(unfinished, journal.header, about)
            _generate(journal, settings, sequences, workers)
        records = [chunk['record'] for chunk in journal.chunks]
        for split, planned in zip(SPLITS, settings.frames):
            own = [record for record, sequence in zip(records, sequences) if sequence.split == split]
            if own:
                _refuse_other_images(unfinished, split, own, planned)
                write_annotations(unfinished, split, own, settings)
        write_hand_model_record(unfinished, models)
        remove_stale_partials(unfinished / 'annotations', recursive=True)
        publish(save_path, RECORD, about)
        (save_path / JOURNAL).unlink()
    return records


def _generate(journal: Journal, settings: Settings, sequences: list[Sequence], workers: int) -> None:
    """Generate the sequences that the journal lacks."""
    unfinished, done = journal.path.parent, len(journal.chunks)
    for number, chunk in enumerate(journal.chunks):
        if number >= len(sequences) or chunk['sequence'] != _identity(sequences[number]):
            raise journal.contradiction(number)
    pending = sequences[done:]
    tasks = [(settings, sequence, unfinished) for sequence in pending]
    total, left = sum(settings.frames), sum(sum(sequence.views) for sequence in pending)
    with (
        closing(results_in_order(_make_sequence, tasks, workers=workers, ahead=4)) as records,
        tqdm(total=total, initial=total - left, unit='img', desc='synthesize') as progress,
    ):
        for sequence, record in zip(pending, records):
            journal.note({'sequence': _identity(sequence), 'record': record})
            progress.update(len(record['images']))
            check_stop()


def _make_sequence(task: tuple[Settings, Sequence, Path]) -> dict:
    return make_sequence(*task)


def _identity(sequence: Sequence) -> list:
    """Of a sequence in the journal: its split, number, and range of image ids."""
    return [sequence.split, sequence.number, sequence.first_id, sequence.first_id + sum(sequence.views)]


def _refuse_other_images(unfinished: Path, split: str, records: list[dict], planned: int) -> None:
    """Raises UserError unless exactly the planned images of a split exist."""
    names = [image['file_name'] for record in records for image in record['images']]
    folder = unfinished / 'images' / split
    found = {path.relative_to(folder).as_posix() for path in folder.rglob('*.jpg')}
    if not len(names) == len(set(names)) == planned or found != set(names):
        raise UserError(
            f'{folder} holds {len(found):,} images, of which {len(found & set(names)):,} are among the {planned:,} '
            f'planned. Nothing was published. Remove {unfinished} and rerun the command.'
        )


def _recorded_settings(folder: Path) -> dict:
    """The settings of a complete data set. Raises UserError if the folder holds anything else."""
    if not (folder / RECORD).is_file():
        raise UserError(f'{folder} exists and is not empty. Choose another --save_path or remove it.')
    recorded = read_json(folder / RECORD)
    return recorded if isinstance(recorded, dict) else {}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--save_path', required=True, type=Path, help='output folder, which must be empty or missing')
    parser.add_argument(
        '--frames',
        nargs='+',
        metavar='N',
        default=['2000', '100', '200'],
        help='number of images: N in all, 80 %% of them for training, or TRAIN VAL TEST, where 0 omits a '
        'split (default: 2000 100 200)',
    )
    parser.add_argument(
        '--seed',
        type=int,
        default=0,
        help='equal seeds yield equal data, and share people and cameras between separate commands (default: 0)',
    )
    add_flag(
        parser,
        '--camera-spread',
        type=float,
        default=60.0,
        metavar='DEGREES',
        help='azimuth range of the cameras: within +-DEGREES of the front, 0 to 180; a larger range is harder '
        'to learn (default: 60)',
    )
    parser.add_argument(
        '--without',
        nargs='+',
        default=[],
        metavar='GROUP',
        help=f'switch groups of variation off, for ablations: {", ".join(GROUPS)} (default: none)',
    )
    parser.add_argument(
        '--clip',
        type=int,
        default=0,
        metavar='STEPS',
        help=f'generate videos instead: STEPS consecutive frames of each sequence at {CLIP_RATE} frames/s, seen by one '
        'camera; every image shows two hands unless --single or --empty is given',
    )
    parser.add_argument(
        '--single',
        type=float,
        default=0.0,
        metavar='SHARE',
        help='share of the images with a single hand, in all poses and views (default: 0; a few are gestures)',
    )
    parser.add_argument(
        '--empty',
        type=float,
        default=0.0,
        metavar='SHARE',
        help="share of the images without hands, whose hand_type is 'none' (default: 0)",
    )
    parser.add_argument('--workers', type=int, default=usable_cores(), help='processes (default: one per core)')
    add_config_arguments(parser)
    args = parser.parse_intermixed_args(arguments)
    words, keys = split_off_pairs(args.frames)
    args.frames, args.opts = frames_of_splits(words), keys + args.opts
    groups, more_keys = split_off_pairs(args.without)
    args.without, args.opts = known_groups(groups), more_keys + args.opts
    return args


def known_groups(words: list[str]) -> tuple[str, ...]:
    """The groups of --without, in the order of GROUPS. Raises UserError for an unknown one."""
    for word in words:
        if word not in GROUPS:
            raise UserError(f'--without has the unknown group {word!r}; choose among {", ".join(GROUPS)}.')
    return tuple(group for group in GROUPS if group in words)


def frames_of_splits(words: list[str]) -> tuple[int, int, int]:
    """'N' or 'TRAIN VAL TEST' as typed -> images per split. Raises UserError for anything else."""
    counts = [int(word) for word in words if re.fullmatch(r'-?\d+', word)]
    if len(counts) != len(words) or len(counts) not in (1, 3) or min(counts) < 0 or not sum(counts):
        raise UserError(
            f'--frames is {" ".join(words)}; pass one count, or three for train, val and test, at least one above 0.'
        )
    if len(counts) == 3:
        train, val, test = counts
        return train, val, test
    tenth = counts[0] // 10
    return counts[0] - 2 * tenth, tenth, tenth


@user_facing
def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.seed < 0:
        raise UserError(f'--seed is {args.seed}; it must be 0 or more.')
    if not 0 <= args.camera_spread <= 180:
        raise UserError(f'--camera-spread is {args.camera_spread:g}; it must be between 0 and 180 degrees.')
    if args.clip < 0:
        raise UserError(f'--clip is {args.clip}; it must be a number of time steps, or 0 for none.')
    for name in ('single', 'empty'):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f'--{name} is {getattr(args, name):g}; it must be a share between 0 and 1.')
    if args.single + args.empty > 1:
        raise UserError(
            f'--single {args.single:g} and --empty {args.empty:g} add up to more than 1. Both are shares of all images.'
        )
    if args.workers < 1:
        raise UserError(f'--workers is {args.workers}; it must be at least 1.')
    cfg = load_config(args.cfg, args.opts, base={'MANO': {'SOURCE': 'standin'}})  # synthetic data need no licensed file
    settings = Settings(
        args.frames,
        args.seed,
        args.camera_spread,
        cfg.MANO.SOURCE,
        cfg.MANO.PATH,
        args.without,
        args.clip,
        args.single,
        args.empty,
    )
    with obey_stop_signals():
        records = synthesize(args.save_path, settings, workers=args.workers)
    if not records:
        return
    intersections = ''
    if depths := [depth for record in records for depth in record['penetration_mm']]:
        intersections = f'; hands intersect by {np.mean(depths):.1f} mm on average, {max(depths):.1f} mm at most'
    print(f'{sum(args.frames)} images in {args.save_path}{intersections}.')
