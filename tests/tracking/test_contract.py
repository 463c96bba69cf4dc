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
from tracker.core.errors import RequestError
from tracker.core.estimates import Estimate
from tracker.core.identities import Half
from tracker.core.records import CellRecord
from tracker.tracking import backends, open_backend, service, target
from tracker.tracking.figures import (
    LoggedTable,
    cell_figures,
    flat_metrics,
    intact_metrics,
    only_defined,
)
from tracker.tracking.identity import cell_name, group_name, run_key, run_name
from tracker.tracking.isolated import Isolated
from tracker.tracking.mlflow.writing import DIGEST_TAG
from tracker.tracking.runs import cell_run, layer_run

from .conftest import cell_record, local, of_kind

PROJECT = "contract"
WHOLE = {"documents": LoggedTable(("task", "choice"), (("arc_easy", 1), ("arc_easy", None)))}


@dataclass(frozen=True)
class Seen:
    """A run as a reader sees it; figures that are shown as undefined are not there."""

    name: str
    group: object
    figures: dict[str, float]
    which: tuple[str, ...]
    reasons: dict[str, str]
    note: str
    curves: dict[str, list[tuple[int, float | None]]]


class Held(ABC):
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
        done = self.backend.publish(cell, files, {}, WHOLE)
        return done.created, done.updated, done.unchanged

    def by_key(self) -> dict[str, Seen]:
        found = [(self.key_of(run), self.seen(run)) for run in self.runs()]
        assert len({key for key, _ in found}) == len(found), "a run was created twice"
        return dict(found)

    def run(self, key: str) -> Any:
        (found,) = (run for run in self.runs() if self.key_of(run) == key)
        return found

    @abstractmethod
    def runs(self) -> list[Any]:
        """Read every run."""

    @abstractmethod
    def key_of(self, run: Any) -> str: ...

    @abstractmethod
    def seen(self, run: Any) -> Seen: ...

    @abstractmethod
    def table(self, key: str, name: str) -> list[dict[str, Any]]:
        """Read a table of a run, a row a dictionary."""

    @abstractmethod
    def break_off(self, key: str) -> None:
        """Leave a run as a publisher leaves it that was killed in the middle, or worse."""


class HeldByMlflow(Held):
    name = "mlflow"

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.server or local(self.results))

    def runs(self) -> list[Any]:
        place = self.client.get_experiment_by_name(self.project)
        return list(self.client.search_runs([place.experiment_id], max_results=1000))

    def key_of(self, run: Any) -> str:
        return run.data.tags["tracker.run_key"]

    def seen(self, run: Any) -> Seen:
        tags, metrics = run.data.tags, run.data.metrics
        parent = tags.get("mlflow.parentRunId", run.info.run_id)
        assert self.client.get_run(parent).data.tags["tracker.cell"] == tags["tracker.cell"]
        curves = {}
        for name in metrics if parent == run.info.run_id else ():
            points = self.client.get_metric_history(run.info.run_id, name)
            points = sorted(points, key=lambda point: (point.step, point.timestamp))
            curves[name] = [
                (point.step, None if math.isnan(point.value) else point.value) for point in points
            ]
        reason = "tracker.reason."
        return Seen(
            run.info.run_name,
            parent,
            {name: value for name, value in metrics.items() if not math.isnan(value)},
            which(run.data.params),
            {n.removeprefix(reason): why for n, why in tags.items() if n.startswith(reason)},
            tags["mlflow.note.content"].partition("\n\nRuns:")[0],
            curves,
        )

    def table(self, key: str, name: str) -> list[dict[str, Any]]:
        run_id = self.run(key).info.run_id
        path = self.client.download_artifacts(run_id, f"tables/{name}.json")
        return rows(json.loads(Path(path).read_text()))

    def break_off(self, key: str) -> None:
        self.client.delete_tag(self.run(key).info.run_id, DIGEST_TAG)


class HeldByWandb(Held):
    name = "wandb"

    def __init__(self, results: Path, double: WandbDouble) -> None:
        super().__init__(results, f"team/{PROJECT}")
        self.double = double

    def runs(self) -> list[Any]:
        return list(self.double.projects["team", PROJECT].runs.values())

    def key_of(self, run: Any) -> str:
        return run.values["tracker"]["run_key"]

    def seen(self, run: Any) -> Seen:
        names = {name for row in run.history for name in row if name[0] != "_"}
        assert run.state == "finished"
        return Seen(
            run.name,
            run.group,
            {n: v for n, v in run.summary.items() if n[0] != "_" and numeric(v)},
            which(run.values),
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
        return rows(json.loads(run.files[run.summary[f"tables/{name}"]["path"]]))

    def break_off(self, key: str) -> None:
        run = self.run(key)
        if key.endswith("/cell"):
            run.state = "crashed"
        else:
            del run.config["tracker"]["value"]["digest"]
            run.summary = {}


class HeldByTrackio(Held):
    name = "trackio"

    def __init__(self, results: Path, project: str, reader: Isolated) -> None:
        super().__init__(results, project)
        self.reader = reader

    def runs(self) -> list[Any]:
        return list(self.reader.runs(self.project))

    def key_of(self, run: Any) -> str:
        return run["config"]["tracker"]["run_key"]

    def seen(self, run: Any) -> Seen:
        config, logs = run["config"], run["logs"]
        names = {name for row in logs for name in row if numeric(row[name])} - {"step"}
        own = [row for row in logs if row["step"] == config.get("layer", 0)]
        return Seen(
            run["name"],
            config["_Group"],
            {name: value for row in own for name, value in row.items() if name in names},
            which(config),
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


def numeric(value: object) -> bool:
    return isinstance(value, int | float)


def which(config: dict[str, Any]) -> tuple[str, ...]:
    names = ("layer", "component", "span", "intervention")
    return tuple(str(config[name]) for name in names if name in config)


def rows(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


@pytest.fixture(scope="module")
def trackio(tmp_path_factory) -> Iterator[Isolated]:
    """Create a Trackio folder that this process knows, and its reader."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        reader = Isolated("Trackio", "tests.tracking.trackio_reader:TrackioReader")
        yield reader
        reader.close()


@pytest.fixture(params=["mlflow", "mlflow server", "wandb", "trackio"])
def held(request, tmp_path) -> Iterator[Held]:
    results, project = tmp_path / "held", f"{PROJECT}-{tmp_path.name}"
    results.mkdir()
    held: Held
    if request.param == "wandb":
        held = HeldByWandb(results, request.getfixturevalue("lent"))
    elif request.param == "trackio":
        held = HeldByTrackio(results, project, request.getfixturevalue("trackio"))
    elif request.param == "mlflow":
        held = HeldByMlflow(request.getfixturevalue("results"), project)
    else:
        held = HeldByMlflow(results, project, request.getfixturevalue("server"))
    yield held
    held.backend.close()


def shows(held: Held, cell: CellRecord) -> dict[str, Seen]:
    """Hold all that is shown of a cell against its record."""
    mine = {key: seen for key, seen in held.by_key().items() if key.startswith(cell.key)}
    keys = [run_key(cell, run.ablation) for run in cell.runs]
    assert set(mine) >= {*keys, run_key(cell, "baseline"), run_key(cell, "cell")}
    for run in cell.runs:
        seen = mine[run_key(cell, run.ablation)]
        assert seen.figures == layer_run(cell, run).figures
        assert seen.name == run_name(cell, run.change)
        assert seen.note == layer_run(cell, run).note
        assert seen.reasons == layer_run(cell, run).reasons
        assert seen.which == (
            str(run.change.layer),
            run.change.component,
            str(run.change.span),
            run.change.intervention,
        )
    assert mine[run_key(cell, "baseline")].figures == intact_metrics(cell)
    whole = mine[run_key(cell, "cell")]
    assert only_defined(cell_figures(cell)).items() <= whole.figures.items()
    assert (whole.name, whole.note) == (cell_name(cell), cell_run(cell).note)
    assert whole.reasons == cell_run(cell).reasons
    assert len({mine[key].group for key in (*keys, run_key(cell, "cell"))}) == 1
    if held.name != "mlflow":
        assert whole.group == group_name(cell)
    for name in ("accuracy_drop", "accuracy_relevance", "gold_logprob_drop"):
        wanted = [
            (run.change.layer, value)
            for run in cell.runs
            if (value := run.figure(name)) is not None and math.isfinite(value)
        ]
        assert whole.curves.get(name, []) == wanted
    return mine


def test_what_is_published_is_read_back_and_not_doubled(held, tmp_path):
    cell = cell_record()
    odd = {"gold_drop": Estimate(math.inf), "metrics": {"exact_match,strict": 0.25, "größe": 0.5}}
    cell = cell.model_copy(update={"runs": (*cell.runs[:3], cell.runs[3].model_copy(update=odd))})
    files = [tmp_path / "outcomes.parquet", tmp_path / "view.json"]
    for file in files:
        file.write_bytes(file.name.encode() * 99)
    assert held.publish(cell, *files) == (6, 0, 0)
    first = shows(held, cell)
    two, three = (first[run_key(cell, f"layer:{n}")] for n in (2, 3))
    assert two.reasons["accuracy_relevance"] == "the baseline is at or below chance"
    assert "accuracy_relevance" not in two.figures
    assert three.reasons["gold_logprob_drop"] == "not a finite number: inf"
    assert three.figures["accuracy_drop"] == cell.runs[3].drop.value
    assert three.figures["metric/exact_match/strict"] == 0.25
    assert three.figures["metric/gr__e"] == 0.5

    key = run_key(cell, "cell")
    layers = pd.DataFrame(held.table(key, "layers"))
    assert layers["layer"].tolist() == [0, 1, 2, 3]
    assert layers["accuracy_drop"].tolist() == [run.drop.value for run in cell.runs]
    assert "at or below chance" in layers["reasons"][2]
    assert held.table(key, "correlations")[1]["reason"].startswith("the angular distance is the")
    assert held.table(key, "documents") == [
        {"task": "arc_easy", "choice": 1},
        {"task": "arc_easy", "choice": None},
    ]

    held.open_anew()
    (remote,) = held.backend.cells()
    assert (remote.key, remote.name) == (key, cell_name(cell))
    folder = tmp_path / "fetched"
    folder.mkdir()
    held.backend.fetch(remote, folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == {
        file.name: file.read_bytes() for file in files
    }
    assert held.publish(cell, *files) == (0, 0, 6)
    assert held.by_key() == first


def test_what_grows_is_brought_up_to_date_and_what_broke_off_completed(held):
    part, whole = cell_record(layers=(0, 1)), cell_record()
    assert held.publish(part) == (4, 0, 0)
    assert held.publish(whole) == (2, 1, 3)
    shows(held, whole)
    more = cell_record(n=320)
    gone = {"accuracy_relevance": None, "reasons": {"accuracy_relevance": "undefined now"}}
    known = {"accuracy_relevance": 0.5, "reasons": {}}
    changed = [{}, {"accuracy_drop": 0.08, **gone}, known, {}]
    runs = [with_figures(run, **new) for run, new in zip(more.runs, changed, strict=True)]
    more = more.model_copy(update={"runs": tuple(runs)})
    assert held.publish(more) == (0, 6, 0)
    shows_newest(held, more)
    own = run_key(more, "cell")
    grown = held.by_key()
    assert len(grown) == 6
    # What takes no point back has two of what has changed, W&B of its whole row; none has more.
    points = {"mlflow": (5, 4), "wandb": (6, 6), "trackio": (4, 4)}[held.name]
    curves = grown[own].curves
    assert (len(curves["accuracy_drop"]), len(curves["cosine_score"])) == points
    table = held.table(own, "layers")
    assert [(row["layer"], row["accuracy_drop"]) for row in table] == [
        (run.change.layer, run.drop.value) for run in more.runs
    ]

    for key in (run_key(more, "layer:3"), own):
        held.break_off(key)
    held.open_anew()
    created, updated, unchanged = held.publish(more)
    assert (created + updated, unchanged) == (2, 4)
    assert held.by_key() == grown
    assert held.publish(more) == (0, 0, 6)


def test_a_larger_view_takes_over_the_runs_of_those_it_supersedes(held):
    """Was: runs of 16, 24 and 32 documents stood complete beside each other for ever."""
    small, middle, large = (
        cell_record(n=n).model_copy(update={"view": f"intact-sample-{n}-seed-1234"})
        for n in (16, 24, 32)
    )
    assert held.publish(small) == (6, 0, 0)
    middle = middle.model_copy(update={"supersedes": (small.view,)})
    assert held.publish(middle) == (0, 6, 0)
    assert len(held.by_key()) == 6
    shows_newest(held, middle)
    # Somebody published the former once more in the meantime, under the ids that are free.
    assert held.publish(small) == (6, 0, 0)
    assert len(held.by_key()) == 12
    large = large.model_copy(update={"supersedes": (small.view, middle.view)})
    assert held.publish(large) == (0, 6, 0)
    assert set(held.by_key()) == {
        run_key(large, name) for name in ("baseline", "cell", *(run.ablation for run in large.runs))
    }
    shows_newest(held, large)
    held.open_anew()
    assert held.publish(large) == (0, 0, 6)


def shows_newest(held: Held, cell: CellRecord) -> None:
    """As `shows`, but for the curves, where what is not defined any more was once."""
    mine = held.by_key()
    for run in cell.runs:
        seen = mine[run_key(cell, run.ablation)]
        assert seen.figures == flat_metrics(run)
        assert seen.reasons == layer_run(cell, run).reasons
    whole = mine[run_key(cell, "cell")]
    assert only_defined(cell_figures(cell)).items() <= whole.figures.items()
    # A backend that takes no point back has several of a layer, the newest last.
    assert dict(whole.curves["accuracy_drop"]) == {
        run.change.layer: run.drop.value for run in cell.runs
    }


# Was: one ablation had one run a cell, whatever it stood for, and cells overwrote each other's.
def test_other_questions_have_other_runs_beside_each_other(held):
    cell = cell_record(layers=(0,))
    (task,) = cell.benchmark.tasks
    half = task.model_copy(update={"half": Half(part="test", seed=1234, of=2 * task.documents)})
    settings = {"tasks": (half,), "settings": {"part": "test"}}
    beneath = (of_kind("layer", 1, 1, "layers:1,2"), of_kind("mlp", 3, 1, "layer:2+mlp:3"))
    without = {"runs": beneath, "removed": (2,), "remaining": Estimate(0.25), "view": "without-2"}
    cells = [
        cell.model_copy(update={"runs": (*cell.runs, of_kind("layer", 1, 2, "layers:1,2"))}),
        cell.model_copy(update=without),
        cell.model_copy(update={"metric": "acc_norm", "view": "intact--acc_norm"}),
        cell.model_copy(update={"sample_seed": 1234, "view": "intact-sample-160-seed-1234"}),
        cell_record(layers=(0,), key="half").model_copy(
            update={"benchmark": cell.benchmark.model_copy(update=settings)}
        ),
    ]
    for one in cells:
        assert held.publish(one) == (2 + len(one.runs), 0, 0)
    held.open_anew()
    for one in cells:
        assert held.publish(one) == (0, 0, 2 + len(one.runs))
    mine = held.by_key()
    assert len(mine) == sum(2 + len(one.runs) for one in cells)
    assert len({seen.name for seen in mine.values()}) == len(mine)
    assert len({seen.group for seen in mine.values()}) == len(cells)
    first = mine[run_key(cells[1], "baseline")]
    assert first.name.startswith("without 2 · ")
    assert first.figures == {"n": 160, "accuracy": 0.25, "accuracy_drop": 0.25}
    assert "its drop, as theirs, is from the intact model" in first.note
    own = mine[run_key(cells[1], "cell")]
    assert own.figures["removed_accuracy"] == 0.25
    assert "without layer 2" in own.name
    names = {mine[run_key(cells[1], run.ablation)].name for run in cells[1].runs}
    assert {name.split(" · ")[0] for name in names} == {"layer 01 without 2", "mlp 03 without 2"}


@pytest.mark.parametrize("name", backends())
def test_a_backend_says_what_it_can_and_refuses_the_rest_by_name(name, tmp_path):
    known = service(name)
    assert known.name == name
    assert target(f"{name}:layers").project == "layers"
    open_backend(name, PROJECT, tmp_path).close()
    for ability in ("reports", "lighter models", "registered models"):
        if ability in known.can:
            assert target(name, ability).backend == name
        else:
            with pytest.raises(RequestError, match=f"{known.title} takes no {ability}; use one of"):
                target(name, ability)
