"""Reads a Trackio project with Trackio's own API; it lives in a process that knows its folder."""

from __future__ import annotations

from typing import Any

import trackio
from trackio.sqlite_storage import SQLiteStorage


class TrackioReader:
    """A project."""

    def __init__(self, project: str) -> None:
        self._project = project

    def runs(self) -> list[dict[str, Any]]:
        """Give every run with its configuration and all that it logged."""
        return [
            {
                "name": run.name,
                "config": run.config,
                "logs": [
                    {name: value for name, value in row.items() if name != "timestamp"}
                    for row in SQLiteStorage.get_logs(self._project, run.name, run_id=run.id)
                ],
            }
            for run in trackio.Api().runs(self._project)
        ]

    def delete(self, name: str) -> bool:
        """Delete a run by its name."""
        (run,) = (run for run in trackio.Api().runs(self._project) if run.name == name)
        return run.delete()
