"""The sections of the page: what it shows of each cell, of each model, and across models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tracker.core import answers, formats
from tracker.core.decision_records import DecisionsRecord
from tracker.core.identities import ModelIdentity
from tracker.core.records import WHOLE_LAYER, CellRecord, Place
from tracker.core.run_table import only_layers
from tracker.core.tables import Table
from tracker.report import caveats, tables, wording
from tracker.report.charts.across import depth_curves, difference_chart
from tracker.report.charts.cells import curve_kinds, layer_curve, proxy_scatter
from tracker.report.charts.decisions import agreement, agreement_map, groups_sentence, margin_chart
from tracker.report.charts.headline import headline
from tracker.report.charts.maps import heat_map, span_components, span_map
from tracker.report.charts.model import proxy_curves, relevance_curves
from tracker.report.charts.ranks import rank_map
from tracker.report.charts.style import Chart
from tracker.report.leaderboard.comparable import models_of
from tracker.report.leaderboard.layers import LayerBoard, layer_board
from tracker.report.leaderboard.models import ModelBoard, model_board
from tracker.report.leaderboard.pairs import pairs_of
from tracker.report.leaderboard.tables import (
    depth_table,
    difference_table,
    layer_board_table,
    misjudged_table,
    model_board_table,
    proxy_table,
    rank_table,
    relevance_interval_table,
)
from tracker.report.page import facts
from tracker.report.page.decisions import decision_table
from tracker.report.sentences import critical_sentence


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
class DecisionsSection:
    """What the page shows of the documents that a cell's runs lose and win.

    A chart is None where no margin is defined, or fewer than two layers can be compared.
    """

    record: DecisionsRecord
    table: Table
    margins: Figure | None
    agreement: Figure | None
    groups: str


@dataclass(frozen=True)
class CellSection:
    """Everything that the page shows of one cell."""

    id: str
    label: str
    cell: CellRecord
    measure: formats.Measure
    answer: str
    interval: str
    sentence: str
    warnings: tuple[str, ...]
    curve: Figure | None
    curve_lines: int
    scatter: Figure | None
    span_maps: tuple[Figure, ...]
    layers: Table
    layers_heading: str
    correlations: Table
    provenance: Table
    tasks: Table
    decisions: DecisionsSection | None

    @property
    def figures(self) -> tuple[Figure, ...]:
        """Every chart of the section."""
        decided = (self.decisions.margins, self.decisions.agreement) if self.decisions else ()
        return tuple(one for one in (self.curve, *self.span_maps, self.scatter, *decided) if one)


@dataclass(frozen=True)
class ModelSection:
    """One model: its leaderboard, its charts over depth and its cells.

    A chart is None where no whole layer is removed, or no benchmark defines a relevance.
    """

    id: str
    label: str
    identity: ModelIdentity
    board: LayerBoard
    leaderboard: Table | None
    critical: str
    cells: tuple[CellSection, ...]
    headline: Figure | None
    relevance: Figure | None
    proxies: Figure | None
    heat_map: Figure | None
    ranks: Figure | None
    misjudged: Table | None

    @property
    def figures(self) -> tuple[Figure, ...]:
        """Every chart of the section and of its cells."""
        mine = (self.headline, self.relevance, self.proxies, self.heat_map, self.ranks)
        return (*(one for one in mine if one), *(f for cell in self.cells for f in cell.figures))


@dataclass(frozen=True)
class AcrossSection:
    """What can be said across models."""

    depth: Figure
    board: ModelBoard
    leaderboard: Table
    pairs: tuple[Figure, ...]
    pair_count: int

    @property
    def figures(self) -> tuple[Figure, ...]:
        """Every chart of the section."""
        return (self.depth, *self.pairs)


def model_sections(
    cells: Sequence[CellRecord], decided: Mapping[Place, DecisionsRecord]
) -> tuple[ModelSection, ...]:
    """Make a section for each model, in the order in which they appear.

    `decided` is what the runs of some cells decide document by document, by the cell's place.
    """
    groups = models_of(cells)
    labels = wording.model_labels([group[0].model for group in groups])
    return tuple(
        _model_section(group, decided, label, f"model-{number}", alone=len(groups) == 1)
        for number, (group, label) in enumerate(zip(groups, labels, strict=True), 1)
    )


def across_section(
    cells: Sequence[CellRecord], models: Sequence[ModelSection]
) -> AcrossSection | None:
    """Compare the models of a page; None where there is nothing to compare."""
    if len(models) < 2:
        return None
    by_place = [model.board for model in models]
    labels = [model.label for model in models]
    ranked = model_board(cells)
    names = {model.identity.key: model.label for model in models}
    pairs, count = pairs_of(cells)
    return AcrossSection(
        depth=_figure(
            depth_curves(by_place, labels), "across-depth", depth_table(by_place, labels)
        ),
        board=ranked,
        leaderboard=model_board_table(ranked, [names[one.model.key] for one in ranked.models]),
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
    benchmarks = wording.benchmark_labels(cells)
    mapped = [cell for cell in cells if _has_whole_layers(cell)]
    whole = [cell for cell in cells if cell.whole_layers]
    board = layer_board(cells)
    return ModelSection(
        id=name,
        label=label,
        identity=cells[0].model,
        board=board,
        leaderboard=layer_board_table(board, label) if board.layers else None,
        critical=critical_sentence(board),
        cells=tuple(
            _cell_section(cell, decided.get(cell.place), benchmark, f"{name}-cell-{index}")
            for index, (cell, benchmark) in enumerate(zip(cells, benchmarks, strict=True), 1)
        ),
        headline=_figure(headline(board, label), f"{name}-headline", None, label if alone else "")
        if board.layers
        else None,
        relevance=_figure(
            relevance_curves(board, label),
            f"{name}-relevance-curves",
            relevance_interval_table(board, label),
            label,
        )
        if board.layers
        else None,
        proxies=_figure(
            proxy_curves(whole, label),
            f"{name}-proxies",
            proxy_table(whole, label),
            label,
        )
        if whole
        else None,
        heat_map=_figure(
            heat_map(mapped),
            f"{name}-heat-map",
            tables.relevance_table(mapped),
            cells[0].model.name,
        )
        if mapped
        else None,
        ranks=_figure(
            rank_map(whole, label),
            f"{name}-ranks",
            rank_table(whole, label),
            label,
        )
        if whole
        else None,
        misjudged=misjudged_table(board, label) if board.layers else None,
    )


def _has_whole_layers(cell: CellRecord) -> bool:
    """Whether whole single layers are among what is removed; a cell without any run has a place."""
    found = cell.kinds
    return WHOLE_LAYER in found or not found


def _cell_section(
    cell: CellRecord, decided: DecisionsRecord | None, label: str, name: str
) -> CellSection:
    lines = curve_kinds(cell)
    return CellSection(
        id=name,
        label=label,
        cell=cell,
        measure=formats.measure_of(cell),
        answer=answers.statement(cell.answer) if cell.answer else "",
        interval=answers.interval_name(cell),
        # The title of the scatter says the rest.
        sentence=wording.beneath(cell) if _has_whole_layers(cell) else wording.sentence(cell),
        warnings=caveats.warnings(cell),
        curve=_figure(layer_curve(cell), f"{name}-curve", subject=cell.title) if lines else None,
        curve_lines=len(lines),
        scatter=_figure(proxy_scatter(cell), f"{name}-scatter", subject=cell.title)
        if _has_whole_layers(cell)
        else None,
        span_maps=tuple(
            _figure(
                span_map(cell, component),
                f"{name}-spans-{component}",
                subject=cell.title,
            )
            for component in span_components(cell)
        ),
        layers=tables.layer_table(cell),
        layers_heading="Layers" if only_layers(cell) else "Runs",
        correlations=tables.correlation_table(cell),
        provenance=facts.provenance_table(cell),
        tasks=facts.task_table(cell),
        decisions=_decisions_section(cell, decided, name) if decided and decided.runs else None,
    )


def _decisions_section(cell: CellRecord, decided: DecisionsRecord, name: str) -> DecisionsSection:
    margins, alike = margin_chart(cell, decided), agreement_map(cell, decided)
    return DecisionsSection(
        record=decided,
        table=decision_table(cell, decided),
        margins=_figure(margins, f"{name}-margins", subject=cell.title) if margins else None,
        agreement=_figure(alike, f"{name}-agreement", subject=cell.title) if alike else None,
        groups=groups_sentence(agreement(decided)[2]) if alike else "",
    )


def _figure(chart: Chart, name: str, table: Table | None = None, subject: str = "") -> Figure:
    # The heading above the chart names its subject already.
    says = chart.title.removeprefix(f"{subject}: ")
    # A title that begins with a model's name keeps the name as it is.
    says = chart.title if says == chart.title else says[:1].upper() + says[1:]
    return Figure(name, says, chart, table)
