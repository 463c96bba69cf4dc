"""Define the interface to Trackio for other packages, without importing Trackio."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from typing_extensions import override

from tracker.schema.distribution import extra_command
from tracker.schema.errors import RequestError, TrackingError
from tracker.tracking.base import PartName, Service, Target

_REMOTE_SETTINGS = ("SPACE_ID", "SERVER_URL", "BUCKET_ID", "DATASET_ID")
"""Settings that would send runs to a hub or a server."""


class TrackioService(Service):
    """Interface to Trackio, which stores projects in a local folder."""

    name = "trackio"
    title = "Trackio"

    @override
    def target(self, project: str, is_source: bool) -> Target:
        if find_spec("trackio") is None:
            raise RequestError(_MISSING_EXTRA)
        return super().target(project, is_source)

    @override
    def open(self, part: PartName, project: str, results: Path, server: str | None = None) -> Any:
        if find_spec("trackio") is None:
            raise TrackingError(_MISSING_EXTRA)
        remote = [f"TRACKIO_{name}" for name in _REMOTE_SETTINGS]
        ignored = [name for name in remote if os.environ.get(name)]
        # Otherwise it requests the user's name from the hub for each run.
        add = {"HF_HUB_OFFLINE": "1", "TRACKIO_DIR": server or self.server()}
        arguments = (project, results, ignored)
        return self._isolated("backend:TrackioBackend", *arguments, remove=remote, add=add)

    @override
    def server(self) -> str:
        """Return the folder of Trackio's projects: `TRACKIO_DIR`, or else the default folder."""
        if folder := os.environ.get("TRACKIO_DIR"):
            return str(Path(folder).absolute())
        return str(default_folder())

    @override
    def store(self, results: Path, server: str | None) -> tuple[str | None, Path | None]:
        folder = server or self.server()
        return folder, Path(folder)


def default_folder() -> Path:
    """Return the folder in which Trackio stores its projects by default."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME).absolute() / "trackio"


_MISSING_EXTRA = f"Trackio is not installed; type: {extra_command('trackio')}"
