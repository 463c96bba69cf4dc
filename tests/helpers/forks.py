"""Programs that begin at once: forks of one that has imported what they all need.

Measured on two cores: a program imports what a command needs in 3.5 s, and what MLflow needs in
1.1 s; a fork of a process that has imported it begins and ends in 0.1 s. The fork server of
`multiprocessing` gives no fork an environment, standard files or a folder of its own.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import IO

import psutil

_PROGRAM = """
import gc, importlib, json, os, resource, socket, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
gc.freeze()
requests = socket.socket(fileno=0)
while True:
    text, files = b"", []
    while not text.endswith(b"\\n"):
        part, more, _, _ = socket.recv_fds(requests, 2**16, 3)
        if not part:
            sys.exit()
        text, files = text + part, files + more
    request = json.loads(text)
    if "ended" in request:
        answer = os.waitstatus_to_exitcode(os.waitpid(request["ended"], 0)[1])
    elif not (answer := os.fork()):
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        requests.detach()
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        if request["largest"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, [request["largest"]] * 2)
        exec(request["program"])
        sys.exit()
    for file in files:
        os.close(file)
    requests.send(str(answer).encode())
"""
_COMMANDS = ("torch", "transformers.models.auto.modeling_auto", "tracker.api", "tracker.cli")
_COMMANDS += ("transformers.models.llama.modeling_llama", "tracker.benchmarks.tasks")
# Not wandb itself, which makes a folder for its process when it is imported.
_TRACKERS = ("tracker.tracking.mlflow.backend", "tracker.tracking.mlflow.models", "git")


class ForkedProgram:
    """A program that was begun, in a process of its own; it stands for a `Popen`."""

    stdin: IO[bytes]
    stdout: IO[bytes]

    def __init__(self, pid: int, template: ForkServer, output: Path | None = None) -> None:
        self.pid, self.returncode = pid, None
        self._template, self._output = template, output

    def is_over(self) -> bool:
        """Return whether it has ended."""
        return psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE

    def send_signal(self, signal_number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, signal_number)

    def wait(self, timeout: float = 300) -> int:
        """Wait until it ends, so many seconds at most, and return its exit code."""
        deadline = time.monotonic() + timeout
        while self.returncode is None:
            if self.is_over():
                self.returncode = self._template.request(ended=self.pid)
            elif time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            else:
                time.sleep(0.01)
        return self.returncode

    def finish(self) -> tuple[str, int]:
        """Wait until it ends, and return its output and its exit code."""
        code = self.wait()
        return self._output.read_text(), code


class ForkServer:
    """A process that has imported some modules, and forks programs."""

    def __init__(self, imports: Sequence[str], environment: Mapping[str, str]) -> None:
        self._socket, child_socket = socket.socketpair()
        self._turn = threading.Lock()
        environment = {**environment, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-P", "-c", _PROGRAM, *imports]
        with child_socket:
            self._process = subprocess.Popen(command, stdin=child_socket, env=environment)

    def request(self, files: Sequence[int] = (), **request: object) -> int:
        """Send a request with open files to the process, and return its answer."""
        line = json.dumps(request).encode() + b"\n"
        with self._turn:
            sent = socket.send_fds(self._socket, [line], files)
            self._socket.sendall(line[sent:])
            return int(self._socket.recv(100))

    def start_program(
        self,
        program: str,
        files: Sequence[int],
        environment: Mapping[str, str],
        folder: Path,
        max_bytes: int | None = None,
    ) -> int:
        """Begin a program on its three standard files, and return its process's number.

        No file that it writes may be larger than `max_bytes` bytes.
        """
        settings = {"environment": dict(environment), "folder": str(folder), "largest": max_bytes}
        return self.request(files, program=program, **settings)

    def close(self) -> None:
        """End whatever still runs."""
        for child in psutil.Process(self._process.pid).children():
            child.kill()
        self._socket.close()
        self._process.wait()


@contextmanager
def forked_commands(
    folder: Path, environment: Mapping[str, str] | None = None, first: str = ""
) -> Iterator[Callable[..., ForkedProgram]]:
    """Yield a function that starts commands of tracker; in the end, end what still runs.

    Each program first runs the code `first`.
    """
    environment = {**os.environ, **(environment or {})}
    template, names = ForkServer(_COMMANDS, environment), count()

    def start_command(*arguments: object, largest: int | None = None) -> ForkedProgram:
        output = folder / f"output{next(names)}"
        words = [*map(str, arguments)]
        program = f"{first}\nimport tracker.cli; tracker.cli.main({words!r}, prog_name='tracker')"
        with output.open("wb") as written, Path(os.devnull).open("rb") as empty:
            files = (empty.fileno(), written.fileno(), written.fileno())
            pid = template.start_program(program, files, environment, folder, largest)
        return ForkedProgram(pid, template, output)

    try:
        yield start_command
    finally:
        template.close()


class ForkedTrackers:
    """Forks of the processes that `Isolated` starts; it stands for `subprocess` there."""

    PIPE, TimeoutExpired = subprocess.PIPE, subprocess.TimeoutExpired

    def __init__(self) -> None:
        self._template: ForkServer | None = None
        self._first = threading.Lock()

    def Popen(  # noqa: N802  as it is called
        self, command: Sequence[str], env: Mapping[str, str], stdin: int, stdout: int
    ) -> ForkedProgram:
        """Begin a program, to which and from which go pipes."""
        assert (stdin, stdout) == (self.PIPE, self.PIPE)
        with self._first:  # two threads may be the first to call
            self._template = self._template or ForkServer(_TRACKERS, os.environ)
        (their_in, our_out), (our_in, their_out) = os.pipe(), os.pipe()
        pid = self._template.start_program(command[-1], (their_in, their_out, 2), env, Path.cwd())
        for file in (their_in, their_out):
            os.close(file)
        fork = ForkedProgram(pid, self._template)
        fork.stdin, fork.stdout = os.fdopen(our_out, "wb"), os.fdopen(our_in, "rb")
        return fork

    def close(self) -> None:
        """End whatever still runs."""
        if self._template is not None:
            self._template.close()
