"""Compare the texts of cells of every kind with reviewed texts: `golden/CASE.txt`.

`python -m tests.report.test_golden` writes these anew; what has changed in them is to be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ablations import with_change, with_figures
from tests.helpers.findings import LINE_CHART, MAP_CHART
from tracker.analysis.agreement import pair_models
from tracker.analysis.boards import layer_board
from tracker.analysis.comparable import benchmark_labels, group_models, row_labels
from tracker.analysis.decisions import decisions_record
from tracker.report import tables, wording
from tracker.report.charts import cells as charts
from tracker.report.charts import headline, maps, model
from tracker.report.charts.cells import lost_document_map, margin_chart
from tracker.report.charts.style import Chart
from tracker.report.export import build_boards
from tracker.report.page.studies import draw_study_chart
from tracker.report.wording import compared_sentence, layers_answer
from tracker.schema.changes import Change
from tracker.schema.estimates import Estimate
from tracker.schema.records import CellRecord
from tracker.schema.tables import Table

from .cells import (
    MIDDLE_EDITION,
    NEW_EDITION,
    NO_ROUNDING_REASON,
    OLD_EDITION,
    cell_of_choices,
    cell_of_kinds,
    cell_without,
    edited_cell,
    half_precision_cell,
    loss_cell,
    models_sharing_some,
)
from .conftest import (
    build_cell,
    build_decisions,
    read_table,
    replace_layer,
    study_cells,
)

GOLDEN = Path(__file__).with_name("golden")
PLAIN_CELL = build_cell(compared=8, compared_difference=0.4, compared_unsteady=2)
HALF_MODEL = PLAIN_CELL.model.model_copy(update={"dtype": "bfloat16"})


def cell_with_changed_runs(**changes: Any) -> CellRecord:
    """Make a cell that is changed alike in every run."""
    return build_cell(runs=tuple(with_change(run, **changes) for run in build_cell().runs))


def cell_with_missing_runs() -> CellRecord:
    """Make a cell that misses two of its runs."""
    cell = cell_of_kinds(("layer", "attention"), (1,))
    missing = (Change.parse("attention:0"), Change.parse("attention:10"))
    runs = tuple(run for run in cell.runs if run.change not in missing)
    return cell.model_copy(update={"runs": runs, "missing": missing})


def cell_with_one_run() -> CellRecord:
    """Make a cell of one run on three documents, with a correlation of one layer."""
    cell = build_cell("rte", n=3)
    correlation = with_figures(cell.correlations[0], low=None, p_value=None, n=1)
    return cell.model_copy(update={"runs": cell.runs[:1], "correlations": (correlation,)})


UNKNOWN_ROUNDING = {"baseline_rounded": None, "reasons": {"baseline_rounded": NO_ROUNDING_REASON}}
STORED_WEIGHTS = {"provenance": {"weights": "Q4_1"}}
CASES = {
    "parts_missing": [cell_with_missing_runs(), cell_of_kinds(("layer",), (4,))],
    "beneath_undefined": [cell_without(3, remaining=Estimate(None, reason="not measured yet"))],
    "loss": [
        loss_cell(),
        PLAIN_CELL,
        PLAIN_CELL.model_copy(update={"model": HALF_MODEL, "compared_unsteady": 0}),
    ],
    "rounding": [
        half_precision_cell(),
        half_precision_cell(**UNKNOWN_ROUNDING),
        half_precision_cell(**UNKNOWN_ROUNDING, higher_is_better=False),
    ],
    "editions": [
        OLD_EDITION,
        NEW_EDITION,
        MIDDLE_EDITION,
        edited_cell("one", OLD_EDITION.measured, model="Other"),
    ],
    "choices": [cell_of_choices()],
    "half_precision": [PLAIN_CELL, PLAIN_CELL.model_copy(update={"model": HALF_MODEL})],
    "no_spread": [
        cell_with_changed_runs(drop_sd=None, reasons={"drop_sd": "one document has no spread"})
    ],
    "second_rounding": [
        cell_with_changed_runs(intervention="int4").model_copy(update=STORED_WEIGHTS)
    ],
    "weak": [build_cell(baseline=0.27), study_cells()[2]],
    "odd_figures": [
        replace_layer(replace_layer(build_cell(), 5, n=80), 0, cosine_score=float("nan")),
        replace_layer(build_cell("piqa"), 4, cosine_score=None),
        cell_with_one_run(),
    ],
    "shared_by_most": models_sharing_some(),
    "no_cell": [],
}


def table_lines(table: Table) -> Iterator[str]:
    """Write a table: its title, heads, some entries with their reasons, notes."""
    read = read_table(table)
    yield from ("", f"{read.title} ({len(read.rows)} rows)", " | ".join(read.labels))
    for row in read.rows[:: max(1, len(read.rows) // 6)]:
        yield " | ".join(f"{v.text} ({v.reason})" if v.reason else v.text for v in row)
    yield from read.notes


def all_texts(cells: list[CellRecord]) -> Iterator[str]:
    """Yield all texts that people read of some cells, line by line."""
    yield wording.summary(cells)
    yield compared_sentence(cells)
    yield from table_lines(tables.overview_table(cells))
    yield from map(str, [*row_labels(cells), *row_labels(cells, documents=False)])
    board_tables, notes = build_boards(cells)
    for table in board_tables:
        yield from table_lines(table)
    yield from notes
    for model_cells in group_models(cells):
        board = layer_board(model_cells)
        yield from ("", layers_answer(board.claims))
        board_tables = model.rank_chart(board, "MODEL")
        yield board_tables.title if board_tables else "no ranks"
        yield maps.heat_map_title(model_cells)
        if board.parts:
            headline_chart = headline.headline_chart(board, "MODEL")
            yield from (headline_chart.title, headline_chart.explanation)
        yield from benchmark_labels(model_cells)
    for cell in cells:
        yield from ("", f"# {cell.title}", cell.documents_text, wording.correlation_sentences(cell))
        yield from (charts.curve_title(cell), charts.scatter_title(cell))
        yield from (maps.map_title(cell, kinds) for kinds in maps.find_heat_map_rows(cell).values())
        yield from wording.warnings(cell)
        for trace in charts.layer_curve(cell).data:
            yield from trace["hovertext"][3:4]
        yield from table_lines(tables.layer_table(cell))
    for cell in cells[:1]:
        yield from table_lines(tables.correlation_table(cell))


def cell_with_gaps() -> CellRecord:
    """Make a cell of which one layer is not measured and another one undefined."""
    undefined_figures = dict.fromkeys(("accuracy_drop", "accuracy_drop_low", "accuracy_drop_high"))
    reason_fields = {"reasons": {"accuracy_drop": "no outcome"}}
    return replace_layer(
        build_cell(missing=(7,)), 3, **undefined_figures, cosine_score=float("nan"), **reason_fields
    )


def draw_charts() -> Iterator[Chart]:
    """Draw a chart of every kind."""
    kinds_cell, board = cell_of_kinds(), layer_board(study_cells())
    for cell in (cell_with_gaps(), kinds_cell):
        yield charts.layer_curve(cell)
        yield charts.proxy_scatter(cell)
    yield from (
        maps.kind_map(kinds_cell, family) for family in maps.find_heat_map_rows(kinds_cell).values()
    )
    yield maps.heat_map(study_cells())
    yield from (model.relevance_curves(board, "MODEL"), model.proxy_curves(study_cells(), "MODEL"))
    yield model.rank_chart(layer_board([build_cell(n=2000)]), "MODEL")
    yield headline.headline_chart(board, "MODEL")
    yield headline.headline_chart(layer_board([cell_of_choices()]), "MODEL")
    yield model.depth_curves([board, layer_board([build_cell(model="b")])], ["a", "b"])
    for benchmarks in ("ab", "abcd"):
        pairs, _ = pair_models(
            [build_cell(b, model=m, seed=ord(m)) for m in "xy" for b in benchmarks]
        )
        yield model.difference_chart(pairs[0])
    decisions = decisions_record(build_decisions(PLAIN_CELL))
    yield from (margin_chart(PLAIN_CELL, decisions), lost_document_map(PLAIN_CELL, decisions))
    yield from (draw_study_chart(LINE_CHART), draw_study_chart(MAP_CHART))


def write_numbers(values: Any) -> str:
    """Write numbers with four digits; gaps are dashes."""
    if isinstance(values, int | float):
        return f"{values:.4g}"
    entries = ["–" if v is None or v != v else v for v in values]
    return " ".join(v if isinstance(v, str) else f"{v:.4g}" for v in entries)


def chart_lines(chart: Chart) -> Iterator[str]:
    """Write the numbers of a chart, a line an axis, an error or a strength."""
    figure = chart.to_figure()
    yield from ("", f"# {figure.layout.title.text}")
    for trace in figure.data:
        rows = {name: trace[name] for name in ("x", "y") if trace[name] is not None}
        errors = getattr(trace, "error_y", None)
        for name in ("array", "arrayminus"):
            if errors is not None and errors[name] is not None:
                rows[name] = errors[name]
        if trace.type == "heatmap":
            rows |= {f"z {number}": row for number, row in enumerate(trace.z)}
        elif trace.marker.opacity is not None:
            rows["strength"] = trace.marker.opacity
        yield f"{trace.type}: {trace.name or ''}"
        yield from (f"  {name}: {write_numbers(row)}" for name, row in rows.items())


def test_charts_hold_the_numbers_that_were_read():
    text = (GOLDEN / "charts.txt").read_text(encoding="utf-8")
    assert "\n".join(line for chart in draw_charts() for line in chart_lines(chart)) + "\n" == text


@pytest.mark.parametrize("case", CASES)
def test_people_read_what_was_read(case):
    expected = (GOLDEN / f"{case}.txt").read_text(encoding="utf-8")
    assert "\n".join(all_texts(CASES[case])) + "\n" == expected


if __name__ == "__main__":
    for case, cells in CASES.items():
        (GOLDEN / f"{case}.txt").write_text("\n".join(all_texts(cells)) + "\n", encoding="utf-8")
    table_lines = [line for chart in draw_charts() for line in chart_lines(chart)]
    (GOLDEN / "charts.txt").write_text("\n".join(table_lines) + "\n", encoding="utf-8")
