"""Samples -> batches: augmented images and training targets, made on the device of the model."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from dataset.augmentation import AugmentationParameters
from dataset.image_augmentation import augment_images, augmentation_map
from dataset.prepared import Sample
from dataset.targets import (
    JointVisibility,
    TargetRenderer,
    augmented_intrinsics,
    camera_hands,
    classify_mask,
    make_target,
    mirror_and_rotate,
    only_present,
)
from dataset.vertex_colours import canonical_colours, load_colours
from manopth import HandPair, TwoHandLayer
from models.predictions import Target
from utils.geometry import CROP_SIZE

CPU_PART = 8  # samples at a time on a CPU: larger blocks of memory would be fresh pages for every operation


class Batch(NamedTuple):
    """The input of one training or evaluation step."""

    image: Tensor  # (B, 3, s, s) float32 BGR in [0, 255], augmented: the network takes ``preprocess.normalise`` of it
    target: Target
    intrinsics: Tensor  # (B, 3, 3) of the 256 crop, after augmentation
    index: Tensor  # type: ignore[assignment]  # (B,) sample numbers; hides tuple.index, which no batch needs


def learns_dense(cfg: CfgNode) -> bool:
    """Whether this configuration trains on dense maps."""
    return cfg.MODEL.DENSE_HEADS and cfg.LOSS.WEIGHT.DENSE > 0


def build_batch_maker(cfg: CfgNode, hands: HandPair) -> 'BatchMaker':
    """Build the batch maker that ``cfg`` describes. Raises UserError if DATASET.COLOURS cannot be read."""
    renderer = None
    if cfg.DATASET.TARGETS == 'render':
        colours = load_colours(cfg.DATASET.COLOURS) if cfg.DATASET.COLOURS else canonical_colours(hands)
        renderer = TargetRenderer(hands, colours if learns_dense(cfg) else None)
    return BatchMaker(hands, image_size=cfg.MODEL.IMAGE_SIZE, renderer=renderer, visibility=cfg.MODEL.CONFIDENCE)


class BatchMaker(nn.Module):
    """Augment a batch of samples and compute its targets: Sample -> Batch.

    hands: the pair that the annotations are posed with. image_size: side of the network's input in pixels. renderer:
    renders segmentation and dense maps; without it, they come from the samples' masks and dense maps. visibility:
    targets tell the visible joints.
    """

    def __init__(
        self,
        hands: HandPair,
        *,
        image_size: int = CROP_SIZE,
        renderer: TargetRenderer | None = None,
        visibility: bool = False,
    ):
        super().__init__()
        self.hands, self.image_size, self.renderer = hands, image_size, renderer
        self.hand_layer = TwoHandLayer(hands)
        self.visibility = JointVisibility(hands) if visibility else None

    @property
    def device(self) -> torch.device:
        """The device on which batches are made."""
        return next(self.buffers()).device

    def forward(self, samples: Sample) -> Batch:
        make = partial(self._make, both_present=bool(samples.present.all()))  # of all parts alike; on the host
        if self.device.type != 'cpu' or len(samples.index) <= CPU_PART:
            return make(samples)
        return _map_tensors(torch.cat, *map(make, parts_of(samples, CPU_PART)))

    @torch.no_grad()
    def _make(self, samples: Sample, *, both_present: bool) -> Batch:
        samples, plan = samples.to(self.device), samples.augmentation  # on the host, see ``augment_images``
        on_device = AugmentationParameters(*(x.to(self.device, torch.float32, non_blocking=True) for x in plan))
        flip, image_map = plan.flip.to(self.device), augmentation_map(on_device)
        present = None
        if not both_present:
            present = torch.where(flip[:, None], samples.present.flip(1), samples.present)

        hands = mirror_and_rotate(camera_hands(self.hand_layer, samples), flip=flip, angle=on_device.angle)
        intrinsics = augmented_intrinsics(samples.intrinsics, image_map=image_map, flip=flip, angle=on_device.angle)
        stored = {'image': samples.image} | ({} if self.renderer else _stored_targets(samples))
        images = augment_images(stored, plan, image_map=image_map, size=self.image_size)
        if self.renderer:
            segmentation, dense = self.renderer(
                only_present(hands.vertices, present), intrinsics=intrinsics, image_map=image_map, size=self.image_size
            )
        else:
            segmentation, dense = classify_mask(images['mask']), images['dense'] / 255 if 'dense' in images else None
        visible = None if self.visibility is None else self.visibility(hands, intrinsics, present)
        target = make_target(
            hands, intrinsics, segmentation=segmentation, dense=dense, present=present, visible=visible
        )
        return Batch(images['image'], target, intrinsics, samples.index)


def _stored_targets(samples: Sample) -> dict[str, Tensor]:
    if samples.mask is None:
        raise ValueError(
            'The samples have no masks: open the split with_mask=True, or give the batch maker a renderer.'
        )
    return {'mask': samples.mask} | ({} if samples.dense is None else {'dense': samples.dense})


def parts_of(samples: Sample, size: int) -> list[Sample]:
    """Split a batch into parts of ``size`` samples, without its list of damage; the last may be smaller."""
    samples = samples._replace(damage=())

    def part(begin: int) -> Sample:
        return _map_tensors(lambda leaves: leaves[0][begin : begin + size], samples)

    return [part(begin) for begin in range(0, len(samples.index), size)]


def _map_tensors(function: Callable[[list[Tensor]], Tensor], *trees: Any) -> Any:
    """Apply ``function`` to the corresponding tensors of NamedTuples of one structure; None stays None."""
    if trees[0] is None:
        return None
    if isinstance(trees[0], Tensor):
        return function(list(trees))
    return type(trees[0])(*(_map_tensors(function, *leaves) for leaves in zip(*trees)))
