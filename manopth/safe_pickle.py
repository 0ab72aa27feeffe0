"""Load untrusted pickles safely: only NumPy arrays, plain containers and the classes on an allow-list are built.

Nothing of NumPy is called with arguments from the file: arrays are built here, from bytes that the file holds, since
NumPy's own functions would take memory or crash as the file tells them. Memory is bounded by the size of the file.
"""

import io
import math
import pickle
import pickletools
import re
from functools import lru_cache
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
        rows, columns = (int(n) for n in self.fields['_shape' if '_shape' in self.fields else 'shape'])
        starts, data = (np.asarray(self.fields[name]) for name in ('indptr', 'data'))
        if len(starts) != columns + 1 or rows * columns > _MOST_DENSE:
            raise ValueError(f'a sparse matrix of {rows} x {columns} with {len(starts)} column starts')
        dense = np.zeros((rows, columns), dtype=data.dtype)
        np.add.at(dense, (self.fields['indices'], np.repeat(np.arange(columns), np.diff(starts))), data)
        return dense


def as_array(value: Any) -> Any:
    """Convert a chumpy array or sparse matrix from ``load`` to a NumPy array; return other values unchanged."""
    return value.to_array() if isinstance(value, _Fields) else value


def numbers(value: Any, dtype: type) -> np.ndarray:
    """Convert an array from ``load``, chumpy or sparse too, or nested lists, to a plain array of ``dtype``.

    Raises one of ``NOT_NUMBERS`` for anything else, and for lists that hold each other so often that the array would be
    larger than any of a hand model.
    """
    array = as_array(value)
    if not isinstance(array, np.ndarray) and _length(array, {}) > _MOST_DENSE:
        raise ValueError('lists that hold each other')
    return np.asarray(array, dtype=dtype)


NOT_NUMBERS = (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError)


def _length(value: Any, known: dict[int, float]) -> float:
    """Elements of nested lists once they are laid out; infinite for a list that holds itself."""
    if not isinstance(value, (list, tuple)):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        known[id(value)] = sum(_length(entry, known) for entry in value)
    return known[id(value)]


class _ArrayType:
    """Stands for numpy.ndarray where a pickle names it as an argument; cannot be called."""

    __slots__ = ()


class _DType:
    """numpy.dtype of plain numbers or text. Its state is checked, because NumPy trusts it."""

    __slots__ = ('value',)

    def __init__(self, code: Any, *_: Any):
        self.value = _plain_dtype(code)

    def __setstate__(self, state: Any) -> None:
        _, order, *rest = state
        if order not in ('<', '>', '|', '=') or any(part is not None for part in rest[:3]):
            raise _RefusedError('it contains an array of a structured type')
        if order != '|':
            self.value = self.value.newbyteorder(order)


@lru_cache(maxsize=64)
def _plain_dtype(code: Any) -> np.dtype:
    if not isinstance(code, str) or not re.fullmatch(r'[<>|=]?([biufc]\d{1,2}|[SU]\d{1,4}|b|\?)', code):
        raise _RefusedError(f'it contains an array of type {str(code)[:20]!r}')
    return np.dtype(code)


class _Array(np.ndarray):
    """An array whose state is checked before NumPy reads it."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if isinstance(data, str):  # as Python 2 wrote it
            data = data.encode('latin1')
        if not isinstance(data, bytes) or not isinstance(dtype, _DType):
            raise _RefusedError('it contains an array that does not consist of plain numbers')
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.value.itemsize != len(data):
            raise ValueError(f'an array of shape {shape} does not have {len(data)} bytes')
        super().__setstate__((1, shape, dtype.value, bool(fortran), data))  # type: ignore[arg-type]  # stubs: numpy.bool


def _plain(value: Any, done: dict[int, tuple[Any, Any]]) -> Any:
    """The value with plain arrays in its containers; ``done`` holds what was converted, by identity."""
    if isinstance(value, _Array):
        return value.view(np.ndarray)
    if not isinstance(value, _CONTAINERS):
        return value
    if id(value) in done:
        return done[id(value)][1]
    if isinstance(value, tuple):
        converted = tuple([_plain(entry, done) for entry in value])
        done[id(value)] = value, converted
        return converted
    done[id(value)] = value, value
    if isinstance(value, list):
        value[:] = [_plain(entry, done) for entry in value]
    else:
        fields = value.fields if isinstance(value, _Fields) else value
        fields.update({key: _plain(entry, done) for key, entry in fields.items()})
    return value


_CONTAINERS = (dict, list, tuple, _Fields)


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(data, (bytes, bytearray)) or not isinstance(dtype, _DType) or order not in ('C', 'F'):
        raise _RefusedError('it contains an array that does not consist of plain numbers')
    return np.frombuffer(data, dtype.value).reshape(shape, order=order)


def _reconstruct(kind: Any, shape: Any, code: Any) -> np.ndarray:
    if not isinstance(kind, _ArrayType) or shape != (0,):
        raise _RefusedError('it contains an array that is not built the usual way')
    return _Array(0)


def _scalar(dtype: Any, data: Any) -> Any:
    return _from_buffer(data.encode('latin1') if isinstance(data, str) else data, dtype, (), 'C')[()]


def _no_bytes() -> bytes:
    """Protocols before 3 write b'' as a call of bytes."""
    return b''


def _copyreg_reconstructor(cls: Any, base: Any, state: Any) -> Any:
    if base is not object or state is not None or not (isinstance(cls, type) and issubclass(cls, _Fields)):
        raise _RefusedError('it contains an object with a base class other than object')
    return cls()


def _latin1(text: Any, encoding: Any) -> bytes:
    if encoding not in ('latin1', 'latin-1') or not isinstance(text, str):  # any other imports its codec
        raise _RefusedError(f'it contains text in the encoding {str(encoding)[:20]!r}')
    return text.encode('latin1')


_MOST_DENSE = 10**7  # numbers; the largest array of a hand model has 315,090
_NUMPY_CORE = {
    ('multiarray', '_reconstruct'): _reconstruct,
    ('multiarray', 'scalar'): _scalar,
    ('numeric', '_frombuffer'): _from_buffer,  # protocol 5
}
_ALLOWED: dict[tuple[str, str], Any] = {
    ('numpy', 'ndarray'): _ArrayType(),
    ('numpy', 'dtype'): _DType,
    ('_codecs', 'encode'): _latin1,
    ('__builtin__', 'bytes'): _no_bytes,
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
        for core in ('core', '_core')  # NumPy 2 renamed it
        for (module, name), function in _NUMPY_CORE.items()
    },
}


class _AllowListUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _RefusedError(f'it refers to {module}.{name}, which is not on the allow-list')
        return _ALLOWED[module, name]


# Bytes of each opcode with its argument; a negative kind where they are found in the file, or must be checked.
_LINE, _TWO_LINES, _PUT_LINE, _PUT, _STOP, _UNKNOWN = -100, -101, -102, -103, -104, -105
_SIZES = [_UNKNOWN] * 256
for _opcode in pickletools.opcodes:
    _argument = _opcode.arg.n if _opcode.arg else 0
    _SIZES[ord(_opcode.code)] = (
        _argument + 1 if _argument >= 0 else _LINE if _argument == pickletools.UP_TO_NEWLINE else _argument
    )
for _codes, _kind in ((b'ci', _TWO_LINES), (b'p', _PUT_LINE), (b'r', _PUT), (b'.', _STOP)):
    for _code in _codes:
        _SIZES[_code] = _kind
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


def _check_sizes(content: bytes) -> None:
    """Raise ValueError if a length or a place in the memo exceeds the file: the unpickler takes that memory at once."""
    position, end, sizes = 0, len(content), _SIZES
    while position < end:
        size = sizes[content[position]]
        if size > 0:
            position += size
        elif size in _LENGTH_BYTES:
            count = _LENGTH_BYTES[size]
            position += 1 + count + int.from_bytes(content[position + 1 : position + 1 + count], 'little')
        elif size == _PUT:
            if int.from_bytes(content[position + 1 : position + 5], 'little') > end:
                break
            position += 5
        elif size == _STOP:
            return
        elif size == _UNKNOWN:
            raise ValueError(f'byte {position} is not an opcode')
        else:
            for _ in range(2 if size == _TWO_LINES else 1):
                line, position = position + 1, content.find(b'\n', position + 1)
                if position < 0:
                    raise ValueError('a line without an end')
            if size == _PUT_LINE and int(content[line:position]) > end:
                break
            position += 1
    raise ValueError('it announces more than it holds')


def load(path: str | Path) -> Any:
    """Unpickle a file of plain containers and NumPy arrays; pass what may be chumpy or sparse to ``numbers``.

    Raises ManoError if the file is missing or damaged, or if it refers to anything that is not on the allow-list.
    """
    try:
        with open(path, 'rb') as file:
            content = file.read()
        _check_sizes(content)
        return _plain(_AllowListUnpickler(io.BytesIO(content), encoding='latin1').load(), {})
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
