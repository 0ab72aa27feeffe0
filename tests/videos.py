"""Small video files, with the time stamps and the rotation that a test needs."""

import struct
from pathlib import Path

import cv2
import numpy as np


def write_frames(path, count, fourcc='mp4v', size=(64, 48), rate=25):
    """Frame n is 20 n bright all over."""
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*fourcc), rate, size)
    for number in range(count):
        writer.write(np.full((size[1], size[0], 3), 20 * number, np.uint8))
    writer.release()


def write_timed(path: Path, times: list[float], **options) -> None:
    """An MP4 whose frames are at ``times`` (s, the first at 0), as phones write them: by a table of durations."""
    write_frames(path, len(times), **options)
    content = path.read_bytes()
    timescale = int.from_bytes(content[(mdhd := content.index(b'mdhd')) + 16 : mdhd + 20], 'big')
    durations = [round(timescale * length) for length in np.diff([*times, 2 * times[-1] - times[-2]])]
    table = struct.pack('>II', 0, len(durations)) + b''.join(struct.pack('>II', 1, length) for length in durations)
    old = content.index(b'stts') - 4
    old_length = int.from_bytes(content[old : old + 4], 'big')
    longer = len(table) + 8 - old_length
    changed = bytearray(content)
    for box in (b'moov', b'trak', b'mdia', b'minf', b'stbl', b'stts'):  # which contain each other
        begin = content.index(box) - 4
        changed[begin : begin + 4] = (int.from_bytes(content[begin : begin + 4], 'big') + longer).to_bytes(4, 'big')
    for box, field in ((b'mvhd', 20), (b'tkhd', 24), (b'mdhd', 20), (b'elst', 12)):
        if box in content:  # a duration, beyond which frames would be cut
            begin = content.index(box) + field
            changed[begin : begin + 4] = (0xFFFFFF).to_bytes(4, 'big')
    changed[old + 8 : old + old_length] = table
    path.write_bytes(changed)


def rotate_mp4(path: Path) -> None:
    """Demand a quarter turn clockwise, as phones do that are held upright."""
    content = bytearray(path.read_bytes())
    begin = content.index(b'tkhd') + 44  # the matrix, of 16.16 fixed-point numbers
    content[begin : begin + 36] = struct.pack('>9i', 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)
    path.write_bytes(content)
