"""Samples -> batches: augmented images and training targets, made on the device of the model."""

from collections.abc import Callable
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
    make_target,
    mirror_and_rotate,
    only_present,
    stored_maps,
)
from dataset.vertex_colours import canonical_colours, load_colours
from manopth import HandPair, TwoHandLayer
from models import dense_size
from models.predictions import Target
from utils.geometry import CROP_SIZE


class Batch(NamedTuple):
    """The input of one training or evaluation step."""

    image: Tensor  # (B, 3, s, s) float32 BGR in [0, 255], augmented: the network takes ``preprocess.normalise`` of it
    target: Target
    intrinsics: Tensor  # (B, 3, 3) of the 256 crop, after augmentation
    index: Tensor  # type: ignore[assignment]  # (B,) sample numbers; hides tuple.index, which no batch needs


def learns_dense(cfg: CfgNode) -> bool:
    """Whether this configuration trains on dense maps."""
    return cfg.MODEL.DENSE_HEADS and cfg.LOSS.WEIGHT.DENSE > 0


def build_batch_maker(cfg: CfgNode, hands: HandPair, *, for_losses: bool = False) -> 'BatchMaker':
    """Build the batch maker that ``cfg`` describes. Raises UserError if DATASET.COLOURS cannot be read.

    for_losses: segmentation and dense maps at the size of the dense heads' outputs, to which the criterion would resize
    them, instead of the image's; also renders dense maps, if the network learns them.
    """
    renderer = None
    if cfg.DATASET.TARGETS == 'render':
        colours = None
        if for_losses and learns_dense(cfg):  # nothing else reads dense maps
            colours = load_colours(cfg.DATASET.COLOURS) if cfg.DATASET.COLOURS else canonical_colours(hands)
        renderer = TargetRenderer(hands, colours)
    return BatchMaker(
        hands,
        image_size=cfg.MODEL.IMAGE_SIZE,
        target_size=dense_size(cfg) if for_losses else None,
        renderer=renderer,
        visibility=cfg.MODEL.CONFIDENCE,
    )


class BatchMaker(nn.Module):
    """Augment a batch of samples and compute its targets: Sample -> Batch.

    hands: the pair that the annotations are posed with. image_size: side of the network's input in pixels. target_size:
    side of segmentation and dense maps, a divisor of ``image_size``; None for the same. renderer: renders segmentation
    and dense maps; without it, they come from the samples' masks and dense maps. visibility: targets tell the visible
    joints.
    """

    def __init__(
        self,
        hands: HandPair,
        *,
        image_size: int = CROP_SIZE,
        target_size: int | None = None,
        renderer: TargetRenderer | None = None,
        visibility: bool = False,
    ):
        super().__init__()
        self.hands, self.image_size, self.renderer = hands, image_size, renderer
        self.target_size = image_size if target_size is None else target_size
        if image_size % self.target_size:
            raise ValueError(f'target_size is {target_size}; it must divide image_size, {image_size}.')
        self.hand_layer = TwoHandLayer(hands)
        self.visibility = JointVisibility(hands) if visibility else None

    @property
    def device(self) -> torch.device:
        """The device on which batches are made."""
        return next(self.buffers()).device

    @torch.no_grad()
    def forward(self, samples: Sample) -> Batch:
        all_present = bool(samples.present.all())
        samples, plan = samples.to(self.device), samples.augmentation  # decisions are taken on the host
        on_device = AugmentationParameters(*(x.to(self.device, torch.float32, non_blocking=True) for x in plan))
        flip, image_map = plan.flip.to(self.device), augmentation_map(on_device)
        present = None
        if not all_present:
            present = torch.where(flip[:, None], samples.present.flip(1), samples.present)

        hands = mirror_and_rotate(camera_hands(self.hand_layer, samples), flip=flip, angle=on_device.angle)
        intrinsics = augmented_intrinsics(samples.intrinsics, image_map=image_map, flip=flip, angle=on_device.angle)
        size, target_size = self.image_size, self.target_size
        if self.renderer:
            maps = self.renderer(
                only_present(hands.vertices, present),
                intrinsics=intrinsics,
                image_map=image_map,
                size=size,
                target_size=target_size,
            )
        else:
            maps = stored_maps(samples, image_map, size=size, target_size=target_size)
        visible = None if self.visibility is None else self.visibility(hands, intrinsics, present)
        target = make_target(
            hands, intrinsics, segmentation=maps.segmentation, dense=maps.dense, present=present, visible=visible
        )
        return Batch(augment_images(samples, image_map, size=size), target, intrinsics, samples.index)


def parts_of(samples: Sample, size: int) -> list[Sample]:
    """Split a batch into parts of ``size`` samples, without its list of damage; the last may be smaller."""
    samples = samples._replace(damage=())

    def part(begin: int) -> Sample:
        return _map_tensors(lambda values: values[begin : begin + size], samples)

    return [part(begin) for begin in range(0, len(samples.index), size)]


def _map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply ``function`` to the tensors of nested tuples with named fields; None stays None."""
    if tree is None or isinstance(tree, Tensor):
        return None if tree is None else function(tree)
    return type(tree)(*(_map_tensors(function, branch) for branch in tree))
