"""Hand models as arrays, and the reader of the official MANO files.

The official pickles contain chumpy arrays and a sparse matrix; they are read without chumpy and without running foreign
code. The official left file has a known defect, shape directions that are not mirrored, which ``load_hand_pair`` fixes.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from manopth import safe_pickle
from manopth.errors import ManoError
from manopth.tables import NUM_CHAIN_JOINTS, NUM_FACES, NUM_VERTICES, SIDES

WHERE_TO_GET = 'Register at https://mano.is.tue.mpg.de, download "Models & Code" and put its two .pkl files there'


@dataclass(frozen=True)
class HandModel:
    """The constant arrays of one hand, float64 and metres; V = 778 vertices, 16 chain joints.

    template (V, 3) rest mesh; faces (1538, 3) int64, outward normals; shape_dirs (V, 3, 10) m per unit of beta;
    pose_dirs (V, 3, 135) m per entry of R_j - I, joints 1..15 row-major; joint_regressor (16, V) from the shaped rest
    mesh; skinning_weights (V, 16); pose_mean (45,) axis-angle; pose_components (45, 45), one component per row.
    """

    side: str
    template: np.ndarray
    faces: np.ndarray
    shape_dirs: np.ndarray
    pose_dirs: np.ndarray
    joint_regressor: np.ndarray
    skinning_weights: np.ndarray
    pose_mean: np.ndarray
    pose_components: np.ndarray
    name: str

    SHAPES: ClassVar[dict[str, tuple[int, ...]]] = {
        'template': (NUM_VERTICES, 3),
        'faces': (NUM_FACES, 3),
        'shape_dirs': (NUM_VERTICES, 3, 10),
        'pose_dirs': (NUM_VERTICES, 3, 135),
        'joint_regressor': (NUM_CHAIN_JOINTS, NUM_VERTICES),
        'skinning_weights': (NUM_VERTICES, NUM_CHAIN_JOINTS),
        'pose_mean': (45,),
        'pose_components': (45, 45),
    }

    @cached_property
    def digest(self) -> str:
        """Hash of all arrays in float32, 12 hex digits: identifies the hand that a checkpoint was trained on."""
        sha = hashlib.sha256()
        for name in sorted(self.SHAPES):
            array = getattr(self, name)
            sha.update(np.ascontiguousarray(array, dtype='<i8' if array.dtype.kind in 'iu' else '<f4').tobytes())
        return sha.hexdigest()[:12]


def load_mano_pkl(path: str | Path, *, side: str) -> HandModel:
    """Read one official ``MANO_{LEFT,RIGHT}.pkl``; arrays are returned as stored, the left hand's defect included.

    Raises ManoError if the file is missing, damaged, contains foreign code, or is not a hand of this side.
    """
    path = Path(path)
    if not path.is_file():
        raise ManoError(f'{path} is missing. {WHERE_TO_GET}.')
    raw = safe_pickle.load(path)
    names = {
        'template': 'v_template',
        'faces': 'f',
        'shape_dirs': 'shapedirs',
        'pose_dirs': 'posedirs',
        'joint_regressor': 'J_regressor',
        'skinning_weights': 'weights',
        'pose_mean': 'hands_mean',
        'pose_components': 'hands_components',
    }
    if not isinstance(raw, dict) or not set(names.values()) <= raw.keys():
        missing = sorted(set(names.values()) - set(raw)) if isinstance(raw, dict) else sorted(names.values())
        raise ManoError(
            f'{path} is not a MANO file: {", ".join(missing)} missing. Download it again from its official source.'
        )
    arrays = {}
    for name, key in names.items():
        try:
            array = safe_pickle.numbers(raw[key], np.float64)
        except safe_pickle.NOT_NUMBERS as error:
            raise ManoError(
                f'{path}: {key} is not a numeric array ({type(error).__name__}: {error}). The file is damaged; '
                'download it again.'
            ) from None
        if array.shape != HandModel.SHAPES[name]:
            raise ManoError(
                f'{path}: {key} has shape {array.shape}, MANO has {HandModel.SHAPES[name]}. '
                'This file belongs to another model.'
            )
        if not np.isfinite(array).all():
            raise ManoError(f'{path}: {key} contains NaN or infinity. The file is damaged; download it again.')
        if name == 'faces' and not ((array >= 0) & (array < NUM_VERTICES)).all():
            raise ManoError(
                f'{path}: {key} refers to vertices outside 0 .. {NUM_VERTICES - 1}. The file is damaged; '
                'download it again.'
            )
        arrays[name] = array.astype(np.int64) if name == 'faces' else array
    model = HandModel(side=side, name='mano', **arrays)
    # At rest the fingers point along x, away from the wrist: towards -x on the right hand, +x on the left.
    wrist_to_mesh = model.template[:, 0].mean() - (model.joint_regressor[0] @ model.template)[0]
    if (wrist_to_mesh > 0) != (side == 'left'):
        raise ManoError(
            f'{path} is a {SIDES[side == "left"]} hand: MANO_LEFT.pkl and MANO_RIGHT.pkl are swapped. Rename them.'
        )
    return model


def correct_left_shape_dirs(left: HandModel, right: HandModel) -> HandModel:
    """Mirror the left hand's ``shape_dirs`` if they still equal the right hand's (sum of |difference| in x below 1)."""
    if np.abs(left.shape_dirs[:, 0] - right.shape_dirs[:, 0]).sum() >= 1:
        return left
    corrected = left.shape_dirs * np.array([-1.0, 1.0, 1.0])[:, None]
    return replace(left, shape_dirs=corrected)


class HandPair(NamedTuple):
    """The hand models of both hands."""

    left: HandModel
    right: HandModel

    @property
    def identity(self) -> str:
        """'name:left digest:right digest', as recorded in checkpoints and data sets."""
        return f'{self.left.name}:{self.left.digest}:{self.right.digest}'

    @property
    def faces(self) -> np.ndarray:
        """(2, 1538, 3) int64 faces of each hand."""
        return np.stack([self.left.faces, self.right.faces])

    @property
    def mesh_faces(self) -> np.ndarray:
        """(3076, 3) int64 faces of both hands as one mesh: vertices 0-777 are the left hand, 778-1555 the right."""
        return np.concatenate([self.left.faces, self.right.faces + NUM_VERTICES])


@lru_cache(maxsize=4)
def load_hand_pair(folder: str | Path) -> HandPair:
    """Load both hands from ``folder``/MANO_{LEFT,RIGHT}.pkl and correct the left hand's shape directions.

    Raises ManoError if a file is missing or damaged, contains foreign code, or the two are swapped.
    """
    left, right = (load_mano_pkl(Path(folder) / f'MANO_{side.upper()}.pkl', side=side) for side in SIDES)
    return HandPair(correct_left_shape_dirs(left, right), right)
