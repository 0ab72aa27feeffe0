"""Per-sample files of an evaluation: per_sample.csv, and samples.npz with the worst, median and best samples."""

import csv
import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataset.batch import BatchMaker
from dataset.prepared import PreparedSplit
from evaluation.evaluate import Evaluation
from utils.hand import HAND_SCALE

SAMPLES_VERSION = 1
KINDS = ('worst', 'median', 'best')
OF_EACH_KIND = 4


def choose_samples(error: Tensor, of_each: int = OF_EACH_KIND) -> list[tuple[str, int]]:
    """Choose rows by error (N,): ('worst', 'median' or 'best', row), each kind by descending error, no row twice.

    Few samples yield fewer of each kind; NaN errors are skipped.
    """
    descending = error.argsort(descending=True, stable=True)
    order = descending[error[descending].isfinite()].tolist()
    each = min(of_each, -(-len(order) // 3))
    middle = max((len(order) - each) // 2, 0)
    chosen: dict[int, str] = {}
    for kind, rows in zip(KINDS, (order[:each], order[middle : middle + each], order[-each:] if each else [])):
        for row in rows:
            chosen.setdefault(row, kind)
    return [(kind, row) for row, kind in chosen.items()]


@torch.inference_mode()
def chosen_samples_npz(model: Any, dataset: PreparedSplit, batch_maker: BatchMaker, result: Evaluation) -> bytes | None:
    """Predict the chosen samples again -> the content of samples.npz (docs/formats.md); None if no error is finite.

    model: a network with ``hand_head.root_joint`` and ``preprocess``.
    """
    errors = result.stages[-1]
    chosen = choose_samples(errors['joint_mm'].nanmean(1))
    if not chosen:
        return None
    kinds, rows = [kind for kind, _ in chosen], [row for _, row in chosen]
    index = result.indices[rows].tolist()
    samples = dataset.__getitems__(index)
    batch = batch_maker(samples)
    stages = model.eval()(model.preprocess.normalise(batch.image)).stages
    root = model.hand_head.root_joint
    vertices = torch.stack([hands.vertices for hands in stages], 1)
    truth, roots = batch.target.vertices, batch.target.joints[:, :, root]
    if batch.target.present is not None:  # an absent hand is a point at the root of the other one
        shown = batch.target.present[:, :, None]
        roots = torch.where(shown, roots, roots.flip(1))
        truth = torch.where(shown[..., None], truth, roots[:, :, None])
        vertices = torch.where(shown[:, None, ..., None], vertices, 0.0)
    content: dict[str, Any] = {
        'version': SAMPLES_VERSION,
        'kind': np.array(kinds),
        'index': np.array(index),
        'name': np.array([dataset.name(i) for i in index]),
        'image': samples.image,
        'vertices': vertices,
        'offset': torch.stack([hands.offset for hands in stages], 1) * HAND_SCALE,
        'true_vertices': truth,
        'true_roots': roots,
        'intrinsics': batch.intrinsics,
        'faces': batch_maker.hands.faces.astype(np.int32),
        'joint_mm': errors['joint_mm'][rows],
        'root_mm': errors['root_mm'][rows],
    }
    file = io.BytesIO()
    arrays: dict[str, Any] = {
        name: value.cpu().numpy() if isinstance(value, Tensor) else np.asarray(value) for name, value in content.items()
    }
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def per_sample_csv(result: Evaluation, dataset: PreparedSplit) -> str:
    """per_sample.csv: one row per sample, its number, file and metrics; empty without a hand or an annotation.

    Raises ValueError if the details were not evaluated.
    """
    if result.details is None:
        raise ValueError('per_sample.csv needs all metrics: evaluate with details=True.')
    columns: dict[str, Tensor] = {}
    for metric in result.metrics:
        if metric.measure and metric.in_csv:
            columns |= metric.csv_columns(result.details)
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(['index', 'file', *columns])
    for index, *values in zip(result.indices.tolist(), *(column.tolist() for column in columns.values())):
        table.writerow([index, dataset.name(index), *map(_cell, values)])
    return text.getvalue()


def _cell(value: float | bool) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return '' if value != value else f'{value:.6f}'
