"""Documents drawn at random are answered both ways while a cell is measured."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from tests.conftest import lend_tasks
from tests.helpers.runs import Heard, arc, outcomes, run, shards
from tracker.engine.scoring.score import launch_row
from tracker.engine.selfcheck.check import check, watch
from tracker.ledger.store import Ledger
from tracker.measuring.meter import Meter

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_record_and_the_page_say_what_was_compared(tiny_llama, measure, tmp_path):
    (record,) = measure(tiny_llama()).cells
    assert record.compared == 6, "of 40 documents one is drawn, and the longest: three answers each"
    assert 0 <= record.compared_difference < 1e-3
    assert record.compared_unsteady == 0
    page = (tmp_path / "results/report.html").read_text()
    assert "6 answers were checked against a model with the layer actually deleted" in page
    assert f"{record.compared_difference:.1e} nats" in page


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_unsteady_model_is_not_said_to_share_less(tiny_llama, measure, monkeypatch, dtype):
    """Was: every line of the check was said of less sharing, and what helps was not said."""
    said = ["the model is discontinuous: 3 of 9 answers", "measured with less sharing: of depth"]

    def found(*args):
        return replace(check(*args), lost="of depth", unsteady=said[0])

    monkeypatch.setattr("tracker.measuring.scorer.check", found)
    heard = Heard()
    measure(tiny_llama(), heard=heard, limit=2, layer=[1, 2], dtype=dtype)
    if dtype == "bfloat16":
        said[0] += ". The report counts them; --dtype float32 avoids it"
    assert {f"tiny-llama: {line}" for line in said} <= set(heard.lines)


def test_what_is_asked_later_is_compared_too(tiny_llama, measure, tmp_path, monkeypatch):
    """Was: the intact model could be drawn again, whose answers are not written twice."""
    model, drawn_from = tiny_llama(), []

    def watched(truth, scores, ablations, seed, first):
        drawn_from.append([ablation.name for ablation in ablations[first:]])
        return watch(truth, scores, ablations, seed, first)

    monkeypatch.setattr("tracker.measuring.scorer.watch", watched)
    for layers in ([1, 2], [0, 3]):
        measure(model, limit=2, layer=layers)
    assert drawn_from == [["baseline", "layer:1", "layer:2"], ["layer:0", "layer:3"]]
    rows = outcomes(tmp_path / "results")
    assert {"layer:0", "layer:3"} & set(rows["ablation"][rows["compared"].notna()])


def test_a_number_that_is_wrong_stops_the_cell_before_it_is_published(
    tiny_llama, experiment, tmp_path, monkeypatch
):
    """Sharing that was exact for the check is not for the document that is drawn."""
    measuring = []
    honest = Meter.measure

    def measure(self, *args):
        measuring.append(True)
        return honest(self, *args)

    def shifted(*args):
        scores = launch_row(*args)()
        wrong = scores.loglikelihoods + 0.05 * bool(measuring)
        return lambda: replace(scores, loglikelihoods=wrong)

    monkeypatch.setattr(Meter, "measure", measure)
    monkeypatch.setattr("tracker.engine.scoring.sweep.launch_row", shifted)
    published = []
    monkeypatch.setattr(
        "tracker.team.publish.Publisher.begin", lambda *args: published.append(args)
    )
    results = tmp_path / "results"
    file = experiment(tiny_llama(), limit=20, data=str(arc(tmp_path / "data")))
    done = run(file, results, track=["mlflow"])
    (why,) = done.outcome.failed.values()
    assert "stopped, because sharing is not exact here: document" in why
    assert "on the really pruned model" in why
    assert measuring
    assert not published
    (store,) = Ledger(results).cells()
    assert not store.shards(), "the block is not kept"


def test_an_architecture_and_a_model_are_checked_once_on_a_machine(
    tiny_llama, measure, tmp_path, monkeypatch, spy
):
    from tracker.engine.selfcheck import check

    lend_tasks(tmp_path / "cache")
    monkeypatch.setenv("TRACKER_CACHE", str(tmp_path / "cache"))
    checks, confirmations = (spy(check, n, lambda *_: 1) for n in ("check_miniature", "confirm"))
    model, results = tiny_llama(layers=2), tmp_path / "results"
    # Their texts are of one order of length.
    for asked in ({"limit": 20}, {"limit": 22}, {"limit": 20, "benchmark": "arc_challenge"}):
        measure(model, layer=[0], **asked)
    assert (checks, confirmations) == ([1], [1])
    kept = list((results / "checks").iterdir())
    assert len(kept) == 3, "of short texts, of texts as long as these, and of the model itself"
    measure(model, "next", limit=20, layer=[0])
    assert (checks, confirmations) == ([1], [1])
    for each in kept:
        assert (tmp_path / "next" / "checks" / each.name).read_bytes() == each.read_bytes()
        for folder in (results / "checks", tmp_path / "cache" / "checks"):
            (folder / each.name).write_bytes(b"\xff\x00")
    measure(model, limit=24, layer=[0])
    assert (checks, confirmations) == ([1, 1], [1, 1])
    measure(model, "bits", limit=20, layer=[0], dtype="bfloat16")
    measure(tiny_llama("other", seed=1, layers=2), "other", limit=20, layer=[0])
    assert len(confirmations) == 4, "of other bits, and of other weights"


def test_what_is_removed_besides_is_measured_together(tiny_llama, experiment, tmp_path):
    model, data = tiny_llama(seed=3), str(arc(tmp_path / "data", 40))
    views: list[list[int]] = [[], [0, 3]]
    together, apart = tmp_path / "together", tmp_path / "apart"
    heard = Heard()
    done = run(experiment(model, data=data, removed=views), together, heard)
    assert [list(cell.removed) for cell in done.cells] == views
    assert [len(cell.runs) for cell in done.cells] == [4, 2]
    assert sum("checking that sharing" in line for line in heard.lines) == 1
    assert heard.counted == heard.expected

    for view in views:
        run(experiment(model, data=data, removed=[view]), apart)
    # Which answers were compared with a really pruned model's is drawn.
    drawn = ["compared", "difference", "unsteady"]
    ours, theirs = (outcomes(folder).drop(columns=drawn) for folder in (together, apart))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True, check_like=True)
    assert len(shards(apart)) == len(views) * len(shards(together))


def test_progress_never_counts_more_than_is_expected(tiny_llama, experiment, tmp_path, monkeypatch):
    """Was: 132 of 128 responses, because the baseline is computed along with what is missing."""
    model, data = tiny_llama(seed=3), str(arc(tmp_path / "data", 40))
    run(experiment(model, data=data, limit=None, sample=8, layer=[0]), tmp_path / "results")
    # Few ablations fit into memory together, and the baseline comes with each group.
    monkeypatch.setattr("tracker.engine.scoring.sweep.Engine.streams", lambda engine, tokens: 2)
    for more in ({"layer": [0, 1, 2, 3]}, {"sample": 16}, {"until": "sign", "sample": None}):
        heard = Heard()
        settings = {"data": data, "sample": 8, "limit": None, "layer": [1, 2, 3], **more}
        run(experiment(model, **settings), tmp_path / "results", heard)
        assert heard.counted == heard.expected > 0
        assert heard.beyond == 0
