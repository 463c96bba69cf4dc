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

from tests.helpers.wandb_runs import (
    FEW_RETRIES,
    assert_shown,
    change_counts,
    logged_values,
    project_run_list,
    project_runs_by_key,
)
from tracker.tracking import open_backend
from tracker.tracking.base import Page
from tracker.tracking.figures import run_metrics
from tracker.tracking.identity import run_key
from tracker.tracking.runs import describe_cell
from tracker.tracking.wandb.backend import WandbBackend, _ExistingRun

from .conftest import cell_record
from .mlflow_server import free_port


def test_cells_are_read_back_from_wandb(double, publish):
    cell = cell_record(layers=(0, 1))
    published = publish(cell)
    assert published["location"] == f"{double.url}/team/layers"
    shown_runs = project_runs_by_key(double)
    # W&B compares a group's runs with one of them: it needs their summary keys.
    intact, parent = (shown_runs[run_key(cell, kind)] for kind in ("baseline", "cell"))
    assert set(logged_values(intact.summary)) < set(run_metrics(cell.runs[0]))
    assert "layer" not in intact.values
    assert logged_values(parent.summary) == describe_cell(cell).figures
    for name in ("charts/accuracy_drop", "charts/proxies"):
        chart = json.loads(parent.files[parent.summary[name]["path"]])
        assert chart["layout"]["title"]["text"].startswith(cell.title)
    assert all("." not in key for run in shown_runs.values() for key in keys(run.values))

    publish.close()
    sent = len(double.requests)
    assert change_counts(publish(cell)) == (0, 0, 4)
    published_again = double.requests[sent:]
    assert published_again
    assert not any(request.body.startswith('{"query":"mutation') for request in published_again)
    assert not [request for request in published_again if request.operation == "UpsertBucket"]

    # A report leads to the outcomes that it is made of.
    publish.backend.add_page(Page([publish.outcomes], {}, [cell, cell_record(key="another")]))
    (run,) = (run for run in project_run_list(double) if run.job_type == "report")
    assert run.used_artifacts == [f"outcomes-SmolLM2-135M-Instruct-arc_easy-intact-{cell.key}:v0"]
    # A page about other models is only a run.
    sent = len(double.requests)
    publish.backend.add_page(Page([publish.outcomes], {}, [], name="comparison"))
    assert "comparison" in [run.name for run in project_run_list(double)]
    assert not [r for r in double.requests[sent:] if "upsertView" in r.body]


def keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys(inner)


def test_outcomes_of_a_grown_cell_are_read_back(publish):
    cell = cell_record()
    content = publish.outcomes.read_bytes()
    publish.outcomes.write_bytes(b"a part")
    publish(cell_record(layers=(0, 1)))
    publish.outcomes.write_bytes(content)
    publish(cell)
    name = f"outcomes-SmolLM2-135M-Instruct-arc_easy-intact-{cell.key}"
    download, metadata, aliases, missing = publish.client.read(
        f"api.artifact('team/layers/{name}:complete').download('down')",
        f"api.artifact('team/layers/{name}:complete').metadata",
        f"api.artifact('team/layers/{name}:complete').aliases",
        f"api.artifact('team/layers/{name}:incomplete').metadata['missing']",
    )
    assert missing == ["layer 2", "layer 3"]
    file = publish.folder / download / "outcomes.parquet"
    assert file.read_bytes() == content
    assert metadata["cell"] == cell.key
    assert metadata["provenance"] == cell.provenance
    assert set(aliases) == {"latest", "complete", "documents-160"}


# Was: one run that was deleted in the UI made every later publish of its cell fail.
def test_a_deleted_run_gets_another_id(double, publish):
    cell = cell_record(layers=(0, 1))
    publish(cell, **FEW_RETRIES)
    deleted_ids = [run.id for run in project_run_list(double)][1:]
    for deleted_id in deleted_ids:
        double.delete(deleted_id, "layers")
    published = publish(cell, **FEW_RETRIES)
    assert change_counts(published) == (3, 0, 1)
    (note,) = published["notes"]
    assert "deleted" in note
    assert not set(deleted_ids) & {run.id for run in assert_shown(double, cell).values()}
    published_again = publish(cell, **FEW_RETRIES)
    assert change_counts(published_again) == (0, 0, 4)
    assert not published_again["notes"]


def test_runs_are_completed_after_a_server_dies(double, publish):
    """It dies again and again, each time a run further."""

    def die(status: int | None, n_runs: int) -> None:
        while ("team", "layers") not in double.projects or len(project_run_list(double)) < n_runs:
            time.sleep(0.005)
        double.stop() if status is None else double.answer_with(status)

    cell = cell_record(layers=(0, 1))
    for n_runs, status in enumerate((None, 401), 2):
        thread = threading.Thread(target=die, args=(status, n_runs))
        thread.start()
        message = publish(cell, **FEW_RETRIES)["error"]
        thread.join()
        assert "W&B did not accept the runs" in message
        assert "tracker sync --to wandb:team/layers" in message
        assert publish.client.environment["WANDB_API_KEY"] not in message
        double.start() if status is None else double.answer_with(None)
    created, updated, unchanged = change_counts(publish(cell))
    assert created + updated + unchanged == 4
    assert created < 4
    assert_shown(double, cell)


# Was: after a failure, the client was torn down and every wandb-core child was killed.
def test_open_runs_of_the_user_stay_unchanged(double, publish):
    double.answer_with(500, holding='"refused"')
    refused, published = publish.publish_in_notebook(cell_record(layers=(0,)), **FEW_RETRIES)
    assert "error" in refused
    assert change_counts(published) == (3, 0, 0)
    user_run = double.run("mine", "mine")
    assert [row["loss"] for row in user_run.history] == [2, 1]
    assert (user_run.state, user_run.exit_code) == ("finished", 0)


@pytest.mark.parametrize(
    "environment",
    [{"WANDB_API_KEY": ""}, {"WANDB_API_KEY": "f" * 40}, {"WANDB_BASE_URL": "closed"}],
    ids=["nobody", "wrong-key", "away"],
)
def test_a_refusal_says_what_to_type(publish, environment):
    if "WANDB_BASE_URL" in environment:
        environment = {"WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}"}
    published = publish(cell_record(layers=(0,)), **FEW_RETRIES, **environment)
    words = ["W&B did not accept the runs", "tracker sync --to wandb:team/layers --results"]
    if environment.get("WANDB_API_KEY") == "":
        words += ["wandb login", "WANDB_MODE=offline"]
    for word in words:
        assert word in published["error"]
    assert "f" * 40 not in published["error"]
    assert publish.client.environment["WANDB_API_KEY"] not in published["error"]


# Was: the run of a cell has one id in every project, and the second deleted what the first wrote.
def test_offline_projects_keep_their_files(publish, monkeypatch):
    publish.client.lend(monkeypatch, WANDB_MODE="offline")
    folder_sets = []
    with (
        closing(open_backend("wandb", "team/layers", publish.results)) as backend_a,
        closing(open_backend("wandb", "team/other", publish.results)) as backend_b,
    ):
        for backend, n in ((backend_a, 160), (backend_b, 160), (backend_a, 320)):
            published = backend.publish(cell_record(layers=(0,), n=n), [], {})
            assert published.created + published.updated == 3
            folder_sets.append(set(publish.results.glob("wandb/offline-run-*")))
    first_folders, both_folders, grown_folders = folder_sets
    assert (len(first_folders), len(both_folders), len(grown_folders)) == (3, 6, 6)
    assert first_folders < both_folders, "both are to be sent"
    assert both_folders - first_folders < grown_folders
    assert not first_folders & grown_folders, "what it was is what it is no more"


# Was: the folder of a run that is written twice within a second is one, and it was deleted.
def test_a_rewritten_offline_run_stays(tmp_path):
    backend = WandbBackend("team/layers", tmp_path, in_sweep=False)
    run_folder = tmp_path / "wandb" / "offline-run-20260101_120000-abc"
    run_folder.mkdir(parents=True)
    for new_folder, stays in ((run_folder.name, True), ("offline-run-20260101_120001-abc", False)):
        backend._delete_offline_files(_ExistingRun("abc", "digest", run_folder.name), new_folder)
        assert run_folder.is_dir() == stays
