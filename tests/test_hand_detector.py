"""The hand detector with a fake MediaPipe, and the assembly of its model; test_mediapipe.py runs the real one."""

import hashlib
import io
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from apps import assemble_detector
from inference.detector import HandDetector, box_around, detection, tiles
from inference.detector_model import ALIGNMENT, MODELS, Model, assemble
from inference.reconstruct import check_box, cut_crop
from utils.errors import UserError

HANDS = [(0.25, 0.5), (0.5, 0.75)], [(0.5, 0.25), (0.75, 0.5)]  # two landmarks each, in shares of the image


class Landmarker:
    """Finds as many hands in an image as the red of its first pixel."""

    closed = False

    def detect(self, image):
        hands = HANDS[: int(image.data[0, 0, 0])]
        return SimpleNamespace(hand_landmarks=[[SimpleNamespace(x=x, y=y) for x, y in hand] for hand in hands])

    def close(self):
        self.closed = True


@pytest.fixture
def mediapipe(monkeypatch, tmp_path):
    """Installs the fake package -> (options that it received, its landmarker, a model file)."""
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


def test_the_box_is_around_two_hands_or_twice_as_large_as_one(mediapipe):
    options, landmarker, model = mediapipe
    detector = HandDetector(model)
    assert options['num_hands'] == 2
    image = np.zeros((100, 200, 3), np.uint8)
    assert detector(image) == (0, None)
    for hands, box in ((1, (15, 2.5, 120, 120)), (2, (40, 15, 120, 70))):
        image[0, 0, 2] = hands  # red in BGR is first in the RGB that MediaPipe sees
        found = detector(image)
        assert found.hands == hands and found.box == pytest.approx(box)
    assert detector.found == {0: 1, 1: 1, 2: 1}
    detector.close()
    assert landmarker.closed


def test_an_image_without_hands_is_searched_in_tiles(mediapipe):
    detector = HandDetector(mediapipe[2])
    image = np.zeros((90, 120, 3), np.uint8)
    image[30, 0, 2] = 1  # first pixel of the lower left tile, 80 x 60 pixels
    assert detector(image).box == pytest.approx(detection([np.array([[20, 60], [40, 75]])]).box)
    image[30, 40, 2] = 2  # of the lower right one, which shows both hands
    found = detector(image)
    assert found.hands == 2 and found.box == pytest.approx(box_around(np.array([[60, 45], [100, 75]])))
    assert detector.found == {1: 1, 2: 1}


@pytest.mark.parametrize(('width', 'height'), [(120, 90), (1, 1), (2, 5), (334, 512)])
def test_tiles_cover_the_image(width, height):
    covered = np.zeros((height, width), int)
    for left, top, across, down in tiles(width, height):
        assert left >= 0 and top >= 0 and left + across <= width and top + down <= height
        covered[top : top + down, left : left + across] += 1
    assert covered.min() >= 1


def test_a_missing_or_foreign_model_is_one_sentence(mediapipe, tmp_path):
    with pytest.raises(UserError, match=r'none\\n.task does not exist. Assemble it with apps/assemble_detector.py'):
        HandDetector(tmp_path / 'none\n.task')
    (tmp_path / 'model.task').write_bytes(b'else')
    with pytest.raises(UserError, match=r'MediaPipe cannot load the hand detector .*\(Unable to open zip archive'):
        HandDetector(tmp_path / 'model.task')


def test_a_missing_system_library_is_named(mediapipe, monkeypatch):
    def create(options):
        raise OSError('libEGL.so.1: cannot open shared object file')

    vision = sys.modules['mediapipe.tasks.python'].vision
    monkeypatch.setattr(vision.HandLandmarker, 'create_from_options', create)
    with pytest.raises(UserError, match=r'system library \(libEGL.so.1: cannot open .*libegl1'):
        HandDetector(mediapipe[2])
    monkeypatch.delattr(sys.modules['mediapipe.tasks.python'], 'vision')  # an ImportError of an installed package
    with pytest.raises(UserError, match=r'system library \(cannot import name .*libegl1'):
        HandDetector(mediapipe[2])


def test_a_box_has_a_margin_of_a_tenth_of_its_longer_side():
    assert box_around(np.array([[10.0, 20], [110, 40], [60, 70]])) == pytest.approx((0, 10, 120, 70))


def test_tiny_hands_have_a_box_that_can_be_cropped():
    image = np.zeros((50, 60, 3), np.uint8)
    for hands in ([np.array([[20.0, 30], [21, 33]])], [np.array([[20.0, 30], [21, 33]])] * 2):
        box = detection(hands).box
        assert min(check_box(box, 60, 50)[2:]) > 15.9 and cut_crop(image, box).image.shape == (256, 256, 3)


def test_a_hand_of_which_the_image_shows_nothing_is_not_found(mediapipe, monkeypatch):
    detector = HandDetector(mediapipe[2])
    image = np.zeros((60, 60, 3), np.uint8)
    image[0, 0, 2] = 2
    monkeypatch.setattr(sys.modules[__name__], 'HANDS', ([(-0.5, 0.2), (-0.1, 0.3)], [(-0.2, 0.5), (0.1, 0.6)]))
    assert detector(image).hands == 1
    monkeypatch.setattr(sys.modules[__name__], 'HANDS', ([(-0.5, 0.2), (-0.1, 0.3)], [(1.0, 0.5), (1.1, 0.6)]))
    assert detector(image) == (0, None)


# The model

CONTENTS = [b'TFL3' + bytes(range(n)) for n in (99, 200)]
SMALL = [
    Model(name, f'mediapipe/{name}', len(content), hashlib.sha256(content).hexdigest())
    for name, content in zip(('a.tflite', 'longer_name.tflite'), CONTENTS)
]


def write_wheel(path: Path, contents=CONTENTS, method=zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, 'w', method) as archive:
        for model, content in zip(SMALL, contents):
            archive.writestr(model.member, content)
        archive.writestr('../../outside', 'x')
    return path


def test_a_task_file_stores_both_models_aligned_and_uncompressed(tmp_path):
    assemble(write_wheel(tmp_path / 'a.whl'), tmp_path / 'out.task', SMALL)
    content = (tmp_path / 'out.task').read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.namelist() == [model.entry for model in SMALL] and archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    assert [content.index(model) % ALIGNMENT for model in CONTENTS] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.whl', 'out.task']


def test_an_installed_wheel_yields_the_same_file_and_a_rerun_changes_nothing(tmp_path):
    wheel, target = write_wheel(tmp_path / 'a.whl'), tmp_path / 'out.task'
    assemble(wheel, target, SMALL)
    before = target.read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / 'site-packages', [model.member for model in SMALL])
    assemble(tmp_path / 'site-packages', target, SMALL)
    assert target.read_bytes() == before


@pytest.mark.parametrize('change', ['absent', 'shorter', 'longer', 'changed', 'bomb', 'lzma', 'truncated', 'no zip'])
def test_wheels_without_these_models_are_refused_and_nothing_is_written(tmp_path, change):
    first, second = CONTENTS
    content = {'shorter': second[:-1], 'longer': second + b'x', 'changed': second[::-1], 'bomb': bytes(1 << 24)}
    contents = [first] if change == 'absent' else [first, content.get(change, second)]
    wheel = write_wheel(tmp_path / 'a.whl', contents, zipfile.ZIP_LZMA if change == 'lzma' else zipfile.ZIP_DEFLATED)
    if change in ('truncated', 'no zip'):
        wheel.write_bytes(wheel.read_bytes()[:80] if change == 'truncated' else b'<html>not found</html>')
    expected = {
        'absent': r'does not contain mediapipe/longer_name.tflite. MediaPipe 0.10.5 to 0.10.21 do: pip download'
    }
    expected |= dict.fromkeys(('shorter', 'longer', 'changed', 'bomb'), 'differs from the file in MediaPipe 0.10.5 to')
    with pytest.raises(UserError, match=expected.get(change, 'is not a readable wheel. Download it again')):
        assemble(wheel, tmp_path / 'out.task', SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ['a.whl']


def test_another_file_is_not_overwritten(tmp_path):
    (tmp_path / 'out.task').write_bytes(b'downloaded elsewhere')
    with pytest.raises(UserError, match=r'out.task exists and is another file. Remove it, or pass another --out'):
        assemble(write_wheel(tmp_path / 'a.whl'), tmp_path / 'out.task', SMALL)
    assert (tmp_path / 'out.task').read_bytes() == b'downloaded elsewhere'


def test_the_command_names_the_wheel_that_has_the_models(tmp_path, capsys):
    out = ['--out', str(tmp_path / 'out.task')]
    assert assemble_detector.main([str(write_wheel(tmp_path / 'a.whl')), *out]) == 2
    assert MODELS[0].member in (error := capsys.readouterr().err) and 'mediapipe==0.10.21' in error
    assert assemble_detector.main([str(tmp_path / 'none.whl'), *out]) == 2
    assert 'none.whl does not exist. Download the wheel: pip download' in capsys.readouterr().err
    with pytest.raises(UserError, match='folder .*nowhere does not exist'):
        assemble(tmp_path / 'a.whl', tmp_path / 'nowhere' / 'out.task', SMALL)
