"""A folder behind http with range requests, on this machine, for tests of remote shards."""

import contextlib
import re
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class RangeServer(ThreadingHTTPServer):
    """`requests` lists (method, path, bytes of the body sent). `failures` answers that many next requests with 503."""

    daemon_threads = True

    def __init__(self, folder: Path, ranges: bool = True):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.ranges, self.failures, self.requests = Path(folder), ranges, 0, []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # one packet an answer

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        server, path = self.server, self.path.partition("?")[0]
        file = server.folder / path.lstrip("/")
        if body and server.failures > 0:
            server.failures -= 1
            return self._send(503, b"", {})
        if not file.is_file():
            return self._send(404, b"", {})
        data, match = file.read_bytes(), _RANGE.fullmatch(self.headers.get("Range", ""))
        headers = {"ETag": f'"{file.stat().st_mtime_ns}"', "Accept-Ranges": "bytes" if server.ranges else "none"}
        if match and server.ranges:
            begin, end = int(match[1]), min(int(match[2]) + 1, len(data))
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
            return self._send(206, data[begin:end], headers, body)
        return self._send(200, data, headers, body)

    def _send(self, status: int, data: bytes, headers: dict, body: bool = True) -> None:
        self.server.requests.append((self.command, self.path, len(data) if body else 0))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(folder: Path, ranges: bool = True):
    """A running RangeServer."""
    with RangeServer(folder, ranges) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
