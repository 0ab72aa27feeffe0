import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from videos import rotate_mp4, write_frames, write_timed

from inference.media import Camera, Clock, Video, find_inputs, is_truncated, read_photo, video_writer
from utils.errors import UserError


def test_the_focal_length_is_read_from_exif_in_either_orientation(tmp_path):
    image = Image.fromarray(np.zeros((240, 320, 3), np.uint8))
    exif = image.getexif()
    exif[274] = 6
    exif.get_ifd(0x8769)[0xA405] = 26  # FocalLengthIn35mmFilm
    for name in ('phone.jpg', 'phone.png'):
        image.save(tmp_path / name, exif=exif)
        photo = read_photo(tmp_path / name)
        assert photo.image.shape == (320, 240, 3)
        assert photo.focal == pytest.approx(26 / 43.267 * 400, rel=1e-4)  # 400: the diagonal
    exif.get_ifd(0x8769)[0xA405] = 0
    image.save(tmp_path / 'unknown.jpg', exif=exif)
    image.save(tmp_path / 'none.jpg')
    (tmp_path / 'damaged.jpg').write_bytes((tmp_path / 'phone.jpg').read_bytes().replace(b'Exif', b'Exit'))
    for name in ('unknown.jpg', 'none.jpg', 'damaged.jpg'):
        assert read_photo(tmp_path / name).focal is None


def test_an_unreadable_image_is_reported_with_advice(tmp_path):
    (tmp_path / 'text.jpg').write_text('not an image')
    with pytest.raises(UserError, match='^The file is not an image in a known format. Convert it to JPEG or PNG.$'):
        read_photo(tmp_path / 'text.jpg')


# Inputs


def test_inputs_are_sorted_and_listed_once(tmp_path, monkeypatch):
    for name in ('b.png', 'a.JPG', 'notes.txt', 'clip.mp4', 'odd.name'):
        (tmp_path / name).write_bytes(b'x')
    (tmp_path / 'deeper').mkdir()
    (tmp_path / 'deeper' / 'c.png').write_bytes(b'x')
    found = find_inputs([str(tmp_path), str(tmp_path / '*.png'), str(tmp_path / 'odd.name')])
    assert [path.name for path in found.images] == ['a.JPG', 'b.png', 'odd.name']  # a file given by name is tried
    assert [path.name for path in found.videos] == ['clip.mp4']
    assert [path.name for path in found.others] == ['notes.txt', 'odd.name']
    assert [path.name for path in find_inputs([str(tmp_path / '**' / 'c.*')]).images] == ['c.png']
    monkeypatch.chdir(tmp_path)
    assert len(find_inputs(['b.png', './b.png', str(tmp_path / 'b.png'), 'deeper/../b.png']).images) == 1


def test_files_of_operating_systems_are_left_out_unless_given_by_name(tmp_path):
    names = ['._a.jpg', '.DS_Store', '.hidden.png', 'Thumbs.db', 'THUMBS.DB', 'desktop.ini', '._clip.mp4']
    for name in ('a.jpg', *names):
        (tmp_path / name).write_bytes(b'x')
    (tmp_path / '__MACOSX').mkdir()
    (tmp_path / '__MACOSX' / 'b.jpg').write_bytes(b'x')
    found = find_inputs([str(tmp_path), str(tmp_path / '__MACOSX' / '*')])
    assert [path.name for path in found.images] == ['a.jpg'] and not found.videos and not found.others
    assert {path.name for path in found.system} == {*names, 'b.jpg'}
    assert find_inputs([str(tmp_path / '.hidden.png')]).images == [tmp_path / '.hidden.png']
    (tmp_path / 'a.jpg').unlink()
    with pytest.raises(UserError, match='contains no image or video'):
        find_inputs([str(tmp_path)])


def test_links_to_missing_files_are_kept_and_pipes_are_not_read(tmp_path):
    (tmp_path / 'a.jpg').symlink_to('missing.jpg')
    os.mkfifo(tmp_path / 'b.jpg')
    assert [path.name for path in find_inputs([str(tmp_path)]).images] == ['a.jpg']


def test_no_input_is_one_sentence(tmp_path):
    (tmp_path / 'notes.txt').write_text('x')
    for word, message in (
        (tmp_path, 'contains no image or video (of 1 files)'),
        (tmp_path / '*.jpg', 'No file matches the pattern'),
        (tmp_path / 'a.jpg', 'no file or folder'),
    ):
        with pytest.raises(UserError) as caught:
            find_inputs([str(word)])
        assert message in str(caught.value) and str(word) in str(caught.value)


# Videos

PHONE = [number / 30 for number in range(10)] + [0.4, 0.5]  # slower in the dark


def times(path: Path) -> list[float]:
    return [frame.time_s for frame in Video(path)]


def numbers(path: Path) -> list[int]:
    """Of the frames of ``write_frames``."""
    return [round(frame.image.mean() / 20) for frame in Video(path)]


@pytest.mark.parametrize(
    'suffix, fourcc', [('avi', 'MJPG'), ('mp4', 'mp4v'), ('mkv', 'mp4v'), ('webm', 'VP80'), ('ts', 'mpg2')]
)
def test_a_video_yields_every_frame_in_order_with_its_time(tmp_path, suffix, fourcc):
    path = tmp_path / f'clip.{suffix}'
    write_frames(path, 7, fourcc)
    assert numbers(path) == list(range(7))
    assert times(path) == pytest.approx([number / 25 for number in range(7)])
    timing = Video(path).timing
    assert (timing.frames, timing.rate, timing.damage, timing.truncated) == (7, 25, [], False)
    assert Video(path, limit=3).timing.frames == len(list(Video(path, limit=3))) == 3


def test_frames_that_are_not_evenly_spaced_keep_their_times(tmp_path):
    write_timed(tmp_path / 'phone.mp4', PHONE)
    assert times(tmp_path / 'phone.mp4') == pytest.approx(PHONE, abs=1e-3)
    assert Video(tmp_path / 'phone.mp4').timing.rate == pytest.approx(30, abs=0.1)


def test_the_delays_of_a_gif_are_kept(tmp_path):
    frames = [Image.new('L', (64, 48), 40 * number) for number in range(6)]
    delays = [100, 40, 40, 300, 20, 100]
    frames[0].save(tmp_path / 'a.gif', save_all=True, append_images=frames[1:], duration=delays)
    assert times(tmp_path / 'a.gif') == pytest.approx([0, 0.1, 0.14, 0.18, 0.48, 0.5])


@pytest.mark.parametrize('count', [1, 2])
def test_a_video_of_one_frame(tmp_path, count):
    write_frames(tmp_path / 'clip.mp4', count)
    assert numbers(tmp_path / 'clip.mp4') == list(range(count))
    assert Video(tmp_path / 'clip.mp4').timing.rate == pytest.approx(25, abs=0.1)


@pytest.mark.parametrize(
    'positions, expected',
    [
        ([5, 5.1, 5.2], [0, 0.1, 0.2]),  # a start offset
        ([0, 0.1, 0.0, 0.0], [0, 0.1, 0.2, 0.3]),  # frames without a time stamp
        ([3, 3.1, 0, 0.1, 0.3], [0, 0.1, 0.2, 0.3, 0.5]),  # times that begin anew, as in joined streams
    ],
)
def test_times_start_at_0_and_increase(positions, expected):
    clock = Clock(0.1)
    assert [clock.time(position) for position in positions] == pytest.approx(expected)


def test_a_video_is_turned_as_a_phone_was_held(tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / 'a.mp4'), cv2.VideoWriter.fourcc(*'mp4v'), 25, (64, 48))
    writer.write(np.concatenate([np.full((48, 32, 3), 255, np.uint8), np.zeros((48, 32, 3), np.uint8)], 1))
    writer.release()
    rotate_mp4(tmp_path / 'a.mp4')
    (frame,) = Video(tmp_path / 'a.mp4')
    assert frame.image.shape == Video(tmp_path / 'a.mp4').first.shape == (64, 48, 3)
    assert frame.image[:24].min() > 200 and frame.image[-24:].max() < 50  # the left side is up


def test_a_truncated_video_yields_what_it_holds_and_is_reported(tmp_path):
    write_frames(tmp_path / 'clip.avi', 12, 'MJPG', (320, 240))
    content = (tmp_path / 'clip.avi').read_bytes()
    (tmp_path / 'clip.avi').write_bytes(content[: len(content) // 2])
    video = Video(tmp_path / 'clip.avi')
    assert 0 < video.timing.frames == len(list(video)) < 12 and video.timing.truncated
    write_frames(tmp_path / 'clip.mp4', 12)
    assert not is_truncated(tmp_path / 'clip.mp4')
    (tmp_path / 'clip.mp4').write_bytes((tmp_path / 'clip.mp4').read_bytes()[:-5])
    assert is_truncated(tmp_path / 'clip.mp4')


def test_broken_frames_are_counted_and_the_rest_is_read(tmp_path, capfd):
    write_frames(tmp_path / 'clip.mp4', 12)
    content = bytearray((tmp_path / 'clip.mp4').read_bytes())
    data = content.index(b'mdat') + 4
    frame = content.index(b'\0\0\1\xb6', content.index(b'\0\0\1\xb6', data) + 4)
    for _ in range(3):  # the third to fifth frame
        frame = content.index(b'\0\0\1\xb6', frame + 4)
        content[frame + 3] = 0xFF
    (tmp_path / 'clip.mp4').write_bytes(content)
    video = Video(tmp_path / 'clip.mp4')
    assert video.timing.frames == len(list(video)) == 9
    assert sum(place.broken for place in video.timing.damage) == 3
    assert times(tmp_path / 'clip.mp4')[-1] == pytest.approx(11 / 25)
    assert video.timing.damage[0].message


NAMES = {
    'percent': b'50%03d %s',
    'colon': b'10:30 a:b',
    'dash': b'-rf',
    'newline': b'a\nb',
    'spaces': b'  a  b  ',
    'dots': b'..a..b..',
    'latin-1': b'H\xe4nde',
    'umlaut': 'Hände'.encode(),
    'decomposed': 'Ha\u0308nde'.encode(),
    'emoji': '\U0001f590\ufe0f'.encode(),
    'long': b'x' * 240,
    'quotes': b'a\'b"c`d$e',
}


@pytest.mark.parametrize('name', NAMES)
def test_a_video_may_have_any_name_and_lie_in_any_folder(tmp_path, name):
    write_frames(tmp_path / 'clip.mp4', 3)
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b'/' + NAMES[name]))
    folder.mkdir()
    path = Path(os.fsdecode(os.fsencode(folder) + b'/' + NAMES[name] + b'.mp4'))
    (tmp_path / 'clip.mp4').rename(path)
    assert numbers(path) == [0, 1, 2]
    with video_writer(folder / 'overlay.mp4', rate=25, width=64, height=48) as writer:
        writer.write(np.zeros((48, 64, 3), np.uint8), 0)
    assert sorted(folder.iterdir()) == sorted([path, folder / 'overlay.mp4'])
    assert numbers(folder / 'overlay.mp4') == [0]


def write_overlay(path: Path, rate: float, moments: list[float]) -> None:
    with video_writer(path, rate=rate, width=64, height=48) as writer:
        for number, moment in enumerate(moments):
            writer.write(np.full((48, 64, 3), 20 * number, np.uint8), moment)


def test_a_video_is_written_at_the_speed_of_its_times(tmp_path):
    path = tmp_path / 'new' / 'overlay.mp4'
    write_overlay(path, 25, [number / 25 for number in range(7)])
    assert [file.name for file in path.parent.iterdir()] == ['overlay.mp4']
    assert numbers(path) == list(range(7)) and Video(path).timing.rate == 25
    write_overlay(path, 30, PHONE)
    assert numbers(path) == [*range(9), 9, 9, 9, 10, 10, 10, 11]
    write_overlay(path, 10, [0, 0.01, 0.1, 0.2])  # faster than the rate
    assert numbers(path) == [1, 2, 3]
    write_overlay(path, 1, [0, 100_000, 100_001])
    assert numbers(path) == [0] * 60 + [1, 2]


def test_a_frame_of_another_size_is_resized(tmp_path):
    with video_writer(tmp_path / 'a.mp4', rate=25, width=64, height=48) as writer:
        writer.write(np.full((100, 100, 3), 100, np.uint8), 0)
        writer.write(np.full((48, 64, 3), 100, np.uint8), 1 / 25)
    assert numbers(tmp_path / 'a.mp4') == [5, 5]


def test_a_video_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), video_writer(tmp_path / 'clip.mp4', rate=25, width=64, height=48) as writer:
        writer.write(np.zeros((48, 64, 3), np.uint8), 0)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_file_or_camera_that_is_no_video_is_one_sentence(tmp_path):
    (tmp_path / 'clip.mp4').write_text('not a video')
    (tmp_path / 'empty.mp4').write_bytes(b'')
    for name in ('clip.mp4', 'empty.mp4'):
        with pytest.raises(UserError, match='not a video'):
            Video(tmp_path / name)
    with pytest.raises(UserError, match='no camera with this number'):
        Camera(99)
