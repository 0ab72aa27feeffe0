"""Pictures as they are made, in a browser on this machine: OpenCV without windows installs everywhere."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np

from utils.errors import UserError

PAGE = (
    b'<!doctype html><title>hands</title><style>body{margin:0;background:#1e1e1e;display:grid;place-items:center;'
    b'min-height:100vh}img{max-width:100%;max-height:100vh}</style><img src="/stream" alt="overlay of both hands">'
)
BOUNDARY = b'next-picture'
ANSWERS_WITHIN = 1.0  # s: how long a connection waits for a picture before it looks whether the view is closed


class LiveView:
    """http://localhost:PORT shows what ``show`` was given last; other machines cannot see it. Port 0 takes a free one.

    Raises UserError if the port is taken.
    """

    def __init__(self, port: int):
        self.jpeg, self.number, self.open, self.changed = b'', 0, True, threading.Condition()
        try:
            self.server = ThreadingHTTPServer(('127.0.0.1', port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f'--serve {port}: the port cannot be used ({error}); choose another one.') from None
        self.server.view, self.server.daemon_threads = self, True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f'http://localhost:{self.server.server_address[1]}'

    def show(self, picture: np.ndarray) -> None:
        """(H, W, 3) uint8 BGR."""
        with self.changed:
            self.jpeg, self.number = cv2.imencode('.jpg', picture)[1].tobytes(), self.number + 1
            self.changed.notify_all()

    def next_after(self, number: int) -> tuple[int, bytes]:
        """The newest picture, waiting a while for one that is newer than ``number``."""
        with self.changed:
            self.changed.wait_for(lambda: self.number > number or not self.open, ANSWERS_WITHIN)
            return self.number, self.jpeg

    def close(self) -> None:
        with self.changed:
            self.open = False
            self.changed.notify_all()
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == '/stream':
            self._head(b'multipart/x-mixed-replace; boundary=' + BOUNDARY)
            self._stream(self.server.view)
        elif self.path == '/':
            self._head(b'text/html')
            self.wfile.write(PAGE)
        else:
            self.send_error(404)

    def _head(self, content_type: bytes) -> None:
        self.send_response(200)
        self.send_header('Content-Type', content_type.decode())
        self.end_headers()

    def _stream(self, view: LiveView) -> None:
        sent = 0
        try:
            while view.open:
                number, jpeg = view.next_after(sent)
                if number > sent:
                    sent = number
                    self.wfile.write(
                        b'--%b\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%b\r\n'
                        % (BOUNDARY, len(jpeg), jpeg)
                    )
        except (BrokenPipeError, ConnectionResetError):
            pass  # the page was closed

    def log_message(self, *_) -> None:
        """No line for every request among the progress bars."""
