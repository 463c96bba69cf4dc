"""Collecting from folders and tracking projects, and the reports that a team shares."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient
from pandas.testing import assert_frame_equal

from tests.conftest import golden, printed
from tests.helpers.runs import run_experiment, type_command, write_arc
from tests.tracking.conftest import cell_record, client, double, lent
from tracker import api
from tracker.analysis.claims import decide_claims
from tracker.ledger.store import Ledger
from tracker.report.wording import layers_answer
from tracker.schema.records import CellRecord
from tracker.team.collect import remove_contained
from tracker.tracking import target

__all__ = ["client", "double", "lent"]

Ran = Callable[..., Path]


@pytest.fixture
def of_all() -> str:
    """Use the tests' cache, in which the model is checked once for all tests."""
    return os.environ["TRACKER_CACHE"]


@pytest.fixture(autouse=True)
def cache(of_all, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TRACKER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def ran(tiny_llama, experiment, of_all, tmp_path, monkeypatch) -> Ran:
    """Measure two layers of a tiny model that does better than chance; a colleague has another."""

    def ran(name: str = "mine", seed: int = 6, **settings: object) -> Path:
        folder = tmp_path / f"tiny-{seed}"
        model = folder if folder.exists() else tiny_llama(name=folder.name, seed=seed, layers=3)
        file = experiment(model, name=f"{name}.yaml", **{"limit": 6, "layer": [0, 1], **settings})
        with monkeypatch.context() as measuring:
            measuring.setenv("TRACKER_CACHE", of_all)
            assert not run_experiment(file, tmp_path / name).outcome.failed
        return tmp_path / name

    return ran


@pytest.fixture
def team(template, tmp_path) -> tuple[str, MlflowClient]:
    """Create a shared MLflow database: the target to publish to, and its client."""
    shutil.copy(template, tmp_path / "team.db")
    server = f"sqlite:///{tmp_path}/team.db"
    return f"mlflow:{server}/layers", MlflowClient(server)


def dump_cells(cells: object) -> set[str]:
    return {cell.model_dump_json() for cell in cells}  # type: ignore[attr-defined]


def test_colleagues_results_stand_beside_ones_own(ran, tmp_path):
    own_results, other_results = ran("mine"), ran("hers", seed=8, benchmark=["arc_easy", "copa"])
    report = api.report(own_results, other_results, output=tmp_path / "both.html")
    cells = [*api.ls(own_results), *api.ls(other_results)]
    assert dump_cells(report.cells) == dump_cells(cells)
    page = (tmp_path / "both.html").read_text()
    assert all(word in page for word in ("tiny-6", "tiny-8", "mine.yaml", "hers.yaml"))
    assert report.outcome.failed == {}
    assert len(repr(report)) < 500  # a notebook shows it


def test_a_record_is_derived_once(ran, monkeypatch):
    results = ran()
    cells = dump_cells(api.ls(results))

    def fail(*_: object) -> CellRecord:
        raise AssertionError("it was derived again")

    with monkeypatch.context() as patch:
        patch.setattr("tracker.measuring.derive.cell_record", fail)
        patch.setattr("tracker.measuring.derive.derive_decisions", fail)
        assert dump_cells(api.ls(results)) == dump_cells(api.report(results).cells) == cells
        patch.setattr("tracker.measuring.derive._code_hash", lambda: "another formula")
        with pytest.raises(AssertionError, match="derived again"):
            api.ls(results)
    paths = list(results.glob("cells/*/derived/*.json"))
    names = {"intact-limit-6.json", "intact-limit-6.decisions.json"}
    assert {path.name for path in paths} == names
    for path in paths:
        path.write_text("{damaged")
    assert dump_cells(api.report(results).cells) == cells
    ran(limit=9)
    assert [cell.n for cell in api.ls(results)] == [9]


def test_a_report_of_damaged_outcomes_says_what_is_missing(ran, tmp_path):
    """Was: exit code 0, and documents that the records still counted were gone from their table."""
    options = {"limit": 40, "data": str(write_arc(tmp_path / "data"))}
    results = ran(**options)
    shard = min(results.glob("cells/*/shards/*.parquet"))
    before, content = shard.stat(), bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a disk that forgets

    code, output = type_command("report", "--results", results, "--format", "csv")
    assert code == 1
    assert f"failed: {shard.with_suffix('.aside')}: the damaged file was renamed" in output
    documents = pd.read_csv(results / "report" / "documents.csv")
    layers = pd.read_csv(results / "report" / "layers.csv")
    assert list(layers["n"]) == [8, 8]
    assert set(layers["reasons"].str[:20]) == {"n: 8 of 40 documents"}
    missing = documents[documents["change"] == "missing"]
    assert list(missing["doc"]) == list(range(32))
    assert missing["layer"].isna().all()
    assert set(documents["doc"]) - set(missing["doc"]) <= set(range(32, 40))

    commands = ("ls", "leaderboard", "report")
    assert [type_command(command, "--results", results)[0] for command in commands] == [1, 1, 1]
    assert list(api.sync((), results=results).failed) == [str(shard.with_suffix(".aside"))]
    ran(**options)
    assert api.sync((), results=results).failed == {}
    assert [type_command(command, "--results", results)[0] for command in commands] == [0, 0, 0]


def test_damage_is_said_of_every_folder(ran, tmp_path):
    """Was: of two folders that hold one cell only the first was asked."""
    results, copy = ran(limit=40, data=str(write_arc(tmp_path / "data"))), tmp_path / "other"
    shutil.copytree(results, copy)
    shard = min(copy.glob("cells/*/shards/*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-9])
    for sources in ((results, copy), (copy, results)):
        options = ("--format", "csv", "--output", tmp_path / "csv")
        code, output = type_command("report", *sources, *options)
        assert (code, str(shard.with_suffix(".aside")) in output) == (1, True)


def test_an_mlflow_project_is_read_verified_and_cached(ran, team, tmp_path, cache):
    results = ran(benchmark=["arc_easy", "copa"])
    source, client = team
    assert api.sync([source], results=results).failed == {}
    report = api.report(source, output=tmp_path / "page.html")
    assert dump_cells(report.cells) == dump_cells(api.ls(results))
    assert report.outcome.failed == {}
    # What is there is not downloaded again.
    times = {path: path.stat().st_mtime_ns for path in cache.rglob("*.parquet")}
    assert times
    repeated = api.report(source, output=tmp_path / "page.html")
    assert dump_cells(repeated.cells) == dump_cells(report.cells)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.parquet")} == times
    # What has grown is.
    ran(benchmark=["arc_easy", "copa"], limit=9)
    api.sync([source], results=results)
    larger = api.report(source, output=tmp_path / "page.html")
    assert [cell.n for cell in larger.cells] == [9, 9]
    # What was changed on the way is refused, and the rest stays.
    experiment = client.get_experiment_by_name("layers")
    runs = client.search_runs([experiment.experiment_id], "tags.`tracker.kind` = 'cell'")
    client.log_text(runs[0].info.run_id, "{}", "cell.json")
    shutil.rmtree(cache)
    report = api.report(source, output=tmp_path / "page.html")
    assert len(report.cells) == 1
    (reason,) = report.outcome.failed.values()
    assert "differ from the published ones" in reason
    # A deleted run is gone from reports, although the cache holds it.
    client.delete_run(runs[1].info.run_id)
    assert api.report(source, results, output=tmp_path / "page.html").cells


@pytest.mark.parametrize(("text", "server", "project"), golden("targets"))
def test_targets_name_servers(text, server, project):
    parsed = target(f"mlflow:{text}")
    assert (parsed.server or "none", parsed.project) == (server, project)


def growing_record(layers: tuple[int, ...] = (0, 1), n: int = 60) -> CellRecord:
    return cell_record(layers=layers, n=n).model_copy(
        update={"unfinished": f"{n} of 200 documents are measured so far"}
    )


ONE, MORE = cell_record(n=100), cell_record(n=160)
LEFT, RIGHT, MIDDLE = (cell_record(layers=layers) for layers in ((0, 1), (2, 3), (1, 2)))
LARGE = growing_record((0, 1, 2, 3), 150)
SMALL = cell_record(layers=(2,), n=6).model_copy(update={"missing": ()})
OTHERS = [
    ONE.model_copy(update=changes)
    for changes in ({"removed": (3,)}, {"metric": "acc_norm"}, {"sample_seed": 1234})
]


APART = [[ONE, other] for other in OTHERS] + [[LARGE, SMALL], [LEFT, MIDDLE]]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([ONE, MORE, ONE], [ONE, MORE]),
        # One that grows gives way to one that is complete.
        ([growing_record(), ONE], [ONE]),
        ([ONE, growing_record()], [ONE]),
        ([growing_record()], [growing_record()]),
        # Was: the runs of two records stood in one table with the correlations of one of them.
        ([LEFT, RIGHT], [LEFT, RIGHT]),
        ([LEFT, RIGHT, cell_record()], [cell_record()]),
        *((cells, cells) for cells in APART),
    ],
)
def test_records_without_their_outcomes_are_kept_apart(cells, expected):
    assert remove_contained(cells) == expected


def test_folders_that_hold_parts_of_a_cell_are_derived_as_one(ran, tmp_path):
    """Was: layers 0-14 joined with 15-29 showed the correlation over 15 of them."""
    options = {"data": str(write_arc(tmp_path / "data"))}
    first, second = ran("first", layer=[0, 1], **options), ran("second", layer=[1, 2], **options)
    (complete,) = api.ls(ran("whole", layer=[0, 1, 2], **options))
    (joined,) = api.report(first, second, output=tmp_path / "joined.html").cells
    assert {c.n for c in joined.correlations if c.subset == "all"} == {3}
    # Each folder's own documents were drawn to be answered again, under one of its own ablations.
    fields = ("provenance", "compared", "compared_difference", "measured")
    fields += ("seconds", "outcome_seconds", "peak_bytes")
    assert joined == complete.model_copy(update={name: getattr(joined, name) for name in fields})
    assert joined.compared > complete.compared > 0
    # What each folder shows alone is what it was.
    assert [[run.change.layer for run in api.ls(f)[0].runs] for f in (first, second)] == [
        [0, 1],
        [1, 2],
    ]
    assert api.report(second, first, output=tmp_path / "joined.html").cells == (joined,)


def test_two_metrics_are_published_and_read_back_apart(ran, team, tmp_path):
    """Was: the second one was the update of the first one's runs, with a receipt for both."""
    project, client = team
    results = ran(metric=["acc", "acc_norm"])
    assert api.sync([project], results=results).failed == {}
    (store,) = Ledger(results).cells()
    assert len(list((store.folder / "receipts").iterdir())) == 2
    experiment = client.get_experiment_by_name("layers").experiment_id
    runs = client.search_runs([experiment])
    assert len(runs) == 2 * (2 + 2)
    keys = {run.data.tags["tracker.run_key"]: run.data.tags["tracker.metric"] for run in runs}
    key = store.identity.key
    assert keys[f"{key}/intact-limit-6/cell"] == keys[f"{key}/intact-limit-6/layer:0"] == "acc"
    assert keys[f"{key}/intact-limit-6--acc_norm/cell"] == "acc_norm"
    report = api.report(project, output=tmp_path / "page.html")
    assert report.outcome.failed == {}
    assert dump_cells(report.cells) == dump_cells(api.ls(results))
    # So are as many drawn documents of the same cell.
    ran(limit=None, sample=6)
    assert api.sync([project], results=results).failed == {}
    assert len(client.search_runs([experiment])) == 3 * (2 + 2)
    assert len(list((store.folder / "receipts").iterdir())) == 3
    report = api.report(project, output=tmp_path / "page.html")
    assert sorted((cell.n, cell.metric, cell.sample_seed or 0) for cell in report.cells) == [
        (6, "acc", 0),
        (6, "acc", 1234),
        (6, "acc_norm", 0),
    ]
    assert dump_cells(report.cells) == dump_cells(api.ls(results))


def test_a_projects_leaderboard_ranks_its_runs_whoever_published_them(ran, team, monkeypatch):
    project, client = team
    own_results, other_results = ran("mine"), ran("hers", seed=8)
    for results in (own_results, other_results):
        assert api.sync([project], results=results).failed == {}
    name = "layer_leaderboard"
    frame = api.leaderboard(project, publish=project).table(name)
    assert_frame_equal(frame, api.leaderboard(own_results, other_results).table(name))
    experiment = client.get_experiment_by_name("layers").experiment_id
    (run,) = client.search_runs([experiment], "tags.`tracker.kind` = 'report'")
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"report.html", "layer_leaderboard.parquet"} <= files
    # MLflow's own table shows the ranks, and its note the answers.
    monkeypatch.setenv(
        "MLFLOW_TRACKING_URI", project.removeprefix("mlflow:").removesuffix("/layers")
    )
    ids = [run.info.run_id]
    table = client.load_table(experiment, "tables/layer_leaderboard.json", ids)
    assert table["layer"].tolist() == frame["layer"].tolist()
    assert table["accuracy_relevance"].tolist() == frame["accuracy_relevance"].tolist()
    for cell in (*api.ls(own_results), *api.ls(other_results)):
        assert layers_answer(decide_claims([cell])) in run.data.tags["mlflow.note.content"]


# W&B


def test_a_wandb_project_is_read_verified_and_cached(ran, lent, tmp_path):
    """With the real client; see the double for what it proves."""
    results, double = ran(), lent
    source = "wandb:team/layers"
    printed("sync", "--to", source, "--results", results)
    printed("report", source, "--format", "parquet", "--output", tmp_path / "pulled")
    options = ("--results", results, "--output", tmp_path / "own")
    printed("report", "--format", "parquet", *options)
    for name in ("layers", "correlations", "layer_leaderboard", "model_leaderboard"):
        frames = [pd.read_parquet(tmp_path / p / f"{name}.parquet") for p in ("pulled", "own")]
        assert len(frames[0])
        assert_frame_equal(*frames)

    def downloads() -> int:
        requests = [(request.method, request.path[:9]) for request in double.requests]
        return requests.count(("GET", "/storage/"))

    n_downloads = downloads()
    printed("report", source, "--output", tmp_path / "page.html")
    assert downloads() == n_downloads > 0, "what is there is not downloaded again"


def test_a_report_in_wandb_is_replaced_and_not_repeated(ran, lent):
    results = ran()
    for command in ("report", "leaderboard"):
        output = printed(command, "--results", results, "--publish", "wandb:team/layers")
        assert f"published: {lent.url}/team/layers/reports/Which-layers-matter--" in output
    project = lent.projects["team", "layers"]
    report, view = sorted(project.views, key=lambda item: item["type"] != "runs")
    assert len(project.views) == 2
    assert report["displayName"] == "Which layers matter"
    assert view["displayName"] == "Layers by benchmark"
    blocks = json.loads(report["spec"])["blocks"]
    assert "1 model, 1 measurement" in json.dumps(blocks)
    grids = [block for block in blocks if block["type"] == "panel-grid"]
    assert len(grids) == 2
    keys = json.dumps(grids)
    for name in ("accuracy_drop", "accuracy_relevance", "cosine_score", '"layer"'):
        assert name in keys
    assert "group" in json.dumps(json.loads(view["spec"])["section"]["runSets"])
    (page,) = [c for c in project.artifacts.values() if c.name == "layer-report"]
    assert page.versions[-1].files["report.html"] == (results / "report.html").read_bytes()
    run = next(run for run in project.runs.values() if run.job_type == "report")
    assert {"tables/layer_leaderboard", "tables/model_leaderboard"} <= set(run.summary)
