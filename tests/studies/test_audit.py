"""The audit: on a tiny model through the whole house, and on cells whose truth is known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.ablations import single_layers
from tracker import api
from tracker.engine.streams import plan_streams
from tracker.errors import RequestError
from tracker.findings import FindingRecord
from tracker.measuring import observing
from tracker.measuring.derive import record_of
from tracker.metrics.budgets import Measure
from tracker.records import CellRecord
from tracker.studies.audit import Audit, answers_of, lacking_of
from tracker.studies.audit.charts import charts_of
from tracker.studies.audit.figures import ModelAudit
from tracker.studies.audit.measures import DROP, NAMES, Audited, passes
from tracker.studies.audit.tables import tables_of

from .conftest import asked_for, row_of, stores

LAYERS = 21


def _study(path: Path, results: Path) -> FindingRecord:
    return api.study("audit", path, results=results, track=()).finding


def _records(path: Path, results: Path) -> list[CellRecord]:
    requests = asked_for(path, results).experiment.cells()
    pairs = zip(requests, stores(path, results), strict=True)
    return [record_of(store, store.views.of(request)) for request, store in pairs]


def test_a_file_is_measured_observed_once_and_said(
    tiny_llama, experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = experiment(
        tiny_llama(layers=7),
        limit=None,
        sample=16,
        benchmark=["arc_easy", "openbookqa"],
        layer=list(range(7)),
    )
    results = tmp_path / "results"
    said = _study(path, results)
    best, each, apart = said.tables[:3]
    assert {row[0].value for row in best.rows} == set(NAMES.values())
    assert len(each.rows) == 2 * len(NAMES), said.lacking
    # The page's own correlations are the same figures.
    for record in _records(path, results):
        for known in record.correlations:
            row = row_of(each, f"{record.benchmark.name} · 0-shot", NAMES[known.proxy])
            column = known.coefficient.capitalize()
            if known.subset == "inner":
                if known.coefficient == "spearman":
                    assert row["inner layers"].value == known.value
                continue
            assert row[column].value == pytest.approx(known.value, abs=1e-12)
            if known.coefficient == "spearman":
                ends = (row["Spearman"].low, row["Spearman"].high, row["p"].value)
                assert ends == (known.low, known.high, known.p_value)
    mean = np.mean([row[2].value for row in each.rows if row[1].value == "KL divergence"])
    assert row_of(best, "KL divergence")["mean Spearman"].value == pytest.approx(mean)
    assert row_of(best, "KL divergence")["passes, shared"].value == 4
    assert row_of(apart, "KL divergence")["by chance"].value == pytest.approx(6 / 7, abs=0.15)
    assert row_of(apart, "KL divergence")["majorly by chance"].value < 0.7
    assert said.assumptions
    page = (results / "report.html").read_text()
    assert "what a proxy predicts for what it costs" in page

    monkeypatch.setattr(observing, "open_model", lambda *given: pytest.fail("loaded again"))
    assert _study(path, results) == said


def test_one_benchmark_says_what_is_lacking(tiny_llama, experiment, tmp_path: Path) -> None:
    path = experiment(tiny_llama(), limit=None, sample=8, layer=[0, 2, 3])
    said = _study(path, tmp_path / "results")
    (line,) = said.lacking
    assert "claim 3" in line
    assert "add e.g. benchmark: {values: [arc_easy, piqa, hellaswag]}" in line
    # Four layers have no inner ones.
    assert row_of(said.tables[0], "cosine score")["inner layers"].reason


def test_what_is_asked_for_is_whole_layers_of_the_intact_model(
    tiny_llama, experiment, tmp_path: Path
) -> None:
    model = tiny_llama()
    path = experiment(
        model,
        component=["layer", "attention"],
        span=[1, 2],
        removed=[[1], [2]],
        intervention=["mean", "remove"],
        limit=4,
    )
    (cell,) = Audit().requests(asked_for(path, tmp_path))
    assert (cell.components, cell.spans, cell.removed) == (("layer",), (1,), ())
    assert cell.interventions == ("remove",)
    assert cell.layers == (0, 1, 2, 3)
    path = experiment(model, layer=[1, 2])
    with pytest.raises(RequestError, match=r"fewer than three; write e.g. layer"):
        Audit().requests(asked_for(path, tmp_path))


@pytest.mark.parametrize("layers", [1, 4, 30])
def test_prices_are_the_passes_of_the_plan(layers: int) -> None:
    plan = plan_streams(single_layers(range(layers)), layers)
    assert passes(DROP, layers, shared=True) == plan.layer_passes / layers
    assert passes("js", layers, shared=False) == (layers + layers * (layers - 1)) / layers
    assert [passes(name, layers, shared=True) for name in ("cosine_score", "gate_gradient")] == [
        1,
        3,
    ]


class Drawn(Audited):
    """A cell of 0/1 outcomes drawn from known drops, and a proxy that is one of several."""

    def __init__(self, label: str, truth: np.ndarray, documents: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        layers = len(truth)
        before = generator.random(documents) < 0.7
        after = before[:, None] & (generator.random((documents, layers)) >= truth / 0.7)
        self.label, self.layers, self.tasks = label, list(range(layers)), ["task"] * documents
        self.strata = None
        self.inner = self.layers[2:-2]
        ones = np.ones(documents) / documents
        self.drop = Measure(before[:, None] * 1.0 - after, ones, passes(DROP, layers, shared=True))
        # Every proxy is alike in all benchmarks, nearly without noise, and orders layers weakly.
        profile = np.sin(np.arange(layers) * 1.7) + np.linspace(0, 1, layers)
        self.measures = {
            name: Measure(
                profile + 0.01 * generator.standard_normal((documents, layers)),
                ones,
                passes(name, layers, shared=True),
            )
            for name in NAMES
        }
        lost = self.drop.means() / (before.mean() - 0.25)
        runs: Any = [SimpleNamespace(accuracy_relevance=float(each)) for each in lost]
        model = SimpleNamespace(layers=layers)
        self.record: Any = SimpleNamespace(n=documents, model=model, whole_layers=runs)


SAME = np.linspace(0, 0.4, LAYERS)


def test_noise_of_documents_is_no_dependence_on_the_task() -> None:
    """Claim 3 by the raw variances, and not by what is left without noise."""
    cells = [Drawn(f"b{i}", SAME, 100, i) for i in range(6)]
    audit = ModelAudit("m", cells)
    drop, cosine = audit.spreads[DROP], audit.spreads["cosine_score"]
    assert drop.raw > 0.05 > 0.01 > cosine.raw
    assert cosine.raw_test is not None
    assert cosine.raw_test.block_p < 0.05
    assert drop.clean == pytest.approx(0, abs=0.04)
    # Relevance is the drop on another scale.
    assert audit.spreads["relevance"].raw == pytest.approx(drop.raw)
    (said,) = (line for line in answers_of(audit) if "z-scored" in line)
    assert said.startswith("m: the paper's third claim holds with the noise alone")
    assert not lacking_of(audit)


def test_what_depends_on_the_task_is_found() -> None:
    truths = [np.random.default_rng(i).permutation(SAME) for i in range(6)]
    audit = ModelAudit("m", [Drawn(f"b{i}", truth, 300, i) for i, truth in enumerate(truths)])
    drop, cosine = audit.spreads[DROP], audit.spreads["cosine_score"]
    assert drop.clean == pytest.approx(1, abs=0.3)
    assert cosine.clean == pytest.approx(0, abs=0.02)
    assert cosine.clean_test is not None
    assert cosine.clean_test.p_value < 0.01
    (said,) = (line for line in answers_of(audit) if "z-scored" in line)
    assert "relevance depends on the task more than cosine says" in said


def test_few_layers_decide_nothing_of_the_third_claim() -> None:
    audit = ModelAudit("m", [Drawn(f"b{i}", SAME[:9], 200, i) for i in range(4)])
    (said,) = (line for line in answers_of(audit) if "z-scored" in line)
    assert "leave the paper's third claim open" in said


def test_too_few_documents_say_how_many_it_takes() -> None:
    audit = ModelAudit("m", [Drawn(f"b{i}", SAME / 8, 30, i) for i in range(3)])
    assert audit.spreads[DROP].clean is None
    (line,) = lacking_of(audit)
    assert "raise sample:" in line
    assert "and has 30" in line


def test_a_proxy_that_cannot_be_said_has_its_reason_and_the_others_their_place() -> None:
    cells = [Drawn(f"b{i}", SAME, 60, i) for i in range(2)]
    for cell in cells:
        cell.measures["gate_gradient"] = Measure(np.full((60, LAYERS), np.nan), np.ones(60), 3)
        cell.measures["kl"] = Measure(np.ones((60, LAYERS)), np.ones(60), 3)
    audit = ModelAudit("m", cells)
    best, each, *_ = tables_of(audit)
    assert "autograd cannot" in row_of(best, "first-order Taylor")["mean Spearman"].reason
    assert "the same in all" in row_of(each, "b0", "KL divergence")["Spearman"].reason
    assert "first-order Taylor" not in audit.spreads
    assert all(s.proxy not in ("kl", "gate_gradient") for s in audit.summaries)
    assert charts_of(audit)


def test_a_layer_order_that_is_the_drops_own_is_called_best() -> None:
    cells = [Drawn(f"b{i}", SAME, 120, i) for i in range(3)]
    for cell in cells:
        cell.measures["js"] = Measure(np.tile(SAME, (120, 1)), np.ones(120), 6.5)
    audit = ModelAudit("m", cells)
    assert audit.summaries[0].proxy == "js"
    assert audit.summaries[0].spearman > 0.9
    assert audit.adjusted["js"] < 0.05
    row = row_of(tables_of(audit)[0], "Jensen–Shannon divergence")
    assert row["top-5 overlap"].value > 0.7
    assert row["by chance"].value == pytest.approx(5 / LAYERS)
    assert any("orders the layers best" in line for line in answers_of(audit))
