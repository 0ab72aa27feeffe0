"""apps/demo.py on images and videos, sound and damaged ones."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import trimesh
from blobs import BlobReconstructor, blob
from PIL import Image
from tiny import tiny_config, tiny_model
from videos import write_frames, write_timed

from apps import demo
from inference import boxes, job, load_reconstructor, tracking
from inference.detector import detection
from inference.tracking import overlap
from manopth import ManoLayer
from models.checkpoint import save_checkpoint
from utils.hand import NUM_FACES, NUM_VERTICES
from utils.stopping import STOP_SIGNALS

FILES = {'overlay.jpg', 'side.jpg', 'above.jpg', 'crop.jpg', 'left.obj', 'right.obj', 'hands.glb', 'hands.json'}


@pytest.fixture(scope='module')
def checkpoint(standin, tmp_path_factory):
    path = tmp_path_factory.mktemp('model') / 'best.pth'
    save_checkpoint(path, model=tiny_model(standin), cfg=tiny_config(), hand_model=standin.identity)
    return path


@pytest.fixture(scope='module')
def reconstructor(checkpoint):
    return load_reconstructor(str(checkpoint), device='cpu')


@pytest.fixture
def run(checkpoint, reconstructor, tmp_path, monkeypatch):
    """run(*arguments) -> exit code; outputs go to tmp_path/out. The network is loaded once for all tests."""

    def load(path, **options):
        known = (path, options) == (str(checkpoint), {'device': 'cpu', 'engine': 'auto', 'overrides': []})
        return reconstructor if known else load_reconstructor(path, **options)

    monkeypatch.setattr(demo, 'load_reconstructor', load)
    return lambda *arguments: demo.main(
        [*map(str, arguments), '--model', str(checkpoint), '--out', str(tmp_path / 'out'), '--device', 'cpu']
    )


@pytest.fixture
def images(tmp_path):
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


def test_a_folder_yields_every_file_for_every_image(run, images, tmp_path, capsys):
    (images / 'notes.txt').write_text('x')
    assert run(images, '--box', 20, 10, 60, 70, '--batch', 2) == 0
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {'a', 'b', 'c', 'demo.json'}
    for name in 'abc':
        assert {path.name for path in (tmp_path / 'out' / name).iterdir()} == FILES
    assert cv2.imread(str(tmp_path / 'out' / 'a' / 'overlay.jpg')).shape == (120, 160, 3)
    assert cv2.imread(str(tmp_path / 'out' / 'a' / 'crop.jpg')).shape == (256, 256, 3)
    printed = capsys.readouterr().out
    assert 'left out, neither image nor video: notes.txt' in printed and '3 done' in printed
    assert outcome(tmp_path)['failed'] == []


def test_meshes_and_numbers_are_the_same_hands_in_camera_axes(run, images, tmp_path):
    assert run(images / 'a.jpg', '--box', 20, 10, 60, 70, '--focal', 200, '--principal', 70, 65) == 0
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


def test_the_focal_length_is_given_or_from_exif_or_assumed(run, tmp_path):
    image = Image.fromarray(np.zeros((120, 160, 3), np.uint8))
    exif = image.getexif()
    exif.get_ifd(0x8769)[0xA405] = 43
    image.save(tmp_path / 'phone.jpg', exif=exif)
    image.save(tmp_path / 'plain.png')
    for name, options, origin, focal in (
        ('phone.jpg', (), 'exif', 198.8),
        ('plain.png', (), 'assumed', 160),
        ('phone.jpg', ('--focal', 99), 'given', 99),
    ):
        assert run(tmp_path / name, *options) == 0
        numbers = hands(tmp_path, name[:5])
        assert numbers['focal_from'] == origin
        assert numbers['intrinsics_px'][0][0] == pytest.approx(focal, abs=0.1)


def test_a_file_of_boxes_lists_one_or_several_for_an_image(run, images, tmp_path, capsys):
    one, two = [20, 10, 60, 70], [[0, 0, 50, 50], [40, 60, 50, 50]]
    boxes = images / 'boxes.json'
    boxes.write_text(json.dumps({'a.jpg': one, str(images / 'b.png'): two}))
    assert run(images / 'a.jpg', images / 'b.png', images / 'c.jpg', '--boxes', boxes) == 1
    assert [hands(tmp_path, name)['box'] for name in ('a', 'b', 'b/2')] == [one, *two]
    assert [failed['reason'] for failed in outcome(tmp_path)['failed']] == [f'{boxes} has no box for it.']
    boxes.write_text(json.dumps({'a.jpg': two[0], 'b.png': two}))  # a corrected box is processed again
    assert run(images / 'a.jpg', '--boxes', boxes) == 0 and hands(tmp_path, 'a')['box'] == two[0]
    boxes.write_text(json.dumps({'./a.jpg': one, f'{images}//b.png': two[1]}))  # other ways of writing a name
    assert run(images / 'a.jpg', images / 'b.png', '--boxes', boxes) == 0
    assert [hands(tmp_path, name)['box'] for name in 'ab'] == [one, two[1]]
    boxes.write_text(json.dumps({'a.jpg': [str(number) for number in one]}))
    assert run(images / 'a.jpg', '--boxes', boxes) == 1
    assert 'must be four numbers' in outcome(tmp_path)['failed'][0]['reason']
    boxes.write_text('{"\\ud800.jpg": [1, 2, 30, 40]}')
    assert run(images / 'a.jpg', '--boxes', boxes) == 2
    assert 'a name that no file can have' in capsys.readouterr().err
    boxes.write_text('[1, 2]')
    assert run(images / 'a.jpg', '--boxes', boxes) == 2
    assert 'must hold' in capsys.readouterr().err


def test_unreadable_files_are_listed_and_the_rest_is_done(run, images, tmp_path, capsys):
    (images / 'text.jpg').write_text('no image')
    cv2.imwrite(str(images / 'dot.png'), np.zeros((1, 1, 3), np.uint8))
    (images / 'clip.mp4').write_text('no video')
    assert run(images, '--box', 130, 10, 60, 70) == 1
    failed = {os.path.basename(each['input']): each['reason'] for each in outcome(tmp_path)['failed']}
    assert set(failed) == {'text.jpg', 'dot.png', 'clip.mp4', 'b.png', 'c.jpg'}
    assert 'not an image' in failed['text.jpg'] and 'not a video' in failed['clip.mp4']
    assert '1 x 1' in failed['dot.png']
    assert 'outside of the image, which is 120 x 160' in failed['b.png']
    assert all('\n' not in reason for reason in failed.values())
    assert len(outcome(tmp_path)['done']) == 1
    assert '1 done, 5 failed' in capsys.readouterr().out


# Files for other programs


@pytest.mark.slow  # runs the demo three times, on an image and a video
def test_further_files_of_images_and_videos(run, images, standin, tmp_path):
    write_frames(tmp_path / 'clip.mp4', 6)
    given = (images / 'a.jpg', tmp_path / 'clip.mp4', '--box', 20, 10, 40, 30, '--track', 'off')
    assert run(*given, '--export', 'bvh', 'npz', 'glb') == 0
    image, clip = tmp_path / 'out' / 'a', tmp_path / 'out' / 'clip'
    motion = {'hands.npz', 'hands.glb', 'left.bvh', 'right.bvh'}
    assert {path.name for path in image.iterdir()} == FILES | motion
    assert {path.name for path in clip.iterdir()} == motion | {'overlay.mp4', 'joints.csv', 'hands.jsonl', 'video.json'}
    assert hands(tmp_path, 'a')['asked']['export'] == ['npz', 'glb', 'bvh']
    for folder, frame in ((image, ()), (clip, (4,))):
        arrays = np.load(folder / 'hands.npz')
        line = hands(tmp_path, 'a') if not frame else json.loads((clip / 'hands.jsonl').read_text().splitlines()[4])
        for hand, side in enumerate(('left', 'right')):
            assert arrays['joints'][*frame, hand] == pytest.approx(np.array(line[side]['joints_m']), abs=2e-6)
            layer = ManoLayer(side=side, model=standin[hand], use_pca=False, dtype=torch.float64)
            pose = np.append(arrays['global_orient'][*frame, hand], arrays['hand_pose'][*frame, hand])
            values = (torch.from_numpy(x)[None].double() for x in (pose, arrays['betas'][*frame, hand]))
            vertices = layer(*values, torch.from_numpy(arrays['transl'][*frame, hand])[None].double())[0][0] / 1000
            if not frame:
                mesh = trimesh.load(image / f'{side}.obj', process=False).vertices
                assert np.abs(vertices.numpy() - mesh).max() < 5e-6  # m; the OBJ has six decimals
    record = json.loads((clip / 'video.json').read_text())
    assert record['motion']['formats'] == ['npz', 'glb', 'bvh'] and record['motion']['gaps'] == {
        'left': [],
        'right': [],
    }
    text = (clip / 'left.bvh').read_text()
    assert 'Frames: 6\nFrame Time: 0.0400000000\n' in text

    assert run(*given, '--export', 'bvh', 'npz', 'glb') == 0 and len(outcome(tmp_path)['earlier']) == 2
    assert run(*given) == 0 and outcome(tmp_path)['earlier'] == []  # and without the former files
    assert {path.name for path in image.iterdir()} == FILES and not motion & {path.name for path in clip.iterdir()}


@pytest.mark.parametrize('before', [[], ['x.jpg']])
def test_inputs_and_keys_may_follow_the_formats(images, before):
    photos = [str(images / name) for name in ('a.jpg', '*.png')]
    words = [*before, '--model', 'x', '--export', 'glb', 'npz', 'glb', *photos, 'MODEL.STAGES', '2']
    args = demo.parse_arguments(words)
    assert (args.export, args.inputs, args.keys) == (('npz', 'glb'), [*before, *photos], ['MODEL.STAGES', '2'])
    args = demo.parse_arguments(['x.jpg', '--model', 'x', '--export', 'bvh', 'MODEL.STAGES', '2'])
    assert (args.export, args.inputs, args.keys) == (('bvh',), ['x.jpg'], ['MODEL.STAGES', '2'])


@pytest.mark.parametrize('words', [['fbx'], ['npz', 'gbl'], ['nowhere.jpg']])
def test_unknown_formats_are_refused(run, images, tmp_path, capsys, words):
    assert run(images / 'a.jpg', '--export', *words) == 2
    assert f'--export {words[-1]} is unknown; pass some of npz, glb, bvh' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow  # runs the demo twice on a video
def test_a_stop_writes_the_files_of_a_shorter_video(run, tmp_path, monkeypatch):
    write_frames(tmp_path / 'clip.mp4', 8)
    draw, drawn = job.draw_overlay, []

    def interrupt(*arguments):
        drawn.append(None)
        if len(drawn) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(*arguments)

    monkeypatch.setattr(job, 'draw_overlay', interrupt)
    assert run(tmp_path / 'clip.mp4', '--track', 'off', '--export', 'npz', 'bvh') == 143
    clip = tmp_path / 'out' / 'clip'
    assert len(np.load(clip / 'hands.npz')['frame']) == 3 and 'Frames: 3\n' in (clip / 'right.bvh').read_text()
    assert run(tmp_path / 'clip.mp4', '--track', 'off', '--export', 'npz', 'bvh') == 0
    assert len(np.load(clip / 'hands.npz')['frame']) == 8


def test_a_format_that_cannot_be_written_leaves_no_file_of_the_video(run, tmp_path, monkeypatch, capsys):
    write_frames(tmp_path / 'clip.mp4', 3)

    def full(*arguments, **options):
        raise OSError(28, 'No space left on device', 'left.bvh')

    monkeypatch.setattr('inference.motion.write_bvh', full)
    assert run(tmp_path / 'clip.mp4', '--track', 'off', '--export', 'bvh') == 2
    assert 'No space left on device (left.bvh)' in capsys.readouterr().err
    assert list((tmp_path / 'out' / 'clip').iterdir()) == []


# Folders


def inputs_of(tmp_path) -> dict[str, str]:
    """Folder of results -> name of the input's folder and file."""
    records = [*(tmp_path / 'out').glob('*/hands.json'), *(tmp_path / 'out').glob('*/video.json')]
    inputs = {record.parent.name: json.loads(record.read_text())['asked']['input'] for record in records}
    return {folder: '/'.join(name.split('/')[-2:]) for folder, name in inputs.items()}


def test_files_of_one_name_have_different_folders_in_one_command_and_over_several(run, images, tmp_path):
    for day in ('day1', 'day2', 'day3'):
        (tmp_path / day).mkdir()
        (tmp_path / day / 'a.jpg').write_bytes((images / 'a.jpg').read_bytes())
    (tmp_path / 'day1' / 'a.png').write_bytes((images / 'b.png').read_bytes())
    write_frames(tmp_path / 'day1' / 'a.mp4', 2)
    assert run(tmp_path / 'day1' / 'a.jpg', tmp_path / 'day2' / 'a.jpg') == 0
    before = {'a': 'day1/a.jpg', 'a-2': 'day2/a.jpg'}
    assert inputs_of(tmp_path) == before
    assert run(tmp_path / 'day2' / 'a.jpg') == 0  # keeps its folder
    assert outcome(tmp_path)['earlier'] == [str(tmp_path / 'out' / 'a-2')] and inputs_of(tmp_path) == before
    assert run(tmp_path / 'day3', tmp_path / 'day1') == 0
    after = inputs_of(tmp_path)
    assert after.items() > before.items() and len(after) == 5
    assert set(after.values()) == {'day1/a.jpg', 'day2/a.jpg', 'day3/a.jpg', 'day1/a.png', 'day1/a.mp4'}
    listed = outcome(tmp_path)['folders']
    assert {name: '/'.join(source.split('/')[-2:]) for source, name in listed.items()} == after
    assert run(tmp_path / 'day2' / 'a.jpg', '--focal', 300) == 0  # other options: the same folder
    assert inputs_of(tmp_path) == after and hands(tmp_path, 'a-2')['focal_from'] == 'given'


def test_an_input_is_known_by_its_place_and_not_by_how_it_is_named(run, images, tmp_path, monkeypatch):
    monkeypatch.chdir(images)
    assert run('a.jpg') == 0
    monkeypatch.chdir(tmp_path)
    assert run('in/a.jpg') == 0 and len(outcome(tmp_path)['earlier']) == 1
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'a.jpg').write_bytes((images / 'b.png').read_bytes())
    monkeypatch.chdir(tmp_path / 'other')
    assert run('a.jpg') == 0 and inputs_of(tmp_path) == {'a': 'in/a.jpg', 'a-2': 'other/a.jpg'}


def test_fewer_pairs_than_before_leave_none_of_the_former_results(run, images, tmp_path):
    (tmp_path / 'three.json').write_text(json.dumps({'a.jpg': [[20, 10, 60, 70]] * 3}))
    assert run(images / 'a.jpg', '--boxes', tmp_path / 'three.json', '--batch', 2) == 0
    folder = tmp_path / 'out' / 'a'
    assert {path.name for path in folder.iterdir()} == {*FILES, '2', '3'}
    (folder / 'notes.txt').write_text('of the user')
    (folder / '3' / 'notes.txt').write_text('of the user')
    assert run(images / 'a.jpg', '--box', 20, 10, 60, 70) == 0
    assert {path.name for path in folder.iterdir()} == {*FILES, '3', 'notes.txt'}
    assert [path.name for path in (folder / '3').iterdir()] == ['notes.txt']


def test_an_interrupted_image_is_done_again_whatever_the_command(run, images, tmp_path, monkeypatch):
    assert run(images / 'a.jpg') == 0

    def full(*_, **__):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr('inference.files.write_meshes', full)
        assert run(images / 'a.jpg', '--focal', 300) == 2  # the overlay is new, the meshes are not written
    assert run(images / 'a.jpg') == 0
    assert outcome(tmp_path)['earlier'] == [] and {path.name for path in (tmp_path / 'out' / 'a').iterdir()} == FILES


def test_images_of_any_name_are_done_and_the_rest_too(run, images, tmp_path, monkeypatch):
    names = [b'H\xe4nde', b'50%03d: a\nb']
    for old, name in zip(('b.png', 'c.jpg'), names):
        os.rename(os.fsencode(images / old), os.fsencode(images) + b'/' + name)
    (images / 'text.jpg').write_text('no image')
    given = [images, *(os.fsdecode(os.fsencode(images) + b'/' + name) for name in names)]
    with monkeypatch.context() as patch:
        for stream in ('stdout', 'stderr'):
            patch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), 'ascii', 'strict'))
        assert run(*given) == 1
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {'a', 'H_nde', '50_03d_ a_b', 'demo.json'}
    assert hands(tmp_path, 'H_nde')['asked']['input'].endswith(r'/in/H\xe4nde')
    (images / 'boxes.json').write_text(json.dumps({r'H\xe4nde': [20, 10, 60, 70]}))
    assert run(given[1], '--boxes', images / 'boxes.json') == 0
    assert hands(tmp_path, 'H_nde')['box'] == [20, 10, 60, 70]


# Reruns


def test_a_rerun_processes_new_and_changed_inputs_only(run, images, tmp_path):
    assert run(images) == 0
    before = (tmp_path / 'out' / 'a' / 'overlay.jpg').stat().st_mtime_ns
    cv2.imwrite(str(images / 'c.jpg'), np.zeros((90, 90, 3), np.uint8))
    assert run(images) == 0
    assert [path.rpartition('/')[2] for path in outcome(tmp_path)['earlier']] == ['a', 'b']
    assert (tmp_path / 'out' / 'a' / 'overlay.jpg').stat().st_mtime_ns == before
    assert run(images, '--focal', 300) == 0
    assert outcome(tmp_path)['earlier'] == [] and hands(tmp_path, 'a')['intrinsics_px'][0][0] == 300


def test_small_hands_in_a_whole_image_cause_a_warning(run, images, tmp_path, monkeypatch):
    monkeypatch.setattr(job, 'SMALL_HANDS', 1e9)
    assert run(images) == 0
    assert len(outcome(tmp_path)['warnings']) == 3 and '--box' in outcome(tmp_path)['warnings'][0]['warning']
    assert run(images, '--box', 20, 10, 60, 70) == 0
    assert 'is the box around both hands' in outcome(tmp_path)['warnings'][0]['warning']
    monkeypatch.setattr(job, 'SMALL_HANDS', 0)
    assert run(images, '--focal', 100) == 0 and outcome(tmp_path)['warnings'] == []


# Videos


def test_a_video_yields_an_overlay_and_joints_over_time(run, tmp_path):
    write_frames(tmp_path / 'clip.mp4', 7)
    assert run(tmp_path / 'clip.mp4', '--box', 10, 10, 30, 30, '--batch', 3, '--track', 'off') == 0
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
    assert run(tmp_path / 'clip.mp4', '--box', 10, 10, 30, 30, '--batch', 3, '--track', 'off') == 0
    assert outcome(tmp_path)['earlier'] == [str(folder)]
    assert run(tmp_path / 'clip.mp4', '--frames', 2, '--serve', 0) == 0
    record = json.loads((folder / 'video.json').read_text())
    assert (record['frames'], record['frames_per_second'], record['damage'], record['truncated']) == (2, 25, [], False)


def test_a_video_of_varying_rate_keeps_its_times(run, tmp_path):
    write_timed(tmp_path / 'phone.mp4', [0, 1 / 30, 2 / 30, 3 / 30, 4 / 30, 0.3, 0.5])
    assert run(tmp_path / 'phone.mp4', '--track', 'off') == 0
    folder = tmp_path / 'out' / 'phone'
    with open(folder / 'joints.csv') as file:
        times = [float(row['time_s']) for row in csv.DictReader(file)]
    assert times == pytest.approx([0, 0.0333, 0.0667, 0.1, 0.1333, 0.3, 0.5], abs=1e-3)
    record = json.loads((folder / 'video.json').read_text())
    assert record['frames_per_second'] == pytest.approx(12, abs=0.1)
    assert record['overlay_frames_per_second'] == pytest.approx(30, abs=0.1)
    movie = cv2.VideoCapture(str(folder / 'overlay.mp4'))
    assert movie.get(cv2.CAP_PROP_FRAME_COUNT) == 16  # half a second at 30 frames/s, and the last one
    assert outcome(tmp_path)['warnings'] == []


@pytest.fixture
def blob_clip(tmp_path, monkeypatch):
    """clip.mp4, in which bright hands move, vanish and return, and a network that sees bright pixels."""
    monkeypatch.setattr('inference.reconstruct.Reconstructor.from_crops', BlobReconstructor().from_crops)
    monkeypatch.setattr(job, 'draw_overlay', lambda shown, hands, models: shown.image)
    writer = cv2.VideoWriter(
        str(tmp_path / 'clip.mp4'), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*'mp4v'), 25, (320, 240)
    )
    for step in range(12):
        writer.write(blob(None if step in (5, 6) else (20 + 10 * step, 80, 80, 60)))
    writer.release()
    return tmp_path / 'clip.mp4'


def video_files(tmp_path, name: str = 'clip') -> tuple[list[dict], list[dict], dict]:
    """Rows of joints.csv, lines of hands.jsonl, and video.json."""
    folder = tmp_path / 'out' / name
    with open(folder / 'joints.csv') as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (folder / 'hands.jsonl').read_text().splitlines()]
    return rows, lines, json.loads((folder / 'video.json').read_text())


@pytest.mark.parametrize('smooth', ['off', 'online', 'offline'])
def test_where_hands_vanish_the_files_have_a_gap(run, blob_clip, tmp_path, smooth):
    assert run(blob_clip, '--box', 20, 80, 80, 60, '--smooth', smooth) == 0
    rows, lines, record = video_files(tmp_path)
    assert [line['state'] for line in lines] == ['seen'] * 5 + ['lost'] * 2 + ['seen'] * 5
    assert [row['left_wrist_x_m'] == '' for row in rows] == [line['state'] == 'lost' for line in lines]
    assert 'left' not in lines[5] and lines[5]['box'] is None
    assert [line['frame'] for line in lines] == list(range(12)) and [row['time_s'] for row in rows][-1] == '0.4400'
    centres = [line['box'][0] + line['box'][2] / 2 for line in lines if line['box']]
    assert np.diff(centres[1:5]) == pytest.approx([10] * 3, abs=2)  # the box of a frame is that of the frame before
    assert (record['frames'], record['frames_without_hands'], record['frames_filled']) == (12, 2, 0)
    assert 'No hands were found in 2 of 12 frames, first at 0.20 s' in outcome(tmp_path)['warnings'][0]['warning']
    assert cv2.VideoCapture(str(tmp_path / 'out/clip/overlay.mp4')).get(cv2.CAP_PROP_FRAME_COUNT) == 12


def test_gaps_are_filled_and_marked_on_request(run, blob_clip, tmp_path):
    assert run(blob_clip, '--box', 20, 80, 80, 60, '--fill', '--smooth', 'online') == 0
    rows, lines, record = video_files(tmp_path)
    assert [line['state'] for line in lines] == ['seen'] * 5 + ['filled'] * 2 + ['seen'] * 5
    assert all(row['left_wrist_x_m'] for row in rows)
    assert lines[5]['residual_px'] is lines[5]['to_crop'] is lines[5]['left']['camera'] is None
    assert (record['frames_without_hands'], record['frames_filled']) == (0, 2)
    assert outcome(tmp_path)['warnings'] == []


def test_a_video_without_hands_is_one_gap_and_one_warning(run, blob_clip, tmp_path):
    write_frames(tmp_path / 'dark.mp4', 3, size=(320, 240))
    for options in (['--smooth', 'offline', '--fill'], ['--smooth', 'online'], []):
        assert run(tmp_path / 'dark.mp4', *options) == 0
        _, lines, record = video_files(tmp_path, 'dark')
        assert [line['state'] for line in lines] == ['lost'] * 3 and record['frames_without_hands'] == 3
        assert len(outcome(tmp_path)['warnings']) == 1


@pytest.mark.parametrize(
    'options, advice',
    [
        ([], 'Pass --box or --detect to find them, or --track off'),
        (['--box', 20, 80, 80, 60], 'there. Pass --track off to keep to the box'),
        (['--track', 'off'], 'because the network finds no hands'),
    ],
)
def test_the_advice_for_frames_without_hands_fits_the_command(run, blob_clip, tmp_path, monkeypatch, options, advice):
    def unseen(self, crops):  # as a network with MODEL.PRESENCE
        return BlobReconstructor().from_crops(crops)._replace(present=torch.zeros(len(crops), 2, dtype=torch.bool))

    monkeypatch.setattr('inference.reconstruct.Reconstructor.from_crops', unseen)
    assert run(blob_clip, *options) == 0
    assert advice in outcome(tmp_path)['warnings'][0]['warning']


def test_scenes_are_told_apart_without_tracking(run, blob_clip, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(job, 'smoothed_online', lambda frames, reconstruct: (seen.append(f.cut) or f for f in frames))
    bright = [np.full((240, 320, 3), value, np.uint8) for value in (40, 40, 110, 110)]
    for image in bright:
        image[80:140, 20:100] = 255
    writer = cv2.VideoWriter(str(tmp_path / 'two.mp4'), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*'mp4v'), 25, (320, 240))
    for image in bright:
        writer.write(image)
    writer.release()
    assert run(tmp_path / 'two.mp4', '--box', 20, 80, 80, 60, '--track', 'off', '--smooth', 'online') == 0
    assert seen == [False, False, True, False]


class BlobDetector:
    """In place of MediaPipe: finds bright pixels as two hands, or their left half as one, or none."""

    def __init__(self, most: int):
        self.most, self.found, self.calls, self.closed = most, Counter(), [], False

    def __call__(self, image):
        rows, columns = np.nonzero(image[..., 0] > 128)
        hands = self.most if len(rows) else 0
        self.found[hands] += 1
        self.calls.append(hands)
        if not hands:
            return detection([])
        right = columns.max() if hands == 2 else (columns.min() + columns.max()) / 2
        return detection([np.array([[columns.min(), rows.min()], [right, rows.max()]])] * hands)

    def close(self):
        self.closed = True


@pytest.fixture(params=[2, 1, 0], ids=['both', 'one', 'none'])
def detector(request, monkeypatch, tmp_path_factory):
    """What the demo detects hands with: it finds both, one of them, or none."""
    detector = BlobDetector(request.param)
    file = tmp_path_factory.mktemp('detector') / 'hands.task'
    file.touch()
    monkeypatch.setattr(demo, 'DETECTOR_MODEL', str(file))
    monkeypatch.setattr(demo, 'HandDetector', lambda model: detector)
    return detector


def test_a_detector_is_asked_for_the_first_frame_and_where_the_hands_are_lost(run, blob_clip, tmp_path, detector):
    assert run(blob_clip, '--detect') == 0
    assert detector.calls == [detector.most, 0, 0, detector.most] and detector.closed
    _, lines, record = video_files(tmp_path)
    assert [line['state'] for line in lines] == ['seen'] * 5 + ['lost'] * 2 + ['seen'] * 5
    assert overlap(lines[0]['box'], (20, 80, 80, 60)) > 0.9
    assert record['detected_hands'] == [detector.calls.count(hands) for hands in range(3)]
    assert any('network placed the box' in each['warning'] for each in outcome(tmp_path)['warnings'])


def test_a_detector_that_always_finds_both_hands_is_not_worth_a_warning(run, blob_clip, tmp_path, detector):
    assert run(blob_clip, '--detect', '--frames', 3) == 0
    assert len(outcome(tmp_path)['warnings']) == (detector.most < 2)


def test_without_tracking_every_frame_is_detected(run, blob_clip, tmp_path, detector):
    assert run(blob_clip, '--detect', '--track', 'off') == 0
    _, lines, record = video_files(tmp_path)
    assert len(detector.calls) == sum(record['detected_hands']) == 12
    boxes = [line['box'] for line in lines]
    assert boxes == [None] * 12 if detector.most == 0 else boxes[5] == boxes[6] == boxes[4] != boxes[3]


@pytest.mark.parametrize('options', [['--smooth', 'online'], ['--smooth', 'offline', '--fill'], ['--track', 'off']])
def test_a_clip_of_one_frame_is_a_clip(run, blob_clip, tmp_path, options):
    assert run(blob_clip, '--frames', 1, '--box', 20, 80, 80, 60, *options) == 0
    rows, lines, record = video_files(tmp_path)
    assert len(rows) == len(lines) == record['frames'] == 1 and lines[0]['state'] == 'seen'


def test_a_stop_while_a_clip_is_recorded_leaves_no_video(run, blob_clip, tmp_path, monkeypatch):
    cut, calls = tracking.cut_crop, []

    def interrupt(*arguments):
        calls.append(None)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return cut(*arguments)

    monkeypatch.setattr(tracking, 'cut_crop', interrupt)
    assert run(blob_clip, '--box', 20, 80, 80, 60, '--smooth', 'offline') == 143
    assert not list((tmp_path / 'out' / 'clip').iterdir())
    assert run(blob_clip, '--box', 20, 80, 80, 60, '--smooth', 'offline') == 0
    assert video_files(tmp_path)[2]['frames'] == 12


@pytest.fixture
def blob_images(blob_clip, monkeypatch):
    """Files of images, too, with a network that sees bright pixels and predicts no meshes."""
    for name in ('draw_overlay', 'view'):
        monkeypatch.setattr(f'inference.files.{name}', lambda shown, *_: np.zeros((9, 9, 3), np.uint8))
    monkeypatch.setattr('inference.files.write_meshes', lambda *_: None)


def test_a_second_look_records_its_own_box_and_crop(run, blob_images, tmp_path):
    cv2.imwrite(str(tmp_path / 'one.png'), blob((120, 80, 80, 50)))
    assert run(tmp_path / 'one.png', '--box', 110, 85, 90, 60, '--refine-box') == 0
    assert hands(tmp_path, 'one')['box'] == pytest.approx([120, 80, 80, 50], abs=2)
    bright = np.nonzero(cv2.imread(str(tmp_path / 'out/one/crop.jpg'))[..., 0] > 128)[1]
    assert bright.min() == pytest.approx(0.1 * 256, abs=4) and bright.max() == pytest.approx(0.9 * 256, abs=4)
    assert run(tmp_path / 'one.png', '--box', 110, 85, 90, 60) == 0  # other options: done again
    assert hands(tmp_path, 'one')['box'] == [110, 85, 90, 60]


def test_a_truncated_video_causes_a_warning(run, tmp_path):
    write_frames(tmp_path / 'clip.avi', 12, 'MJPG', (320, 240))
    content = (tmp_path / 'clip.avi').read_bytes()
    (tmp_path / 'clip.avi').write_bytes(content[: len(content) // 2])
    assert run(tmp_path / 'clip.avi') == 0
    frames = json.loads((tmp_path / 'out' / 'clip' / 'video.json').read_text())['frames']
    assert 0 < frames < 12
    assert any(f'ends early, after {frames} frames' in each['warning'] for each in outcome(tmp_path)['warnings'])
    assert run(tmp_path / 'clip.avi', '--frames', 2) == 0
    assert any('the video ends early.' in each['warning'] for each in outcome(tmp_path)['warnings'])


@pytest.mark.parametrize('number', STOP_SIGNALS)
def test_a_stop_ends_a_video_at_the_next_frame_and_a_rerun_completes_it(run, tmp_path, monkeypatch, capsys, number):
    write_frames(tmp_path / 'clip.mp4', 8)
    draw, drawn = job.draw_overlay, []

    def interrupt(*arguments):
        drawn.append(None)
        if len(drawn) == 3:
            os.kill(os.getpid(), number)
        return draw(*arguments)

    monkeypatch.setattr(job, 'draw_overlay', interrupt)
    assert run(tmp_path / 'clip.mp4', '--batch', 4, '--track', 'off') == 128 + number
    record = json.loads((tmp_path / 'out' / 'clip' / 'video.json').read_text())
    assert record['frames'] == 3 and not record['complete']
    assert cv2.VideoCapture(str(tmp_path / 'out' / 'clip' / 'overlay.mp4')).get(cv2.CAP_PROP_FRAME_COUNT) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        error == f'Stopped by {signal.Signals(number).name}. Finished work is kept; rerun the same command to continue.'
    )
    assert run(tmp_path / 'clip.mp4', '--batch', 4, '--track', 'off') == 0
    assert json.loads((tmp_path / 'out' / 'clip' / 'video.json').read_text())['frames'] == 8


def test_a_stop_before_the_first_frame_leaves_no_video(run, tmp_path, monkeypatch):
    write_frames(tmp_path / 'clip.mp4', 3)
    cut = tracking.cut_crop
    monkeypatch.setattr(tracking, 'cut_crop', lambda *some: (os.kill(os.getpid(), signal.SIGTERM), cut(*some))[1])
    assert run(tmp_path / 'clip.mp4') == 143
    assert not list((tmp_path / 'out' / 'clip').iterdir()) and outcome(tmp_path)['done'] == []


def test_a_stop_keeps_the_images_that_are_done(run, images, tmp_path, monkeypatch):
    write, written = job.write_image_files, []

    def interrupt(*arguments, **more):
        written.append(None)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return write(*arguments, **more)

    monkeypatch.setattr(job, 'write_image_files', interrupt)
    assert run(images) == 143
    assert len(outcome(tmp_path)['done']) == 2
    assert run(images) == 0 and len(written) == 3 and len(outcome(tmp_path)['earlier']) == 2


def test_one_command_at_a_time_writes_a_folder(run, images, tmp_path, capsys):
    program = (
        f'import time, utils.ownership as o\nwith o.owned({str(tmp_path / "out")!r}): print(flush=True); time.sleep(60)'
    )
    other = subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    other.stdout.readline()
    assert run(images) == 2
    other.kill()
    other.wait()
    assert f'out is in use by process {other.pid}' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


# Options


@pytest.mark.parametrize(
    'arguments, words',
    [
        ([], 'No input: name images'),
        (['none.jpg'], 'no file or folder none.jpg'),
        (['*.none'], 'No file matches the pattern'),
        (['tests', '--focal', '-1'], '--focal is -1'),
        (['tests', '--batch', '0'], '--batch is 0'),
        (['tests'], 'contains no image or video'),
        (['--camera', '0', '--smooth', 'offline'], 'A camera cannot be read twice'),
        (['--camera', '0', '--fill'], 'A camera cannot be read twice'),
        (['tests', '--principal', 'nan', '50'], '--principal is nan 50.0'),
        (['tests', '--principal', '50', 'inf'], '--principal is 50.0 inf'),
        (['tests', '--detector', 'a.task'], '--detector FILE needs --detect'),
        (['tests', 'DEVICE', 'cuda:9'], 'DEVICE cannot be set by a KEY VALUE pair here: --device sets it'),
        (['tests', 'MANO.SOURCE', 'standin', 'OUTPUT_DIR', 'x'], 'OUTPUT_DIR cannot be set'),
        (['tests', 'EVAL.BATCH_SIZE', '2'], '--batch sets it'),
    ],
)
def test_a_mistake_is_reported_in_one_sentence(run, capsys, arguments, words):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count('\n') == 1


def test_configuration_keys_end_the_inputs_whatever_they_look_like():
    args = demo.parse_arguments(['IMG_1.JPG', 'DEVICE.PNG', 'MANO.SOURCE', 'standin', '--model', 'x'])
    assert args.inputs == ['IMG_1.JPG', 'DEVICE.PNG'] and args.keys == ['MANO.SOURCE', 'standin']


def test_a_missing_camera_is_one_failure(run, tmp_path):
    assert run('--camera', 99) == 1
    assert outcome(tmp_path)['failed'][0]['input'] == 'camera 99'


# The detector


def test_without_mediapipe_one_sentence_advises(run, images, capsys, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'mediapipe', None)
    assert run(images, '--detect') == 2
    error = capsys.readouterr().err
    assert 'pip install -r requirements-demo.txt' in error and error.count('\n') == 1


def test_hands_that_a_detector_misses_are_found_by_the_network(run, blob_images, tmp_path, detector):
    true = (120, 80, 90, 60)
    cv2.imwrite(str(tmp_path / 'hands.png'), blob(true))
    assert run(tmp_path / 'hands.png', '--detect') == 0
    numbers = hands(tmp_path, 'hands')
    assert numbers['detected_hands'] == detector.most
    assert overlap(numbers['box'], true) > (0.6 if detector.most == 2 else 0.9)  # the detector's box has a margin
    missed = {1: 'found one hand', 0: 'found no hands'}.get(detector.most)
    warnings = [each['warning'] for each in outcome(tmp_path)['warnings']]
    assert not warnings if missed is None else missed in warnings[0] and 'crop.jpg' in warnings[0]


def test_another_detector_means_another_result(run, blob_images, tmp_path, detector):
    image = tmp_path / 'hands.png'
    cv2.imwrite(str(image), blob((120, 80, 90, 60)))
    other = tmp_path / 'other.task'
    other.write_bytes(b'1')
    earlier = []
    for words in ((), (), ('--detector', other), ('--detector', other)):
        assert run(image, '--detect', *words) == 0
        earlier.append(len(outcome(tmp_path)['earlier']))
    other.write_bytes(b'12')
    assert run(image, '--detect', '--detector', other) == 0
    assert [*earlier, len(outcome(tmp_path)['earlier'])] == [0, 1, 0, 1, 0]


def test_an_image_without_hands_is_a_failure(run, blob_images, tmp_path, detector):
    cv2.imwrite(str(tmp_path / 'empty.png'), blob(None))
    assert run(tmp_path / 'empty.png', '--detect') == 1
    assert 'Neither the detector nor the network finds hands' in outcome(tmp_path)['failed'][0]['reason']
    assert detector.closed and not (tmp_path / 'out' / 'empty').exists()


def test_without_a_detector_nothing_is_recorded_of_it(run, images, blob_clip, blob_images, tmp_path):
    assert run(images / 'a.jpg', blob_clip, '--box', 20, 10, 60, 70, '--frames', 2) == 0
    assert 'detected_hands' not in hands(tmp_path, 'a') and 'detected_hands' not in video_files(tmp_path)[2]


def test_the_box_of_a_video_follows_the_detector_smoothly():
    assert boxes.smoothed(None, (0, 0, 10, 10)) == (0, 0, 10, 10)
    assert boxes.smoothed((0, 0, 10, 10), (10, 20, 20, 10)) == (5, 10, 15, 10)
    assert boxes.smoothed((1, 2, 3, 4), None) == (1, 2, 3, 4)
    assert boxes.smoothed(None, None) is None


def test_results_are_the_same_alone_and_in_a_batch(run, images, tmp_path):
    assert run(images, '--batch', 1) == 0
    alone = hands(tmp_path, 'b')
    assert run(images, '--batch', 3, '--focal', 160) == 0  # the longer side: the same camera, asked for otherwise
    both = torch.tensor([alone['left']['joints_m'], hands(tmp_path, 'b')['left']['joints_m']])
    assert (both[0] - both[1]).abs().max() < 1e-4
