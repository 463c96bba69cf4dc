"""One results folder, used for a month: nothing that is known is shown as less, by anybody."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from mlflow import MlflowClient

import tracker
from tests.helpers.lm_eval import write_rows
from tests.helpers.own_tasks import write_choices
from tests.helpers.runs import (
    RecordingProgress,
    run_experiment,
    type_command,
    write_arc,
    write_study,
)
from tracker.ledger.store import Ledger
from tracker.measuring.derive import derive_record
from tracker.schema.errors import RequestError
from tracker.schema.records import CellRecord
from tracker.team.publish import Publisher
from tracker.tracking.identity import run_key

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = [0, 1, 2, 3]
Best = Mapping[tuple[str, ...], int]


class Month:
    """A results folder with its MLflow database, and what was known in it before."""

    def __init__(self, results: Path, experiment: Any, model: Path, data: Path) -> None:
        self.results, self._write_study, self.model, self.data = results, experiment, model, data
        self._known_sizes: Best = {}

    def file(self, name: str, **settings: Any) -> Path:
        """Write an experiment file."""
        defaults = {"limit": None, "data": str(self.data)}
        return self._write_study(self.model, f"{name}.yaml", **{**defaults, **settings})

    def study(self, name: str, file: Path) -> None:
        """Conduct a study, twice."""
        for _ in range(2):
            results = tracker.study(name, file, results=self.results, track=["mlflow"])
            assert results.outcome.exit_code == 0, results.outcome
        assert not results.outcome.models_loaded, "it measures nothing twice"
        self.check_agreement()

    def run(self, name: str, **settings: Any) -> tuple[tuple[CellRecord, ...], list[str]]:
        """Run a file, twice; what it measured, and what was said."""
        heard = RecordingProgress()
        file = self.file(name, **settings)
        results = run_experiment(file, self.results, heard, track=["mlflow"])
        assert results.outcome.exit_code == 0, (results.outcome.failed, results.outcome.unpublished)
        repeated = run_experiment(file, self.results, track=["mlflow"])
        assert repeated.outcome.models_loaded == 0, "it measures nothing twice"
        assert repeated.cells == results.cells
        self.check_agreement()
        return results.cells, heard.lines

    def run_command(self, *arguments: object) -> str:
        """Type a command, and return what it prints."""
        code, output = type_command(*arguments, "--results", self.results)
        assert code == 0, output
        return output

    def records(self) -> list[CellRecord]:
        """All that is shown, as the ledger has it."""
        views = Ledger(self.results).contents().views
        return [derive_record(store, requested.view) for store, requested in views]

    def check_agreement(self) -> None:
        """See that list, page and MLflow show what the ledger knows, and no less than before."""
        records = self.records()
        assert not [record.missing_labels for record in records if record.missing_labels]
        sizes: dict[tuple[str, ...], int] = {}
        for record in records:
            for run in record.runs:
                key = (record.key, record.metric, str(record.sample_seed), run.ablation)
                sizes[key] = max(sizes.get(key, 0), run.n)
        lost = {key: n for key, n in self._known_sizes.items() if sizes.get(key, 0) < n}
        assert not lost, "what was known before is not shown any more"
        self._known_sizes = sizes
        # The list.
        listing = self.run_command("ls")
        assert "unfinished" not in listing
        rows = listing.splitlines()[1:]
        assert len(set(rows)) == len(rows) == len(records), listing
        for record in records:
            words = record.key[:12], f" {record.n} "
            assert any(all(word in row for word in words) for row in rows), listing
        # MLflow.
        client = MlflowClient(f"sqlite:///{self.results / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("tracker")
        runs = client.search_runs([experiment.experiment_id], max_results=5000)
        runs_by_key = {run.data.tags["tracker.run_key"]: run for run in runs}
        assert len(runs_by_key) == len(runs), "a run was created twice"
        for record in records:
            for run in record.runs:
                metrics = runs_by_key[run_key(record, run.ablation)].data.metrics
                assert metrics["n"] == run.n
                assert metrics["accuracy_drop"] == pytest.approx(run.drop.value, abs=1e-12)
            cell = runs_by_key[run_key(record, "cell")]
            assert cell.data.metrics["n"] == record.n
        cells = [run for run in runs if run.data.tags["tracker.kind"] == "cell"]
        names = [run.info.run_name for run in cells]
        assert len(set(names)) == len(names), names
        keys = {
            run_key(record, name)
            for record in records
            for name in ("baseline", "cell", *(run.ablation for run in record.runs))
        }
        assert set(runs_by_key) == keys, "runs of views that are not there any more"
        assert {run.info.status for run in runs} == {"FINISHED"}
        # The board.
        assert "not shown yet" not in self.run_command("leaderboard")
        # The page.
        assert "not shown yet" not in self.run_command("report")
        page = (self.results / "report.html").read_text()
        for record in records:
            assert record.counted in page


@pytest.fixture
def month(tmp_path, experiment, tiny_llama, template) -> Month:
    results = tmp_path / "results"
    results.mkdir()
    shutil.copy(template, results / "mlflow.db")
    return Month(results, experiment, tiny_llama(), write_arc(tmp_path / "data", 60))


def test_a_smaller_question_takes_nothing_away(month):
    """Was: layers 0 and 3 on 10 documents, and all were shown on 10."""
    name = f"{month.model} × arc_easy"
    (large,), lines = month.run("large", sample=40, layer=ALL)
    assert not [line for line in lines if " shown" in line]
    (small,), lines = month.run("small", sample=10, layer=[0, 3])
    assert ([run.change.layer for run in small.runs], small.n) == ([0, 3], 10), (
        "what the file asked"
    )
    assert (
        f"{name}: reports show earlier results on 40 documents, not the results on 10 "
        "documents. To show both, set sample: {values: [10, 40]}"
    ) in lines
    (shown,) = month.records()
    assert shown.model_copy(update={"supersedes": ()}) == large
    # By name, it stands beside the larger one.
    _, lines = month.run("both", sample=[10, 40], layer=[0, 3])
    assert [record.beside for record in month.records()] == ["10 documents", "40 documents"]
    assert [record.runs for record in month.records()] == [small.runs, large.runs]
    assert " 10 drawn at random (seed 1234) " in month.run_command("ls")
    # What is more of some runs alone stands beside, until it is known of all.
    _, lines = month.run("more", sample=48, layer=[1, 2])
    assert (
        f"{name}: reports also show the results of earlier requests: 2 runs on 10 "
        "documents; 4 runs on 40 documents"
    ) in lines
    assert [(len(run.runs), run.n) for run in month.records()] == [(2, 10), (4, 40), (2, 48)]
    month.run("rest", sample=48, layer=[0, 3])
    assert [(len(run.runs), run.n) for run in month.records()] == [(2, 10), (4, 48)]


def test_clusters_of_documents_need_no_new_measurement(month):
    (plain,), _ = month.run("plain", sample=40, layer=ALL)
    (clustered,), lines = month.run("clustered", sample=40, layer=ALL, cluster="answerKey")
    assert "checking models and benchmarks" not in lines
    assert month.records() == [clustered], "the last run decides"
    for run, independent in zip(clustered.runs, plain.runs, strict=True):
        assert (run.units, independent.units) == (pytest.approx(3, rel=0.01), 40)
        assert run.drop.value == pytest.approx(independent.drop.value)
    assert "clustered by answerKey" in (month.results / "report.html").read_text()
    names = [f"{month.results}:{clustered.model.name}:{run}" for run in ("intact", "layer:0")]
    (row,) = tracker.compare(*names, metric=["acc"]).differences
    assert (row.n_clusters, -row.difference) == (clustered.runs[0].units, clustered.runs[0].drop)
    for settings, words in (
        ({"cluster": "answer"}, "Did you mean 'answerKey'"),
        ({"cluster": "task"}, "same task"),
        ({"cluster": "answerKey", "sample": None, "until": "top 1"}, "until and cluster"),
    ):
        with pytest.raises(RequestError, match=words):
            run_experiment(month.file("wrong", **{"sample": 40, **settings}), month.results)
    with pytest.raises(RequestError, match="studies and searches"):
        tracker.study("audit", month.file("clustered2", cluster="answerKey"), results=month.results)
    month.study("audit", month.file("studied", sample=40, layer=ALL))
    assert month.records() == [clustered], "a study leaves it as it is"
    month.run("plain", sample=40, layer=ALL)
    assert month.records() == [plain]


def test_a_view_that_grows_is_one_set_of_runs_in_every_project(month):
    """Was: layers of 16, 24 and 32 documents stayed complete beside each other in MLflow."""
    month.run("heads", sample=8, layer=[0, 1], component="head", head=[0, 1])
    for count in (16, 24, 32):
        month.run("layers", sample=count, layer=ALL)
    assert [(len(record.runs), record.n) for record in month.records()] == [(4, 32), (4, 8)]
    # Under another project, the former one is brought up to date too.
    run_experiment(month.file("more", sample=40, layer=ALL), month.results, track=["mlflow:other"])
    assert [(len(record.runs), record.n) for record in month.records()] == [(4, 40), (4, 8)]
    month.check_agreement()


def test_a_view_is_superseded_while_it_is_published(month):
    """Was: the smaller of two runs ended with "No such file", and MLflow kept it RUNNING."""
    heads = {"sample": 8, "layer": [0], "component": "head", "head": [0]}
    run_experiment(month.file("heads", **heads), month.results, track=["mlflow"])
    run_experiment(month.file("smaller", sample=24, layer=ALL), month.results, track=["none"])
    small_record = next(record for record in month.records() if record.n == 24)
    (store,) = Ledger(month.results).cells()
    publisher, resume = Publisher(["mlflow"], "tracker", month.results), Event()
    future = publisher.begin(store, small_record, resume)
    run_experiment(month.file("larger", sample=40, layer=ALL), month.results, track=["mlflow"])
    resume.set()
    assert future.result().error == ""
    publisher.close()
    month.check_agreement()


def test_what_is_searched_and_studied_in_a_month_stays_as_it_is_known(month, tmp_path):
    """Was: what a search had measured was unfinished for ever; three editions read the same."""
    month.run("first", sample=24, layer=ALL)
    # A search, whose test documents are some of those.
    options = {"strategy": "accuracy", "remove": 2, "sample": 8, "test_sample": 10}
    options |= {"model": str(month.model), "benchmark": "arc_easy", "data": str(month.data)}
    search = write_study(tmp_path / "prune.yaml", **options)
    for _ in range(2):
        done = tracker.prune(search, results=month.results, track=["mlflow"])
        assert done.outcome.exit_code == 0
    assert not done.outcome.models_loaded
    month.check_agreement()
    # A study, of fewer layers and documents than are known.
    small_study = month.file("fewer", sample=10, layer=[0, 2, 3])
    month.study("joint", small_study)
    # One of its pairs' cells, when a run asks for it too.
    title = "tiny-llama · arc_easy · 0-shot · without layer 2 · drawn at random"
    page = month.results / "report.html"
    assert title not in page.read_text(), "the study shows it"
    month.run("explicit", sample=10, layer=[3], removed=[[2]])
    assert title in page.read_text()
    # A task of somebody's own, edited, and then as it was at first.
    rows = write_rows(tmp_path, sums=[{"q": f"{n} and {n}"} for n in range(12)]) / "sums.jsonl"
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    task_options = {"benchmark": "our_sums", "include_path": str(tasks), "layer": [1, 2]}
    for words in ("{{q}}?", "{{q}}, or what?", "{{q}}?"):
        choices = ["red", "no colour at all that one would know"]
        write_choices(tasks, "our_sums", rows, words, doc_to_choice=choices, doc_to_target=0)
        month.run("own", data=None, **task_options)
    editions = [record for record in month.records() if record.benchmark.name == "our_sums"]
    dates = sorted(str(record.measured) for record in editions)
    assert len(set(dates)) == len(editions) == 2
    board = month.run_command("leaderboard")
    page = (month.results / "report.html").read_text()
    (latest,) = (record for record in editions if record.measured == dates[-1])
    last = f"only the latest measurement counts: our_sums · 0-shot · measured {dates[-1][:10]}"
    # The terminal says the first of what does not count, the page all of it.
    assert "is left out of the ranking" in board
    assert page.count(last) == len(editions) - 1, re.findall(
        r"<li>.*latest measurement counts.*", page
    )
    assert f"({latest.key[:8]})" in page
    # What a tracker lacks is nothing.
    assert tracker.sync(["mlflow"], results=month.results).failed == {}
    month.check_agreement()
