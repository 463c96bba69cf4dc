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
from tests.helpers.runs import Heard, arc, run, typed, write_study
from tracker.core.records import CellRecord
from tracker.ledger.store import Ledger
from tracker.measuring.derive import record_of
from tracker.team.publish import Publisher
from tracker.tracking.identity import run_key

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = [0, 1, 2, 3]
Best = Mapping[tuple[str, ...], int]


class Month:
    """A results folder with its MLflow database, and what was known in it before."""

    def __init__(self, results: Path, experiment: Any, model: Path, data: Path) -> None:
        self.results, self._write, self.model, self.data = results, experiment, model, data
        self._best: Best = {}

    def file(self, name: str, **settings: Any) -> Path:
        """Write an experiment file."""
        known = {"limit": None, "data": str(self.data)}
        return self._write(self.model, f"{name}.yaml", **{**known, **settings})

    def study(self, name: str, file: Path) -> None:
        """Conduct a study, twice."""
        for _ in range(2):
            done = tracker.study(name, file, results=self.results, track=["mlflow"])
            assert done.outcome.exit_code == 0, done.outcome
        assert not done.outcome.models_loaded, "it measures nothing twice"
        self.agree()

    def run(self, name: str, **settings: Any) -> tuple[tuple[CellRecord, ...], list[str]]:
        """Run a file, twice; what it measured, and what was said."""
        heard = Heard()
        file = self.file(name, **settings)
        done = run(file, self.results, heard, track=["mlflow"])
        assert done.outcome.exit_code == 0, (done.outcome.failed, done.outcome.unpublished)
        again = run(file, self.results, track=["mlflow"])
        assert again.outcome.models_loaded == 0, "it measures nothing twice"
        assert again.cells == done.cells
        self.agree()
        return done.cells, heard.lines

    def type(self, *arguments: object) -> str:
        """Type a command, and return what it prints."""
        code, said = typed(*arguments, "--results", self.results)
        assert code == 0, said
        return said

    def records(self) -> list[CellRecord]:
        """All that is shown, as the ledger has it."""
        views = Ledger(self.results).contents().views
        return [record_of(store, asked.view) for store, asked in views]

    def agree(self) -> None:
        """See that list, page and MLflow show what the ledger knows, and no less than before."""
        records = self.records()
        assert not [record.lacks for record in records if record.lacks]
        best: dict[tuple[str, ...], int] = {}
        for record in records:
            for each in record.runs:
                known = (record.key, record.metric, str(record.sample_seed), each.ablation)
                best[known] = max(best.get(known, 0), each.n)
        fewer = {key: (n, best.get(key)) for key, n in self._best.items() if best.get(key, 0) < n}
        assert not fewer, "what was known before is not shown any more"
        self._best = best
        # The list.
        listed = self.type("ls")
        assert "unfinished" not in listed
        rows = listed.splitlines()[1:]
        assert len(set(rows)) == len(rows) == len(records), listed
        for record in records:
            words = record.key[:12], f" {record.n} "
            assert any(all(word in row for word in words) for row in rows), listed
        # MLflow.
        client = MlflowClient(f"sqlite:///{self.results / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("tracker")
        runs = client.search_runs([experiment.experiment_id], max_results=5000)
        there = {each.data.tags["tracker.run_key"]: each for each in runs}
        assert len(there) == len(runs), "a run was created twice"
        for record in records:
            for each in record.runs:
                metrics = there[run_key(record, each.ablation)].data.metrics
                assert metrics["n"] == each.n
                assert metrics["accuracy_drop"] == pytest.approx(each.drop.value, abs=1e-12)
            cell = there[run_key(record, "cell")]
            assert cell.data.metrics["n"] == record.n
        cells = [each for each in runs if each.data.tags["tracker.kind"] == "cell"]
        names = [each.info.run_name for each in cells]
        assert len(set(names)) == len(names), names
        mine = {
            run_key(record, name)
            for record in records
            for name in ("baseline", "cell", *(run.ablation for run in record.runs))
        }
        assert set(there) == mine, "runs of views that are not there any more"
        assert {run.info.status for run in runs} == {"FINISHED"}
        # The board.
        assert "not shown yet" not in self.type("leaderboard")
        # The page.
        assert "not shown yet" not in self.type("report")
        page = (self.results / "report.html").read_text()
        for record in records:
            assert record.counted in page


@pytest.fixture
def month(tmp_path, experiment, tiny_llama, template) -> Month:
    results = tmp_path / "results"
    results.mkdir()
    shutil.copy(template, results / "mlflow.db")
    return Month(results, experiment, tiny_llama(), arc(tmp_path / "data", 60))


def test_a_smaller_question_takes_nothing_away(month):
    """Was: layers 0 and 3 on 10 documents, and all were shown on 10."""
    name = f"{month.model} × arc_easy"
    (large,), said = month.run("large", sample=40, layer=ALL)
    assert not [line for line in said if " shown" in line]
    (small,), said = month.run("small", sample=10, layer=[0, 3])
    assert ([each.change.layer for each in small.runs], small.n) == ([0, 3], 10), (
        "what the file asked"
    )
    assert (
        f"{name}: 40 documents are known of these runs, and stay shown; to show 10 beside them, "
        "list both: sample: {values: [10, 40]}"
    ) in said
    (shown,) = month.records()
    assert shown.model_copy(update={"supersedes": ()}) == large
    # By name, it stands beside the larger one.
    _, said = month.run("both", sample=[10, 40], layer=[0, 3])
    assert [record.beside for record in month.records()] == ["10 documents", "40 documents"]
    assert [record.runs for record in month.records()] == [small.runs, large.runs]
    assert " 10 drawn at random (seed 1234) " in month.type("ls")
    # What is more of some runs alone stands beside, until it is known of all.
    _, said = month.run("more", sample=48, layer=[1, 2])
    assert (
        f"{name}: shown beside what was asked for before: 2 runs on 10 documents; "
        "4 runs on 40 documents"
    ) in said
    assert [(len(each.runs), each.n) for each in month.records()] == [(2, 10), (4, 40), (2, 48)]
    month.run("rest", sample=48, layer=[0, 3])
    assert [(len(each.runs), each.n) for each in month.records()] == [(2, 10), (4, 48)]


def test_a_view_that_grows_is_one_set_of_runs_in_every_project(month):
    """Was: layers of 16, 24 and 32 documents stayed complete beside each other in MLflow."""
    month.run("heads", sample=8, layer=[0, 1], component="head", head=[0, 1])
    for count in (16, 24, 32):
        month.run("layers", sample=count, layer=ALL)
    assert [(len(each.runs), each.n) for each in month.records()] == [(4, 32), (4, 8)]
    # Under another project, the former one is brought up to date too.
    run(month.file("more", sample=40, layer=ALL), month.results, track=["mlflow:other"])
    assert [(len(each.runs), each.n) for each in month.records()] == [(4, 40), (4, 8)]
    month.agree()


def test_a_view_is_superseded_while_it_is_published(month):
    """Was: the smaller of two runs ended with "No such file", and MLflow kept it RUNNING."""
    heads = {"sample": 8, "layer": [0], "component": "head", "head": [0]}
    run(month.file("heads", **heads), month.results, track=["mlflow"])
    run(month.file("smaller", sample=24, layer=ALL), month.results, track=["none"])
    smaller = next(record for record in month.records() if record.n == 24)
    (store,) = Ledger(month.results).cells()
    publisher, goes_on = Publisher(["mlflow"], "tracker", month.results), Event()
    future = publisher.begin(store, smaller, goes_on)
    run(month.file("larger", sample=40, layer=ALL), month.results, track=["mlflow"])
    goes_on.set()
    assert future.result().failed == ""
    publisher.close()
    month.agree()


def test_what_is_searched_and_studied_in_a_month_stays_as_it_is_known(month, tmp_path):
    """Was: what a search had measured was unfinished for ever; three editions read the same."""
    month.run("first", sample=24, layer=ALL)
    # A search, whose test documents are some of those.
    asked = {"strategy": "accuracy", "remove": 2, "sample": 8, "test_sample": 10}
    asked |= {"model": str(month.model), "benchmark": "arc_easy", "data": str(month.data)}
    search = write_study(tmp_path / "prune.yaml", **asked)
    for _ in range(2):
        done = tracker.prune(search, results=month.results, track=["mlflow"])
        assert done.outcome.exit_code == 0
    assert not done.outcome.models_loaded
    month.agree()
    # A study, of fewer layers and documents than are known.
    fewer = month.file("fewer", sample=10, layer=[0, 2, 3])
    month.study("joint", fewer)
    # One of its pairs' cells, when a run asks for it too.
    title = "tiny-llama · arc_easy · 0-shot · without layer 2 · drawn at random"
    page = month.results / "report.html"
    assert title not in page.read_text(), "the study shows it"
    month.run("explicit", sample=10, layer=[3], removed=[[2]])
    assert title in page.read_text()
    # A task of somebody's own, edited twice, and then as it was at first.
    rows = write_rows(tmp_path, sums=[{"q": f"{n} and {n}"} for n in range(12)]) / "sums.jsonl"
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    own = {"benchmark": "our_sums", "data": None, "include_path": str(tasks), "layer": [1, 2]}
    for words in ("{{q}}?", "{{q}}, or what?", "Is it {{q}}?", "{{q}}?"):
        choices = ["red", "no colour at all that one would know"]
        write_choices(tasks, "our_sums", rows, words, doc_to_choice=choices, doc_to_target=0)
        month.run("own", **own)
    editions = [each for each in month.records() if each.benchmark.name == "our_sums"]
    dates = sorted(str(each.measured) for each in editions)
    assert len(set(dates)) == len(editions) == 3
    board = month.type("leaderboard")
    page = (month.results / "report.html").read_text()
    (latest,) = (each for each in editions if each.measured == dates[-1])
    last = f"what was measured last counts, our_sums · 0-shot · measured {dates[-1][:10]}"
    # The terminal says the first of what does not count, the page all of it.
    assert "does not count" in board
    assert page.count(last) >= 2, re.findall(r"<li>.*last counts.*", page)
    assert f"({latest.key[:8]})" in page
    # What a tracker lacks is nothing.
    assert tracker.sync(["mlflow"], results=month.results).failed == {}
    month.agree()
    # A larger question, at last.
    month.run("second", sample=28, layer=ALL)
