"""The one door through which configuration enters: commented defaults, a YAML file over them, KEY VALUE over that.

Every default is the published recipe (README figures of the released code); a file in configs/ holds only what differs.
"""

import argparse
import difflib
import math
from ast import literal_eval
from collections.abc import Iterator
from pathlib import Path

import yaml
from yacs.config import CfgNode

from utils.errors import UserError

_C = CfgNode()

_C.ROOT_JOINT = 0  # joint that everything is centred on: 0 wrist, 9 middle MCP. Hands, targets, losses, metrics alike
_C.SEED = 0  # seeds weights, sample order and augmentation; one seed makes two CPU runs equal to the bit
_C.DEVICE = 'auto'  # 'auto' (CUDA if there is one), 'cpu', 'cuda' or 'cuda:N'
_C.OUTPUT_DIR = './output/dir_interhand'  # checkpoints, logs, pictures; with --cfg NAME.yaml it is ./output/NAME

_C.MANO = CfgNode()
_C.MANO.SOURCE = 'files'  # 'files': the official MANO pickles; 'standin': hands made by code
_C.MANO.PATH = 'misc/mano'  # folder with MANO_LEFT.pkl and MANO_RIGHT.pkl

_C.DATASET = CfgNode()
_C.DATASET.PATH = './data/interhand2.6m/'  # prepared (python dataset/interhand.py) or packed (dataset/pack.py) data set
_C.DATASET.TARGETS = 'files'  # masks and dense maps: 'files' as prepared, 'render' draws them on the model's device
_C.DATASET.COLOURS = ''  # v_color.pkl for 'render' if the data set was prepared with --colours; '': colours by position

_C.MODEL = CfgNode()
_C.MODEL.BACKBONE = 'resnet50'  # a torchvision network in the table of models/backbone.py: resnet18, swin_t, ...
_C.MODEL.PRETRAINED = True  # start the backbone from ImageNet weights
_C.MODEL.BACKBONE_WEIGHTS = ''  # local ImageNet file (a torchvision state_dict); '': torchvision's cache or download
_C.MODEL.IMAGE_SIZE = 256  # pixels: side of the network's input, a multiple of 32; crops on disk are always 256
_C.MODEL.MAP_CHANNELS = 256  # channels of the refined feature maps and of the dense heads
_C.MODEL.STAGES = 2  # refinement stages, 0 to 3: the first takes c3, the second c2, the third c1
_C.MODEL.BONE_RADIUS = [1.0, 2.0, 4.0]  # feature-map cells: half width of a projected bone, stage by stage
_C.MODEL.INTERACTION = 'both'  # joint interaction: 'both', 'graph' (within a hand), 'transformer' (across), 'none'
_C.MODEL.PROJECTION = 'bones'  # joint features back to the image along 'bones', at 'joints' only, or 'none'
_C.MODEL.DENSE_HEADS = True  # segmentation and dense colour as auxiliary tasks; false: neither heads nor their losses
_C.MODEL.DETACH = True  # the previous stage's estimate enters a stage without gradient
_C.MODEL.LEFT_MIDDLE_TIP = 444  # vertex; the published network was trained with 445, its converted checkpoint says so
_C.MODEL.INIT = 'published'  # 'published': N(0, 0.001) linear layers; 'identity': a stage starts as the one before

_C.LOSS = CfgNode()
_C.LOSS.WEIGHT = CfgNode()  # of each term of the objective; 0 drops the term
_C.LOSS.WEIGHT.JOINT_UV = 10.0  # huber on uv in [-1, 1]
_C.LOSS.WEIGHT.VERTEX_UV = 10.0
_C.LOSS.WEIGHT.JOINT_XYZ = 10.0  # huber on root-relative metres / 0.15 m
_C.LOSS.WEIGHT.VERTEX_XYZ = 10.0
_C.LOSS.WEIGHT.EDGE = 1.0  # mesh edge lengths / 0.15 m
_C.LOSS.WEIGHT.NORMAL = 0.1  # cosine between predicted edges and true face normals
_C.LOSS.WEIGHT.OFFSET = 10.0  # huber on (right root - left root) / 0.15 m
_C.LOSS.WEIGHT.SEGMENTATION = 0.1  # cross-entropy, class weights 0.1, 0.45, 0.45
_C.LOSS.WEIGHT.LOVASZ = 0.1  # Lovasz-softmax
_C.LOSS.WEIGHT.DENSE = 1.0  # huber on vertex colours
_C.LOSS.LOVASZ_INPUT = 'logits'  # 'logits' as published (punishes confidence) or 'probabilities' as its authors define
_C.LOSS.SCALE_TO_TRUTH = False  # scale predictions by true / predicted length of bone 0-9 before the 3D terms (paper)

_C.AUGMENT = CfgNode()  # all draws uniform
_C.AUGMENT.ROTATION = 180.0  # degrees, +-
_C.AUGMENT.SCALE = 0.1  # 1 +- this
_C.AUGMENT.SHIFT = 10.0  # pixels of the 256 crop, +-, each axis
_C.AUGMENT.FLIP = 0.5  # probability of a left-right flip (hands swapped)
_C.AUGMENT.BLUR = 0.3  # probability of motion blur, line of 3 to 9 pixels at any angle
_C.AUGMENT.GAIN = 0.3  # per channel, 1 +- this
_C.AUGMENT.BRIGHTNESS = 0.05  # of 255, +-, all channels
_C.AUGMENT.NOISE = 0.01  # of 255: standard deviation of Gaussian noise per value

_C.TRAIN = CfgNode()
_C.TRAIN.BATCH_SIZE = 64  # samples per step, over all processes
_C.TRAIN.EPOCHS = 50  # passes over the training split
_C.TRAIN.LR = 5e-4  # AdamW, at the start; cosine towards 0 at the last step
_C.TRAIN.WARMUP_STEPS = 0  # steps of linear warm-up
_C.TRAIN.WEIGHT_DECAY = 0.01  # AdamW
_C.TRAIN.DECAY_ALL = True  # weight decay on norms, biases and position embeddings too, as published
_C.TRAIN.CLIP_NORM = 0.0  # gradient norm is clipped to this; 0: not at all
_C.TRAIN.ACCUMULATE = 1  # parts that a process's share of a batch is taken in, one after the other: less memory
_C.TRAIN.EMA = 0.0  # decay per step of a moving average of the weights, which best.pth then holds; 0: none
_C.TRAIN.PRECISION = 'float32'  # 'float32', 'tf32', or 'bfloat16' (autocast; hands, rotations, losses stay float32)
_C.TRAIN.COMPILE = False  # torch.compile: minutes at the start, faster steps
_C.TRAIN.SYNC_BN = True  # batch norms see the whole batch, not each process its share: one curve whatever the processes
_C.TRAIN.WORKERS = 4  # loader processes per training process; 0 loads in the training process itself
_C.TRAIN.SAVE_EVERY = 2000  # steps between two saves of latest.pth within an epoch (each epoch's end saves too)
_C.TRAIN.LOG_EVERY = 20  # steps between two lines of log.jsonl and TensorBoard
_C.TRAIN.PICTURES = 8  # validation samples drawn after each validation; 0: none
_C.TRAIN.VALIDATE_EVERY = 1  # epochs between two validations (always after the last one)

_C.EVAL = CfgNode()
_C.EVAL.BATCH_SIZE = 64  # samples
_C.EVAL.PRECISION = 'float32'  # as TRAIN.PRECISION
_C.EVAL.WORKERS = -1  # loader processes of validation and evaluation; -1: as many as TRAIN.WORKERS

# Keys of earlier versions, which checkpoints may still hold -> what they are called now.
RENAMED = {
    'MODEL.WEIGHTS': 'MODEL.BACKBONE_WEIGHTS',
    **{f'LOSS.{name}': f'LOSS.WEIGHT.{name}' for name in _C.LOSS.WEIGHT},
}
PRECISIONS = ('float32', 'tf32', 'bfloat16')
_CHOICES = {
    'ROOT_JOINT': (0, 9),
    'MANO.SOURCE': ('files', 'standin'),
    'DATASET.TARGETS': ('files', 'render'),
    'MODEL.STAGES': (0, 1, 2, 3),
    'MODEL.INTERACTION': ('both', 'graph', 'transformer', 'none'),
    'MODEL.PROJECTION': ('bones', 'joints', 'none'),
    'MODEL.INIT': ('published', 'identity'),
    'TRAIN.PRECISION': PRECISIONS,
    'EVAL.PRECISION': PRECISIONS,
    'LOSS.LOVASZ_INPUT': ('logits', 'probabilities'),
}
_SHARES = ('AUGMENT.SCALE', 'AUGMENT.FLIP', 'AUGMENT.BLUR', 'AUGMENT.GAIN', 'AUGMENT.BRIGHTNESS')
_POSITIVE = (
    'TRAIN.BATCH_SIZE',
    'TRAIN.ACCUMULATE',
    'TRAIN.EPOCHS',
    'TRAIN.SAVE_EVERY',
    'TRAIN.LOG_EVERY',
    'TRAIN.VALIDATE_EVERY',
    'EVAL.BATCH_SIZE',
    'MODEL.IMAGE_SIZE',
    'MODEL.MAP_CHANNELS',
)


def default_config() -> CfgNode:
    """The commented defaults, not frozen."""
    return _C.clone()


def add_config_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add ``--cfg FILE`` and the ``KEY VALUE ...`` (as ``opts``) that every script takes.

    Parse with ``parse_intermixed_args``: the pairs may then stand anywhere between the options.
    """
    parser.add_argument(
        '--cfg',
        metavar='FILE',
        default=default,
        action=_Layers,
        help='YAML file with what differs from utils/config.py; given again, the later one goes over '
        f'the earlier (default: {default or "none"})',
    )
    parser.add_argument('opts', nargs='*', metavar='KEY VALUE', help='single keys, e.g. TRAIN.BATCH_SIZE 32')


def split_off_pairs(words: list[str]) -> tuple[list[str], list[str]]:
    """Words of an option that takes any number of them -> (its own, the KEY VALUE pairs it swallowed).

    ``--splits train MANO.SOURCE standin``: keys are in capitals, an option's own words are not.
    """
    first_key = next((number for number, word in enumerate(words) if word.isupper()), len(words))
    return words[:first_key], words[first_key:]


class _Layers(argparse.Action):
    """Every use adds a file to a list; the first one replaces the default."""

    def __call__(self, parser, namespace, value, option_string=None):
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(given if isinstance(given, list) else ()), value])


def load_config(
    cfg_file: str | Path | list[str | Path] | None = None, overrides: list[str] = (), *, base: dict | None = None
) -> CfgNode:
    """Defaults, then ``base`` (a checkpoint's configuration), then the file or files, then KEY VALUE pairs; frozen.

    Where no file sets OUTPUT_DIR, it is ./output/ and the files' names: an ablation's file holds its one key only.
    Raises UserError for an unreadable file, an unknown key (naming the nearest known one), a value of another type or
    out of range.
    """
    cfg = default_config()
    if base is not None:
        for key, value in _leaves(base):
            _set(cfg, RENAMED.get(key, key), value, where='the checkpoint')
    files = [Path(file) for file in (cfg_file if isinstance(cfg_file, list) else [cfg_file]) if file is not None]
    if files:
        cfg.OUTPUT_DIR = f'./output/{"+".join(file.stem for file in files)}'
    for file in files:
        for key, value in _leaves(_read_yaml(file)):
            _set(cfg, key, value, where=str(file))
    if len(overrides) % 2:
        raise UserError(f"Configuration on the command line comes as KEY VALUE pairs; '{overrides[-1]}' has no value.")
    for key, text in zip(overrides[::2], overrides[1::2]):
        _set(cfg, key, _literal(text), where='the command line')
    _check(cfg)
    cfg.freeze()
    return cfg


def flatten(cfg: CfgNode) -> dict[str, object]:
    """{'TRAIN.LR': 0.0005, ...}: every key with its dotted name."""
    return dict(_leaves(cfg))


def _read_yaml(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f'The configuration file {path} does not exist.') from None
    except OSError as error:
        raise UserError(f'The configuration file {path} cannot be read ({error.strerror}).') from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f'{path} is not valid YAML: {" ".join(str(error).split())}.') from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f'{path} must hold KEY: VALUE lines, it holds {type(content).__name__}.')
    return content


def _leaves(values: dict, prefix: str = '') -> Iterator[tuple[str, object]]:
    """Every value of nested dictionaries with its dotted key."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f'{prefix}{key}.')
        else:
            yield f'{prefix}{key}', value


def _literal(text: str):
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return {'true': True, 'false': False}.get(text.lower(), text)


def _set(cfg: CfgNode, key: str, value, *, where: str) -> None:
    known = flatten(cfg)
    if key in RENAMED:
        raise UserError(f'{where}: {key} is now called {RENAMED[key]}.')
    if key not in known:
        near = difflib.get_close_matches(key.upper(), known, n=1, cutoff=0)[0]
        raise UserError(
            f"{where}: there is no configuration key '{key}'; the nearest is '{near}' "
            '(all are listed in utils/config.py).'
        )
    *path, leaf = key.split('.')
    node = cfg
    for part in path:
        node = node[part]
    node[leaf] = _coerce(key, value, known[key], where)


def _coerce(key: str, value, default, where: str):
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, float) and isinstance(value, str):  # YAML 1.1 reads 5e-4 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(default, list) and isinstance(value, (list, tuple)) and all(type(v) in (int, float) for v in value):
        return [float(v) for v in value]
    if isinstance(default, str) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # a folder may be called 2024
    if type(value) is not type(default) or isinstance(default, list):
        raise UserError(f'{where}: {key} takes {type(default).__name__} like {default!r}, got {value!r}.')
    return value


def _check(cfg: CfgNode) -> None:
    flat = flatten(cfg)
    for key, allowed in _CHOICES.items():
        if flat[key] not in allowed:
            raise UserError(f'{key} is {flat[key]!r}; it must be one of {", ".join(map(str, allowed))}.')
    for key in _POSITIVE:
        if flat[key] < 1:
            raise UserError(f'{key} is {flat[key]}; it must be at least 1.')
    for key, value in flat.items():
        least = -1 if key == 'EVAL.WORKERS' else 0
        if isinstance(value, (int, float)) and not least <= value < math.inf:
            raise UserError(f'{key} is {value}; it must be {least} or more, and finite.')
    for key in _SHARES:
        if flat[key] > 1:
            raise UserError(f'{key} is {flat[key]}; it must lie between 0 and 1.')
    if cfg.TRAIN.EMA >= 1:
        raise UserError(f'TRAIN.EMA is {cfg.TRAIN.EMA}; a decay lies below 1, and 0 switches the average off.')
    if min(cfg.MODEL.BONE_RADIUS, default=1) <= 0:
        raise UserError(f'MODEL.BONE_RADIUS is {cfg.MODEL.BONE_RADIUS}; its entries must be above 0.')
    if cfg.MODEL.IMAGE_SIZE % 32:
        raise UserError(f'MODEL.IMAGE_SIZE is {cfg.MODEL.IMAGE_SIZE}; it must be a multiple of 32.')
    if len(cfg.MODEL.BONE_RADIUS) < cfg.MODEL.STAGES:
        raise UserError(f'MODEL.BONE_RADIUS has {len(cfg.MODEL.BONE_RADIUS)} entries for {cfg.MODEL.STAGES} stages.')
