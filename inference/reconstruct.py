"""Reconstruct hands in camera coordinates, in metres, from images, for apps/demo.py and other programs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from inference.engine import Engine, choose_engine
from inference.export import output_of
from inference.folding import for_inference, replace_convolutions
from manopth import HandPair, Hands
from manopth.rotations import symmetric_6d_to_matrix
from models import DIR
from models.checkpoint import SHIPPED, load_model, to_device
from models.placement import counted_hands, place_hands
from models.predictions import CAMERA, POSE, ROOT_ROTATION, SHAPE, DIROutput
from utils.distributed import choose_device
from utils.errors import UserError
from utils.geometry import CROP_SIZE, crop_matrix, from_uv
from utils.hand import HAND_SCALE
from utils.training import autocast, set_float32_precision

Box = tuple[float, float, float, float]  # x, y of the upper left corner, width, height; pixels
SMALLEST_SIDE = 8  # pixels: of a box or image in which hands can be found
LARGEST_BOX = 1e6  # pixels: beyond it, the geometry of a crop loses its digits
SMALL_HANDS = 0.4  # of the crop's side; smaller hands are predicted badly: in training they fill 0.8 of it


class Crop(NamedTuple):
    """The part of an image that the network sees."""

    image: np.ndarray  # (256, 256, 3) uint8 BGR
    matrix: np.ndarray  # (3, 3) image pixels -> crop pixels
    intrinsics: np.ndarray  # (3, 3) of the image


class Reconstruction(NamedTuple):
    """The hands in each of N crops. Hand axis: left, right. Camera axes of the whole image: x right, y down, z
    forward. Tensors float32, on the network's device."""

    vertices: Tensor  # (N, 2, 778, 3) m
    joints: Tensor  # (N, 2, 21, 3) m: wrist, then thumb to little finger, each from base to tip
    roots: Tensor  # (N, 2, 3) m: root joints
    joints_px: Tensor  # (N, 2, 21, 2) image pixels: predicted 2D joints
    root_rotation: Tensor  # (N, 2, 3, 3) of the hand model's root, in camera axes
    pose: Tensor  # (N, 2, 45) MANO's PCA coefficients
    shape: Tensor  # (N, 2, 10) MANO's betas
    camera: Tensor  # (N, 2, 3) weak perspective: scale, shift right, shift down; in [-1, 1] of the crop, per m
    offset: Tensor  # (N, 3) m: predicted right root - left root
    intrinsics: Tensor  # (N, 3, 3) of the image, pixels: as passed, or assumed
    to_crop: Tensor  # (N, 3, 3) image pixels -> pixels of the 256 crop
    residual_px: Tensor  # (N,) crop pixels, RMS: projected joints against joints_px; large if 3D and 2D contradict
    size_in_crop: Tensor  # (N,) extent of the hands, as a share of the crop's side; see SMALL_HANDS
    present: Tensor  # (N, 2) bool: taken to be in the image; the values of another hand mean nothing
    presence: Tensor | None = None  # (N, 2) probability that the hand is in the image; None without MODEL.PRESENCE
    visible: Tensor | None = None  # (N, 2, 21) probability that the joint is neither hidden nor outside the crop
    deviation: Tensor | None = None  # (N, 2, 21) m: standard deviation of each coordinate, relative to the root joint

    def map(self, function: Callable[[Tensor], Tensor]) -> 'Reconstruction':
        """Apply ``function`` to every tensor."""
        return Reconstruction(*(None if values is None else function(values) for values in self))  # type: ignore[arg-type]

    def one(self, number: int) -> 'Reconstruction':
        """The result of one crop, without the leading axis."""
        return self.map(lambda values: values[number])

    def with_leading_axis(self) -> 'Reconstruction':
        """Inverse of ``one``."""
        return self.map(lambda values: values[None])

    def cpu(self) -> 'Reconstruction':
        return self.map(Tensor.cpu)

    @property
    def counted(self) -> Tensor:
        """(N, 2) bool: see ``counted_hands``."""
        return counted_hands(self.present)


def assumed_intrinsics(width: int, height: int, focal: float | None = None) -> np.ndarray:
    """(3, 3) with the principal point in the image centre. ``focal`` is in pixels and defaults to the longer side, a
    field of view of 53 degrees. Distances are proportional to it."""
    focal = max(width, height) if focal is None else focal
    return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])


def cut_crop(image: np.ndarray, box: Box | None = None, intrinsics: np.ndarray | None = None) -> Crop:
    """Crop the square around ``box``, whose longer side fills 0.8 of it; without a box, around the whole image.

    image (H, W, 3) uint8 BGR; intrinsics (3, 3) of it, assumed by default. Pixels outside the image are black. Raises
    UserError for an invalid image or box.
    """
    if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3):
        what = f'{image.dtype} {image.shape}' if isinstance(image, np.ndarray) else type(image).__name__
        raise UserError(f'An image must be a uint8 array of shape (height, width, 3), BGR, not {what}.')
    height, width = image.shape[:2]
    if min(height, width) < SMALLEST_SIDE:
        raise UserError(
            f'The image is {width} x {height} pixels; hands need at least {SMALLEST_SIDE} x {SMALLEST_SIDE}.'
        )
    if box is None:
        matrix = crop_matrix(np.array([[0.0, 0.0], [width, height]]), share=1)
    else:
        left, top, across, down = check_box(box, width, height)
        matrix = crop_matrix(np.array([[left, top], [left + across, top + down]]))
    if intrinsics is None:
        intrinsics = assumed_intrinsics(width, height)
    return Crop(_warp(image, matrix), matrix, np.asarray(intrinsics, np.float64))


def check_box(box: Sequence[float], width: int, height: int) -> np.ndarray:
    """(4,) x, y, width, height. Raises UserError unless the box overlaps a width x height image."""
    try:
        numbers = np.asarray(box)
        numbers = numbers.astype(np.float64) if numbers.dtype.kind in 'iuf' else np.empty(0)
    except (TypeError, ValueError):
        numbers = np.empty(0)
    if numbers.shape != (4,) or not (np.abs(numbers) < LARGEST_BOX).all():
        raise UserError(f'A box must be four numbers, x y width height in pixels, not {box!r}.')
    left, top, across, down = numbers
    if min(across, down) < SMALLEST_SIDE:
        raise UserError(
            f'The box {_words(numbers)} (x y width height) is {across:g} x {down:g} pixels; hands need at '
            f'least {SMALLEST_SIDE} x {SMALLEST_SIDE}.'
        )
    if left >= width or top >= height or left + across <= 0 or top + down <= 0:
        raise UserError(
            f'The box {_words(numbers)} (x y width height) lies outside of the image, which is {width} x '
            f'{height} pixels.'
        )
    return numbers


def _words(numbers: np.ndarray) -> str:
    return ' '.join(f'{number:g}' for number in numbers)


def _warp(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The 256 crop, from the visible part of the image only; pixels are averaged where it shrinks."""
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
    # Pixel centres lie at integers: u of the part = (u of the image - left + 1/2) shrink - 1/2.
    to_part = np.diag([*shrink, 1.0])
    to_part[:2, 2] = (0.5 - np.array([left, top])) * shrink - 0.5
    return cv2.warpAffine(part, (matrix @ np.linalg.inv(to_part))[:2], (CROP_SIZE, CROP_SIZE))


class Reconstructor:
    """A trained network, prepared for inference on images.

    engine: what computes the estimates; None for PyTorch.
    """

    def __init__(
        self,
        model: DIR,
        *,
        precision: str = 'float32',
        device: str | torch.device = 'cpu',
        batch_size: int = 16,
        engine: Engine | None = None,
    ):
        self.device, self.precision, self.batch_size = torch.device(device), precision, batch_size
        self.engine = Engine(None, 'PyTorch') if engine is None else engine
        self.hand_models: HandPair = model.hands
        self.network = to_device(for_inference(model.eval()), self.device)
        if self.engine.run is None and self.device.type == 'cpu' and precision != 'bfloat16':
            replace_convolutions(self.network)

    def __call__(
        self,
        images_bgr: Sequence[np.ndarray],
        boxes: Sequence[Box | None] | None = None,
        *,
        intrinsics: Sequence[np.ndarray | None] | np.ndarray | None = None,
    ) -> Reconstruction:
        """Images (H, W, 3) uint8 BGR of any size, with a box around both hands in each -> Reconstruction.

        boxes: (x, y, width, height) pixels, or None for the whole image; pass an image with two people twice.
        intrinsics: (3, 3) pixels, one for all or one each; None assumes them (``assumed_intrinsics``). Raises
        UserError for an invalid image, a box outside its image, and a wrong number of boxes or intrinsics.
        """
        count = len(images_bgr)
        boxes = [None] * count if boxes is None else boxes
        if (isinstance(intrinsics, np.ndarray) and intrinsics.ndim == 2) or intrinsics is None:
            intrinsics = [intrinsics] * count
        if not len(boxes) == len(intrinsics) == count:
            raise UserError(
                f'There are {count} images, {len(boxes)} boxes and {len(intrinsics)} intrinsics; each image needs one.'
            )
        return self.from_crops([cut_crop(*each) for each in zip(images_bgr, boxes, intrinsics)])

    @torch.inference_mode()
    def from_crops(self, crops: Sequence[Crop]) -> Reconstruction:
        """Crops (``cut_crop``) -> Reconstruction, ``batch_size`` at a time. Raises UserError if predictions are not
        finite."""
        if not crops:
            raise UserError('There are no images to reconstruct hands from.')
        set_float32_precision(self.precision)
        parts = [self._part(crops[begin : begin + self.batch_size]) for begin in range(0, len(crops), self.batch_size)]
        return joined(parts)

    @torch.inference_mode()
    def pose_hands(self, rotation: Tensor, pose: Tensor, shape: Tensor) -> Hands:
        """Parameters (N, 2, 3, 3), (N, 2, 45), (N, 2, 10) -> meshes and joints about the root joints, on the CPU."""
        head = self.network.hand_head
        parameters = (values.to(self.device) for values in (rotation, pose, shape))
        return Hands(*(points.cpu() for points in head.hand_layer(*parameters, root_joint=head.root_joint)))

    def _part(self, crops: Sequence[Crop]) -> Reconstruction:
        images = torch.from_numpy(np.stack([crop.image for crop in crops]))
        if self.engine.run:
            output = output_of(self.engine.run(self.network.preprocess(images)))
        else:
            with autocast(self.precision, self.device):
                output = self.network(self.network.preprocess(images))
        if not bool(output.stages[-1].finite.all()):
            raise UserError(
                'The network predicts NaN or infinity: the checkpoint is damaged, or its training diverged.'
            )
        return placed_in_image(output, crops)


def joined(parts: Sequence[Reconstruction]) -> Reconstruction:
    """Concatenate reconstructions along their leading axis."""
    fields = (None if each[0] is None else torch.cat(each) for each in zip(*parts))
    return Reconstruction(*fields)  # type: ignore[arg-type]  # None only where the first is


def placed_in_image(output: DIROutput, crops: Sequence[Crop]) -> Reconstruction:
    """The network's last estimate for each crop -> hands in the camera coordinates of the whole image."""
    hands, presence, confidence = output.stages[-1], output.presence, output.confidence
    present = torch.ones_like(hands.joints[:, :, 0, 0], dtype=torch.bool) if presence is None else presence > 0
    counted = counted_hands(present)
    to_crop, intrinsics = (
        torch.from_numpy(np.stack(matrices)).to(hands.joints.device)
        for matrices in zip(*((crop.matrix, crop.intrinsics) for crop in crops))
    )
    parameters = hands.parameters
    placement = place_hands(hands.joints, parameters[..., CAMERA], hands.offset, to_crop @ intrinsics, counted=counted)
    scale, corner = to_crop[:, None, None, :1, 0], to_crop[:, None, None, :2, 2]
    low, high = extent_of(hands.joints_uv, counted)
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
        size_in_crop=(high - low).amax(-1) / 2,
        present=present,
        presence=None if presence is None else presence.float().sigmoid(),
        visible=None if confidence is None else confidence.visible.float().sigmoid(),
        deviation=None if confidence is None else confidence.deviation.float(),
    )


def with_present(hands: Reconstruction, present: Tensor) -> Reconstruction:
    """The same prediction, placed and measured by another choice of present hands, (N, 2) bool."""
    counted, to_crop = counted_hands(present), hands.to_crop
    relative = hands.joints - hands.roots[:, :, None]
    placement = place_hands(
        relative, hands.camera, hands.offset / HAND_SCALE, to_crop @ hands.intrinsics, counted=counted
    )
    move = (placement.roots - hands.roots)[:, :, None]
    low, high = extent_of(hands.joints_px * to_crop[:, None, None, :1, 0], counted)
    return hands._replace(
        vertices=hands.vertices + move,
        joints=hands.joints + move,
        roots=placement.roots,
        residual_px=placement.residual_px,
        size_in_crop=(high - low).amax(-1) / CROP_SIZE,
        present=present,
    )


def extent_of(points: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest coordinates (N, D) of points (N, 2, P, D) of the counted hands (N, 2)."""
    counted = counted[..., None, None]
    low = torch.where(counted, points, torch.inf).flatten(1, 2).amin(1)
    return low, torch.where(counted, points, -torch.inf).flatten(1, 2).amax(1)


def load_reconstructor(
    checkpoint: str | Path = SHIPPED, *, device: str = 'auto', engine: str = 'auto', overrides: Sequence[str] = ()
) -> Reconstructor:
    """Load a checkpoint (ours or the published one, a file or a run folder) as a ``Reconstructor``.

    The default is the network that is shipped with the code (docs/model_card.md). device: 'auto' (CUDA if there is
    one), 'cpu', 'cuda' or 'cuda:N'. engine: 'auto', 'torch' or 'onnx', see ``choose_engine``. overrides: KEY VALUE ...,
    for instance MANO.PATH and the folder of the hand model's files. Raises UserError if checkpoint, hand model, device
    or engine cannot be used.
    """
    model, cfg, _ = load_model(checkpoint, [*overrides, 'DEVICE', device])
    on = choose_device(cfg.DEVICE)
    chosen = choose_engine(engine, checkpoint, cfg=cfg, hand_model=model.hands.identity, device=on)
    return Reconstructor(model, precision=cfg.EVAL.PRECISION, device=on, engine=chosen)
