import numpy as np
import pytest
import torch

from evaluation.aggregation import (
    BOX_IOU_EDGES,
    DISTANCE_EDGES,
    Samples,
    binned,
    by_joint,
    by_visibility,
    intervals,
    mean_joint_error,
    pck,
    penetration,
    segmentation_iou,
)
from evaluation.metrics import GRID, Protocol
from evaluation.summary import breakdown, format_breakdown, format_grid, format_summary, summarise
from utils.hand import FINGERS, JOINT_NAMES

HEADLINE = ('joint_mm', 'vert_mm', 'joint_px', 'vert_px', 'root_mm')


def synthetic_samples(frames: int = 40, seed: int = 0) -> Samples:
    """Every column of an evaluation."""
    g = torch.Generator().manual_seed(seed)

    def errors(*shape, mean=10.0):
        return mean * (0.5 + torch.rand(frames, *shape, generator=g, dtype=torch.float64))

    joints = errors(2, 21)
    return {
        'joint_mm': joints.mean(-1),
        'vert_mm': errors(2),
        'joint_px': errors(2),
        'vert_px': errors(2),
        'root_mm': errors(mean=30),
        'joints_mm': joints,
        'pa_joint_mm': errors(2),
        'pa_vert_mm': errors(2),
        'box_iou': errors(mean=0.3),
        'distance_mm': errors(mean=8),
        'penetration_mm': errors(mean=2).sub(2).clamp_min(0),
        'true_penetration_mm': errors(mean=1),
        'visible': errors(2, mean=0.6).clamp_max(1),
        'placement_mm': errors(2, mean=60),
        'placement_depth_mm': errors(2, mean=50),
        'seg_intersection': errors(3, mean=50),
        'seg_union': errors(3, mean=50) + 60,
    }


def test_summary_is_means_over_samples_and_all_is_the_mean_of_the_hands():
    means = torch.tensor([[1.0, 2.0], [3.0, 8.0]])
    errors = {name: means * k for name, k in zip(HEADLINE, (1, 10, 100, 1000))}
    errors |= {'root_mm': torch.tensor([7.0, 9.0]), 'joints_mm': means[..., None].expand(-1, -1, 21)}
    summary = summarise(errors, Protocol(9, False))
    assert summary['joint_mm'] == {'left': 2, 'right': 5, 'all': 3.5}
    assert summary['vert_px'] == {'left': 2000, 'right': 5000, 'all': 3500}
    assert summary['root_mm'] == 8 and summary['frames'] == 2
    assert summary['protocol'] == {
        'root_joint': 9,
        'scale': False,
        'joints': 'regressed',
        'description': 'root joint 9 (middle MCP), scale alignment off, joints regressed from vertices',
    }


def test_summary_prints_published_lines_in_order():
    errors = {
        'joint_mm': torch.DoubleTensor([[10.732769, 9.722339]]),
        'vert_mm': torch.DoubleTensor([[10.47924, 9.521340]]),
        'joint_px': torch.DoubleTensor([[6.329594, 5.843324]]),
        'vert_px': torch.DoubleTensor([[6.235760, 5.768412]]),
        'root_mm': torch.DoubleTensor([29.26052]),
        'joints_mm': torch.full((1, 2, 21), 10.0),
    }
    summary = summarise(errors, Protocol())
    assert (
        format_summary(summary)
        == """\
joint mean error:
    left: 10.732769 mm, right: 9.722339 mm
    all: 10.227554 mm
vert mean error:
    left: 10.479240 mm, right: 9.521340 mm
    all: 10.000290 mm
pixel joint mean error:
    left: 6.329594 px, right: 5.843324 px
    all: 6.086459 px
pixel vert mean error:
    left: 6.235760 px, right: 5.768412 px
    all: 6.002086 px
root error: 29.260520 mm"""
    )


# Intervals


def test_an_interval_contains_its_mean_and_narrows_with_frames():
    protocol = Protocol()
    for frames, half in ((25, 0.5), (400, 0.125)):
        errors = synthetic_samples(frames)
        interval, mean = intervals(errors, HEADLINE), summarise(errors, protocol)
        for name in ('joint_mm', 'vert_mm', 'joint_px', 'vert_px'):
            for side in ('left', 'right', 'all'):
                low, high = interval[name][side]
                assert low < mean[name][side] < high
        low, high = interval['root_mm']
        # A uniform distribution's mean: +- 1.96 sd / sqrt(frames), sd = 30 / sqrt(12).
        assert (high - low) / 2 == pytest.approx(1.96 * 30 / (12 * frames) ** 0.5, rel=0.25)
        assert low < mean['root_mm'] < high
        assert (interval['vert_mm']['left'][1] - interval['vert_mm']['left'][0]) < 10 * half


def test_intervals_are_reproducible_and_skip_missing_annotations():
    errors = synthetic_samples()
    assert intervals(errors, HEADLINE) == intervals(errors, HEADLINE)
    gaps = {name: torch.cat([errors[name]] * 2) for name in (*HEADLINE, 'joints_mm')}
    gaps['root_mm'] = torch.cat([errors['root_mm'], torch.full((40,), torch.nan)])
    low, high = intervals(gaps, HEADLINE)['root_mm']
    assert low < errors['root_mm'].mean() < high


def test_the_interval_of_the_joint_error_is_that_of_its_figure_where_joints_lack_annotation():
    joints = 10 + torch.rand(1000, 2, 21, generator=torch.Generator().manual_seed(0))
    joints[::5] += 20
    joints[::5, :, 8:] = torch.nan  # of the harder frames
    errors = {'joints_mm': joints, 'joint_mm': joints.nanmean(2)}
    figure, found = mean_joint_error(errors), intervals(errors, ['joint_mm'])['joint_mm']
    for side in ('left', 'right', 'all'):
        low, high = found[side]
        assert low < figure[side] < high < low + 0.6
    assert errors['joint_mm'].mean() > found['all'][1]  # another estimate


def test_the_interval_of_one_frame_has_no_width():
    errors = synthetic_samples(1)
    low, high = intervals(errors, HEADLINE)['root_mm']
    assert low == pytest.approx(high) == pytest.approx(errors['root_mm'].item())


# Curves and breakdowns


def test_pck_counts_joints_within_each_threshold():
    errors = synthetic_samples()
    joints = errors['joints_mm'] * 4
    curve = pck(joints)
    for hand, side in enumerate(('left', 'right')):
        flat = joints[:, hand].flatten().numpy()
        expected = [np.mean(flat <= threshold) for threshold in curve['thresholds_mm']]
        np.testing.assert_allclose(curve[side], expected)
        assert curve['auc'][side] == pytest.approx((sum(expected) - (expected[0] + expected[-1]) / 2) / 50)
    assert pck(torch.zeros(3, 2, 21))['auc']['all'] == 1
    assert pck(torch.full((3, 2, 21), 60.0))['auc']['all'] == 0


def test_pck_skips_missing_annotations():
    joints = torch.full((2, 2, 21), 10.0)
    joints[0] = torch.nan
    assert pck(joints)['left'][9:11] == [0, 1]


def test_joints_and_fingers_are_split_by_name():
    joints_mm = torch.arange(21.0).expand(4, 2, 21) + torch.tensor([0.0, 100])[:, None]
    joints, fingers = by_joint(joints_mm)
    assert list(joints) == list(JOINT_NAMES) and list(fingers) == ['wrist', *FINGERS]
    assert joints['index_2'] == {'left': 6, 'right': 106, 'all': 56}
    assert fingers['thumb'] == {'left': 2.5, 'right': 102.5, 'all': 52.5}
    assert fingers['wrist']['left'] == 0 and fingers['little']['left'] == 18.5


@pytest.mark.parametrize('edges, by', [(BOX_IOU_EDGES, [0.0, 0.05, 0.1, 1.0]), (DISTANCE_EDGES, [0.0, 1.0, 4.9, 1e4])])
def test_every_frame_falls_into_exactly_one_bin(edges, by):
    errors = synthetic_samples(4)
    rows = binned(errors, torch.tensor(by), edges)
    assert [(row['from'], row['to']) for row in rows[:2]] == [(edges[0], edges[1]), (edges[1], edges[2])]
    assert [row['frames'] for row in rows] == [1, 2, *[0] * (len(edges) - 4), 1]
    assert rows[1]['joint_mm'] == pytest.approx(errors['joint_mm'][1:3].mean().item())
    assert rows[-1]['root_mm'] == pytest.approx(errors['root_mm'][3].item())
    assert 'joint_mm' not in rows[2] or rows[2]['frames']


def test_penetration_depth_is_averaged_over_intersecting_frames():
    assert penetration(torch.tensor([0.0, 2, 0, 4])) == {'share': 0.5, 'mean_mm': 3, 'worst_mm': 4}
    assert penetration(torch.zeros(3)) == {'share': 0, 'mean_mm': 0, 'worst_mm': 0}


def test_segmentation_iou_is_over_all_pixels():
    intersection = torch.tensor([[90.0, 10, 0], [10, 20, 0]])
    union = torch.tensor([[100.0, 20, 5], [100, 40, 5]])
    assert segmentation_iou(intersection, union) == pytest.approx(
        {'background': 0.5, 'left': 0.5, 'right': 0, 'hands': 0.25}
    )
    assert segmentation_iou(intersection, torch.zeros(2, 3)) is None


# Text


def whole_summary(frames: int = 40) -> dict:
    samples, protocol = synthetic_samples(frames), Protocol(9, False)
    return summarise(samples, protocol) | breakdown(samples) | {'stages': [summarise(samples, protocol)] * 3}


def test_the_breakdown_prints_every_metric_with_its_number_of_frames():
    summary = whole_summary()
    printed = format_breakdown(summary)
    assert 'bootstrap over 40 frames' in printed
    assert f'Procrustes-aligned: joint {summary["pa_joint_mm"]["all"]:.3f} mm' in printed
    for part in (
        'PCK area',
        'by finger',
        'thumb',
        'by stage',
        'by box IoU',
        'by distance',
        'penetration, true',
        'segmentation IoU',
    ):
        assert part in printed
    rows = [line for line in printed.splitlines() if ' frames: ' in line]
    assert len(rows) == len(BOX_IOU_EDGES) + len(DISTANCE_EDGES) - 2
    assert sum(int(line.split(' frames')[0].split()[-1]) for line in rows) == 80
    assert 'segmentation IoU' not in format_breakdown(summary | {'segmentation_iou': None})


def test_the_grid_has_a_column_for_each_protocol():
    errors = synthetic_samples()
    lines = format_grid([summarise(errors, protocol) for protocol in GRID]).splitlines()
    assert lines[0].split()[2:] == ['root', '0', 'root', '0', 'root', '9', 'root', '9']
    assert lines[1].split() == ['scale', 'on', 'scale', 'off', 'scale', 'on', 'scale', 'off']
    assert len(lines) == 2 + 12 + 1 and len({len(line) for line in lines}) == 1
    assert lines[-1].split()[-1] == f'{errors["root_mm"].mean():.3f}'


def test_visibility_counts_hands_inside_the_image():
    errors = synthetic_samples(4)
    visible = torch.tensor([[0.1, 1.0], [0.96, 0.8], [torch.nan, 0.5], [0.2, 0.95]])
    rows = by_visibility(errors, visible)
    assert [row['hands'] for row in rows] == [2, 0, 1, 1, 3]
    assert rows[0]['joint_mm'] == pytest.approx(errors['joint_mm'][[0, 3], [0, 0]].mean().item())
    assert 'joint_mm' not in rows[1] and (rows[-1]['from'], rows[-1]['to']) == (0.95, 1.0)
