"""A stand-in for the Hugging Face hub on loopback, which answers as it is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted"}


class Hub:
    """What the hub answers, and what it was asked.

    Attributes:
        status: Of every answer but to the hub's own address, which tells that it is there.
        headers: Of the same answers.
        body: Of the same answers.
        silent: Whether it takes connections and never answers.
        asked: Method and path of each request.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.status = 404
        self.headers: dict[str, str] = {}
        self.body = b""
        self.silent = False
        self.asked: list[str] = []
        self.ended = threading.Event()

    def environment(self) -> dict[str, str]:
        """The environment of a process that should ask it."""
        return {"HF_ENDPOINT": self.address, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}


@contextmanager
def hub() -> Iterator[Hub]:
    """Run one."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            found.asked.append(f"{self.command} {self.path}")
            if found.silent:
                found.ended.wait(120)
                return
            root = self.path == "/"
            body = b"" if root else found.body
            self.send_response(200 if root else found.status)
            for name, value in ({} if root else found.headers).items():
                self.send_header(name, value)
            self.send_header("ETag", '"0123"')
            self.send_header("X-Repo-Commit", "f" * 40)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = answer  # noqa: N815  the names that http.server calls

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
