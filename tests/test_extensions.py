"""Extensions of other packages, by their entry points; broken ones are left out."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tracking.conftest import cell_record
from tracker import tracking
from tracker.core.errors import RequestError, TrackingError
from tracker.core.extensions import load_extensions

Install = Callable[..., None]

BACKEND = """
import json
from tracker.tracking.base import Backend, Service

class NotebookService(Service):
    name = "notebook"
    title = "Notebook"

    def open(self, part, project, results, server=None):
        return Notebook(project, results)

class Notebook(Backend):
    name = "notebook"

    def _write(self, runs):
        file = self._results / f"{self._project}.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        for run in runs:
            entry = {"name": run.name, "digest": run.digest("1"), **run.figures}
            yield "created" if run.key not in known else "unchanged"
            known[run.key] = entry
        file.write_text(json.dumps(known))

    def _location(self):
        return f"less {self._results / self._project}.json"
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install packages, each of one module and some entry points."""
    folder = tmp_path / "site"
    folder.mkdir()

    def install(name: str, code: str, group: str, **points: str) -> None:
        monkeypatch.delitem(sys.modules, name, raising=False)
        (folder / f"{name}.py").write_text(code)
        info = folder / f"{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        lines = "".join(f"{point} = {name}:{value}\n" for point, value in points.items())
        (info / "entry_points.txt").write_text(f"[layer_tracker.{group}]\n{lines}")
        tracking.backends.cache_clear()

    monkeypatch.syspath_prepend(folder)
    yield install
    monkeypatch.undo()
    tracking.backends.cache_clear()


def test_a_backend_of_another_package_gets_the_runs(install: Install, tmp_path: Path) -> None:
    install("lab_notebook", BACKEND, "tracking", notebook="NotebookService")
    assert list(tracking.backends()) == ["mlflow", "wandb", "trackio", "notebook"]
    to, cell = tracking.target("notebook:layers"), cell_record(layers=(0, 1))
    backend = tracking.open_backend(to.backend, to.project or "", tmp_path)
    done = backend.publish(cell, [], {})
    assert (done.created, done.location) == (4, f"less {tmp_path}/layers.json")
    runs = json.loads((tmp_path / "layers.json").read_text())
    drops = [run.get("accuracy_drop") for run in runs.values()]
    assert drops[:2] == [run.accuracy_drop for run in reversed(cell.runs)]
    assert backend.publish(cell, [], {}).unchanged == 4
    with pytest.raises(TrackingError, match="notebook:layers could not be read: it cannot be"):
        backend.cells()
    with pytest.raises(RequestError, match="Notebook takes no reports; use one of: mlflow, wandb"):
        tracking.target("notebook", "reports")


@pytest.mark.parametrize(
    ("code", "value", "reason"),
    [
        ("import nosuchmodule", "Any", "ModuleNotFoundError: No module named 'nosuchmodule'"),
        ("raise SystemExit(3)", "Any", "SystemExit: 3"),
        ("", "Missing", "AttributeError: module 'broken' has no attribute 'Missing'"),
        ("Any = 7", "Any", "TypeError: 7 is no subclass of tracker.tracking.base.Service"),
        (BACKEND.replace("def open(", "def begin("), "NotebookService", "TypeError: Can't inst"),
    ],
)
def test_a_broken_extension_is_named_in_one_line_and_left_out(
    install: Install, caplog: pytest.LogCaptureFixture, code: str, value: str, reason: str
) -> None:
    install("broken", code, "tracking", mine=value)
    with caplog.at_level(logging.WARNING):
        assert list(tracking.backends()) == ["mlflow", "wandb", "trackio"]
        tracking.backends()
    (message,) = caplog.messages
    start = "the extension 'mine' (layer_tracker.tracking) of broken 1.2 is left out: "
    assert message.startswith(start + reason)
    assert "\n" not in message


def test_names_of_ours_are_taken_and_the_first_of_two_stays(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install("one", "kind = 1", "formats", int4="kind", int5="kind")
    install("two", "kind = 2", "formats", int5="kind", int6="kind")
    assert load_extensions("formats", lambda kind: kind, reserved=["int4"]) == {
        "int5": 1,
        "int6": 2,
    }
    assert [message.partition(": ")[2] for message in caplog.messages] == [
        "ValueError: the name 'int4' is taken",
        "ValueError: the name 'int5' is taken",
    ]
