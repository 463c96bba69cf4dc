"""Define the interface to MLflow for other packages, without importing MLflow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from typing_extensions import override

from tracker.schema.errors import RequestError
from tracker.schema.fields import expand_home
from tracker.schema.text import mask_secrets
from tracker.tracking.base import PartName, Service, Target, login_error, without_login

_LOGIN_SETTINGS = ("USERNAME", "PASSWORD", "TOKEN", "AUTH", "AWS_SIGV4")
_LOGIN_FILE = Path("~/.mlflow/credentials")


class MlflowService(Service):
    """Interface to MLflow; runs are on a server, or in a SQLite file in the results folder."""

    name = "mlflow"
    title = "MLflow"
    names_server = True
    can = frozenset({"live runs", "reports", "lighter models", "registered models"})

    @override
    def open(self, part: PartName, project: str, results: Path, server: str | None = None) -> Any:
        if part == "live runs":
            return self._isolated("live_run:MlflowLiveRun", project, results, server)
        if part == "lighter models":
            # Its flavours write to whatever run is active, which may be a notebook's.
            return self._isolated("models:MlflowModels", project, results, server)
        from tracker.tracking.mlflow.backend import MlflowBackend

        return MlflowBackend(project, results, server)

    @override
    def target(self, project: str, is_source: bool) -> Target:
        server, experiment = None, project
        typed = mask_secrets(f"{self.name}:{project}")
        if "://" in project:
            server, experiment = _server_and_experiment(project)
            if not experiment:
                raise RequestError(
                    f"{typed!r} does not name an experiment; write mlflow:URI/EXPERIMENT"
                )
        if is_source and not (server or self.server()):
            raise RequestError(
                f"{typed!r} names no server; write mlflow:URI/EXPERIMENT or set MLFLOW_TRACKING_URI"
            )
        return Target(self.name, experiment or None, server)

    @override
    def server(self) -> str | None:
        return without_login(os.environ.get("MLFLOW_TRACKING_URI") or None)

    @override
    def reachable_target(self, address: Target, results: Path) -> Target:
        current_server = self.server()
        if address.server is None:
            local_uri = f"sqlite:///{results.absolute() / 'mlflow.db'}" if current_server else None
            return Target(self.name, address.project, local_uri)
        if address.server == current_server:
            return Target(self.name, address.project)
        is_remote = urlsplit(address.server).scheme not in ("sqlite", "file", "")
        settings = (f"MLFLOW_TRACKING_{name}" for name in _LOGIN_SETTINGS)
        has_login = any(map(os.environ.get, settings)) or expand_home(_LOGIN_FILE).exists()
        if is_remote and has_login:
            raise login_error(address, "MLFLOW_TRACKING_URI", results)
        return address

    @override
    def store(self, results: Path, server: str | None) -> tuple[str | None, Path | None]:
        server = server or os.environ.get("MLFLOW_TRACKING_URI")
        return server, None if server else results / "mlflow.db"


def _server_and_experiment(text: str) -> tuple[str, str]:
    """Split an address into the server and the experiment.

    The address is split at the character `#`. If it contains no `#`, an HTTP address is split at
    the first slash after the host, and any other address is split at the last slash.
    """
    if "#" in text:
        server, _, project = text.partition("#")
    elif text.startswith(("http://", "https://")):
        scheme, _, path = text.partition("://")
        host, _, project = path.partition("/")
        server = f"{scheme}://{host}"
    else:
        server, _, project = text.rpartition("/")
    return server, project.strip("/")
