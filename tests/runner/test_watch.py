"""Documents drawn at random are answered both ways while a cell is measured."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from tests.conftest import copy_task_cache
from tests.helpers.runs import (
    RecordingProgress,
    list_shards,
    read_outcomes,
    run_experiment,
    write_arc,
)
from tracker.engine.scoring.score import launch_row
from tracker.engine.selfcheck.check import check_sharing, compare_watched_documents
from tracker.ledger.store import Ledger
from tracker.measuring.meter import Meter

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_unsteady_model_is_not_said_to_share_less(tiny_llama, measure, monkeypatch, dtype):
    """Was: every line of the check was said of less sharing, and what helps was not said."""
    notes = ["the model is discontinuous: 3 of 9 answers", "measured with less sharing: of depth"]

    def check_unsteadily(*args):
        return replace(check_sharing(*args), sharing_note="of depth", unsteady_note=notes[0])

    monkeypatch.setattr("tracker.measuring.scorer.check_sharing", check_unsteadily)
    heard = RecordingProgress()
    measure(tiny_llama(), heard=heard, limit=2, layer=[1, 2], dtype=dtype)
    if dtype == "bfloat16":
        notes[0] += (
            ". The report counts documents that rounding affects; --dtype float32 avoids this"
        )
    assert {f"tiny-llama: {line}" for line in notes} <= set(heard.lines)


def test_what_is_asked_later_is_compared_too(tiny_llama, measure, tmp_path, monkeypatch):
    """Was: the intact model could be drawn again, whose answers are not written twice."""
    model, candidates = tiny_llama(), []

    def watch_names(truth, scores, ablations, seed, first):
        candidates.append([ablation.name for ablation in ablations[first:]])
        return compare_watched_documents(truth, scores, ablations, seed, first)

    monkeypatch.setattr("tracker.measuring.scorer.compare_watched_documents", watch_names)
    for layers in ([1, 2], [0, 3]):
        measure(model, limit=2, layer=layers)
    assert candidates == [["baseline", "layer:1", "layer:2"], ["layer:0", "layer:3"]]
    rows = read_outcomes(tmp_path / "results")
    assert {"layer:0", "layer:3"} & set(rows["ablation"][rows["compared"].notna()])


def test_a_number_that_is_wrong_stops_the_cell_before_it_is_published(
    tiny_llama, experiment, tmp_path, monkeypatch
):
    """Sharing that was exact for the check is not for the document that is drawn."""
    calls = []
    original = Meter.measure

    def measure(self, *args):
        calls.append(True)
        return original(self, *args)

    def shift_scores(*args):
        scores = launch_row(*args)()
        loglikelihoods = scores.loglikelihoods + 0.05 * bool(calls)
        return lambda: replace(scores, loglikelihoods=loglikelihoods)

    monkeypatch.setattr(Meter, "measure", measure)
    monkeypatch.setattr("tracker.engine.scoring.sweep.launch_row", shift_scores)
    publications = []
    monkeypatch.setattr(
        "tracker.team.publish.Publisher.begin", lambda *args: publications.append(args)
    )
    results = tmp_path / "results"
    file = experiment(tiny_llama(), limit=20, data=str(write_arc(tmp_path / "data")))
    run_results = run_experiment(file, results, track=["mlflow"])
    (reason,) = run_results.outcome.failed.values()
    assert (
        "stopped, because computing ablations together gives a wrong result here: document"
        in reason
    )
    assert "the changed model gives" in reason
    assert calls
    assert not publications
    (store,) = Ledger(results).cells()
    assert not store.shards(), "the block is not kept"


def test_an_architecture_and_a_model_are_checked_once_on_a_machine(
    tiny_llama, measure, tmp_path, monkeypatch, spy
):
    from tracker.engine.selfcheck import check

    copy_task_cache(tmp_path / "cache")
    monkeypatch.setenv("TRACKER_CACHE", str(tmp_path / "cache"))
    checks, confirmations = (
        spy(check, n, lambda *_: 1) for n in ("check_miniature", "compare_rounds")
    )
    model, results = tiny_llama(layers=2), tmp_path / "results"
    # Their texts are of one order of length.
    for options in ({"limit": 20}, {"limit": 22}, {"limit": 20, "benchmark": "arc_challenge"}):
        measure(model, layer=[0], **options)
    assert (checks, confirmations) == ([1], [1])
    paths = list((results / "checks").iterdir())
    assert len(paths) == 3, "of short texts, of texts as long as these, and of the model itself"
    measure(model, "next", limit=20, layer=[0])
    assert (checks, confirmations) == ([1], [1])
    for path in paths:
        assert (tmp_path / "next" / "checks" / path.name).read_bytes() == path.read_bytes()
        for folder in (results / "checks", tmp_path / "cache" / "checks"):
            (folder / path.name).write_bytes(b"\xff\x00")
    measure(model, limit=24, layer=[0])
    assert (checks, confirmations) == ([1, 1], [1, 1])
    measure(model, "bits", limit=20, layer=[0], dtype="bfloat16")
    measure(tiny_llama("other", seed=1, layers=2), "other", limit=20, layer=[0])
    assert len(confirmations) == 4, "of other bits, and of other weights"


def test_what_is_removed_besides_is_measured_together(tiny_llama, experiment, tmp_path):
    model, data = tiny_llama(seed=3), str(write_arc(tmp_path / "data", 40))
    views: list[list[int]] = [[], [0, 3]]
    joint_folder, single_folder = tmp_path / "together", tmp_path / "apart"
    heard = RecordingProgress()
    run_results = run_experiment(experiment(model, data=data, removed=views), joint_folder, heard)
    assert [list(cell.removed) for cell in run_results.cells] == views
    assert [len(cell.runs) for cell in run_results.cells] == [4, 2]
    assert sum("checking results against pruned" in line for line in heard.lines) == 1
    assert heard.n_counted == heard.n_expected

    for view in views:
        run_experiment(experiment(model, data=data, removed=[view]), single_folder)
    # Which answers were compared with a really pruned model's is drawn.
    columns = ["compared", "difference", "unsteady"]
    folders = (joint_folder, single_folder)
    frames = [read_outcomes(folder).drop(columns=columns) for folder in folders]
    pd.testing.assert_frame_equal(*frames, check_exact=True, check_like=True)
    assert len(list_shards(single_folder)) == len(views) * len(list_shards(joint_folder))


def test_progress_never_counts_more_than_is_expected(tiny_llama, experiment, tmp_path, monkeypatch):
    """Was: 132 of 128 responses, because the baseline is computed along with what is missing."""
    model, data = tiny_llama(seed=3), str(write_arc(tmp_path / "data", 40))
    file = experiment(model, data=data, limit=None, sample=8, layer=[0])
    run_experiment(file, tmp_path / "results")
    # Few ablations fit into memory together, and the baseline comes with each group.
    monkeypatch.setattr(
        "tracker.engine.scoring.sweep.Engine.count_streams", lambda engine, tokens: 2
    )
    for extra in ({"layer": [0, 1, 2, 3]}, {"sample": 16}, {"until": "sign", "sample": None}):
        heard = RecordingProgress()
        settings = {"data": data, "sample": 8, "limit": None, "layer": [1, 2, 3], **extra}
        run_experiment(experiment(model, **settings), tmp_path / "results", heard)
        assert heard.n_counted == heard.n_expected > 0
        assert heard.n_beyond == 0
