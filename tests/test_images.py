import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image

from utils.images import ImageError, announced_size, decode_image, exif_orientation, focal_length, read_image

RNG = np.random.default_rng(0)
PHOTO = cv2.resize(RNG.integers(0, 255, (24, 24, 3), np.uint8), (192, 192), interpolation=cv2.INTER_CUBIC)
COLOURS = np.array(
    [[[10, 60, 200], [200, 120, 40]], [[90, 90, 90], [250, 250, 0]], [[0, 0, 0], [5, 128, 255]]], np.uint8
)
BLOCKS = cv2.resize(COLOURS, (40, 60), interpolation=cv2.INTER_NEAREST)  # (60, 40, 3) BGR
SQUARE = cv2.resize(COLOURS, (60, 60), interpolation=cv2.INTER_NEAREST)
TURNS = {
    1: lambda image: image,
    2: lambda image: cv2.flip(image, 1),
    3: lambda image: cv2.rotate(image, cv2.ROTATE_180),
    4: lambda image: cv2.flip(image, 0),
    5: lambda image: cv2.transpose(image),
    6: lambda image: cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE),
    7: lambda image: cv2.rotate(cv2.transpose(image), cv2.ROTATE_180),
    8: lambda image: cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE),
}


def jpeg(image: np.ndarray = PHOTO, *options: int) -> bytes:
    return cv2.imencode('.jpg', image, options)[1].tobytes()


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def rgb(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image[..., ::-1]))


def with_orientation(image: Image.Image, form: str, orientation: int, **options) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    if form == 'TIFF':
        return encoded(image, form, tiffinfo={274: orientation}, **options)
    return encoded(image, form, exif=exif, **options)


# Damage

JPEG_KINDS = {
    'baseline': (),
    'optimised': (cv2.IMWRITE_JPEG_OPTIMIZE, 1),
    'progressive': (cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
    'restarts': (cv2.IMWRITE_JPEG_RST_INTERVAL, 4),
}


@pytest.fixture(params=JPEG_KINDS)
def content(request) -> bytes:
    return jpeg(PHOTO, *JPEG_KINDS[request.param])


def test_a_whole_jpeg_is_decoded_as_opencv_does(content):
    assert np.array_equal(decode_image(content), cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR))
    assert np.array_equal(decode_image(memoryview(content)), decode_image(content))


@pytest.mark.parametrize('tail', [b'', b'\xff\xd9'], ids=['', 'with an end marker'])
def test_a_truncated_jpeg_is_refused_wherever_it_ends(content, tail):
    for length in (*range(3, 700, 23), *range(700, len(content) - 2, 97), len(content) - 3):
        with pytest.raises(ImageError, match='damaged or truncated'):
            decode_image(content[:length] + tail)


@pytest.mark.parametrize('filling', [0x00, 0xFF, 0xA5])
def test_a_jpeg_with_a_hole_is_refused(content, filling):
    size = 1024
    for begin in range(800, len(content) - size, 777):
        with pytest.raises(ImageError, match='damaged or truncated'):
            decode_image(content[:begin] + bytes([filling]) * size + content[begin + size :])


def test_a_jpeg_with_bytes_removed_or_repeated_is_refused(content):
    middle = len(content) // 2
    for damaged in (content[:middle] + content[middle + 512 :], content[:middle] + content[middle - 512 :]):
        with pytest.raises(ImageError, match='damaged or truncated'):
            decode_image(damaged)


@pytest.mark.parametrize('tail', [bytes(5000), b'\0\0\0\x20ftypmp42' + RNG.bytes(4000), jpeg(BLOCKS), b'\xff\xd9'])
def test_data_behind_the_end_of_a_jpeg_are_ignored(content, tail):
    assert np.array_equal(decode_image(content + tail), decode_image(content))


@pytest.mark.parametrize('missing', [1, 2])
def test_a_jpeg_that_lacks_only_its_end_marker_is_whole(content, missing):
    assert np.array_equal(decode_image(content[:-missing]), decode_image(content))


def test_odd_scan_parameters_neither_count_as_damage_nor_hide_it():
    content = bytearray(jpeg())
    scan = content.index(b'\xff\xda')
    content[scan + 11 : scan + 14] = 1, 7, 0x12
    assert np.array_equal(decode_image(bytes(content)), decode_image(jpeg()))
    with pytest.raises(ImageError, match='premature end'):
        decode_image(bytes(content[: len(content) // 2]))


@pytest.mark.parametrize(
    'form, options',
    [
        ('PNG', {}),
        ('WEBP', {'lossless': True}),
        ('WEBP', {'quality': 90}),
        ('TIFF', {}),
        ('TIFF', {'compression': 'tiff_lzw'}),
        ('BMP', {}),
        ('PPM', {}),
        ('JPEG2000', {}),
        ('AVIF', {'quality': 90}),
    ],
)
def test_a_truncated_file_of_another_format_is_refused(form, options):
    content = encoded(rgb(PHOTO), form, **options)
    assert np.abs(decode_image(content).astype(int) - PHOTO).mean() < 6  # lossy ones
    for share in (0.3, 0.6, 0.9, 0.99):
        with pytest.raises(ImageError):
            decode_image(content[: int(share * len(content))])


@pytest.mark.parametrize('form', ['PNG', 'AVIF'])
def test_a_changed_byte_in_a_format_that_notices_is_refused(form):
    content = bytearray(encoded(rgb(PHOTO), form))
    content[len(content) * 2 // 3] ^= 0x10
    with pytest.raises(ImageError, match='damaged'):
        decode_image(bytes(content))


@pytest.mark.parametrize(
    'content, reason',
    [
        (b'', '^empty$'),
        (b'not an image', 'not an image in a known format'),
        (b'\xff\xd8', 'damaged or truncated'),
        (b'\xff\xd8\xff', 'damaged or truncated'),
        (b'\0\0\0\x18ftypheic\0\0\0\0', 'in HEIC format'),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'not an image in a known format'),
    ],
)
def test_what_is_no_image_is_refused(content, reason):
    with pytest.raises(ImageError, match=reason) as caught:
        decode_image(content)
    assert caught.value.advice.endswith('.')


def test_standard_error_keeps_what_others_print_and_loses_what_the_decoder_does(capfd):
    stop = threading.Event()

    def chat():
        number = 0
        while not stop.is_set():
            os.write(2, b'line %d\n' % (number := number + 1))
            time.sleep(1e-4)
        os.write(2, b'last %d\n' % number)

    thread = threading.Thread(target=chat)
    thread.start()
    for _ in range(30):
        decode_image(jpeg())
        with pytest.raises(ImageError, match='premature end'):
            decode_image(jpeg()[:-900])
    stop.set()
    thread.join()
    lines = capfd.readouterr().err.splitlines()
    assert not [line for line in lines if 'JPEG' in line]
    assert {f'line {number}' for number in range(1, int(lines[-1].split()[1]) + 1)} <= set(lines)


def test_processes_do_not_see_each_others_warnings():
    """Forked workers inherit the reader in the middle of its life."""
    decode_image(jpeg())
    children = []
    for number in range(2):
        child = os.fork()
        if child == 0:
            wrong = 0
            for _ in range(100):
                try:
                    decode_image(jpeg()[: -900 if number else None])
                    wrong += number
                except ImageError:
                    wrong += 1 - number
            os._exit(wrong > 0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]


def test_a_process_without_standard_error_reads_and_refuses(tmp_path):
    (tmp_path / 'a.jpg').write_bytes(jpeg())
    (tmp_path / 'b.jpg').write_bytes(jpeg()[:-900])
    program = (
        f'import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n'
        'from utils.images import ImageError, read_image\n'
        "print(read_image('a.jpg').shape)\n"
        "try: read_image('b.jpg')\nexcept ImageError as error: print(error)"
    )
    run = subprocess.run(
        ['/bin/sh', '-c', 'exec "$0" -c "$1" 2>&-', sys.executable, program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.stdout.startswith('(192, 192, 3)\ndamaged or truncated')


# Orientation


@pytest.mark.parametrize('orientation', TURNS)
@pytest.mark.parametrize(
    'form, options',
    [
        ('JPEG', {'quality': 98, 'subsampling': 0}),
        ('PNG', {}),
        ('WEBP', {'lossless': True}),
        ('TIFF', {}),
        ('TIFF', {'compression': 'tiff_lzw'}),
        ('AVIF', {'quality': 98}),
    ],
)
def test_images_are_turned_upright(form, options, orientation):
    for image in (BLOCKS, SQUARE):
        read, expected = (
            decode_image(with_orientation(rgb(image), form, orientation, **options)),
            TURNS[orientation](image),
        )
        assert read.shape == expected.shape
        assert np.abs(read.astype(int) - expected).mean() < (0.1 if form in ('PNG', 'WEBP', 'TIFF') else 6)


@pytest.mark.parametrize('orientation', TURNS)
@pytest.mark.parametrize('form, options', [('PNG', {}), ('WEBP', {'lossless': True, 'exact': True}), ('TIFF', {})])
@pytest.mark.parametrize('image', [BLOCKS, SQUARE], ids=['oblong', 'square'])
def test_alpha_is_turned_with_its_image(image, form, options, orientation):
    alpha = np.full(image.shape[:2], 255, np.uint8)
    alpha[: len(alpha) // 2] = 0
    with_alpha = rgb(image)
    with_alpha.putalpha(Image.fromarray(alpha))
    expected = np.where(alpha[..., None] == 0, 255, image).astype(np.uint8)
    read = decode_image(with_orientation(with_alpha, form, orientation, **options))
    assert np.array_equal(read, TURNS[orientation](expected))


def test_orientation_is_found_behind_another_app1_segment():
    content = with_orientation(rgb(BLOCKS), 'JPEG', 6, quality=98, subsampling=0)
    name = b'http://ns.adobe.com/xap/1.0/\0'
    xmp = name + b'<x:xmpmeta/>' + b' ' * 3000
    content = content[:2] + b'\xff\xe1' + (len(xmp) + 2).to_bytes(2, 'big') + xmp + content[2:]
    assert decode_image(content).shape == (40, 60, 3)


def test_metadata_of_an_image_that_pillow_takes_to_be_too_large_are_read():
    image, exif = Image.new('RGB', (64, 48)), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FocalLengthIn35mmFilm] = 24
    content = bytearray(encoded(image, 'JPEG', exif=exif))
    size = content.index(b'\xff\xc0') + 5
    content[size : size + 4] = (12240).to_bytes(2, 'big') + (16320).to_bytes(2, 'big')  # a phone's 200 megapixels
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(content))
    assert exif_orientation(bytes(content)) == 6
    assert focal_length(bytes(content), height=12240, width=16320) == pytest.approx(24 * 20400 / 43.267, 1e-4)


@pytest.mark.parametrize('orientation', [0, 9, 65535])
def test_an_unknown_orientation_turns_nothing(orientation):
    assert decode_image(with_orientation(rgb(BLOCKS), 'JPEG', orientation)).shape == (60, 40, 3)


def test_damaged_exif_turns_nothing():
    content = with_orientation(rgb(BLOCKS), 'JPEG', 6)
    begin = content.index(b'Exif\0\0') + 6
    for position in range(begin, begin + 26):
        for value in (0, 0x7F, 0xFF):
            damaged = content[:position] + bytes([value]) + content[position + 1 :]
            assert decode_image(damaged).size == BLOCKS.size


# Depth, grey, alpha, palettes, several frames


def test_16_bits_grey_and_alpha_become_8_bit_bgr():
    def png(image: np.ndarray) -> bytes:
        return cv2.imencode('.png', image)[1].tobytes()

    deep = BLOCKS.astype(np.uint16) * 257
    grey = np.repeat(BLOCKS[..., :1], 3, -1)
    assert np.array_equal(decode_image(png(deep)), BLOCKS)
    assert np.array_equal(decode_image(cv2.imencode('.tif', deep)[1].tobytes()), BLOCKS)
    for content in (png(BLOCKS[..., 0]), png(deep[..., 0]), cv2.imencode('.tif', deep[..., 0])[1].tobytes()):
        assert np.array_equal(decode_image(content), grey)
    alpha = np.full((*BLOCKS.shape[:2], 1), 255, np.uint8)
    alpha[:20], alpha[20:40] = 0, 51
    read = decode_image(png(np.concatenate([BLOCKS, alpha], -1))).astype(int)
    assert (read[:20] == 255).all() and np.array_equal(read[40:], BLOCKS[40:])
    assert np.abs(read[20:40] - (255 - 0.2 * (255 - BLOCKS[20:40].astype(int)))).max() <= 1
    deep_alpha = png(np.concatenate([BLOCKS, alpha], -1).astype(np.uint16) * 257)
    assert np.abs(decode_image(deep_alpha).astype(int) - read).max() <= 1


def test_other_modes_show_what_a_viewer_shows():
    alpha = np.full(BLOCKS.shape[:2], 255, np.uint8)
    alpha[:20] = 0
    grey = rgb(BLOCKS).convert('L')
    grey_alpha = Image.merge('LA', (grey, Image.fromarray(alpha)))
    hidden = np.where(alpha[..., None] == 0, 255, np.asarray(grey)[..., None]).repeat(3, -1)
    for form in ('PNG', 'TIFF'):
        assert np.array_equal(decode_image(encoded(grey_alpha, form)), hidden)
    palette = rgb(BLOCKS).quantize(8)
    shown = np.asarray(palette.convert('RGB'))[..., ::-1]
    for form in ('PNG', 'GIF', 'TIFF', 'BMP'):
        assert np.array_equal(decode_image(encoded(palette, form)), shown)
    first = palette.getpixel((0, 0))
    clear = np.where((np.asarray(palette) == first)[..., None], 255, shown)
    assert np.array_equal(decode_image(encoded(palette, 'PNG', transparency=first)), clear)
    for form in ('JPEG', 'TIFF'):
        cmyk = decode_image(encoded(rgb(BLOCKS).convert('CMYK'), form, quality=98)).astype(int)
        assert np.abs(cmyk - BLOCKS).mean() < 6
    floats = Image.fromarray(np.linspace(0, 1, 2400, dtype=np.float32).reshape(60, 40))
    assert np.abs(decode_image(encoded(floats, 'TIFF'))[..., 0] - 255 * np.asarray(floats)).max() <= 0.5


@pytest.mark.parametrize('form', ['PNG', 'WEBP', 'GIF', 'TIFF', 'AVIF'])
def test_of_several_frames_the_first_is_read(form):
    frames = [Image.new('RGB', (64, 48), colour) for colour in ('white', 'black', 'black')]
    content = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    assert (decode_image(content) > 250).all()


def test_read_image_reports_a_missing_file_as_such(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / 'none.jpg')


@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.webp', '.bmp'])
def test_the_size_that_a_file_announces(suffix):
    content = cv2.imencode(suffix, np.zeros((30, 20, 3), np.uint8))[1].tobytes()
    assert announced_size(content) == (30, 20)
    assert announced_size(content[:8]) is None and announced_size(b'') is None
