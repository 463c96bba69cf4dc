"""Build the sections of the page for benchmarks, models and comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tracker.analysis.agreement import pair_models
from tracker.analysis.boards import (
    LayerBoard,
    ModelBoard,
    PartBoard,
    layer_board,
    model_board,
    part_boards,
)
from tracker.analysis.comparable import benchmark_labels, named_models
from tracker.analysis.decisions import MAX_SHOWN_DOCUMENTS
from tracker.report import tables
from tracker.report.charts.cells import (
    curve_kinds,
    layer_curve,
    lost_document_map,
    margin_chart,
    margin_name,
    proxy_scatter,
)
from tracker.report.charts.headline import headline_chart
from tracker.report.charts.maps import find_heat_map_rows, heat_map, kind_map, map_caption
from tracker.report.charts.model import (
    depth_curves,
    difference_chart,
    proxy_curves,
    rank_chart,
    relevance_curves,
)
from tracker.report.charts.style import Chart
from tracker.report.frames import pack_json
from tracker.report.leaderboard import (
    depth_table,
    difference_table,
    model_board_table,
    proxy_table,
    relevance_interval_table,
)
from tracker.report.wording import model_answer
from tracker.schema.changes import WHOLE_LAYER
from tracker.schema.formats import DASH, count_text, points
from tracker.schema.records import (
    CellRecord,
    DecidedDocument,
    DecisionsRecord,
    RecordKey,
    RunDecisions,
)
from tracker.schema.run_table import CellRun, distinguishing_columns, pick_columns, run_columns
from tracker.schema.tables import Column, ColumnValue, Table, build_table
from tracker.schema.text import capitalise

DOCUMENT_BUDGET = 2_000_000
"""Maximum number of characters of a page for the documents of all cells."""
DecisionRow = DecisionsRecord | RunDecisions
"""Row of the table of decisions: the intact model, or the decisions of a run."""
_MAX_OPTION_COLUMNS = 6
"""Maximum number of options with a separate column; further options share a column."""


def option_letter(option: int) -> str:
    """Return the letter of an answer option (A, B, …), or its number if it has no letter."""
    return chr(ord("A") + option) if option < 26 else str(option + 1)


def decision_table(cell: CellRecord, decisions: DecisionsRecord) -> Table:
    """Build a table that summarises the model's answers under each ablation.

    The table contains the numbers of lost documents (made wrong) and won documents (made right),
    the median margin, and how often each answer option is chosen.
    """
    options = len(decisions.options)
    n_columns = min(options, _MAX_OPTION_COLUMNS)
    reason = decisions.reasons.get("margin", "no margin is defined")

    def name_column(column: Column[CellRun]) -> Column[DecisionRow]:
        def value(row: DecisionRow) -> ColumnValue:
            if isinstance(row, RunDecisions):
                return column.value(CellRun(cell, row.run))
            return "none" if column.name == "layer" else ""

        return Column(column.label, column.unit, value)

    def count_column(change: str) -> Column[DecisionRow]:
        return Column(f"documents {change}", "count", lambda row: getattr(row, change, DASH))

    def share_column(label: str, first: int, last: int) -> Column[DecisionRow]:
        def share(row: DecisionRow) -> float | None:
            return sum(row.options[first:last]) if row.options else None

        return Column(label, "percent", share, reason)

    shares = [(f"{option_letter(n)} taken", n, n + 1) for n in range(n_columns)]
    if options > _MAX_OPTION_COLUMNS:
        shares.append(("later ones", n_columns, options))
    columns: list[Column[DecisionRow]] = [
        *map(name_column, pick_columns(run_columns(cell), *distinguishing_columns(cell))),
        count_column("lost"),
        count_column("won"),
        Column(
            *(f"median {margin_name(cell, decisions)}", "coefficient"),
            *(lambda row: row.margins[1] if row.margins else None, reason),
        ),
        *(share_column(*share) for share in shares),
    ]
    if decisions.cut is not None:
        columns += [
            Column("texts cut off", "percent", lambda row: row.cut, "no text is stored"),
            Column("lost by cutting", "count", lambda row: getattr(row, "lost_cut", DASH)),
        ]
    rows: list[DecisionRow] = [decisions, *decisions.runs]
    notes = []
    if options:
        gold = [f"{option_letter(n)} {points(share)} %" for n, share in enumerate(decisions.gold)]
        notes.append(f"How often each option is the right answer: {', '.join(gold)}.")
    if decisions.cut is not None:
        notes.append(
            "Texts cut off: share of generated texts that the token limit ended. Lost by cutting: "
            "number of documents that lose their right answer, and whose texts the token limit "
            "ends more often than in the intact model."
        )
    if "margin" in decisions.reasons:
        notes.append(f"Margins: {reason}.")
    return build_table(
        f"{cell.title}: answers of the intact model (first row) and under each ablation. "
        f"{count_text(decisions.n, 'document')}; lost: worse than intact, won: better.",
        columns,
        rows,
        *notes,
    )


def pack_documents(
    cell_decisions: Mapping[str, tuple[CellRecord, DecisionsRecord]],
) -> dict[str, str]:
    """Compress the documents with changed scores, for the HTML page.

    Args:
        cell_decisions: Name of a section → pair: a model's results on a benchmark, and the model's
            answers under each ablation.

    Returns:
        Name of a section → compressed JSON. All JSON texts together have at most `DOCUMENT_BUDGET`
        characters; further documents are left out.
    """
    budget = DOCUMENT_BUDGET // max(1, len(cell_decisions))
    packed = {}
    for name, (cell, record) in cell_decisions.items():
        n_shown = MAX_SHOWN_DOCUMENTS
        packed[name] = pack_json(_document_content(cell, record, n_shown))
        while len(packed[name]) > budget and n_shown > 1:
            n_shown = max(1, int(0.9 * n_shown * budget / len(packed[name])))
            packed[name] = pack_json(_document_content(cell, record, n_shown))
    return packed


def _document_content(cell: CellRecord, decisions: DecisionsRecord, n_shown: int) -> dict[str, Any]:
    positions: dict[int, int] = {}

    def named_documents(run: RunDecisions) -> list[list[Any]]:
        groups = run.named[: run.named_lost][:n_shown], run.named[run.named_lost :][:n_shown]
        return [
            [positions.setdefault(d.document, len(positions)), is_won, d.choice, d.margin, _text(d)]
            for is_won, group in enumerate(groups)
            for d in group
        ]

    runs = [[run.run.label(), run.lost, run.won, named_documents(run)] for run in decisions.runs]
    documents = [decisions.documents[number] for number in positions]
    return {
        "runs": runs,
        "documents": [
            [d.task, d.doc, d.question, d.choices, d.answer, d.gold, d.choice, d.margin, d.text]
            for d in documents
        ],
        "margin": margin_name(cell, decisions),
        "why": decisions.reasons.get("texts", ""),
    }


def _text(document: DecidedDocument) -> str | None:
    """Return the text that an ablated model generated for a document.

    If the text ended at the token limit, `… [cut off]` is appended.
    """
    return f"{document.text} … [cut off]" if document.text and document.cut else document.text


@dataclass(frozen=True)
class Figure:
    """Chart of the HTML page, with an optional table of the plotted numbers."""

    id: str
    title: str
    chart: Chart
    table: Table | None = None

    @property
    def height(self) -> int:
        """Height of the chart in pixels."""
        return int(self.chart.layout["height"])


@dataclass(frozen=True)
class CellSection:
    """Section of the page for one model on one benchmark; `charts` maps names to charts.

    `decisions` is None if the model's answers to individual documents are not known.
    """

    id: str
    label: str
    cell: CellRecord
    charts: dict[str, Figure]
    maps: dict[str, str]
    """Name of each chart that is a map → explanation of the map."""
    curve_lines: int
    decisions: DecisionsRecord | None


@dataclass(frozen=True)
class ModelSection:
    """Section of the page for one model: leaderboards, charts by name, and benchmark sections.

    `charts` contains only charts whose values are measured and defined.
    """

    id: str
    label: str
    board: LayerBoard
    parts: tuple[PartBoard, ...]
    cells: tuple[CellSection, ...]
    charts: dict[str, Figure]

    @property
    def answer(self) -> str:
        """Sentences on the layers and parts (e.g. heads) with significant effects."""
        cells = [section.cell for section in self.cells]
        return model_answer(self.board.claims, self.parts, cells)

    @property
    def figures(self) -> tuple[Figure, ...]:
        """All charts of the model's section, including the charts of its benchmarks."""
        of_cells = [figure for cell in self.cells for figure in cell.charts.values()]
        return (*self.charts.values(), *of_cells)


@dataclass(frozen=True)
class AcrossSection:
    """Section of the page that compares models."""

    depth: Figure
    board: ModelBoard
    leaderboard: Table
    pairs: tuple[Figure, ...]
    pair_count: int


def model_sections(
    cells: Sequence[CellRecord], decisions: Mapping[RecordKey, DecisionsRecord]
) -> tuple[ModelSection, ...]:
    """Build a section for each model, in the order of the models in `cells`.

    `decisions` contains the model's answers to each document, by benchmark and model.
    """
    groups = named_models(cells)
    return tuple(
        _model_section(group, decisions, label, f"model-{number}", is_only=len(groups) == 1)
        for number, (label, group) in enumerate(groups.items(), 1)
    )


def across_section(
    cells: Sequence[CellRecord], models: Sequence[ModelSection]
) -> AcrossSection | None:
    """Build the section that compares models; None if there are fewer than two models."""
    if len(models) < 2:
        return None
    boards = [model.board for model in models]
    labels = [model.label for model in models]
    board = model_board(cells)
    names = {model.board.model.key: model.label for model in models}
    pairs, n_pairs = pair_models(cells)
    depth = depth_curves(boards, labels)
    return AcrossSection(
        depth=_page_figure(depth, "across-depth", depth_table(boards, labels)),
        board=board,
        leaderboard=model_board_table(board, [names[model.model.key] for model in board.models]),
        pairs=tuple(
            _page_figure(difference_chart(pair), f"pair-{number}", difference_table(pair))
            for number, pair in enumerate(pairs, 1)
        ),
        pair_count=n_pairs,
    )


def _model_section(
    cells: Sequence[CellRecord],
    decisions: Mapping[RecordKey, DecisionsRecord],
    label: str,
    name: str,
    is_only: bool,
) -> ModelSection:
    mapped = [cell for cell in cells if _has_whole_layers(cell)]
    with_layers = [cell for cell in cells if cell.whole_layers]
    board = layer_board(cells)
    figures: dict[str, Figure] = {}

    def add_figure(end: str, chart: Chart, table: Table | None, subject: str = label) -> None:
        figures[end] = _page_figure(chart, f"{name}-{end}", table, subject)

    if board.parts:
        add_figure("headline", headline_chart(board, label), None, label if is_only else "")
        table = relevance_interval_table(board, label)
        add_figure("relevance-curves", relevance_curves(board, label), table)
    if with_layers:
        add_figure("proxies", proxy_curves(with_layers, label), proxy_table(with_layers, label))
    if mapped:
        table = tables.relevance_table(mapped)
        add_figure("heat-map", heat_map(mapped), table, cells[0].model.name)
    if ranks := rank_chart(board, label):
        add_figure("ranks", ranks, None)
    labelled = zip(cells, benchmark_labels(cells), strict=True)
    return ModelSection(
        id=name,
        label=label,
        board=board,
        parts=tuple(part_boards(cells)),
        cells=tuple(
            _cell_section(cell, decisions.get(cell.record_key), benchmark, f"{name}-cell-{index}")
            for index, (cell, benchmark) in enumerate(labelled, 1)
        ),
        charts=figures,
    )


def _has_whole_layers(cell: CellRecord) -> bool:
    """Return whether a cell has runs that remove one whole layer, or has no runs at all."""
    return WHOLE_LAYER in cell.kinds or not cell.kinds


def _cell_section(
    cell: CellRecord, decisions: DecisionsRecord | None, label: str, name: str
) -> CellSection:
    n_lines = len(curve_kinds(cell))
    decisions = decisions if decisions and decisions.runs else None
    charts: dict[str, Chart | None] = {"curve": layer_curve(cell)} if n_lines else {}
    maps = {f"map-{name}": kinds for name, kinds in find_heat_map_rows(cell).items()}
    charts |= {end: kind_map(cell, kinds) for end, kinds in maps.items()}
    if _has_whole_layers(cell):
        charts["scatter"] = proxy_scatter(cell)
    if decisions:
        charts["margins"] = margin_chart(cell, decisions)
        charts["agreement"] = lost_document_map(cell, decisions)
    return CellSection(
        id=name,
        label=label,
        cell=cell,
        charts={
            end: _page_figure(chart, f"{name}-{end}", subject=cell.title)
            for end, chart in charts.items()
            if chart
        },
        maps={end: map_caption(kinds) for end, kinds in maps.items()},
        curve_lines=n_lines,
        decisions=decisions,
    )


def _page_figure(chart: Chart, name: str, table: Table | None = None, subject: str = "") -> Figure:
    # The heading above the chart already names the subject of the chart.
    title = chart.title.removeprefix(f"{subject}: ")
    # A title that begins with a model's name keeps the name as it is.
    title = chart.title if title == chart.title else capitalise(title)
    return Figure(name, title, chart, table)
