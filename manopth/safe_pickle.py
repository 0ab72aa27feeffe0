"""Load untrusted pickles safely: only NumPy arrays, plain containers and the classes on an allow-list are built."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from manopth.errors import ManoError


class _RefusedError(Exception):
    """The file needs something that is not allowed."""


class _Fields:
    """Placeholder for a foreign class: stores the pickled state and never runs foreign code."""

    def __init__(self, *_: Any):
        self.fields: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.fields = dict(state) if isinstance(state, dict) else {'state': state}

    def to_array(self) -> np.ndarray:
        raise NotImplementedError


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
    """scipy.sparse.csc_matrix, rebuilt from its three arrays without scipy."""

    def to_array(self) -> np.ndarray:
        shape = tuple(int(n) for n in self.fields['_shape' if '_shape' in self.fields else 'shape'])
        columns = np.repeat(np.arange(shape[1]), np.diff(self.fields['indptr']))
        dense = np.zeros(shape, dtype=np.asarray(self.fields['data']).dtype)
        np.add.at(dense, (self.fields['indices'], columns), self.fields['data'])
        return dense


def as_array(value: Any) -> Any:
    """Convert a chumpy array or sparse matrix from ``load`` to a NumPy array; return other values unchanged."""
    return value.to_array() if isinstance(value, _Fields) else value


def _copyreg_reconstructor(cls: type, base: type, state: Any) -> Any:
    if base is not object or state is not None:
        raise _RefusedError('it contains an object with a base class other than object')
    return cls()


def _latin1(text: str, encoding: str) -> bytes:
    return text.encode(encoding)


# The functions that NumPy names in its pickles, obtained from NumPy because NumPy 2 renamed their module.
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
            raise _RefusedError(f'it refers to {module}.{name}, which is not on the allow-list')
        return _ALLOWED[module, name]


def load(path: str | Path) -> Any:
    """Unpickle a file of plain containers and NumPy arrays; pass chumpy and sparse arrays in it to ``as_array``.

    Raises ManoError if the file is missing or damaged, or if it refers to anything that is not on the allow-list.
    """
    try:
        with open(path, 'rb') as file:
            return _AllowListUnpickler(file, encoding='latin1').load()
    except FileNotFoundError:
        raise ManoError(f'{path} does not exist.') from None
    except _RefusedError as error:
        raise ManoError(f'{path} was refused: {error}. Download it again from its official source.') from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise almost anything
        raise ManoError(
            f'{path} cannot be read ({type(error).__name__}: {error}): the file is truncated or damaged. '
            'Download it again.'
        ) from None
