"""What half precision decides by rounding, where people read it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tracker.core.records import CellRecord
from tracker.report.frames import layer_frame
from tracker.tracking.figures import cell_figures, flat_metrics, logged_layers
from tracker.tracking.runs import intact_note, layer_note

from .conftest import build_cell

WHY = "none of these documents was computed twice"


def halved(**changes: Any) -> CellRecord:
    """A cell in bfloat16, whose layer 3 costs 4 pp for sure, of which rounding moves 5."""
    cell = build_cell(baseline_rounded=7, baseline_rounding=0.0123)
    runs = [run.model_copy(update={"rounded": 5, "drop_rounding": 0.01}) for run in cell.runs]
    drop = replace(runs[3].drop, value=0.04, low=0.01, high=0.07)
    moved = {"rounded": 12, "drop_rounding": 0.05, "drop": drop}
    runs[3] = runs[3].model_copy(update=moved)
    model = cell.model.model_copy(update={"dtype": "bfloat16"})
    return cell.model_copy(update={"model": model, "runs": tuple(runs), **changes})


def test_each_run_has_its_count_in_frames_and_trackers() -> None:
    cell = halved()
    frame = layer_frame([cell])
    assert frame["rounded"].tolist()[2:5] == [5, 12, 5]
    assert flat_metrics(cell.runs[3])["rounded"] == 12
    assert flat_metrics(cell.runs[3])["drop_rounding"] == 0.05
    assert cell_figures(cell)["baseline_rounded"] == 7
    said = "bfloat16 decides up to 12 of these 160 documents by rounding"
    assert f"{said}: another batch size moves the fall by ± 5.0" in layer_note(cell, cell.runs[3])
    assert "up to 7 of these 160 documents" in intact_note(cell)
    assert "rounding" not in layer_note(build_cell(), build_cell().runs[3])
    logged = logged_layers(cell)
    assert logged.rows[3][logged.columns.index("rounded")] == 12
