import urllib.error
import urllib.request

import cv2
import numpy as np
import pytest

from inference.live_view import LiveView
from utils.errors import UserError


def next_image(stream) -> np.ndarray:
    assert stream.readline() == b'--next-frame\r\n'
    headers = dict(line.decode().strip().split(': ') for line in iter(stream.readline, b'\r\n'))
    jpeg = stream.read(int(headers['Content-Length']))
    assert stream.readline() == b'\r\n'
    return cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)


def test_the_page_streams_the_latest_image():
    view = LiveView(0)
    with urllib.request.urlopen(view.address, timeout=5) as page:
        assert b'src="/stream"' in page.read()
    view.show(np.full((20, 30, 3), 40, np.uint8))
    with urllib.request.urlopen(f'{view.address}/stream', timeout=5) as stream:
        for value in (40, 200):
            image = next_image(stream)
            assert image.shape == (20, 30, 3) and abs(image.mean() - value) < 3
            view.show(np.full((20, 30, 3), 200, np.uint8))
    with pytest.raises(urllib.error.HTTPError, match='404'):
        urllib.request.urlopen(f'{view.address}/etc/passwd', timeout=5)
    view.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(view.address, timeout=2)


def test_an_occupied_port_is_reported_in_one_sentence():
    view = LiveView(0)
    port = view.server.server_address[1]
    with pytest.raises(UserError, match=f'Port {port} cannot be used'):
        LiveView(port)
    view.close()
