import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prepared_tree import write_prepared

from models.hands import load_hands

# Each takes a minute or more: begun first, so that no process is left alone with one of them at the end.
LONGEST_FILES = ('test_road.py', 'test_train.py', 'test_real_frames.py', 'test_convert_checkpoint.py')


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope='session')
def standin():
    """(left, right) stand-in hand models."""
    return load_hands('standin')


@pytest.fixture(scope='session')
def tiny_prepared(tmp_path_factory):
    """Folder of a prepared data set, for reading only: train 8, val 3, test 5 samples (DATASET.PATH)."""
    root = tmp_path_factory.mktemp('prepared')
    for seed, (split, count) in enumerate((('train', 8), ('val', 3), ('test', 5))):
        write_prepared(root, split, count, seed=seed)
    return root
