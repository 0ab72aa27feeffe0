import dataclasses
import pickle
import sys

import numpy as np
import pytest
from mano_files import Ch, NewSparse, OldSparse, Select, official_content, sparse, write_mano_files, write_pickle

from manopth import ManoError, safe_pickle
from manopth.assets import HandModel, correct_left_shape_dirs, load_hand_pair, load_mano_pkl

MIRROR_X = np.array([-1.0, 1.0, 1.0])[:, None]


def assert_same_arrays(model: HandModel, other: HandModel):
    for name in HandModel.SHAPES:
        np.testing.assert_array_equal(getattr(model, name), getattr(other, name), err_msg=name)


@pytest.mark.parametrize('protocol', [0, 1, 2])
@pytest.mark.parametrize('sparse_kind', [OldSparse, NewSparse])
def test_official_format_round_trip(standin, tmp_path, protocol, sparse_kind):
    for model in standin:
        path = write_pickle(tmp_path / 'hand.pkl', official_content(model, sparse_kind=sparse_kind), protocol=protocol)
        assert (b'copy_reg' in path.read_bytes()) == (protocol < 2)  # Python 2 wrote objects in two ways
        loaded = load_mano_pkl(path, side=model.side)
        assert (loaded.side, loaded.name) == (model.side, 'mano')
        assert_same_arrays(loaded, model)
        assert loaded.faces.dtype == np.int64 and loaded.template.dtype == np.float64


def test_official_format_needs_neither_chumpy_nor_scipy(standin, tmp_path, monkeypatch):
    path = write_pickle(tmp_path / 'hand.pkl', official_content(standin[1]))
    for module in ('chumpy', 'chumpy.ch', 'chumpy.reordering', 'scipy', 'scipy.sparse'):
        monkeypatch.setitem(sys.modules, module, None)  # its import then raises
    assert_same_arrays(load_mano_pkl(path, side='right'), standin[1])


def test_left_shape_directions_are_corrected_once(standin, tmp_path):
    left, right = load_hand_pair(write_mano_files(tmp_path, standin))
    assert_same_arrays(left, standin[0])
    assert_same_arrays(right, standin[1])
    stored = load_mano_pkl(tmp_path / 'MANO_LEFT.pkl', side='left')
    np.testing.assert_array_equal(stored.shape_dirs, right.shape_dirs)
    assert correct_left_shape_dirs(left, right) is left
    np.testing.assert_array_equal(correct_left_shape_dirs(stored, right).shape_dirs, stored.shape_dirs * MIRROR_X)


def test_correct_files_are_left_unchanged(standin, tmp_path):
    for model in standin:
        write_pickle(tmp_path / f'MANO_{model.side.upper()}.pkl', official_content(model))
    for loaded, model in zip(load_hand_pair(tmp_path), standin):
        assert_same_arrays(loaded, model)


def test_digest_identifies_the_hand(standin, tmp_path):
    left, right = load_hand_pair(write_mano_files(tmp_path, standin))
    assert (left.digest, right.digest) == (standin[0].digest, standin[1].digest)
    assert standin.identity == f'{standin[0].name}:{left.digest}:{right.digest}'
    seen = {left.digest, right.digest}
    for name in HandModel.SHAPES:
        array = getattr(right, name).copy()
        array.flat[5] += 1
        seen.add(dataclasses.replace(right, **{name: array}).digest)
    assert len(seen) == 2 + len(HandModel.SHAPES)
    rounded = dataclasses.replace(right, template=right.template.astype(np.float32).astype(np.float64))
    assert rounded.digest == right.digest


def test_missing_file_tells_where_to_get_it(tmp_path):
    with pytest.raises(ManoError, match=r'MANO_LEFT\.pkl is missing\. Register at https://mano\.is\.tue\.mpg\.de'):
        load_hand_pair(tmp_path)


def test_swapped_files(standin, tmp_path):
    write_mano_files(tmp_path, standin)
    (tmp_path / 'MANO_LEFT.pkl').rename(tmp_path / 'other')
    (tmp_path / 'MANO_RIGHT.pkl').rename(tmp_path / 'MANO_LEFT.pkl')
    (tmp_path / 'other').rename(tmp_path / 'MANO_RIGHT.pkl')
    for side, found in (('left', 'right'), ('right', 'left')):
        with pytest.raises(ManoError, match=rf'MANO_{side.upper()}\.pkl is a {found} hand: .* swapped'):
            load_mano_pkl(tmp_path / f'MANO_{side.upper()}.pkl', side=side)


def nan_in(array):
    array = array.copy()
    array.flat[-1] = np.nan
    return array


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda m: {'v_template': np.zeros((6890, 3))}, r'v_template has shape \(6890, 3\), MANO has \(778, 3\)'),
        (lambda m: {'posedirs': m.pose_dirs[..., :10]}, r'posedirs has shape'),
        (lambda m: {'J_regressor': sparse(m.joint_regressor.T)}, r'J_regressor has shape \(778, 16\)'),
        (lambda m: {'v_template': Ch(x=nan_in(m.template))}, 'v_template contains NaN or infinity'),
        (lambda m: {'hands_components': nan_in(m.pose_components)}, 'hands_components contains NaN or infinity'),
        (lambda m: {'f': m.faces + 1}, r'f refers to vertices outside 0 \.\. 777'),
        (lambda m: {'posedirs': Ch(y=1)}, 'posedirs is not a numeric array'),
        (lambda m: {'shapedirs': Select(a=Ch(x=np.zeros(3)), idxs=np.array([7]))}, 'shapedirs is not a numeric array'),
        (lambda m: {'J_regressor': OldSparse(data=np.ones(2))}, 'J_regressor is not a numeric array'),
        (lambda m: {'weights': 'many'}, 'weights is not a numeric array'),
        (lambda m: {'hands_mean': None}, 'hands_mean'),
    ],
)
def test_invalid_content_is_reported_by_key(standin, tmp_path, change, message):
    path = write_pickle(tmp_path / 'MANO_RIGHT.pkl', official_content(standin[1]) | change(standin[1]))
    with pytest.raises(ManoError, match=rf'MANO_RIGHT\.pkl.*{message}'):
        load_mano_pkl(path, side='right')


@pytest.mark.parametrize(
    'content, message',
    [([1, 2], 'is not a MANO file: J_regressor, f,'), ({'f': 1}, 'is not a MANO file: J_regressor, hands_components,')],
)
def test_not_a_mano_file(tmp_path, content, message):
    path = write_pickle(tmp_path / 'MANO_RIGHT.pkl', content)
    with pytest.raises(ManoError, match=rf'MANO_RIGHT\.pkl {message}'):
        load_mano_pkl(path, side='right')


@pytest.mark.parametrize('share', [0, 0.001, 0.5, 0.999999])
def test_truncated_file(standin, tmp_path, share):
    path = write_pickle(tmp_path / 'MANO_RIGHT.pkl', official_content(standin[1]))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ManoError, match=r'MANO_RIGHT\.pkl'):
        load_mano_pkl(path, side='right')


@pytest.mark.parametrize('content', [b'<html>not found</html>', b'\x00' * 100, b'(dp0\n.' * 3, b'\x80\x63junk'])
def test_file_that_is_not_a_pickle(tmp_path, content):
    path = tmp_path / 'MANO_LEFT.pkl'
    path.write_bytes(content)
    with pytest.raises(ManoError, match=r'MANO_LEFT\.pkl'):
        load_mano_pkl(path, side='left')


@pytest.mark.parametrize(
    'named',
    [
        'os.system',
        'posix.system',
        'builtins.eval',
        'numpy.load',
        'builtins.getattr',
        'chumpy.ch.Other',
        'numpy.core.multiarray.fromfile',
        'builtins.exec',
    ],
)
def test_foreign_code_is_refused_by_name_and_never_run(tmp_path, named):
    module, _, function = named.rpartition('.')
    marker = tmp_path / 'ran'
    path = tmp_path / 'MANO_LEFT.pkl'
    path.write_bytes(f"(S'f'\nc{module}\n{function}\n(S'touch {marker}'\ntRd.".encode())
    with pytest.raises(ManoError, match=rf'MANO_LEFT\.pkl was refused: it refers to {named}, .* allow-list'):
        load_mano_pkl(path, side='left')
    assert not marker.exists()


def test_plain_pickle_would_run_foreign_code(tmp_path):
    """The attack of the test above works on a plain unpickler."""
    attack = f"cos\nsystem\n(S'touch {tmp_path}/ran'\ntR."
    pickle.loads(attack.encode())
    assert (tmp_path / 'ran').exists()


def test_reconstructor_builds_plain_objects_only(tmp_path):
    path = tmp_path / 'file.pkl'
    path.write_bytes(b'ccopy_reg\n_reconstructor\n(cchumpy.ch\nCh\ncnumpy\nndarray\nNtR.')
    with pytest.raises(ManoError, match='a base class other than object'):
        safe_pickle.load(path)


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_python_3_pickles_of_plain_content_round_trip(tmp_path, protocol):
    content = {
        'text': 'é',
        'numbers': [1, 2.5, True, None, -(2**70)],
        'pair': (b'\x00\xff', ()),
        'scalar': np.float64(0.1),
        'float32': np.float32(0.1),
        'C': np.arange(6.0).reshape(2, 3),
        'Fortran': np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        'slice': np.arange(10, dtype=np.uint8)[::3],
        'bool': np.array([True]),
    }
    (tmp_path / 'file.pkl').write_bytes(pickle.dumps(content, protocol))
    loaded = safe_pickle.load(tmp_path / 'file.pkl')
    assert loaded.keys() == content.keys()
    for key, value in content.items():
        assert type(loaded[key]) is type(value)
        np.testing.assert_equal(loaded[key], value)


def test_missing_pickle_is_reported(tmp_path):
    with pytest.raises(ManoError, match=r'none\.pkl does not exist'):
        safe_pickle.load(tmp_path / 'none.pkl')


def test_sparse_matrix_sums_duplicate_entries(tmp_path):
    content = OldSparse(
        _shape=(2, 3), data=np.array([1.0, 2.0, 4.0]), indices=np.array([0, 0, 1]), indptr=np.array([0, 2, 2, 3])
    )
    loaded = safe_pickle.as_array(safe_pickle.load(write_pickle(tmp_path / 'file.pkl', content)))
    np.testing.assert_array_equal(loaded, [[3, 0, 0], [0, 0, 4]])
