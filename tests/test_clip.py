"""Hands of a whole clip: gaps, cuts, filling, one shape, memory."""

import itertools

import numpy as np
import pytest
import torch
from tiny import tiny_model

from inference.clip import FILLED, LONGEST_FILL, LOST, SEEN, FrameHands, Recording, smoothed_offline, smoothed_online
from inference.media import Frame
from inference.reconstruct import Reconstructor
from utils.geometry import project

IMAGE = np.zeros((48, 64, 3), np.uint8)


@pytest.fixture(scope='module')
def reconstruct(standin):
    return Reconstructor(tiny_model(standin).eval())


@pytest.fixture(scope='module')
def hands(reconstruct):
    """Eight different reconstructions."""
    random = np.random.default_rng(0)
    found = reconstruct([random.integers(0, 255, (48, 64, 3), np.uint8) for _ in range(8)])
    noise = torch.Generator().manual_seed(0)
    found = found._replace(shape=found.shape + torch.randn(found.shape.shape, generator=noise))
    return [found.one(number) for number in range(8)]


def clip(hands, pattern: str, *, interval: float = 0.1) -> list[FrameHands]:
    """'x' is a frame with hands, '.' one without, '|' one with hands after a cut, '!' one without."""
    numbers = itertools.cycle(range(len(hands)))
    return [
        FrameHands(IMAGE, number * interval, None, hands[next(numbers)] if mark in 'x|' else None, cut=mark in '|!')
        for number, mark in enumerate(pattern)
    ]


def offline(reconstruct, frames: list[FrameHands], **options) -> list[FrameHands]:
    images = [Frame(each.image, each.time_s) for each in frames]
    return list(smoothed_offline(Recording(iter(frames)), images, reconstruct, **options))


def states(frames) -> str:
    return ''.join({SEEN: 'x', LOST: '.', FILLED: 'f'}[each.state] for each in frames)


@pytest.mark.parametrize('pattern', ['x', '.', 'xxx..xx', '..x|xx.', 'x.!x.|x', '.....'])
def test_gaps_stay_gaps(reconstruct, hands, pattern):
    frames = clip(hands, pattern)
    expected = states(frames)
    assert states(smoothed_online(frames, reconstruct)) == expected
    assert states(offline(reconstruct, frames, smooth=True, fill=False)) == expected


def test_segments_end_at_gaps_and_cuts(hands):
    runs = Recording(clip(hands, '.xx.x|xx!x')).segments()
    assert [(run.start, run.stop) for run in runs] == [(1, 3), (4, 5), (5, 8), (9, 10)]


@pytest.mark.parametrize(
    ('pattern', 'filled'),
    [('.x..x.', '.xffx.'), ('x.|x', 'x.xx'), ('x!x', 'x.x'), ('x.x.x', 'xfxfx'), ('....', '....'), ('x', 'x')],
)
def test_only_short_gaps_within_a_scene_are_filled(reconstruct, hands, pattern, filled):
    assert states(offline(reconstruct, clip(hands, pattern), smooth=False, fill=True)) == filled
    long = clip(hands, 'x.x', interval=0.6 * LONGEST_FILL)
    assert states(offline(reconstruct, long, smooth=False, fill=True)) == 'x.x'


def test_filled_hands_lie_between_their_neighbours_by_time(reconstruct, hands):
    frames = clip(hands, 'x.x')
    frames[1] = frames[1]._replace(time_s=0.05)  # a quarter of the way
    before, between, after = offline(reconstruct, frames, smooth=False, fill=True)
    middle = [each.hands.roots.mean(0) for each in (before, between, after)]
    assert torch.allclose(middle[1], torch.lerp(middle[0], middle[2], 0.25), atol=1e-6)
    pixels = project(between.hands.joints, between.hands.intrinsics)
    assert torch.allclose(between.hands.joints_px, pixels) and between.filled and not before.filled


def test_without_smoothing_a_recording_returns_what_was_recorded(reconstruct, hands):
    frames = clip(hands, 'xx.xxx')
    for given, found in zip(frames, offline(reconstruct, frames, smooth=False, fill=False)):
        assert (given.hands is None) == (found.hands is None)
        if given.hands is not None:
            for name, value in found.hands._asdict().items():
                if value is not None and name not in ('vertices', 'joints'):  # whose shapes the fixture has changed
                    assert torch.allclose(value, getattr(given.hands, name), atol=1e-5), name


def test_a_smoothed_clip_has_one_shape_and_meshes_of_its_parameters(reconstruct, hands):
    frames = clip(hands, 'xxxx..x|xxx')
    found = [each.hands for each in offline(reconstruct, frames, smooth=True, fill=True)]
    assert None not in found
    assert all(torch.equal(each.shape, found[0].shape) for each in found)
    median = torch.stack([each.hands.shape for each in frames if each.hands is not None]).median(0).values
    assert torch.allclose(found[0].shape, median)
    for each in (*found, *(one.hands for one in smoothed_online(clip(hands, 'xxx'), reconstruct))):
        posed = reconstruct.pose_hands(each.root_rotation[None], each.pose[None], each.shape[None])
        assert torch.allclose(posed.vertices[0] + each.roots[:, None], each.vertices, atol=1e-6)
        assert torch.allclose(each.joints[:, 0], each.roots, atol=1e-6)
        assert torch.allclose(each.roots[1] - each.roots[0], each.offset, atol=1e-6)


def test_a_recording_takes_one_kilobyte_a_frame(hands):
    recording = Recording(clip(hands, 'x' * 50))
    assert max(each.numbers.nbytes for each in recording.frames) <= 1024
    assert all(each.numbers.base is None for each in recording.frames)  # no view of a batch with its meshes
