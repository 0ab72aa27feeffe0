import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils  # noqa: F401  # before PyTorch, see there

# Each runs half a minute or more. They start first, so that no process is left with one of them at the end.
LONGEST_FILES = (
    'test_train.py',
    'test_demo.py',
    'test_kills.py',
    'test_pipeline.py',
    'test_resumable.py',
    'test_convert_checkpoint.py',
)

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and what is tested respects that


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope='session')
def standin():
    """The stand-in hands."""
    from models.hands import load_hands  # here: xdist's main process loads this file, too, and needs no PyTorch

    return load_hands('standin')


@pytest.fixture(scope='session')
def tiny_prepared(tmp_path_factory):
    """A read-only prepared data set (DATASET.PATH) with 8 train, 3 val and 5 test samples."""
    from prepared_tree import write_prepared

    root = tmp_path_factory.mktemp('prepared')
    for seed, (split, count) in enumerate((('train', 8), ('val', 3), ('test', 5))):
        write_prepared(root, split, count, seed=seed)
    return root
