"""Show frames in a local browser: unlike OpenCV's windows, this also works with headless builds of OpenCV."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np

from utils.errors import UserError

PAGE = (
    b'<!doctype html><title>hands</title><style>body{margin:0;background:#1e1e1e;display:grid;place-items:center;'
    b'min-height:100vh}img{max-width:100%;max-height:100vh}</style><img src="/stream" alt="overlay of both hands">'
)
BOUNDARY = b'next-frame'
POLL_INTERVAL = 1.0  # s: how long a connection waits for a frame before it checks whether the view was closed


class LiveView:
    """Serves the frame last passed to ``show`` at http://localhost:PORT, to this machine only.

    Port 0 selects a free port. Raises UserError if the port cannot be used.
    """

    def __init__(self, port: int):
        self.jpeg, self.number, self.open, self.changed = b'', 0, True, threading.Condition()
        try:
            self.server = _Server(port, self)
        except (OSError, OverflowError) as error:
            raise UserError(f'Port {port} cannot be used ({error}). Choose another one with --serve.') from None
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f'http://localhost:{self.server.server_port}'

    def show(self, image: np.ndarray) -> None:
        """Replace the frame on display by ``image`` (H, W, 3) uint8 BGR."""
        with self.changed:
            self.jpeg, self.number = cv2.imencode('.jpg', image)[1].tobytes(), self.number + 1
            self.changed.notify_all()

    def next_after(self, number: int) -> tuple[int, bytes]:
        """(number, JPEG) of the latest frame; waits up to POLL_INTERVAL for one newer than ``number``."""
        with self.changed:
            self.changed.wait_for(lambda: self.number > number or not self.open, POLL_INTERVAL)
            return self.number, self.jpeg

    def close(self) -> None:
        with self.changed:
            self.open = False
            self.changed.notify_all()
        self.server.shutdown()
        self.server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, view: LiveView):
        super().__init__(('127.0.0.1', port), _Handler)
        self.view = view


class _Handler(BaseHTTPRequestHandler):
    server: _Server

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
            pass  # the browser closed the page

    def log_message(self, *_) -> None:
        """Log nothing: request lines would break the progress bars."""
