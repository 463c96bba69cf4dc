"""Describe Trackio to the other packages, without importing it."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from typing_extensions import override

from tracker.core.distribution import install_extra
from tracker.core.errors import RequestError, TrackingError
from tracker.tracking.base import Part, Service, Target

_ELSEWHERE = ("SPACE_ID", "SERVER_URL", "BUCKET_ID", "DATASET_ID")
"""Settings that would send runs to a hub or a server."""


class TrackioService(Service):
    """Trackio: a project in its folder, where `trackio show` and other programs' runs are."""

    name = "trackio"
    title = "Trackio"

    @override
    def target(self, project: str, reading: bool) -> Target:
        if find_spec("trackio") is None:
            raise RequestError(_MISSING)
        return super().target(project, reading)

    @override
    def open(self, part: Part, project: str, results: Path, server: str | None = None) -> Any:
        if find_spec("trackio") is None:
            raise TrackingError(_MISSING)
        elsewhere = [f"TRACKIO_{name}" for name in _ELSEWHERE]
        ignored = [name for name in elsewhere if os.environ.get(name)]
        # Otherwise it requests the user's name from the hub for each run.
        also = {"HF_HUB_OFFLINE": "1", "TRACKIO_DIR": server or self.server()}
        arguments = (project, results, ignored)
        return self._isolated("backend:TrackioBackend", *arguments, without=elsewhere, also=also)

    @override
    def server(self) -> str:
        """Return Trackio's folder."""
        if folder := os.environ.get("TRACKIO_DIR"):
            return str(Path(folder).absolute())
        return str(usual_folder())

    @override
    def store(self, results: Path, server: str | None) -> tuple[str | None, Path | None]:
        folder = server or self.server()
        return folder, Path(folder)


def usual_folder() -> Path:
    """Return the default folder of Trackio's runs."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME).absolute() / "trackio"


_MISSING = f"Trackio is not installed; type: {install_extra('trackio')}"
