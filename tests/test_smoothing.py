"""Smoothing of hands over time, on the manifold and by true time stamps."""

import pytest
import torch

from inference.smoothing import Motion, OneEuroFilter, differences, interpolated, moved, smooth_offline, smooth_online
from manopth.rotations import axis_angle_to_matrix

BOTH = [smooth_online, smooth_offline]
TIMES = [number / 30 for number in range(60)]


def motion(times: list[float], noise: float = 0.0, seed: int = 0) -> Motion:
    """Hands that swing once a second, with noise of rad, PCA units and 0.1 m."""
    g = torch.Generator().manual_seed(seed)
    swing = torch.tensor(times, dtype=torch.float64).mul(2 * torch.pi).sin()

    def noisy(*shape: int) -> torch.Tensor:
        waves = torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        wave = swing.view(-1, *[1] * len(shape)) * waves * 0.3
        return wave + noise * torch.randn(len(times), *shape, generator=g, dtype=torch.float64)

    return Motion(
        axis_angle_to_matrix(noisy(2, 3)),
        noisy(2, 45),
        1 + 0.1 * torch.randn(len(times), 2, 10, generator=g, dtype=torch.float64),
        0.1 * noisy(3),
        0.1 * noisy(3),
    )


def distance(one: Motion, other: Motion) -> torch.Tensor:
    """RMS over frames and hands of each kind of difference."""
    return torch.stack([step.square().sum(-1).mean().sqrt() for step in differences(one, other)])


def second_differences(motion: Motion) -> torch.Tensor:
    """How much successive steps differ, of each kind."""
    before, here, after = (Motion(*(v[i : len(v) - 2 + i] for v in motion)) for i in range(3))
    pairs = zip(differences(before, here), differences(here, after))
    return torch.stack([(b - a).square().sum(-1).mean().sqrt() for a, b in pairs])


@pytest.mark.parametrize('smooth', BOTH)
def test_noise_is_halved_at_least_and_rotations_stay_rotations(smooth):
    true, noisy = motion(TIMES), motion(TIMES, noise=0.05)
    smoothed = smooth(noisy, TIMES)
    assert (second_differences(smoothed) < second_differences(noisy) / 2).all()
    identity = smoothed.rotation @ smoothed.rotation.mT
    assert torch.allclose(identity, torch.eye(3, dtype=torch.float64).expand_as(identity), atol=1e-9)
    if smooth is smooth_offline:  # without delay, the error falls too
        assert (distance(smoothed, true) < distance(noisy, true)).all()


@pytest.mark.parametrize('smooth', BOTH)
def test_turning_the_world_turns_the_result(smooth):
    noisy = motion(TIMES, noise=0.1)
    turn = axis_angle_to_matrix(torch.tensor([2.0, -1.0, 0.7], dtype=torch.float64))
    turned = noisy._replace(rotation=turn @ noisy.rotation, middle=noisy.middle @ turn.T, offset=noisy.offset @ turn.T)
    expected, found = smooth(noisy, TIMES), smooth(turned, TIMES)
    assert torch.allclose(found.rotation, turn @ expected.rotation, atol=1e-9)
    assert torch.allclose(found.middle, expected.middle @ turn.T, atol=1e-9)


@pytest.mark.parametrize('smooth', BOTH)
def test_a_hand_that_turns_over_and_over_has_no_seam(smooth):
    times = [number / 30 for number in range(90)]
    angles = torch.tensor(times, dtype=torch.float64) * 2 * torch.pi  # past pi thrice
    axis = torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)
    spinning = motion(times)._replace(rotation=axis_angle_to_matrix(angles[:, None, None] * axis.expand(90, 2, 3)))
    smoothed = smooth(spinning, times)
    first, second = (Motion(*(v[i : i + 89] for v in smoothed)) for i in (0, 1))
    steps = differences(first, second)[0].norm(dim=-1)
    assert steps[10:-10].min() > 0.5 * steps[10:-10].max() > 0  # steady, whatever the angle


def test_offline_has_no_delay_and_online_little():
    times = [number / 30 for number in range(121)]
    true = motion(times)
    delays = []
    for smooth in BOTH:
        middle = smooth(true, times).middle[:, 0]
        shifted = [float((middle[30:90] * true.middle[30 - lag : 90 - lag, 0]).sum()) for lag in range(-8, 9)]
        delays.append(max(range(17), key=shifted.__getitem__) - 8)
    assert 0 < delays[0] <= 3 and delays[1] == 0


@pytest.mark.parametrize('smooth', BOTH)
def test_time_stamps_count_and_not_frame_numbers(smooth):
    regular = [number / 60 for number in range(121)]
    kept = [number for number in range(121) if number % 5 not in (1, 2)]  # of varying rate
    uneven = [regular[number] for number in kept]
    dense, sparse = smooth(motion(regular), regular), smooth(motion(uneven), uneven)
    there = Motion(*(values[kept] for values in dense))
    assert (distance(sparse, there)[[0, 2, 3]] < 0.1).all()
    stretched = smooth(motion(uneven), [10 * time for time in uneven])  # slow: less is smoothed
    assert (distance(stretched, motion(uneven)) < distance(sparse, motion(uneven))).all()


def test_equal_times_repeat_the_frame_before_and_nothing_is_nan():
    noisy = motion(TIMES, noise=0.3)
    smooth = OneEuroFilter()
    first = smooth(noisy.one(0), 1.0)
    for time in (1.0, 0.5):
        again = smooth(noisy.one(1), time)
        assert torch.equal(again.pose, first.pose) and torch.allclose(again.rotation, first.rotation)
    later = smooth(noisy.one(2), 1.1)
    assert all(values.isfinite().all() for values in later) and not torch.equal(later.pose, first.pose)


@pytest.mark.parametrize('smooth', BOTH)
def test_one_frame_and_hands_at_rest_are_unchanged(smooth):
    one = motion([0.0])
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(smooth(one, [0.0]), one))
    rest = Motion(*(values.expand(9, *values.shape[1:]) for values in one))
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(smooth(rest, TIMES[:9]), rest))


def test_online_shapes_are_the_mean_so_far_also_over_a_gap():
    noisy, smooth = motion(TIMES[:6]), OneEuroFilter()
    for number in range(6):
        if number == 3:
            smooth.reset()
        found = smooth(noisy.one(number), TIMES[number])
        assert torch.allclose(found.shape, noisy.shape[: number + 1].mean(0, keepdim=True))
        if number == 3:
            assert torch.equal(found.pose, noisy.one(3).pose)


def test_interpolation_is_along_the_shortest_arc_and_inverts_the_differences():
    ends = motion([0.0, 0.25], noise=0.5)
    start, end = ends.one(0), ends.one(1)
    assert distance(interpolated(start, end, 0.0), start).max() < 1e-9
    assert distance(interpolated(start, end, 1.0), end).max() < 1e-9
    middle = interpolated(start, end, 0.5)
    assert torch.allclose(distance(start, middle), distance(middle, end), atol=1e-9)
    assert distance(moved(start, differences(start, end)), end).max() < 1e-9
