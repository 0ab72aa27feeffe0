"""apps/demo.py on pictures and videos, good and bad ones."""

import csv
import json
import os
import signal

import cv2
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from test_media import write_frames
from tiny import tiny_config, tiny_model

from apps import demo
from inference import boxes, job
from inference.detector import HandDetector
from models.checkpoint import save_checkpoint
from utils.hand import NUM_FACES, NUM_VERTICES

FILES = {'overlay.jpg', 'side.jpg', 'above.jpg', 'crop.jpg', 'left.obj', 'right.obj', 'hands.glb', 'hands.json'}


@pytest.fixture(scope='module')
def checkpoint(standin, tmp_path_factory):
    path = tmp_path_factory.mktemp('model') / 'best.pth'
    save_checkpoint(path, model=tiny_model(standin), cfg=tiny_config(), hand_model=standin.identity)
    return path


@pytest.fixture
def run(checkpoint, tmp_path):
    """run(*arguments) -> exit code; outputs go to tmp_path/out."""
    return lambda *arguments: demo.main(
        [*map(str, arguments), '--model', str(checkpoint), '--out', str(tmp_path / 'out'), '--device', 'cpu']
    )


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / 'in'
    folder.mkdir()
    random = np.random.default_rng(0)
    for name, size in (('a.jpg', (120, 160)), ('b.png', (160, 120)), ('c.jpg', (90, 90))):
        noise = random.integers(0, 255, (8, 8, 3), np.uint8)
        cv2.imwrite(str(folder / name), cv2.resize(noise, size[::-1]))
    return folder


def outcome(tmp_path) -> dict:
    return json.loads((tmp_path / 'out' / 'demo.json').read_text())


def hands(tmp_path, name: str) -> dict:
    return json.loads((tmp_path / 'out' / name / 'hands.json').read_text())


def test_a_folder_gives_every_file_for_every_picture(run, pictures, tmp_path, capsys):
    (pictures / 'notes.txt').write_text('x')
    assert run(pictures, '--box', 20, 10, 60, 70, '--batch', 2) == 0
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {'a', 'b', 'c', 'demo.json'}
    for name in 'abc':
        assert {path.name for path in (tmp_path / 'out' / name).iterdir()} == FILES
    assert cv2.imread(str(tmp_path / 'out' / 'a' / 'overlay.jpg')).shape == (120, 160, 3)
    assert cv2.imread(str(tmp_path / 'out' / 'a' / 'crop.jpg')).shape == (256, 256, 3)
    printed = capsys.readouterr().out
    assert 'left out, neither image nor video: notes.txt' in printed and '3 done' in printed
    assert outcome(tmp_path)['failed'] == []


def test_meshes_and_numbers_are_the_same_hands_in_camera_axes(run, pictures, tmp_path):
    assert run(pictures / 'a.jpg', '--box', 20, 10, 60, 70, '--focal', 200, '--principal', 70, 65) == 0
    numbers, folder = hands(tmp_path, 'a'), tmp_path / 'out' / 'a'
    assert numbers['intrinsics_px'] == [[200, 0, 70], [0, 200, 65], [0, 0, 1]] and numbers['focal_from'] == 'given'
    assert numbers['box'] == [20, 10, 60, 70] and numbers['size'] == [160, 120]
    scene = trimesh.load(folder / 'hands.glb')
    for side in ('left', 'right'):
        mesh = trimesh.load(folder / f'{side}.obj', process=False)
        assert (len(mesh.vertices), len(mesh.faces)) == (NUM_VERTICES, NUM_FACES)
        assert np.abs(scene.geometry[side].vertices - mesh.vertices).max() < 2e-6
        middle_tip = np.array(numbers[side]['joints_m'][12])  # vertex 444 on both hands
        assert np.abs(mesh.vertices[444] - middle_tip).max() < 2e-6
        assert np.abs(np.array(numbers[side]['joints_m'][0]) - numbers[side]['root_m']).max() < 2e-6
        upright, _ = scene.graph[side]
        assert np.array_equal(upright, np.diag([1, -1, -1, 1]))
    offset = np.array(numbers['right']['root_m']) - numbers['left']['root_m']
    assert np.abs(offset - numbers['offset_m']).max() < 2e-6


def test_the_focal_length_is_given_or_the_pictures_or_assumed(run, tmp_path):
    image = Image.fromarray(np.zeros((120, 160, 3), np.uint8))
    exif = image.getexif()
    exif.get_ifd(0x8769)[0xA405] = 43
    image.save(tmp_path / 'phone.jpg', exif=exif)
    image.save(tmp_path / 'plain.png')
    for name, options, said, focal in (
        ('phone.jpg', (), 'exif', 198.8),
        ('plain.png', (), 'assumed', 160),
        ('phone.jpg', ('--focal', 99), 'given', 99),
    ):
        assert run(tmp_path / name, *options) == 0
        numbers = hands(tmp_path, name[:5])
        assert numbers['focal_from'] == said
        assert numbers['intrinsics_px'][0][0] == pytest.approx(focal, abs=0.1)


def test_boxes_of_a_file_one_or_several_a_picture(run, pictures, tmp_path, capsys):
    one, two = [20, 10, 60, 70], [[0, 0, 50, 50], [40, 60, 50, 50]]
    boxes = pictures / 'boxes.json'
    boxes.write_text(json.dumps({'a.jpg': one, str(pictures / 'b.png'): two}))
    assert run(pictures / 'a.jpg', pictures / 'b.png', pictures / 'c.jpg', '--boxes', boxes) == 1
    assert [hands(tmp_path, name)['box'] for name in ('a', 'b', 'b/2')] == [one, *two]
    assert [failed['reason'] for failed in outcome(tmp_path)['failed']] == [f'{boxes} has no box for it.']
    boxes.write_text(json.dumps({'a.jpg': two[0], 'b.png': two}))  # a box put right is done again
    assert run(pictures / 'a.jpg', '--boxes', boxes) == 0 and hands(tmp_path, 'a')['box'] == two[0]
    boxes.write_text('[1, 2]')
    assert run(pictures / 'a.jpg', '--boxes', boxes) == 2
    assert 'must hold' in capsys.readouterr().err


def test_bad_files_are_listed_and_the_rest_goes_on(run, pictures, tmp_path, capsys):
    (pictures / 'text.jpg').write_text('no picture')
    cv2.imwrite(str(pictures / 'dot.png'), np.zeros((1, 1, 3), np.uint8))
    (pictures / 'clip.mp4').write_text('no video')
    assert run(pictures, '--box', 130, 10, 60, 70) == 1
    failed = {os.path.basename(each['input']): each['reason'] for each in outcome(tmp_path)['failed']}
    assert set(failed) == {'text.jpg', 'dot.png', 'clip.mp4', 'b.png', 'c.jpg'}
    assert 'not an image' in failed['text.jpg'] and 'not a video' in failed['clip.mp4']
    assert '1 x 1' in failed['dot.png']
    assert 'outside of the image, which is 120 x 160' in failed['b.png']
    assert all('\n' not in reason for reason in failed.values())
    assert len(outcome(tmp_path)['done']) == 1
    assert '1 done, 5 failed' in capsys.readouterr().out


def test_files_of_one_name_keep_apart(run, pictures, tmp_path):
    (pictures / 'more').mkdir()
    (pictures / 'more' / 'a.png').write_bytes((pictures / 'b.png').read_bytes())
    assert run(pictures / 'a.jpg', pictures / 'more' / 'a.png') == 0
    assert hands(tmp_path, 'a')['size'] == [160, 120] and hands(tmp_path, 'a-2')['size'] == [120, 160]


def test_given_again_only_what_is_new_is_done(run, pictures, tmp_path):
    assert run(pictures) == 0
    before = (tmp_path / 'out' / 'a' / 'overlay.jpg').stat().st_mtime_ns
    cv2.imwrite(str(pictures / 'c.jpg'), np.zeros((90, 90, 3), np.uint8))
    assert run(pictures) == 0
    assert [path.rpartition('/')[2] for path in outcome(tmp_path)['earlier']] == ['a', 'b']
    assert (tmp_path / 'out' / 'a' / 'overlay.jpg').stat().st_mtime_ns == before
    assert run(pictures, '--focal', 300) == 0
    assert outcome(tmp_path)['earlier'] == [] and hands(tmp_path, 'a')['intrinsics_px'][0][0] == 300


def test_small_hands_in_a_whole_picture_are_warned_of(run, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(job, 'SMALL_HANDS', 1e9)
    assert run(pictures) == 0
    assert len(outcome(tmp_path)['warnings']) == 3 and '--box' in outcome(tmp_path)['warnings'][0]['warning']
    assert run(pictures, '--box', 20, 10, 60, 70) == 0
    assert 'is the box around both hands' in outcome(tmp_path)['warnings'][0]['warning']
    monkeypatch.setattr(job, 'SMALL_HANDS', 0)
    assert run(pictures, '--focal', 100) == 0 and outcome(tmp_path)['warnings'] == []


# Videos


def test_a_video_gives_an_overlay_and_joints_over_time(run, tmp_path):
    write_frames(tmp_path / 'clip.mp4', 7)
    assert run(tmp_path / 'clip.mp4', '--box', 10, 10, 30, 30, '--batch', 3) == 0
    folder = tmp_path / 'out' / 'clip'
    assert {path.name for path in folder.iterdir()} == {'overlay.mp4', 'joints.csv', 'hands.jsonl', 'video.json'}
    movie = cv2.VideoCapture(str(folder / 'overlay.mp4'))
    assert (movie.get(cv2.CAP_PROP_FRAME_COUNT), movie.get(cv2.CAP_PROP_FPS)) == (7, 25)
    with open(folder / 'joints.csv') as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (folder / 'hands.jsonl').read_text().splitlines()]
    assert [int(row['frame']) for row in rows] == [line['frame'] for line in lines] == list(range(7))
    assert float(rows[5]['time_s']) == lines[5]['time_s'] == 0.2
    for row, line in zip(rows, lines):
        assert float(row['right_index_tip_z_m']) == pytest.approx(line['right']['joints_m'][8][2], abs=1e-6)
    record = json.loads((folder / 'video.json').read_text())
    assert record['frames'] == 7 and record['complete'] and len(record['joint_names']) == 21
    assert run(tmp_path / 'clip.mp4', '--box', 10, 10, 30, 30, '--batch', 3) == 0
    assert outcome(tmp_path)['earlier'] == [str(folder)]
    assert run(tmp_path / 'clip.mp4', '--frames', 2, '--serve', 0) == 0
    assert json.loads((folder / 'video.json').read_text())['frames'] == 2


def test_a_video_that_ends_early_says_so(run, tmp_path):
    write_frames(tmp_path / 'clip.avi', 12, 'MJPG', (320, 240))
    content = (tmp_path / 'clip.avi').read_bytes()
    (tmp_path / 'clip.avi').write_bytes(content[: len(content) // 2])
    assert run(tmp_path / 'clip.avi') == 0
    frames = json.loads((tmp_path / 'out' / 'clip' / 'video.json').read_text())['frames']
    assert 0 < frames < 12
    assert any('ends early' in each['warning'] for each in outcome(tmp_path)['warnings'])


def test_a_stop_keeps_what_is_done_and_the_next_run_does_it_again(run, tmp_path, monkeypatch):
    write_frames(tmp_path / 'clip.mp4', 8)
    draw, drawn = job.draw_overlay, []

    def interrupt(*arguments):
        drawn.append(None)
        if len(drawn) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(*arguments)

    monkeypatch.setattr(job, 'draw_overlay', interrupt)
    assert run(tmp_path / 'clip.mp4', '--batch', 2) == 130
    record = json.loads((tmp_path / 'out' / 'clip' / 'video.json').read_text())
    assert record['frames'] == 4 and not record['complete']
    assert cv2.VideoCapture(str(tmp_path / 'out' / 'clip' / 'overlay.mp4')).get(cv2.CAP_PROP_FRAME_COUNT) == 4
    assert run(tmp_path / 'clip.mp4', '--batch', 2) == 0
    assert json.loads((tmp_path / 'out' / 'clip' / 'video.json').read_text())['frames'] == 8


# What is asked for


@pytest.mark.parametrize(
    'arguments, words',
    [
        ([], 'No input: name images'),
        (['none.jpg'], 'no file or folder none.jpg'),
        (['*.none'], 'No file matches the pattern'),
        (['tests', '--focal', '-1'], '--focal is -1'),
        (['tests', '--batch', '0'], '--batch is 0'),
        (['tests'], 'contains no image or video'),
    ],
)
def test_what_cannot_be_done_is_one_sentence(run, capsys, arguments, words):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count('\n') == 1


def test_configuration_keys_end_the_inputs_whatever_they_look_like():
    args = demo.parse_arguments(['IMG_1.JPG', 'DEVICE.PNG', 'MANO.SOURCE', 'standin', '--model', 'x'])
    assert args.inputs == ['IMG_1.JPG', 'DEVICE.PNG'] and args.keys == ['MANO.SOURCE', 'standin']


def test_no_camera_is_one_failure(run, tmp_path):
    assert run('--camera', 99) == 1
    assert outcome(tmp_path)['failed'][0]['input'] == 'camera 99'


# The detector


def test_without_mediapipe_one_sentence_says_what_to_do(run, pictures, capsys, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'mediapipe', None)
    assert run(pictures, '--detect') == 2
    error = capsys.readouterr().err
    assert 'pip install -r requirements-demo.txt' in error and error.count('\n') == 1


def test_detected_hands_are_cropped_and_their_lack_is_a_failure(run, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(HandDetector, '__init__', lambda self, model: None)
    monkeypatch.setattr(HandDetector, '__call__', lambda self, picture: None if len(picture) == 90 else (5, 6, 70, 80))
    closed = []
    monkeypatch.setattr(HandDetector, 'close', lambda self: closed.append(self))
    assert run(pictures, '--detect') == 1
    assert hands(tmp_path, 'a')['box'] == hands(tmp_path, 'b')['box'] == [5, 6, 70, 80]
    assert 'finds no hands' in outcome(tmp_path)['failed'][0]['reason'] and len(closed) == 1


def test_a_videos_box_follows_the_detector_smoothly():
    assert boxes.smoothed(None, (0, 0, 10, 10)) == (0, 0, 10, 10)
    assert boxes.smoothed((0, 0, 10, 10), (10, 20, 20, 10)) == (5, 10, 15, 10)
    assert boxes.smoothed((1, 2, 3, 4), None) == (1, 2, 3, 4)
    assert boxes.smoothed(None, None) is None


def test_pictures_are_the_same_alone_and_in_a_batch(run, pictures, tmp_path):
    assert run(pictures, '--batch', 1) == 0
    alone = hands(tmp_path, 'b')
    assert run(pictures, '--batch', 3, '--focal', 160) == 0  # the longer side: the same camera, asked for otherwise
    both = torch.tensor([alone['left']['joints_m'], hands(tmp_path, 'b')['left']['joints_m']])
    assert (both[0] - both[1]).abs().max() < 1e-4


def test_what_a_killed_run_left_is_removed(run, tmp_path):
    write_frames(tmp_path / 'clip.mp4', 2)
    folder = tmp_path / 'out' / 'clip'
    folder.mkdir(parents=True)
    for name in ('.overlay.0123456789abcdef.partial.mp4', '.joints.csv.0123456789abcdef.partial'):
        (folder / name).write_bytes(b'half')
    assert run(tmp_path / 'clip.mp4') == 0
    assert {path.name for path in folder.iterdir()} == {'overlay.mp4', 'joints.csv', 'hands.jsonl', 'video.json'}
