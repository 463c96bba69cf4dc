"""Writes a report for papers and pull requests: tables as text or data, charts as figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

import pandas as pd
import plotly.graph_objects as go

from tracker.analysis.boards import layer_board, model_board, part_boards
from tracker.analysis.comparable import benchmark_labels, model_labels, models_of, named_models
from tracker.core import formats
from tracker.core.distribution import install_extra
from tracker.core.errors import RequestError
from tracker.core.findings import FindingRecord
from tracker.core.records import CellRecord
from tracker.core.tables import Table, headed, written
from tracker.core.text import as_markdown
from tracker.ledger.files import write_atomically, write_text
from tracker.report import wording
from tracker.report.charts.cells import cell_charts
from tracker.report.charts.maps import heat_map
from tracker.report.frames import correlation_frame, frame_of, layer_frame, write_csv
from tracker.report.leaderboard import (
    layer_board_data,
    layer_board_table,
    model_board_data,
    model_board_table,
    part_board_data,
    part_board_table,
)
from tracker.report.page.studies import study_charts, study_frames
from tracker.report.tables import overview_table
from tracker.report.wording import rule

_LATEX = str.maketrans(
    {sign: f"\\{sign}" for sign in "&%$#_{}"}
    | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "\n": " "}
)
"""Special characters of LaTeX → their escapes."""
More = Mapping[str, Iterable[pd.DataFrame]]
Found = Sequence[FindingRecord]
Write = Callable[[Sequence[CellRecord], Path, More, Found], list[Path]]


def board_data(cells: Sequence[CellRecord]) -> dict[str, Table]:
    """Build the tables `layer_leaderboard` and `model_leaderboard` for programs.

    `part_leaderboard` is added if heads, experts or spans are ranked.
    """
    found = {
        "layer_leaderboard": layer_board_data([layer_board(group) for group in models_of(cells)]),
        "model_leaderboard": model_board_data(model_board(cells)),
    }
    parts = [
        (name, board) for name, group in named_models(cells).items() for board in part_boards(group)
    ]
    return found | ({"part_leaderboard": part_board_data(parts)} if parts else {})


def frames(cells: Sequence[CellRecord]) -> dict[str, pd.DataFrame]:
    """Build the frames `layers`, `correlations`, and those of `board_data`."""
    boards = {name: frame_of(made) for name, made in board_data(cells).items()}
    return {"layers": layer_frame(cells), "correlations": correlation_frame(cells)} | boards


def figures(cells: Sequence[CellRecord], findings: Found = ()) -> dict[str, go.Figure]:
    """Draw the charts that make sense alone: of studies, heat maps and cells, by file stem."""
    found = {stem: chart.figure() for stem, chart in study_charts(findings).items()}
    for name, group in named_models(cells).items():
        mapped = [cell for cell in group if cell.whole_layers]
        if mapped:
            found[_file_name(name, "heat map")] = heat_map(mapped).figure()
        for cell, label in zip(group, benchmark_labels(group), strict=True):
            for kind, figure in cell_charts(cell).items():
                found[_file_name(name, label, kind)] = figure
    return found


def export(
    cells: Sequence[CellRecord],
    form: str,
    place: Path,
    more: More = MappingProxyType({}),
    findings: Found = (),
) -> list[Path]:
    """Write a report in one of `FORMATS`, and return the files.

    Args:
        cells: The cells.
        form: A key of `FORMATS`.
        place: A file for `md` and `tex`, a folder otherwise.
        more: Further frames for `csv` and `parquet` by name, besides the records' `frames`; each is
            an iterable of consecutive frames.
        findings: Findings of studies: sections in `md`, a frame for each table in `csv` and
            `parquet`, and charts in `png` and `pdf`.

    Returns:
        The files.

    Raises:
        RequestError: The package that draws figures is not installed.
        WorkError: The disk is full or not writable.
    """
    return FORMATS[form](cells, place, more, findings)


def _markdown(cells: Sequence[CellRecord], path: Path, more: More, findings: Found) -> list[Path]:
    parts = ["# Which layers matter", wording.summary(cells)]
    parts += ["## Leaderboards", rule("layers"), rule("models"), rule("intervals")]
    tables, notes = boards(cells)
    parts += [*map(_pipes, tables), *map(as_markdown, notes)]
    parts += ["## Benchmarks", _pipes(overview_table(cells))]
    for each in findings:
        parts += [f"## {as_markdown(each.question)}"]
        parts += [f"`{each.study}` over {as_markdown(each.experiment)}"]
        parts += map(as_markdown, each.answers)
        parts += map(_pipes, each.tables)
        parts += [as_markdown(f"Could not be said: {line}") for line in each.lacking]
    write_text(path, "\n\n".join(parts) + "\n")
    return [path]


def _latex(cells: Sequence[CellRecord], path: Path, more: More, findings: Found) -> list[Path]:
    def table(made: Table) -> str:
        styled = texts(made).style.hide(axis="index").format(escape="latex")
        styled = styled.format_index(escape="latex", axis="columns")
        text = styled.to_latex(
            hrules=True, position_float="centering", caption=made.title.translate(_LATEX)
        )
        return text.replace(formats.MINUS, "$-$")  # pdflatex does not know the sign

    tables, notes = boards(cells)
    notes += [note for made in tables for note in made.notes]
    comments = [
        "needs \\usepackage{booktabs}",
        rule("layers"),
        rule("intervals"),
        rule("models"),
        *notes,
    ]
    text = "\n".join(f"% {' '.join(comment.split())}" for comment in comments)
    write_text(path, "\n\n".join([text, *map(table, tables)]) + "\n")
    return [path]


def boards(cells: Sequence[CellRecord]) -> tuple[list[Table], list[str]]:
    """Build the leaderboards of each model's layers and parts, and of several models.

    Also returns notes on cells and models that do not count, with reasons.
    """
    layers = {name: layer_board(group) for name, group in named_models(cells).items()}
    tables = [layer_board_table(board, name) for name, board in layers.items() if board.parts]
    for name, group in named_models(cells).items():
        tables += [part_board_table(board, name) for board in part_boards(group)]
    notes = [
        f"{name}: {benchmark} does not count: {why}."
        for name, board in layers.items()
        for benchmark, why in board.left_out.items()
    ]
    if len(layers) > 1:
        models = model_board(cells)
        labels = model_labels([one.model for one in models.models])
        tables.append(model_board_table(models, labels))
        notes += [f"Models: {b} does not count: {why}." for b, why in models.left_out.items()]
    return tables, notes


def texts(made: Table) -> pd.DataFrame:
    """Write a table for people."""
    rows = [
        [written(entry, heading).text for entry, heading in zip(row, made.headings, strict=True)]
        for row in made.rows
    ]
    return pd.DataFrame(rows, columns=list(map(headed, made.headings)))


def _pipes(made: Table) -> str:
    """Write a table as Markdown."""
    escaped = texts(made).map(as_markdown).rename(columns=as_markdown)
    text = escaped.to_markdown(index=False, disable_numparse=True)
    return "\n\n".join((as_markdown(made.title), text, *map(as_markdown, made.notes)))


def _data(
    write: Callable[[Iterable[pd.DataFrame], Path], None],
    end: str,
    cells: Sequence[CellRecord],
    folder: Path,
    more: More,
    findings: Found,
) -> list[Path]:
    paths = []
    whole = {**frames(cells), **study_frames(findings)}
    for name, parts in {**{name: [frame] for name, frame in whole.items()}, **more}.items():
        path = folder / f"{name}.{end}"
        write_atomically(path, partial(write, parts))
        paths.append(path)
    return paths


def _write_csv(frames: Iterable[pd.DataFrame], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        write_csv(frames, file)


def _write_parquet(frames: Iterable[pd.DataFrame], path: Path) -> None:
    pd.concat(frames).to_parquet(path, index=False)


def _images(
    end: str, cells: Sequence[CellRecord], folder: Path, more: More, findings: Found
) -> list[Path]:
    try:
        import kaleido
    except ImportError:
        raise RequestError(
            f"{end} figures need a package more; type: {install_extra('figures')}"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    drawn = figures(cells, findings)
    paths = [folder / f"{name}.{end}" for name in drawn]
    for figure in drawn.values():
        # Exported figures have a white background, because they are printed alone.
        figure.update_layout(paper_bgcolor="white", plot_bgcolor="white", font_color="black")
    kaleido.write_fig_from_object_sync(
        [
            {"fig": figure, "path": path, "opts": {"format": end, "width": 900, "scale": 2}}
            for figure, path in zip(drawn.values(), paths, strict=True)
        ]
    )
    return paths


FORMATS: Mapping[str, Write] = {
    "md": _markdown,
    "tex": _latex,
    "csv": partial(_data, _write_csv, "csv"),
    "parquet": partial(_data, _write_parquet, "parquet"),
    "png": partial(_images, "png"),
    "pdf": partial(_images, "pdf"),
}
"""Formats of a report, besides the page → functions that write them."""


def _file_name(*parts: str) -> str:
    return re.sub(r"[^\w.]+", "-", " ".join(parts)).strip("-").lower()
