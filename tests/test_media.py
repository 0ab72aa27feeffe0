import cv2
import numpy as np
import pytest
from PIL import Image

from inference.media import Video, find_inputs, read_photo, video_writer
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


def test_inputs_are_sorted_told_apart_and_come_once(tmp_path):
    for name in ('b.png', 'a.JPG', 'notes.txt', 'clip.mp4', 'odd.name'):
        (tmp_path / name).write_bytes(b'x')
    (tmp_path / 'deeper').mkdir()
    (tmp_path / 'deeper' / 'c.png').write_bytes(b'x')
    found = find_inputs([str(tmp_path), str(tmp_path / '*.png'), str(tmp_path / 'odd.name')])
    assert [path.name for path in found.images] == ['a.JPG', 'b.png', 'odd.name']  # a named file is tried
    assert [path.name for path in found.videos] == ['clip.mp4']
    assert [path.name for path in found.others] == ['notes.txt', 'odd.name']
    assert [path.name for path in find_inputs([str(tmp_path / '**' / 'c.*')]).images] == ['c.png']


def test_nothing_to_find_is_one_sentence(tmp_path):
    (tmp_path / 'notes.txt').write_text('x')
    for word, says in (
        (tmp_path, 'contains no image or video (of 1 files)'),
        (tmp_path / '*.jpg', 'No file matches the pattern'),
        (tmp_path / 'a.jpg', 'no file or folder'),
    ):
        with pytest.raises(UserError) as caught:
            find_inputs([str(word)])
        assert says in str(caught.value) and str(word) in str(caught.value)


# Videos


def write_frames(path, count, fourcc='mp4v', size=(64, 48)):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*fourcc), 25, size)
    for number in range(count):
        writer.write(np.full((size[1], size[0], 3), 20 * number, np.uint8))
    writer.release()


def test_a_video_gives_every_frame_in_order(tmp_path):
    with video_writer(tmp_path / 'new' / 'clip.mp4', rate=25, width=64, height=48) as writer:
        for number in range(7):
            writer.write(np.full((48, 64, 3), 20 * number, np.uint8))
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['clip.mp4']
    video = Video(tmp_path / 'new' / 'clip.mp4')
    assert (video.rate, video.announced) == (25, 7)
    assert [round(frame.mean() / 20) for frame in video] == list(range(7)) and video.read == 7
    video.close()


def test_a_video_cut_short_gives_what_it_holds(tmp_path):
    write_frames(tmp_path / 'clip.avi', 12, 'MJPG', (320, 240))
    content = (tmp_path / 'clip.avi').read_bytes()
    (tmp_path / 'clip.avi').write_bytes(content[: len(content) // 2])
    video = Video(tmp_path / 'clip.avi')
    assert 0 < sum(1 for _ in video) < 12
    video.close()


def test_a_video_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), video_writer(tmp_path / 'clip.mp4', rate=25, width=64, height=48) as writer:
        writer.write(np.zeros((48, 64, 3), np.uint8))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_video_is_one_sentence(tmp_path):
    (tmp_path / 'clip.mp4').write_text('not a video')
    with pytest.raises(UserError, match='not a video'):
        Video(tmp_path / 'clip.mp4')
    with pytest.raises(UserError, match='no camera with this number'):
        Video(99)
