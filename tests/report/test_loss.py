"""A cell whose metric is a loss is never shown as an accuracy."""

from __future__ import annotations

import re

import pytest

from tracker.core import formats
from tracker.core.records import CellRecord
from tracker.core.tables import EntryText
from tracker.report import caveats, tables, wording
from tracker.report.page import html

from . import drawn as charts
from .conftest import as_read, build_cell

REASON = "bits_per_byte is no accuracy"


@pytest.fixture
def loss() -> CellRecord:
    cell = build_cell("wikitext", baseline_accuracy=3.25)
    metrics = {"bits_per_byte": "bits_per_byte"}
    task = cell.benchmark.tasks[0].model_copy(
        update={"metrics": metrics, "higher_is_better": {"bits_per_byte": False}}
    )
    layers = tuple(
        record.model_copy(
            update={
                "accuracy": 3.25 + record.accuracy_drop,
                "accuracy_relevance": None,
                "mcnemar_p": None,
                "metrics": {"bits_per_byte": 3.25 + record.accuracy_drop},
                "reasons": {"accuracy_relevance": REASON, "mcnemar_p": "not 0/1"},
            }
        )
        for record in cell.runs
    )
    return cell.model_copy(
        update={
            "metric": "bits_per_byte",
            "higher_is_better": False,
            "chance_accuracy": None,
            "baseline_low": 3.1,
            "baseline_high": 3.4,
            "baseline_metrics": {"bits_per_byte": 3.25},
            "runs": layers,
            "benchmark": cell.benchmark.model_copy(update={"tasks": (task,)}),
            "reasons": {"chance_accuracy": REASON},
        }
    )


def test_the_unit_is_the_metrics_own(loss) -> None:
    measure = formats.measure_of(loss)
    assert (measure.level, measure.change) == ("loss", "loss increase")
    assert (measure.unit, measure.level_unit) == ("bits per byte", "bits per byte")
    assert measure.write(0.1234) == "0.123"
    metrics = {"metrics": {"loss": "ratio"}}
    tasks = (loss.benchmark.tasks[0].model_copy(update=metrics),)
    benchmark = loss.benchmark.model_copy(update={"tasks": tasks})
    corpus = loss.model_copy(update={"metric": "loss", "benchmark": benchmark})
    assert formats.measure_of(corpus).unit == "nats a token"
    accuracy = formats.measure_of(build_cell())
    assert (accuracy.change, accuracy.unit, accuracy.write(0.1234)) == (
        "accuracy drop",
        "pp",
        "12.3",
    )


def test_tables(loss) -> None:
    table = as_read(tables.layer_table(loss))
    labels = table.labels
    assert labels[1:4] == [
        "loss without layer (bits per byte)",
        "loss increase (bits per byte)",
        "95 % interval (bits per byte)",
    ]
    first = loss.runs[0]
    assert table.rows[0][1].text == f"{first.accuracy:.3f}"
    assert table.rows[0][2].text == formats.fixed(first.accuracy_drop, 3)
    overview = as_read(tables.overview_table([loss, build_cell()]))
    row, other = overview.rows
    assert row[1].text.endswith("bits_per_byte (bits per byte)")
    assert row[3].text == "3.250 (3.100 to 3.400)"
    assert row[4] == EntryText("–", REASON)
    assert other[3].text.startswith("50.0 (")
    assert "or loss" in overview.labels[3]
    assert "loss increase" in tables.correlation_table(loss).title


def test_charts(loss) -> None:
    title = charts.curve_title(loss)
    assert re.search(r"removing layer \d+ adds most, 0\.\d{3} bits per byte", title)
    assert "removals lower loss" in title
    figure = charts.layer_curve(loss)
    (trace, _) = figure.data
    assert trace.name == "loss increase"
    assert list(trace.y) == [record.accuracy_drop for record in loss.runs]
    assert figure.layout.yaxis.title.text == "loss increase (bits per byte)"
    assert "bits per byte" in trace.hovertext[0]
    scatter = charts.proxy_scatter(loss)
    assert scatter.layout.yaxis.title.text == "loss increase (bits per byte)"


def test_sentences(loss) -> None:
    assert wording.sentence(loss).startswith("Spearman of cosine score and loss increase: ")
    assert caveats.warnings(loss) == ()
    assert "The Spearman correlation of cost and cosine score" in wording.summary([loss])


def test_page(loss) -> None:
    page = html.render_page([loss], {})
    article = page[page.index("<article") : page.index("</article>")]
    words = re.sub(r"<script.*?</script>", "", article, flags=re.DOTALL)
    assert "orange where removal lowers loss" in words
    assert "accuracy drop" not in words
    assert "pp)" not in words
