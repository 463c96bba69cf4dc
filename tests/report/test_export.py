"""Reports for papers and pull requests hold the records' numbers."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from html import unescape

import pandas as pd
import pytest
from markdown_it import MarkdownIt

from tests.helpers.ablations import with_change
from tests.helpers.findings import FINDING
from tracker.analysis.boards import layer_board
from tracker.report.export import export_report, report_figures, report_frames
from tracker.report.frames import correlation_frame, document_frame, layer_frame
from tracker.report.tables import overview_table
from tracker.schema.errors import WorkError
from tracker.schema.estimates import Estimate
from tracker.schema.records import CellRecord
from tracker.schema.tables import Column, build_table
from tracker.schema.text import escape_markdown, markdown_code
from tracker.stats.support import decide_verdicts, widen
from tracker.tracking.runs import cell_note, intact_note, layer_note

from .conftest import LAYERS, build_cell, build_decisions


@pytest.fixture
def two_models() -> list[CellRecord]:
    return [
        build_cell(b, model=m, seed=1) for m in ("base|model", "instruct_50%") for b in ("a", "b")
    ]


@pytest.mark.parametrize(("form", "read"), [("csv", pd.read_csv), ("parquet", pd.read_parquet)])
def test_data_is_read_back(form, read, two_models, tmp_path):
    paths = export_report(two_models, form, tmp_path / "data")
    assert {path.stem for path in paths} == set(report_frames(two_models))
    for path in paths:
        frame, read_frame = report_frames(two_models)[path.stem], read(path)  # type: ignore[operator]
        assert list(read_frame.columns) == list(frame.columns)
        numbers = frame.select_dtypes("float64").columns
        pd.testing.assert_frame_equal(read_frame[numbers], frame[numbers], rtol=1e-15)
    board = read(tmp_path / "data" / f"layer_leaderboard.{form}")  # type: ignore[operator]
    first_standing = layer_board(two_models[:2]).parts[0]
    assert board["layer"][0] == first_standing.layer
    assert board["accuracy_relevance"][0] == pytest.approx(first_standing.relevance.value)
    assert board["accuracy_relevance_low"][0] == pytest.approx(first_standing.relevance.low)
    assert len(board) == 2 * LAYERS


def test_names_are_shown_and_not_obeyed(tmp_path):
    """Was: a page that shows Markdown ran what a name said."""
    name = "<img src=x onerror=alert(1)>\n# a|b"
    cells = [build_cell(b, model=m) for m in (name, "other") for b in (name, "b")]
    cells.append(build_cell(f"{name} c", model=name, correlations=()))  # of which a note is made
    finding = FINDING.model_copy(
        update={"answers": (name,), "experiment": name, "lacking": (name,)}
    )
    (markdown,) = export_report(cells, "md", tmp_path / "r.md", findings=[finding])
    text = markdown.read_text()
    assert "<img" not in text
    assert "&lt;img src=x onerror=alert(1)&gt; # a\\|b" in text
    assert "\n# a" not in text
    (latex,) = export_report(cells, "tex", tmp_path / "r.tex")
    comments, _, tables = latex.read_text().partition("\\begin")
    assert all(line.startswith("%") for line in comments.splitlines() if line)
    assert "\n# a" not in tables
    cell_without_layer = cells[0].model_copy(update={"removed": (3,)})
    for note in (
        cell_note(cells[0]),
        intact_note(cells[0]),
        intact_note(cell_without_layer),
        layer_note(cells[0], cells[0].runs[0]),
    ):
        assert "<img" not in note
        assert "&lt;img" in note


HOSTILE_NAME = (
    "![x](http:evil) [y](javascript:z) <http://evil> http://evil/ www.evil.org `c` \\![a][b]"
)


def render_markdown(text: str) -> tuple[set[str], str]:
    """Render Markdown as CommonMark does, with tables: the tags in it, and its text."""
    page = MarkdownIt("commonmark").enable("table").render(text)
    return set(re.findall(r"<(\w+)", page)), unescape(re.sub(r"<[^>]*>", "", page))


def test_a_name_is_no_link_no_image_and_no_code(tmp_path):
    """Before: a model folder named `![x](http:evil)` was an image in Markdown and MLflow notes."""
    assert render_markdown(escape_markdown(HOSTILE_NAME)) == ({"p"}, f"{HOSTILE_NAME}\n")
    assert render_markdown(markdown_code(f"a{HOSTILE_NAME}")) == (
        {"p", "code"},
        f"a{HOSTILE_NAME.replace('`', '')}\n",
    )
    # What makes addresses of themselves links, as GitHub does, finds none.
    assert not re.search(r"http://|www[.]", escape_markdown(HOSTILE_NAME))
    cells = [
        build_cell(b, model=m, metric=HOSTILE_NAME)
        for m in (HOSTILE_NAME, "other")
        for b in (HOSTILE_NAME, "b")
    ]
    finding = FINDING.model_copy(
        update={"answers": (HOSTILE_NAME,), "question": HOSTILE_NAME, "lacking": (HOSTILE_NAME,)}
    )
    (path,) = export_report(cells, "md", tmp_path / "r.md", findings=[finding])
    cell_without_layer = cells[0].model_copy(update={"removed": (3,)})
    notes = (cell_note(cells[0]), intact_note(cells[0]), intact_note(cell_without_layer))
    for text in (path.read_text(), *notes, layer_note(cells[0], cells[0].runs[0])):
        tags, plain_text = render_markdown(text)
        assert not tags & {"a", "img"}
        assert "![x](http:evil) [y](javascript:z) <http://evil>" in plain_text


FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r")


@pytest.mark.parametrize("sign", FORMULA_SIGNS)
def test_a_spreadsheet_takes_no_text_for_a_formula(sign, tmp_path):
    """Before: `=HYPERLINK(…)` as a model's name was a formula in every row."""
    name = f"{sign}cmd|' /C calc'!A0"
    cell = build_cell(name, model=name)
    decisions = build_decisions(cell)
    texts = [replace(t, text=replace(t.text, question=name)) if t else t for t in decisions.texts]
    documents = document_frame([(cell, replace(decisions, texts=texts))])
    name_table = build_table(
        name, [Column(name, "text", lambda row: row), Column("n", "nats", len)], [name]
    )
    finding = FINDING.model_copy(update={"tables": (name_table,)})
    paths = export_report([cell], "csv", tmp_path, {"documents": [documents]}, [finding])
    n_numbers = 0
    for path in paths:
        with path.open(newline="") as file:
            cells = [entry for row in csv.reader(file) for entry in row]
        entries = [entry for entry in cells if entry.startswith(FORMULA_SIGNS)]
        assert all(re.fullmatch(r"-[\d.e-]+", entry) for entry in entries)
        n_numbers += len(entries)
    assert n_numbers > 10, "negative figures are as they were"
    frame = pd.read_csv(tmp_path / "layers.csv")
    # A carriage return in a name is replaced long before.
    prefix = "" if sign == "\r" else "'"
    assert (frame["model"] == f"{prefix}{cell.model.name}").all()
    assert frame["accuracy_drop"].min() < 0


def test_figures_are_drawn(two_models, tmp_path):
    first_cell = two_models[:1]
    assert len(report_figures(two_models)) > len(report_figures(first_cell)) >= 3
    for form, magic in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        paths = export_report(first_cell, form, tmp_path / form)
        assert {path.stem for path in paths} == set(report_figures(first_cell))
        for path in paths:
            content = path.read_bytes()
            assert content.startswith(magic)
            assert len(content) > 5_000
            if form == "pdf":
                # Only the colour bar of the heat map is made of pixels.
                has_image = b"/Subtype /Image" in content
                assert has_image == path.stem.endswith("heat-map"), "it is a vector figure"


@pytest.mark.parametrize("failures", [1, 2])
def test_figures_that_the_browser_did_not_draw_are_not_reported(
    two_models, tmp_path, monkeypatch, failures
):
    """Kaleido returns its errors: the file that a busy browser did not write was listed."""
    attempts = []

    def write(figures):
        attempts.append([figure["path"].stem for figure in figures])
        drawn = figures[1:] if len(attempts) <= failures else figures
        for figure in drawn:
            figure["path"].write_bytes(b"drawn")
        return () if drawn is figures else (TimeoutError("the browser took 90 s"),)

    monkeypatch.setattr("kaleido.write_fig_from_object_sync", write)
    cells, folder = two_models[:1], tmp_path / "png"
    if failures == 1:
        assert all(path.exists() for path in export_report(cells, "png", folder))
    else:
        with pytest.raises(WorkError, match="1 figure was not drawn: the browser took 90 s"):
            export_report(cells, "png", folder)
    assert len(attempts) == 2
    assert attempts[1] == attempts[0][:1]


def test_a_filter_on_shown_gives_the_layers_that_the_page_shows(cells):
    """Before: nine layers had an interval above 0 where three were shown."""
    frame = layer_frame(cells)
    overview = overview_table(cells)
    (column,) = (n for n, h in enumerate(overview.headings) if "shown to matter" in h.label)
    for cell, row in zip(cells, overview.rows, strict=True):
        rows = frame[frame.benchmark == cell.benchmark.name]
        costly_layers = set(rows[rows.shown == "matters"].layer)
        assert costly_layers == set(map(int, re.findall(r"(\d+)\u00a0\(", str(row[column]))))
        assert 0 < len(costly_layers) < (rows.accuracy_drop_low > 0).sum()
        for standing in layer_board([cell]).parts:  # none where the baseline is at chance
            assert standing.shown == rows.set_index("layer").shown[standing.layer]


def test_parts_of_a_benchmark_are_told_apart():
    """Before: both halves and the whole were `arc_easy`."""
    whole_cell = build_cell()
    cells = [whole_cell] + [
        whole_cell.model_copy(
            update={
                "benchmark": whole_cell.benchmark.model_copy(update={"settings": {"part": part}})
            }
        )
        for part in ("calibration", "test")
    ]
    cell_decisions = [(cell, build_decisions(cell)) for cell in cells]
    for frame in (layer_frame(cells), correlation_frame(cells), document_frame(cell_decisions)):
        assert frame.part.unique().tolist() == ["all", "calibration", "test"]
        assert frame.benchmark.unique().tolist() == ["arc_easy"]


def test_what_is_shown_of_a_run_is_decided_among_its_kind():
    cell = build_cell()
    heads = [
        with_change(run, component="head", number=number)
        for run in cell.runs
        for number in range(9)
    ]
    runs = (*cell.runs, *heads, with_change(cell.runs[0], span=4))
    frame = layer_frame([cell.model_copy(update={"runs": runs})])
    layer_rows = frame[(frame.component == "layer") & (frame.span == 1)]
    assert list(layer_rows.shown) == list(layer_frame([cell]).shown)
    head_rows = frame[frame.component == "head"]
    drops = [run.drop for run in heads]
    expected_verdicts = decide_verdicts(widen(drops, [run.n for run in heads], len(heads)))
    assert list(head_rows.shown == "matters") == [
        verdict == "costs" for verdict in expected_verdicts
    ]
    undefined_run = cell.runs[3].model_copy(update={"drop": Estimate(None)})
    assert layer_frame([cell.model_copy(update={"runs": (undefined_run,)})]).shown.isna().all()
