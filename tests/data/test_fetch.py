"""Pictures from the net: limits on schemes, redirects, size and time."""

import io
import socketserver
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from llava import pictures
from llava.eval import run_llava
from llava.pictures import PictureError, fetch, read_picture


def picture_bytes():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (1, 2, 3)).save(buffer, "PNG")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Answers by the path."""

    protocol_version = "HTTP/1.0"

    def log_message(self, *arguments):
        """Say nothing."""

    def do_GET(self):
        name, _, rest = self.path.strip("/").partition("/")
        getattr(self, f"send_{name}")(rest)

    def start(self, code=200, **headers):
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()

    def send_good(self, _):
        self.start()
        self.wfile.write(picture_bytes())

    def send_absent(self, _):
        self.start(404)

    def send_text(self, _):
        self.start()
        self.wfile.write(b"no picture")

    def send_short(self, _):
        self.start(Content_Length="5000")
        self.wfile.write(picture_bytes())

    def send_declared(self, _):
        self.start(Content_Length=str(10**12))

    def send_endless(self, _):
        self.start()
        self.write_while_read(b"x" * 4096, pause=0)

    def send_slow(self, _):
        self.start()
        self.write_while_read(b"x", pause=0.02)

    def send_slowhead(self, _):
        self.write_while_read(b"HTTP/1.0 200 OK\r\n" + b"X: y\r\n", pause=0.02)

    def send_silent(self, _):
        time.sleep(3)

    def send_hops(self, count):
        self.start(302, Location=f"/hops/{int(count) - 1}" if int(count) else "/good")

    def send_elsewhere(self, scheme):
        self.start(302, Location=f"{scheme}://127.0.0.1/etc/passwd")

    def write_while_read(self, data, pause):
        end = time.monotonic() + 5
        while time.monotonic() < end:
            try:
                self.wfile.write(data)
            except OSError:
                return
            time.sleep(pause)


class Server(ThreadingHTTPServer):
    """Does not look up its own name."""

    daemon_threads = True
    server_bind = socketserver.TCPServer.server_bind


@pytest.fixture(scope="module")
def site():
    server = Server(("127.0.0.1", 0), Handler)
    server.server_name, server.server_port = "localhost", server.server_address[1]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def without_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("path", ["good", "hops/4"])
def test_a_picture_from_the_net(site, path):
    assert read_picture(f"{site}/{path}").getpixel((0, 0)) == (1, 2, 3)
    assert run_llava.load_image(f"{site}/{path}").size == (8, 6)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("absent", "404"),
        ("text", "cannot identify"),
        ("short", "ended after|more expected"),
        ("declared", "1,000,000,000,000 bytes, the limit is 100,000"),
        ("endless", "more than 100,000 bytes"),
        ("hops/9", "redirect"),
        ("elsewhere/file", "not allowed|neither http nor https"),
        ("elsewhere/ftp", "neither http nor https"),
    ],
)
def test_what_cannot_be_fetched_is_named(site, monkeypatch, path, reason):
    monkeypatch.setattr(pictures, "MAX_STREAM_BYTES", 100_000)
    with pytest.raises(PictureError, match=reason) as caught:
        read_picture(f"{site}/{path}")
    assert f"{site}/{path}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["slow", "slowhead", "silent"])
def test_a_slow_server_is_left_in_time(site, monkeypatch, path):
    """Also one that sends a byte now and then, which no timeout of a socket notices."""
    monkeypatch.setattr(pictures, "FETCH_SECONDS", 0.3)
    begin = time.monotonic()
    with pytest.raises(PictureError, match=r"0\.3 s|timed out"):
        fetch(f"{site}/{path}")
    assert time.monotonic() - begin < 2.5


def test_nobody_answers():
    with pytest.raises(PictureError, match=r"127\.0\.0\.1:9"):
        fetch("http://127.0.0.1:9/x.png")


@pytest.mark.parametrize("address", ["file:///etc/hostname", "ftp://127.0.0.1/x.png", "data:image/png;base64,xx"])
def test_other_schemes_are_not_read(address):
    with pytest.raises(PictureError):
        fetch(address)
    with pytest.raises(PictureError):
        read_picture(address)
