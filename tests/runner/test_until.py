"""Cells that are measured until a question is answered."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import tracker
from tests.helpers.lm_eval import write_rows
from tests.helpers.package_tasks import load_rows
from tests.helpers.runs import RecordingProgress, run_experiment, type_command, write_arc
from tracker import api
from tracker.analysis.stopping import CellRace, interim_estimates
from tracker.ledger.store import Ledger
from tracker.measuring import derive
from tracker.schema.config import cell_request
from tracker.schema.errors import ExperimentError, RequestError
from tracker.schema.experiment_input import load_experiment
from tracker.schema.extent import random_order
from tracker.schema.questions import parse_question
from tracker.stats.stopping import Race
from tracker.team.live import progress_figures
from tracker.team.sweeps import _find_measured_run, trial_request

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_stops_when_it_is_answered_and_goes_on_when_more_is_asked(
    tiny_llama, experiment, tmp_path, monkeypatch
):
    model, results = tiny_llama(seed=6), tmp_path / "results"
    documents = load_rows("allenai/openbookqa", "main").select(range(160))
    write_rows(tmp_path / "data/allenai/openbookqa/main", test=documents)
    settings = {"benchmark": "openbookqa", "data": str(tmp_path / "data"), "limit": None}
    heard = RecordingProgress()
    until = experiment(model, **settings, until="drop within 10 pp at 80 %")
    (cell,) = run_experiment(until, results, heard).cells
    total = cell.benchmark.tasks[0].documents
    assert 0 < cell.n < total
    assert (cell.is_stopped, cell.is_complete) == (True, False)
    most = max(record.n for record in cell.runs)
    assert cell.missing_labels == (
        "the measurement stopped when 'drop within 10 pp at 80 %' was answered: each run was "
        f"evaluated on {cell.n} to {most} of {total} documents",
    )
    assert heard.n_counted == heard.n_expected
    assert "the drops of layers 0, 1 and 2 are not known within 10 pp; 64 documents" in heard.lines

    # What was measured: a beginning of the random order, of some runs more than of others.
    (store,) = Ledger(results).cells()
    frame = store.read(columns=["doc", "ablation", "metric/acc_norm"])
    numbers = {name: set(rows["doc"]) for name, rows in frame.groupby("ablation")}
    order = random_order(1234, "openbookqa", range(total))
    for indices in numbers.values():
        assert indices == set(order[: len(indices)])
    sizes = {name: len(indices) for name, indices in numbers.items()}
    assert cell.n == min(sizes.values())
    assert [record.n for record in cell.runs] == [sizes[f"layer:{number}"] for number in range(4)]

    # What is said while it is measured holds no interval of a single look.
    request = cell_request(model="m", benchmark="openbookqa", layers=(0, 1, 2, 3), until="sign")
    estimates = interim_estimates(store, store.views.view_of(request))
    assert (estimates.documents, estimates.requested) == (sizes["baseline"], None)
    assert [drop.value for drop in estimates.drops.values()] == pytest.approx(
        [record.drop.value for record in cell.runs]
    )
    assert {drop.low for drop in estimates.drops.values()} == {None}
    assert "seconds_left" not in str(progress_figures(estimates, estimates, 1.0, cell))
    _, listing = type_command("ls", "--results", results)
    answer = "the measurement stopped when 'drop within 10 pp at 80 %' was answered"
    assert f" {answer}: each run was evaluated on {cell.n} to" in listing

    # The same as a race over the outcomes of a whole run.
    (full_cell,) = run_experiment(experiment(model, "whole.yaml", **settings), results).cells
    assert (full_cell.n, full_cell.answer, full_cell.is_complete) == (total, None, True)
    frame = store.read(columns=["doc", "ablation", "metric/acc_norm"])
    correct = frame.pivot(index="doc", columns="ablation", values="metric/acc_norm").loc[order]
    names = [f"layer:{number}" for number in range(4)]
    drops = correct[["baseline"]].to_numpy() - correct[names].to_numpy()
    race = Race(parse_question("drop within 10 pp at 80 %"), total, 4)
    while not race.is_answered:
        n_seen = int(race.bounds.seen.max())
        race.update(drops[n_seen : n_seen + 32])
    assert [sizes[name] for name in names] == race.bounds.seen.tolist()
    assert sizes["baseline"] == race.bounds.seen.max()
    assert cell.answer is not None
    assert [record.low for record in cell.answer.runs] == race.bounds.low.tolist()
    assert [record.drop.low for record in cell.runs] == race.bounds.low.tolist()
    assert [record.drop.high for record in cell.runs] == race.bounds.high.tolist()
    # A stream without layer l leaves the intact one at l, and passes the 3 - l layers above.
    n_passes = 4 * race.bounds.seen.max() + race.bounds.seen @ [3, 2, 1, 0]
    share = n_passes / (10 * total)
    last_line = (
        f"{cell.model.source} × openbookqa: drop within 10 pp at 80 %: each drop is known within "
        f"10 pp (80 % confidence; {race.bounds.seen.max()} of {total} documents, "
        f"{100 * share:.0f} % of the layer passes)"
    )
    assert heard.lines[-1] == last_line
    true_drops = [record.drop.value for record in full_cell.runs]
    assert (race.bounds.low <= true_drops).all()
    assert (race.bounds.high >= true_drops).all()

    # Figures of a run are those of its own documents.
    for record in cell.runs:
        assert record.drop.value == pytest.approx(drops[: record.n, record.change.layer].mean())

    # The question stays with the cell, and was replayed once for what the ledger holds now.
    replays = []
    monkeypatch.setattr(derive, "CellRace", lambda *a: replays.append(1) or CellRace(*a))

    # Asked again, nothing is loaded; and the cell is none that was stopped any more.
    second_heard = RecordingProgress()
    run_results = run_experiment(until, results, second_heard)
    assert run_results.outcome.models_loaded == 0
    assert second_heard.lines == [last_line]
    assert run_results.cells[0].answer == cell.answer
    assert run_results.cells[0].is_complete
    assert run_results.cells[0].runs == full_cell.runs
    run_experiment(until, results)
    assert not replays


def plan_text(file: Path, results: Path) -> str:
    code, output = type_command("plan", file, "--results", results, "--gflops", 100)
    assert code == 0, output
    return output


def test_a_tie_is_left_open_by_all_documents(tiny_llama, experiment, tmp_path):
    folder = tiny_llama()
    weights = load_file(folder / "model.safetensors")
    for name, values in weights.items():
        if re.search(r"layers\.[12]\..*(o_proj|down_proj)", name):
            values.zero_()  # these layers do nothing
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    heard, results = RecordingProgress(), tmp_path / "results"
    settings = {"limit": None, "benchmark": "copa", "layer": [1, 2]}
    tie_file = experiment(folder, **settings, until="top 1")
    assert (
        "Once 32 documents are measured, tracker plan estimates when measuring stops. To measure "
        "64 documents first, add --set until=null --sample 64" in plan_text(tie_file, results)
    )
    run_experiment(experiment(folder, "pilot.yaml", **settings, sample=40), results)
    assert (
        "until top 1: measuring will stop after about 100 of 100 documents and 100 % of the layer "
        "passes. In nine of ten simulations, it stops after at most 100 documents and 100 %. The "
        "simulations use 40 measured documents; few documents give estimates that are too low. In "
        "100 % of the simulations, measuring never stops early"
    ) in plan_text(tie_file, results)
    run_results = run_experiment(tie_file, results, heard)
    assert [record.drop.value for record in run_results.cells[0].runs] == [0, 0]
    assert heard.lines[-1] == (
        f"{folder} × copa: top 1: the largest drop is not separated by all 100 documents: "
        "layers 1 and 2 tie "
        "(95 % confidence; 100 of 100 documents, 100 % of the layer passes)"
    )
    assert "copa: top 1: the largest drop is not separated by all" in plan_text(tie_file, results)
    # Other questions, which all that is measured answers.
    for text, answer in (
        ("sign", "the drops of none are above 0, the drops of none are below 0 (95 %"),
        ("prune 1 within 99 pp", "the smallest drop is that of layer 1 (95 %"),
        ("top 1 within 99 pp at 90 %", "the largest drop is that of layer 1 (90 %"),
    ):
        run_results = run_experiment(experiment(folder, **settings, until=text), results, heard)
        assert run_results.outcome.models_loaded == 0
        assert f"copa: {text}: {answer}" in heard.lines[-1]


def test_a_benchmark_of_one_document_is_answered_by_it_or_ties(tiny_llama, experiment, tmp_path):
    data, results, folder = write_arc(tmp_path / "data", 1), tmp_path / "results", tiny_llama()
    for text in ("drop within 2 pp", "top 1"):
        heard = RecordingProgress()
        file = experiment(folder, data=str(data), limit=None, until=text, layer=[0, 1])
        (cell,) = run_experiment(file, results, heard).cells
        drops = [record.drop.value for record in cell.runs]
        assert cell.n == 1
        is_tie = text == "top 1" and len(set(drops)) == 1
        assert ("not separated by the only document" in heard.lines[-1]) == is_tie, heard.lines[-1]
        assert "1 of 1 documents, 100 % of the layer passes" in heard.lines[-1]


def test_a_study_does_not_stop_at_another_question(tiny_llama, experiment, tmp_path):
    file = experiment(tiny_llama(), limit=None, benchmark="copa", until="top 1")
    with pytest.raises(
        RequestError,
        match="'until' stops when its own question is answered, which is not the study's question",
    ):
        tracker.study("audit", file, results=tmp_path / "results", track=[])


QUESTION = "drop within 9 pp at 80 %"
DOCUMENTS = 400


@pytest.fixture
def asked_file(tiny_llama, experiment, tmp_path):
    """Build a question that some of the documents answer."""
    data = str(write_arc(tmp_path / "data", DOCUMENTS))
    settings = {"data": data, "limit": None, "until": QUESTION}
    return experiment(tiny_llama(seed=3), **settings)


def make_trial(file: Path, layer: int):
    """Return the cell of a file, and the request of one of its sweep's trials."""
    (cell,) = load_experiment(file).file.cells()
    settings = cell.settings
    keys = {name: getattr(settings, name) for name in ("model", "benchmark", "data", "until")}
    return cell, trial_request({**keys, "layer": layer})


def test_a_trial_measures_its_sweeps_cell_until_it_is_answered(asked_file, tmp_path, monkeypatch):
    cell, first_trial = make_trial(asked_file, 1)
    (plain_cell,) = run_experiment(asked_file, tmp_path / "alone").cells
    settings = {"results": tmp_path / "results", "track": []}
    # Nobody knows which other runs the question is about.
    with pytest.raises(
        ExperimentError, match="The other runs are listed in the trial's sweep"
    ) as caught:
        tracker.evaluate(first_trial, **settings)
    assert "'drop within 9 pp at 80 %' compares all runs" in str(caught.value)

    calls = []
    monkeypatch.setattr(api, "find_sweep_request", lambda *_: calls.append(1) or cell)
    run_results = tracker.evaluate(first_trial, **settings)
    (record,) = run_results.cells
    assert not run_results.outcome.failed
    assert (record.answer, record.runs) == (plain_cell.answer, plain_cell.runs)
    # The others find it in the ledger, and ask nobody.
    _, second_trial = make_trial(asked_file, 3)
    results = tracker.evaluate(second_trial, **settings)
    (record,) = results.cells
    assert record.answer == plain_cell.answer
    assert (results.outcome.models_loaded, len(calls)) == (0, 1)
    # So does whoever fills the runs of killed trials.
    cell_record, run_record = _find_measured_run(second_trial, Ledger(tmp_path / "results"))
    assert cell_record.answer == plain_cell.answer
    assert run_record == plain_cell.runs[3]
    # Another question is asked of the sweep again.
    other_trial = replace(second_trial, until=parse_question("sign at 80 %"))
    monkeypatch.setattr(api, "find_sweep_request", lambda *_: calls.append(1))
    with pytest.raises(ExperimentError, match="'sign at 80 %' compares all runs"):
        tracker.evaluate(other_trial, **settings)
    assert len(calls) == 2
