"""Sheets of figures of a network on some samples: predictions beside truth, stages, internal maps."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dataset.batch import Batch, BatchMaker
from dataset.prepared import PreparedSplit
from dataset.targets import only_present
from evaluation.metrics import predicted_classes
from evaluation.network_maps import NetworkMaps, forward_with_maps
from models import DIR
from models.predictions import DIROutput
from utils.drawing import (
    RowInputs,
    captioned_row,
    heat_map,
    mesh_overlay,
    picture_sheet,
    prediction_row,
    range_text,
    segmentation_picture,
    write_image,
)
from utils.geometry import CROP_SIZE, from_uv
from utils.hand import SIDES
from utils.masking import where_leading


class Seen(NamedTuple):
    """Some samples with a network's predictions."""

    titles: list[str]
    crops: np.ndarray  # (B, 256, 256, 3) uint8 BGR, as in the files
    batch: Batch
    output: DIROutput
    maps: NetworkMaps
    root_joint: int  # that the predictions are relative to
    faces: np.ndarray  # (3076, 3) of both hands as one mesh


def spread_over(length: int, count: int) -> list[int]:
    """At most ``count`` sample numbers, evenly spaced over a split: neighbours often show the same hands."""
    return [i * length // min(count, length) for i in range(min(count, length))]


def draw_samples(
    model: DIR, dataset: PreparedSplit, indices: Iterable[int], batch_maker: BatchMaker, *, path: str | Path
) -> None:
    """Run ``model`` on some samples and write the sheet of predictions beside truth to ``path``."""
    seen = look(model, dataset, indices, batch_maker)
    write_image(path, prediction_sheet(seen, predicted_meshes(seen, -1), true_meshes(seen)))


def draw_sheets(
    model: DIR, dataset: PreparedSplit, indices: Iterable[int], batch_maker: BatchMaker
) -> dict[str, np.ndarray]:
    """Every sheet of some samples, from one forward pass: {name: (H, W, 3) uint8 BGR}.

    A model without dense heads has no 'segmentation', one that draws no joint features no 'bone_features'.
    """
    seen = look(model, dataset, indices, batch_maker)
    stages, truth = [predicted_meshes(seen, stage) for stage in range(len(seen.output.stages))], true_meshes(seen)
    sheets = {
        'validation': prediction_sheet(seen, stages[-1], truth),
        'stages': stage_sheet(seen, stages, truth),
        'attention': attention_sheet(seen),
    }
    if seen.maps.bone_features:
        sheets['bone_features'] = bone_feature_sheet(seen)
    if seen.output.segmentation is not None:
        sheets['segmentation'] = segmentation_sheet(seen)
    return sheets


@torch.inference_mode()
def look(model: DIR, dataset: PreparedSplit, indices: Iterable[int], batch_maker: BatchMaker) -> Seen:
    """One forward pass over some samples, in evaluation mode; the model's own mode is restored."""
    was_training = model.training
    model.eval()
    samples = dataset.__getitems__(list(indices))
    batch = batch_maker(samples)
    output, maps = forward_with_maps(model, model.preprocess.normalise(batch.image))
    model.train(was_training)
    return Seen(
        [f'{dataset.folder.name} sample {index}' for index in samples.index.tolist()],
        samples.image.numpy(),
        batch,
        output,
        maps,
        model.hand_head.root_joint,
        batch_maker.hands.mesh_faces,
    )


def predicted_meshes(seen: Seen, stage: int) -> list[np.ndarray]:
    """A stage's meshes over each crop, placed at the true roots as for the pixel errors; without absent hands."""
    root = seen.batch.target.joints[:, :, seen.root_joint, None]
    return _meshes(seen, seen.output.stages[stage].vertices + root)


def true_meshes(seen: Seen) -> list[np.ndarray]:
    """The true meshes over each crop, without absent hands."""
    return _meshes(seen, seen.batch.target.vertices)


def _meshes(seen: Seen, vertices: Tensor) -> list[np.ndarray]:
    vertices = only_present(vertices, seen.batch.target.present)
    return [
        mesh_overlay(crop, hands, intrinsics, seen.faces, smooth_edges=1)
        for crop, hands, intrinsics in zip(seen.crops, vertices, seen.batch.intrinsics)
    ]


def prediction_sheet(seen: Seen, predicted: list[np.ndarray], true: list[np.ndarray]) -> np.ndarray:
    """Input, skeletons, meshes and masks: the last stage's beside the true ones, from meshes already drawn."""
    output, target = seen.output, seen.batch.target
    pixels, true_pixels = (from_uv(uv, CROP_SIZE) for uv in (output.stages[-1].joints_uv, target.joints_uv))
    if output.presence is not None:
        pixels = where_leading(output.presence > 0, pixels, torch.nan)  # which is not drawn
    if target.present is not None:
        true_pixels = where_leading(target.present, true_pixels, torch.nan)
    # A model without dense heads has no mask to show.
    logits = output.segmentation
    labels = torch.zeros(len(predicted), 1, 1) if logits is None else logits.argmax(1)
    rows = zip(seen.crops, pixels, true_pixels, predicted, true, labels, target.segmentation)
    return picture_sheet([prediction_row(RowInputs(*row)) for row in rows], seen.titles)


def stage_sheet(seen: Seen, stages: list[list[np.ndarray]], true: list[np.ndarray]) -> np.ndarray:
    """The network input, the meshes of every stage and the true ones, already drawn."""
    captions = [
        _input_caption(seen),
        'stage 0, the first estimate',
        *(f'stage {stage}' for stage in range(1, len(stages))),
        'truth',
    ]
    return picture_sheet([captioned_row(row, captions) for row in zip(_inputs(seen), *stages, true)], seen.titles)


def attention_sheet(seen: Seen) -> np.ndarray:
    """The network input and the attention of each hand's first estimate."""
    return _heat_sheet(seen, {f'{side} hand': seen.maps.attention[:, hand] for hand, side in enumerate(SIDES)})


def bone_feature_sheet(seen: Seen) -> np.ndarray:
    """The network input and the features that each stage draws along its predicted bones."""
    return _heat_sheet(seen, {f'stage {stage}': norm for stage, norm in enumerate(seen.maps.bone_features, 1)})


def segmentation_sheet(seen: Seen) -> np.ndarray:
    """The network input, the predicted classes as evaluated, and the true ones."""
    true, logits = seen.batch.target.segmentation, seen.output.segmentation
    assert logits is not None  # the caller skips this sheet for a model without dense heads
    predicted = predicted_classes(logits, true.shape[-2:])
    captions = [_input_caption(seen), 'predicted classes', 'true classes']
    rows = [
        captioned_row([image, segmentation_picture(ours), segmentation_picture(theirs)], captions)
        for image, ours, theirs in zip(_inputs(seen), predicted, true)
    ]
    return picture_sheet(rows, seen.titles)


def _heat_sheet(seen: Seen, maps: dict[str, Tensor]) -> np.ndarray:
    """Maps (B, h, w) over the crops beside the network input, each with its name and range."""
    rows = []
    for crop, image, *values in zip(seen.crops, _inputs(seen), *maps.values()):
        captions = [_input_caption(seen), *(f'{name}: {range_text(one)}' for name, one in zip(maps, values))]
        rows.append(captioned_row([image, *(heat_map(crop, one) for one in values)], captions))
    return picture_sheet(rows, [f'{title}; dark: least, bright: most of each map' for title in seen.titles])


def _inputs(seen: Seen) -> np.ndarray:
    """The network input as images, (B, s, s, 3) uint8 BGR."""
    return seen.batch.image.permute(0, 2, 3, 1).round().clamp(0, 255).byte().cpu().numpy()


def _input_caption(seen: Seen) -> str:
    return 'network input, {} x {}'.format(*seen.batch.image.shape[-2:])
