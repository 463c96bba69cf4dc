"""A tracking backend: one JSON file for a project, in the results folder."""

import json

from tracker.tracking.base import Backend, Service


class NotebookService(Service):
    """The backend as users choose it: `--track notebook` or `--track notebook:PROJECT`."""

    name = "notebook"
    title = "Notebook"

    def open(self, part, project, results, server=None):
        """Open the project."""
        return Notebook(project, results)


class Notebook(Backend):
    """Write runs into a JSON file."""

    name = "notebook"

    def _write(self, runs):
        file = self._results / f"{self._project}.json"
        entries = json.loads(file.read_text()) if file.exists() else {}
        for run in runs:
            entry = {"name": run.name, "digest": run.digest("1"), **run.figures}
            yield "unchanged" if entries.get(run.key) == entry else "created"
            entries[run.key] = entry
        file.write_text(json.dumps(entries))

    def _location(self):
        return str(self._results / f"{self._project}.json")
