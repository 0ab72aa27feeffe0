import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import dataset.synthetic.synthesize as script
from dataset import interhand
from dataset.hand_model_record import check_hand_model_record
from dataset.prepare.raw import RawSplit
from dataset.prepared import InterHandDataset
from dataset.synthetic.appearance import TEXELS, Light, arm_faces, draw_hands, with_forearms, wrist_loop
from dataset.synthetic.poses import (
    FINGER_POSES,
    PLACEMENTS,
    TOLERATED,
    VARIED_PLACEMENTS,
    hand_axes,
    push_apart,
    sample_finger_angles,
    sample_path,
    sample_placement_name,
    steadied,
)
from dataset.synthetic.synthesize import SPLITS, Settings, capture_cameras, main, make_sequence, plan, synthesize
from manopth import HandPair, TwoHandLayer
from manopth.rotations import axis_angle_to_matrix
from manopth.standin import FLEXION_LIMITS
from models.hands import load_hands
from utils.drawing import mesh_overlay
from utils.hand import INTERHAND_TO_JOINTS, LEFT, RIGHT, SIDES

ROOT = Path(__file__).resolve().parents[1]
FRAMES, SEED = (9, 3, 3), 4
SETTINGS = Settings(FRAMES, SEED, 60.0, 'standin', 'misc/mano')


@pytest.fixture(scope='module')
def layer():
    return TwoHandLayer(load_hands('standin'), dtype=torch.float64)


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    """The script, really run by two workers."""
    root = tmp_path_factory.mktemp('synthetic') / 'raw'
    done = subprocess.run(
        [
            sys.executable,
            'dataset/synthesize.py',
            '--save_path',
            root,
            '--frames',
            *map(str, FRAMES),
            '--seed',
            str(SEED),
            '--workers',
            '2',
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert 'img/s' in done.stderr and 'hands intersect' in done.stdout
    return root


def annotations(root, split, kind):
    return json.loads((root / 'annotations' / split / f'InterHand2.6M_{split}_{kind}.json').read_text())


def every_image_record(root):
    for split in SPLITS:
        data = annotations(root, split, 'data')
        cameras, joints, mano = (annotations(root, split, kind) for kind in ('camera', 'joint_3d', 'MANO_NeuralAnnot'))
        for image, annotation in zip(data['images'], data['annotations']):
            capture, frame = str(image['capture']), str(image['frame_idx'])
            camera = {key: np.array(cameras[capture][key][image['camera']]) for key in cameras[capture]}
            yield split, image, annotation, camera, joints[capture][frame], mano[capture][frame]


def flat_hands(layer, beta=0.0):
    root, pose = (torch.zeros(1, 2, size, dtype=torch.float64) for size in (3, 45))
    return layer(root, pose, torch.full((1, 2, 10), beta, dtype=torch.float64), use_pca=False)


def annotated_hands(layer, mano):
    """Both hands of an annotation, world axes; where one is missing the other's numbers stand in."""
    hands = [mano[side] or mano[SIDES[1 - number]] for number, side in enumerate(SIDES)]
    pose, shape, trans = (
        torch.tensor([[hand[key] for hand in hands]], dtype=torch.float64) for key in ('pose', 'shape', 'trans')
    )
    posed = layer(pose[..., :3], pose[..., 3:] + layer.pose_mean, shape, use_pca=False)
    return [(points + trans[:, :, None])[0] for points in posed]


def grey_mean(root, split, image):
    return cv2.imread(str(root / 'images' / split / image['file_name']), cv2.IMREAD_GRAYSCALE).mean()


def test_layout_and_fields_are_those_of_the_real_set(tree):
    assert sorted(p.name for p in tree.iterdir()) == ['annotations', 'hand_model.json', 'images', 'synthesized.json']
    for split, count in zip(SPLITS, FRAMES):
        data = annotations(tree, split, 'data')
        assert sorted(data) == ['annotations', 'images'] and len(data['images']) == count
        assert [a['image_id'] for a in data['annotations']] == [i['id'] for i in data['images']] == list(range(count))
        assert len(list((tree / 'images' / split).rglob('*.jpg'))) == count
        for capture in annotations(tree, split, 'camera').values():
            assert list(capture) == ['campos', 'camrot', 'focal', 'princpt']
    for split, image, annotation, camera, joints, mano in every_image_record(tree):
        assert {key: type(value) for key, value in image.items()} == {
            'id': int,
            'file_name': str,
            'width': int,
            'height': int,
            'capture': int,
            'subject': int,
            'seq_name': str,
            'camera': str,
            'frame_idx': int,
        }
        assert image['file_name'] == (
            f'Capture{image["capture"]}/{image["seq_name"]}/cam{image["camera"]}/image{image["frame_idx"]}.jpg'
        )
        pixels = cv2.imread(str(tree / 'images' / split / image['file_name']))
        assert pixels.shape[:2] == (image['height'], image['width']) and sorted(pixels.shape[:2]) == [334, 512]
        assert {key: type(value) for key, value in annotation.items()} == {
            'id': int,
            'image_id': int,
            'bbox': list,
            'joint_valid': list,
            'hand_type': str,
            'hand_type_valid': int,
        }
        assert np.shape(annotation['joint_valid']) == (42, 1) and len(annotation['bbox']) == 4
        assert {key: np.shape(value) for key, value in camera.items()} == {
            'campos': (3,),
            'camrot': (3, 3),
            'focal': (2,),
            'princpt': (2,),
        }
        # Cameras at the person's eyes stand nearer than those of the dome.
        assert 300 < np.linalg.norm(camera['campos'] - [0, 0, 1050]) < 1300  # mm
        assert np.allclose(camera['camrot'] @ camera['camrot'].T, np.eye(3)) and np.linalg.det(camera['camrot']) > 0
        assert {key: np.shape(value) for key, value in joints.items()} == {
            'world_coord': (42, 3),
            'joint_valid': (42, 1),
            'hand_type': (),
            'hand_type_valid': (),
        }
        assert type(joints['hand_type_valid']) is bool and joints['hand_type'] == annotation['hand_type']
        for hand in filter(None, mano.values()):
            assert {key: len(value) for key, value in hand.items()} == {'pose': 48, 'shape': 10, 'trans': 3}


def test_formula_gives_the_annotated_joints(tree, layer):
    for _, _, annotation, camera, joints, mano in every_image_record(tree):
        world = np.array(joints['world_coord'])
        seen = [side for side in (LEFT, RIGHT) if mano[SIDES[side]] is not None]
        translation = -camera['camrot'] @ camera['campos'] / 1000
        in_camera = annotated_hands(layer, mano)[1].numpy() @ camera['camrot'].T + translation
        for side in seen:
            real_order = world[21:] if side == LEFT else world[:21]
            expected = (real_order[list(INTERHAND_TO_JOINTS)] - camera['campos']) @ camera['camrot'].T  # mm
            assert np.abs(1000 * in_camera[side] - expected).max() < 0.01
            pixels = camera['focal'] * expected[:, :2] / expected[:, 2:] + camera['princpt']
            again = camera['focal'] * in_camera[side][:, :2] / in_camera[side][:, 2:] + camera['princpt']
            assert np.abs(pixels - again).max() < 0.02
            low = np.array(annotation['bbox'][:2])
            inside = ((pixels > low - 2) & (pixels < low + annotation['bbox'][2:] + 2)).all(1)
            assert inside.mean() > 0.6


def test_raw_reader_reads_it(tree):
    check_hand_model_record(tree, load_hands('standin'))
    assert json.loads((tree / 'hand_model.json').read_text())['hand_model'] == load_hands('standin').identity
    assert RawSplit(tree, 'train').file('data').is_file()


def test_splits_share_neither_captures_nor_subjects(tree):
    seen = {}
    for split, image, _, camera, _, _ in every_image_record(tree):
        for key in (('capture', image['capture']), ('subject', image['subject']), ('camera at', *camera['campos'])):
            assert seen.setdefault(key, split) == split


def test_several_cameras_see_one_time_step(tree):
    steps = {}
    for split, image, *_ in every_image_record(tree):
        steps.setdefault((split, image['capture'], image['frame_idx']), set()).add(image['camera'])
    assert max(map(len, steps.values())) == script.VIEWS


def test_contains_the_edge_cases(tree):
    kinds = {'single': 0, 'invalid': 0, 'black': 0}
    for split, image, annotation, _, joints, mano in every_image_record(tree):
        kinds['invalid'] += not annotation['hand_type_valid']
        kinds['black'] += grey_mean(tree, split, image) < 10
        if annotation['hand_type'] != 'interacting':
            kinds['single'] += 1
            hidden = 1 - SIDES.index(annotation['hand_type'])
            rows = slice(21, 42) if hidden == LEFT else slice(0, 21)
            assert mano[SIDES[hidden]] is None and mano[annotation['hand_type']] is not None
            assert (np.array(joints['world_coord'])[rows] == 1).all() and not np.any(joints['joint_valid'][rows])
            assert np.sum(joints['joint_valid']) == 21
        else:
            assert np.all(joints['joint_valid'])
    assert kinds == {'single': 1, 'invalid': 1, 'black': 1}


def test_does_not_depend_on_the_workers_or_their_order(tree, tmp_path):
    sequences = [s for s in plan(SETTINGS) if s.split in ('val', 'train')][::-1]
    for sequence in sequences:
        make_sequence(SETTINGS, sequence, tmp_path)
    again = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob('*.jpg')}
    assert len(again) == sum(FRAMES[:2])
    for name, content in again.items():
        assert (tree / name).read_bytes() == content


def test_hands_hardly_intersect(tree, layer):
    """Measured another way than the script does: winding numbers, and distances to points all over the triangles."""
    deepest, done = 0.0, set()
    weights = torch.tensor([(i, j, 6 - i - j) for i in range(7) for j in range(7 - i)], dtype=torch.float64) / 6
    for split, image, _, _, _, mano in every_image_record(tree):
        if (split, image['capture'], image['frame_idx']) in done or None in mano.values():
            continue
        done.add((split, image['capture'], image['frame_idx']))
        vertices = annotated_hands(layer, mano)[0]
        for own, other in ((LEFT, RIGHT), (RIGHT, LEFT)):
            points, corners = vertices[own], vertices[other][layer.faces[other]]
            points = points[((points > vertices[other].amin(0)) & (points < vertices[other].amax(0))).all(1)]
            inside = points[winding_number(points, corners) > 0.5]
            if len(inside):
                surface = torch.einsum('kc,fcx->fkx', weights, corners).reshape(-1, 3)
                deepest = max(deepest, float(torch.cdist(inside, surface).amin(1).amax()))
    assert len(done) >= 3 and deepest < 0.003


def winding_number(points, corners):
    """Van Oosterom & Strackee's solid angles over 4 pi; points (N, 3), corners (F, 3, 3) -> (N,)."""
    a, b, c = (corners - points[:, None, None]).unbind(2)
    la, lb, lc = (v.norm(dim=-1) for v in (a, b, c))
    volume = (a * torch.linalg.cross(b, c)).sum(-1)
    below = la * lb * lc + (a * b).sum(-1) * lc + (b * c).sum(-1) * la + (c * a).sum(-1) * lb
    return torch.atan2(volume, below).sum(1) / (2 * torch.pi)


def test_push_apart_ends_at_contact(layer):
    vertices = flat_hands(layer).vertices - flat_hands(layer).joints[:, :, 9:10]
    away = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    distance, depth = push_apart(vertices, layer.faces, away)
    assert depth[0] <= TOLERATED and 0.01 < distance[0] < 0.06
    vertices[:, RIGHT] += away * distance
    assert torch.cdist(vertices[0, LEFT], vertices[0, RIGHT]).min() < 0.006
    assert push_apart(vertices, layer.faces, away)[0] == 0


@pytest.mark.parametrize('side', SIDES)
def test_hand_axes_turn_fingers_and_palm(side):
    fingers, palm = np.array([0.0, -1.0, 0.0]), np.array([0.0, 0.0, 1.0])
    turn = hand_axes(fingers, palm, side)
    at_rest = np.array([1.0 if side == 'left' else -1.0, 0, 0])
    assert np.allclose(turn @ at_rest, fingers) and np.allclose(turn @ [0, -1, 0], palm)
    assert np.isclose(np.linalg.det(turn), 1)


@pytest.mark.parametrize('name', PLACEMENTS)
def test_every_placement_brings_the_hands_together(name):
    path = sample_path(5, name, np.random.default_rng(0), load_hands('standin'), torch.zeros(2, 10))
    assert path.penetration.max() <= TOLERATED
    nearest = torch.stack([torch.cdist(left, right).min() for left, right in path.vertices])
    # Placements that show hands without contact keep them further apart.
    assert nearest.max() < (0.2 if name in ('behind', 'apart') else 0.08)
    joints = path.joints.diff(dim=0).norm(dim=-1)
    assert 0.001 < joints.mean() < 0.12  # m from step to step: it moves, and it does not jump


def test_official_hands_move_by_their_components():
    models = HandPair(*(dataclasses.replace(model, name='mano') for model in load_hands('standin')))
    path = sample_path(4, 'pray', np.random.default_rng(0), models, torch.zeros(2, 10))
    for side, model in enumerate(models):
        coefficients = (path.pose[:, side].numpy() - model.pose_mean) @ model.pose_components.T
        assert np.abs(coefficients[:, 10:]).max() < 1e-5 and 0.1 < np.abs(coefficients[:, :10]).max() <= 1.5 + 1e-5


def test_forearms_close_the_wrists(layer):
    models = load_hands('standin')
    hands = flat_hands(layer)
    elbows = np.array([[-0.3, 0.1, 0.0], [0.3, 0.1, 0.0]])
    mesh = with_forearms(hands.vertices, hands.joints, elbows, tuple(map(wrist_loop, models)))[0]
    for faces in arm_faces(models).chunk(2):
        a, b, c = mesh[faces].unbind(1)
        # The vector area of a closed surface is zero; its volume is positive where faces look outwards.
        assert torch.linalg.cross(b - a, c - a).sum(0).abs().max() < 1e-7
        assert (a * torch.linalg.cross(b, c)).sum() / 6 > 3e-4


def test_cameras_stay_within_the_spread_and_see_the_hands():
    for spread in (0.0, 20.0, 120.0):
        for camera in capture_cameras(SETTINGS._replace(camera_spread=spread, without=('views',)), 0):
            away = camera.position - script.HANDS_AT
            assert abs(np.degrees(np.arctan2(away[0], -away[2]))) <= spread + 1e-6
            centre = camera.project(script.HANDS_AT[None])[0]
            assert np.abs(centre - np.array(camera.size[::-1]) / 2).max() < 40


def test_most_varied_cameras_stay_on_the_dome_and_all_see_the_hands():
    cameras = [camera for capture in range(20) for camera in capture_cameras(SETTINGS, capture)]
    away = np.array([camera.position - script.HANDS_AT for camera in cameras])
    assert 0.07 < (away[:, 2] > 0.1).mean() < 0.3  # at the person's eyes, or steep and further round
    frontal = np.abs(np.degrees(np.arctan2(away[:, 0], -away[:, 2]))) <= 60
    level = np.abs(np.degrees(np.arcsin(away[:, 1] / np.linalg.norm(away, axis=1)))) <= 31
    upright = np.array([camera.rotation[1, 1] for camera in cameras]) > 0.75
    assert (frontal & level & upright).mean() > 0.55
    for camera in cameras:
        centre = camera.project(script.HANDS_AT[None])[0]
        assert np.abs(centre - np.array(camera.size[::-1]) / 2).max() < 60
        # 20 cm at the hands cover a similar number of pixels in every camera.
        ends = camera.project(script.HANDS_AT + 0.1 * np.stack([camera.rotation[0], -camera.rotation[0]]))
        assert 180 < np.linalg.norm(ends[0] - ends[1]) < 310


def test_many_persons_whom_no_other_split_shares():
    persons = {split: set() for split in SPLITS}
    for sequence in plan(SETTINGS._replace(frames=(6000, 300, 300))):
        persons[sequence.split].add(sequence.capture)
    assert [len(persons[split]) for split in SPLITS] == [100, 10, 10]
    assert len(set.union(*persons.values())) == 120
    few = {s.capture for s in plan(SETTINGS._replace(frames=(6000, 0, 0), without=('persons',)))}
    assert len(few) == script.MOST_CAPTURES['train']


def test_placements_of_the_group_poses_can_be_switched_off():
    rng = np.random.default_rng(0)
    drawn = {sample_placement_name(rng) for _ in range(400)}
    plain = {sample_placement_name(rng, varied=False) for _ in range(400)}
    assert drawn == set(PLACEMENTS) and plain == drawn - set(VARIED_PLACEMENTS)


def test_continuous_finger_angles_obey_the_joints_limits_and_fill_them():
    rng, names = np.random.default_rng(0), tuple(FINGER_POSES)
    angles = np.stack([sample_finger_angles(names, rng) for _ in range(600)])
    plain = np.stack([sample_finger_angles(names, rng, varied=False) for _ in range(600)])
    flexion = angles[:, :15].reshape(-1, 5, 3)
    tolerance = np.radians(25)  # the noise of the named poses
    assert (flexion > FLEXION_LIMITS[..., 0] - tolerance).all() and (flexion < FLEXION_LIMITS[..., 1] + tolerance).all()
    # Named poses bend base and middle joints alike; continuous ones also bend each alone.
    alone = []
    for poses in (angles, plain):
        base, middle = poses[:, :15].reshape(-1, 5, 3)[:, 1:, :2].transpose(2, 0, 1)
        alone.append(((base > np.radians(40)) & (middle < np.radians(20))).mean())
    assert alone[0] > 0.01 and alone[0] > 2 * alone[1]


@pytest.mark.parametrize('seed', [0, 1])
def test_interlocked_fingers_stay_between_each_other(seed):
    path = sample_path(3, 'interlocked', np.random.default_rng(seed), load_hands('standin'), torch.zeros(2, 10))
    assert path.penetration.max() <= TOLERATED
    knuckles = path.joints[:, :, [5, 9, 13, 17]]
    across = torch.nn.functional.normalize(knuckles[:, :, 0] - knuckles[:, :, 3], dim=-1).mean(1)
    # Along the knuckles, middle joints of the fingers alternate between the hands.
    order = (path.joints[:, :, [6, 10, 14, 18]] * across[:, None, None]).sum(-1).flatten(1).argsort(1)
    assert ((order[:, 1:] // 4) != (order[:, :-1] // 4)).float().mean() > 0.8
    tips = path.joints[:, :, [8, 12, 16, 20]]
    # Far nearer than touching fingertips would be (0.15 m), with the fingertips near the other hand.
    assert (knuckles.mean(2)[:, 0] - knuckles.mean(2)[:, 1]).norm(dim=-1).max() < 0.105
    for side in (LEFT, RIGHT):
        assert torch.cdist(tips[:, side], path.vertices[:, 1 - side]).amin(2).mean() < 0.04


def test_without_yields_other_images_and_is_recorded(tmp_path):
    for name, without in (('all', ()), ('plain', script.GROUPS)):
        synthesize(tmp_path / name, SETTINGS._replace(frames=(2, 0, 0), without=without), workers=1)
        record = json.loads((tmp_path / name / 'synthesized.json').read_text())
        assert record['without'] == list(without)
    first, second = (sorted(p.read_bytes() for p in (tmp_path / n).rglob('*.jpg')) for n in ('all', 'plain'))
    assert len(first) == len(second) == 2 and first != second


def test_finger_poses_obey_the_joints_limits():
    for name, (*flexion, _, _) in FINGER_POSES.items():
        bent = np.radians(flexion)
        assert (bent >= FLEXION_LIMITS[..., 0] - 1e-9).all() and (bent <= FLEXION_LIMITS[..., 1] + 1e-9).all(), name


def test_an_interrupted_run_goes_on_where_it_stopped(tree, tmp_path, monkeypatch):
    settings = SETTINGS._replace(frames=(0, 0, 8))
    made = []

    def stop_at_the_second(settings, sequence, root):
        if made:
            raise KeyboardInterrupt
        made.append(sequence)
        return make_sequence(settings, sequence, root)

    monkeypatch.setattr(script, 'make_sequence', stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / 'raw', settings, workers=1)
    assert not (tmp_path / 'raw').exists()
    with pytest.raises(script.UserError, match='other settings'):
        synthesize(tmp_path / 'raw', settings._replace(seed=5), workers=1)

    monkeypatch.setattr(script, 'make_sequence', lambda *args: made.append(args[1]) or make_sequence(*args))
    synthesize(tmp_path / 'raw', settings, workers=1)
    assert sorted(made) == sorted(plan(settings))
    assert len(list((tmp_path / 'raw').rglob('*.jpg'))) == 8 and not (tmp_path / 'raw.partial').exists()


@pytest.mark.parametrize(
    'words, frames', [(['7', '0', '2'], (7, 0, 2)), (['100'], (80, 10, 10)), (['5'], (5, 0, 0)), (['19'], (17, 1, 1))]
)
def test_frames_are_counted_by_split_or_altogether(words, frames):
    args = script.parse_arguments(['--save_path', 'x', '--frames', *words, 'MANO.SOURCE', 'files'])
    assert args.frames == frames and args.opts == ['MANO.SOURCE', 'files']


@pytest.mark.parametrize(
    'arguments, word',
    [
        (['--frames', '5', '5'], '--frames'),
        (['--frames', 'many'], '--frames'),
        (['--frames', '0'], '--frames'),
        (['--frames', '0', '0', '0'], '--frames'),
        (['--frames', '-1', '5', '5'], '--frames'),
        (['--camera_spread', '200'], '--camera-spread'),
        (['--workers', '0'], '--workers'),
        (['--without', 'views', 'veiws'], 'veiws'),
        (['--seed', '-1'], '--seed'),
        (['--single', '1.2'], '--single is 1.2'),
        (['--empty', '-0.1'], '--empty is -0.1'),
        (['--empty', 'nan'], '--empty is nan'),
        (['--single', '0.7', '--empty', '0.4'], 'add up to more than 1'),
        (['MANO.SOURSE', 'files'], 'MANO.SOURCE'),
        (['MANO.SOURCE', 'files', 'MANO.PATH', 'nowhere'], 'nowhere'),
    ],
)
def test_bad_arguments_give_one_sentence_and_exit_code_2(arguments, word, tmp_path, capsys):
    assert main(['--save_path', str(tmp_path / 'raw'), *arguments]) == 2
    message = capsys.readouterr().err
    assert word in message and message.count('\n') == 1 and not any(tmp_path.iterdir())


def test_groups_are_read_before_configuration_keys():
    args = script.parse_arguments(['--save_path', 'x', '--without', 'views', 'persons', 'MANO.SOURCE', 'files'])
    assert args.without == ('persons', 'views') and args.opts == ['MANO.SOURCE', 'files']


def test_refuses_a_folder_that_holds_something(tmp_path, capsys):
    (tmp_path / 'mine.txt').write_text('precious')
    assert main(['--save_path', str(tmp_path), '--frames', '1', '0', '0']) == 2
    assert 'not empty' in capsys.readouterr().err and (tmp_path / 'mine.txt').read_text() == 'precious'


def test_rotations_of_the_annotation_turn_about_the_wrist(layer):
    """trans is where the wrist goes, less where the shaped rest hand has it."""
    path = sample_path(1, 'gesture', np.random.default_rng(1), load_hands('standin'), torch.full((2, 10), 0.5))
    fit = script.mano_annotation(path, 0, RIGHT, torch.full((2, 10), 0.5), TwoHandLayer(load_hands('standin')))
    wrist = flat_hands(layer, 0.5).joints[0, RIGHT, 0] + torch.tensor(fit['trans'], dtype=torch.float64)
    assert torch.allclose(wrist.float(), path.joints[0, RIGHT, 0], atol=1e-6)
    turn = axis_angle_to_matrix(torch.tensor(fit['pose'][:3]))
    assert torch.allclose(turn, axis_angle_to_matrix(path.root[0, RIGHT]), atol=1e-5)


# Clips


def test_a_clip_is_smooth_motion_seen_by_one_camera(tmp_path):
    settings = Settings((0, 0, 26), SEED, 60.0, 'standin', 'misc/mano', clip=12)
    sequences = plan(settings)
    assert [len(sequence.views) for sequence in sequences] == [12, 12, 2]
    assert {sequence.kind for sequence in sequences} == {'interacting'} and not any(s.black for s in sequences)
    record = make_sequence(settings, sequences[0], tmp_path)
    assert len({image['camera'] for image in record['images']}) == 1
    frames = [image['frame_idx'] for image in record['images']]
    assert frames == list(range(frames[0], frames[0] + 12))
    joints = np.array([each['world_coord'] for each in record['joint_3d'].values()])  # mm
    speed = np.linalg.norm(np.diff(joints, axis=0), axis=-1)
    change = np.linalg.norm(np.diff(joints, 2, axis=0), axis=-1)
    assert 1 < speed.mean() < 60 and change.mean() < 0.35 * speed.mean()
    again = make_sequence(settings, sequences[0], tmp_path / 'again')
    assert again == record


def test_data_sets_of_images_do_not_record_that_they_are_no_clips(tree):
    assert 'clip' not in json.loads((tree / 'synthesized.json').read_text())


def test_paths_of_any_rate_and_length_have_enough_key_poses():
    models, flat = load_hands('standin'), torch.zeros(2, 10)
    for seed in range(3):
        path = sample_path(11 + seed, 'gesture', np.random.default_rng(seed), models, flat, rate=30)
        assert path.vertices.isfinite().all() and len(path.vertices) == 11 + seed


def test_steadied_values_are_smooth_and_never_below():
    values = torch.zeros(60)
    values[20], values[40:43] = 0.01, 0.004
    smooth = steadied(values, 3)
    assert (smooth >= values - 1e-9).all() and smooth.diff().abs().max() < 0.01 / 3
    assert torch.allclose(steadied(torch.full((5,), 0.3), 3), torch.full((5,), 0.3))


def test_a_negative_length_of_clips_is_refused(tmp_path, capsys):
    assert main(['--save_path', str(tmp_path / 'x'), '--clip', '-1']) == 2
    assert '--clip is -1' in capsys.readouterr().err


# Single hands, and none


def images_by_kind(settings):
    counts = {}
    for sequence in plan(settings):
        counts[sequence.kind] = counts.get(sequence.kind, 0) + sum(sequence.views)
    return counts


@pytest.mark.parametrize('images', [1, 3, 8, 100, 1001])
@pytest.mark.parametrize('single, empty', [(0.3, 0.05), (0.5, 0.5), (1.0, 0.0), (0.0, 1.0), (0.0, 0.99)])
@pytest.mark.parametrize('clip', [0, 7])
def test_shares_of_single_hands_and_of_none(images, single, empty, clip):
    settings = SETTINGS._replace(frames=(images, 0, 0), single=single, empty=empty, clip=clip)
    counts = images_by_kind(settings)
    assert sum(counts.values()) == images and min(counts.values()) > 0
    assert counts.get('any single', 0) == round(single * images)
    assert abs(counts.get('empty', 0) - empty * images) < 1
    assert not (single and 'single' in counts)
    ids = [
        first for sequence in plan(settings) for first in (sequence.first_id, sequence.first_id + sum(sequence.views))
    ]
    assert ids == sorted(ids) and ids[-1] == images


def test_without_shares_the_plan_has_the_edge_cases_alone():
    assert images_by_kind(SETTINGS._replace(frames=(200, 0, 0))) == {'interacting': 192, 'single': 6, 'invalid': 2}


@pytest.fixture(scope='module')
def one_by_one(tmp_path_factory):
    """Settings and the records of sequences of one image: six with a single hand, two without hands."""
    root = tmp_path_factory.mktemp('few') / 'raw'
    settings = SETTINGS._replace(frames=(0, 0, 8), single=0.75, empty=0.25)
    kinds = ['any single'] * 6 + ['empty'] * 2
    sequences = [script.Sequence('test', n, n % 2, kind, 100 + 6 * n, n, (1,), ()) for n, kind in enumerate(kinds)]
    return root, settings, [make_sequence(settings, sequence, root) for sequence in sequences]


def test_single_hands_of_both_sides_are_seen_in_many_poses(one_by_one):
    _, _, records = one_by_one
    sides, placements = set(), set()
    for record in records[:6]:
        (annotation,), (joints,), (mano,) = record['annotations'], record['joint_3d'].values(), record['mano'].values()
        side = annotation['hand_type']
        sides.add(side)
        placements.add(record['images'][0]['seq_name'].removeprefix(f'{record["images"][0]["id"]:04d}_{side}_'))
        assert {name for name, hand in mano.items() if hand} == {side} and joints['hand_type'] == side
        valid = np.array(joints['joint_valid']).reshape(2, 21)
        assert valid[0].all() == (side == 'right') and valid[1].all() == (side == 'left') and valid.sum() == 21
        assert record['penetration_mm'] == []
    assert sides == set(SIDES) and len(placements) >= 3 and placements <= set(PLACEMENTS)


def test_images_without_hands_are_annotated_as_such(one_by_one):
    _, _, records = one_by_one
    for record in records[6:]:
        (annotation,), (joints,) = record['annotations'], record['joint_3d'].values()
        assert (annotation['hand_type'], annotation['hand_type_valid'], annotation['bbox']) == ('none', 1, [0.0] * 4)
        assert not np.any(annotation['joint_valid']) and np.all(np.array(joints['world_coord']) == 1.0)
        assert list(record['mano'].values()) == [{'right': None, 'left': None}]


def test_where_hands_are_absent_no_skin_is_rendered(one_by_one, monkeypatch):
    """The other arm hangs down below the image, and an image without hands is its backdrop."""
    _, settings, _ = one_by_one
    monkeypatch.setattr(script, 'draw_hands', lambda *a: pytest.fail('a hand was rendered'))
    for kind, hanging in (('any single', 1), ('empty', 2)):
        sequence = script.Sequence('test', 3, 3, kind, 100, 0, (1,), ())
        scene = script.set_scene(settings, sequence, np.random.default_rng(3))
        below = scene.elbows[0, :, 1] - script.HANDS_AT[1] > 0.4
        assert below.sum() == hanging and not below[list(scene.shown)].any()
    camera = capture_cameras(settings, 3)[0]
    backdrop = np.full((*camera.size, 3), 0.5, np.float32)
    image = script.photograph(scene, 0, camera, backdrop)
    assert np.array_equal(image, backdrop) and image is not backdrop


@pytest.mark.parametrize('hands, kept', [('all', 8), ('interacting', None)])
def test_preparation_keeps_or_skips_them(one_by_one, tmp_path, hands, kept, capsys):
    root, settings, records = one_by_one
    script.write_annotations(root, 'test', records, settings)
    words = ['--data_path', root, '--save_path', tmp_path, '--workers', '1', '--hands', hands, 'MANO.SOURCE', 'standin']
    done = interhand.main([str(word) for word in words])
    if kept is None:
        assert done == 2
        assert 'test: 0 of 8 frames kept 8 hands not interacting.' in capsys.readouterr().err
        return
    assert done == 0
    record = json.loads((tmp_path / 'test' / 'preparation.json').read_text())
    types = record['kept_by_hand_type']
    assert record['kept'] == kept and types['none'] == 2 and types['left'] + types['right'] == 6
    dataset = InterHandDataset(tmp_path, 'test')
    for index in range(kept):
        sample = dataset[index]
        assert sample.present.sum() == (index < 6) and sample.image.float().std() > 2


def test_shares_are_recorded_where_they_are_set(tmp_path):
    settings = SETTINGS._replace(frames=(2, 0, 0), empty=1.0)
    assert main([*map(str, ['--save_path', tmp_path / 'raw', '--frames', 2, 0, 0, '--seed', SEED, '--empty', 1])]) == 0
    record = json.loads((tmp_path / 'raw' / 'synthesized.json').read_text())
    assert record['empty'] == 1.0 and 'single' not in record and 'clip' not in record
    assert synthesize(tmp_path / 'raw', settings, workers=1) == []  # already complete
    with pytest.raises(script.UserError, match=r'single was not set, now 0\.5'):
        synthesize(tmp_path / 'raw', settings._replace(single=0.5, empty=0.5), workers=1)


def box_in_front(low: float, high: float, focal: float = 100.0) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (8, 3) m and faces (12, 3) of a box whose front, 1 m away, spans these pixels right and down."""
    corners = np.array([[x, y] for y in (low, high) for x in (low, high)]) / focal
    middle = corners.mean(0)
    front = np.concatenate([corners, np.ones((4, 1))], 1)
    back = np.concatenate([1.2 * middle + (corners - middle), np.full((4, 1), 1.2)], 1)  # hidden by the front
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = [triangle for a, b, c, d in quads for triangle in ((a, c, b), (a, d, c))]
    return np.concatenate([front, back]).astype(np.float32), np.array(faces)


@pytest.mark.parametrize('low', [40.2, 40.8])
def test_a_rendered_surface_covers_the_pixels_whose_centres_it_projects_to(low):
    """Pixel centres lie at integers."""
    vertices, faces = box_in_front(low, low + 20)
    intrinsics = np.array([[100.0, 0, 0], [0, 100, 0], [0, 0, 1]])
    light = Light(np.array([0.0, 0, -1]), np.ones(3), np.ones(3), 0.0)
    image = draw_hands(
        np.zeros((99, 99, 3), np.float32),
        torch.from_numpy(vertices),
        torch.from_numpy(faces),
        intrinsics,
        np.ones((len(faces), TEXELS**2, 3), np.float32),
        light,
    )
    covered = image.max(2) > 0.6 * image.max()  # the outline is blended
    assert set(covered.any(0).nonzero()[0]) == set(covered.any(1).nonzero()[0]) == set(range(41, 61))
    drawn = np.zeros((2, 778, 3), np.float32)
    drawn[0, :8] = vertices
    overlay = mesh_overlay(np.zeros((99, 99, 3), np.uint8), drawn, intrinsics, faces).any(2)
    halves = set(range(40, 61)) if low < 40.5 else set(range(41, 62))  # two samples across a pixel
    assert set(overlay.any(0).nonzero()[0]) == set(overlay.any(1).nonzero()[0]) == halves
