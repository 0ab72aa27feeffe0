"""The worst, median and best samples of an evaluation, with pictures and meshes: samples.npz, for the report."""

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dataset.batch import BatchMaker
from dataset.prepared import PreparedSplit
from evaluation.evaluate import Evaluation
from utils.files import write_atomically
from utils.hand import HAND_SCALE

SAMPLES_VERSION = 1
KINDS = ('worst', 'median', 'best')
OF_EACH_KIND = 4


def choose_samples(error: Tensor, of_each: int = OF_EACH_KIND) -> list[tuple[str, int]]:
    """error (N,) -> ('worst', 'median' or 'best', row), each kind in falling order of its error; no row comes twice.

    Few samples give fewer of each kind; rows without an error (NaN) do not take part.
    """
    order = error.argsort(descending=True, stable=True)
    order = order[error[order].isfinite()].tolist()
    each = min(of_each, -(-len(order) // 3))
    middle = max((len(order) - each) // 2, 0)
    chosen = {}
    for kind, rows in zip(KINDS, (order[:each], order[middle : middle + each], order[-each:] if each else [])):
        for row in rows:
            chosen.setdefault(row, kind)
    return [(kind, row) for row, kind in chosen.items()]


@torch.inference_mode()
def write_chosen_samples(
    path: str | Path, model: nn.Module, dataset: PreparedSplit, batch_maker: BatchMaker, result: Evaluation
) -> None:
    """Predict the chosen samples again and write what docs/formats.md says of samples.npz."""
    errors = result.stages[-1]
    chosen = choose_samples(errors.joint_mm.nanmean(1))
    if not chosen:
        return
    kinds, rows = zip(*chosen)
    index = result.index[list(rows)].tolist()
    samples = dataset.__getitems__(index)
    batch = batch_maker(samples)
    stages = model.eval()(model.preprocess.normalise(batch.image)).stages
    root = model.hand_head.root_joint
    content = {
        'version': SAMPLES_VERSION,
        'kind': np.array(kinds),
        'index': np.array(index),
        'name': np.array([dataset.name(i) for i in index]),
        'image': samples.image,
        'vertices': torch.stack([hands.vertices for hands in stages], 1),
        'offset': torch.stack([hands.offset for hands in stages], 1) * HAND_SCALE,
        'true_vertices': batch.target.vertices,
        'true_roots': batch.target.joints[:, :, root],
        'intrinsics': batch.intrinsics,
        'faces': batch_maker.hands.faces.astype(np.int32),
        'joint_mm': errors.joint_mm[list(rows)],
        'root_mm': errors.root_mm[list(rows)],
    }
    file = io.BytesIO()
    np.savez_compressed(
        file,
        **{
            name: value.cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
            for name, value in content.items()
        },
    )
    write_atomically(path, file.getvalue())
