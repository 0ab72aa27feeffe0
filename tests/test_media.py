import cv2
import numpy as np
import pytest
from PIL import Image

from inference.media import Video, find_inputs, read_image, video_writer
from utils.errors import UserError

COLOURS = np.array(
    [[[10, 60, 200], [200, 120, 40]], [[90, 90, 90], [250, 250, 0]], [[0, 0, 0], [5, 128, 255]]], np.uint8
)


def large(colours=COLOURS):
    return cv2.resize(colours, (40, 60), interpolation=cv2.INTER_NEAREST)


# Pictures


def test_16_bits_grey_and_alpha_become_8_bit_bgr(tmp_path):
    picture = large()
    cv2.imwrite(str(tmp_path / 'deep.png'), picture.astype(np.uint16) * 257)
    assert np.array_equal(read_image(tmp_path / 'deep.png').image, picture)
    cv2.imwrite(str(tmp_path / 'grey.png'), picture[..., 0])
    assert np.array_equal(read_image(tmp_path / 'grey.png').image, np.repeat(picture[..., :1], 3, -1))
    alpha = np.full((*picture.shape[:2], 1), 255, np.uint8)
    alpha[:20], alpha[20:40] = 0, 51
    cv2.imwrite(str(tmp_path / 'clear.png'), np.concatenate([picture, alpha], -1))
    read = read_image(tmp_path / 'clear.png').image.astype(int)
    assert (read[:20] == 255).all() and np.array_equal(read[40:], picture[40:])
    assert np.abs(read[20:40] - (255 - 0.2 * (255 - picture[20:40].astype(int)))).max() <= 1
    cv2.imwrite(str(tmp_path / 'deep_clear.png'), np.concatenate([picture, alpha], -1).astype(np.uint16) * 257)
    assert np.abs(read_image(tmp_path / 'deep_clear.png').image.astype(int) - read).max() <= 1


@pytest.mark.parametrize(
    'orientation, turn',
    [(1, None), (3, cv2.ROTATE_180), (6, cv2.ROTATE_90_CLOCKWISE), (8, cv2.ROTATE_90_COUNTERCLOCKWISE)],
)
def test_exif_turns_a_picture_upright(tmp_path, orientation, turn):
    image = Image.fromarray(large()[..., ::-1])
    exif = image.getexif()
    exif[274] = orientation
    image.save(tmp_path / 'phone.jpg', exif=exif, quality=98, subsampling=0)
    expected = large() if turn is None else cv2.rotate(large(), turn)
    read = read_image(tmp_path / 'phone.jpg').image
    assert read.shape == expected.shape
    assert np.abs(read.astype(int) - expected).mean() < 4


def test_what_is_no_picture_is_one_sentence(tmp_path):
    (tmp_path / 'text.jpg').write_text('not a picture')
    (tmp_path / 'empty.png').write_bytes(b'')
    cv2.imwrite(str(tmp_path / 'cut.jpg'), large())
    (tmp_path / 'cut.jpg').write_bytes((tmp_path / 'cut.jpg').read_bytes()[:-200])
    for name in ('text.jpg', 'empty.png', 'cut.jpg'):
        with pytest.raises(UserError, match='not an image that OpenCV can read, or is truncated'):
            read_image(tmp_path / name)


def test_exif_says_the_focal_length_whichever_way_the_phone_is_held(tmp_path):
    image = Image.fromarray(np.zeros((240, 320, 3), np.uint8))
    exif = image.getexif()
    exif[274] = 6
    exif.get_ifd(0x8769)[0xA405] = 26  # FocalLengthIn35mmFilm
    for name in ('phone.jpg', 'phone.png'):
        image.save(tmp_path / name, exif=exif)
        focal = read_image(tmp_path / name).focal
        assert focal == pytest.approx(26 / 43.267 * 400, rel=1e-4)  # 400: the diagonal
    exif.get_ifd(0x8769)[0xA405] = 0
    image.save(tmp_path / 'unknown.jpg', exif=exif)
    image.save(tmp_path / 'none.jpg')
    (tmp_path / 'damaged.jpg').write_bytes((tmp_path / 'phone.jpg').read_bytes().replace(b'Exif', b'Exit'))
    for name in ('unknown.jpg', 'none.jpg', 'damaged.jpg'):
        assert read_image(tmp_path / name).focal is None


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
