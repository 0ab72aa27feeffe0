"""The detector with a made-up MediaPipe: what goes in, what comes out, what is said where something is missing."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from inference.detector import HandDetector, box_around
from utils.errors import UserError


class Landmarker:
    """Finds, in a picture whose first pixel is n, n hands: two marks each, in shares of the picture."""

    closed = False

    def detect(self, image):
        marks = [[(0.25, 0.5), (0.5, 0.75)], [(0.5, 0.25), (0.75, 0.5)]][: int(image.data[0, 0, 0])]
        return SimpleNamespace(hand_landmarks=[[SimpleNamespace(x=x, y=y) for x, y in hand] for hand in marks])

    def close(self):
        self.closed = True


@pytest.fixture
def mediapipe(monkeypatch, tmp_path):
    """Puts the made-up package in place -> (options that it was given, its landmarker, a model file)."""
    landmarker, seen, model = Landmarker(), {}, tmp_path / 'model.task'
    model.write_bytes(b'model')

    def create(options):
        if options['base_options'] != str(model) or model.read_bytes() != b'model':
            raise RuntimeError('Unable to open zip archive.')
        seen.update(options)
        return landmarker

    package, tasks, python = (ModuleType(f'mediapipe{name}') for name in ('', '.tasks', '.tasks.python'))
    package.Image = lambda image_format, data: SimpleNamespace(format=image_format, data=data)
    package.ImageFormat = SimpleNamespace(SRGB='rgb')
    python.BaseOptions = lambda model_asset_path: model_asset_path
    python.vision = SimpleNamespace(
        HandLandmarkerOptions=lambda **options: options, HandLandmarker=SimpleNamespace(create_from_options=create)
    )
    for module in (package, tasks, python):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen, landmarker, model


def test_the_box_holds_both_hands_in_pixels(mediapipe):
    options, landmarker, model = mediapipe
    detector = HandDetector(model)
    assert options['num_hands'] == 2
    picture = np.zeros((100, 200, 3), np.uint8)
    for hands, box in ((0, None), (1, (45, 45, 60, 35)), (2, (40, 15, 120, 70))):
        picture[0, 0, 2] = hands  # red in BGR is first in the RGB that MediaPipe sees
        found = detector(picture)
        assert found == box if box is None else found == pytest.approx(box)
    detector.close()
    assert landmarker.closed


def test_a_missing_or_foreign_model_is_one_sentence(mediapipe, tmp_path):
    with pytest.raises(UserError, match='does not exist. Download hand_landmarker.task from'):
        HandDetector(tmp_path / 'none.task')
    (tmp_path / 'model.task').write_bytes(b'else')
    with pytest.raises(UserError, match=r'MediaPipe cannot load the hand detector .*\(Unable to open zip archive'):
        HandDetector(tmp_path / 'model.task')


def test_a_box_has_a_margin_of_a_tenth_of_its_longer_side():
    assert box_around(np.array([[10.0, 20], [110, 40], [60, 70]])) == pytest.approx((0, 10, 120, 70))
