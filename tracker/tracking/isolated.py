"""Call the SDK of a tracking backend in a separate process.

The W&B SDK has one session per process. If a notebook also uses W&B, a failure of tracker's runs
must not affect the notebook's runs. So tracker uses W&B in a separate process. Live runs have
another process. It survives if the measurement is killed, and then marks the live runs as killed.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from tracker.schema.errors import TrackerError, TrackingError
from tracker.schema.remote import ProcessEndedError, RemoteError, RemoteObject


class Isolated(RemoteObject):
    """Proxy for an object in a separate process, which ends after a failed call.

    Args:
        name: Name of the object in error messages.
        kind: Class of the object, as `MODULE:CLASS`.
        *arguments: Arguments for the constructor of the class.
        removed_variables: Names of environment variables to unset in the separate process.
        added_variables: Additional environment variables of the separate process.
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
