"""Pickles from outside are untrusted: an unpickler that builds nothing but the classes on its list."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from manopth.errors import ManoError


class _RefusedError(Exception):
    """The file wants more than this module does."""


class _Fields:
    """Holds whatever state a foreign object was pickled with; never runs foreign code."""

    def __init__(self, *args):
        self.fields: dict[str, Any] = {}

    def __setstate__(self, state):
        self.fields = dict(state) if isinstance(state, dict) else {'state': state}


class ChumpyArray(_Fields):
    """chumpy.ch.Ch: the array is the field ``x``."""

    def to_array(self) -> np.ndarray:
        return np.asarray(as_array(self.fields['x']))


class ChumpySelect(_Fields):
    """chumpy.reordering.Select: entries ``idxs`` of the flattened ``a``, reshaped to ``preferred_shape``."""

    def to_array(self) -> np.ndarray:
        flat = as_array(self.fields['a']).ravel()[np.asarray(as_array(self.fields['idxs']), dtype=np.int64)]
        shape = self.fields.get('preferred_shape')
        return flat if shape is None else flat.reshape(tuple(shape))


class SparseColumns(_Fields):
    """scipy.sparse.csc_matrix, from its own three arrays: no need for scipy."""

    def to_array(self) -> np.ndarray:
        shape = tuple(int(n) for n in self.fields.get('_shape', self.fields.get('shape')))
        columns = np.repeat(np.arange(shape[1]), np.diff(self.fields['indptr']))
        dense = np.zeros(shape, dtype=np.asarray(self.fields['data']).dtype)
        np.add.at(dense, (self.fields['indices'], columns), self.fields['data'])
        return dense


def as_array(value: Any) -> Any:
    """The array behind a stand-in for a foreign class; anything else as it is."""
    return value.to_array() if isinstance(value, _Fields) else value


def _copyreg_reconstructor(cls, base, state):
    if base is not object or state is not None:
        raise _RefusedError('it holds an object with a base class of its own')
    return cls()


def _latin1(text: str, encoding: str) -> bytes:
    return text.encode(encoding)


# What NumPy names in its pickles, by asking it: the module that holds them was renamed between NumPy 1 and 2.
_NUMPY_CORE = {
    ('multiarray', '_reconstruct'): np.empty(0).__reduce__()[0],
    ('multiarray', 'scalar'): np.float64(0).__reduce__()[0],
    ('numeric', '_frombuffer'): np.empty(0).__reduce_ex__(5)[0],  # protocol 5
}
_ALLOWED: dict[tuple[str, str], Any] = {
    ('numpy', 'ndarray'): np.ndarray,
    ('numpy', 'dtype'): np.dtype,
    ('_codecs', 'encode'): _latin1,
    ('copy_reg', '_reconstructor'): _copyreg_reconstructor,
    ('copyreg', '_reconstructor'): _copyreg_reconstructor,
    ('__builtin__', 'object'): object,
    ('builtins', 'object'): object,
    ('chumpy.ch', 'Ch'): ChumpyArray,
    ('chumpy.reordering', 'Select'): ChumpySelect,
    ('scipy.sparse.csc', 'csc_matrix'): SparseColumns,
    ('scipy.sparse._csc', 'csc_matrix'): SparseColumns,
    **{
        (f'numpy.{core}.{module}', name): function
        for core in ('core', '_core')
        for (module, name), function in _NUMPY_CORE.items()
    },
}


class _AllowListUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _RefusedError(f'it wants to run {module}.{name}, which is not on the allow-list')
        return _ALLOWED[module, name]


def load(path: str | Path) -> Any:
    """Unpickle a file of plain containers and NumPy arrays (chumpy arrays and sparse matrices: see ``as_array``).

    Raises ManoError for a missing or damaged file and, by name, for anything that is not on the allow-list.
    """
    try:
        with open(path, 'rb') as file:
            return _AllowListUnpickler(file, encoding='latin1').load()
    except FileNotFoundError:
        raise ManoError(f'{path} does not exist.') from None
    except _RefusedError as error:
        raise ManoError(f'{path} was refused: {error}. Get the file again from its official source.') from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise ManoError(
            f'{path} cannot be read ({type(error).__name__}: {error}): it is cut short or damaged, get it again.'
        ) from None
