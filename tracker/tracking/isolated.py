"""Call an SDK in a process of its own.

W&B has one session per process: settings, a service process and open runs. These may belong to a
notebook, whose runs must continue whatever happens to tracker's. After an outage, the service can
also prevent its process from ending. So tracker's session has a process of its own. Live runs have
one too: it survives a killed measurement and marks its runs as killed.
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
        name: Its name in messages.
        kind: The object's class, as `MODULE:CLASS`.
        *arguments: The arguments of the class.
        without: Environment variables that the process does not get.
        also: Additional environment variables of the process.
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
