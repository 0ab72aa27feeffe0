"""Prepare one InterHand2.6M frame: crop the image, render its masks and dense map, convert its MANO parameters."""

import hashlib
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from dataset.prepare.raw import Camera, ManoFit
from dataset.prepare.skips import BEHIND, DARK, DARKEST, MISSING, OTHER_SIZE, UNREADABLE, Skip
from dataset.prepared import MASK_FILE_CHANNELS
from manopth import HandPair, TwoHandLayer
from manopth.rotations import axis_angle_to_matrix
from utils.geometry import CROP_SIZE, crop_matrix, project
from utils.hand import LEFT, NUM_FACES, NUM_VERTICES, RIGHT, SIDES
from utils.images import ImageError, read_image
from utils.rasterizer import RENDERERS, interpolate

# Classes are encoded as colours. Without chroma subsampling no mask pixel changes its class in JPEG; with OpenCV's
# default (4:2:0) about 270 pixels per mask do.
LABEL_JPEG = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)
CROPS_WITHOUT_HANDS = 0.45, 1.4  # sides in units of the image's shorter side: those of single and of interacting hands
# Parameters of an absent hand, so that the layer runs on all frames alike; it is neither rendered nor stored.
AT_REST = {
    'R': np.eye(3, dtype=np.float32)[None],
    'pose': np.zeros((1, 45), np.float32),
    'shape': np.zeros((1, 10), np.float32),
    'trans': np.zeros((1, 3), np.float32),
}


class FrameTask(NamedTuple):
    """Everything a worker process needs to prepare one frame."""

    path: str
    file_name: str  # relative to the split's images
    size: tuple[int, int]  # width, height as annotated
    entries: tuple[dict, dict]
    camera: Camera
    fits: dict[str, ManoFit]  # of the hands that the image shows


class PreparedFrame(NamedTuple):
    """A prepared frame: the bytes of its JPEG files by folder, and its annotation without the sample index."""

    files: dict[str, bytes]
    annotation: dict[str, Any]


def read_frame(path: str, size: tuple[int, int]) -> np.ndarray | Skip:
    """Read the BGR image, or return the reason to skip it; ``size`` (width, height) is the annotated size."""
    try:
        image = read_image(path)
    except FileNotFoundError:
        return Skip(MISSING, path)
    except OSError as error:
        return Skip(UNREADABLE, f'{path}: {error.strerror}')
    except ImageError as error:
        return Skip(UNREADABLE, f'{path}: {error}')
    if image.shape[1::-1] != size:
        return Skip(OTHER_SIZE, f'{path}: {image.shape[1]}x{image.shape[0]}, annotated as {size[0]}x{size[1]}')
    return image


class FramePreparer:
    """Prepare a chunk of frames: the hand layer runs once on all of them, everything else frame by frame."""

    def __init__(self, models: HandPair, colours: np.ndarray, renderer: str = 'torch'):
        self.layer = TwoHandLayer(models)
        self.faces = [torch.tensor(model.faces) for model in models]
        self.colours = torch.from_numpy(colours)
        self.rasterize = RENDERERS[renderer]
        # From axis-angle relative to the mean pose to coefficients: p = c @ components, so c = p @ inverse.
        self.to_coefficients = {model.side: np.linalg.inv(model.pose_components) for model in models}

    @torch.inference_mode()
    def __call__(self, tasks: list[FrameTask]) -> list[PreparedFrame | Skip]:
        images = [self._bright_image(task) for task in tasks]
        kept = [(task, image) for task, image in zip(tasks, images) if not isinstance(image, Skip)]
        parameters = [{side: self._parameters(side, task.fits.get(side)) for side in SIDES} for task, _ in kept]
        samples = iter(
            [
                self._prepare(task, image, one, vertices)
                for (task, image), one, vertices in zip(kept, parameters, self._world_vertices(parameters))
            ]
        )
        return [image if isinstance(image, Skip) else next(samples) for image in images]

    def _bright_image(self, task: FrameTask) -> np.ndarray | Skip:
        image = read_frame(task.path, task.size)
        if isinstance(image, np.ndarray) and cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).mean() < DARKEST:
            return Skip(DARK)
        return image

    def _parameters(self, side: str, fit: ManoFit | None) -> dict[str, np.ndarray] | None:
        if fit is None:
            return None
        root = axis_angle_to_matrix(torch.from_numpy(fit.pose[:3])).numpy()
        numbers = {'R': root, 'pose': fit.pose[3:] @ self.to_coefficients[side], 'shape': fit.shape, 'trans': fit.trans}
        return {name: value[None].astype(np.float32) for name, value in numbers.items()}

    def _world_vertices(self, parameters: list[dict]) -> Tensor:
        """(n, 2, 778, 3) vertices in metres, from the float32 parameters as they are stored; an absent hand at rest."""
        if not parameters:
            return torch.empty(0)
        root, pose, shape, trans = (
            torch.from_numpy(
                np.stack([np.concatenate([(one[side] or AT_REST)[name] for side in SIDES]) for one in parameters])
            )
            for name in ('R', 'pose', 'shape', 'trans')
        )
        return self.layer(root, pose, shape).vertices + trans[:, :, None]

    def _prepare(self, task: FrameTask, image: np.ndarray, parameters: dict, world: Tensor) -> PreparedFrame | Skip:
        rotation, translation = (torch.from_numpy(a.astype(np.float32)) for a in task.camera[:2])
        shown = [hand for hand in (LEFT, RIGHT) if SIDES[hand] in task.fits]
        vertices = (world[shown] @ rotation.T + translation).flatten(0, 1)  # (hands * 778, 3) m, camera axes
        if not (vertices[:, 2] > 0).all():
            return Skip(BEHIND, task.path)
        pixels = project(vertices.double(), torch.from_numpy(task.camera.intrinsics)).numpy()
        to_crop = crop_matrix(pixels) if shown else crop_without_hands(task.file_name, task.size)
        intrinsics = to_crop @ task.camera.intrinsics
        crop = cv2.warpAffine(image, to_crop[:2], (CROP_SIZE, CROP_SIZE))
        mask, dense = self._render(vertices, shown, intrinsics)
        image_entry, annotation_entry = task.entries
        return PreparedFrame(
            {'img': _jpeg(crop), 'mask': _jpeg(mask, LABEL_JPEG), 'dense': _jpeg(dense, LABEL_JPEG)},
            {
                'image': image_entry,
                'annotation': annotation_entry,
                'mano_params': parameters,
                'camera': {'R': rotation.numpy(), 't': translation.numpy(), 'camera': intrinsics},
            },
        )

    def _render(self, vertices: Tensor, shown: list[int], intrinsics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """-> mask and dense map of the hands ``shown``, whose vertices (hands * 778, 3) are in camera axes."""
        mask, dense = (np.zeros((CROP_SIZE, CROP_SIZE, 3), np.uint8) for _ in range(2))
        if not shown:
            return mask, dense
        faces = torch.cat([self.faces[hand] + place * NUM_VERTICES for place, hand in enumerate(shown)])
        fragments = self.rasterize(
            vertices[None], faces, torch.from_numpy(intrinsics)[None].float(), (CROP_SIZE, CROP_SIZE)
        )
        face = fragments.face[0].numpy()
        for place, hand in enumerate(shown):
            mask[..., MASK_FILE_CHANNELS[hand]] = 255 * (face // NUM_FACES == place)  # background: -1
        colours = self.colours.repeat(len(shown), 1)
        return mask, interpolate(fragments, faces, colours)[0].mul_(255).round_().byte().numpy()


def crop_without_hands(file_name: str, size: tuple[int, int]) -> np.ndarray:
    """Affine map (3, 3) from an image (width, height) without hands to a crop, as large as those of hands are.

    It follows from the file name alone, so it depends neither on the workers nor on the other frames.
    """
    digest = hashlib.sha256(file_name.encode(errors='surrogatepass')).digest()
    draw = np.random.default_rng(int.from_bytes(digest[:8], 'little'))
    low, high = CROPS_WITHOUT_HANDS
    half = draw.uniform(low, high) * min(size) / 2
    centre = draw.uniform(0.25, 0.75, 2) * size
    return crop_matrix(np.stack([centre - half, centre + half]), share=1.0)


def _jpeg(image: np.ndarray, options: tuple[int, ...] = ()) -> bytes:
    return cv2.imencode('.jpg', image, options)[1].tobytes()
