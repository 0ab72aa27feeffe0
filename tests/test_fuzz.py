"""The fuzz targets without the fuzzer: their seeds, what it once found, and variations of both."""

import codecs
import pickle

import numpy as np
import pytest

from manopth import ManoError, safe_pickle
from tests.fuzz import readers
from tests.fuzz.run import NAMES, instrumented

VARIATIONS = {'packed': 40, 'raw': 60}  # the slower ones


def test_every_reader_has_a_target():
    assert tuple(sorted(readers.READERS)) == NAMES
    assert all(instrumented(name) == list(readers.READERS[name].instrumented) for name in NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_readers_accept_or_refuse_with_a_message(name):
    reader = readers.READERS[name]
    seeds = [*reader.seeds(), *readers.found(name)]
    accepted = [readers.run(reader, content) for content in seeds]
    assert not all(accepted)
    assert any(accepted) or name == 'mano'  # a whole hand model is too large for a seed: manopth/tests/test_assets.py
    for content in readers.mutations(seeds, VARIATIONS.get(name, 150)):
        readers.run(reader, content)


@pytest.mark.parametrize('content', readers.hostile_pickles())
def test_hostile_pickles_are_refused_before_they_take_memory(tmp_path, content):
    (tmp_path / 'a.pkl').write_bytes(content)
    with readers.forbidden_actions() as actions, pytest.raises(ManoError, match='refused|damaged'):
        safe_pickle.load(tmp_path / 'a.pkl')
    assert not actions


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def lists_that_hold_each_other(levels: int = 12) -> list:
    value: list = [0.0] * 10
    for _ in range(levels):
        value = [value] * 10
    return value


@pytest.mark.parametrize(
    'value',
    [
        np.array([None, 'x'], dtype=object),
        np.zeros(2, [('a', 'f4'), ('b', 'i4')]),
        np.zeros(2, 'M8[s]'),
        Call(np.empty(0).__reduce__()[0], np.ndarray, (1 << 40,), b'b'),
        Call(np.dtype, 'O'),
        Call(np.dtype, 'V1000000000'),
        Call(codecs.encode, 'x', 'idna'),  # imports a module
    ],
)
def test_arrays_of_anything_but_numbers_and_text_are_refused(tmp_path, value):
    (tmp_path / 'a.pkl').write_bytes(pickle.dumps(value, 2))
    with pytest.raises(ManoError, match='refused'):
        safe_pickle.load(tmp_path / 'a.pkl')


@pytest.mark.parametrize('value', [lists_that_hold_each_other(), 10**400, [[1.0], 2.0], {'a': 1}, 'text'])
def test_what_is_no_array_of_numbers_is_refused_before_it_unfolds(value):
    with pytest.raises(safe_pickle.NOT_NUMBERS):
        safe_pickle.numbers(value, np.float64)


@pytest.mark.parametrize('order', ['<', '>'])
@pytest.mark.parametrize('protocol', [0, 2, 4, 5])
def test_arrays_of_either_byte_order_and_text(tmp_path, order, protocol):
    arrays = [np.arange(6, dtype=f'{order}{kind}').reshape(2, 3) for kind in ('f4', 'f8', 'i2', 'u4', 'c8')]
    arrays += [np.array(['a', 'bc'], f'{order}U2'), np.array([b'a']), np.asfortranarray(arrays[0]), np.float32(2.5)]
    arrays += [np.zeros((0, 3)), np.array(1.5)]
    (tmp_path / 'a.pkl').write_bytes(pickle.dumps({'arrays': (arrays, arrays[0])}, protocol))
    read, first = safe_pickle.load(tmp_path / 'a.pkl')['arrays']
    for array, loaded in zip([*arrays, arrays[0]], [*read, first], strict=True):
        assert type(loaded) is type(array) and np.array_equal(loaded, array)
        assert loaded.dtype.newbyteorder('=') == array.dtype.newbyteorder('=')
