import pytest

from evaluation.session import owned_output
from utils.errors import UserError
from utils.files import partial_path


def test_an_evaluation_removes_what_a_killed_one_left(tmp_path):
    stale = partial_path(tmp_path / 'samples.npz')
    for path in (stale, tmp_path / 'metrics.json', tmp_path / '.notes'):
        path.write_bytes(b'x')
    with owned_output(str(tmp_path)):
        assert {path.name for path in tmp_path.iterdir()} == {'metrics.json', '.notes'}
    with owned_output(None):
        pass


def test_an_output_that_is_no_folder_is_refused_at_once(tmp_path):
    (tmp_path / 'file').touch()
    (tmp_path / 'link').symlink_to('nowhere')
    for name in ('file', 'link'):
        with pytest.raises(UserError, match=f'--out .*{name} is not a folder'), owned_output(str(tmp_path / name)):
            pass
    with owned_output(str(tmp_path / 'new')):
        pass
