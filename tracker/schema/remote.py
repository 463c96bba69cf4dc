"""Call methods of objects in other processes.

The processes are started as separate programs, because `multiprocessing` would run the user's
script again.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any

import psutil

from tracker.schema.errors import TrackerError, WorkError

_PATIENCE = 10.0
"""Maximum number of seconds that an idle or unresponsive process may take to end."""
_GRACE = 2.0
"""Maximum number of seconds that a process may take to end after its caller has ended."""


class ProcessEndedError(WorkError):
    """The process of a remote object has ended; the message contains the reason."""


class RemoteError(WorkError):
    """An exception of a remote object; its note contains the traceback."""


class Remote:
    """Base class of objects that forward method calls to an object in another process.

    Args:
        name: The object's name in messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_"):
            raise AttributeError(method)
        return partial(self._call, method)

    def _call(self, method: str, *arguments: object) -> Any:
        """Call a method of the remote object; raise ProcessEndedError if the process has ended."""
        raise NotImplementedError

    def close(self) -> None:
        """End the remote object, even during a call; the next call creates a new object."""
        raise NotImplementedError


class RemoteObject(Remote):
    """Proxy for an object in another process on the same machine.

    The process starts when the first method is called.

    Args:
        name: The object's name in messages.
        kind: The object's class, as `MODULE:CLASS`.
        *arguments: The arguments for creating the object.
        removed_variables: Environment variables that the new process does not inherit.
        added_variables: Environment variables that are set for the new process.
        finishes_calls: True if the new process finishes its running call when the calling process
            ends.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        *arguments: object,
        removed_variables: Collection[str] = (),
        added_variables: Mapping[str, str] = {},
        finishes_calls: bool = True,
    ) -> None:
        super().__init__(name)
        self._object = kind, arguments
        self._removed, self._added = removed_variables, added_variables
        self._finishes_calls = finishes_calls
        self._process: subprocess.Popen[bytes] | None = None
        self._patience = _PATIENCE

    def _call(self, method: str, *arguments: object) -> Any:
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        self._patience = 0.0  # closing during a call does not wait for its answer
        try:
            pickle.dump((*self._object, method, arguments), process.stdin)
            process.stdin.flush()
            has_failed, answer = pickle.load(process.stdout)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):
            with suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE)
            code = process.returncode  # None: still running, and killed now
            self.close()
            raise ProcessEndedError(self._why_ended(code)) from None
        except BaseException:
            self.close()
            raise
        self._patience = _PATIENCE
        if has_failed:
            raise answer
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {k: v for k, v in os.environ.items() if k not in self._removed}
        environment |= {**self._added, "PYTHONPATH": os.pathsep.join(sys.path)}
        program = f"from tracker.schema.remote import serve; serve({self._finishes_calls})"
        return self._popen([sys.executable, "-P", "-c", program], environment)

    def _popen(
        self, command: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a process for the remote object with a command and environment variables."""
        raise NotImplementedError

    def _why_ended(self, code: int | None) -> str:
        """Return a message about the end of the process; `code` is its exit code or None."""
        return str(code)

    def close(self) -> None:
        """End the object's process and all of its descendants."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):
            process.stdin.close()
        try:
            process.wait(self._patience)
        except subprocess.TimeoutExpired:
            # A killed parent would leave its children running.
            with suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                for descendant in [*parent.children(recursive=True), parent]:
                    with suppress(psutil.NoSuchProcess):
                        descendant.kill()
            process.wait()
        with suppress(OSError, ValueError):
            process.stdout.close()


def serve(finishes_calls: bool) -> None:
    """Execute the calls of a `RemoteObject` until the calling process ends.

    If the calling process ends during a call, the call is finished only if `finishes_calls` is
    true. Finally, the object is closed.
    """
    # Output of the object must not mix with the answers; signals are for the other process.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if finishes_calls:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    calls: SimpleQueue[Any] = SimpleQueue()
    Thread(target=_read_calls, args=(calls, finishes_calls), daemon=True).start()
    served: Any = None
    with suppress(OSError):
        while (call := calls.get()) is not None:
            kind, class_arguments, method, arguments = call
            try:
                if served is None:
                    module, _, name = kind.partition(":")
                    served = getattr(importlib.import_module(module), name)(*class_arguments)
                answer = False, getattr(served, method)(*arguments)
            except TrackerError as error:
                answer = True, error
            except Exception as error:  # noqa: BLE001  raised again where the method was called
                answer = True, _portable_error(error)
            pickle.dump(answer, answers)
            answers.flush()
    if hasattr(served, "close"):
        with suppress(TrackerError):
            served.close()


def _read_calls(calls: SimpleQueue[Any], finishes_calls: bool) -> None:
    """Read calls from standard input, and append them to the queue `calls`.

    The input ends when the calling process ends; None in the queue marks this end. If
    `finishes_calls` is false, this process exits `_GRACE` seconds later.
    """
    # Not the interpreter's own stream: that would be locked by this thread when it ends.
    stream = os.fdopen(os.dup(0), "rb")
    try:
        with suppress(EOFError, OSError):
            while True:
                calls.put(pickle.load(stream))
    finally:
        calls.put(None)
        if not finishes_calls:
            time.sleep(_GRACE)
            os._exit(1)


def _portable_error(error: Exception) -> RemoteError:
    """Convert an exception to a RemoteError that can be unpickled in any process."""
    remote_error = RemoteError(f"{type(error).__name__}: {error}")
    remote_error.add_note("".join(traceback.format_exception(error)))
    return remote_error
