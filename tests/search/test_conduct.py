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
from tracker.cli.studying import export as exporting
from tracker.export import checkpoint
from tracker.export.changes import (
    count_reused,
    find_removal,
    removal,
    removal_by_search,
)
from tracker.ledger.store import Ledger, read_records, write_search
from tracker.measuring.progress import Silent
from tracker.models import checkpoint as models
from tracker.schema.config import cell_request
from tracker.schema.errors import ModelError, WorkError
from tracker.schema.extent import ALL_DOCUMENTS, Extent
from tracker.schema.findings import FindingRecord
from tracker.schema.search_parts import SearchParts
from tracker.search import cells, planning, report
from tracker.search import search as searching

from .conftest import LAYERS, SETTINGS, stored_searches

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_file_is_searched_tracked_and_shown(write, prune, tmp_path, monkeypatch):
    results = tmp_path / "results"
    path = write(strategy=["accuracy", "cosine_oneshot", "last", "random"], draws=2, seed=3)
    result = prune(path)
    assert result.exit_code == 0, result.output
    records = stored_searches(tmp_path)
    assert sorted(search_record.label for search_record in records) == [
        "accuracy", "cosine_oneshot", "last", "random 1", "random 2",
    ]  # fmt: skip

    # Each step is an ordinary run, with the same figures.
    listed = api.ls(results)
    runs = {(cell.removed, run.change.layer): (cell, run) for cell in listed for run in cell.runs}
    for record in records:
        removed: tuple[int, ...] = ()
        for step in record.steps:
            cell, run = runs[removed, step.layer]
            assert step.test is not None
            assert cell.n == step.test.n == 10
            assert run.accuracy == step.test.level.value
            test_drop = step.test.lost
            run_drop = (run.drop.value, run.drop.low, run.drop.high)
            assert run_drop == (test_drop.value, test_drop.low, test_drop.high)
            assert cell.baseline.value == record.baseline.level.value
            assert cell.record_key in record.rests_on
            removed = step.removed
        assert len(record.removed) == 2
        assert sorted((*record.kept, *record.removed)) == list(range(LAYERS))
    # Nothing else is shown: candidates are no runs. Nor are they unfinished.
    steps = {(s.removed, s.layer) for search_record in records for s in search_record.steps}
    assert len(runs) == len(steps)
    assert unfinished_messages(results) == []

    # The search is all that there is to see: no board of the few layers that its steps took.
    page = (results / "report.html").read_text(encoding="utf-8")
    assert report.PRUNE_QUESTION in page
    assert 'id="overview-title"' not in page

    # No document that chose is among those that test, and the record names those that chose.
    stores = {store.identity.key: store for store in Ledger(results).cells()}
    assert len(stores) == 2
    for record in records:
        ((key, _view, _n), *_) = record.rests_on
        test_frame = stores[key].read(columns=["task", "doc", "ablation"])
        for calibrated in record.calibration:
            assert (calibrated.part, record.part) == ("calibration", "test")
            chosen_rows = stores[calibrated.key].read(columns=["task", "doc", "ablation"])
            numbers = {(task, n) for task, docs in calibrated.documents.items() for n in docs}
            assert set(zip(chosen_rows["task"], chosen_rows["doc"], strict=True)) == numbers
            assert not numbers & set(zip(test_frame["task"], test_frame["doc"], strict=True))

    # Once more: no model is loaded, and the same is said.
    monkeypatch.setattr(cells, "open_model", lambda *given: pytest.fail("loaded again"))
    repeated = prune(path)
    assert repeated.exit_code == 0, repeated.output
    assert stored_searches(tmp_path) == records
    # The greedy search alone needed more than the one that looks once.
    costs = {search_record.label: search_record.cost for search_record in records}
    assert costs["cosine_oneshot"].evaluations == costs["cosine_oneshot"].passes == 1
    assert costs["accuracy"].evaluations > costs["accuracy"].passes > 1
    assert costs["accuracy"].seconds > 0

    # A file that asks for less: what it asked for before is still no cell like any other.
    smaller = prune(write(strategy="last", seed=3))
    assert smaller.exit_code == 0, smaller.output
    page = (results / "report.html").read_text(encoding="utf-8")
    assert 'id="overview-title"' not in page


def unfinished_messages(results: Path) -> list[str]:
    """Return the messages of list, report, leaderboard and sync on unfinished cells."""
    messages = []
    for command in ("ls", "report", "leaderboard"):
        result = cli(command, "--results", results)
        messages += [line for line in result.output.splitlines() if str(results / "cells") in line]
    notes = api.sync((), results=results).notes
    messages += [note for note in notes if "not published yet" in note]
    return [line.split(": ", 2)[2] for line in messages]


class KillingProgress(Silent):
    """Ends the process when so many responses have come."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.n_responses = limit, 0

    def advance(self, responses: int) -> None:
        self.n_responses += responses
        if self.limit is not None and self.n_responses >= self.limit:
            raise KeyboardInterrupt


def test_a_killed_search_continues(write, tmp_path: Path) -> None:
    """Was: its calibration cell was said to be unfinished, however often its command was typed."""
    path = write(strategy="accuracy", sample=12)
    full_progress = KillingProgress()
    expected_results = api.prune(path, results=tmp_path / "whole", track=[], progress=full_progress)
    first_responses = 12 * 2 * (1 + LAYERS)  # answers of the first step, to two requests a document
    killed_progress = KillingProgress(first_responses + 1)
    with pytest.raises(KeyboardInterrupt):
        api.prune(path, results=tmp_path / "killed", track=[], progress=killed_progress)
    prefix = (
        "the search is in progress or was stopped; to continue a stopped search, type its command "
        "again: "
    )
    message = f"{prefix}tracker prune {path} --results {tmp_path / 'killed'}"
    assert unfinished_messages(tmp_path / "killed") == [f"12 documents; {message}", message]
    second_progress = KillingProgress()
    results = api.prune(path, results=tmp_path / "killed", track=[], progress=second_progress)
    assert unfinished_messages(tmp_path / "killed") == []
    # One more search that is killed, in a cell in which another is over.
    second_path = write(strategy="gold_logprob", remove=3, sample=12).rename(tmp_path / "more.yaml")
    with pytest.raises(KeyboardInterrupt):
        api.prune(second_path, results=tmp_path / "killed", track=[], progress=KillingProgress(1))
    message = f"{prefix}tracker prune {second_path} --results {tmp_path / 'killed'}"
    assert {*unfinished_messages(tmp_path / "killed")} == {f"12 documents; {message}", message}
    assert not Ledger(tmp_path / "killed").contents().damaged
    assert second_progress.n_responses == full_progress.n_responses - first_responses
    assert [r.steps for r in results.searches] == [r.steps for r in expected_results.searches]
    for folder in ("whole", "killed"):
        for store in Ledger(tmp_path / folder).cells():
            rows = store.read(columns=["task", "doc", "ablation"])
            shards = [store.load_shard(path) for path in store.shards()]
            assert sum(shard.table.num_rows for shard in shards if shard) == len(rows)


@pytest.mark.parametrize(("settings", "words"), golden("searches"))
def test_impossible_searches_are_refused(write, prune, tmp_path, settings, words) -> None:
    result = prune(write(**{"strategy": "accuracy", **json.loads(settings)}))
    refused(result, words)
    assert not list((tmp_path / "results").glob("searches/*"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"calibrate": "other"}, "the calibration task other and the test task one have the same"),
        ({"benchmark": "both"}, "the calibration task one and the test task other have the same"),
        ({"num_fewshot": 2}, "one scores the split 'test', and also draws few-shot examples"),
    ],
)
def test_shared_documents_are_refused(write, prune, tmp_path, settings, words) -> None:
    """It is refused of a whole file, before anything is measured, and where it is planned."""
    tasks = {"benchmark": "one", "data": "hub", "include_path": str(write_pair(tmp_path))}
    path = write(**tasks | settings, strategy=["accuracy", "last"])
    refused(prune(path), words)
    refused(cli("plan", path, "--results", tmp_path / "results"), words)
    assert not list((tmp_path / "results").rglob("shards/*"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"strategy": "cosine", "rescoring": "race"},
            "'rescoring' is only for the strategy accuracy or gold_",
        ),
        ({"strategy": "accuracy", "draws": 9}, "'draws' is only for the strategy random, not for"),
    ],
)
def test_unused_settings_are_refused(prune, model, monkeypatch, settings, words):
    """But where it is a trial: a sweep's grid holds every combination of its values."""
    merged = {"model": model, **SETTINGS, "sample": None, **settings}
    options = [f"--{name}={value}" for name, value in merged.items()]
    refused(prune(*options), words)

    def stop(requests: object, *arguments: object) -> None:
        raise WorkError("it was let through")

    monkeypatch.setattr("tracker.search.conduct.run_search_file", stop)
    monkeypatch.setenv("WANDB_SWEEP_ID", "q7v2k1ab")
    result = prune(*options)
    assert (result.exit_code, "it was let through" in result.output) == (1, True)


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
        merged = {"model": str(model), **SETTINGS, **settings}
        return api.prune(results=tmp_path / "results", track=[], **merged)

    return make


def test_attentions_have_runs_of_single_removals(search_for, tmp_path) -> None:
    search_results = search_for(strategy="gold_logprob", unit="attention", seed=6)
    (record,) = search_results.searches
    assert search_results.exports == ()
    assert (record.unit, len(record.removed), len(record.rests_on)) == ("attention", 2, 1)
    for store in Ledger(tmp_path / "results").cells():
        names = set(store.read(columns=["task", "doc", "ablation"])["ablation"])
        assert f"attention:{','.join(map(str, record.removed))}" in names
    assert [step.test.n for step in record.steps if step.test] == [10, 10]


def test_test_results_are_drawn_against_the_size_and_the_time(search_for, tmp_path) -> None:
    (record,) = search_for(strategy="last", remove="20 % latency").searches
    (finding,) = read_records(tmp_path / "results/studies", FindingRecord, {})
    times = sorted(1000 * step.seconds for step in record.steps if step.seconds)
    size, time = finding.charts
    assert (time.x, list(time.places)) == ("milliseconds per token", times)
    assert [line.values[::-1] for line in time.lines] == [
        tuple(step.test.level.value for step in record.steps if step.test)
    ]
    assert len(size.places) == len(times) + 1  # with the intact model


def test_a_search_without_a_file_is_continued(model, tmp_path: Path) -> None:
    settings = {"model": model, **SETTINGS, "strategy": "accuracy", "benchmark": "copa"}
    results = tmp_path / "results"
    with pytest.raises(KeyboardInterrupt):
        api.prune(**settings, results=results, track=[], progress=KillingProgress(1))
    (*_, line) = unfinished_messages(results)
    command = shlex.split(line[line.index("tracker prune") :])[1:]
    assert printed(*command, "--track", "none")
    assert unfinished_messages(results) == []


def test_unsavable_models_are_refused(search_for, tmp_path, monkeypatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise ModelError("its configuration cannot express what would be left")

    assert planning.check_layer_changes is models.check_layer_changes
    monkeypatch.setattr(planning, "check_layer_changes", refuse)
    with pytest.raises(ModelError, match="cannot express what would be left"):
        search_for(strategy="last")
    assert not (tmp_path / "results").exists()
    (record,) = search_for(strategy="last", unit="attention").searches
    assert record.removed == (LAYERS - 3, LAYERS - 2)


def test_each_kind_of_removal_is_checked(ask, make_cache, tmp_path, monkeypatch) -> None:
    """Also where a strategy that only observes opened the model first."""
    n_removed: list[set[int]] = []
    original_check = cells.Meter.check

    def count_removals(meter: cells.Meter, *arguments: object) -> list[str]:
        n_removed.append({len(ablation.removed()) for ablation in meter.ablations})
        return original_check(meter, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(cells.Meter, "check", count_removals)
    cache = make_cache(tmp_path)
    for name in ("cosine_oneshot", "gold_logprob"):
        request = ask(strategy=name, sample=3, remove=2)
        list(searching.run_search(request, searching.find_budget(request, cache), cache))
    assert n_removed == [{0, 1}, {0, 2}]


@pytest.mark.usefixtures("in_process")
def test_output_saves_the_recommended_set(write, prune, truth, tmp_path: Path) -> None:
    results, lighter = tmp_path / "results", tmp_path / "lighter"
    path = write(strategy=["accuracy", "last"])
    result = prune(path, "--output", lighter)
    assert result.exit_code == 0, result.output
    records = {record.strategy: record for record in stored_searches(tmp_path)}
    winner = min(records.values(), key=lambda record: truth.key("accuracy", record.removed))

    facts = json.loads((lighter / "tracker.json").read_text())
    assert facts["removed_in_order"] == list(winner.order)
    assert facts["strategy"] == winner.strategy
    calibration = "8 documents of copa (calibration)" if winner.calibration else None
    assert facts["calibration"] == calibration
    assert len(facts["chosen_by"]) == len(winner.rests_on) > 0
    # Measured for the search and for the export: one line, not two.
    (accuracy,) = facts["accuracy"]
    assert (accuracy["n"], accuracy["after"]["value"]) == (10, winner.steps[-1].test.level.value)  # type: ignore[union-attr]
    assert facts["proof"]["documents"] == 10
    card = (lighter / "README.md").read_text()
    assert f"The strategy `{winner.strategy}` chose them" in card
    assert AutoModelForCausalLM.from_pretrained(lighter).config.num_hidden_layers == LAYERS - 2

    # What was chosen on the way is known too; what nobody chose is not.
    ledger, model = Ledger(results), winner.model
    first_step = winner.steps[0]
    change = find_removal(ledger, model, removal(first_step.removed))
    assert change.tested[0].after == first_step.test.level  # type: ignore[union-attr]
    assert f"{winner.label}, step 1 of 2" in str(change.strategy)
    assert find_removal(ledger, model, removal((0, 1, 2))).strategy is None
    # Another search that ended there takes nothing from it.
    other_record = winner.model_copy(update={"name": "a", "strategy": "a", "rests_on": ()})
    write_search(results, other_record)
    joint_change = find_removal(ledger, model, removal(winner.removed))
    assert joint_change.strategy == f"a, {winner.strategy}"
    change = removal_by_search(ledger, winner, winner.steps[-1])
    assert (change.strategy, change.order) == (winner.strategy, winner.order)
    # Of the documents that chose, none tests; all of them are among those that chose.
    own_removal = removal_by_search(ledger, records["accuracy"], records["accuracy"].steps[-1])
    stores = {store.identity.key: store for store in ledger.cells()}
    (calibration,) = own_removal.documents
    assert count_reused(ledger, own_removal, stores[calibration.key], Extent(sample=8)) == 8
    assert count_reused(ledger, own_removal, stores[winner.rests_on[0][0]], ALL_DOCUMENTS) == 0
    # So are those that decided for a set which looked at no document.
    blind_removal = removal_by_search(
        ledger, records["last"], records["last"].steps[-1], calibration
    )
    assert count_reused(ledger, blind_removal, stores[calibration.key], Extent(sample=8)) == 8

    refused(prune(path, "--output", lighter), "that is not empty")


def test_export_command_has_all_settings(write, tmp_path: Path) -> None:
    options = {"seed": 7, "apply_chat_template": True, "include_path": "/a b", "num_fewshot": 0}
    options |= {"model_args": {"attn_implementation": "eager"}, "part": "test", "sample": 5}
    request = cell_request(model="m", benchmark="copa", layers=(3,), removed=(1,), **options)
    record = SimpleNamespace(parts=SearchParts("layer", LAYERS))
    step = SimpleNamespace(removed=(1, 3))
    search = SimpleNamespace(record=record)
    savable = report.SavableStep(None, search, step, request)  # type: ignore[arg-type]
    command = shlex.split(savable.command(tmp_path))
    assert command[:3] == ["tracker", "export", "m"]
    params = exporting.make_context("export", command[2:]).params
    assert params["remove"] == (1, 3)
    assert params["results"] == tmp_path
    settings = {name: params[name] for name in (*options, "benchmark", "sample", "dtype", "data")}
    parsed_request = cell_request(model="m", layers=(3,), removed=(1,), **settings)
    assert parsed_request == request


def test_search_survives_a_failed_export(write, prune, tmp_path, monkeypatch) -> None:
    def refuse_disk(*arguments: object) -> None:
        raise WorkError("lighter is not written: the disk is full")

    lighter = tmp_path / "lighter"
    attentions = write(strategy="last", unit="attention")
    refused(prune(attentions, "--output", lighter), "leave --output out")
    assert not (tmp_path / "results").exists()
    monkeypatch.setattr(checkpoint, "export", refuse_disk)
    result = prune(write(strategy="last"), "--output", lighter)
    assert result.exit_code == 1
    assert report.PRUNE_QUESTION in result.output
    assert "not saved: lighter is not written: the disk is full" in result.output
    assert "to save the recommended model: tracker export" in result.output
