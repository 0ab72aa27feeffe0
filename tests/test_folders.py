import json
import os
from pathlib import Path

import pytest

from inference.folders import Folders, folder_name, input_name, remove_results
from utils.files import remove_stale_partials


def record(folder: Path, source: Path, name: str = 'hands.json') -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({'asked': {'input': input_name(source)}}))


def choose(out: Path, *sources: str | int) -> list[str]:
    choice = Folders(out)
    return [choice.choose(source if isinstance(source, int) else Path(source)).name for source in sources]


@pytest.mark.parametrize(
    'stem, name',
    [
        (b'IMG_1', 'IMG_1'),
        (b'two words', 'two words'),
        (b'H\xe4nde', 'H_nde'),
        ('H\u00e4nde'.encode(), 'H\u00e4nde'),
        ('Ha\u0308nde'.encode(), 'H\u00e4nde'),
        (b'50%03d', '50_03d'),
        (b'10:30 a\\b', '10_30 a_b'),
        (b'-rf', '_rf'),
        (b'.hidden', '_hidden'),
        (b'a\nb\x1b[31m', 'a_b_[31m'),
        (b'a... ', 'a'),
        (b' . ', '_'),
        ('\u624b'.encode() * 80, '\u624b' * 40),
        (b'x' * 251, 'x' * 120),
    ],
)
def test_a_folder_has_a_name_that_every_file_system_accepts(stem, name):
    assert folder_name(os.fsdecode(stem)) == name


def test_names_that_some_file_systems_do_not_tell_apart_are_numbered(tmp_path):
    sources = [
        'x/IMG.jpg',
        'x/img.jpg',
        'x/H\u00e4nde.jpg',
        'x/Ha\u0308nde.jpg',
        f'x/{"y" * 130}.jpg',
        f'x/{"y" * 131}.jpg',
    ]
    names = ['IMG', 'img-2', 'H\u00e4nde', 'H\u00e4nde-2', 'y' * 120, f'{"y" * 120}-2']
    assert choose(tmp_path / 'out', *sources) == names
    record(tmp_path / 'out' / 'IMG', Path('x/IMG.jpg'))
    assert choose(tmp_path / 'out', 'x/img.jpg') == ['img-2']


def test_the_list_of_results_is_no_folder(tmp_path):
    assert choose(tmp_path, 'demo.json.jpg') == ['demo.json-2']


def test_an_input_keeps_its_folder_and_gets_no_other_ones(tmp_path):
    record(tmp_path / 'a', Path('1/a.jpg'))
    record(tmp_path / 'a-2', Path('2/a.jpg'), 'video.json')
    assert choose(tmp_path, '3/a.jpg', '2/a.jpg', '1/a.jpg') == ['a-3', 'a-2', 'a']
    os.rename(tmp_path / 'a', tmp_path / 'gone')
    assert choose(tmp_path, '2/a.jpg', '3/a.jpg') == ['a-2', 'a']
    assert choose(tmp_path, 'x/a-2.jpg') == ['a-2-2']


def test_recordings_of_a_camera_never_overwrite_each_other(tmp_path):
    record(tmp_path / 'camera0', Path('camera 0'))
    (tmp_path / 'camera0' / 'video.json').write_text('{"asked": {"input": "camera 0"}}')
    assert choose(tmp_path, 0, 'x/camera0.jpg') == ['camera0-2', 'camera0-3']


def test_leftovers_are_taken_over_and_files_of_others_are_not(tmp_path):
    for name in (
        'a/overlay.jpg',
        'a/.left.obj.0123456789abcdef.partial',
        'a/2/hands.json',
        'b/holiday.jpg',
        'c',
        'd/2/x',
        'e/hands.json',
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{')
    assert choose(tmp_path, *(f'x/{name}.jpg' for name in 'abcde')) == ['a', 'b-2', 'c-2', 'd-2', 'e-2']


def test_only_results_are_removed(tmp_path):
    results = ['hands.json', 'overlay.jpg', '2/hands.json', '2/crop.jpg', '3/left.obj', 'video.json', 'overlay.mp4']
    kept = ['notes.txt', '2/notes.txt', '2024/overlay.jpg', '2024/holiday.jpg', 'more/hands.json']
    for name in (*results, *kept, '.overlay.jpg.0123456789abcdef.partial', '.o.mp4.0123456789abcdef.partial.mp4'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('x')
    remove_results(tmp_path)
    remove_stale_partials(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob('*') if path.is_file()} == set(kept)
    assert not (tmp_path / '3').exists()
