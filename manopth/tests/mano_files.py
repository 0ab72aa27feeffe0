"""Write hand models in the format of the official MANO files: Python 2 pickles of chumpy arrays and a sparse matrix."""

import pickle
from pathlib import Path
from types import FunctionType
from typing import ClassVar

import numpy as np

from manopth import HandModel, HandPair
from manopth.tables import CHAIN_PARENTS


class Foreign:
    """An instance of a class that the reader does not have; ``pickled_as`` is the class name in the pickle."""

    pickled_as: tuple[str, str]

    def __init__(self, **state):
        self.__dict__.update(state)


class Ch(Foreign):
    pickled_as = ('chumpy.ch', 'Ch')


class Select(Foreign):
    pickled_as = ('chumpy.reordering', 'Select')


class OldSparse(Foreign):
    pickled_as = ('scipy.sparse.csc', 'csc_matrix')


class NewSparse(Foreign):
    pickled_as = ('scipy.sparse._csc', 'csc_matrix')


def sparse(dense: np.ndarray, kind: type[Foreign] = OldSparse) -> Foreign:
    """A compressed sparse column matrix as scipy pickles it."""
    columns, rows = np.nonzero(dense.T)
    starts = np.searchsorted(columns, np.arange(dense.shape[1] + 1))
    return kind(
        _shape=dense.shape,
        maxprint=50,
        data=dense[rows, columns],
        indices=rows.astype(np.int32),
        indptr=starts.astype(np.int32),
    )


class Python2Pickler(pickle._Pickler):
    """Writes Python 2 module names and byte strings, and foreign classes under their original names."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_global(self, obj, name=None):
        module, name = getattr(obj, 'pickled_as', None) or (obj.__module__, name or obj.__qualname__)
        module = {'copyreg': 'copy_reg', 'builtins': '__builtin__'}.get(module, module)
        self.write(f'c{module.replace("numpy._core", "numpy.core")}\n{name}\n'.encode())
        self.memoize(obj)

    def save_text(self, obj):
        data = obj if isinstance(obj, bytes) else obj.encode('latin1')
        self.write(b'T' + len(data).to_bytes(4, 'little') + data)

    dispatch[FunctionType] = save_global
    dispatch[bytes] = dispatch[str] = save_text


def official_content(model: HandModel, *, sparse_kind: type[Foreign] = OldSparse) -> dict:
    """The content of an official file for ``model``; as there, the shape directions are a slice of a larger array."""
    directions = np.concatenate([model.shape_dirs, np.ones((*model.shape_dirs.shape[:2], 2))], -1)
    chosen = np.arange(directions.size).reshape(directions.shape)[..., :10]
    return {
        'v_template': Ch(x=model.template),
        'f': model.faces.astype(np.uint32),
        'shapedirs': Select(a=Ch(x=directions), idxs=chosen.ravel(), preferred_shape=chosen.shape),
        'posedirs': Ch(x=model.pose_dirs, is_valid=True),
        'J_regressor': sparse(model.joint_regressor, sparse_kind),
        'weights': model.skinning_weights,
        'hands_mean': model.pose_mean,
        'hands_components': model.pose_components,
        'J': model.joint_regressor @ model.template,
        'bs_type': 'lrotmin',
        'bs_style': 'lbs',
        'kintree_table': np.array([CHAIN_PARENTS, range(16)]).astype(np.uint32),
        'hands_coeffs': np.zeros((4, 45)),
    }


def write_pickle(path: Path, content, *, protocol: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'wb') as file:
        Python2Pickler(file, protocol).dump(content)
    return path


def write_mano_files(folder: Path, models: HandPair) -> Path:
    """Write ``folder``/MANO_{LEFT,RIGHT}.pkl; the left file has the known defect: the right hand's shape directions."""
    left, right = models
    defect = {'shapedirs': official_content(right)['shapedirs']}
    write_pickle(folder / 'MANO_LEFT.pkl', official_content(left) | defect)
    write_pickle(folder / 'MANO_RIGHT.pkl', official_content(right))
    return folder
