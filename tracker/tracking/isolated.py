"""Call an SDK in a process of its own.

W&B's has one session a process: its settings, its service process, the runs that are open. Those
may be a notebook's, whose run must go on whatever becomes of ours; and after an outage a service
can keep its process from ever ending. So ours lives elsewhere, and ends with its process. What is
shown of a measurement lives elsewhere too: it outlives one that is killed, and says so.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from tracker.core.errors import TrackerError, TrackingError
from tracker.core.remote import ProcessEndedError, RemoteError, RemoteObject


class Isolated(RemoteObject):
    """An object in another process, which ends with a call that fails.

    Args:
        name: What people call what lives there.
        kind: The object's class, as `MODULE:CLASS`.
        *arguments: What makes it.
        without: Environment variables that the process does not get.
        also: Environment variables that it gets besides.
    """

    @override
    def _call(self, method: str, *arguments: object) -> Any:
        try:
            return super()._call(method, *arguments)
        except ProcessEndedError as error:
            why = f"the process of {self.name} has ended ({error})"
            raise TrackingError(why) from None
        except TrackerError as error:
            self.close()
            raise TrackingError(str(error)) if isinstance(error, RemoteError) else error from None

    @override
    def _popen(
        self, command: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe)
