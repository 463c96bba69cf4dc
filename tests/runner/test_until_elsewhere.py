"""Questions that are answered by trials of a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

import tracker
from tests.helpers.runs import arc, run
from tracker import api
from tracker.core.errors import ExperimentError, ResultsError
from tracker.core.experiment_input import load_experiment
from tracker.ledger.store import Ledger
from tracker.team.sweeps import _measured, trial_request

QUESTION = "drop within 9 pp at 80 %"
DOCUMENTS = 400

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def asked(tiny_llama, experiment, tmp_path):
    """A question that some of the documents answer."""
    settings = {"data": str(arc(tmp_path / "data", DOCUMENTS)), "limit": None, "until": QUESTION}
    return experiment(tiny_llama(seed=3), **settings)


def trial(file: Path, layer: int):
    """What a sweep asks of one of its trials."""
    (cell,) = load_experiment(file).file.cells()
    known = {name: getattr(cell, name) for name in ("model", "benchmark", "data", "until")}
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
    record, done = tracker.evaluate(first, **settings)
    assert not done.failed
    assert (record.answer, record.runs) == (alone.answer, alone.runs)
    # The others find it in the ledger, and ask nobody.
    _, second = trial(asked, 3)
    record, done = tracker.evaluate(second, **settings)
    assert (record.answer, done.models_loaded, len(calls)) == (alone.answer, 0, 1)
    # So does whoever fills the runs of killed trials.
    found, filled = _measured(second, Ledger(tmp_path / "results"))
    assert found.answer == alone.answer
    assert filled == alone.runs[3]
    # Another question is asked of the sweep again.
    other = second.model_copy(update={"until": "sign at 80 %"})
    monkeypatch.setattr(api, "asked_of_cell", lambda *_: calls.append(1))
    with pytest.raises(ExperimentError, match="'sign at 80 %' asks about all runs"):
        tracker.evaluate(other, **settings)
    assert len(calls) == 2


def test_a_trial_that_asks_of_a_whole_cell_finds_it(tiny_llama, experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(api, "asked_of_cell", lambda *_: pytest.fail("the sweep was asked"))
    model, results = tiny_llama(layers=3), tmp_path / "results"
    settings = {"data": str(arc(tmp_path / "data", 40)), "limit": None, "layer": [1, 2]}
    file = experiment(model, **settings)
    (whole,) = run(file, results).cells
    assert whole.is_complete
    (cell,) = load_experiment(file).file.cells()
    known = {name: getattr(cell, name) for name in ("model", "benchmark", "data")}
    # It is about all runs of the cell: of this one alone it has no answer.
    asked = trial_request({**known, "layer": 2, "until": "drop within 99 pp at 50 %"})
    record, done = tracker.evaluate(asked, results=results, track=[])
    assert (done.models_loaded, record.n) == (0, 40)
    assert record.runs == whole.runs
    found, filled = _measured(asked, Ledger(results))
    assert (found.is_complete, found.answer, filled) == (True, None, whole.runs[1])
    # The same where another question was asked before, and where the cell lacks the run.
    run(experiment(model, "other.yaml", **settings, until="top 1"), results)
    record, done = tracker.evaluate(asked, results=results, track=[])
    assert (done.models_loaded, record.runs) == (0, whole.runs)
    assert _measured(asked, Ledger(results))[1] == whole.runs[1]
    with pytest.raises(ResultsError, match="does not hold all of it"):
        _measured(asked.model_copy(update={"layers": (0,)}), Ledger(results))
    # And another layer on fewer documents, which goes by a name of its own.
    monkeypatch.setattr(api, "asked_of_cell", lambda *_: None)
    fewer = trial_request({**known, "layer": 0, "limit": 20})
    record, _ = tracker.evaluate(fewer, results=results, track=[])
    assert _measured(fewer, Ledger(results))[0].place == record.place
