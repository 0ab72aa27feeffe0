"""Evaluated runs as apps/eval_interhand.py --out and train.py write them, with synthetic errors and stand-in hands.

python tests/report_tree.py FOLDER [FRAMES]     # a run folder, to look at the report or to time it
"""

import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import torch

from evaluation.aggregation import (
    BOX_IOU_EDGES,
    DISTANCE_EDGES,
    Samples,
    binned,
    by_joint,
    intervals,
    pck,
    penetration,
    sides,
)
from evaluation.metrics import PROTOCOLS
from evaluation.registry import headline
from evaluation.runs import METRICS_VERSION
from evaluation.summary import summarise
from manopth import Hands, TwoHandLayer
from manopth.rotations import axis_angle_to_matrix
from models.hands import load_hands
from utils.config import flatten, load_config
from utils.drawing import mesh_overlay
from utils.hand import NUM_JOINTS

STAGES = 3
INTRINSICS = torch.tensor([[560.0, 0.0, 128.0], [0.0, 560.0, 128.0], [0.0, 0.0, 1.0]])
SKIN_BGR = ((120, 150, 205), (130, 160, 215))


def write_run(
    folder: Path,
    *,
    frames: int = 120,
    samples: int = 6,
    error: float = 10.0,
    seed: int = 0,
    overrides=(),
    name: str = 'published',
    **more,
) -> Path:
    """A run folder with eval/ (metrics.json, per_sample.csv, samples.npz) and log.jsonl; ``more`` overrides metrics."""
    random, protocol = np.random.default_rng(seed), PROTOCOLS[name]
    distance = random.gamma(1.2, 14, frames)  # mm
    stages = [
        make_errors(random, distance, error * (1 + 0.4 * left), protocol.root_joint) for left in reversed(range(STAGES))
    ]
    errors, folder = stages[-1], Path(folder)
    iou, depth = np.exp(-distance / 20) * random.uniform(0.2, 0.9, frames), random.gamma(0.4, 6, frames)
    depth[distance > 8] = 0
    joints, fingers = by_joint(errors['joints_mm'])
    metrics = {
        'version': METRICS_VERSION,
        'model': str(folder),
        'data': 'data/interhand2.6m/test',
        **summarise(errors, protocol),
        'subset': None,
        'interval_95': intervals(errors, [metric.key for metric in headline()], resamples=100),
        'pa_joint_mm': sides(0.45 * error, 0.43 * error),
        'pa_vert_mm': sides(0.44 * error, 0.42 * error),
        'pck': pck(errors['joints_mm']),
        'per_joint_mm': joints,
        'per_finger_mm': fingers,
        'by_box_iou': binned(errors, torch.from_numpy(iou), BOX_IOU_EDGES),
        'by_distance_mm': binned(errors, torch.from_numpy(distance), DISTANCE_EDGES),
        'by_visibility': [
            {'from': low, 'to': low + 0.25, 'hands': hands}
            | ({'joint_mm': error * (1.6 - 0.7 * low), 'vert_mm': error * (1.5 - 0.7 * low)} if hands else {})
            for low, hands in zip((0.0, 0.25, 0.5, 0.75), (0, frames // 8, frames // 2, 11 * frames // 8))
        ],
        'penetration': penetration(torch.from_numpy(depth)),
        'true_penetration': penetration(torch.from_numpy(depth / 2)),
        'segmentation_iou': {'background': 0.985, 'left': 0.871, 'right': 0.884, 'hands': 0.8775},
        'placement_mm': {'left': 41.2, 'right': 39.5, 'all': 40.35, 'depth': 36.7},
        'stages': [summarise(stage, protocol) for stage in stages],
        'config': flatten(load_config(None, list(overrides))),
        'training': {'epoch': 3, 'seconds': 5400.0},
    }
    metrics['protocol'] |= {'name': name, 'split': 'test'}
    evaluation = folder / 'eval'
    evaluation.mkdir(parents=True, exist_ok=True)
    (evaluation / 'metrics.json').write_text(json.dumps(metrics | more))
    write_per_sample(
        evaluation / 'per_sample.csv',
        errors,
        {'box_iou': iou, 'distance_mm': distance, 'penetration_mm': depth, 'true_penetration_mm': depth / 2},
    )
    np.savez_compressed(evaluation / 'samples.npz', **make_samples(errors, samples, seed=seed))
    write_log(folder / 'log.jsonl', random, error)
    return folder


def file_name(index: int) -> str:
    return f'Capture{index % 2}/ROM0{index % 9}_Interlocked_Fingers/cam4002{index % 80:02d}/image{index:05d}.jpg'


def make_errors(random: np.random.Generator, distance: np.ndarray, error: float, root_joint: int) -> Samples:
    """Long-tailed errors, larger towards the fingertips and where the hands are close."""
    frames = len(distance)
    outwards = np.array([0.3, *5 * (0.7, 0.9, 1.1, 1.4)])
    hard = random.gamma(5, 0.2, (frames, 2, 1)) * (0.8 + 0.8 * np.exp(-distance / 12))[:, None, None]
    joints = torch.from_numpy(error * hard * outwards * random.gamma(6, 1 / 6, (frames, 2, NUM_JOINTS)))
    joints[:, :, root_joint] = 0
    mean = joints.mean(-1)
    return {
        'joint_mm': mean,
        'vert_mm': 0.97 * mean,
        'joint_px': 0.6 * mean,
        'vert_px': 0.59 * mean,
        'root_mm': 2.5 * mean.mean(-1) + 8,
        'joints_mm': joints,
    }


def write_per_sample(path: Path, errors: Samples, more: dict[str, np.ndarray]) -> None:
    columns = {
        name: values.numpy() for metric in headline() for name, values in metric.csv_columns(errors).items()
    } | more
    with open(path, 'w', newline='') as file:
        table = csv.writer(file)
        table.writerow(['index', 'file', *columns])
        for index, values in enumerate(zip(*columns.values())):
            table.writerow([index, file_name(index), *(f'{value:.6f}' for value in values)])


def make_samples(errors: Samples, count: int, *, seed: int) -> dict[str, np.ndarray]:
    """The arrays of samples.npz: meshes whose joint errors are those of ``errors``, in front of a synthetic image."""
    order = errors['joint_mm'].mean(1).argsort(descending=True).tolist()
    third = count // 3
    middle = (len(order) - third) // 2
    chosen = [('worst', i) for i in order[: count - 2 * third]] + [
        ('median', i) for i in order[middle : middle + third]
    ]
    chosen += [('best', i) for i in order[::-1][:third]]
    index = torch.tensor([i for _, i in chosen])
    models = load_hands('standin')
    generator = torch.Generator().manual_seed(seed)
    layer, true_pose, wrong_pose = TwoHandLayer(models), random_pose(generator, count), random_pose(generator, count)
    truth = posed(layer, true_pose)
    stages = [
        hands_with_error(layer, true_pose, wrong_pose, more * errors['joint_mm'][index].float() / 1000)
        for more in torch.linspace(1.8, 1.0, STAGES)
    ]
    vertices = torch.stack([stage.vertices for stage in stages], 1)
    roots = torch.tensor([[-0.055, 0.075, 0.62], [0.055, 0.075, 0.62]]) + 0.008 * torch.randn(
        count, 2, 3, generator=generator
    )
    wander = 0.02 * torch.randn(count, 1, 3, generator=generator)
    offset = (roots[:, 1] - roots[:, 0])[:, None] + torch.linspace(1.8, 1.0, STAGES)[:, None] * wander
    placed = truth.vertices + roots[:, :, None]
    faces = models.mesh_faces
    backgrounds = np.random.default_rng(seed).integers(30, 170, (count, 2, 2, 3), dtype=np.uint8)
    images = [
        mesh_overlay(
            cv2.resize(corners, (256, 256)), hands, INTRINSICS, faces, alpha=1.0, colours_bgr=SKIN_BGR, smooth_edges=1
        )
        for corners, hands in zip(backgrounds, placed)
    ]
    return {
        'version': np.array(1),
        'index': index.numpy(),
        'kind': np.array([kind for kind, _ in chosen]),
        'name': np.array([file_name(i) for _, i in chosen]),
        'image': np.stack(images),
        'vertices': vertices.numpy(),
        'offset': offset.numpy(),
        'true_vertices': placed.numpy(),
        'true_roots': roots.numpy(),
        'intrinsics': INTRINSICS.expand(count, 3, 3).numpy(),
        'faces': np.stack([model.faces for model in models]).astype(np.int32),
        'joint_mm': errors['joint_mm'][index].numpy(),
        'root_mm': errors['root_mm'][index].numpy(),
    }


def random_pose(generator: torch.Generator, count: int) -> torch.Tensor:
    """(K, 2, 58): root axis-angle, pose coefficients, shape of both hands."""
    spread = torch.cat([torch.full((3,), 0.15), torch.full((45,), 0.35), torch.full((10,), 0.4)])
    return spread * torch.randn(count, 2, 58, generator=generator)


def posed(layer: TwoHandLayer, numbers: torch.Tensor) -> Hands:
    """Both hands seen from the back, fingers pointing up and inwards, each centred on its wrist."""
    # The rest hands point along -x (right) and +x (left), palms down: fingers to -y, palms away from the camera.
    upright = torch.tensor([[[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]], [[0.0, 0, -1], [1, 0, 0], [0, -1, 0]]])
    lean = torch.tensor([[0.2, 0.0, 0.35], [0.2, 0.0, -0.35]])
    root, pose, betas = numbers.split([3, 45, 10], -1)
    return layer(axis_angle_to_matrix(root + lean) @ upright, pose, betas, root_joint=0)


def hands_with_error(
    layer: TwoHandLayer, true_pose: torch.Tensor, wrong_pose: torch.Tensor, wanted: torch.Tensor
) -> Hands:
    """Hands between the true and a wrong pose with the mean joint errors ``wanted`` (K, 2) m."""
    true_joints, share = posed(layer, true_pose).joints, torch.ones_like(wanted)
    for _ in range(6):
        hands = posed(layer, true_pose + share[..., None] * (wrong_pose - true_pose))
        share = share * wanted / torch.linalg.vector_norm(hands.joints - true_joints, dim=-1).mean(-1)
    return hands


def write_log(path: Path, random: np.random.Generator, error: float, steps: int = 4000) -> None:
    terms = [
        f'{name}_{stage}'
        for stage in range(STAGES)
        for name in ('joint_uv_left', 'joint_uv_right', 'vertex_xyz_left', 'vertex_xyz_right', 'offset')
    ] + ['lovasz']
    lines = []
    for step in range(20, steps + 1, 20):
        values = {name: 0.3 * (0.1 + np.exp(-step / 700)) * random.uniform(0.8, 1.2) for name in terms}
        rate = 2.5e-4 * (1 + np.cos(step / steps * 3))
        lines.append(
            {
                'kind': 'train',
                'step': step,
                'epoch': step // 1000,
                'lr': rate,
                'samples_per_second': 410 * random.uniform(0.9, 1.05),
                'waiting_for_data': 0.02,
                'total': sum(values.values()),
                **values,
            }
        )
        if step % 1000 == 0:
            for stage in range(STAGES):
                figure = error * (1 + 0.3 * (STAGES - 1 - stage)) * (1 + np.exp(-step / 1500))
                lines.append(
                    {
                        'kind': f'val_stage{stage}',
                        'step': step,
                        'epoch': step // 1000 - 1,
                        'root_mm': 3 * figure,
                        'joint_mm_all': figure,
                        'vert_mm_all': 0.97 * figure,
                    }
                )
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))


if __name__ == '__main__':
    write_run(Path(sys.argv[1]), frames=int((*sys.argv, 120)[2]), samples=12)
