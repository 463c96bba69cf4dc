"""A cell whose metric is a loss is never shown as an accuracy."""

from __future__ import annotations

from tests.helpers import charts
from tests.helpers.ablations import with_figures
from tracker.core import formats
from tracker.core.estimates import Estimate
from tracker.core.records import CellRecord
from tracker.report.page import html

from .conftest import build_cell

REASON = "bits_per_byte is no accuracy"


def loss() -> CellRecord:
    cell = build_cell("wikitext")
    metrics = {"bits_per_byte": "bits_per_byte"}
    task = cell.benchmark.tasks[0].model_copy(
        update={"metrics": metrics, "higher_is_better": {"bits_per_byte": False}}
    )
    layers = tuple(
        with_figures(
            record,
            accuracy=3.25 + record.drop.value,
            accuracy_relevance=None,
            mcnemar_p=None,
            metrics={"bits_per_byte": 3.25 + record.drop.value},
            reasons={"accuracy_relevance": REASON, "mcnemar_p": "not 0/1"},
        )
        for record in cell.runs
    )
    return cell.model_copy(
        update={
            "metric": "bits_per_byte",
            "higher_is_better": False,
            "chance_accuracy": None,
            "baseline": Estimate(3.25, 3.1, 3.4),
            "baseline_metrics": {"bits_per_byte": 3.25},
            "runs": layers,
            "benchmark": cell.benchmark.model_copy(update={"tasks": (task,)}),
            "reasons": {"chance_accuracy": REASON},
        }
    )


def test_a_corpus_has_a_unit_of_its_own() -> None:
    cell = loss()
    (task,) = cell.benchmark.tasks
    tasks = (task.model_copy(update={"metrics": {"loss": "ratio"}}),)
    benchmark = cell.benchmark.model_copy(update={"tasks": tasks})
    corpus = cell.model_copy(update={"metric": "loss", "benchmark": benchmark})
    assert formats.measure_of(corpus).unit == "nats a token"


def test_charts_are_in_the_unit_of_the_loss() -> None:
    cell = loss()
    figure = charts.layer_curve(cell)
    assert list(figure.data[0].y) == [record.drop.value for record in cell.runs]
    for chart in (figure, charts.proxy_scatter(cell)):
        assert chart.layout.yaxis.title.text == "loss increase (bits per byte)"


def test_the_page_has_no_word_of_accuracy() -> None:
    page = html.render_page([loss()], {})
    article = page[page.index("<article") : page.index("</article>")]
    assert "orange where removal lowers loss" in article
    assert "accuracy drop" not in article
    assert "pp)" not in article
