"""The hand detector with the real MediaPipe and its assembled model, on rendered and, where available, real frames."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip('mediapipe', reason='optional, requirements-demo.txt: no mediapipe')

from apps import demo
from benchmarks import detection
from dataset.synthetic import synthesize
from inference.detector import MODEL, HandDetector, box_around
from inference.tracking import overlap

FILE = Path(os.environ.get('DIR_HAND_DETECTOR', MODEL))
SAMPLE = Path(os.environ.get('DIR_INTERHAND_SAMPLE', Path(__file__).resolve().parents[2] / 'shared/interhand_sample'))
REAL_FRAMES = pytest.mark.skipif(not SAMPLE.is_dir(), reason=f'no real frames at {SAMPLE} (DIR_INTERHAND_SAMPLE)')
pytestmark = [
    pytest.mark.skipif(not FILE.is_file(), reason=f'no {FILE}: apps/assemble_detector.py, or DIR_HAND_DETECTOR'),
    pytest.mark.slow,  # rendering, and loading MediaPipe and the shipped network
]


@pytest.fixture(scope='module')
def detector():
    detector = HandDetector(FILE)
    yield detector
    detector.close()


@pytest.fixture(scope='module')
def rendered(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('rendered') / 'raw'
    arguments = ['--frames', '0', '0', '7', '--seed', '3', '--workers', '1', 'MANO.SOURCE', 'standin']
    assert synthesize.main(['--save_path', str(root), *arguments]) == 0
    return root


def test_hands_are_found_in_most_rendered_images_where_they_are(detector, rendered):
    samples = list(detection.read_samples(str(rendered), 'test', 7))
    found = [detector.hands(sample.image) for sample in samples]
    assert sum(len(hands) > 0 for hands in found) >= 4
    for sample, hands in zip(samples, found):
        for marks in hands:
            nearest = min(np.nanmedian(np.linalg.norm(marks - true, axis=-1)) for true in sample.joints_px)
            assert nearest < 0.3 * max(sample.box[2:])


def test_images_without_hands_have_none(detector):
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)
    for image in (noise, np.zeros((16, 16, 3), np.uint8), cv2.GaussianBlur(noise, (0, 0), 20)):
        assert detector(image) == (0, None)


@REAL_FRAMES
def test_one_of_two_interacting_hands_is_found_in_real_frames(detector):
    for sample in detection.read_samples(str(SAMPLE), 'test', 2):
        found = detector(sample.image)
        left, top, width, height = sample.box
        assert found.hands == 1
        assert overlap(found.box, sample.box) > 0.15
        assert found.box[0] < left + width / 2 < found.box[0] + found.box[2]
        assert found.box[1] < top + height / 2 < found.box[1] + found.box[3]


@REAL_FRAMES
def test_the_demo_places_a_box_around_both_hands_of_real_frames(tmp_path):
    truth = list(detection.read_samples(str(SAMPLE), 'test', 2))
    for number, sample in enumerate(truth):
        cv2.imwrite(str(tmp_path / f'{number}.png'), sample.image)
    out = ['--out', str(tmp_path / 'out'), '--device', 'cpu']
    assert demo.main([str(tmp_path / '*.png'), '--detect', '--detector', str(FILE), *out]) == 0
    for number, sample in enumerate(truth):
        numbers = json.loads((tmp_path / 'out' / str(number) / 'hands.json').read_text())
        predicted = np.array([numbers[side]['joints_px'] for side in ('left', 'right')]).reshape(-1, 2)
        assert numbers['detected_hands'] == 1
        assert overlap(numbers['box'], sample.box) > 0.5 and overlap(box_around(predicted), sample.box) > 0.5
    warnings = json.loads((tmp_path / 'out' / 'demo.json').read_text())['warnings']
    assert sum('The detector found one hand' in each['warning'] for each in warnings) == 2
