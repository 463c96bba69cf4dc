"""Define the interface to W&B for other packages, without importing W&B."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import Any

from typing_extensions import override

from tracker.schema.errors import RequestError
from tracker.schema.text import mask_secrets
from tracker.tracking.base import OFFLINE, PartName, Service, Target, login_error, without_login

_SESSION_SETTINGS = ("WANDB_SERVICE",)
"""Environment variable by which a process finds the session of its parent."""
_SWEEP_SETTINGS = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH")
"""Environment variables of a sweep's trial; a process with them can only open the trial's run."""


class WandbService(Service):
    """Interface to W&B; runs are stored on a W&B server, or in offline files."""

    name = "wandb"
    title = "W&B"
    can = frozenset({"live runs", "reports", "lighter models"})
    sweep_variable = _SWEEP_SETTINGS[0]

    @override
    def open(self, part: PartName, project: str, results: Path, server: str | None = None) -> Any:
        remove = (*_SESSION_SETTINGS, *_SWEEP_SETTINGS)
        if part == "trial":  # the one part that finds the run of its trial
            return self._isolated("sweep:WandbTrial", results, remove=_SESSION_SETTINGS)
        if part == "sweep":
            return self._isolated("sweep:WandbSweep", _sweep_path(project), results, remove=remove)
        if part == "live runs":
            return self._isolated("sweep:WandbLiveRun", project, results, remove=remove)
        arguments = (project, results, _in_sweep())
        return self._isolated("backend:WandbBackend", *arguments, remove=remove)

    @override
    def refuse_closed(self, results: Path) -> None:
        if _in_sweep() or self.server() == OFFLINE or os.environ.get("WANDB_API_KEY"):
            return
        arguments = ("", results, False)
        isolated = self._isolated("backend:WandbBackend", *arguments, remove=_SESSION_SETTINGS)
        with closing(isolated) as backend:
            if not backend.is_open():
                raise RequestError(
                    "nothing was measured, because nobody is logged in to W&B on this machine. To "
                    "log in, type `wandb login`. To write offline runs to "
                    f"{results / 'wandb'} and upload them later with `wandb sync`, set "
                    "WANDB_MODE=offline. To write MLflow runs to "
                    f"{results} instead, add --track mlflow"
                )

    @override
    def target(self, project: str, is_source: bool) -> Target:
        if is_source and "/" not in project and "WANDB_ENTITY" not in os.environ:
            typed = mask_secrets(f"{self.name}:{project}")
            raise RequestError(f"{typed!r} does not name an entity; write wandb:ENTITY/PROJECT")
        return Target(self.name, project or None)

    @override
    def server(self) -> str | None:
        if os.environ.get("WANDB_MODE") == OFFLINE:
            return OFFLINE
        return without_login(os.environ.get("WANDB_BASE_URL") or None)

    @override
    def full_address(self, target: Target, project: str) -> Target:
        entity, project = os.environ.get("WANDB_ENTITY"), mask_secrets(target.project or project)
        if entity and "/" not in project:
            project = f"{entity}/{project}"
        return Target(self.name, project, self.server())

    @override
    def reachable_target(self, address: Target, results: Path) -> Target:
        if address.server != self.server():
            raise login_error(address, "WANDB_BASE_URL", results)
        return Target(self.name, address.project)

    @override
    def store(self, results: Path, server: str | None) -> tuple[str | None, Path | None]:
        names = ("WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_MODE", "WANDB_SWEEP_ID")
        setting = " ".join(os.environ.get(name, "") for name in names)
        return setting, results / "wandb" if self.server() == OFFLINE else None


def _in_sweep() -> bool:
    """Return whether a W&B sweep agent started this process."""
    return bool(os.environ.get(WandbService.sweep_variable))


def _sweep_path(path: str) -> str:
    """Return the path `ENTITY/PROJECT/ID` of a sweep; an empty `path` means the current sweep."""
    if not path:
        names = ("WANDB_ENTITY", "WANDB_PROJECT", "WANDB_SWEEP_ID")
        path = "/".join(os.environ.get(name, "") for name in names)
    if len([part for part in path.split("/") if part]) != 3 or path.count("/") != 2:
        raise RequestError(f"{mask_secrets(path)!r} does not name a sweep; write ENTITY/PROJECT/ID")
    return path
