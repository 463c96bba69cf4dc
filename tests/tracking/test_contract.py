"""Contract of every backend: a new one adds its `Held` to `HELD`, and passes these tests."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient

from tests.helpers.ablations import with_figures
from tests.helpers.wandb_double import WandbDouble
from tracker.schema.errors import RequestError
from tracker.schema.estimates import Estimate
from tracker.schema.identities import Half
from tracker.schema.records import CellRecord
from tracker.tracking import backends, open_backend, service, target
from tracker.tracking.base import Isolated
from tracker.tracking.figures import (
    LoggedTable,
    cell_figures,
    defined_figures,
    intact_metrics,
    run_metrics,
)
from tracker.tracking.identity import cell_run_name, group_name, run_key, run_name
from tracker.tracking.mlflow.writing import DIGEST_TAG
from tracker.tracking.runs import describe_cell, describe_run

from .conftest import cell_record, file_contents, run_of_kind, sqlite_uri

PROJECT = "contract"
DOCUMENT_TABLE = LoggedTable(("task", "choice"), (("arc_easy", 1), ("arc_easy", None)))


@dataclass(frozen=True)
class ShownRun:
    """A run as a reader sees it; figures that are shown as undefined are not there."""

    name: str
    group: object
    figures: dict[str, float]
    identity: tuple[str, ...]
    reasons: dict[str, str]
    note: str
    curves: dict[str, list[tuple[int, float | None]]]


class HeldProject(ABC):
    """A project of a backend, and what its own tools read of it."""

    name: str

    def __init__(self, results: Path, project: str = PROJECT, server: str | None = None) -> None:
        self.results, self.project, self.server = results, project, server
        self.open()

    def open(self) -> None:
        self.backend = open_backend(self.name, self.project, self.results, self.server)

    def open_anew(self) -> None:
        """Go on as another process does."""
        self.backend.close()
        self.open()

    def publish(self, cell: CellRecord, *files: Path) -> tuple[int, int, int]:
        published = self.backend.publish(cell, files, {}, {"documents": DOCUMENT_TABLE})
        return published.created, published.updated, published.unchanged

    def by_key(self) -> dict[str, ShownRun]:
        keyed_runs = [(self.key_of(run), self.read_run(run)) for run in self.runs()]
        assert len({key for key, _ in keyed_runs}) == len(keyed_runs), "a run was created twice"
        return dict(keyed_runs)

    def run(self, key: str) -> Any:
        (matching,) = (run for run in self.runs() if self.key_of(run) == key)
        return matching

    @abstractmethod
    def runs(self) -> list[Any]:
        """Read every run."""

    @abstractmethod
    def key_of(self, run: Any) -> str: ...

    @abstractmethod
    def read_run(self, run: Any) -> ShownRun: ...

    @abstractmethod
    def table(self, key: str, name: str) -> list[dict[str, Any]]:
        """Read a table of a run, a row a dictionary."""

    @abstractmethod
    def break_off(self, key: str) -> None:
        """Leave a run as a publisher leaves it that was killed in the middle, or worse."""


class MlflowProject(HeldProject):
    name = "mlflow"

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.server or sqlite_uri(self.results))

    def runs(self) -> list[Any]:
        experiment = self.client.get_experiment_by_name(self.project)
        return list(self.client.search_runs([experiment.experiment_id], max_results=1000))

    def key_of(self, run: Any) -> str:
        return run.data.tags["tracker.run_key"]

    def read_run(self, run: Any) -> ShownRun:
        tags, metrics = run.data.tags, run.data.metrics
        parent = tags.get("mlflow.parentRunId", run.info.run_id)
        assert self.client.get_run(parent).data.tags["tracker.cell"] == tags["tracker.cell"]
        curves = {}
        for name in metrics if parent == run.info.run_id else ():
            points = self.client.get_metric_history(run.info.run_id, name)
            points = sorted(points, key=lambda point: (point.step, point.timestamp))
            values = [None if math.isnan(point.value) else point.value for point in points]
            curves[name] = list(zip([point.step for point in points], values, strict=True))
        reason = "tracker.reason."
        return ShownRun(
            run.info.run_name,
            parent,
            {name: value for name, value in metrics.items() if not math.isnan(value)},
            identity_fields(run.data.params),
            {n.removeprefix(reason): text for n, text in tags.items() if n.startswith(reason)},
            tags["mlflow.note.content"].partition("\n\nRuns:")[0],
            curves,
        )

    def table(self, key: str, name: str) -> list[dict[str, Any]]:
        run_id = self.run(key).info.run_id
        path = self.client.download_artifacts(run_id, f"tables/{name}.json")
        return table_rows(json.loads(Path(path).read_text()))

    def break_off(self, key: str) -> None:
        self.client.delete_tag(self.run(key).info.run_id, DIGEST_TAG)


class WandbProject(HeldProject):
    name = "wandb"

    def __init__(self, results: Path, double: WandbDouble) -> None:
        super().__init__(results, f"team/{PROJECT}")
        self.double = double

    def runs(self) -> list[Any]:
        return list(self.double.projects["team", PROJECT].runs.values())

    def key_of(self, run: Any) -> str:
        return run.values["tracker"]["run_key"]

    def read_run(self, run: Any) -> ShownRun:
        names = {name for row in run.history for name in row if name[0] != "_"}
        assert run.state == "finished"
        return ShownRun(
            run.name,
            run.group,
            {n: v for n, v in run.summary.items() if n[0] != "_" and is_number(v)},
            identity_fields(run.values),
            run.values["tracker"].get("reasons", {}),  # it keeps no empty ones
            run.notes,
            {
                name: [(row["layer"], row[name]) for row in run.history if name in row]
                for name in names
                if all("layer" in row for row in run.history if name in row)
            },
        )

    def table(self, key: str, name: str) -> list[dict[str, Any]]:
        run = self.run(key)
        return table_rows(json.loads(run.files[run.summary[f"tables/{name}"]["path"]]))

    def break_off(self, key: str) -> None:
        run = self.run(key)
        if key.endswith("/cell"):
            run.state = "crashed"
        else:
            del run.config["tracker"]["value"]["digest"]
            run.summary = {}


class TrackioProject(HeldProject):
    name = "trackio"

    def __init__(self, results: Path, project: str, reader: Isolated) -> None:
        super().__init__(results, project)
        self.reader = reader

    def runs(self) -> list[Any]:
        return list(self.reader.runs(self.project))

    def key_of(self, run: Any) -> str:
        return run["config"]["tracker"]["run_key"]

    def read_run(self, run: Any) -> ShownRun:
        config, logs = run["config"], run["logs"]
        names = {name for row in logs for name in row if is_number(row[name])} - {"step"}
        run_rows = [row for row in logs if row["step"] == config.get("layer", 0)]
        return ShownRun(
            run["name"],
            config["_Group"],
            {name: value for row in run_rows for name, value in row.items() if name in names},
            identity_fields(config),
            config["tracker"]["reasons"],
            config["note"],
            {name: [(row["step"], row[name]) for row in logs if name in row] for name in names},
        )

    def table(self, key: str, name: str) -> list[dict[str, Any]]:
        logs = self.run(key)["logs"]
        (table,) = (row[f"tables/{name}"] for row in logs if f"tables/{name}" in row)
        return list(table["_value"])

    def break_off(self, key: str) -> None:
        assert self.reader.delete(self.project, self.run(key)["name"])


def is_number(value: object) -> bool:
    return isinstance(value, int | float)


def identity_fields(config: dict[str, Any]) -> tuple[str, ...]:
    names = ("layer", "component", "span", "intervention")
    return tuple(str(config[name]) for name in names if name in config)


def table_rows(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


@pytest.fixture(scope="module")
def trackio(tmp_path_factory) -> Iterator[Isolated]:
    """Create a Trackio folder that this process knows, and its reader."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        reader = Isolated("Trackio", "tests.tracking.trackio_reader:TrackioReader")
        yield reader
        reader.close()


@pytest.fixture
def held(request, tmp_path) -> Iterator[HeldProject]:
    results, project = tmp_path / "held", f"{PROJECT}-{tmp_path.name}"
    results.mkdir()
    held_project: HeldProject
    if request.param == "wandb":
        held_project = WandbProject(results, request.getfixturevalue("lent"))
    elif request.param == "trackio":
        held_project = TrackioProject(results, project, request.getfixturevalue("trackio"))
    elif request.param == "mlflow":
        held_project = MlflowProject(request.getfixturevalue("results"), project)
    else:
        held_project = MlflowProject(results, project, request.getfixturevalue("server"))
    yield held_project
    held_project.backend.close()


IN_FILES, ON_SERVERS = (
    pytest.mark.parametrize("held", [mlflow, "wandb", "trackio"], indirect=True)
    for mlflow in ("mlflow", "mlflow server")
)
"""Backends, with MLflow in a SQLite file or on a server."""


def check_shown(held: HeldProject, cell: CellRecord) -> dict[str, ShownRun]:
    """Hold all that is shown of a cell against its record."""
    shown_runs = {key: run for key, run in held.by_key().items() if key.startswith(cell.key)}
    keys = [run_key(cell, run.ablation) for run in cell.runs]
    assert set(shown_runs) >= {*keys, run_key(cell, "baseline"), run_key(cell, "cell")}
    for key, run in zip(keys, cell.runs, strict=True):
        entry, described = shown_runs[key], describe_run(cell, run)
        assert (entry.figures, entry.reasons) == (described.figures, described.reasons)
        assert (entry.name, entry.note) == (run_name(cell, run.change), described.note)
        fields = ("layer", "component", "span", "intervention")
        assert entry.identity == tuple(str(getattr(run.change, name)) for name in fields)
    assert shown_runs[run_key(cell, "baseline")].figures == intact_metrics(cell)
    parent = shown_runs[run_key(cell, "cell")]
    assert defined_figures(cell_figures(cell)).items() <= parent.figures.items()
    assert (parent.name, parent.note) == (cell_run_name(cell), describe_cell(cell).note)
    assert parent.reasons == describe_cell(cell).reasons
    assert len({shown_runs[key].group for key in (*keys, run_key(cell, "cell"))}) == 1
    if held.name != "mlflow":
        assert parent.group == group_name(cell)
    for name in ("accuracy_drop", "accuracy_relevance", "gold_logprob_drop"):
        points = [(run.change.layer, run.figure(name)) for run in cell.runs]
        points = [point for point in points if point[1] is not None and math.isfinite(point[1])]
        assert parent.curves.get(name, []) == points
    return shown_runs


@ON_SERVERS
def test_published_runs_are_read_back(held, tmp_path):
    cell = cell_record()
    metrics = {"exact_match,strict": 0.25, "größe": 0.5}
    infinite = {"gold_drop": Estimate(math.inf), "metrics": metrics}
    *runs, last_run = cell.runs
    cell = cell.model_copy(update={"runs": (*runs, last_run.model_copy(update=infinite))})
    files = [tmp_path / "outcomes.parquet", tmp_path / "view.json"]
    for file in files:
        file.write_bytes(file.name.encode() * 99)
    assert held.publish(cell, *files) == (6, 0, 0)
    first_runs = check_shown(held, cell)
    second_run, third_run = (first_runs[run_key(cell, f"layer:{n}")] for n in (2, 3))
    assert second_run.reasons["accuracy_relevance"] == "the baseline is at or below chance"
    assert "accuracy_relevance" not in second_run.figures
    assert third_run.reasons["gold_logprob_drop"] == "not a finite number: inf"
    assert third_run.figures["accuracy_drop"] == cell.runs[3].drop.value
    assert third_run.figures["metric/exact_match/strict"] == 0.25
    assert third_run.figures["metric/gr__e"] == 0.5

    key = run_key(cell, "cell")
    layers = pd.DataFrame(held.table(key, "layers"))
    assert layers["layer"].tolist() == [0, 1, 2, 3]
    assert layers["accuracy_drop"].tolist() == [run.drop.value for run in cell.runs]
    assert "at or below chance" in layers["reasons"][2]
    assert held.table(key, "correlations")[1]["reason"].startswith("the angular distance is the")
    choices = [(row["task"], row["choice"]) for row in held.table(key, "documents")]
    assert choices == [("arc_easy", 1), ("arc_easy", None)]

    held.open_anew()
    (remote,) = held.backend.cells()
    assert (remote.key, remote.name) == (key, cell_run_name(cell))
    folder = tmp_path / "fetched"
    folder.mkdir()
    held.backend.fetch(remote, folder)
    assert file_contents(folder.iterdir()) == file_contents(files)
    assert held.publish(cell, *files) == (0, 0, 6)
    assert held.by_key() == first_runs


@IN_FILES
def test_grown_and_interrupted_runs_are_updated(held):
    part_cell, whole_cell = cell_record(layers=(0, 1)), cell_record()
    assert held.publish(part_cell) == (4, 0, 0)
    assert held.publish(whole_cell) == (2, 1, 3)
    check_shown(held, whole_cell)
    grown = cell_record(n=320)
    undefined = {"accuracy_relevance": None, "reasons": {"accuracy_relevance": "undefined now"}}
    defined = {"accuracy_relevance": 0.5, "reasons": {}}
    changed = [{}, {"accuracy_drop": 0.08, **undefined}, defined, {}]
    runs = [with_figures(run, **update) for run, update in zip(grown.runs, changed, strict=True)]
    grown = grown.model_copy(update={"runs": tuple(runs)})
    assert held.publish(grown) == (0, 6, 0)
    check_newest(held, grown)
    cell_key = run_key(grown, "cell")
    grown_runs = held.by_key()
    assert len(grown_runs) == 6
    # What takes no point back has two of what has changed, W&B of its whole row; none has more.
    n_points = {"mlflow": (5, 4), "wandb": (6, 6), "trackio": (4, 4)}[held.name]
    curves = grown_runs[cell_key].curves
    assert (len(curves["accuracy_drop"]), len(curves["cosine_score"])) == n_points
    table = held.table(cell_key, "layers")
    drops = [(run.change.layer, run.drop.value) for run in grown.runs]
    assert [(row["layer"], row["accuracy_drop"]) for row in table] == drops

    for key in (run_key(grown, "layer:3"), cell_key):
        held.break_off(key)
    held.open_anew()
    created, updated, unchanged = held.publish(grown)
    assert (created + updated, unchanged) == (2, 4)
    assert held.by_key() == grown_runs
    assert held.publish(grown) == (0, 0, 6)


@ON_SERVERS
def test_a_larger_view_takes_over_runs(held):
    """Was: runs of 16, 24 and 32 documents stood complete beside each other for ever."""
    views = {n: {"view": f"intact-sample-{n}-seed-1234"} for n in (16, 24, 32)}
    small, middle, large = (cell_record(n=n).model_copy(update=views[n]) for n in views)
    assert held.publish(small) == (6, 0, 0)
    middle = middle.model_copy(update={"supersedes": (small.view,)})
    assert held.publish(middle) == (0, 6, 0)
    assert len(held.by_key()) == 6
    check_newest(held, middle)
    # Somebody published the former once more in the meantime, under the ids that are free.
    assert held.publish(small) == (6, 0, 0)
    assert len(held.by_key()) == 12
    large = large.model_copy(update={"supersedes": (small.view, middle.view)})
    assert held.publish(large) == (0, 6, 0)
    names = ("baseline", "cell", *(run.ablation for run in large.runs))
    assert set(held.by_key()) == {run_key(large, name) for name in names}
    check_newest(held, large)
    held.open_anew()
    assert held.publish(large) == (0, 0, 6)


def check_newest(held: HeldProject, cell: CellRecord) -> None:
    """As `shows`, but for the curves, where what is not defined any more was once."""
    shown_runs = held.by_key()
    for run in cell.runs:
        shown_run = shown_runs[run_key(cell, run.ablation)]
        assert shown_run.figures == run_metrics(run)
        assert shown_run.reasons == describe_run(cell, run).reasons
    parent = shown_runs[run_key(cell, "cell")]
    assert defined_figures(cell_figures(cell)).items() <= parent.figures.items()
    # A backend that takes no point back has several of a layer, the newest last.
    drops = {run.change.layer: run.drop.value for run in cell.runs}
    assert dict(parent.curves["accuracy_drop"]) == drops


# Was: one ablation had one run a cell, whatever it stood for, and cells overwrote each other's.
@IN_FILES
def test_other_views_have_other_runs(held):
    cell = cell_record(layers=(0,))
    (task,) = cell.benchmark.tasks
    half = task.model_copy(update={"half": Half(part="test", seed=1234, of=2 * task.documents)})
    settings = {"tasks": (half,), "settings": {"part": "test"}}
    runs = (run_of_kind("layer", 1, 1, "layers:1,2"), run_of_kind("mlp", 3, 1, "layer:2+mlp:3"))
    changes = {"runs": runs, "removed": (2,), "remaining": Estimate(0.25), "view": "without-2"}
    cells = [
        cell.model_copy(update={"runs": (*cell.runs, run_of_kind("layer", 1, 2, "layers:1,2"))}),
        cell.model_copy(update=changes),
        cell.model_copy(update={"metric": "acc_norm", "view": "intact--acc_norm"}),
        cell.model_copy(update={"sample_seed": 1234, "view": "intact-sample-160-seed-1234"}),
        cell_record(layers=(0,), key="half").model_copy(
            update={"benchmark": cell.benchmark.model_copy(update=settings)}
        ),
    ]
    for other_cell in cells:
        assert held.publish(other_cell) == (2 + len(other_cell.runs), 0, 0)
    held.open_anew()
    for other_cell in cells:
        assert held.publish(other_cell) == (0, 0, 2 + len(other_cell.runs))
    shown_runs = held.by_key()
    assert len(shown_runs) == sum(2 + len(other_cell.runs) for other_cell in cells)
    assert len({shown_run.name for shown_run in shown_runs.values()}) == len(shown_runs)
    assert len({shown_run.group for shown_run in shown_runs.values()}) == len(cells)
    baseline = shown_runs[run_key(cells[1], "baseline")]
    assert baseline.name.startswith("without 2 · ")
    assert baseline.figures == {"n": 160, "accuracy": 0.25, "accuracy_drop": 0.25}
    assert "drops are relative to the intact model" in baseline.note
    parent = shown_runs[run_key(cells[1], "cell")]
    assert parent.figures["removed_accuracy"] == 0.25
    assert "without layer 2" in parent.name
    names = {shown_runs[run_key(cells[1], run.ablation)].name for run in cells[1].runs}
    assert {name.split(" · ")[0] for name in names} == {"layer 01 without 2", "mlp 03 without 2"}


@pytest.mark.parametrize("name", backends())
def test_missing_abilities_are_refused(name, tmp_path):
    entry = service(name)
    assert entry.name == name
    assert target(f"{name}:layers").project == "layers"
    open_backend(name, PROJECT, tmp_path).close()
    for ability in ("reports", "lighter models", "registered models"):
        if ability in entry.can:
            assert target(name, ability).backend == name
        else:
            with pytest.raises(
                RequestError, match=f"{entry.title} does not support {ability}; use"
            ):
                target(name, ability)
