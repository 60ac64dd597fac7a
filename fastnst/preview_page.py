"""A page on this machine that shows a stream of pictures in any browser: Motion JPEG over HTTP, no window, no other library.

Listens on 127.0.0.1 alone and answers only to that name, so that no other machine and no other web page sees the camera.
"""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>fastnst</title>
<style>body{margin:0;background:#111;color:#ccc;font:16px system-ui;display:flex;flex-direction:column;align-items:center;height:100vh}
img{flex:1;min-height:0;max-width:100vw;object-fit:contain}p{margin:.5em}</style>
<img src="/stream" alt="stylized camera"><p id="text"></p>
<script>setInterval(async()=>{try{text.textContent=(await(await fetch("/status")).json()).text}catch{text.textContent="ended"}},500)</script></html>
"""
_BOUNDARY = "frame"
_QUALITY = 85  # of JPEGs


class PreviewPage:
    """Context in which ``url`` shows the picture that was last given to ``show``. ``port`` 0 takes any free one."""

    def __init__(self, port: int = 8765) -> None:
        self._changed = threading.Condition()
        self._pixels: np.ndarray | None = None
        self._number = 0
        self._text = "waiting for the first frame"
        self._closed = False
        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), self._request_handler())
        except OSError as error:
            raise OSError(error.errno, f"no preview page on port {port}: {error.strerror}; choose another --port, or 0 for any that is free") from error
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="preview page", daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/"

    def show(self, pixels: np.ndarray, text: str = "") -> None:
        """Show uint8 RGB ``(H, W, 3)`` and a line of text below. It is encoded only when a browser asks."""
        with self._changed:
            self._pixels, self._text = pixels, text
            self._number += 1
            self._changed.notify_all()

    def __enter__(self) -> "PreviewPage":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    def _next(self, seen: int) -> tuple[int, bytes] | None:
        """The newest picture as a JPEG once there is one newer than ``seen``; ``None`` when the page closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._number > seen)
            if self._closed:
                return None
            number, pixels = self._number, self._pixels
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=_QUALITY)
        return number, file.getvalue()

    def _request_handler(self) -> type[BaseHTTPRequestHandler]:
        page = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                host = self.headers.get("Host", "").rsplit(":", 1)[0]
                if host not in ("127.0.0.1", "localhost"):  # a foreign page whose name was made to point here
                    self.send_error(403)
                elif self.path == "/":
                    self._send("text/html; charset=utf-8", _PAGE.encode())
                elif self.path == "/status":
                    self._send("application/json", json.dumps({"text": page._text, "frames": page._number}).encode())
                elif self.path == "/stream":
                    self._stream()
                else:
                    self.send_error(404)

            def _send(self, kind: str, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(body)

            def _stream(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", f"multipart/x-mixed-replace; boundary={_BOUNDARY}")
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                seen = 0
                try:
                    while (newest := page._next(seen)) is not None:
                        seen, jpeg = newest
                        self.wfile.write(f"--{_BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n".encode() + jpeg + b"\r\n")
                except OSError:  # the browser has gone
                    pass

            def log_message(self, *_: object) -> None:
                pass

        return Handler
