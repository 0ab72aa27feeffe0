"""A tiny data set in InterHand2.6M's own layout, made of numbers: random fits and noise pictures."""

import json
from pathlib import Path

import cv2
import numpy as np

CAMERAS = ('400262', '400263')
SIZES = {'400262': (512, 334), '400263': (334, 512)}  # width, height


def turn(axis_angle) -> np.ndarray:
    return cv2.Rodrigues(np.asarray(axis_angle, dtype=np.float64))[0]


def make_raw_tree(root: Path, *, steps: int = 4, split: str = 'train', seed: int = 0) -> dict[str, dict]:
    """Write ``steps`` time steps seen by two cameras -> the four files' contents, for a test to spoil and rewrite."""
    random = np.random.default_rng(seed)
    images, annotations, fits, joints = [], [], {}, {}
    cameras = {'campos': {}, 'camrot': {}, 'focal': {}, 'princpt': {}}
    for number, camera in enumerate(CAMERAS):
        rotation = turn([0.1, 0.4 * number, 0.2])
        position = -rotation.T @ [20.0, -15.0, 800.0 + 100 * number]
        cameras['camrot'][camera], cameras['campos'][camera] = rotation.tolist(), position.tolist()
        cameras['focal'][camera] = [1200.0, 1210.0]
        cameras['princpt'][camera] = [SIZES[camera][0] / 2, SIZES[camera][1] / 2]
    for step in range(steps):
        frame = 100 + 3 * step
        fits[str(frame)] = {
            side: {
                'pose': np.concatenate([random.normal(0, 0.3, 3), random.normal(0, 0.1, 45)]).tolist(),
                'shape': random.normal(0, 0.3, 10).tolist(),
                'trans': (np.array([shift, 0, 0]) + random.normal(0, 0.01, 3)).tolist(),
            }
            for side, shift in (('left', 0.02), ('right', -0.02))
        }
        joints[str(frame)] = {
            'world_coord': random.normal(0, 80, (42, 3)).tolist(),
            'joint_valid': [[True]] * 42,
            'hand_type': 'interacting',
            'hand_type_valid': True,
        }
        for camera in CAMERAS:
            name = f'Capture0/0390_dh_touchROM/cam{camera}/image{frame}.jpg'
            width, height = SIZES[camera]
            path = root / 'images' / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = cv2.resize(random.integers(0, 255, (height // 16, width // 16, 3), np.uint8), (width, height))
            cv2.imwrite(str(path), noise)
            images.append(
                {
                    'id': 1000 + len(images),
                    'file_name': name,
                    'width': width,
                    'height': height,
                    'capture': 0,
                    'subject': 0,
                    'seq_name': '0390_dh_touchROM',
                    'camera': camera,
                    'frame_idx': frame,
                }
            )
            annotations.append(
                {
                    'id': 5000 + len(images),
                    'image_id': images[-1]['id'],
                    'bbox': [1.5, 2.5, 30.0, 40.0],
                    'joint_valid': [[1]] * 42,
                    'hand_type': 'interacting',
                    'hand_type_valid': 1,
                }
            )
    content = {
        'data': {'images': images, 'annotations': annotations[::-1]},
        'camera': {'0': cameras},
        'joint_3d': {'0': joints},
        'MANO_NeuralAnnot': {'0': fits},
    }
    for kind in content:
        write_kind(root, kind, content, split=split)
    return content


def annotation_file(root: Path, kind: str, split: str = 'train') -> Path:
    return root / 'annotations' / split / f'InterHand2.6M_{split}_{kind}.json'


def write_kind(root: Path, kind: str, content: dict, *, split: str = 'train') -> None:
    path = annotation_file(root, kind, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content[kind]))
