"""Check the setup before a run: what is ready, what is missing, and how to fix it. Changes and downloads nothing.

    python apps/check_setup.py                                # for python train.py
    python apps/check_setup.py --cfg configs/demo.yaml DATASET.PATH DIR

Accepts train.py's --cfg FILE and KEY VALUE pairs. Exits with 0 if training can start, with 2 if it cannot.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import utils  # noqa: F401  # before PyTorch, see there

try:
    import torch
    import torchvision
    from yacs.config import CfgNode

    from dataset import open_split
    from dataset.hand_model_record import HAND_MODEL_RECORD, check_hand_model_record
    from dataset.loader import training_loader
    from dataset.mixture import set_folders
    from dataset.prepared import RECORD, partial_folder
    from models import build_model, efficientnet_lite
    from models.backbone import Backbone, load_imagenet
    from models.checkpoint import has_checkpoint, refuse_finished
    from models.hands import load_hands
    from models.initial_weights import check_not_own_output, load_initial_weights
    from utils.config import add_config_arguments, load_config
    from utils.distributed import choose_device, usable_cores
    from utils.errors import UserError, user_facing
    from utils.files import read_json
except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
    print(
        f'error: a package is missing or incompatible with the others ({error}): '
        f'python -m pip install -r {ROOT / "requirements.txt"}',
        file=sys.stderr,
    )
    sys.exit(2)

OK, NOTE, MISSING, WRONG = 'ok', 'note', 'MISSING', 'WRONG'  # the last two keep training from starting
WIDTH = 110  # characters of a line
OLDEST_PYTHON = (3, 11)
# Packages whose import name differs; another package may then provide the same module.
IMPORTED_AS = {'opencv-python-headless': 'cv2'}
LITTLE_SPACE = 5  # GB
CHECKPOINT_SIZES = (
    'For the published network (resnet50), latest.pth needs 1.1 GB, twice that while it is being replaced, and '
    'best.pth 0.4 GB.'
)
WITHOUT = {
    'val': 'training then validates nothing, and best.pth holds the last epoch',
    'test': 'only evaluation needs it',
}


class Check(NamedTuple):
    """One line of the report, and the advice printed below it."""

    mark: str  # OK, NOTE, MISSING or WRONG
    what: str
    found: str
    todo: str = ''  # whole sentences


@user_facing
def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser, default='configs/dir_interhand.yaml')
    args = parser.parse_intermixed_args(argv)
    cfg = load_config(args.cfg, args.opts)

    failed = 0
    for check in examine(cfg):
        print(layout(check), flush=True)
        failed += check.mark in (MISSING, WRONG)
    if failed:
        print(f'not ready: {failed} {"thing is" if failed == 1 else "things are"} missing or wrong')
        return 2
    resume = ['--resume'] if has_checkpoint(cfg.OUTPUT_DIR) else []
    print(f'ready: {shlex.join(["python", "train.py", *resume, *argv])}')
    return 0


def examine(cfg: CfgNode) -> Iterator[Check]:
    """Run every check; an error that one of them raises becomes its result, and the others still run."""
    sets = each_set(cfg)
    for what, check in CHECKS.items():
        for part in sets if what.startswith('data') else [cfg]:
            try:
                result = check(what, part)
            except (UserError, OSError) as error:
                result = Check(WRONG, what, 'cannot be used', sentence(error))
            if result:
                yield result


def each_set(cfg: CfgNode) -> list[CfgNode]:
    """One configuration per data set of DATASET.PATH."""
    folders = set_folders(cfg.DATASET.PATH)
    if len(folders) == 1:
        return [cfg]
    sets = []
    for folder in folders:
        one = cfg.clone()
        one.defrost()
        one.DATASET.PATH = folder
        sets.append(one)
    return sets


def layout(check: Check) -> str:
    """A check's line with the advice wrapped below it; paths and addresses are never broken."""
    names = max(map(len, CHECKS))
    indent = ' ' * (len(MISSING) + names + 4)
    below = textwrap.fill(
        check.todo,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return f'{check.mark:{len(MISSING)}}  {check.what:{names}}  {check.found}' + (f'\n{below}' if below else '')


def sentence(error: UserError | OSError) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f'{error.filename} cannot be read ({error.strerror}): check its permissions and the disk.'


# ---------------------------------------------------------------------------------------------------------------------
# The checks: (name, configuration) -> Check, or None where a check does not apply
# ---------------------------------------------------------------------------------------------------------------------


def check_software(what: str, cfg: CfgNode) -> Check:
    """Python and the packages of requirements.txt are recent enough."""
    found = f'Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}'
    problems = []
    if sys.version_info[:2] < OLDEST_PYTHON:
        problems.append(f'Python is older than {".".join(map(str, OLDEST_PYTHON))}')
    for package, oldest in re.findall(r'^([\w.-]+)>=([\d.]+)', (ROOT / 'requirements.txt').read_text(), re.M):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if importlib.util.find_spec(IMPORTED_AS.get(package, package)) is None:
                problems.append(f'{package} is not installed')
            continue
        if release(version) < release(oldest):
            problems.append(f'{package} {version} is older than {oldest}')
    if problems:
        return Check(
            WRONG,
            what,
            f'{found}; {", ".join(problems)}',
            f'python -m pip install -r requirements.txt, with Python {".".join(map(str, OLDEST_PYTHON))} or later.',
        )
    return Check(OK, what, found)


def release(version: str) -> tuple[int, ...]:
    """'2.10.0+cu128' -> (2, 10), for comparison."""
    return tuple(int(number) for number in re.findall(r'\d+', version)[:2])


def check_device(what: str, cfg: CfgNode) -> Check:
    """The device that DEVICE selects on this machine works."""
    device = choose_device(cfg.DEVICE)
    if device.type == 'cuda':
        gpu = torch.cuda.get_device_properties(device)
        return Check(OK, what, f'{device}: {gpu.name}, {gpu.total_memory / 1e9:.0f} GB')
    cores = usable_cores()
    todo = 'Training on the full data set needs a GPU; a CPU is enough for configs/demo.yaml.'
    if not torch.cuda.is_available():
        todo += (
            ' If this machine has a GPU, check its driver with nvidia-smi.'
            if torch.version.cuda
            else ' If this machine has a GPU: this torch was built without CUDA; see https://pytorch.org for others.'
        )
    return Check(NOTE, what, f'{device}, {cores} {"core" if cores == 1 else "cores"}', todo)


def check_hands(what: str, cfg: CfgNode) -> Check:
    """The hand model's files exist, are intact and not swapped."""
    try:
        return Check(OK, what, load_hands(cfg.MANO.SOURCE, cfg.MANO.PATH).identity)
    except UserError as error:
        files = [Path(cfg.MANO.PATH) / f'MANO_{side}.pkl' for side in ('LEFT', 'RIGHT')]
        missing = not all(file.is_file() for file in files)
        return Check(MISSING if missing else WRONG, what, f'no usable pair in {cfg.MANO.PATH}', str(error))


def check_split(what: str, cfg: CfgNode, *, split: str) -> Check:
    """A split is complete, and its first sample is readable."""
    folder = Path(cfg.DATASET.PATH) / split
    absent = not folder.exists()
    files = cfg.DATASET.TARGETS == 'files'
    try:
        dataset = open_split(cfg.DATASET.PATH, split, with_mask=files, with_dense=files)
        _ = dataset[0]
    except (UserError, OSError) as error:
        return _unusable_split(what, cfg, folder, sentence(error), absent=absent)
    samples = len(dataset)
    found = f'{samples:,} {"sample" if samples == 1 else "samples"} in {folder}'
    return _with_preparation(Check(OK, what, found), folder, samples)


def _unusable_split(what: str, cfg: CfgNode, folder: Path, problem: str, *, absent: bool) -> Check:
    """Report a split that cannot be opened: training can do without test, and without val where it is missing."""
    split, partial = folder.name, partial_folder(folder)
    half = absent and partial.is_dir()
    found = f'only half prepared ({partial})' if half else f'none in {folder.parent}' if absent else 'damaged'
    if split == 'test' or (split == 'val' and absent):
        if absent and not half:  # the check of train has reported the loader's error already
            hands = ' MANO.SOURCE standin' if cfg.MANO.SOURCE == 'standin' else ''
            problem = (
                'To prepare it: python dataset/interhand.py --data_path INTERHAND --save_path '
                f'{shlex.quote(cfg.DATASET.PATH)} --splits {split}{hands}'
            )
        return Check(NOTE, what, f'{found}: {WITHOUT[split]}', problem)
    if absent and not half and cfg.MANO.SOURCE == 'standin':
        problem += (
            ' Without InterHand2.6M: `make demo` generates synthetic data with stand-in hands (dataset/synthesize.py).'
        )
    return Check(MISSING if absent else WRONG, what, found, problem)


def _with_preparation(check: Check, folder: Path, samples: int) -> Check:
    """Add the counts of preparation.json; data sets prepared by other tools have none."""
    file = folder / RECORD
    if not file.exists():
        return check
    try:
        record = read_json(file)
        frames, kept = int(record['frames']), int(record['kept'])
        skipped, damaged = sum(record['skipped'].values()), len(record['damaged'])
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return check._replace(
            mark=NOTE,
            found=f'{check.found}; {RECORD} is damaged',
            todo=f'{file} is only a record of the preparation; training does not read it.',
        )
    check = check._replace(found=f'{check.found}; {frames:,} frames, {skipped:,} skipped, {damaged:,} of them damaged')
    if samples == kept:
        return check
    return check._replace(mark=NOTE, todo=f'{file} records {kept:,} prepared samples: is this copy complete?')


def check_hands_of_data(what: str, cfg: CfgNode) -> Check | None:
    """The data was generated with the configured hands; does not apply where either is missing."""
    if not (Path(cfg.DATASET.PATH) / HAND_MODEL_RECORD).exists():
        return None
    try:
        models = load_hands(cfg.MANO.SOURCE, cfg.MANO.PATH)
    except (UserError, OSError):
        return None
    try:
        check_hand_model_record(cfg.DATASET.PATH, models)
    except UserError as error:
        return Check(WRONG, what, f'{cfg.DATASET.PATH} was generated with other hands', str(error))
    return Check(OK, what, 'the same')


def check_batch(what: str, cfg: CfgNode) -> Check | None:
    """All sets together fill a batch, and TRAIN.ACCUMULATE divides it; does not apply where a set is missing."""
    files = cfg.DATASET.TARGETS == 'files'
    try:
        open_split(cfg.DATASET.PATH, 'train', with_mask=files, with_dense=files)
    except (UserError, OSError):
        return None  # reported already
    batch = cfg.TRAIN.BATCH_SIZE
    try:
        training_loader(cfg)
    except UserError as error:
        return Check(WRONG, what, 'none can be drawn with this configuration', str(error))
    return Check(OK, what, f'{batch} {"sample" if batch == 1 else "samples"}')


def check_weights(what: str, cfg: CfgNode) -> Check:
    """The backbone's initial weights; local ones are loaded into a backbone to see that they fit."""
    name, file = cfg.MODEL.BACKBONE, cfg.MODEL.BACKBONE_WEIGHTS
    if cfg.TRAIN.INIT_FROM:
        return check_initial_weights(what, cfg)
    if not cfg.MODEL.PRETRAINED:
        return Check(OK, what, f'{name} from scratch (MODEL.PRETRAINED false)')
    if name == efficientnet_lite.NAME:
        try:
            load_imagenet(Backbone(name), name, file)
        except UserError as error:
            return Check(MISSING, what, f'{name}: no usable ImageNet weights', str(error))
        return Check(OK, what, f'{name} from {file or efficientnet_lite.PACKAGE}')
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    cached = Path(torch.hub.get_dir()) / 'checkpoints' / Path(urlparse(url).path).name
    if not file and not cached.exists():
        return Check(
            NOTE,
            what,
            f'{name}: the first run downloads {url}',
            f'Without a network connection: copy that file into {cached.parent}, pass it with '
            'MODEL.BACKBONE_WEIGHTS FILE, or train from scratch with MODEL.PRETRAINED false.',
        )
    source = file or str(cached)
    again = '' if file else f' Or remove {cached}; the first run then downloads it again.'
    try:
        # Loaded by path, even from the cache, so that nothing is downloaded here.
        load_imagenet(Backbone(name), name, source)
    except UserError as error:
        return Check(WRONG if Path(source).exists() else MISSING, what, f'{source} cannot be used', f'{error}{again}')
    return Check(OK, what, f'{name} from {source}')


def check_initial_weights(what: str, cfg: CfgNode) -> Check:
    """The checkpoint of TRAIN.INIT_FROM fits the network."""
    hands, path, without = load_hands(cfg.MANO.SOURCE, cfg.MANO.PATH), cfg.TRAIN.INIT_FROM, cfg.TRAIN.INIT_WITHOUT
    try:
        check_not_own_output(path, cfg.OUTPUT_DIR)
        weights = load_initial_weights(build_model(cfg, hands, pretrained=False), path, without=without, hands=hands)
    except UserError as error:
        return Check(WRONG if Path(path).exists() else MISSING, what, f'{path} cannot be used', str(error))
    return Check(OK, what, weights.describe(hands))


def check_output(what: str, cfg: CfgNode) -> Check:
    """OUTPUT_DIR is writable, has enough space, and holds no other run."""
    folder = Path(cfg.OUTPUT_DIR)
    ground = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not ground.is_dir() or not os.access(ground, os.W_OK | os.X_OK):
        reason = 'is not writable' if ground.is_dir() else 'is not a folder'
        return Check(WRONG, what, f'{folder}: {ground} {reason}', 'Choose another OUTPUT_DIR, or fix this one.')
    free = shutil.disk_usage(ground).free / 1e9
    found, notes = f'{folder}, {free:.0f} GB free', []
    if free < LITTLE_SPACE:
        found, notes = (
            f'{folder}, only {free:.1f} GB free',
            [f'{CHECKPOINT_SIZES} Free some space, or choose another OUTPUT_DIR.'],
        )
    if has_checkpoint(folder):
        found += ', holds a run'
        notes.append('Continue it with train.py --resume; for a new run choose another OUTPUT_DIR.')
    try:
        refuse_finished(folder)
    except UserError as error:
        return Check(WRONG, what, f'{found}, not free for a new run', sentence(error))
    return Check(NOTE if notes else OK, what, found, ' '.join(notes))


# In the order of the report.
CHECKS: dict[str, Callable[[str, CfgNode], Check | None]] = {
    'software': check_software,
    'device': check_device,
    'hand files': check_hands,
    'data: train': partial(check_split, split='train'),
    'data: val': partial(check_split, split='val'),
    'data: test': partial(check_split, split='test'),
    'data: hands': check_hands_of_data,
    'batch': check_batch,
    'weights': check_weights,
    'output': check_output,
}


if __name__ == '__main__':
    sys.exit(main())
