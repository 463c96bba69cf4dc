"""Build the sections of the page: of each cell, of each model, and across models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tracker.analysis.agreement import pairs_of
from tracker.analysis.boards import (
    LayerBoard,
    ModelBoard,
    PartBoard,
    layer_board,
    model_board,
    part_boards,
)
from tracker.analysis.comparable import benchmark_labels, named_models
from tracker.analysis.decisions import SHOWN
from tracker.core.changes import WHOLE_LAYER
from tracker.core.decision_records import DecisionsRecord, RunDecisions
from tracker.core.formats import DASH, counted, points
from tracker.core.records import CellRecord, Place
from tracker.core.run_table import CellRun, pick, run_columns, telling_apart
from tracker.core.tables import Column, Table, Value, table
from tracker.core.text import capital
from tracker.report import tables
from tracker.report.charts.cells import (
    agreement_map,
    curve_kinds,
    layer_curve,
    margin_chart,
    margin_name,
    proxy_scatter,
)
from tracker.report.charts.headline import headline
from tracker.report.charts.maps import heat_map, kind_map, map_caption, mapped
from tracker.report.charts.model import (
    depth_curves,
    difference_chart,
    proxy_curves,
    rank_chart,
    relevance_curves,
)
from tracker.report.charts.style import Chart
from tracker.report.frames import packed_json
from tracker.report.leaderboard import (
    depth_table,
    difference_table,
    model_board_table,
    proxy_table,
    relevance_interval_table,
)
from tracker.report.wording import model_answer

BUDGET = 2_000_000
"""Characters that the documents of all cells may take of a page."""
Row = DecisionsRecord | RunDecisions
"""Row of the table: the intact model, or the decisions of a run."""
_OPTIONS = 6
"""With more options than this, the others share a column."""


def letter(option: int) -> str:
    """Name an option as examinations do: A, B, and so on; by its number beyond Z."""
    return chr(ord("A") + option) if option < 26 else str(option + 1)


def decision_table(cell: CellRecord, decided: DecisionsRecord) -> Table:
    """Build a table with a row for each run: lost and won documents, margin, option shares."""
    options = len(decided.options)
    several = min(options, _OPTIONS)
    why = decided.reasons.get("margin", "no margin is defined")

    def name(column: Column[CellRun]) -> Column[Row]:
        def value(row: Row) -> Value:
            if isinstance(row, RunDecisions):
                return column.value(CellRun(cell, row.run))
            return "none" if column.name == "layer" else ""

        return Column(column.label, column.unit, value)

    def changed(change: str) -> Column[Row]:
        return Column(f"documents {change}", "count", lambda row: getattr(row, change, DASH))

    def taken(label: str, first: int, last: int) -> Column[Row]:
        def share(row: Row) -> float | None:
            return sum(row.options[first:last]) if row.options else None

        return Column(label, "percent", share, why)

    margin = f"median {margin_name(cell, decided)}"
    columns: list[Column[Row]] = [
        *map(name, pick(run_columns(cell), *telling_apart(cell))),
        changed("lost"),
        changed("won"),
        Column(margin, "coefficient", lambda row: row.margins[1] if row.margins else None, why),
        *(taken(f"{letter(option)} taken", option, option + 1) for option in range(several)),
    ]
    if options > _OPTIONS:
        columns.append(taken("later ones", several, options))
    rows: list[Row] = [decided, *decided.runs]
    notes = []
    if options:
        gold = ", ".join(f"{letter(n)} {points(share)} %" for n, share in enumerate(decided.gold))
        notes.append(f"How often each option is the right one: {gold}.")
    if "margin" in decided.reasons:
        notes.append(f"Margins: {why}.")
    return table(
        f"{cell.title}: what the model decides without each layer, and in its first row intact. "
        f"{counted(decided.n, 'document')}; lost: worse than intact, won: better.",
        columns,
        rows,
        *notes,
    )


def packed_documents(decided: Mapping[str, tuple[CellRecord, DecisionsRecord]]) -> dict[str, str]:
    """Compress the documents that runs lose and win; a page decompresses them on request.

    Args:
        decided: Name → cell, and the decisions of its runs.

    Returns:
        Name → compressed JSON. The number of documents for each run is limited by the page's size.
    """
    budget = BUDGET // max(1, len(decided))
    found = {}
    for name, (cell, record) in decided.items():
        few = SHOWN
        found[name] = packed_json(_content(cell, record, few))
        while len(found[name]) > budget and few > 1:
            few = max(1, int(0.9 * few * budget / len(found[name])))
            found[name] = packed_json(_content(cell, record, few))
    return found


def _content(cell: CellRecord, decided: DecisionsRecord, few: int) -> dict[str, Any]:
    numbers: dict[int, int] = {}

    def named(run: RunDecisions) -> list[list[Any]]:
        halves = run.named[: run.named_lost][:few], run.named[run.named_lost :][:few]
        return [
            [numbers.setdefault(d.document, len(numbers)), won, d.choice, d.margin, d.text]
            for won, half in enumerate(halves)
            for d in half
        ]

    runs = [[run.run.label(), run.lost, run.won, named(run)] for run in decided.runs]
    documents = [decided.documents[number] for number in numbers]
    return {
        "runs": runs,
        "documents": [
            [d.task, d.doc, d.question, d.choices, d.answer, d.gold, d.choice, d.margin, d.text]
            for d in documents
        ],
        "margin": margin_name(cell, decided),
        "why": decided.reasons.get("texts", ""),
    }


@dataclass(frozen=True)
class Figure:
    """A chart with its place on the page, and the table of its numbers where it has its own."""

    id: str
    title: str
    chart: Chart
    table: Table | None = None

    @property
    def height(self) -> int:
        """In pixels; the box keeps it before the chart is drawn."""
        return int(self.chart.layout["height"])


@dataclass(frozen=True)
class CellSection:
    """One cell on the page; `charts` are those that can be drawn, by name.

    `decisions` are there where its runs are known document by document.
    """

    id: str
    label: str
    cell: CellRecord
    charts: dict[str, Figure]
    maps: dict[str, str]
    """Name of each chart that is a map → its explanation."""
    curve_lines: int
    decisions: DecisionsRecord | None


@dataclass(frozen=True)
class ModelSection:
    """One model: the boards of its layers and parts, its charts over depth by name, and its cells.

    A chart is lacking where no whole layer is removed, or no benchmark defines a relevance.
    """

    id: str
    label: str
    board: LayerBoard
    parts: tuple[PartBoard, ...]
    cells: tuple[CellSection, ...]
    charts: dict[str, Figure]

    @property
    def answer(self) -> str:
        """The verdicts on the model's layers, and on its parts if it has boards of them."""
        cells = [section.cell for section in self.cells]
        return model_answer(self.board.claims, self.parts, cells)

    @property
    def figures(self) -> tuple[Figure, ...]:
        """Every chart of the section and of its cells."""
        of_cells = [figure for cell in self.cells for figure in cell.charts.values()]
        return (*self.charts.values(), *of_cells)


@dataclass(frozen=True)
class AcrossSection:
    """Statements across models."""

    depth: Figure
    board: ModelBoard
    leaderboard: Table
    pairs: tuple[Figure, ...]
    pair_count: int


def model_sections(
    cells: Sequence[CellRecord], decided: Mapping[Place, DecisionsRecord]
) -> tuple[ModelSection, ...]:
    """Build a section for each model, in the order of their first cells.

    `decided` maps the key of a cell to the decisions of its runs, document by document.
    """
    groups = named_models(cells)
    return tuple(
        _model_section(group, decided, label, f"model-{number}", alone=len(groups) == 1)
        for number, (label, group) in enumerate(groups.items(), 1)
    )


def across_section(
    cells: Sequence[CellRecord], models: Sequence[ModelSection]
) -> AcrossSection | None:
    """Compare the models of a page; None where there is nothing to compare."""
    if len(models) < 2:
        return None
    ranked_layers = [model.board for model in models]
    labels = [model.label for model in models]
    board = model_board(cells)
    names = {model.board.model.key: model.label for model in models}
    pairs, count = pairs_of(cells)
    table = depth_table(ranked_layers, labels)
    return AcrossSection(
        depth=_figure(depth_curves(ranked_layers, labels), "across-depth", table),
        board=board,
        leaderboard=model_board_table(board, [names[model.model.key] for model in board.models]),
        pairs=tuple(
            _figure(difference_chart(pair), f"pair-{number}", difference_table(pair))
            for number, pair in enumerate(pairs, 1)
        ),
        pair_count=count,
    )


def _model_section(
    cells: Sequence[CellRecord],
    decided: Mapping[Place, DecisionsRecord],
    label: str,
    name: str,
    alone: bool,
) -> ModelSection:
    benchmarks = benchmark_labels(cells)
    mapped = [cell for cell in cells if _has_whole_layers(cell)]
    whole = [cell for cell in cells if cell.whole_layers]
    board = layer_board(cells)
    drawn: dict[str, Figure] = {}

    def draw(chart: Chart, end: str, table: Table | None, subject: str = label) -> None:
        drawn[end] = _figure(chart, f"{name}-{end}", table, subject)

    if board.parts:
        draw(headline(board, label), "headline", None, label if alone else "")
        table = relevance_interval_table(board, label)
        draw(relevance_curves(board, label), "relevance-curves", table)
    if whole:
        draw(proxy_curves(whole, label), "proxies", proxy_table(whole, label))
    if mapped:
        draw(heat_map(mapped), "heat-map", tables.relevance_table(mapped), cells[0].model.name)
    if ranks := rank_chart(board, label):
        draw(ranks, "ranks", None)
    return ModelSection(
        id=name,
        label=label,
        board=board,
        parts=tuple(part_boards(cells)),
        cells=tuple(
            _cell_section(cell, decided.get(cell.place), benchmark, f"{name}-cell-{index}")
            for index, (cell, benchmark) in enumerate(zip(cells, benchmarks, strict=True), 1)
        ),
        charts=drawn,
    )


def _has_whole_layers(cell: CellRecord) -> bool:
    """Return whether whole single layers are removed, or the cell has no runs at all."""
    return WHOLE_LAYER in cell.kinds or not cell.kinds


def _cell_section(
    cell: CellRecord, decided: DecisionsRecord | None, label: str, name: str
) -> CellSection:
    lines = curve_kinds(cell)
    charts: dict[str, Chart | None] = {"curve": layer_curve(cell)} if lines else {}
    maps = {f"map-{name}": kinds for name, kinds in mapped(cell).items()}
    charts |= {end: kind_map(cell, kinds) for end, kinds in maps.items()}
    if _has_whole_layers(cell):
        charts["scatter"] = proxy_scatter(cell)
    if decided and decided.runs:
        charts["margins"] = margin_chart(cell, decided)
        charts["agreement"] = agreement_map(cell, decided)
    return CellSection(
        id=name,
        label=label,
        cell=cell,
        charts={
            end: _figure(chart, f"{name}-{end}", subject=cell.title)
            for end, chart in charts.items()
            if chart
        },
        maps={end: map_caption(kinds) for end, kinds in maps.items()},
        curve_lines=len(lines),
        decisions=decided if decided and decided.runs else None,
    )


def _figure(chart: Chart, name: str, table: Table | None = None, subject: str = "") -> Figure:
    # The heading above the chart names its subject already.
    says = chart.title.removeprefix(f"{subject}: ")
    # A title that begins with a model's name keeps the name as it is.
    says = chart.title if says == chart.title else capital(says)
    return Figure(name, says, chart, table)
