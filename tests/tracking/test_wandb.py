"""Publishing to W&B with the real client: read back from the double, and from offline runs.

No W&B server was available: see `wandb_double` for what that proves.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from tests.helpers.wandb_runs import IMPATIENT, counts, figures, runs, runs_of, shown
from tracker.tracking import open_backend
from tracker.tracking.base import Page
from tracker.tracking.figures import flat_metrics
from tracker.tracking.identity import run_key
from tracker.tracking.runs import cell_run
from tracker.tracking.wandb.backend import WandbBackend, _Known

from .conftest import cell_record
from .mlflow_server import free_port


def test_what_wandb_alone_has_is_read_back(double, publish):
    cell = cell_record()
    said = publish(cell)
    assert said["location"] == f"{double.url}/team/layers"
    there = runs(double)
    # W&B compares a group's runs with one of them: it needs their summary keys.
    intact, parent = (there[run_key(cell, kind)] for kind in ("baseline", "cell"))
    assert set(figures(intact.summary)) < set(flat_metrics(cell.runs[0]))
    assert "layer" not in intact.values
    assert figures(parent.summary) == cell_run(cell).figures
    for name in ("charts/accuracy_drop", "charts/proxies"):
        chart = json.loads(parent.files[parent.summary[name]["path"]])
        assert chart["layout"]["title"]["text"].startswith(cell.title)
    assert all("." not in key for run in there.values() for key in keys(run.values))

    publish.close()
    sent = len(double.requests)
    assert counts(publish(cell)) == (0, 0, 6)
    again = double.requests[sent:]
    assert again
    assert not [request for request in again if request.body.startswith('{"query":"mutation')]
    assert not [request for request in again if request.operation == "UpsertBucket"]

    # A report leads to the outcomes that it is made of.
    publish.backend.add_page(Page([publish.outcomes], {}, [cell, cell_record(key="another")]))
    (run,) = (run for run in runs_of(double) if run.job_type == "report")
    assert run.used == [f"outcomes-SmolLM2-135M-Instruct-arc_easy-intact-{cell.key}:v0"]


def keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys(inner)


def test_the_outcomes_of_a_grown_cell_come_back_with_the_clients_own_tools(publish):
    cell = cell_record()
    whole = publish.outcomes.read_bytes()
    publish.outcomes.write_bytes(b"a part")
    publish(cell_record(layers=(0, 1)))
    publish.outcomes.write_bytes(whole)
    publish(cell)
    name = f"outcomes-SmolLM2-135M-Instruct-arc_easy-intact-{cell.key}"
    download, metadata, aliases, before = publish.client.read(
        f"api.artifact('team/layers/{name}:complete').download('down')",
        f"api.artifact('team/layers/{name}:complete').metadata",
        f"api.artifact('team/layers/{name}:complete').aliases",
        f"api.artifact('team/layers/{name}:incomplete').metadata['missing']",
    )
    assert before == ["layer 2", "layer 3"]
    file = publish.folder / download / "outcomes.parquet"
    assert file.read_bytes() == whole
    assert metadata["cell"] == cell.key
    assert metadata["provenance"] == cell.provenance
    assert set(aliases) == {"latest", "complete", "documents-160"}


# Was: one run that was deleted in the UI made every later publish of its cell fail.
def test_a_deleted_run_is_written_again_under_another_id(double, publish):
    cell = cell_record(layers=(0, 1))
    publish(cell, **IMPATIENT)
    gone = [run.id for run in runs_of(double)][1:]
    for deleted in gone:
        double.delete(deleted, "layers")
    said = publish(cell, **IMPATIENT)
    assert counts(said) == (3, 0, 1)
    (note,) = said["notes"]
    assert "deleted" in note
    assert not set(gone) & {run.id for run in shown(double, cell).values()}
    again = publish(cell, **IMPATIENT)
    assert counts(again) == (0, 0, 4)
    assert not again["notes"]


def test_what_a_dying_server_lacks_is_completed(double, publish):
    """It dies again and again, each time a run further."""

    def die(how: int | None, at: int) -> None:
        while ("team", "layers") not in double.projects or len(runs_of(double)) < at:
            time.sleep(0.005)
        double.stop() if how is None else double.fail_with(how)

    cell = cell_record()
    for at, how in enumerate((None, 401), 3):
        death = threading.Thread(target=die, args=(how, at))
        death.start()
        said = publish(cell, **IMPATIENT)["error"]
        death.join()
        assert "W&B did not take the runs" in said
        assert "tracker sync --to wandb:team/layers" in said
        assert publish.client.environment["WANDB_API_KEY"] not in said
        double.start() if how is None else double.fail_with(None)
    created, updated, unchanged = counts(publish(cell))
    assert created + updated + unchanged == 6
    assert created < 6
    shown(double, cell)


# Was: after a failure, the client was torn down and every wandb-core child was killed.
def test_a_run_that_the_user_has_open_is_not_touched(double, publish):
    double.fail_with(500, holding='"refused"')
    refused, done = publish.in_a_notebook(cell_record(), **IMPATIENT)
    assert "error" in refused
    assert counts(done) == (6, 0, 0)
    mine = double.run("mine", "mine")
    assert [row["loss"] for row in mine.history] == [2, 1]
    assert (mine.state, mine.exit_code) == ("finished", 0)


@pytest.mark.parametrize(
    "environment",
    [{"WANDB_API_KEY": ""}, {"WANDB_API_KEY": "f" * 40}, {"WANDB_BASE_URL": "closed"}],
    ids=["nobody", "wrong-key", "away"],
)
def test_a_refusal_says_what_to_type(publish, environment):
    if "WANDB_BASE_URL" in environment:
        environment = {"WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}"}
    said = publish(cell_record(), **IMPATIENT, **environment)
    words = ["W&B did not take the runs", "tracker sync --to wandb:team/layers --results"]
    if environment.get("WANDB_API_KEY") == "":
        words += ["wandb login", "WANDB_MODE=offline"]
    for word in words:
        assert word in said["error"]
    assert "f" * 40 not in said["error"]
    assert publish.client.environment["WANDB_API_KEY"] not in said["error"]


# Was: the run of a cell has one id in every project, and the second deleted what the first wrote.
def test_an_offline_project_keeps_its_files_when_another_is_written(publish, monkeypatch):
    publish.client.lend(monkeypatch, WANDB_MODE="offline")
    there = []
    with (
        closing(open_backend("wandb", "team/layers", publish.results)) as one,
        closing(open_backend("wandb", "team/other", publish.results)) as other,
    ):
        for backend, n in ((one, 160), (other, 160), (one, 320)):
            done = backend.publish(cell_record(layers=(0,), n=n), [], {})
            assert done.created + done.updated == 3
            there.append(set(publish.results.glob("wandb/offline-run-*")))
    first, both, grown = there
    assert (len(first), len(both), len(grown)) == (3, 6, 6)
    assert first < both, "both are to be sent"
    assert both - first < grown
    assert not first & grown, "what it was is what it is no more"


# Was: the folder of a run that is written twice within a second is one, and it was deleted.
def test_an_offline_run_that_was_written_again_at_once_stays(tmp_path):
    backend = WandbBackend("team/layers", tmp_path, in_sweep=False)
    kept = tmp_path / "wandb" / "offline-run-20260101_120000-abc"
    kept.mkdir(parents=True)
    for now, stays in ((kept.name, True), ("offline-run-20260101_120001-abc", False)):
        backend._drop_former(_Known("abc", "digest", kept.name), now)
        assert kept.is_dir() == stays
