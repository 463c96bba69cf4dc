"""Describe MLflow to the other packages, without importing MLflow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from typing_extensions import override

from tracker.core.errors import RequestError
from tracker.core.fields import expanded
from tracker.core.text import masked
from tracker.tracking.base import Part, Service, Target, other_login, without_login

_LOGINS = ("USERNAME", "PASSWORD", "TOKEN", "AUTH", "AWS_SIGV4")
_LOGIN_FILE = Path("~/.mlflow/credentials")


class MlflowService(Service):
    """MLflow: an experiment on a server, or in a SQLite file in the results folder."""

    name = "mlflow"
    title = "MLflow"
    names_server = True
    can = frozenset({"live runs", "reports", "lighter models", "registered models"})

    @override
    def open(self, part: Part, project: str, results: Path, server: str | None = None) -> Any:
        if part == "live runs":
            return self._isolated("live_run:MlflowLiveRun", project, results, server)
        if part == "lighter models":
            # Its flavours write to whatever run is active, which may be a notebook's.
            return self._isolated("models:MlflowModels", project, results, server)
        from tracker.tracking.mlflow.backend import MlflowBackend

        return MlflowBackend(project, results, server)

    @override
    def target(self, project: str, reading: bool) -> Target:
        server, experiment = None, project
        typed = masked(f"{self.name}:{project}")
        if "://" in project:
            server, experiment = _server_and_experiment(project)
            if not experiment:
                raise RequestError(f"{typed!r} names no experiment; write mlflow:URI/EXPERIMENT")
        if reading and not (server or self.server()):
            raise RequestError(
                f"{typed!r} does not say on which server; write mlflow:URI/EXPERIMENT, or "
                "set MLFLOW_TRACKING_URI"
            )
        return Target(self.name, experiment or None, server)

    @override
    def server(self) -> str | None:
        return without_login(os.environ.get("MLFLOW_TRACKING_URI") or None)

    @override
    def target_of(self, place: Target, results: Path) -> Target:
        here = self.server()
        if place.server is None:
            own = f"sqlite:///{results.absolute() / 'mlflow.db'}" if here else None
            return Target(self.name, place.project, own)
        if place.server == here:
            return Target(self.name, place.project)
        is_remote = urlsplit(place.server).scheme not in ("sqlite", "file", "")
        has_login = (
            any(os.environ.get(f"MLFLOW_TRACKING_{name}") for name in _LOGINS)
            or expanded(_LOGIN_FILE).exists()
        )
        if is_remote and has_login:
            raise other_login(place, "MLFLOW_TRACKING_URI", results)
        return place

    @override
    def store(self, results: Path, server: str | None) -> tuple[str | None, Path | None]:
        server = server or os.environ.get("MLFLOW_TRACKING_URI")
        return server, None if server else results / "mlflow.db"


def _server_and_experiment(text: str) -> tuple[str, str]:
    """Split an address at `#`, or else after a server's port, or at the last slash of a file."""
    if "#" in text:
        server, _, project = text.partition("#")
    elif text.startswith(("http://", "https://")):
        scheme, _, rest = text.partition("://")
        host, _, project = rest.partition("/")
        server = f"{scheme}://{host}"
    else:
        server, _, project = text.rpartition("/")
    return server, project.strip("/")
