"""Write reconstructions as overlays, side and top views, meshes, JSON and CSV (docs/formats.md).

Reconstructions and tensors must be on the CPU (``Reconstruction.cpu``).
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import trimesh
from torch import Tensor

from inference.motion import MOTION_FILES
from inference.reconstruct import Reconstruction
from manopth import HandPair
from utils.drawing import HAND_COLOURS_BGR, draw_joints, mesh_overlay, write_image
from utils.files import write_atomically, write_json
from utils.geometry import project
from utils.hand import JOINT_NAMES, SIDES
from utils.masking import where_leading

FORMAT = 'dir-hands-2'  # of hands.json; increment it when the meaning of a value changes
LONGEST_SIDE = 1920  # pixels: larger images are reduced for their overlay
VIEW_SIDE = 384  # pixels: side of the views from the side and from above
VIEW_BACKGROUND_BGR = (245, 245, 245)
VIEW_FILL = 0.8  # share of a view that the hands span
SCALE_BAR = 0.05  # m
IMAGE_RECORD, VIDEO_RECORD = 'hands.json', 'video.json'  # written last: their presence means that all files exist
# Rotations of the camera axes (x right, y down, z forward) after which the view is along z again.
VIEWS = {
    'side': np.array([[0, 0, 1], [0, 1, 0], [-1, 0, 0]], np.float32),  # from the right: away from the camera is right
    'above': np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], np.float32),  # away from the camera is up
}

IMAGE_FILES = MOTION_FILES | frozenset(
    ['overlay.jpg', 'crop.jpg', *(f'{name}.jpg' for name in VIEWS), 'left.obj', 'right.obj', 'hands.glb', IMAGE_RECORD]
)
OVERLAY, TABLE, LINES = 'overlay.mp4', 'joints.csv', 'hands.jsonl'
VIDEO_FILES = MOTION_FILES | frozenset([OVERLAY, TABLE, LINES, VIDEO_RECORD])


class Shown(NamedTuple):
    """The image that an overlay is drawn on."""

    image: np.ndarray  # (h, w, 3) uint8 BGR, at most 1920 pixels a side
    to_image: np.ndarray  # (3, 3) pixels of the whole image -> pixels of ``image``


def reduced(image: np.ndarray) -> Shown:
    """The image itself, or a reduced copy of a large one."""
    height, width = image.shape[:2]
    shrink = min(1.0, LONGEST_SIDE / max(height, width))
    if shrink == 1:
        return Shown(image, np.eye(3))
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    smaller = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return Shown(smaller, np.diag([size[0] / width, size[1] / height, 1.0]))


def present_faces(hands: Reconstruction, models: HandPair) -> np.ndarray:
    """Those rows of ``models.mesh_faces`` that belong to hands in the image."""
    return models.mesh_faces.reshape(2, -1, 3)[hands.present.numpy()].reshape(-1, 3)


def view(vertices: Tensor, turn: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Render both hands (2, 778, 3) m from another direction, with a 5 cm scale bar -> (384, 384, 3) uint8 BGR.

    faces (F, 3): of both hands or one of them, see ``mesh_overlay``.
    """
    picture = np.full((VIEW_SIDE, VIEW_SIDE, 3), VIEW_BACKGROUND_BGR, np.uint8)
    if not len(faces):
        return picture
    vertices = vertices @ torch.from_numpy(turn).T
    drawn = vertices.flatten(0, 1)[np.unique(faces)]
    vertices = vertices - (drawn.amin(0) + drawn.amax(0)) / 2
    extent = drawn.amax(0) - drawn.amin(0)
    half = max(float(extent[:2].amax()) / 2, 1e-3)
    distance = 20 * half  # far enough that the bar is to scale at every depth
    focal = VIEW_SIDE / 2 * VIEW_FILL * distance / half
    vertices = vertices + torch.tensor([0.0, 0.0, distance + float(extent[2]) / 2])
    centre = VIEW_SIDE / 2
    intrinsics = torch.tensor([[focal, 0, centre], [0, focal, centre], [0, 0, 1.0]])
    picture = mesh_overlay(picture, vertices, intrinsics, faces, alpha=1.0)
    bar = round(SCALE_BAR * focal / float(vertices.flatten(0, 1)[np.unique(faces), 2].mean()))
    if 4 < bar < VIEW_SIDE - 40:
        cv2.rectangle(picture, (16, VIEW_SIDE - 22), (16 + bar, VIEW_SIDE - 18), (60, 60, 60), cv2.FILLED)
        cv2.putText(
            picture,
            f'{100 * SCALE_BAR:g} cm',
            (16, VIEW_SIDE - 28),
            cv2.FONT_HERSHEY_SIMPLEX,
            0.5,
            (60, 60, 60),
            1,
            cv2.LINE_AA,
        )
    return picture


def draw_overlay(shown: Shown, hands: Reconstruction, models: HandPair) -> np.ndarray:
    """Draw the placed meshes of one reconstruction (no leading axis) over its image, and its joints where the network
    predicts which of them are visible: filled, or hollow if hidden."""
    intrinsics = torch.from_numpy(shown.to_image).float() @ hands.intrinsics
    drawn = mesh_overlay(shown.image, hands.vertices, intrinsics, present_faces(hands, models))
    if hands.visible is None:
        return drawn
    in_front = (hands.joints[..., 2] > 0) & hands.present[:, None]
    pixels = torch.where(in_front[..., None], project(hands.joints, intrinsics), torch.nan)
    scale = float(torch.from_numpy(shown.to_image)[0, 0] / hands.to_crop[0, 0])
    return draw_joints(drawn, pixels, filled=hands.visible > 0.5, scale=scale)


def meshes(hands: Reconstruction, models: HandPair) -> dict[str, trimesh.Trimesh]:
    """The meshes of the hands in the image by side, coloured as in the overlays; m, camera axes."""
    return {
        side: trimesh.Trimesh(
            points.numpy(),
            model.faces,
            process=False,
            validate=False,
            visual=trimesh.visual.TextureVisuals(material=_material(colour)),
        )
        for side, points, model, colour, present in zip(SIDES, hands.vertices, models, HAND_COLOURS_BGR, hands.present)
        if present
    }


def _material(colour_bgr: tuple[int, int, int]) -> trimesh.visual.material.PBRMaterial:
    return trimesh.visual.material.PBRMaterial(
        baseColorFactor=[*colour_bgr[::-1], 255], metallicFactor=0.0, roughnessFactor=0.8, doubleSided=True
    )


def write_meshes(folder: Path, hands: Reconstruction, models: HandPair) -> None:
    """Write left.obj, right.obj, and hands.glb with both hands, as far as they are in the image: camera axes, metres.

    A parent node in the GLB rotates camera axes (y down, z forward) to glTF's (y up, z towards the viewer), so that
    viewers show the hands upright. The vertices themselves are not rotated.
    """
    scene, upright = trimesh.Scene(), np.diag([1.0, -1.0, -1.0, 1.0])
    for side, mesh in meshes(hands, models).items():
        scene.add_geometry(mesh, node_name=side, geom_name=side, transform=upright)
        lines = [f'v {x:.6f} {y:.6f} {z:.6f}' for x, y, z in mesh.vertices]
        lines += [f'f {a} {b} {c}' for a, b, c in mesh.faces + 1]
        head = f'# {side} hand; metres; camera axes: x right, y down, z forward\no {side}'
        write_atomically(folder / f'{side}.obj', '\n'.join([head, *lines, '']).encode(), durable=False)
    if scene.geometry:
        write_atomically(folder / 'hands.glb', trimesh.exchange.gltf.export_glb(scene), durable=False)


def as_numbers(hands: Reconstruction) -> dict[str, Any]:
    """The values of one reconstruction (no leading axis), as stored in hands.json and in a line of hands.jsonl."""

    def plain(values: Tensor) -> list:
        return np.round(values.double().numpy(), 6).tolist()

    def one_hand(hand: int) -> dict[str, Any] | None:
        if not hands.present[hand]:
            return None
        numbers = {
            'root_rotation': plain(hands.root_rotation[hand]),
            'pose_pca': plain(hands.pose[hand]),
            'shape': plain(hands.shape[hand]),
            'camera': plain(hands.camera[hand]),
            'root_m': plain(hands.roots[hand]),
            'joints_m': plain(hands.joints[hand]),
            'joints_px': plain(hands.joints_px[hand]),
        }
        if hands.visible is not None and hands.deviation is not None:
            numbers |= {'visible': plain(hands.visible[hand]), 'deviation_m': plain(hands.deviation[hand])}
        return numbers

    presence = {} if hands.presence is None else {'presence': dict(zip(SIDES, plain(hands.presence)))}
    return {
        **{side: one_hand(hand) for hand, side in enumerate(SIDES)},
        **presence,
        'offset_m': plain(hands.offset) if hands.present.all() else None,
        'intrinsics_px': plain(hands.intrinsics),
        'to_crop': plain(hands.to_crop),
        'residual_px': round(float(hands.residual_px), 3),
        'size_in_crop': round(float(hands.size_in_crop), 4),
    }


def header(models: HandPair, **more: Any) -> dict[str, Any]:
    """The header of a JSON file: format, hand model, joint names and ``more``."""
    return {'format': FORMAT, 'hand_model': models.identity, 'joint_names': list(JOINT_NAMES), **more}


def write_image_files(
    folder: Path, shown: Shown, crop: np.ndarray, hands: Reconstruction, models: HandPair, **more: Any
) -> None:
    """Write all files of one image into ``folder``; hands.json comes last, so its presence means that all exist.

    crop (256, 256, 3) uint8 BGR; hands: one reconstruction, without the leading axis; more: see ``header``.
    """
    write_image(folder / 'overlay.jpg', draw_overlay(shown, hands, models), durable=False)
    write_image(folder / 'crop.jpg', crop, durable=False)
    for name, turn in VIEWS.items():
        write_image(folder / f'{name}.jpg', view(hands.vertices, turn, present_faces(hands, models)), durable=False)
    write_meshes(folder, hands, models)
    write_json(folder / IMAGE_RECORD, header(models, **more) | as_numbers(hands))


JOINT_COLUMNS = [f'{side}_{name}_{axis}' for side in SIDES for name in JOINT_NAMES for axis in ('x_m', 'y_m', 'z_m')]


def joint_row(hands: Reconstruction) -> list[str]:
    """The joints of one reconstruction in the order of JOINT_COLUMNS; empty for an absent hand."""
    joints = where_leading(hands.present, hands.joints, torch.nan)
    return ['' if value != value else f'{value:.6f}' for value in joints.flatten().tolist()]


def csv_line(values: list) -> bytes:
    """One line of CSV; values must not contain commas."""
    return (','.join(map(str, values)) + '\n').encode()


def json_line(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, separators=(',', ':')) + '\n').encode()
