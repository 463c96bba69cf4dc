"""A real MLflow server on loopback, and a gate before it that can refuse in its place."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil

from tests.helpers.answering import AnsweringHandler, serve

USER, PASSWORD = "ann", "planted-mlflow-password"


def _ports() -> Iterator[int]:
    """Ports that no other worker looks at, below those that a system hands out for connections."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first_port = 20_000 + 1_000 * (worker % 10)
    return itertools.cycle(range(first_port, first_port + 1_000))


_PORTS = _ports()


def free_port() -> int:
    """Find a port on which nothing listens."""
    for port in _PORTS:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable")


class MlflowServer:
    """`mlflow server`, which keeps its address and its store when it is stopped and started.

    Args:
        folder: Where it keeps everything.
        template: A migrated SQLite store to begin with.
        asks_login: Whether it asks who calls: `USER` with `PASSWORD`.
    """

    def __init__(self, folder: Path, template: Path, auth: bool = False) -> None:
        self.folder = folder
        self.asks_login = auth
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        shutil.copy(template, folder / "mlflow.db")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
        # Eight processes for evaluations that nobody here asks for.
        environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
        if self.asks_login:
            settings = self.folder / "auth.ini"
            # A password is made to be proved slowly, but once for all calls of a minute.
            settings.write_text(
                "[mlflow]\ndefault_permission = READ\nauth_cache_ttl_seconds = 60\n"
                f"database_uri = sqlite:///{self.folder / 'auth.db'}\n"
                f"admin_username = {USER}\nadmin_password = {PASSWORD}\n"
                "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            )
            command += ["--app-name", "basic-auth"]
            environment["MLFLOW_AUTH_CONFIG_PATH"] = str(settings)
            environment["MLFLOW_FLASK_SERVER_SECRET_KEY"] = "a key of the tests"
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + 300
        while not self._healthy():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.1)

    def stop(self) -> None:
        """End it and its workers at once, as a power cut does."""
        if self.process is not None:
            for process in self.processes:
                process.kill()
            self.process.wait(timeout=20)
            self.process = None

    @property
    def processes(self) -> list[psutil.Process]:
        assert self.process is not None
        server_process = psutil.Process(self.process.pid)
        return [*server_process.children(recursive=True), server_process]

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


class Gate:
    """Passes requests on to a server until it is told to answer them itself.

    Attributes:
        status: What it answers instead of the server; None = it passes everything on.
        delay: Seconds before each answer.
        actions_by_number: What happens before the request of a number, counted from 1.
        actions_by_path: What happens before the first request whose path holds a text.
        n_requests: How many requests there were.
        unknown_path: Part of the paths that it answers with 404.
    """

    def __init__(self, server: str) -> None:
        self.server = server
        self.status: int | None = None
        self.delay = 0.0
        self.actions_by_number: dict[int, Callable[[], None]] = {}
        self.actions_by_path: dict[str, Callable[[], None]] = {}
        self.n_requests = 0
        self.unknown_path = ""
        gate = self

        class Handler(AnsweringHandler):
            def handle_any(self) -> None:
                gate._handle(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any  # noqa: N815

        self._serving = serve(Handler)
        self.address = ""

    def __enter__(self) -> Self:
        self.address = self._serving.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._serving.__exit__(*error)

    def _handle(self, request: AnsweringHandler) -> None:
        body = request.read_body()
        self.n_requests += 1
        self.actions_by_number.pop(self.n_requests, lambda: None)()
        for text in [text for text in self.actions_by_path if text in request.path]:
            self.actions_by_path.pop(text)()
        time.sleep(self.delay)
        status, kind, content = self.status, "text/html", b"<html>" + b"<p>no</p> " * 5000
        if self.unknown_path and self.unknown_path in request.path:
            status = 404
        if status is None:
            status, kind, content = self._forward(request, body)
        request.answer(content, status, kind)

    def _forward(self, request: AnsweringHandler, body: bytes) -> tuple[int, str, bytes]:
        headers = {k: v for k, v in request.headers.items() if k not in ("Host", "Connection")}
        url, method = self.server + request.path, request.command
        forwarded = urllib.request.Request(url, body or None, headers, method=method)
        try:
            answer = urllib.request.urlopen(forwarded, timeout=300)
        except urllib.error.HTTPError as error:
            answer = error
        except OSError:
            return 502, "text/plain", b"Bad gateway"
        with answer:
            return answer.status, answer.headers.get("Content-Type", ""), answer.read()
