"""Crop again around predicted hands: a second look at an image, and boxes that follow the hands through a video.

The data's boxes are those of both hands' projected vertices, and so are these. Whether a prediction is one of hands
shows in the agreement of its box with the box that it was made from. In clips of synthetic hands, the overlap
(intersection over union) of the two is above 0.72 in 99 % of the frames; in images without hands, where the predicted
hands shrink from look to look, it is usually 0.2 to 0.5. ``residual_px`` does not separate the two: its medians are 6
and 12 pixels, but their ranges are equal. Moving the box on by its velocity raises the error relative to the wrist by
1 %, at 30 frames/s and at 5.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from inference.detector import Detection
from inference.reconstruct import Box, Crop, Reconstruction, Reconstructor, check_box, cut_crop, extent_of, with_present
from utils.errors import UserError
from utils.geometry import CROP_SIZE, HANDS_IN_CROP, from_uv, to_uv
from utils.hand import LEFT, RIGHT

KEPT, FOUND = 0.7, 0.75  # least agreement: of a box that hands are expected in, and of a whole image
STAYS, APPEARS = 0.3, 0.7  # least presence of a hand that was present in the frame before, and of one that was not
NEAR = 0.3  # least overlap of the predicted hands with the box that they are expected in: below it, they are others
APART = 0.3  # of the side of a common crop: two hands that are both smaller in it get a crop each
LOOKS = 3  # at a box, until the agreement suffices: fast hands, and whole images, need more than one
SMALLEST_TRACKED = 16  # pixels: a box without hands shrinks until it is refused
CUT = 0.2  # histogram distance of successive frames: at most 0.10 in clips at 5 frames/s, at least 0.25 at cuts
BINS, THUMBNAIL = 8, 64  # of each channel of that histogram; pixels


class Look(NamedTuple):
    """A crop of one image, and the hands predicted from it."""

    image: np.ndarray  # (H, W, 3) uint8 BGR
    box: Box | None  # None: the whole image
    crop: Crop
    hands: Reconstruction  # without the leading axis, on the CPU

    @property
    def agreement(self) -> float:
        """Intersection over union of the box and that of the predicted hands, in [0, 1]."""
        height, width = self.image.shape[:2]
        return overlap(self.box or (0.0, 0.0, float(width), float(height)), hands_box(self.hands))

    @property
    def usable_box(self) -> bool:
        """Whether the predicted hands' box can be cropped: of some size, with its centre in the image."""
        height, width = self.image.shape[:2]
        box = hands_box(self.hands)
        left, top, across, down = box
        if min(across, down) < SMALLEST_TRACKED or not (
            0 <= left + across / 2 < width and 0 <= top + down / 2 < height
        ):
            return False
        try:
            check_box(box, width, height)
        except UserError:
            return False
        return True


def hands_box(hands: Reconstruction) -> Box:
    """Bounding box of the present hands' predicted vertices, of one reconstruction (no leading axis), in image pixels.

    They are projected by the predicted weak-perspective cameras, as ``joints_px`` are.
    """
    relative = (hands.vertices - hands.roots[:, None])[..., :2]
    uv = hands.camera[:, None, :1] * relative + hands.camera[:, None, 1:]
    pixels = (from_uv(uv, CROP_SIZE) - hands.to_crop[:2, 2]) / hands.to_crop[0, 0]
    low, high = extent_of(pixels[None], hands.counted[None])
    left, top, width, height = torch.cat([low[0], (high - low)[0]]).tolist()
    return left, top, width, height


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes."""
    across, down = (min(one[i] + one[i + 2], other[i] + other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
    common = max(across, 0.0) * max(down, 0.0)
    either = one[2] * one[3] + other[2] * other[3] - common
    return common / either if either > 0 else 0.0


def look(
    reconstruct: Reconstructor, images: Sequence[np.ndarray], crops: Sequence[Crop], boxes: Sequence[Box | None]
) -> list[Look]:
    """Predict the hands in crops of images, ``box`` being what each crop was cut from."""
    hands = reconstruct.from_crops(crops).cpu()
    return [Look(*each, hands.one(number)) for number, each in enumerate(zip(images, boxes, crops))]


def look_again(reconstruct: Reconstructor, looks: Sequence[Look]) -> list[Look]:
    """Crop again around the predicted hands and predict again; looks whose hands leave the image are kept.

    Hands that are far apart get a crop each, where the network tells which hands a crop shows.
    """
    seen = list(looks)
    asked = [(number, box) for number, each in enumerate(looks) if each.usable_box for box in _next_boxes(each)]
    if not asked:
        return seen
    images, boxes = [looks[number].image for number, _ in asked], [box for _, box in asked]
    crops = [cut_crop(image, box, looks[n].crop.intrinsics) for image, (n, box) in zip(images, asked)]
    found: dict[int, list[Look]] = {}
    for (number, _), second in zip(asked, look(reconstruct, images, crops, boxes)):
        found.setdefault(number, []).append(second)
    for number, each in found.items():
        if len(each) == 1:
            seen[number] = each[0]
        elif all(one.hands.present[hand] for hand, one in enumerate(each)):
            seen[number] = looks[number]._replace(hands=_from_a_crop_each(looks[number], *each))
    return seen


def _next_boxes(found: Look) -> list[Box]:
    """The box of both hands, or one of each if they are far apart: without overlap, and small in a common crop."""
    hands = found.hands
    together = hands_box(hands)
    if hands.presence is None or not hands.present.all():
        return [together]
    each = [hands_box(hands._replace(present=torch.arange(2) == hand)) for hand in (LEFT, RIGHT)]
    shown = max(together[2:]) / HANDS_IN_CROP  # side of the next crop
    small = all(max(box[2:]) < APART * shown and min(box[2:]) >= SMALLEST_TRACKED for box in each)
    return each if small and overlap(*each) == 0 else [together]


def _from_a_crop_each(found: Look, left: Look, right: Look) -> Reconstruction:
    """The left hand of one look and the right hand of another, with cameras of the crop in which both were found."""
    hands, crop = found.hands, found.crop.matrix
    one, other = left.hands, right.hands
    names = ['vertices', 'joints', 'roots', 'joints_px', 'root_rotation', 'pose', 'shape', 'presence']
    names += [] if one.visible is None else ['visible', 'deviation']
    values = {name: torch.stack([getattr(one, name)[LEFT], getattr(other, name)[RIGHT]]) for name in names}
    cameras = []
    for hand, look in ((LEFT, left), (RIGHT, right)):
        change = crop @ np.linalg.inv(look.crop.matrix)  # pixels of the one crop -> pixels of the other
        scale, *shift = look.hands.camera[hand].double().tolist()
        moved = to_uv(change[0, 0] * from_uv(torch.tensor(shift), CROP_SIZE) + torch.from_numpy(change[:2, 2]))
        cameras.append(torch.tensor([change[0, 0] * scale, *moved.tolist()]))
    return hands._replace(
        **values,
        camera=torch.stack(cameras),
        offset=values['roots'][RIGHT] - values['roots'][LEFT],
        residual_px=torch.maximum(one.residual_px, other.residual_px),
    )


class SceneCuts:
    """Detects that a video cuts to another scene, by the colours of successive frames."""

    def __init__(self) -> None:
        self.before: np.ndarray | None = None

    def __call__(self, image: np.ndarray) -> bool:
        """Whether ``image`` (H, W, 3) uint8 BGR is the first of another scene than the image before."""
        small = cv2.resize(image, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
        colours = cv2.calcHist([small], [0, 1, 2], None, [BINS] * 3, [0, 256] * 3) / THUMBNAIL**2
        before, self.before = self.before, colours
        return before is not None and float(np.abs(colours - before).sum()) / 2 > CUT


def jumped(before: Box | None, now: Box | None) -> bool:
    """Whether the hands of a frame, in box ``now``, are others than those of the frame before."""
    return before is not None and now is not None and overlap(before, now) < NEAR


class Sight(NamedTuple):
    """What a tracker finds in one frame."""

    look: Look | None  # None: no hands
    cut: bool  # whether another scene begins, or the hands jump: they are not those of the frame before, moved


class Tracker:
    """Follows one pair of hands through the frames of a video.

    start: image -> boxes to look for the hands in, the likeliest first, None for the whole image; called for the first
    frame and wherever the hands were lost: where a prediction's box does not agree with the box it was made from, where
    it leaves the image, and where the scene is cut. refine: look twice at every frame.
    """

    def __init__(
        self, reconstruct: Reconstructor, start: Callable[[np.ndarray], Sequence[Box | None]], *, refine: bool = False
    ):
        self.reconstruct, self.start, self.refine = reconstruct, start, refine
        self.box: Box | None = None  # of the hands in the frame before
        self.present: Tensor | None = None  # (2,) bool: the hands in the frame before
        self.is_cut = SceneCuts()

    def __call__(self, image: np.ndarray, intrinsics: np.ndarray) -> Sight:
        """Find the hands in the next frame, (H, W, 3) uint8 BGR, with intrinsics (3, 3)."""
        cut = self.is_cut(image)
        found = None
        if self.box is not None and not cut:
            found = self._look(image, self.box, intrinsics, least=1 + self.refine, agreement=KEPT)
        if found is None:
            found = self._search(image, intrinsics)
            self.present = None
        if found is not None:
            found = found._replace(hands=self._without_flicker(found.hands))
        before, self.box = self.box, None if found is None else hands_box(found.hands)
        return Sight(found, cut or jumped(before, self.box))

    def _without_flicker(self, hands: Reconstruction) -> Reconstruction:
        """Let a hand come and go only where its presence is beyond doubt."""
        if hands.presence is not None and self.present is not None:
            present = hands.presence > torch.where(self.present, STAYS, APPEARS)
            if present.any() and not torch.equal(present, hands.present):
                hands = with_present(hands.with_leading_axis(), present[None]).one(0)
        self.present = hands.present
        return hands

    def _search(self, image: np.ndarray, intrinsics: np.ndarray) -> Look | None:
        for box in self.start(image):
            found = self._look(image, box, intrinsics, least=2, agreement=FOUND if box is None else KEPT)
            if found is not None:
                return found
        return None

    def _look(
        self, image: np.ndarray, box: Box | None, intrinsics: np.ndarray, *, least: int, agreement: float
    ) -> Look | None:
        """Look ``least`` times or more, until box and prediction agree; None if they never do."""
        found = look(self.reconstruct, [image], [cut_crop(image, box, intrinsics)], [box])
        for number in range(1, LOOKS + 1):
            if number > 1:
                found = look_again(self.reconstruct, found)
            if not (found[0].usable_box and found[0].hands.present.any()):
                return None
            if number >= least and found[0].agreement >= agreement:
                near = box is None or overlap(box, hands_box(found[0].hands)) >= NEAR
                return found[0] if near else None
        return None


def box_around_both(
    reconstruct: Reconstructor, image: np.ndarray, intrinsics: np.ndarray, detection: Detection
) -> Box | None:
    """The detected box; with one hand found, that of both hands which are predicted around it."""
    if detection.hands != 1:
        return detection.box
    [first] = look(reconstruct, [image], [cut_crop(image, detection.box, intrinsics)], [detection.box])
    return hands_box(first.hands) if first.usable_box else detection.box


def box_in_image(
    reconstruct: Reconstructor, image: np.ndarray, intrinsics: np.ndarray, detection: Detection
) -> Box | None:
    """``box_around_both``; with no hand found, the hands are looked for in the whole image. None without hands."""
    if detection.hands:
        return box_around_both(reconstruct, image, intrinsics, detection)
    found = Tracker(reconstruct, lambda image: [None])(image, intrinsics).look
    return None if found is None else found.box
