"""Cells that differ in their runs alone are measured and checked once."""

from __future__ import annotations

import pandas as pd
import pytest

from tests.helpers.runs import Heard, arc, outcomes, run, shards

pytestmark = pytest.mark.usefixtures("one_thread")


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
