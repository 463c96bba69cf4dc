"""What W&B is to the rest of the house; its sweeps besides, which no other backend has."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import cast

from typing_extensions import override

from tracker.core.errors import RequestError
from tracker.core.text import masked
from tracker.tracking.base import (
    Backend,
    LiveRun,
    Models,
    Service,
    Target,
    other_login,
    without_login,
)
from tracker.tracking.isolated import Isolated

_SWEEP = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH")
"""What an agent tells its trial. Whoever has it can open the trial's own run and no other."""
_OFFLINE = "offline"
"""Where W&B writes files: they go wherever `wandb sync` sends them."""


class WandbService(Service):
    """W&B: a project of an entity, or files beside the results."""

    name = "wandb"
    title = "W&B"
    can = frozenset({"live runs", "reports", "lighter models"})
    runs_sweeps = True

    @override
    def open(self, project: str, results: Path, server: str | None) -> Backend:
        arguments = (project, results, in_sweep())
        return cast(Backend, self._isolated("backend:WandbBackend", *arguments, without=_SWEEP))

    @override
    def refuse_closed(self, results: Path) -> None:
        if in_sweep() or self.server() == _OFFLINE or os.environ.get("WANDB_API_KEY"):
            return
        with closing(self._isolated("backend:WandbBackend", "", results, False)) as backend:
            if not backend.is_open():
                raise RequestError(
                    "nobody is logged in to W&B here, so its runs could not be written. Type "
                    "`wandb login`. Or set WANDB_MODE=offline: W&B's runs are then files in "
                    f"{results / 'wandb'}, for `wandb sync`. Or leave W&B out with --track mlflow, "
                    f"whose runs are in {results}. Nothing was measured"
                )

    @override
    def open_live_run(self, project: str, results: Path, server: str | None) -> LiveRun:
        isolated = self._isolated("sweep:WandbLiveRun", project, results, without=_SWEEP)
        return cast(LiveRun, isolated)

    @override
    def open_models(self, project: str, results: Path, server: str | None) -> Models:
        return cast(Models, self.open(project, results, server))

    @override
    def source(self, to: Target, typed: str) -> Target:
        if "/" not in (to.project or "") and "WANDB_ENTITY" not in os.environ:
            raise RequestError(f"{masked(typed)!r} names no entity; write wandb:ENTITY/PROJECT")
        return to

    @override
    def server(self) -> str | None:
        if os.environ.get("WANDB_MODE") == _OFFLINE:
            return _OFFLINE
        return without_login(os.environ.get("WANDB_BASE_URL") or None)

    @override
    def place_of(self, to: Target, project: str) -> Target:
        entity, project = os.environ.get("WANDB_ENTITY"), masked(to.project or project)
        if entity and "/" not in project:
            project = f"{entity}/{project}"
        return Target(self.name, project, self.server())

    @override
    def target_of(self, place: Target, results: Path) -> Target:
        if place.server != self.server():
            raise other_login(place, "WANDB_BASE_URL", results)
        return Target(self.name, place.project)

    @override
    def is_kept_here(self, place: Target) -> bool:
        return (place.server == _OFFLINE) == (self.server() == _OFFLINE)

    @override
    def store(self, results: Path, server: str | None) -> tuple[str | None, Path | None]:
        names = ("WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_MODE", "WANDB_SWEEP_ID")
        setting = " ".join(os.environ.get(name, "") for name in names)
        return setting, results / "wandb" if self.server() == _OFFLINE else None


def in_sweep() -> bool:
    """Say whether a W&B agent started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def open_trial(results: Path) -> Isolated:
    """Open the run that a W&B agent opened for this process: a `WandbTrial` in one of its own."""
    return Isolated(WandbService.title, "tracker.tracking.wandb.sweep:WandbTrial", results)


def open_sweep(path: str, results: Path) -> Isolated:
    """Open a W&B sweep: a `WandbSweep` in a process of its own.

    Args:
        path: `ENTITY/PROJECT/ID`.
        results: The results folder.

    Returns:
        The sweep; nothing is contacted before it is used.

    Raises:
        RequestError: The path names no sweep.
    """
    if len([part for part in path.split("/") if part]) != 3 or path.count("/") != 2:
        raise RequestError(f"{masked(path)!r} names no sweep; write ENTITY/PROJECT/ID")
    kind = "tracker.tracking.wandb.sweep:WandbSweep"
    return Isolated(WandbService.title, kind, path, results, without=_SWEEP)
