"""From a network and a data set to a picture sheet: input, skeletons, meshes and masks, prediction beside truth."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import default_collate

from dataset.batch import Batch, BatchMaker
from dataset.interhand import PreparedSplit
from models.predictions import DIROutput
from utils.geometry import CROP_SIZE, from_uv
from utils.visualize import RowInputs, picture_sheet, prediction_row, write_image


def spread_over(length: int, count: int) -> list[int]:
    """At most ``count`` sample numbers, evenly over a split: neighbours are often the same hands."""
    return [i * length // min(count, length) for i in range(min(count, length))]


@torch.inference_mode()
def draw_samples(model: nn.Module, dataset: PreparedSplit, indices: Iterable[int], batch_maker: BatchMaker, *,
                 path: str | Path) -> np.ndarray:
    """Run ``model`` on some samples, write their picture sheet to ``path`` and return it, (H, W, 3) uint8 BGR."""
    was_training = model.training
    model.eval()
    indices = list(indices)
    samples = default_collate([dataset[index] for index in indices])
    batch = batch_maker(samples)
    output = model(batch.image)
    model.train(was_training)
    rows = row_inputs(samples.image.numpy(), batch, output, root_joint=model.hand_head.root_joint)
    models = batch_maker.hand_layer.models
    sheet = picture_sheet([prediction_row(row, models) for row in rows],
                          [f'{dataset.folder.name} sample {index}' for index in indices])
    write_image(path, sheet)
    return sheet


def row_inputs(images: np.ndarray, batch: Batch, output: DIROutput, *, root_joint: int) -> list[RowInputs]:
    """What ``prediction_row`` draws, per sample. ``images``: (B, 256, 256, 3) uint8, not augmented.

    Root-relative predictions are put at the true roots, as the field does for its pixel errors.
    """
    hands, target = output.stages[-1], batch.target
    placed = hands.vertices + target.joints[:, :, root_joint:root_joint + 1]
    predicted_pixels, true_pixels = (from_uv(uv, CROP_SIZE) for uv in (hands.joints_uv, target.joints_uv))
    # A model without dense heads has no mask to show.
    labels = output.segmentation.argmax(1) if output.segmentation.numel() else torch.zeros(len(images), 1, 1)
    columns = (images, batch.intrinsics, predicted_pixels, true_pixels, placed, target.vertices, labels,
               target.segmentation)
    return [RowInputs(*row) for row in zip(*columns)]
