import pytest

from benchmarks.synthetic_annotations import main
from dataset.prepare.raw import RawSplit, full_entries
from dataset.prepare.skips import Skipped
from dataset.prepare.split import select

FRAMES = 3000


@pytest.fixture(scope='module')
def split(tmp_path_factory):
    root = tmp_path_factory.mktemp('synthetic')
    assert main(['--frames', str(FRAMES), '--out', str(root), '--split', 'val', '--captures', '3', '--joints']) == 0
    return RawSplit(root, 'val')


def test_synthetic_annotations_have_the_layout_of_the_data_set(split):
    frames, skipped = split.frames, Skipped()
    assert len(frames) == len({frame.file_name for frame in frames}) == FRAMES
    assert {frame.capture for frame in frames} == {'0', '1', '2'}
    assert select(split, skipped) and not skipped.damage
    for frame in frames[::100]:
        annotation = full_entries(frame)[1]
        assert len(annotation['bbox']) == 4 and len(annotation['joint_valid']) == 42
        hands = [side for side, fit in split.mano(frame.capture, frame.frame_idx).items() if fit]
        assert frame.hand_type in hands or frame.hand_type == 'interacting'
        valid = split.joints(frame.capture, frame.frame_idx)[1]
        assert valid.all(1).tolist() == [frame.hand_type != 'right', frame.hand_type != 'left']


def test_synthetic_annotations_need_a_positive_number_of_frames(tmp_path, capsys):
    assert main(['--frames', '0', '--out', str(tmp_path)]) == 2
    assert '--frames is 0; it must be at least 1' in capsys.readouterr().err
