"""Fits of whole recordings, in which each person keeps one shape."""

import numpy as np
import pytest
import torch

from manopth import TwoHandLayer
from manopth.recordings import fit_time_steps
from manopth.standin import pose_from_angles, standin_pair

PAIR = standin_pair()


@pytest.fixture(scope='module')
def recording():
    """(6, 2, 21, 3) m: three time steps of each of two people."""
    rng = np.random.default_rng(1)
    flexion, spread = rng.uniform(0.1, 1.0, (6, 2, 5, 3)), rng.uniform(-0.1, 0.1, (6, 2, 5))
    flexion[:, :, 0] *= 0.4
    sides = ('left', 'right')
    pose = np.stack([pose_from_angles(flexion[:, i], spread[:, i], side=side) for i, side in enumerate(sides)], 1)
    betas = torch.from_numpy(rng.normal(size=(2, 1, 10))).expand(-1, 2, -1).repeat_interleave(3, 0)
    layer = TwoHandLayer(PAIR, dtype=torch.float64)
    return layer(torch.from_numpy(rng.normal(size=(6, 2, 3))), torch.from_numpy(pose), betas, use_pca=False).joints


def test_hands_of_a_person_share_a_shape_and_meet_their_joints(recording):
    valid = torch.ones(6, 2, 21, dtype=torch.bool)
    valid[4, 1] = False
    valid[5, 0, 6:] = False  # too few to be fitted
    fit = fit_time_steps(PAIR, recording, valid, torch.tensor([0, 0, 0, 1, 1, 1]))
    fitted = torch.tensor([[True, True]] * 4 + [[True, False], [False, True]])
    for values in fit:
        assert torch.equal(values.flatten(2).isfinite().all(-1), fitted)
    assert fit.residual[fitted].mean() < 1
    assert torch.allclose((fit.joints - recording).norm(dim=-1)[fitted] * 1e3, fit.residual[fitted])
    first, second = fit.shape[:3].flatten(0, 1), fit.shape[3:][fitted[3:]]
    assert (first == first[0]).all() and (second == second[0]).all() and (first[0] != second[0]).any()


def test_progress_counts_the_time_steps_and_may_stop_the_fit(recording):
    valid, subject, counts = torch.ones(6, 2, 21, dtype=torch.bool), torch.zeros(6, dtype=torch.long), []
    fit_time_steps(PAIR, recording, valid, subject, progress=counts.append)
    assert sum(counts) == 6
    with pytest.raises(ZeroDivisionError):
        fit_time_steps(PAIR, recording, valid, subject, progress=lambda count: 1 / count)
