"""A worker in a process of its own on this machine: how it is started, asked and ended.

It is a program by itself and no child of `multiprocessing`: that would run a user's script again,
and import torch before it is told which devices and how many threads it has.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from queue import SimpleQueue
from threading import Thread
from typing import IO, Any

from tracker.core.errors import CellError, TrackerError
from tracker.executors.pool import LostError
from tracker.executors.worker import Worker

_PROGRAM = "from tracker.executors.child import serve; serve()"
_GRACE = 2.0
"""Seconds that an idle worker may take to end."""


class Child:
    """A place for a worker process.

    Args:
        name: What the worker is called in messages.
        environment: What stands in its environment besides, or instead.
        *arguments: What makes a `Worker`.
    """

    def __init__(self, name: str, environment: Mapping[str, str], *arguments: object) -> None:
        self.name = name
        self.connection: Any = None
        self._environment = environment
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes]
        self._is_idle = False

    def start(self) -> None:
        """Begin to start a process."""
        environment = {**os.environ, **self._environment}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        self.connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, str(theirs.fileno())],
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=subprocess.STDOUT,
            )
        self.ask("", *self._arguments)

    def ask(self, method: str, *arguments: Any) -> None:
        """Ask the process for what a method of its worker returns."""
        self._is_idle = False
        with suppress(OSError):  # it is gone, which its answer will say
            self.connection.send((method, arguments))

    def answer(self) -> Any:
        """Take what came."""
        try:
            error, answer = self.connection.recv()
        except (EOFError, OSError):
            raise LostError(self._why()) from None
        self._is_idle = True
        if error is not None:
            raise error
        return answer

    def kill(self) -> None:
        """End the process by its id; an idle one ends by itself."""
        if self._process is None:
            return
        self.connection.close()
        if self._is_idle:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE)
        self._process.kill()
        self._process.wait()
        self._process = None
        self._said.close()

    def _why(self) -> str:
        """Say why the process ended."""
        assert self._process is not None
        try:
            code = self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            return "it does not answer any more"
        if code == -signal.SIGKILL:
            return "killed, as the system does when memory runs out; fewer workers need less"
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip().splitlines()
        return f"{how}: {said[-1][:300]}" if said else how


def answered(children: Sequence[Child], seconds: float) -> list[Child]:
    """Wait until some have answered, or are gone."""
    found = {child.connection: child for child in children}
    return [found[each] for each in wait(list(found), seconds) if each in found]


def serve() -> None:
    """Be a worker: answer what is asked through the pipe that the command line names."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who asks, which ends this
    connection = Connection(int(sys.argv[1]))
    asked: SimpleQueue[tuple[str, Sequence[Any]] | None] = SimpleQueue()
    Thread(target=_listen, args=(connection, asked), daemon=True).start()
    worker: Worker | None = None
    while (request := asked.get()) is not None:
        method, arguments = request
        error, answer = None, None
        try:
            if worker is None:
                worker = Worker(*arguments)
            else:
                answer = getattr(worker, method)(*arguments)
        except Exception as raised:  # noqa: BLE001  it is said where it is shown
            error = _told(raised)
        connection.send((error, answer))


def _listen(connection: Connection, asked: SimpleQueue[Any]) -> None:
    """Hear what is asked, and end the process when nobody is there any more, whatever it is at."""
    try:
        with suppress(EOFError, OSError):
            while True:
                asked.put(connection.recv())
    finally:
        asked.put(None)
        time.sleep(_GRACE)
        os._exit(1)


def _told(error: Exception) -> TrackerError:
    """Make an error that another process understands; the note is for who looks for a bug."""
    if isinstance(error, TrackerError):
        return error
    told = CellError(f"{type(error).__name__}: {error}")
    told.add_note("".join(traceback.format_exception(error)))
    return told
