import numpy as np
import pytest
import torch
from tiny import tiny_model

from inference.files import LONGEST_SIDE, SCALE_BAR, VIEW_SIDE, VIEWS, draw_overlay, reduced, view
from inference.reconstruct import Reconstructor
from manopth import TwoHandLayer
from utils.drawing import HAND_COLOURS_BGR

BLUE, ORANGE = HAND_COLOURS_BGR


@pytest.fixture(scope='module')
def hands(standin):
    """Two equal poses, (2, 778, 3) m about their wrists."""
    return TwoHandLayer(standin)(
        torch.zeros(1, 2, 3), torch.zeros(1, 2, 45), torch.zeros(1, 2, 10), root_joint=0
    ).vertices[0]


def middle(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """(right, down) middle of the bounding box of the pixels drawn in a hand's colour, whatever its light."""
    towards = np.asarray(colour) / np.linalg.norm(colour)
    pixels = picture / np.maximum(np.linalg.norm(picture, axis=-1, keepdims=True), 1)
    rows, columns = np.nonzero(pixels @ towards > 0.995)
    return np.array([columns.min() + columns.max(), rows.min() + rows.max()]) / 2


@pytest.mark.parametrize('name, away, up', [('side', (1, 0), (0, -1)), ('above', (0, -1), None)])
def test_views_are_seen_from_the_right_and_from_above_and_the_bar_is_five_centimetres(standin, hands, name, away, up):
    right = hands[1] * torch.tensor([-1.0, 1, 1])  # the left hand's mirror image: the same extents
    for direction, expected in ((torch.tensor([0.0, 0, 0.4]), away), (torch.tensor([0.0, -0.4, 0]), up)):
        if expected is None:
            continue
        picture = view(
            torch.stack([right + direction, right]) + torch.tensor([0, 0, 1.0]), VIEWS[name], standin.mesh_faces
        )
        assert picture.shape == (VIEW_SIDE, VIEW_SIDE, 3)
        bar = (np.abs(picture[VIEW_SIDE - 20].astype(int) - 60).max(-1) < 3).sum()
        moved = middle(picture, BLUE) - middle(picture, ORANGE)
        assert moved / np.linalg.norm(moved) == pytest.approx(expected, abs=0.1)
        assert np.linalg.norm(moved) / bar == pytest.approx(0.4 / SCALE_BAR, rel=0.08)


def test_a_large_image_is_reduced_and_its_overlay_stays_in_place(standin):
    reconstruct = Reconstructor(tiny_model(standin).eval())
    covered = []
    for size in (1000, 4000):
        image = np.full((size, size // 2, 3), 100, np.uint8)
        one = reconstruct([image]).one(0)
        place = torch.tensor([0.0, 0.0, 0.6])  # wherever an untrained network places them
        one = one._replace(vertices=one.vertices - one.roots[0] + place)
        shown = reduced(image)
        assert max(shown.image.shape) == min(size, LONGEST_SIDE)
        mask = (draw_overlay(shown, one, standin) != 100).any(-1)
        assert mask.any()
        rows, columns = np.nonzero(mask)
        covered.append(np.array([rows.min(), rows.max(), columns.min(), columns.max()]) / len(mask))
    assert np.abs(covered[0] - covered[1]).max() < 0.003
