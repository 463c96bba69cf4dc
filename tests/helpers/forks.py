"""Programs that begin at once: forks of one that has imported what they all need."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
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
told = socket.socket(fileno=0)
while True:
    text, files = b"", []
    while not text.endswith(b"\\n"):
        part, some, _, _ = socket.recv_fds(told, 2**16, 3)
        if not part:
            sys.exit()
        text, files = text + part, files + some
    asked = json.loads(text)
    if "ended" in asked:
        answer = os.waitstatus_to_exitcode(os.waitpid(asked["ended"], 0)[1])
    elif not (answer := os.fork()):
        for place, file in enumerate(files):
            os.dup2(file, place)
            os.close(file)
        told.detach()
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["folder"])
        if asked["largest"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, [asked["largest"]] * 2)
        exec(asked["program"])
        sys.exit()
    for file in files:
        os.close(file)
    told.send(str(answer).encode())
"""


_OF_COMMANDS = (
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "tracker.api",
    "tracker.cli",
    "tracker.benchmarks.tasks",
)
_OF_TRACKERS = ("tracker.tracking.mlflow.backend", "tracker.tracking.mlflow.models", "git")
"""Not wandb itself, which makes a folder for its process when it is imported."""


class Begun:
    """A program that was begun, in a process of its own."""

    stdin: IO[bytes]
    stdout: IO[bytes]

    def __init__(self, pid: int, forks: Template) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._forks = forks

    def is_over(self) -> bool:
        """Whether it has ended."""
        return psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self, timeout: float = 300) -> int:
        """Wait until it ends, so many seconds at most; its exit code."""
        last = time.monotonic() + timeout
        while self.returncode is None:
            if self.is_over():
                self.returncode = self._forks.ask(ended=self.pid)
            elif time.monotonic() > last:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            else:
                time.sleep(0.01)
        return self.returncode


class Template:
    """Begins programs, each in a process of its own, once some modules are imported."""

    def __init__(self, imports: Sequence[str], environment: Mapping[str, str]) -> None:
        self._told, its = socket.socketpair()
        self._turn = threading.Lock()
        path = {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-P", "-c", _PROGRAM, *imports]
        with its:
            self.program = subprocess.Popen(command, stdin=its, env={**environment, **path})

    def ask(self, files: Sequence[int] = (), **asked: object) -> int:
        """Ask the program that forks."""
        line = json.dumps(asked).encode() + b"\n"
        with self._turn:
            sent = socket.send_fds(self._told, [line], files)
            self._told.sendall(line[sent:])
            return int(self._told.recv(100))

    def begin(
        self,
        program: str,
        files: Sequence[int],
        environment: Mapping[str, str],
        folder: Path,
        largest: int | None = None,
    ) -> int:
        """Begin a program on what it reads, prints to and complains to; its process's number.

        No file that it writes may be larger than `largest` bytes.
        """
        asked = {"program": program, "environment": dict(environment), "folder": str(folder)}
        return self.ask(files, **asked, largest=largest)

    def end(self) -> None:
        """End whatever still runs."""
        for each in psutil.Process(self.program.pid).children():
            each.kill()
        self._told.close()
        self.program.wait()


class Forked(Begun):
    """A command that was given.

    Attributes:
        said: Where what it says is written.
    """

    def __init__(self, pid: int, forks: Template, said: Path) -> None:
        super().__init__(pid, forks)
        self.said = said

    def end(self) -> tuple[str, int]:
        """Wait until it ends; what it has said, and its exit code."""
        code = self.wait()
        return self.said.read_text(), code


class Forks:
    """Gives commands of tracker, each in a process of its own."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder, self._names = folder, count()
        self._environment = {**os.environ, **environment}
        self.template = Template(_OF_COMMANDS, self._environment)

    def start(self, *arguments: object, largest: int | None = None) -> Forked:
        """Give a command; no file that it writes may be larger than so many bytes."""
        said = self._folder / f"said{next(self._names)}"
        program = f"tracker.cli.main({[*map(str, arguments)]!r}, prog_name='tracker')"
        with said.open("wb") as out, Path(os.devnull).open("rb") as nothing:
            files = (nothing.fileno(), out.fileno(), out.fileno())
            pid = self.template.begin(
                f"import tracker.cli; {program}", files, self._environment, self._folder, largest
            )
        return Forked(pid, self.template, said)


@contextmanager
def forks(folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[Forks]:
    """Whatever still runs in the end is ended."""
    found = Forks(folder, environment or {})
    try:
        yield found
    finally:
        found.template.end()


class Trackers:
    """Begins what `Isolated` starts: it imports the SDKs for seconds, each time the same.

    It stands for `subprocess` there.
    """

    PIPE, TimeoutExpired = subprocess.PIPE, subprocess.TimeoutExpired

    def __init__(self) -> None:
        self._template: Template | None = None
        self._first = threading.Lock()

    def Popen(  # noqa: N802  as it is called
        self, command: Sequence[str], env: Mapping[str, str], stdin: int, stdout: int
    ) -> Begun:
        """Begin a program, to which and from which go pipes."""
        assert (stdin, stdout) == (self.PIPE, self.PIPE)
        with self._first:  # two threads may be the first to ask
            self._template = self._template or Template(_OF_TRACKERS, os.environ)
        *_, program = command
        (its_in, our_out), (our_in, its_out) = os.pipe(), os.pipe()
        files = (its_in, its_out, 2)
        begun = Begun(self._template.begin(program, files, env, Path.cwd()), self._template)
        for file in (its_in, its_out):
            os.close(file)
        begun.stdin, begun.stdout = os.fdopen(our_out, "wb"), os.fdopen(our_in, "rb")
        return begun

    def end(self) -> None:
        """End whatever still runs."""
        if self._template is not None:
            self._template.end()
