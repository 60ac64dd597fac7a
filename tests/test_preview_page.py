"""The page on this machine: what a browser gets, who is refused, and that it closes."""

import http.client
import io
import json
import threading
import urllib.request

import numpy as np
import pytest
from PIL import Image

from fastnst.preview_page import PreviewPage


def picture(level: int) -> np.ndarray:
    return np.full((12, 16, 3), level, np.uint8)


def next_picture(stream) -> np.ndarray:
    """One part of a Motion JPEG stream."""
    assert stream.readline() == b"--frame\r\n"
    assert stream.readline() == b"Content-Type: image/jpeg\r\n"
    length = int(stream.readline().split(b":")[1])
    assert stream.readline() == b"\r\n"
    jpeg = stream.read(length)
    assert stream.readline() == b"\r\n"
    return np.asarray(Image.open(io.BytesIO(jpeg)))


def test_a_browser_sees_the_pictures_as_they_come():
    with PreviewPage(port=0) as page:
        index = urllib.request.urlopen(page.url, timeout=5).read().decode()
        assert 'src="/stream"' in index
        page.show(picture(50), "first")
        with urllib.request.urlopen(page.url + "stream", timeout=5) as stream:
            assert stream.headers["Content-Type"] == "multipart/x-mixed-replace; boundary=frame"
            first = next_picture(stream)
            assert first.shape == (12, 16, 3) and np.abs(first.astype(int) - 50).max() <= 2
            page.show(picture(200), "12.5 frames/s")
            assert np.abs(next_picture(stream).astype(int) - 200).max() <= 2
        status = json.load(urllib.request.urlopen(page.url + "status", timeout=5))
        assert status == {"text": "12.5 frames/s", "frames": 2}


def test_two_browsers_see_the_same():
    with PreviewPage(port=0) as page:
        page.show(picture(80))
        streams = [urllib.request.urlopen(page.url + "stream", timeout=5) for _ in range(2)]
        assert [next_picture(stream).mean().round() for stream in streams] == [80, 80]


@pytest.mark.parametrize(
    "path, host, status", [("/", "evil.example", 403), ("/stream", "evil.example:80", 403), ("/etc/passwd", "localhost", 404), ("/", "localhost", 200)]
)
def test_only_this_machine_by_its_own_name_is_answered(path, host, status):
    with PreviewPage(port=0) as page:
        assert page.url.startswith("http://127.0.0.1:")
        connection = http.client.HTTPConnection("127.0.0.1", int(page.url.split(":")[2].strip("/")), timeout=5)
        connection.request("GET", path, headers={"Host": host})
        assert connection.getresponse().status == status


def test_a_taken_port_is_told():
    with PreviewPage(port=0) as page:
        port = int(page.url.split(":")[2].strip("/"))
        with pytest.raises(OSError, match=f"no preview page on port {port}: .*--port"):
            PreviewPage(port=port)


def test_it_closes_while_a_browser_looks_on():
    with PreviewPage(port=0) as page:
        page.show(picture(1))
        stream = urllib.request.urlopen(page.url + "stream", timeout=5)
        next_picture(stream)
        closer = threading.Thread(target=lambda: page.__exit__(None, None, None))
        closer.start()
        assert stream.read() == b""  # the stream ends
        closer.join(timeout=5)
        assert not closer.is_alive()
