"""Compare the texts of cells of every kind with reviewed texts: `golden/CASE.txt`.

`python -m tests.report.test_golden` writes these anew; what has changed in them is to be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ablations import with_change, with_figures
from tests.helpers.findings import LINES, MAP
from tracker.analysis.agreement import pairs_of
from tracker.analysis.boards import layer_board
from tracker.analysis.comparable import benchmark_labels, models_of, row_labels
from tracker.analysis.decisions import decisions_record
from tracker.core.changes import Change
from tracker.core.estimates import Estimate
from tracker.core.records import CellRecord
from tracker.core.tables import Table
from tracker.report import tables, wording
from tracker.report.charts import cells as charts
from tracker.report.charts import headline, maps, model
from tracker.report.charts.cells import agreement_map, margin_chart
from tracker.report.charts.style import Chart
from tracker.report.export import boards
from tracker.report.page.studies import study_chart
from tracker.report.wording import answer, compared_sentence

from .cells import (
    ONE,
    THREE,
    TWO,
    WHY,
    edition,
    halved,
    loss,
    several,
    sharing_one,
    sharing_some,
    some_layers,
    without,
)
from .conftest import as_read, build_cell, build_decisions, study, two_models, with_layer

GOLDEN = Path(__file__).with_name("golden")
PLAIN = build_cell(compared=8, compared_difference=0.4, compared_unsteady=2)
HALF = PLAIN.model.model_copy(update={"dtype": "bfloat16"})


def with_runs(**changes: Any) -> CellRecord:
    """Make a cell that is changed alike in every run."""
    return build_cell(runs=tuple(with_change(run, **changes) for run in build_cell().runs))


def some_attention() -> CellRecord:
    """Make a cell that misses two of its runs."""
    cell = several(("layer", "attention"), (1,))
    missing = (Change.parse("attention:0"), Change.parse("attention:10"))
    runs = tuple(run for run in cell.runs if run.change not in missing)
    return cell.model_copy(update={"runs": runs, "missing": missing})


def few_figures() -> CellRecord:
    """Make a cell of one run on three documents, with a correlation of one layer."""
    cell = build_cell("rte", n=3)
    one = with_figures(cell.correlations[0], low=None, p_value=None, n=1)
    return cell.model_copy(update={"runs": cell.runs[:1], "correlations": (one,)})


UNKNOWN = {"baseline_rounded": None, "reasons": {"baseline_rounded": WHY}}
KEPT = {"provenance": {"weights": "Q4_1"}}
CASES = {
    "two_models": two_models(),
    "parts": [several(), without(3, 17), several(("attention",), (1,), correlations=())],
    "parts_missing": [some_attention(), several(("layer",), (4,))],
    "beneath_undefined": [without(3, remaining=Estimate(None, reason="not measured yet"))],
    "loss": [loss(), PLAIN, PLAIN.model_copy(update={"model": HALF, "compared_unsteady": 0})],
    "rounding": [halved(), halved(**UNKNOWN), halved(**UNKNOWN, higher_is_better=False)],
    "editions": [ONE, TWO, THREE, edition("one", ONE.measured, model="Other")],
    "half_precision": [PLAIN, PLAIN.model_copy(update={"model": HALF})],
    "nothing_changes": [with_runs(accuracy_drop=0.0, drop_sd=0.0)],
    "no_spread": [with_runs(drop_sd=None, reasons={"drop_sd": "one document has no spread"})],
    "helps": [with_runs(accuracy_drop=-0.01)],
    "second_rounding": [with_runs(intervention="int4").model_copy(update=KEPT)],
    "nothing_is_measured": [
        build_cell(
            baseline_accuracy=None,
            runs=(),
            correlations=(),
            reasons={"baseline_accuracy": "no document was scored"},
        )
    ],
    "weak": [build_cell(baseline=0.27), study()[2]],
    "odd_figures": [
        with_layer(with_layer(build_cell(), 5, n=80), 0, cosine_score=float("nan")),
        with_layer(build_cell("piqa"), 4, cosine_score=None),
        few_figures(),
    ],
    "shared_by_all": sharing_one(),
    "shared_by_most": sharing_some(),
    "some_layers": [
        *(build_cell(model=name, seed=seed) for seed, name in enumerate("ab", 1)),
        some_layers(build_cell(model="middle", seed=3), 15, 16, 19),
    ],
    "counted_once": [
        *(build_cell(n=n) for n in (100, 300)),
        build_cell("rte", baseline=0.25),
        build_cell("piqa", removed=(3,)),
    ],
    "no_cell": [],
}


def lines(table: Table) -> Iterator[str]:
    """Write a table: its title, heads, some entries with their reasons, notes."""
    shown = as_read(table)
    yield from ("", f"{shown.title} ({len(shown.rows)} rows)", " | ".join(shown.labels))
    for row in shown.rows[:: max(1, len(shown.rows) // 6)]:
        yield " | ".join(f"{v.text} ({v.reason})" if v.reason else v.text for v in row)
    yield from shown.notes


def said(cells: list[CellRecord]) -> Iterator[str]:
    """Yield all texts that people read of some cells, line by line."""
    yield wording.summary(cells)
    yield compared_sentence(cells)
    yield from lines(tables.overview_table(cells))
    yield from map(str, [*row_labels(cells), *row_labels(cells, documents=False)])
    ranked, notes = boards(cells)
    for table in ranked:
        yield from lines(table)
    yield from notes
    for group in models_of(cells):
        board = layer_board(group)
        yield from ("", answer(board.claims))
        ranked = model.rank_chart(board, "MODEL")
        yield ranked.title if ranked else "no ranks"
        yield maps.heat_title(group)
        if board.parts:
            drawn = headline.headline(board, "MODEL")
            yield from (drawn.title, drawn.explains)
        yield from benchmark_labels(group)
    for cell in cells:
        yield from ("", f"# {cell.title}", cell.documents, wording.sentence(cell))
        yield from (charts.curve_title(cell), charts.scatter_title(cell))
        yield from (maps.map_title(cell, kinds) for kinds in maps.mapped(cell).values())
        yield from wording.warnings(cell)
        for trace in charts.layer_curve(cell).data:
            yield from trace["hovertext"][3:4]
        yield from lines(tables.layer_table(cell))
    for cell in cells[:1]:
        yield from lines(tables.correlation_table(cell))


def with_gaps() -> CellRecord:
    """Make a cell of which one layer is not measured and another one undefined."""
    nothing = dict.fromkeys(("accuracy_drop", "accuracy_drop_low", "accuracy_drop_high"))
    why = {"reasons": {"accuracy_drop": "no outcome"}}
    return with_layer(build_cell(missing=(7,)), 3, **nothing, cosine_score=float("nan"), **why)


def certain_of_gold() -> CellRecord:
    """Make a cell whose accuracy shows nothing, and whose log-probability does."""
    cell = build_cell(n=8)
    ends = [run.gold_drop.value for run in cell.runs]
    runs = [
        with_figures(run, gold_logprob_low=end - 0.01, gold_logprob_high=end + 0.01)
        for run, end in zip(cell.runs, ends, strict=True)
    ]
    return cell.model_copy(update={"runs": tuple(runs)})


def drawn() -> Iterator[Chart]:
    """Draw a chart of every kind."""
    kinds, board = several(), layer_board(study())
    for cell in (with_gaps(), kinds):
        yield charts.layer_curve(cell)
        yield charts.proxy_scatter(cell)
    yield from (maps.kind_map(kinds, family) for family in maps.mapped(kinds).values())
    yield maps.heat_map(study())
    yield from (model.relevance_curves(board, "MODEL"), model.proxy_curves(study(), "MODEL"))
    yield model.rank_chart(layer_board([build_cell(n=2000)]), "MODEL")
    yield headline.headline(board, "MODEL")
    yield headline.headline(layer_board([certain_of_gold()]), "MODEL")
    yield model.depth_curves([board, layer_board([build_cell(model="b")])], ["a", "b"])
    for benchmarks in ("ab", "abcd"):
        pairs, _ = pairs_of([build_cell(b, model=m, seed=ord(m)) for m in "xy" for b in benchmarks])
        yield model.difference_chart(pairs[0])
    decided = decisions_record(build_decisions(PLAIN))
    yield from (margin_chart(PLAIN, decided), agreement_map(PLAIN, decided))
    yield from (study_chart(LINES), study_chart(MAP))


def numbers(values: Any) -> str:
    """Write numbers with four digits; gaps are dashes."""
    if isinstance(values, int | float):
        return f"{values:.4g}"
    shown = ["–" if v is None or v != v else v for v in values]
    return " ".join(v if isinstance(v, str) else f"{v:.4g}" for v in shown)


def plotted(chart: Chart) -> Iterator[str]:
    """Write the numbers of a chart, a line an axis, an error or a strength."""
    figure = chart.figure()
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
        yield from (f"  {name}: {numbers(row)}" for name, row in rows.items())


def test_charts_hold_the_numbers_that_were_read():
    text = (GOLDEN / "charts.txt").read_text(encoding="utf-8")
    assert "\n".join(line for chart in drawn() for line in plotted(chart)) + "\n" == text


@pytest.mark.parametrize("case", CASES)
def test_people_read_what_was_read(case):
    wanted = (GOLDEN / f"{case}.txt").read_text(encoding="utf-8")
    assert "\n".join(said(CASES[case])) + "\n" == wanted


if __name__ == "__main__":
    for case, cells in CASES.items():
        (GOLDEN / f"{case}.txt").write_text("\n".join(said(cells)) + "\n", encoding="utf-8")
    lines = [line for chart in drawn() for line in plotted(chart)]
    (GOLDEN / "charts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
