"""What Trackio is to the rest of the house."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from typing_extensions import override

from tracker.core.distribution import install_extra
from tracker.core.errors import RequestError, TrackingError
from tracker.core.text import masked
from tracker.tracking.base import Backend, Service, Target

_ELSEWHERE = ("SPACE_ID", "SERVER_URL", "BUCKET_ID", "DATASET_ID")
"""Settings that would send runs to a hub or a server."""


class TrackioService(Service):
    """Trackio: a project in its folder, where `trackio show` and other programs' runs are."""

    name = "trackio"
    title = "Trackio"

    @override
    def target(self, project: str) -> Target:
        if find_spec("trackio") is None:
            raise RequestError(_MISSING)
        return super().target(project)

    @override
    def source(self, to: Target, typed: str) -> Target:
        if not to.project:
            raise RequestError(f"{masked(typed)!r} names no project; write trackio:PROJECT")
        return to

    @override
    def open(self, project: str, results: Path, server: str | None) -> Backend:
        if find_spec("trackio") is None:
            raise TrackingError(_MISSING)
        elsewhere = [f"TRACKIO_{name}" for name in _ELSEWHERE]
        ignored = [name for name in elsewhere if os.environ.get(name)]
        # Otherwise it asks the hub who the user is, for each run.
        also = {"HF_HUB_OFFLINE": "1", "TRACKIO_DIR": server or self.server()}
        there: dict[str, Any] = {"without": elsewhere, "also": also}
        kind = "backend:TrackioBackend"
        return cast(Backend, self._isolated(kind, project, results, ignored, **there))

    @override
    def server(self) -> str:
        """Name Trackio's folder."""
        if folder := os.environ.get("TRACKIO_DIR"):
            return str(Path(folder).absolute())
        return str(usual_folder())

    @override
    def store(self, results: Path, server: str | None) -> tuple[str | None, Path | None]:
        folder = server or self.server()
        return folder, Path(folder)


def usual_folder() -> Path:
    """Find where Trackio keeps runs when nothing is said."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME).absolute() / "trackio"


_MISSING = f"Trackio is not installed; type: {install_extra('trackio')}"
