"""A tiny prepared data set in the interchange form: random stand-in hands before a camera, plain pictures of them."""

import pickle
from pathlib import Path

import cv2
import numpy as np
import torch

from manopth import TwoHandLayer
from models.hands import load_hands
from utils.hand import SIDES

FOCAL, DISTANCE = 400.0, 0.8  # pixels of the crop, m
COLOURS = {'left': (60, 110, 190), 'right': (120, 150, 230)}  # BGR
MASK_COLOURS = {'left': (0, 0, 255), 'right': (0, 255, 0)}  # the field's: BGR channel 2 left, channel 1 right


def make_annotations(count: int, *, seed: int = 0) -> list[dict]:
    """``count`` annotations as their pickles hold them; every hand projects into the crop."""
    random = np.random.default_rng(seed)
    rest_wrists = [model.joint_regressor[0] @ model.template for model in load_hands('standin')]
    annotations = []
    for index in range(count):
        camera_rotation = cv2.Rodrigues(random.normal(0, 1, 3))[0]
        camera_translation = random.normal(0, 0.5, 3)
        hands = {}
        for side, sign, rest in zip(SIDES, (1, -1), rest_wrists):
            place = np.array([0.06 * sign, 0, DISTANCE]) + random.normal(0, 0.005, 3)  # of the wrist, camera axes
            hands[side] = {
                'R': cv2.Rodrigues(random.normal(0, 1, 3))[0][None].astype(np.float32),
                'pose': random.normal(0, 0.4, (1, 45)).astype(np.float32),
                'shape': random.normal(0, 0.3, (1, 10)).astype(np.float32),
                'trans': (camera_rotation.T @ (place - camera_translation) - rest)[None].astype(np.float32),
            }
        intrinsics = np.array([[FOCAL, 0, 127 + index % 3], [0, FOCAL * 1.01, 128], [0, 0, 1]])
        annotations.append(
            {
                'inter_idx': index,
                'mano_params': hands,
                'camera': {'R': camera_rotation, 't': camera_translation, 'camera': intrinsics},
                'image': {'id': 1000 + index, 'file_name': f'Capture0/made/cam400262/image{index}.jpg', 'capture': 0},
                'annotation': {'id': 5000 + index, 'image_id': 1000 + index, 'hand_type': 'interacting'},
            }
        )
    return annotations


def hand_outlines(annotations: list[dict]) -> np.ndarray:
    """(N, 2, 778, 2) pixels of the vertices, left hand first."""

    def stack(key: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([[a['mano_params'][side][key][0] for side in SIDES] for a in annotations]))

    vertices = TwoHandLayer(load_hands('standin'))(stack('R'), stack('pose'), stack('shape')).vertices
    world = (vertices + stack('trans')[:, :, None]).numpy()
    pixels = []
    for points, annotation in zip(world, annotations):
        camera = annotation['camera']
        image = (points @ camera['R'].T + camera['t']) @ camera['camera'].T
        pixels.append(image[..., :2] / image[..., 2:])
    return np.array(pixels)


def write_prepared(
    root: Path, split: str, count: int, *, seed: int = 0, absent: dict[int, tuple[str, ...]] | None = None
) -> Path:
    """Write ``root``/``split`` with samples 0 .. ``count`` - 1 and return it. Pictures: each hand's convex hull.

    absent: hands that a sample lacks.
    """
    annotations = make_annotations(count, seed=seed)
    folder = Path(root) / split
    for kind in ('img', 'mask', 'dense', 'anno'):
        (folder / kind).mkdir(parents=True)
    ramp = np.linspace(30, 200, 256).astype(np.uint8)
    for index, (annotation, outlines) in enumerate(zip(annotations, hand_outlines(annotations))):
        image = np.full((256, 256, 3), 90, np.uint8)
        image[..., 0], image[..., 1] = ramp, ramp[:, None]
        mask, dense = np.zeros_like(image), np.zeros_like(image)
        for side, outline in zip(SIDES, outlines):
            if side in (absent or {}).get(index, ()):
                annotation['mano_params'][side] = None
                continue
            hull = cv2.convexHull(outline.round().astype(np.int32))
            cv2.fillConvexPoly(image, hull, COLOURS[side])
            cv2.fillConvexPoly(mask, hull, MASK_COLOURS[side])
            cv2.fillConvexPoly(dense, hull, (200, 40 + 3 * index, 120))
        for kind, picture in (('img', image), ('mask', mask), ('dense', dense)):
            cv2.imwrite(str(folder / kind / f'{index}.jpg'), picture)
        (folder / 'anno' / f'{index}.pkl').write_bytes(pickle.dumps(annotation))
    return folder
