"""Call an SDK in a separate process.

W&B has one session per process: settings, a service process and open runs. The session may belong
to a notebook, whose runs must continue if tracker's runs fail. After an outage, the service can
also prevent its process from ending. So tracker's session has a separate process. Live runs have
another process, which survives a killed measurement and marks its runs as killed.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from tracker.core.errors import TrackerError, TrackingError
from tracker.core.remote import ProcessEndedError, RemoteError, RemoteObject


class Isolated(RemoteObject):
    """Proxy of an object in another process, which ends after a failed call.

    Args:
        name: The object's name in messages.
        kind: The object's class, as `MODULE:CLASS`.
        *arguments: The arguments of the class.
        removed_variables: Environment variables to remove from the process.
        added_variables: Additional environment variables of the process.
    """

    @override
    def _call(self, method: str, *arguments: object) -> Any:
        try:
            return super()._call(method, *arguments)
        except ProcessEndedError as error:
            reason = f"the process of {self.name} has ended ({error})"
            raise TrackingError(reason) from None
        except TrackerError as error:
            self.close()
            raise TrackingError(str(error)) if isinstance(error, RemoteError) else error from None

    @override
    def _popen(
        self, command: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe)
