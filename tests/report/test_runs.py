"""Sublayers, spans of layers and layers beneath, from the record to the page."""

from __future__ import annotations

from html import unescape

from tracker.core.records import RunRecord
from tracker.report import frames
from tracker.report.page import html
from tracker.report.wording import controls_answer

from .cells import numbered
from .conftest import LAYERS, build_cell


def test_what_layers_cost_together_is_held_against_sets_drawn_at_random():
    cell = build_cell()

    def together(layers: tuple[int, ...], drop: float, drawn: bool) -> RunRecord:
        which = {"layer": layers[0], "span": len(layers), "members": layers, "drawn": drawn}
        return numbered(cell.runs[0], accuracy_drop=drop, **which)

    drawn = [together((0, n + 2), 0.2 + n / 1000, True) for n in range(40)]
    one = cell.model_copy(update={"runs": (together((0, 5), 0.1, False), *drawn)})
    assert controls_answer(one) == (
        "2 layers removed together: accuracy drop 10.0 pp (the set), 22.0 of 40 sets drawn at "
        "random (20.0 to 23.9). It is shown to differ from these (p = 0.049)."
    )
    inside = cell.model_copy(update={"runs": (together((0, 5), 0.201, False), *drawn)})
    # Two of forty cost as little.
    assert controls_answer(inside).endswith("is not shown to differ from these (p = 0.146).")
    several = cell.model_copy(update={"runs": (*one.runs, together((0, 7), 0.2, False))})
    assert controls_answer(several).startswith(
        "2 layers removed together: accuracy drop 15.0 pp (2 sets, on average), 22.0"
    )
    assert "differ" not in controls_answer(several)
    assert controls_answer(cell) == ""
    page = unescape(html.render_page([one], {}))
    assert controls_answer(one) in page
    assert "layers 0, 5" in page
    frame = frames.layer_frame([one])
    assert frame["members"][0] == "0, 5"
    assert frame["drawn"].notna().sum() == 40


def test_hundreds_of_runs_are_a_map_on_a_page_that_opens():
    cell = build_cell()
    runs = tuple(
        numbered(cell.runs[(first + span) % LAYERS], layer=first, span=span, intervention="repeat")
        for first in range(32)
        for span in range(1, 33 - first)
    )
    assert len(runs) == 528
    model = cell.model.model_copy(update={"layers": 32})
    cell = cell.model_copy(update={"runs": runs, "correlations": (), "model": model})
    page = html.render_page([cell], {})
    assert 'id="model-1-cell-1-map-repeat-title"' in page
    assert 'id="model-1-cell-1-curve-title"' not in page
    assert "number of layers that are passed again" in page
    assert len(page) < 2_500_000
