"""Every reader of files from outside as a function of bytes, with seeds: what the fuzzer and the suite feed to it.

A reader returns, or raises one of ``TYPED``. Anything else is a fault: another exception, a crash, code that runs,
memory beyond the file's own size, or a hang.
"""

import hashlib
import io
import json
import pickle
import random
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from mano_files import Ch, Python2Pickler, Select, sparse
from PIL import Image
from raw_tree import annotation_file, make_raw_tree

from dataset.hand_model_record import check_hand_model_record
from dataset.joint_files import implausible, read_joint_file
from dataset.packed import ALL_HANDS, FORMAT, LABELS, MANIFEST, SAMPLES, PackedDataset, record_type
from dataset.prepare.raw import RawSplit, full_entries
from dataset.prepared import FOLDERS, HAND_LABELS, LABEL_SHAPES, InterHandDataset
from inference.boxes import BoxesFile
from inference.detector_model import Model, read_model
from inference.media import read_photo
from inference.reconstruct import cut_crop
from manopth import ManoError, safe_pickle
from manopth.assets import load_mano_pkl
from manopth.standin import standin_pair
from models.checkpoint import FORMAT as CHECKPOINT_FORMAT
from models.checkpoint import read_checkpoint
from utils.config import load_config
from utils.errors import UserError
from utils.images import decode_image

TYPED = (UserError, ManoError)
FOUND = Path(__file__).parent / 'found'  # READER/NAME: inputs that once found a fault


class Reader(NamedTuple):
    """One kind of file."""

    read: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    instrumented: tuple[str, ...]  # modules whose branches guide the fuzzer


def found(reader: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((FOUND / reader).glob('*'))]


def run(reader: Reader, content: bytes) -> bool:
    """Whether the content was accepted. Raises what is not one of ``TYPED``, and RuntimeError if code ran."""
    _warm_up(reader.read)
    with forbidden_actions() as actions:
        try:
            reader.read(content)
            accepted = True
        except TYPED as error:
            assert str(error).strip(), 'a message must not be empty'
            accepted = False
    if actions:
        raise RuntimeError(f'the file made the reader run {actions}')
    return accepted


@cache
def _warm_up(read: Callable[[bytes], None]) -> None:
    """Let the reader import what it needs and the scratch folders be made, which would look like code that runs."""
    Image.init()
    scratch()
    with suppress(Exception):
        decode_image(b'no image')  # looks for optional packages
    with suppress(Exception):
        read(b'\0 is no file')


# What a reader must not do. Python calls audit hooks for these; a hook cannot be removed, so it is armed by a list.
_FORBIDDEN = ('os.', 'subprocess.', 'socket.', 'shutil.', 'exec', 'ctypes.dlopen', 'import', 'code.__new__')
_ALLOWED = ('os.listdir', 'os.scandir', 'os.putenv')
_armed: list[list[str]] = []


def _audit(event: str, arguments: tuple) -> None:
    if _armed and event.startswith(_FORBIDDEN) and event not in _ALLOWED:
        if event == 'import' and (arguments[0] in sys.modules or _is_own_import(str(arguments[0]))):
            return
        if event == 'exec' and _importing():
            return
        _armed[-1].append(f'{event}{arguments!r}'[:200])


def _is_own_import(name: str) -> bool:
    """Libraries import parts of themselves on first use."""
    return name.split('.')[0] in sys.modules


def _importing() -> bool:
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]  # None ends the loop
        if frame.f_code.co_filename == '<frozen importlib._bootstrap>':
            return True
    return False


@lru_cache(maxsize=1)
def _install_audit_hook() -> None:
    sys.addaudithook(_audit)


@contextmanager
def forbidden_actions() -> Iterator[list[str]]:
    """The actions that the block took although no reader may."""
    scratch()
    _install_audit_hook()
    actions: list[str] = []
    _armed.append(actions)
    try:
        yield actions
    finally:
        _armed.pop()


@lru_cache(maxsize=1)
def scratch() -> Path:
    """A folder in memory, which the process removes when it ends in order."""
    memory = Path('/dev/shm')
    holder = tempfile.TemporaryDirectory(prefix='dir-fuzz-', dir=memory if memory.is_dir() else None)
    _holders.append(holder)
    return Path(holder.name)


_holders: list[tempfile.TemporaryDirectory] = []


def put(name: str, content: bytes) -> Path:
    path = scratch() / name
    if not path.parent.exists():
        path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


# Hand models and annotations of prepared sets: pickles


def read_mano(content: bytes) -> None:
    path = put('MANO_RIGHT.pkl', content)
    with suppress(*TYPED):
        values = safe_pickle.load(path)
        for value in values.values() if isinstance(values, dict) else [values]:
            # load_mano_pkl turns these into a message; it stops at the first key, this loop at none.
            with suppress(*safe_pickle.NOT_NUMBERS):
                safe_pickle.numbers(value, np.float64)
    load_mano_pkl(path, side='right')


class _Call:
    """Pickles as a call of a function, as hostile files do."""

    def __init__(self, function: Callable, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_pickles() -> list[bytes]:
    return [
        pickle.dumps(_Call(print, 'code from a file ran')),
        b"cos\nsystem\n(S'true'\ntR.",
        pickle.dumps({'v_template': _Call(eval, '1 + 1')}),
        pickle.dumps(_Call(np.ndarray, (1 << 40,))),
        b'\x80\x02r\xff\xff\xff\x7f.',  # a memo of 2 billion entries
        b'\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00' + b'x',  # a string of a terabyte
        b'(' * 2000,
        b'\x80\x02' + b']' * 3000 + b'a' * 2999 + b'.',  # nested lists
    ]


def _python2(value: object) -> bytes:
    path = put('seed.pkl', b'')
    with open(path, 'wb') as file:
        Python2Pickler(file, 2).dump(value)
    return path.read_bytes()


def mano_seeds() -> list[bytes]:
    array = np.arange(6.0).reshape(2, 3)
    content = {
        'v_template': Ch(x=array),
        'f': array.astype(np.uint32),
        'shapedirs': Select(a=Ch(x=array), idxs=np.arange(4), preferred_shape=(2, 2)),
        'posedirs': array.astype('>f4'),
        'J_regressor': sparse(array),
        'weights': np.asfortranarray(array),
        'hands_mean': np.float64(1.5),
        'hands_components': [1, 2.5, None, True, 'text', b'bytes', (1, 2), {3}],
    }
    plain = {key: value for key, value in content.items() if not hasattr(value, 'pickled_as')}
    protocols = [pickle.dumps(plain, protocol) for protocol in range(2, 6)]
    return [_python2(content), *protocols, *hostile_pickles()]


def read_annotation(content: bytes) -> None:
    dataset = _prepared()
    dataset.path('anno', 0).write_bytes(content)
    with suppress(*TYPED):
        dataset.labels(0)
    dataset.entries(0)


@lru_cache(maxsize=1)
def _prepared() -> InterHandDataset:
    for kind, suffix in FOLDERS.items():
        put(f'prepared/train/{kind}/0.{suffix}', b'')
    return InterHandDataset(scratch() / 'prepared', 'train')


def annotation_seeds() -> list[bytes]:
    hand = {
        'R': np.eye(3, dtype=np.float32)[None],
        'pose': np.zeros((1, 45)),
        'shape': [0.0] * 10,
        'trans': np.zeros(3),
    }
    camera = {'R': np.eye(3), 't': np.zeros(3), 'camera': np.eye(3)}
    content = {'mano_params': {'left': hand, 'right': hand}, 'camera': camera, 'image': {'id': 1}, 'annotation': None}
    wrong = content | {'camera': camera | {'t': [np.nan] * 3}}
    single, empty = (content | {'mano_params': {'left': None, 'right': right}} for right in (hand, None))
    contents = (content, wrong, [content], single, empty)
    return [pickle.dumps(x, protocol) for x in contents for protocol in (2, 5)] + hostile_pickles()


# Annotation files of InterHand2.6M


def read_raw(content: bytes) -> None:
    kinds = tuple(_raw_files())
    kind = kinds[content[0] % len(kinds)] if content else kinds[0]
    root = scratch() / 'raw'
    path = annotation_file(root, kind)
    path.write_bytes(content[1:])
    try:
        split = RawSplit(root, 'train')
        for frame in split.frames[:3]:
            full_entries(frame)
            split.missing_images([frame])
            for part in (split.camera, split.mano, split.joints):
                with suppress(*TYPED):
                    part(frame.capture, frame.camera if part == split.camera else frame.frame_idx)
    finally:
        path.write_bytes(_raw_files()[kind])


@lru_cache(maxsize=1)
def _raw_files() -> dict[str, bytes]:
    root = scratch() / 'raw'
    make_raw_tree(root, steps=1)
    return {
        kind: annotation_file(root, kind).read_bytes() for kind in ('data', 'camera', 'joint_3d', 'MANO_NeuralAnnot')
    }


def raw_seeds() -> list[bytes]:
    seeds = [bytes([number]) + content for number, content in enumerate(_raw_files().values())]
    odd = [b'{"images": [], "annotations": []}', b'[]', b'{}', b'', b'{"0": NaN}', b'[' * 5000, b'\xff\xfe{']
    odd += [b'{"0": {"100": {"left": null, "right": {"pose": [1e999], "shape": [], "trans": [-Infinity]}}}}']
    return seeds + [bytes([number]) + text for number in range(4) for text in odd]


# Packed data sets: manifest, labels and samples in one input

SEPARATOR = b'\n--part--\n'


def read_packed(content: bytes) -> None:
    manifest, labels, samples = (*content.split(SEPARATOR, 2), b'', b'')[:3]
    folder = put(f'packed/train/{LABELS}', labels).parent
    (folder / SAMPLES).write_bytes(samples)
    with suppress(ValueError, KeyError, TypeError, RecursionError):  # the sizes are right in a crafted file too
        table = json.loads(manifest)
        for name, part in ((LABELS, labels), (SAMPLES, samples)):
            table['files'][name]['bytes'] = len(part)
        manifest = json.dumps(table).encode()
    (folder / MANIFEST).write_bytes(manifest)
    dataset = PackedDataset(scratch() / 'packed', 'train')
    for index in range(min(len(dataset), 2)):
        for read in (dataset.labels, dataset.entries, dataset.mask):
            with suppress(*TYPED):
                read(index)
        for kind in ('img', 'dense'):
            with suppress(*TYPED):
                dataset.image(kind, index)


def plain_jpeg(size: int = 256) -> bytes:
    return cv2.imencode('.jpg', np.full((size, size, 3), 90, np.uint8))[1].tobytes()


def packed_seeds() -> list[bytes]:
    image, entries = plain_jpeg(), b'{"image": {"id": 1}, "annotation": {}}'
    record = np.zeros(1, record_type())
    for name, shape in LABEL_SHAPES.items():
        record[name] = np.eye(3) if shape[-2:] == (3, 3) else 0.1
    for part, content in (('img', image), ('mask', image), ('dense', image), ('entries', entries)):
        record[f'{part}_bytes'] = len(content)
    path = put('labels.npy', b'')
    np.save(path, record)
    labels, samples = path.read_bytes(), image * 3 + entries
    files = {LABELS: {'bytes': 0, 'sha256': ''}, SAMPLES: {'bytes': 0, 'sha256': ''}}
    manifest = {'format': FORMAT, 'samples': 1, 'mask': 'jpeg', 'dense': True, 'files': files}
    text = json.dumps(manifest).encode()
    manifests = [manifest | change for change in ({}, {'mask': 'bits'}, {'samples': 10**12}, {'samples': '1'})]
    manifests += [manifest | {'samples': value} for value in (None, -1, 1.5, True)]
    seeds = [SEPARATOR.join([json.dumps(one).encode(), labels, samples]) for one in manifests]
    for name in HAND_LABELS:
        record[name][:, 0] = np.nan  # the left hand is absent
    np.save(path, record)
    absent, all_hands = path.read_bytes(), json.dumps(manifest | {'hands': ALL_HANDS}).encode()
    seeds += [SEPARATOR.join([head, part, samples]) for head in (all_hands, text) for part in (absent, labels)]
    giant = labels.replace(b"'shape': (1,)", b"'shape': (9,)")
    return seeds + [SEPARATOR.join([text, part, samples]) for part in (labels[:80], giant, b'', b'PK\x03\x04')]


def read_record(content: bytes) -> None:
    check_hand_model_record(put('record/hand_model.json', content).parent, _standin())


@lru_cache(maxsize=1)
def _standin():
    return standin_pair()


def record_seeds() -> list[bytes]:
    return [json.dumps({'hand_model': _standin().identity}).encode(), b'[]', b'{"hand_model": 1e999}', b'[' * 5000]


# Checkpoints


def read_weights(content: bytes) -> None:
    read_checkpoint(put('latest.pth', content))


def weights_seeds() -> list[bytes]:
    content = {'format': CHECKPOINT_FORMAT, 'model': {'a': torch.ones(2, 3)}, 'config': {'SEED': 1}, 'hand_model': 'x'}
    seeds = []
    for new in (True, False):
        path = put('seed.pth', b'')
        torch.save(content, path, _use_new_zipfile_serialization=new)
        seeds.append(path.read_bytes())
    torch.save(_Call(print, 'code from a file ran'), path)
    return [*seeds, path.read_bytes(), seeds[0][:200], *hostile_pickles()]


# Joints of other trackers


def read_joints(content: bytes) -> None:
    suffix = {b'PK': '.npz', b'\x93N': '.npy'}.get(content[:2], '.csv')
    implausible(read_joint_file(put(f'joints{suffix}', content), order='interhand', units='m').points)


def joints_seeds() -> list[bytes]:
    random = np.random.default_rng(0)
    both = random.uniform(0, 0.2, (2, 2, 21, 3))
    arrays = [both, both[0].astype(np.float16), (both * 1000).astype('>i4'), both[:0], both * np.nan, np.array('x')]
    seeds = []
    for array in arrays:
        file = io.BytesIO()
        np.save(file, array)
        seeds.append(file.getvalue())
    for options in ({}, {'frame': [3, 4], 'time_s': [0.0, 0.1]}, {'frame': [np.nan, 1e300]}):
        file = io.BytesIO()
        np.savez(file, joints=both, **options)
        seeds.append(file.getvalue())
    np.savez_compressed(file := io.BytesIO(), joints=both)
    rows = '\n'.join(','.join(f'{x:.4f}' for x in frame.flat) for frame in both)
    head = ','.join(['frame', 'time_s', *map(str, range(126))])
    timed = '\n'.join(f'{number},0.{number},{row}' for number, row in enumerate(rows.split('\n')))
    tables = [
        rows,
        f'{head}\n{timed}',
        rows.replace(',', ';'),
        rows.replace('0.1', ''),
        '"',
        '\0',
        '1e999,' * 125 + '1',
    ]
    seeds += [file.getvalue(), *(table.encode() for table in tables)]
    return [*seeds, seeds[0].replace(b'(2, 2,', b'(9, 9,'), b'\x93NUMPY\x01\0\x05\0{"a(', *hostile_pickles()[:2]]


# Images, boxes and configurations


def read_picture(content: bytes) -> None:
    read_photo(put('image', content))


def picture_seeds() -> list[bytes]:
    small = np.arange(768, dtype=np.uint8).reshape(16, 16, 3)
    formats = ('.jpg', '.png', '.bmp', '.webp', '.tiff', '.ppm')
    seeds = [cv2.imencode(suffix, small)[1].tobytes() for suffix in formats]
    transparent = np.concatenate([small, small[..., :1]], -1)
    seeds += [cv2.imencode(suffix, image)[1].tobytes() for suffix in ('.png', '.webp') for image in (transparent,)]
    seeds.append(cv2.imencode('.png', small.astype(np.uint16) * 257)[1].tobytes())
    for orientation in (1, 6, 9):
        exif = b'Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0' + bytes([orientation]) + b'\0\0\0\0\0\0'
        seeds.append(seeds[0][:2] + b'\xff\xe1' + (len(exif) + 2).to_bytes(2, 'big') + exif + seeds[0][2:])
    return seeds + [b'', b'\xff\xd8', b'\x89PNG\r\n\x1a\n' + b'\0' * 20, b'GIF89a' + b'\xff' * 20]


def read_boxes(content: bytes) -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    for box in BoxesFile(put('boxes.json', content))(Path('a.jpg'), image):
        with suppress(*TYPED):
            cut_crop(image, box)


def boxes_seeds() -> list[bytes]:
    values = ([1, 2, 30, 20], [[1, 2, 30, 20], [0, 0, 9, 9]], [], [1], 'x', None, [1e300] * 4, [[]], [{}], [True] * 4)
    return [json.dumps({'a.jpg': value}).encode() for value in values] + [b'[]', b'[' * 5000, b'{"a.jpg": [NaN]}']


def read_config(content: bytes) -> None:
    """A YAML file, and after the first NUL the words of a command line, each ended by another one."""
    text, *words = content.split(b'\0')
    load_config(put('fuzz.yaml', text), [word.decode('utf-8', 'surrogateescape') for word in words])


def config_seeds() -> list[bytes]:
    texts = [b'TRAIN:\n  LR: 1e-3 # rate\n  EPOCHS: 3\nMODEL: {BONE_RADIUS: [1.0, 2], DETACH: false}\n']
    texts += [b'A: &a [1]\nB: *a\n', b'OUTPUT_DIR: !!python/name:os.system\n', b'{' * 999, b'? [a]\n: b\n', b'\xff\xfe']
    texts += [b'SEED: 1\nSEED: 2\n', b'%YAML 1.2\n---\nTRAIN: {LR: .nan}\n', b'"\\U99999999": |\n  x\n', b'a:\n\t- b\n']
    pairs = ('TRAIN.LR', '5e-4', 'OUTPUT_DIR', '0x10', 'MODEL.BONE_RADIUS', '[1, 2.5, (3)]', 'MODEL.DETACH', 'no')
    return texts + [b'SEED: 7\n\0' + '\0'.join(pairs).encode(), b'\0SEED', b'\0SEED\x001e9', b'\0\0']


# Wheels that contain the hand detector

NETWORK = b'TFL3' * 64
SMALL_MODEL = Model('a.tflite', 'package/a.tflite', len(NETWORK), hashlib.sha256(NETWORK).hexdigest())


def read_wheel(content: bytes) -> None:
    read_model(put('a.whl', content), SMALL_MODEL)


def wheel_seeds() -> list[bytes]:
    seeds = []
    contents = (NETWORK, NETWORK[:-1], NETWORK + b'x', bytes(1 << 20), b'')
    methods = (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2)
    for method in methods:
        for content in contents if method == methods[0] else contents[:1]:
            with zipfile.ZipFile(file := io.BytesIO(), 'w', method) as archive:
                archive.writestr('package/METADATA', 'License: Apache 2.0')
                archive.writestr(SMALL_MODEL.member, content)
            seeds.append(file.getvalue())
    return [*seeds, seeds[0][:100], seeds[0].replace(b'a.tflite', b'b.tflite'), b'', b'PK\5\6' + bytes(18)]


READERS = {
    'annotation': Reader(read_annotation, annotation_seeds, ('manopth.safe_pickle', 'dataset.prepared')),
    'boxes': Reader(read_boxes, boxes_seeds, ('inference.boxes', 'inference.reconstruct', 'json')),
    'checkpoint': Reader(
        read_weights, weights_seeds, ('models.checkpoint', 'utils.tensor_files', 'torch._weights_only_unpickler')
    ),
    'config': Reader(read_config, config_seeds, ('utils.config', 'yaml')),
    'image': Reader(read_picture, picture_seeds, ('inference.media', 'utils.images', 'PIL')),
    'joints': Reader(read_joints, joints_seeds, ('dataset.joint_files', 'utils.arrays', 'numpy.lib', 'csv')),
    'mano': Reader(read_mano, mano_seeds, ('manopth.safe_pickle', 'manopth.assets')),
    'packed': Reader(read_packed, packed_seeds, ('dataset.packed', 'dataset.prepared', 'numpy.lib', 'json')),
    'raw': Reader(read_raw, raw_seeds, ('dataset.prepare.raw',)),
    'record': Reader(read_record, record_seeds, ('dataset.hand_model_record', 'json')),
    'wheel': Reader(read_wheel, wheel_seeds, ('inference.detector_model', 'zipfile')),
}


def mutations(seeds: list[bytes], count: int, *, seed: int = 0) -> Iterator[bytes]:
    """Deterministic variations for a run without the fuzzer: flipped, cut, repeated and exchanged pieces."""
    draw = random.Random(seed)
    for _ in range(count):
        content = bytearray(draw.choice(seeds))
        for _ in range(draw.randint(1, 4)):
            at, length = draw.randrange(len(content) + 1), draw.choice((1, 1, 2, 4, 8, 64))
            other = draw.choice(seeds)
            start = draw.randrange(len(other) + 1)
            match draw.randrange(5):
                case 0:
                    content[at : at + 1] = bytes([draw.randrange(256)])
                case 1:
                    del content[at : at + length]
                case 2:
                    content[at:at] = other[start : start + length]
                case 3:
                    content[at : at + length] = draw.choice((b'\xff', b'\0', b'9', b'[', b'\x7f')) * length
                case _:
                    del content[at:]
        yield bytes(content)
