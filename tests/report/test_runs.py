"""Sublayers, spans of layers and layers beneath, from the record to the page."""

from __future__ import annotations

from html import unescape

from tracker.report import frames
from tracker.report.page import html
from tracker.report.wording import random_sets_answer, sample_noun
from tracker.schema.changes import Change
from tracker.schema.records import CorrelationRecord, RunRecord

from .cells import part_run
from .conftest import LAYERS, build_cell


def test_what_layers_cost_together_is_held_against_sets_drawn_at_random():
    cell = build_cell()

    def joint_run(layers: tuple[int, ...], drop: float, drawn: bool) -> RunRecord:
        fields = {"layer": layers[0], "span": len(layers), "members": layers, "drawn": drawn}
        return part_run(cell.runs[0], accuracy_drop=drop, **fields)

    random_runs = [joint_run((0, n + 2), 0.2 + n / 1000, True) for n in range(40)]
    cell_with_set = cell.model_copy(update={"runs": (joint_run((0, 5), 0.1, False), *random_runs)})
    assert random_sets_answer(cell_with_set) == (
        "2 layers removed together: accuracy drop 10.0 pp (the set), 22.0 of 40 sets drawn at "
        "random (20.0 to 23.9). The set is shown to differ from the random sets (p = 0.049)."
    )
    ordinary_cell = cell.model_copy(
        update={"runs": (joint_run((0, 5), 0.201, False), *random_runs)}
    )
    # Two of forty cost as little.
    assert random_sets_answer(ordinary_cell).endswith(
        "is not shown to differ from the random sets (p = 0.146)."
    )
    cell_with_two_sets = cell.model_copy(
        update={"runs": (*cell_with_set.runs, joint_run((0, 7), 0.2, False))}
    )
    assert random_sets_answer(cell_with_two_sets).startswith(
        "2 layers removed together: accuracy drop 15.0 pp (2 sets, on average), 22.0"
    )
    assert "differ" not in random_sets_answer(cell_with_two_sets)
    assert random_sets_answer(cell) == ""
    page = unescape(html.render_page([cell_with_set], {}))
    assert random_sets_answer(cell_with_set) in page
    assert "layers 0, 5" in page
    frame = frames.layer_frame([cell_with_set])
    assert frame["members"][0] == "0, 5"
    assert frame["drawn"].notna().sum() == 40


def test_hundreds_of_runs_are_a_map_on_a_page_that_opens():
    cell = build_cell()
    runs = tuple(
        part_run(
            cell.runs[(first_layer + span) % LAYERS],
            layer=first_layer,
            span=span,
            intervention="repeat",
        )
        for first_layer in range(32)
        for span in range(1, 33 - first_layer)
    )
    assert len(runs) == 528
    model = cell.model.model_copy(update={"layers": 32})
    cell = cell.model_copy(update={"runs": runs, "correlations": (), "model": model})
    page = html.render_page([cell], {})
    assert 'id="model-1-cell-1-map-repeat-title"' in page
    assert 'id="model-1-cell-1-curve-title"' not in page
    assert "number of layers computed again" in page
    assert len(page) < 2_500_000


def test_formats_keep_their_names_in_the_nouns_of_correlated_parts():
    changes = ("q4_0:3", "int4:5.mlp.down_proj", "shared_expert:3", "attention:3")
    samples = [Change.parse(change).sample for change in changes]
    records = [CorrelationRecord.model_construct(sample=sample) for sample in samples]
    assert [sample_noun(record) for record in records] == [
        *("q4_0 layer", "int4 linear map", "shared expert", "attention sublayer")
    ]
