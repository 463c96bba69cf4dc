"""Cells that are measured until a question is answered."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import tracker
from tests.benchmarks.conftest import PACKAGE
from tests.helpers.lm_eval import write_rows
from tests.helpers.runs import Heard, arc, run, typed
from tracker import api
from tracker.analysis.stopping import CellRace, interim_estimates
from tracker.benchmarks.sources import find_data
from tracker.core.config import cell_request
from tracker.core.errors import ExperimentError, RequestError
from tracker.core.experiment_input import load_experiment
from tracker.core.extent import random_order
from tracker.core.questions import question
from tracker.ledger.store import Ledger
from tracker.measuring import derive
from tracker.stats.stopping import Race
from tracker.team.live import progress_figures
from tracker.team.sweeps import _measured, trial_request

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_stops_when_it_is_answered_and_goes_on_when_more_is_asked(
    tiny_llama, experiment, tmp_path, monkeypatch
):
    model, results = tiny_llama(seed=6), tmp_path / "results"
    some = find_data(PACKAGE).load("allenai/openbookqa", "main")["validation"].select(range(160))
    write_rows(tmp_path / "data/allenai/openbookqa/main", test=some)
    all_of = {"benchmark": "openbookqa", "data": str(tmp_path / "data"), "limit": None}
    heard = Heard()
    until = experiment(model, **all_of, until="drop within 10 pp at 80 %")
    (cell,) = run(until, results, heard).cells
    total = cell.benchmark.tasks[0].documents
    assert 0 < cell.n < total
    assert (cell.is_stopped, cell.is_complete) == (True, False)
    most = max(each.n for each in cell.runs)
    assert cell.lacks == (
        f"stopped at the answer to 'drop within 10 pp at 80 %': {cell.n} to {most} of {total} "
        "documents were looked at, run by run",
    )
    assert heard.counted == heard.expected
    assert "the drops of layers 0, 1 and 2 are not known within 10 pp; 64 documents" in heard.lines

    # What was measured: a beginning of the random order, of some runs more than of others.
    (store,) = Ledger(results).cells()
    frame = store.read(columns=["doc", "ablation", "metric/acc_norm"])
    numbers = {name: set(rows["doc"]) for name, rows in frame.groupby("ablation")}
    order = random_order(1234, "openbookqa", range(total))
    for found in numbers.values():
        assert found == set(order[: len(found)])
    sizes = {name: len(found) for name, found in numbers.items()}
    assert cell.n == min(sizes.values())
    assert [each.n for each in cell.runs] == [sizes[f"layer:{number}"] for number in range(4)]

    # What is said while it is measured holds no interval of a single look.
    request = cell_request(model="m", benchmark="openbookqa", layers=(0, 1, 2, 3), until="sign")
    far = interim_estimates(store, store.views.of(request))
    assert (far.documents, far.wanted) == (sizes["baseline"], None)
    assert [drop.value for drop in far.drops.values()] == pytest.approx(
        [each.drop.value for each in cell.runs]
    )
    assert {drop.low for drop in far.drops.values()} == {None}
    assert "seconds_left" not in str(progress_figures(far, far, 1.0, cell))
    _, listed = typed("ls", "--results", results)
    assert f" stopped at the answer to 'drop within 10 pp at 80 %': {cell.n} to" in listed

    # The same as a race over the outcomes of a whole run.
    (whole,) = run(experiment(model, "whole.yaml", **all_of), results).cells
    assert (whole.n, whole.answer, whole.is_complete) == (total, None, True)
    frame = store.read(columns=["doc", "ablation", "metric/acc_norm"])
    right = frame.pivot(index="doc", columns="ablation", values="metric/acc_norm").loc[order]
    names = [f"layer:{number}" for number in range(4)]
    drops = right[["baseline"]].to_numpy() - right[names].to_numpy()
    race = Race(question("drop within 10 pp at 80 %"), total, 4)
    while not race.standing.answered:
        at = int(race.bounds.seen.max())
        race.look(drops[at : at + 32])
    assert [sizes[name] for name in names] == race.bounds.seen.tolist()
    assert sizes["baseline"] == race.bounds.seen.max()
    assert cell.answer is not None
    assert [each.low for each in cell.answer.runs] == race.bounds.low.tolist()
    assert [each.drop.low for each in cell.runs] == race.bounds.low.tolist()
    assert [each.drop.high for each in cell.runs] == race.bounds.high.tolist()
    # A stream without layer l leaves the intact one at l, and passes the 3 - l layers above.
    looked = 4 * race.bounds.seen.max() + race.bounds.seen @ [3, 2, 1, 0]
    share = looked / (10 * total)
    said = (
        f"{cell.model.source} × openbookqa: drop within 10 pp at 80 %: each drop is known within "
        f"10 pp (80 % confidence; {race.bounds.seen.max()} of {total} documents, "
        f"{100 * share:.0f} % of the layer passes)"
    )
    assert heard.lines[-1] == said
    exact = [each.drop.value for each in whole.runs]
    assert (race.bounds.low <= exact).all()
    assert (race.bounds.high >= exact).all()

    # Figures of a run are those of its own documents.
    for each in cell.runs:
        assert each.drop.value == pytest.approx(drops[: each.n, each.change.layer].mean())

    # The question stays with the cell, and was replayed once for what the ledger holds now.
    replayed = []
    monkeypatch.setattr(derive, "CellRace", lambda *a: replayed.append(1) or CellRace(*a))

    # Asked again, nothing is loaded; and the cell is none that was stopped any more.
    again = Heard()
    done = run(until, results, again)
    assert done.outcome.models_loaded == 0
    assert again.lines == [said]
    assert done.cells[0].answer == cell.answer
    assert done.cells[0].is_complete
    assert done.cells[0].runs == whole.runs
    run(until, results)
    assert not replayed


def planned(file: Path, results: Path) -> str:
    code, said = typed("plan", file, "--results", results, "--gflops", 100)
    assert code == 0, said
    return said


def test_a_tie_is_left_open_by_all_documents(tiny_llama, experiment, tmp_path):
    folder = tiny_llama()
    weights = load_file(folder / "model.safetensors")
    for name, values in weights.items():
        if re.search(r"layers\.[12]\..*(o_proj|down_proj)", name):
            values.zero_()  # these layers do nothing
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    heard, results = Heard(), tmp_path / "results"
    pair = {"limit": None, "benchmark": "copa", "layer": [1, 2]}
    tie = experiment(folder, **pair, until="top 1")
    assert "once 32 are measured: --set until=null --sample 64" in planned(tie, results)
    run(experiment(folder, "pilot.yaml", **pair, sample=40), results)
    assert (
        "until top 1: about 100 of 100 documents and 100 % of the layer passes; in nine of ten "
        "cases at most 100 and 100 %. This is simulated from 40 measured documents; few give too "
        "low a figure. In 100 % of the simulations all documents leave it open"
    ) in planned(tie, results)
    done = run(tie, results, heard)
    assert [each.drop.value for each in done.cells[0].runs] == [0, 0]
    assert heard.lines[-1] == (
        f"{folder} × copa: top 1: the largest drop is not separated by all 100 documents: "
        "layers 1 and 2 tie "
        "(95 % confidence; 100 of 100 documents, 100 % of the layer passes)"
    )
    assert "copa: top 1: the largest drop is not separated by all" in planned(tie, results)
    # Other questions, which all that is measured answers.
    for text, said in (
        ("sign", "the drops above 0 are those of none, below 0 none (95 %"),
        ("prune 1 within 99 pp", "the smallest drop is that of layer 1 (95 %"),
        ("top 1 within 99 pp at 90 %", "the largest drop is that of layer 1 (90 %"),
    ):
        done = run(experiment(folder, **pair, until=text), results, heard)
        assert done.outcome.models_loaded == 0
        assert f"copa: {text}: {said}" in heard.lines[-1]


def test_a_benchmark_of_one_document_is_answered_by_it_or_ties(tiny_llama, experiment, tmp_path):
    data, results, folder = arc(tmp_path / "data", 1), tmp_path / "results", tiny_llama()
    for text in ("drop within 2 pp", "top 1"):
        heard = Heard()
        file = experiment(folder, data=str(data), limit=None, until=text, layer=[0, 1])
        (cell,) = run(file, results, heard).cells
        drops = [each.drop.value for each in cell.runs]
        assert cell.n == 1
        tie = text == "top 1" and len(set(drops)) == 1
        assert ("not separated by the only document" in heard.lines[-1]) == tie, heard.lines[-1]
        assert "1 of 1 documents, 100 % of the layer passes" in heard.lines[-1]


def test_a_study_does_not_stop_at_another_question(tiny_llama, experiment, tmp_path):
    file = experiment(tiny_llama(), limit=None, benchmark="copa", until="top 1")
    with pytest.raises(RequestError, match="'until' stops at the answer to another question"):
        tracker.study("audit", file, results=tmp_path / "results", track=[])


QUESTION = "drop within 9 pp at 80 %"
DOCUMENTS = 400


@pytest.fixture
def asked(tiny_llama, experiment, tmp_path):
    """Build a question that some of the documents answer."""
    settings = {"data": str(arc(tmp_path / "data", DOCUMENTS)), "limit": None, "until": QUESTION}
    return experiment(tiny_llama(seed=3), **settings)


def trial(file: Path, layer: int):
    """Return the cell of a file, and the request of one of its sweep's trials."""
    (cell,) = load_experiment(file).file.cells()
    settings = cell.settings
    known = {name: getattr(settings, name) for name in ("model", "benchmark", "data", "until")}
    return cell, trial_request({**known, "layer": layer})


def test_a_trial_measures_its_sweeps_cell_until_it_is_answered(asked, tmp_path, monkeypatch):
    cell, first = trial(asked, 1)
    (alone,) = run(asked, tmp_path / "alone").cells
    settings = {"results": tmp_path / "results", "track": []}
    # Nobody knows which other runs the question is about.
    with pytest.raises(ExperimentError, match="which others there are says its sweep") as caught:
        tracker.evaluate(first, **settings)
    assert "'drop within 9 pp at 80 %' asks about all runs" in str(caught.value)

    calls = []
    monkeypatch.setattr(api, "asked_of_cell", lambda *_: calls.append(1) or cell)
    done = tracker.evaluate(first, **settings)
    (record,) = done.cells
    assert not done.outcome.failed
    assert (record.answer, record.runs) == (alone.answer, alone.runs)
    # The others find it in the ledger, and ask nobody.
    _, second = trial(asked, 3)
    done = tracker.evaluate(second, **settings)
    (record,) = done.cells
    assert (record.answer, done.outcome.models_loaded, len(calls)) == (alone.answer, 0, 1)
    # So does whoever fills the runs of killed trials.
    found, filled = _measured(second, Ledger(tmp_path / "results"))
    assert found.answer == alone.answer
    assert filled == alone.runs[3]
    # Another question is asked of the sweep again.
    other = replace(second, until=question("sign at 80 %"))
    monkeypatch.setattr(api, "asked_of_cell", lambda *_: calls.append(1))
    with pytest.raises(ExperimentError, match="'sign at 80 %' asks about all runs"):
        tracker.evaluate(other, **settings)
    assert len(calls) == 2
