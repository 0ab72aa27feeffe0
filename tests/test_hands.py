"""The configuration's choice of hand models: official files or the stand-in."""

import pytest
from mano_files import write_mano_files

from manopth.standin import standin_pair
from models.hands import load_hands
from utils.errors import UserError


def test_standin_and_files_yield_both_hands(standin, tmp_path):
    assert load_hands('standin') == standin_pair()
    folder = str(write_mano_files(tmp_path, standin))
    assert [hand.digest for hand in load_hands('files', folder)] == [hand.digest for hand in standin]


@pytest.mark.parametrize(
    'source, path, message',
    [
        ('files', '{}/nowhere', r'nowhere/MANO_LEFT\.pkl is missing\. Register at https://mano\.is\.tue\.mpg\.de'),
        ('disk', '{}', "MANO.SOURCE is 'disk'; it must be 'files' or 'standin'"),
    ],
)
def test_unusable_source_is_reported(tmp_path, source, path, message):
    with pytest.raises(UserError, match=message):
        load_hands(source, path.format(tmp_path))
