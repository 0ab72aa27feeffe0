"""From pictures to hands in metres before their camera: what apps/demo.py runs, and what other programs call.

from inference.reconstruct import load_reconstructor

reconstruct = load_reconstructor('checkpoint/xxx', device='auto')
hands = reconstruct(images_bgr, boxes)          # lists: (H, W, 3) uint8 and (x, y, width, height) in pixels
hands.vertices                                  # (N, 2, 778, 3) m: left hand, right hand; camera axes
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from inference.folding import for_inference
from inference.winograd import use_winograd
from manopth import HandPair
from manopth.rotations import symmetric_6d_to_matrix
from models import DIR
from models.checkpoint import load_model, to_device
from models.placement import place_hands
from models.predictions import CAMERA, POSE, ROOT_ROTATION, SHAPE, HandPrediction
from utils.distributed import choose_device
from utils.errors import UserError
from utils.geometry import CROP_SIZE, crop_matrix, from_uv
from utils.hand import HAND_SCALE
from utils.training import autocast, set_float32_precision

Box = tuple[float, float, float, float]  # x, y of the upper left corner, width, height; pixels
SMALLEST_SIDE = 8  # pixels: of a box, or a picture, in which hands can be looked for
SMALL_HANDS = 0.4  # of the crop's side; the network was trained on hands that take 0.8 of it


class Crop(NamedTuple):
    """What the network sees of a picture."""

    image: np.ndarray  # (256, 256, 3) uint8 BGR
    matrix: np.ndarray  # (3, 3) pixels of the picture -> pixels of the crop
    intrinsics: np.ndarray  # (3, 3) of the picture


class Reconstruction(NamedTuple):
    """Both hands in each of N crops. Hand axis: left, right. Camera axes of the whole picture: x right, y down, z
    forward. Tensors float32, on the network's device."""

    vertices: Tensor  # (N, 2, 778, 3) m
    joints: Tensor  # (N, 2, 21, 3) m: wrist, then thumb to little finger, each from base to tip
    roots: Tensor  # (N, 2, 3) m: where the root joints are
    joints_px: Tensor  # (N, 2, 21, 2) pixels of the picture: where the network sees the joints
    root_rotation: Tensor  # (N, 2, 3, 3) of the hand model's root, in camera axes
    pose: Tensor  # (N, 2, 45) MANO's PCA coefficients
    shape: Tensor  # (N, 2, 10) MANO's betas
    camera: Tensor  # (N, 2, 3) weak perspective: scale, shift right, shift down; in [-1, 1] of the crop, per m
    offset: Tensor  # (N, 3) m: right root - left root, as the network says
    intrinsics: Tensor  # (N, 3, 3) of the picture, pixels: as given, or assumed
    to_crop: Tensor  # (N, 3, 3) pixels of the picture -> pixels of the 256 crop
    residual_px: Tensor  # (N,) pixels of the crop, RMS: projected joints against joints_px; large if they contradict
    size_in_crop: Tensor  # (N,) extent of both hands in the crop, as a share of its side: small hands come out badly

    def one(self, number: int) -> 'Reconstruction':
        """That of one crop, without the leading axis."""
        return Reconstruction(*(values[number] for values in self))

    def cpu(self) -> 'Reconstruction':
        return Reconstruction(*(values.cpu() for values in self))


def assumed_intrinsics(width: int, height: int, focal: float | None = None) -> np.ndarray:
    """(3, 3): the principal point in the picture's middle; ``focal`` pixels, by default the longer side, which is a
    field of view of 53 degrees along it. Distances grow in proportion to the focal length that is assumed."""
    focal = max(width, height) if focal is None else focal
    return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])


def cut_crop(image: np.ndarray, box: Box | None = None, intrinsics: np.ndarray | None = None) -> Crop:
    """The square about ``box``, of which the box's longer side takes 0.8; without a box the square about the picture.

    image (H, W, 3) uint8 BGR; intrinsics (3, 3) of it. What lies outside of the picture is black. Raises UserError
    where picture or box cannot be used.
    """
    if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3):
        what = f'{image.dtype} {image.shape}' if isinstance(image, np.ndarray) else type(image).__name__
        raise UserError(f'a picture is a uint8 array of shape (height, width, 3), BGR; this is {what}.')
    height, width = image.shape[:2]
    if min(height, width) < SMALLEST_SIDE:
        raise UserError(f'the picture is {width} x {height} pixels; hands need at least {SMALLEST_SIDE} each way.')
    if box is None:
        matrix = crop_matrix(np.array([[0.0, 0.0], [width, height]]), share=1)
    else:
        left, top, across, down = check_box(box, width, height)
        matrix = crop_matrix(np.array([[left, top], [left + across, top + down]]))
    if intrinsics is None:
        intrinsics = assumed_intrinsics(width, height)
    return Crop(_warp(image, matrix), matrix, np.asarray(intrinsics, np.float64))


def check_box(box: Sequence[float], width: int, height: int) -> np.ndarray:
    """(4,) x, y, width, height. Raises UserError unless it is a box that shows some of a width x height picture."""
    try:
        numbers = np.asarray(box, np.float64)
    except (TypeError, ValueError):
        numbers = np.empty(0)
    if numbers.shape != (4,) or not np.isfinite(numbers).all():
        raise UserError(f'a box is four numbers, x y width height in pixels; this is {box!r}.')
    left, top, across, down = numbers
    if min(across, down) < SMALLEST_SIDE:
        raise UserError(
            f'the box {_words(numbers)} (x y width height) is {across:g} x {down:g} pixels; hands need at '
            f'least {SMALLEST_SIDE} each way.'
        )
    if left >= width or top >= height or left + across <= 0 or top + down <= 0:
        raise UserError(
            f'the box {_words(numbers)} (x y width height) lies outside of the picture, which is {width} x '
            f'{height} pixels.'
        )
    return numbers


def _words(numbers: np.ndarray) -> str:
    return ' '.join(f'{number:g}' for number in numbers)


def _warp(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The 256 crop. Only the part that it shows is touched, and where many pixels become one they are averaged."""
    scale = matrix[0, 0]
    low = np.floor(-matrix[:2, 2] / scale).astype(int) - 1
    high = np.ceil((CROP_SIZE - matrix[:2, 2]) / scale).astype(int) + 2
    (left, top), (right, bottom) = low.clip(0), high.clip(0, image.shape[1::-1])
    part = image[top:bottom, left:right]
    if scale > 0.5:
        shrink = np.ones(2)
    else:
        size = np.maximum(np.array(part.shape[1::-1]) * 2 * scale, 1).round().astype(int)
        shrink = size / part.shape[1::-1]
        part = cv2.resize(part, size.tolist(), interpolation=cv2.INTER_AREA)
    # Pixel centres lie at integers: u of the part = (u of the picture - left + 1/2) shrink - 1/2.
    to_part = np.diag([*shrink, 1.0])
    to_part[:2, 2] = (0.5 - np.array([left, top])) * shrink - 0.5
    return cv2.warpAffine(part, (matrix @ np.linalg.inv(to_part))[:2], (CROP_SIZE, CROP_SIZE))


class Reconstructor:
    """A trained network, made ready for pictures."""

    def __init__(
        self, model: DIR, *, precision: str = 'float32', device: str | torch.device = 'cpu', batch_size: int = 16
    ):
        self.device, self.precision, self.batch_size = torch.device(device), precision, batch_size
        self.hand_models: HandPair = model.hands
        self.network = to_device(for_inference(model.eval()), self.device)
        if self.device.type == 'cpu' and precision != 'bfloat16':
            use_winograd(self.network)

    def __call__(
        self,
        images_bgr: Sequence[np.ndarray],
        boxes: Sequence[Box | None] | None = None,
        *,
        intrinsics: Sequence[np.ndarray | None] | np.ndarray | None = None,
    ) -> Reconstruction:
        """Pictures (H, W, 3) uint8 BGR, of any sizes, with the box of both hands in each -> Reconstruction.

        boxes: (x, y, width, height) pixels, or None for the whole picture; a picture with two people is given twice.
        intrinsics: (3, 3) pixels, one for all or one each; None assumes them (``assumed_intrinsics``). Raises
        UserError for what is no picture, a box outside of it, and numbers of boxes or intrinsics that do not fit.
        """
        count = len(images_bgr)
        boxes = [None] * count if boxes is None else boxes
        if (isinstance(intrinsics, np.ndarray) and intrinsics.ndim == 2) or intrinsics is None:
            intrinsics = [intrinsics] * count
        if not len(boxes) == len(intrinsics) == count:
            raise UserError(
                f'{count} pictures with {len(boxes)} boxes and {len(intrinsics)} intrinsics: each picture needs one.'
            )
        return self.from_crops([cut_crop(*each) for each in zip(images_bgr, boxes, intrinsics)])

    @torch.inference_mode()
    def from_crops(self, crops: Sequence[Crop]) -> Reconstruction:
        """What ``cut_crop`` gave -> Reconstruction, ``batch_size`` crops at a time. Raises UserError for a network
        whose predictions are not finite."""
        if not crops:
            raise UserError('there are no pictures to reconstruct hands from.')
        set_float32_precision(self.precision)
        parts = [self._part(crops[begin : begin + self.batch_size]) for begin in range(0, len(crops), self.batch_size)]
        return Reconstruction(*map(torch.cat, zip(*parts)))

    def _part(self, crops: Sequence[Crop]) -> Reconstruction:
        images = torch.from_numpy(np.stack([crop.image for crop in crops]))
        with autocast(self.precision, self.device):
            hands = self.network(self.network.preprocess(images)).stages[-1]
        if not bool(hands.vertices.isfinite().all() & hands.offset.isfinite().all()):
            raise UserError('the network predicts NaN or infinity: the checkpoint is damaged or its training diverged.')
        return placed_in_picture(hands, crops)


def placed_in_picture(hands: HandPrediction, crops: Sequence[Crop]) -> Reconstruction:
    """A network's last estimate for each crop -> the hands before the whole picture's camera."""
    to_crop, intrinsics = (
        torch.from_numpy(np.stack(matrices)).to(hands.joints.device)
        for matrices in zip(*((crop.matrix, crop.intrinsics) for crop in crops))
    )
    parameters = hands.parameters
    placement = place_hands(hands.joints, parameters[..., CAMERA], hands.offset, to_crop @ intrinsics)
    scale, corner = to_crop[:, None, None, :1, 0], to_crop[:, None, None, :2, 2]
    extent = hands.joints_uv.flatten(1, 2).amax(1) - hands.joints_uv.flatten(1, 2).amin(1)
    return Reconstruction(
        vertices=hands.vertices + placement.roots[:, :, None],
        joints=hands.joints + placement.roots[:, :, None],
        roots=placement.roots,
        joints_px=((from_uv(hands.joints_uv, CROP_SIZE) - corner) / scale).float(),
        root_rotation=symmetric_6d_to_matrix(parameters[..., ROOT_ROTATION]),
        pose=parameters[..., POSE],
        shape=parameters[..., SHAPE],
        camera=parameters[..., CAMERA],
        offset=hands.offset * HAND_SCALE,
        intrinsics=intrinsics.float(),
        to_crop=to_crop.float(),
        residual_px=placement.residual_px,
        size_in_crop=extent.amax(-1) / 2,
    )


def load_reconstructor(checkpoint: str | Path, *, device: str = 'auto', overrides: Sequence[str] = ()) -> Reconstructor:
    """A checkpoint (ours or the published one, a file or a run folder) -> a callable, see ``Reconstructor``.

    device: 'auto' (CUDA if there is one), 'cpu', 'cuda' or 'cuda:N'. overrides: KEY VALUE ..., for instance MANO.PATH
    and where the hand model's files are. Raises UserError where the checkpoint, hand model or device cannot be had.
    """
    model, cfg, _ = load_model(checkpoint, [*overrides, 'DEVICE', device])
    return Reconstructor(model, precision=cfg.EVAL.PRECISION, device=choose_device(cfg.DEVICE))
