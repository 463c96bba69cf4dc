"""Call an SDK in a process of its own.

W&B's has one session a process: its settings, its service process, the runs that are open. Those
may be a notebook's, whose run must go on whatever becomes of ours; and after an outage a service
can keep its process from ever ending. So ours lives elsewhere, and ends with its process. What is
shown of a measurement lives elsewhere too: it outlives one that is killed, and says so.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import psutil

from tracker.core.errors import TrackerError, TrackingError

_PROGRAM = "from tracker.tracking.isolated import serve; serve()"
_PATIENCE = 10.0
"""Seconds that the SDK may take to end."""


class Isolated:
    """An object in another process; its methods are called there.

    The process begins with the first call, and ends with `close` or with a call that fails; another
    call begins another.

    Args:
        whose: What people call what lives there.
        kind: The object's class, as `MODULE:CLASS`.
        *arguments: What makes it.
        without: Environment variables that the process does not get.
        also: Environment variables that it gets besides.
    """

    def __init__(
        self,
        whose: str,
        kind: str,
        *arguments: object,
        without: Collection[str] = (),
        also: Mapping[str, str] = {},
    ) -> None:
        self._object = kind, arguments
        self._whose = whose
        self._without = {*without}
        self._also = also
        self._process: subprocess.Popen[bytes] | None = None
        self._patience = _PATIENCE

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_"):
            raise AttributeError(method)
        return partial(self._call, method)

    def _call(self, method: str, *arguments: object) -> Any:
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        self._patience = 0  # whoever closes now does not wait for an answer
        try:
            pickle.dump((*self._object, method, arguments), process.stdin)
            process.stdin.flush()
            failed, answer = pickle.load(process.stdout)
        # A ValueError where another thread closes the pipe meanwhile.
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):
            self.close()
            raise TrackingError(
                f"the process of {self._whose} has ended ({process.returncode})"
            ) from None
        except BaseException:
            self.close()
            raise
        self._patience = _PATIENCE
        if failed:
            self.close()
            raise answer
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {k: v for k, v in os.environ.items() if k not in self._without}
        environment |= self._also
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def close(self) -> None:
        """End the process, and whatever it has started; it never raises."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
        try:
            process.wait(self._patience)
        except subprocess.TimeoutExpired:
            with suppress(psutil.NoSuchProcess):
                own = psutil.Process(process.pid)
                for one in [*own.children(recursive=True), own]:
                    with suppress(psutil.NoSuchProcess):
                        one.kill()
            process.wait()
        assert process.stdout is not None
        with suppress(OSError, ValueError):
            process.stdout.close()


def serve() -> None:
    """Answer the calls of an `Isolated` until it ends, then close the object."""
    # What the SDK prints must not get among the answers; signals are for the other process.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    made: Any = None
    with suppress(EOFError, OSError):
        while True:
            kind, made_of, method, arguments = pickle.load(sys.stdin.buffer)
            try:
                if made is None:
                    module, _, name = kind.partition(":")
                    made = getattr(importlib.import_module(module), name)(*made_of)
                answer = False, getattr(made, method)(*arguments)
            except TrackerError as error:
                answer = True, error
            except Exception as error:  # noqa: BLE001  what it was is said where it is shown
                answer = True, TrackingError(f"{type(error).__name__}: {error}")
            pickle.dump(answer, answers)
            answers.flush()
    if hasattr(made, "close"):
        with suppress(TrackerError):
            made.close()
