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
from tracker.core.estimates import Estimate
from tracker.core.records import CellRecord
from tracker.core.tables import Column, table
from tracker.core.text import as_code, as_markdown
from tracker.report.export import export, figures, frames
from tracker.report.frames import correlation_frame, document_frame, layer_frame
from tracker.report.tables import overview_table
from tracker.stats.support import together, verdicts
from tracker.tracking.runs import cell_note, intact_note, layer_note

from .conftest import LAYERS, build_cell, build_decisions


@pytest.fixture
def two_models() -> list[CellRecord]:
    return [
        build_cell(b, model=m, seed=1) for m in ("base|model", "instruct_50%") for b in ("a", "b")
    ]


@pytest.mark.parametrize(("form", "read"), [("csv", pd.read_csv), ("parquet", pd.read_parquet)])
def test_data_is_read_back(form, read, two_models, tmp_path):
    paths = export(two_models, form, tmp_path / "data")
    assert {path.stem for path in paths} == set(frames(two_models))
    for path in paths:
        frame, back = frames(two_models)[path.stem], read(path)  # type: ignore[operator]
        assert list(back.columns) == list(frame.columns)
        numbers = frame.select_dtypes("float64").columns
        pd.testing.assert_frame_equal(back[numbers], frame[numbers], rtol=1e-15)
    board = read(tmp_path / "data" / f"layer_leaderboard.{form}")  # type: ignore[operator]
    first = layer_board(two_models[:2]).parts[0]
    assert board["layer"][0] == first.layer
    assert board["accuracy_relevance"][0] == pytest.approx(first.relevance.value)
    assert board["accuracy_relevance_low"][0] == pytest.approx(first.relevance.low)
    assert len(board) == 2 * LAYERS


def test_names_are_shown_and_not_obeyed(tmp_path):
    """Was: a page that shows Markdown ran what a name said."""
    name = "<img src=x onerror=alert(1)>\n# a|b"
    cells = [build_cell(b, model=m) for m in (name, "other") for b in (name, "b")]
    cells.append(build_cell(f"{name} c", model=name, correlations=()))  # of which a note is made
    one = FINDING.model_copy(update={"answers": (name,), "experiment": name, "lacking": (name,)})
    (markdown,) = export(cells, "md", tmp_path / "r.md", findings=[one])
    text = markdown.read_text()
    assert "<img" not in text
    assert "&lt;img src=x onerror=alert(1)&gt; # a\\|b" in text
    assert "\n# a" not in text
    (latex,) = export(cells, "tex", tmp_path / "r.tex")
    comments, _, tables = latex.read_text().partition("\\begin")
    assert all(line.startswith("%") for line in comments.splitlines() if line)
    assert "\n# a" not in tables
    without = cells[0].model_copy(update={"removed": (3,)})
    for note in (
        cell_note(cells[0]),
        intact_note(cells[0]),
        intact_note(without),
        layer_note(cells[0], cells[0].runs[0]),
    ):
        assert "<img" not in note
        assert "&lt;img" in note


EVIL = "![x](http:evil) [y](javascript:z) <http://evil> http://evil/ www.evil.org `c` \\![a][b]"


def rendered(text: str) -> tuple[set[str], str]:
    """Render Markdown as CommonMark does, with tables: the tags in it, and its text."""
    page = MarkdownIt("commonmark").enable("table").render(text)
    return set(re.findall(r"<(\w+)", page)), unescape(re.sub(r"<[^>]*>", "", page))


def test_a_name_is_no_link_no_image_and_no_code(tmp_path):
    """Before: a model folder named `![x](http:evil)` was an image in Markdown and MLflow notes."""
    assert rendered(as_markdown(EVIL)) == ({"p"}, f"{EVIL}\n")
    assert rendered(as_code(f"a{EVIL}")) == ({"p", "code"}, f"a{EVIL.replace('`', '')}\n")
    # What makes addresses of themselves links, as GitHub does, finds none.
    assert not re.search(r"http://|www[.]", as_markdown(EVIL))
    cells = [build_cell(b, model=m, metric=EVIL) for m in (EVIL, "other") for b in (EVIL, "b")]
    one = FINDING.model_copy(update={"answers": (EVIL,), "question": EVIL, "lacking": (EVIL,)})
    (path,) = export(cells, "md", tmp_path / "r.md", findings=[one])
    without = cells[0].model_copy(update={"removed": (3,)})
    notes = (cell_note(cells[0]), intact_note(cells[0]), intact_note(without))
    for text in (path.read_text(), *notes, layer_note(cells[0], cells[0].runs[0])):
        tags, shown = rendered(text)
        assert not tags & {"a", "img"}
        assert "![x](http:evil) [y](javascript:z) <http://evil>" in shown


SIGNS = ("=", "+", "-", "@", "\t", "\r")


@pytest.mark.parametrize("sign", SIGNS)
def test_a_spreadsheet_takes_no_text_for_a_formula(sign, tmp_path):
    """Before: `=HYPERLINK(…)` as a model's name was a formula in every row."""
    name = f"{sign}cmd|' /C calc'!A0"
    cell = build_cell(name, model=name)
    decided = build_decisions(cell)
    texts = [replace(t, text=replace(t.text, question=name)) if t else t for t in decided.texts]
    documents = document_frame([(cell, replace(decided, texts=texts))])
    made = table(name, [Column(name, "text", lambda row: row), Column("n", "nats", len)], [name])
    one = FINDING.model_copy(update={"tables": (made,)})
    paths = export([cell], "csv", tmp_path, {"documents": [documents]}, [one])
    numbers = 0
    for path in paths:
        with path.open(newline="") as file:
            cells = [entry for row in csv.reader(file) for entry in row]
        entries = [entry for entry in cells if entry.startswith(SIGNS)]
        assert all(re.fullmatch(r"-[\d.e-]+", entry) for entry in entries)
        numbers += len(entries)
    assert numbers > 10, "negative figures are as they were"
    frame = pd.read_csv(tmp_path / "layers.csv")
    # A carriage return in a name is replaced long before.
    begin = "" if sign == "\r" else "'"
    assert (frame["model"] == f"{begin}{cell.model.name}").all()
    assert frame["accuracy_drop"].min() < 0


def test_figures_are_drawn(two_models, tmp_path):
    one = two_models[:1]
    assert len(figures(two_models)) > len(figures(one)) >= 3
    for form, begin in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        paths = export(one, form, tmp_path / form)
        assert {path.stem for path in paths} == set(figures(one))
        for path in paths:
            content = path.read_bytes()
            assert content.startswith(begin)
            assert len(content) > 5_000
            if form == "pdf":
                # Only the colour bar of the heat map is made of pixels.
                pixels = b"/Subtype /Image" in content
                assert pixels == path.stem.endswith("heat-map"), "it is a vector figure"


def test_a_filter_on_shown_gives_the_layers_that_the_page_shows(cells):
    """Before: nine layers had an interval above 0 where three were shown."""
    frame = layer_frame(cells)
    overview = overview_table(cells)
    (column,) = (n for n, h in enumerate(overview.headings) if "shown to matter" in h.label)
    for cell, row in zip(cells, overview.rows, strict=True):
        rows = frame[frame.benchmark == cell.benchmark.name]
        matter = set(rows[rows.shown == "matters"].layer)
        assert matter == set(map(int, re.findall(r"(\d+)\u00a0\(", str(row[column]))))
        assert 0 < len(matter) < (rows.accuracy_drop_low > 0).sum()
        for standing in layer_board([cell]).parts:  # none where the baseline is at chance
            assert standing.shown == rows.set_index("layer").shown[standing.layer]


def test_parts_of_a_benchmark_are_told_apart():
    """Before: both halves and the whole were `arc_easy`."""
    whole = build_cell()
    cells = [whole] + [
        whole.model_copy(
            update={"benchmark": whole.benchmark.model_copy(update={"settings": {"part": part}})}
        )
        for part in ("calibration", "test")
    ]
    decided = [(cell, build_decisions(cell)) for cell in cells]
    for frame in (layer_frame(cells), correlation_frame(cells), document_frame(decided)):
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
    layers = frame[(frame.component == "layer") & (frame.span == 1)]
    assert list(layers.shown) == list(layer_frame([cell]).shown)
    of_heads = frame[frame.component == "head"]
    family = [run.drop for run in heads]
    decided = verdicts(together(family, [run.n for run in heads], len(heads)))
    assert list(of_heads.shown == "matters") == [verdict == "costs" for verdict in decided]
    undefined = cell.runs[3].model_copy(update={"drop": Estimate(None)})
    assert layer_frame([cell.model_copy(update={"runs": (undefined,)})]).shown.isna().all()
