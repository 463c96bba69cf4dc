"""Reads Trackio projects with Trackio's own API; it lives in a process that knows their folder."""

from __future__ import annotations

from typing import Any

import trackio
from trackio.sqlite_storage import SQLiteStorage


class TrackioReader:
    """The projects of its folder."""

    def runs(self, project: str) -> list[dict[str, Any]]:
        """Give every run of a project with its configuration and all that it logged."""
        return [
            {
                "name": run.name,
                "config": run.config,
                "logs": [
                    {name: value for name, value in row.items() if name != "timestamp"}
                    for row in SQLiteStorage.get_logs(project, run.name, run_id=run.id)
                ],
            }
            for run in trackio.Api().runs(project)
        ]

    def delete(self, project: str, name: str) -> bool:
        """Delete a run by its name."""
        (run,) = (run for run in trackio.Api().runs(project) if run.name == name)
        return run.delete()
