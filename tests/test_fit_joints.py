"""apps/fit_joints.py: joints of other trackers -> MANO parameters."""

import io
import signal
import zipfile

import numpy as np
import pytest
import torch
from test_motion import smooth_hands

from apps import fit_joints
from dataset import joint_files
from dataset.joint_files import COINCIDE, NO_JOINTS, ORDERS, TOO_LARGE, read_joint_file
from inference.files import JOINT_COLUMNS
from manopth import ManoLayer
from utils.errors import UserError
from utils.hand import INTERHAND_TO_JOINTS, LEFT, MANO_TO_JOINTS, RIGHT, SIDES
from utils.stopping import STOP_SIGNALS


@pytest.fixture(scope='module')
def hands(standin):
    return smooth_hands(standin, 5)


@pytest.fixture
def joints(hands):
    """(5, 2, 21, 3) m."""
    return hands.joints.double().numpy().copy()


@pytest.fixture
def fit(tmp_path):
    """fit(file, *options) -> exit code, the arrays of the output (None without one)."""

    def run(path, *options):
        out = tmp_path / 'fitted' / 'mano.npz'
        words = [str(path), *map(str, options), '--out', str(out), 'MANO.SOURCE', 'standin', 'DEVICE', 'cpu']
        code = fit_joints.main(words)
        if not out.exists():
            return code, None
        with np.load(out, allow_pickle=False) as file:
            arrays = dict(file)
        assert list(out.parent.iterdir()) == [out]
        out.unlink()
        return code, arrays

    return run


def save(path, array, **options):
    np.save(path, array, **options)
    return path


def in_order(joints, order: str):
    """The file's joints: ORDERS lists the file's joint of each of ours."""
    out = np.empty_like(joints)
    out[..., list(ORDERS[order]), :] = joints
    return out


def test_fit_recovers_known_hands_and_the_parameters_pose_a_mano_layer(fit, joints, hands, standin, tmp_path, capsys):
    code, arrays = fit(save(tmp_path / 'a.npy', joints), '--order', 'ours', '--units', 'm')
    assert code == 0
    assert arrays['residual_mm'].shape == (5, 2, 21) and arrays['residual_mm'].mean() < 1
    assert (arrays['note'] == '').all() and arrays['frame'].tolist() == [0, 1, 2, 3, 4] and 'time_s' not in arrays
    assert len({betas.tobytes() for betas in arrays['betas'].reshape(-1, 10)}) == 1  # one person
    for hand, side in enumerate(SIDES):
        layer = ManoLayer(side=side, model=standin[hand], use_pca=False, flat_hand_mean=bool(arrays['flat_hand_mean']))
        pose = np.concatenate([arrays['global_orient'], arrays['hand_pose']], -1)[:, hand]
        vertices, posed = (
            values / 1000
            for values in layer(
                *(torch.from_numpy(x) for x in (pose, arrays['betas'][:, hand], arrays['transl'][:, hand]))
            )
        )
        posed, ours = posed.numpy(), np.delete(np.arange(21), 12 if side == 'left' else [])  # 445, not 444
        assert np.linalg.norm(posed - arrays['joints'][:, hand], axis=-1)[:, ours].max() < 1e-5
        assert np.linalg.norm(posed - joints[:, hand], axis=-1)[:, ours].mean() < 1e-3
        assert (vertices - hands.vertices[:, hand]).norm(dim=-1).mean() < 3e-3
    printed = capsys.readouterr().out
    assert '5 frames' in printed and 'left: 5 fitted; residual' in printed and 'written:' in printed


@pytest.mark.parametrize('order', ORDERS)
def test_orders_and_units_are_those_of_their_programs(joints, tmp_path, order):
    path = save(tmp_path / 'a.npy', in_order(joints, order) * 1000)
    track = read_joint_file(path, order=order, units='mm')
    assert np.abs(track.points - joints).max() < 1e-9
    assert track.frame.tolist() == list(range(5)) and track.time_s is None and track.valid.all()


def test_orders_against_their_definitions():
    assert list(ORDERS) == ['ours', 'openpose', 'mediapipe', 'mano', 'interhand']
    # InterHand2.6M: thumb tip first, wrist last. MANO: wrist, index, middle, little, ring, thumb, then the tips.
    assert [ORDERS['interhand'][joint] for joint in (0, 1, 4, 8, 20)] == [20, 3, 0, 4, 16]
    assert [ORDERS['mano'][joint] for joint in (0, 1, 4, 5, 8, 13, 17, 20)] == [0, 13, 16, 1, 17, 10, 7, 20]
    assert ORDERS['interhand'] == INTERHAND_TO_JOINTS and ORDERS['mano'] == MANO_TO_JOINTS


def test_shapes_of_one_and_two_hands_and_single_frames(joints, tmp_path):
    def read(array, order='ours', side=None):
        return read_joint_file(save(tmp_path / 'a.npy', array), order=order, units='m', side=side).points

    assert np.array_equal(read(joints[0]), joints[:1])
    assert np.array_equal(read(joints.reshape(5, 42, 3)), joints)
    assert np.array_equal(read(joints.reshape(5, 126)), joints)
    right_first = in_order(joints, 'interhand')[:, [RIGHT, LEFT]].reshape(5, 42, 3)
    assert np.array_equal(read(right_first, order='interhand'), joints)
    for hand, side in enumerate(SIDES):
        for one in (joints[:, hand], joints[:, hand].reshape(5, 63)):
            points = read(one, side=side)
            assert np.array_equal(points[:, hand], joints[:, hand]) and np.isnan(points[:, 1 - hand]).all()
    assert read(joints[0, RIGHT], side='right').shape == (1, 2, 21, 3)
    assert read(joints[:2, RIGHT], side='right').shape == (2, 2, 21, 3)  # two frames of one hand
    assert np.array_equal(read((joints * 1000).round().astype(np.int32) / 1000), (joints * 1000).round() / 1000)


def test_archives_and_the_demos_own_files_are_read(joints, fit, tmp_path, standin):
    np.savez(
        tmp_path / 'a.npz', joints=joints.astype(np.float32), frame=[3, 4, 5, 9, 11], time_s=np.arange(5) / 30, x=1
    )
    code, arrays = fit(tmp_path / 'a.npz', '--order', 'ours', '--units', 'm')
    assert code == 0 and arrays['frame'].tolist() == [3, 4, 5, 9, 11] and arrays['time_s'][1] == 1 / 30
    np.savez(tmp_path / 'again.npz', **arrays)
    again = read_joint_file(tmp_path / 'again.npz', order='ours', units='m')
    assert np.array_equal(again.points, arrays['joints'].astype(np.float64))
    np.savez(tmp_path / 'one.npz', points=joints)
    assert np.array_equal(read_joint_file(tmp_path / 'one.npz', order='ours', units='m').points, joints)

    lines = [','.join(['frame', 'time_s', *JOINT_COLUMNS])]
    lines += [','.join([str(k), f'{k / 25:.4f}', *(f'{x:.6f}' for x in joints[k].flat)]) for k in (0, 2)]
    (tmp_path / 'joints.csv').write_text('\n'.join(lines) + '\n')
    track = read_joint_file(tmp_path / 'joints.csv', order='ours', units='m')
    assert np.abs(track.points - joints[[0, 2]]).max() < 1e-6
    assert track.frame.tolist() == [0, 2] and track.time_s.tolist() == [0, 0.08]


@pytest.mark.parametrize('separator', ',;\t')
def test_tables_of_several_styles(joints, tmp_path, separator):
    rows = [[f'{x:.7f}' for x in frame.flat] for frame in joints[:, RIGHT]]
    rows[1][3:6] = ['', ' ', 'NaN']
    text = '﻿' + '\r\n'.join(separator.join(row) for row in rows) + '\r\n\r\n'
    (tmp_path / 'a.csv').write_bytes(text.encode())
    track = read_joint_file(tmp_path / 'a.csv', order='ours', units='m', side='right')
    assert (~track.valid[:, RIGHT]).nonzero() == (np.array([1]), np.array([1]))
    assert np.nanmax(np.abs(track.points[:, RIGHT] - joints[:, RIGHT])) < 1e-7


def test_missing_joints_are_left_out_of_the_fit(fit, joints, tmp_path, capsys):
    truth = joints.copy()
    joints[1, LEFT, [7, 8]] = np.nan
    joints[2, LEFT, 4] = np.inf
    joints[3, RIGHT, [12, 16]] = 0  # how OpenPose and others mark what they miss
    joints[4, RIGHT] = np.nan
    code, arrays = fit(save(tmp_path / 'a.npy', joints), '--order', 'mediapipe', '--units', 'm')
    assert code == 0 and arrays['note'].tolist() == [['', '']] * 4 + [['', NO_JOINTS]]
    missing = np.isnan(arrays['residual_mm'])
    assert missing[1, LEFT].nonzero()[0].tolist() == [7, 8] and missing[2, LEFT].nonzero()[0].tolist() == [4]
    assert missing[3, RIGHT].nonzero()[0].tolist() == [12, 16] and missing[4, RIGHT].all() and missing.sum() == 26
    assert np.isnan(arrays['hand_pose'][4, RIGHT]).all() and np.isfinite(arrays['hand_pose'][:4]).all()
    assert np.nanmean(arrays['residual_mm']) < 1
    assert (
        np.linalg.norm(arrays['joints'][:4] - truth[:4], axis=-1).max() < 0.06
    )  # m: a plausible hand also where they are missing
    assert 'right: 1 frames without joints' in capsys.readouterr().out


def test_hands_that_cannot_be_fitted_are_listed(fit, joints, tmp_path, capsys):
    joints[0, LEFT] = [0.1, 0.2, 0.3]
    joints[1, LEFT, 6:] = np.nan
    joints[2, LEFT, 3] = 1e200
    joints[2, RIGHT] *= 1e4
    joints[3, RIGHT] = 0
    code, arrays = fit(save(tmp_path / 'a.npy', joints), '--order', 'ours', '--units', 'm')
    assert code == 0
    few = fit_joints.TOO_FEW
    assert arrays['note'].tolist() == [[COINCIDE, ''], [few, ''], [TOO_LARGE] * 2, ['', NO_JOINTS], ['', '']]
    fitted = arrays['note'] == ''
    assert np.array_equal(np.isfinite(arrays['betas']).all(-1), fitted)
    assert arrays['residual_mm'][fitted].mean() < 1
    printed = capsys.readouterr().out
    assert f'left: 1 skipped, {COINCIDE}: frame 0' in printed and f'left: 1 skipped, {few}: frame 1' in printed
    assert f'right: 1 skipped, {TOO_LARGE}: frame 2' in printed


def test_one_hand_alone(fit, joints, tmp_path):
    path = save(tmp_path / 'a.npy', joints[:, LEFT] * 1000)
    code, arrays = fit(path, '--order', 'ours', '--units', 'mm', '--side', 'left')
    assert code == 0 and arrays['residual_mm'][:, LEFT].mean() < 1 and np.isnan(arrays['transl'][:, RIGHT]).all()


def test_a_wrong_order_or_side_is_a_warning(fit, joints, tmp_path, capsys):
    assert fit(save(tmp_path / 'a.npy', joints), '--order', 'mano', '--units', 'm')[0] == 0
    assert 'Warning: these are no good fits of a left hand. Check --order' in capsys.readouterr().out


def truncated(path, joints):
    path.write_bytes(save(path, joints).read_bytes()[:-100])


def huge(path, joints):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {'descr': '<f8', 'fortran_order': False, 'shape': (10**12, 21, 3)})
    path.write_bytes(header.getvalue())


def long_header(path, joints):
    """Announce 4 GB of header, in a file or in a member of an archive."""
    content = b'\x93NUMPY\2\0' + b'\xff' * 4 + bytes(100)
    if path.suffix == '.npy':
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr('joints.npy', content)


BAD = {
    'header.npy': (long_header, 'its header announces 4,294,967,295 bytes of itself'),
    'header.npz': (long_header, 'its header announces 4,294,967,295 bytes of itself'),
    'units.npy': (lambda path, joints: save(path, joints * 1000), r'a hand spans 1\d\d m. Are the joints in mm'),
    'objects.npy': (lambda path, joints: save(path, np.array([{}]), allow_pickle=True), 'Python objects'),
    'objects.npz': (lambda path, joints: np.savez(path, joints=np.array([{}])), 'more than plain arrays of numbers'),
    'truncated.npy': (truncated, 'does not hold the array'),
    'huge.npy': (huge, r'does not hold the array float64 \(1000000000000, 21, 3\)'),
    'text.npy': (lambda path, joints: path.write_text('1,2,3'), 'is damaged'),
    'text.npz': (lambda path, joints: path.write_text('1,2,3'), 'is damaged'),
    'many.npz': (lambda path, joints: np.savez(path, a=joints, b=joints), 'has no array joints, but a, b'),
    'frames.npz': (lambda path, joints: np.savez(path, joints=joints, frame=[1, 2]), r'frame has shape \(2,\)'),
    'halves.npz': (lambda path, joints: np.savez(path, joints=joints, frame=np.arange(5) / 2), 'whole numbers'),
    'words.npy': (lambda path, joints: save(path, np.array(['a'])), 'must be numbers'),
    'shape.npy': (lambda path, joints: save(path, joints[:, :, :20]), r'have shape \(5, 2, 20, 3\); it must be'),
    'scalar.npy': (lambda path, joints: save(path, np.float64(1)), r'have shape \(\); it must be'),
    'one.npy': (lambda path, joints: save(path, joints[:, 0]), 'holds one hand .*--side left or --side right'),
    'flat.npy': (lambda path, joints: save(path, joints[0, 0].reshape(63)), 'holds one hand'),
    'rows.csv': (lambda path, joints: np.savetxt(path, joints[:2, 0].reshape(2, 63), delimiter=','), 'holds one hand'),
    'three.npy': (lambda path, joints: save(path, np.repeat(joints, 2, 1)), 'have shape'),
    'none.npy': (lambda path, joints: save(path, joints[:0]), 'contains no frame'),
    'none.csv': (lambda path, joints: path.write_text('\n\n'), 'contains no frame'),
    'head.csv': (lambda path, joints: path.write_text(','.join('x' * 126) + '\n'), 'contains no frame'),
    'ragged.csv': (lambda path, joints: path.write_text('1,2\n1,2,3\n'), 'line 2 has 3 columns'),
    'narrow.csv': (lambda path, joints: path.write_text('1,2\n'), '2 columns of coordinates; it must have 63'),
    'word.csv': (lambda path, joints: path.write_text('1,2\n1,two\n'), "line 2: 'two' is not a number"),
    'latin.csv': (lambda path, joints: path.write_bytes(b'1,2\n\xff,1\n'), 'not a CSV file in UTF-8'),
    'null.csv': (lambda path, joints: path.write_bytes(b'1,2\n\0,1\n'), 'not a number|not a CSV'),
    'joints.mat': (lambda path, joints: path.write_text(''), r'must end in \.npy, \.npz or \.csv'),
    'equal.npy': (lambda path, joints: save(path, joints * 0 + 1), f'No hand in .* can be fitted .{COINCIDE}.'),
    'nan.npy': (lambda path, joints: save(path, joints * np.nan), f'No hand in .* can be fitted .{NO_JOINTS}.'),
    'missing.npy': (lambda path, joints: None, 'does not exist'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_files_are_one_sentence(fit, joints, tmp_path, capsys, name):
    write, message = BAD[name]
    write(tmp_path / name, joints)
    code, arrays = fit(tmp_path / name, '--order', 'ours', '--units', 'm')
    error = capsys.readouterr().err
    assert code == 2 and arrays is None and error.count('\n') == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)


def test_both_hands_with_a_side_and_an_output_over_the_input_are_refused(fit, joints, tmp_path, capsys):
    for both in (joints, joints.reshape(5, 126), joints[0].reshape(42, 3), joints[0].reshape(126)):
        path = save(tmp_path / 'a.npy', both)
        assert fit(path, '--order', 'ours', '--units', 'm', '--side', 'left') == (2, None)
        assert f'holds both hands (shape {both.shape}): leave out --side' in capsys.readouterr().err
    np.savez(tmp_path / 'b.npz', joints)
    for out, message in ((tmp_path / 'b.npz', 'would overwrite the joints'), (tmp_path / 'b.csv', 'must end in .npz')):
        words = [
            str(tmp_path / 'b.npz'),
            '--order',
            'ours',
            '--units',
            'm',
            '--out',
            str(out),
            'MANO.SOURCE',
            'standin',
        ]
        assert fit_joints.main(words) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize('joints', ['.', '/', 'tests'])
def test_a_folder_is_no_file_of_joints(capsys, joints):
    assert fit_joints.main([joints, '--order', 'ours', '--units', 'm', 'MANO.SOURCE', 'standin']) == 2
    assert f'error: {joints} is a folder' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--order', 'kinect', '--units', 'm'], 'kinect'),
        (['--order', 'ours', '--units', 'inch'], 'inch'),
        ([], 'required: --order, --units'),
    ],
)
def test_unknown_words_are_refused(fit, joints, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        fit(save(tmp_path / 'a.npy', joints), *words)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_an_archive_larger_than_the_limit_is_refused(joints, tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / 'a.npz', joints=np.zeros((5000, 2, 21, 3)))
    monkeypatch.setattr(joint_files, 'MOST_BYTES', 10**6)
    with pytest.raises(UserError, match='exceed 1,000,000 bytes'):
        read_joint_file(tmp_path / 'a.npz', order='ours', units='m')


@pytest.mark.parametrize('number', STOP_SIGNALS)
def test_a_stop_writes_nothing(fit, joints, tmp_path, monkeypatch, number):
    whole = fit_joints.fit_time_steps

    def stopped(*arguments, **options):
        signal.raise_signal(number)
        return whole(*arguments, **options)

    monkeypatch.setattr(fit_joints, 'fit_time_steps', stopped)
    path = save(tmp_path / 'a.npy', joints)
    assert fit(path, '--order', 'ours', '--units', 'm') == (128 + number, None)
    assert not any((tmp_path / 'fitted').glob('*'))
