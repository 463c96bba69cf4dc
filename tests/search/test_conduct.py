"""From the file to the section: nothing twice, nothing lost, all of it said."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM

from tests.conftest import cli, golden, printed, refused
from tests.helpers.own_tasks import write_pair
from tracker import api
from tracker.cli.pruning import export as exporting
from tracker.core.config import cell_request
from tracker.core.errors import ModelError, WorkError
from tracker.core.extent import ALL, Extent
from tracker.core.prune_records import PruneRecord
from tracker.export import checkpoint
from tracker.export.changes import count_choosing, removal_of, searched_removal
from tracker.ledger.store import Ledger, keep_search, listed
from tracker.measuring.progress import Silent
from tracker.models import checkpoint as models
from tracker.search import cells, planning, report
from tracker.search import search as searching

from .conftest import LAYERS, SETTINGS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_file_is_searched_tested_tracked_kept_and_shown(write, prune, tmp_path, monkeypatch):
    results = tmp_path / "results"
    path = write(strategy=["accuracy", "cosine_oneshot", "last", "random"], draws=2, seed=3)
    done = prune(path)
    assert done.exit_code == 0, done.output
    records = listed(results / "searches", PruneRecord, {})
    assert sorted(one.label for one in records) == [
        "accuracy", "cosine_oneshot", "last", "random 1", "random 2",
    ]  # fmt: skip

    # Each step is an ordinary run, with the same figures.
    runs = {
        (cell.removed, run.change.layer): (cell, run)
        for cell in api.ls(results)
        for run in cell.runs
    }
    for record in records:
        before: tuple[int, ...] = ()
        for step in record.steps:
            cell, run = runs[before, step.layer]
            assert step.test is not None
            assert cell.n == step.test.n == 10
            assert run.accuracy == step.test.level.value
            lost = step.test.lost
            drop = (run.drop.value, run.drop.low, run.drop.high)
            assert drop == (lost.value, lost.low, lost.high)
            assert cell.baseline.value == record.baseline.level.value
            assert cell.place in record.rests_on
            before = step.removed
        assert len(record.removed) == 2
        assert sorted((*record.kept, *record.removed)) == list(range(LAYERS))
    # Nothing else is shown: candidates are no runs. Nor are they unfinished.
    steps = {(s.removed, s.layer) for one in records for s in one.steps}
    assert len(runs) == len(steps)
    assert said_of_unfinished(results) == []

    # The search is all that there is to see: no board of the few layers that its steps took.
    page = (results / "report.html").read_text(encoding="utf-8")
    assert report.QUESTION in page
    assert 'id="overview-title"' not in page

    # No document that chose is among those that test, and the record names those that chose.
    stores = {store.identity.key: store for store in Ledger(results).cells()}
    assert len(stores) == 2
    for record in records:
        ((key, _view, _n), *_) = record.rests_on
        tests = stores[key].read(columns=["task", "doc", "ablation"])
        for each in record.calibration:
            assert (each.part, record.part) == ("calibration", "test")
            chose = stores[each.key].read(columns=["task", "doc", "ablation"])
            numbers = {(task, n) for task, some in each.documents.items() for n in some}
            assert set(zip(chose["task"], chose["doc"], strict=True)) == numbers
            assert not numbers & set(zip(tests["task"], tests["doc"], strict=True))

    # Once more: no model is loaded, and the same is said.
    monkeypatch.setattr(cells, "open_model", lambda *given: pytest.fail("loaded again"))
    again = prune(path)
    assert again.exit_code == 0, again.output
    assert listed(results / "searches", PruneRecord, {}) == records
    # The greedy search alone needed more than the one that looks once.
    cost = {one.label: one.cost for one in records}
    assert cost["cosine_oneshot"].evaluations == cost["cosine_oneshot"].passes == 1
    assert cost["accuracy"].evaluations > cost["accuracy"].passes > 1
    assert cost["accuracy"].seconds > 0

    # A file that asks for less: what it asked for before is still no cell like any other.
    less = prune(write(strategy="last", seed=3))
    assert less.exit_code == 0, less.output
    page = (results / "report.html").read_text(encoding="utf-8")
    assert 'id="overview-title"' not in page


def said_of_unfinished(results: Path) -> list[str]:
    """Return the messages of list, report, leaderboard and sync on unfinished cells."""
    said = []
    for command in ("ls", "report", "leaderboard"):
        done = cli(command, "--results", results)
        said += [line for line in done.output.splitlines() if str(results / "cells") in line]
    said += [note for note in api.sync((), results=results).notes if "not published yet" in note]
    return [line.split(": ", 2)[2] for line in said]


class Killed(Silent):
    """Ends the process when so many responses have come."""

    def __init__(self, after: int | None = None) -> None:
        self.after, self.came = after, 0

    def advance(self, responses: int) -> None:
        self.came += responses
        if self.after is not None and self.came >= self.after:
            raise KeyboardInterrupt


def test_a_killed_search_goes_on_after_its_last_block(write, tmp_path: Path) -> None:
    """Was: its calibration cell was said to be unfinished, however often its command was typed."""
    path = write(strategy="accuracy", sample=12)
    whole = Killed()
    expected = api.prune(path, results=tmp_path / "whole", track=[], progress=whole)
    first = 12 * 2 * (1 + LAYERS)  # answers of the first step, to two requests a document
    killed = Killed(first + 1)
    with pytest.raises(KeyboardInterrupt):
        api.prune(path, results=tmp_path / "killed", track=[], progress=killed)
    goes_on = "its search goes on, or was stopped: then type its command again: "
    again = f"{goes_on}tracker prune {path} --results {tmp_path / 'killed'}"
    assert said_of_unfinished(tmp_path / "killed") == [f"12 documents; {again}", again]
    rest = Killed()
    done = api.prune(path, results=tmp_path / "killed", track=[], progress=rest)
    assert said_of_unfinished(tmp_path / "killed") == []
    # One more search that is killed, in a cell in which another is over.
    more = write(strategy="gold_logprob", remove=3, sample=12).rename(tmp_path / "more.yaml")
    with pytest.raises(KeyboardInterrupt):
        api.prune(more, results=tmp_path / "killed", track=[], progress=Killed(1))
    again = f"{goes_on}tracker prune {more} --results {tmp_path / 'killed'}"
    assert {*said_of_unfinished(tmp_path / "killed")} == {f"12 documents; {again}", again}
    assert not Ledger(tmp_path / "killed").contents().damaged
    assert rest.came == whole.came - first
    assert [r.steps for r in done.searches] == [r.steps for r in expected.searches]
    for folder in ("whole", "killed"):
        for store in Ledger(tmp_path / folder).cells():
            rows = store.read(columns=["task", "doc", "ablation"])
            shards = [store.shard(path) for path in store.shards()]
            assert sum(shard.table.num_rows for shard in shards if shard) == len(rows)


@pytest.mark.parametrize(("settings", "words"), golden("searches"))
def test_what_cannot_be_is_refused(write, prune, tmp_path: Path, settings: str, words: str) -> None:
    done = prune(write(**{"strategy": "accuracy", **json.loads(settings)}))
    refused(done, words)
    assert not list((tmp_path / "results").glob("searches/*"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"calibrate": "other"}, "other, which calibrates, and one, which tests, have the same"),
        ({"benchmark": "both"}, "one, which calibrates, and other, which tests, have the same"),
        ({"num_fewshot": 2}, "one draws few-shot examples from its split 'test', which is scored"),
    ],
)
def test_no_document_chooses_and_is_tested(write, prune, tmp_path, settings, words) -> None:
    """It is refused of a whole file, before anything is measured, and where it is planned."""
    tasks = str(write_pair(tmp_path))
    path = write(
        **{"benchmark": "one", "data": "hub", "include_path": tasks, **settings},
        strategy=["accuracy", "last"],
    )
    refused(prune(path), words)
    refused(cli("plan", path, "--results", tmp_path / "results"), words)
    assert not list((tmp_path / "results").rglob("shards/*"))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            {"strategy": "cosine", "rescoring": "race"},
            "'rescoring: race' is for accuracy and gold_",
        ),
        ({"strategy": "accuracy", "draws": 9}, "'draws' is for random, and this"),
    ],
)
def test_a_search_that_does_not_do_what_is_said_is_refused(prune, model, monkeypatch, said, words):
    """But where it is a trial: a sweep's grid holds every combination of its values."""
    given = [f"--{n}={v}" for n, v in {"model": model, **SETTINGS, "sample": None, **said}.items()]
    refused(prune(*given), words)

    def stop(asked: object, *rest: object) -> None:
        raise WorkError("it was let through")

    monkeypatch.setattr("tracker.search.conduct.conduct", stop)
    monkeypatch.setenv("WANDB_SWEEP_ID", "q7v2k1ab")
    done = prune(*given)
    assert (done.exit_code, "it was let through" in done.output) == (1, True)


@pytest.mark.parametrize("more", [{"remove": "5000 ms"}, {"remove": "20 % seconds", "sample": 1}])
def test_a_refused_search_writes_nothing(prune, model: Path, tmp_path: Path, more) -> None:
    """Was: a folder with tracker.json and what the model had been timed for."""
    options = {"model": model, **SETTINGS, "strategy": "accuracy", **more}
    refused(prune(*(f"--{name}={value}" for name, value in options.items())))
    assert not (tmp_path / "results").exists()


@pytest.fixture
def search_for(model: Path, tmp_path: Path) -> Callable[..., api.Results]:
    """Search as a trial does, by Python."""

    def make(**settings: object) -> api.Results:
        said = {"model": str(model), **SETTINGS, **settings}
        return api.prune(results=tmp_path / "results", track=[], **said)

    return make


def test_attentions_are_searched_and_kept_without_runs_of_several(search_for, tmp_path) -> None:
    done = search_for(strategy="gold_logprob", unit="attention", seed=6)
    (record,) = done.searches
    assert done.exports == ()
    assert (record.unit, len(record.removed), len(record.rests_on)) == ("attention", 2, 1)
    for store in Ledger(tmp_path / "results").cells():
        names = set(store.read(columns=["task", "doc", "ablation"])["ablation"])
        assert f"attention:{','.join(map(str, record.removed))}" in names
    assert [step.test.n for step in record.steps if step.test] == [10, 10]


def test_a_search_without_a_file_is_gone_on_with_by_what_was_typed(model, tmp_path: Path) -> None:
    said = {"model": model, **SETTINGS, "strategy": "accuracy", "benchmark": "copa"}
    results = tmp_path / "results"
    with pytest.raises(KeyboardInterrupt):
        api.prune(**said, results=results, track=[], progress=Killed(1))
    (*_, line) = said_of_unfinished(results)
    command = shlex.split(line[line.index("tracker prune") :])[1:]
    assert printed(*command, "--track", "none")
    assert said_of_unfinished(results) == []


def test_a_model_that_could_not_be_saved_is_refused_before_the_search(
    search_for, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object, **more: object) -> None:
        raise ModelError("its configuration cannot say what would be left")

    assert planning.refuse_unsizable is models.refuse_unsizable
    monkeypatch.setattr(planning, "refuse_unsizable", refuse)
    with pytest.raises(ModelError, match="cannot say what would be left"):
        search_for(strategy="last")
    assert not (tmp_path / "results").exists()
    (record,) = search_for(strategy="last", unit="attention").searches
    assert record.removed == (LAYERS - 3, LAYERS - 2)


def test_sharing_is_checked_whenever_another_kind_of_removal_comes(
    ask, lend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a strategy that only observes opened the model first."""
    checked: list[set[int]] = []
    check = cells.Meter.check

    def counted(meter: cells.Meter, *given: object) -> list[str]:
        checked.append({len(one.removed()) for one in meter.ablations})
        return check(meter, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(cells.Meter, "check", counted)
    lender, shared = lend(tmp_path), {}
    for name in ("cosine_oneshot", "gold_logprob"):
        asked = ask(strategy=name, sample=3, remove=2)
        list(searching.search(asked, searching.budget_of(asked, lender), lender, shared))
    assert checked == [{0, 1}, {0, 2}]


@pytest.mark.usefixtures("here")
def test_one_command_saves_the_recommended_and_its_card_says_how_it_was_chosen(
    write, prune, truth, tmp_path: Path
) -> None:
    results, lighter = tmp_path / "results", tmp_path / "lighter"
    path = write(strategy=["accuracy", "last"])
    done = prune(path, "--output", lighter)
    assert done.exit_code == 0, done.output
    records = {one.strategy: one for one in listed(results / "searches", PruneRecord, {})}
    best = min(records.values(), key=lambda one: truth.key("accuracy", one.removed))

    facts = json.loads((lighter / "tracker.json").read_text())
    assert facts["removed_in_order"] == list(best.order)
    assert facts["strategy"] == best.strategy
    assert facts["calibration"] == (
        "8 documents of copa (calibration)" if best.calibration else None
    )
    assert len(facts["chosen_by"]) == len(best.rests_on) > 0
    # Measured for the search and for the export: one line, not two.
    (cost,) = facts["accuracy"]
    assert (cost["n"], cost["after"]["value"]) == (10, best.steps[-1].test.level.value)  # type: ignore[union-attr]
    assert facts["proof"]["documents"] == 10
    card = (lighter / "README.md").read_text()
    assert f"The strategy `{best.strategy}` chose them" in card
    assert AutoModelForCausalLM.from_pretrained(lighter).config.num_hidden_layers == LAYERS - 2

    # What was chosen on the way is known too; what nobody chose is not.
    ledger, base = Ledger(results), best.model
    first = best.steps[0]
    change = searched_removal(ledger, base, first.removed)
    assert change.tested[0].after == first.test.level  # type: ignore[union-attr]
    assert f"{best.label}, step 1 of 2" in str(change.strategy)
    assert searched_removal(ledger, base, (0, 1, 2)).strategy is None
    # Another search that ended there takes nothing from it.
    other = best.model_copy(update={"name": "a", "strategy": "a", "rests_on": ()})
    keep_search(results, other)
    both = searched_removal(ledger, base, best.removed)
    assert both.strategy == f"a, {best.strategy}"
    change = removal_of(ledger, best)
    assert (change.strategy, change.order) == (best.strategy, best.order)
    # Of the documents that chose, none tests; all of them are among those that chose.
    searched = removal_of(ledger, records["accuracy"])
    stores = {store.identity.key: store for store in ledger.cells()}
    (calibration,) = searched.documents
    assert count_choosing(ledger, searched, stores[calibration.key], Extent(sample=8)) == 8
    assert count_choosing(ledger, searched, stores[best.rests_on[0][0]], ALL) == 0
    # So are those that decided for a set which looked at no document.
    blind = removal_of(ledger, records["last"], calibration)
    assert count_choosing(ledger, blind, stores[calibration.key], Extent(sample=8)) == 8

    refused(prune(path, "--output", lighter), "holds something")


def test_the_line_that_saves_says_all_that_the_search_was_told(write, tmp_path: Path) -> None:
    told = {
        "seed": 7,
        "apply_chat_template": True,
        "include_path": "/a b",
        "model_args": {"attn_implementation": "eager"},
        "num_fewshot": 0,
        "part": "test",
    }
    asked = cell_request(model="m", benchmark="copa", layers=(3,), removed=(1,), sample=5, **told)
    record = SimpleNamespace(removed=(1, 3))
    words = shlex.split(report.export_line(record, asked, tmp_path))  # type: ignore[arg-type]
    assert words[:3] == ["tracker", "export", "m"]
    given = exporting.make_context("export", words[2:]).params
    assert given["remove"] == (1, 3)
    assert given["results"] == tmp_path
    settings = {name: given[name] for name in (*told, "benchmark", "sample", "dtype", "data")}
    again = cell_request(model="m", layers=(3,), removed=(1,), **settings)
    assert again == asked


def test_what_cannot_be_saved_takes_nothing_of_the_search_away(
    write, prune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise WorkError("lighter is not written: the disk is full")

    lighter = tmp_path / "lighter"
    attentions = write(strategy="last", unit="attention")
    refused(prune(attentions, "--output", lighter), "leave --output out")
    assert not (tmp_path / "results").exists()
    monkeypatch.setattr(checkpoint, "export", full)
    done = prune(write(strategy="last"), "--output", lighter)
    assert done.exit_code == 1
    assert report.QUESTION in done.output
    assert "not saved: lighter is not written: the disk is full" in done.output
    assert "to save the recommended one: tracker export" in done.output
