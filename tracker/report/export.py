"""Write a report for papers and pull requests, with tables and charts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

import pandas as pd
import plotly.graph_objects as go

from tracker.analysis.boards import layer_board, model_board, part_boards
from tracker.analysis.comparable import benchmark_labels, model_labels, named_models
from tracker.ledger.files import write_atomically, write_text
from tracker.report import leaderboard, wording
from tracker.report.charts.cells import cell_charts
from tracker.report.charts.maps import heat_map
from tracker.report.frames import correlation_frame, layer_frame, table_frame, write_csv
from tracker.report.page.studies import study_charts, study_frames
from tracker.report.tables import overview_table
from tracker.report.wording import rule
from tracker.schema import formats
from tracker.schema.distribution import extra_command
from tracker.schema.errors import RequestError, WorkError, first_line
from tracker.schema.findings import FindingRecord
from tracker.schema.formats import count_text
from tracker.schema.records import CellRecord
from tracker.schema.tables import Table, entry_text, heading_text
from tracker.schema.text import escape_markdown

_LATEX_ESCAPES = str.maketrans(
    {sign: f"\\{sign}" for sign in "&%$#_{}"}
    | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "\n": " "}
)
"""Special character of LaTeX → its escaped form."""
ExtraFrames = Mapping[str, Iterable[pd.DataFrame]]
Findings = Sequence[FindingRecord]
Writer = Callable[[Sequence[CellRecord], Path, ExtraFrames, Findings], list[Path]]


def board_data(cells: Sequence[CellRecord]) -> dict[str, Table]:
    """Build the tables `layer_leaderboard` and `model_leaderboard`; values are not rounded.

    The table `part_leaderboard` is added if heads, experts or ranges of several layers are ranked.
    """
    models = named_models(cells)
    tables = {
        "layer_leaderboard": leaderboard.layer_board_data(list(map(layer_board, models.values()))),
        "model_leaderboard": leaderboard.model_board_data(model_board(cells)),
    }
    parts = [(name, board) for name, group in models.items() for board in part_boards(group)]
    return tables | ({"part_leaderboard": leaderboard.part_board_data(parts)} if parts else {})


def report_frames(cells: Sequence[CellRecord]) -> dict[str, pd.DataFrame]:
    """Build the data frames `layers` and `correlations`, and a data frame of each leaderboard."""
    board_frames = {name: table_frame(table) for name, table in board_data(cells).items()}
    return {"layers": layer_frame(cells), "correlations": correlation_frame(cells)} | board_frames


def report_figures(cells: Sequence[CellRecord], findings: Findings = ()) -> dict[str, go.Figure]:
    """Draw the charts of studies, models and benchmarks; return them by file name."""
    charts = {stem: chart.to_figure() for stem, chart in study_charts(findings).items()}
    for name, group in named_models(cells).items():
        if mapped := [cell for cell in group if cell.whole_layers]:
            charts[_file_name(name, "heat map")] = heat_map(mapped).to_figure()
        for cell, label in zip(group, benchmark_labels(group), strict=True):
            for kind, figure in cell_charts(cell).items():
                charts[_file_name(name, label, kind)] = figure
    return charts


def export_report(
    cells: Sequence[CellRecord],
    report_format: str,
    path: Path,
    extra: ExtraFrames = MappingProxyType({}),
    findings: Findings = (),
) -> list[Path]:
    """Write a report in one of `REPORT_FORMATS`, and return the paths of its files.

    Args:
        cells: Results of each model and benchmark in the report.
        report_format: A key of `REPORT_FORMATS`.
        path: A file for `md` and `tex`, a folder otherwise.
        extra: Further data for `csv` and `parquet`: name of a file → data frames of the file.
        findings: Results of studies: answers, tables and charts.

    Returns:
        The paths of the files.

    Raises:
        RequestError: The format needs the package kaleido, which is not installed.
        WorkError: Some figures could not be drawn; the other files are written.
        WorkError: The disk is full or not writable.
    """
    return REPORT_FORMATS[report_format](cells, path, extra, findings)


def _write_markdown(
    cells: Sequence[CellRecord], path: Path, extra: ExtraFrames, findings: Findings
) -> list[Path]:
    sections = ["# Which layers matter", wording.summary(cells)]
    sections += ["## Leaderboards", rule("layers"), rule("models"), rule("intervals")]
    tables, notes = build_boards(cells)
    sections += [*map(markdown_table, tables), *map(escape_markdown, notes)]
    sections += ["## Benchmarks", markdown_table(overview_table(cells))]
    for finding in findings:
        sections += [f"## {escape_markdown(finding.question)}"]
        sections += [f"`{finding.study}` over {escape_markdown(finding.experiment)}"]
        sections += map(escape_markdown, finding.answers)
        sections += map(markdown_table, finding.tables)
        sections += [escape_markdown(f"Could not be said: {line}") for line in finding.lacking]
    write_text(path, "\n\n".join(sections) + "\n")
    return [path]


def _write_latex(
    cells: Sequence[CellRecord], path: Path, extra: ExtraFrames, findings: Findings
) -> list[Path]:
    def render_table(table: Table) -> str:
        styled = text_frame(table).style.hide(axis="index").format(escape="latex")
        styled = styled.format_index(escape="latex", axis="columns")
        text = styled.to_latex(
            hrules=True, position_float="centering", caption=table.title.translate(_LATEX_ESCAPES)
        )
        return text.replace(formats.MINUS, "$-$")  # pdflatex does not support the minus sign

    tables, notes = build_boards(cells)
    rules = [rule("layers"), rule("intervals"), rule("models")]
    notes += [note for board in tables for note in board.notes]
    comments = ["needs \\usepackage{booktabs}", *rules, *notes]
    text = "\n".join(f"% {' '.join(comment.split())}" for comment in comments)
    write_text(path, "\n\n".join([text, *map(render_table, tables)]) + "\n")
    return [path]


def build_boards(cells: Sequence[CellRecord]) -> tuple[list[Table], list[str]]:
    """Build the leaderboards of each model's layers and parts, and a leaderboard of models.

    Returns the tables, and a list of notes on the benchmarks that are left out.
    """
    groups = named_models(cells)
    boards = {name: layer_board(group) for name, group in groups.items()}
    tables = [
        leaderboard.layer_board_table(board, name) for name, board in boards.items() if board.parts
    ]
    for name, group in groups.items():
        tables += [leaderboard.part_board_table(board, name) for board in part_boards(group)]
    left_out = [(name, board.left_out) for name, board in boards.items()]
    if len(boards) > 1:
        models = model_board(cells)
        labels = model_labels([standing.model for standing in models.models])
        tables.append(leaderboard.model_board_table(models, labels))
        left_out.append(("Models", models.left_out))
    return tables, [
        f"{name}: {benchmark} is left out of the ranking: {reason}."
        for name, reasons in left_out
        for benchmark, reason in reasons.items()
    ]


def text_frame(table: Table) -> pd.DataFrame:
    """Convert a table to a data frame of texts, with rounded numbers."""
    rows = [
        [entry_text(*entry).text for entry in zip(row, table.headings, strict=True)]
        for row in table.rows
    ]
    return pd.DataFrame(rows, columns=list(map(heading_text, table.headings)))


def markdown_table(table: Table) -> str:
    """Render a table as Markdown."""
    frame = text_frame(table).map(escape_markdown).rename(columns=escape_markdown)
    text = frame.to_markdown(index=False, disable_numparse=True)
    return "\n\n".join((escape_markdown(table.title), text, *map(escape_markdown, table.notes)))


def _write_data(
    write: Callable[[Iterable[pd.DataFrame], Path], None],
    suffix: str,
    cells: Sequence[CellRecord],
    folder: Path,
    extra: ExtraFrames,
    findings: Findings,
) -> list[Path]:
    paths = []
    frames = {**report_frames(cells), **study_frames(findings)}
    for name, chunks in {**{name: [frame] for name, frame in frames.items()}, **extra}.items():
        path = folder / f"{name}.{suffix}"
        write_atomically(path, partial(write, chunks))
        paths.append(path)
    return paths


def _write_csv(frames: Iterable[pd.DataFrame], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        write_csv(frames, file)


def _write_parquet(frames: Iterable[pd.DataFrame], path: Path) -> None:
    pd.concat(frames).to_parquet(path, index=False)


def _write_images(
    suffix: str, cells: Sequence[CellRecord], folder: Path, extra: ExtraFrames, findings: Findings
) -> list[Path]:
    try:
        import kaleido
    except ImportError:
        raise RequestError(
            f"{suffix} figures need an additional package; type: {extra_command('figures')}"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    drawn_figures = report_figures(cells, findings)
    paths = [folder / f"{name}.{suffix}" for name in drawn_figures]
    for figure in drawn_figures.values():
        # Exported figures have a white background, because they are printed alone.
        figure.update_layout(paper_bgcolor="white", plot_bgcolor="white", font_color="black")
    for path in paths:
        path.unlink(missing_ok=True)
    options = {"format": suffix, "width": 900, "scale": 2}
    errors: Sequence[Exception] = ()
    for _ in range(2):  # a busy browser may exceed its time limit once
        pairs = zip(drawn_figures.values(), paths, strict=True)
        missing = [
            {"fig": figure, "path": path, "opts": options}
            for figure, path in pairs
            if not path.exists()
        ]
        if missing:
            errors = kaleido.write_fig_from_object_sync(missing)
    if n_missing := sum(not path.exists() for path in paths):
        reason = first_line(errors[0]) if errors else "the browser gave no reason"
        verb = "was" if n_missing == 1 else "were"
        raise WorkError(f"{count_text(n_missing, 'figure')} {verb} not drawn: {reason}")
    return paths


REPORT_FORMATS: Mapping[str, Writer] = {
    "md": _write_markdown,
    "tex": _write_latex,
    "csv": partial(_write_data, _write_csv, "csv"),
    "parquet": partial(_write_data, _write_parquet, "parquet"),
    "png": partial(_write_images, "png"),
    "pdf": partial(_write_images, "pdf"),
}
"""Format of a report (other than the HTML page) → function that writes the report."""


def _file_name(*parts: str) -> str:
    return re.sub(r"[^\w.]+", "-", " ".join(parts)).strip("-").lower()
