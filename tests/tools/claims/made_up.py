"""Results folders of made-up outcomes, of which it is known which layers matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import outcome_row
from tracker.ledger.store import Ledger
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.config import cell_request
from tracker.schema.documents import Document, Response
from tracker.schema.extent import ALL_DOCUMENTS
from tracker.schema.identities import BenchmarkIdentity, ModelIdentity, TaskIdentity

LAYERS = 16
OPTIONS = 4
BENCHMARKS = ("arc_easy", "openbookqa")
N_ALIKE = 10
"""So many seeds, from a multiple of it on, make models that differ by chance alone."""
THREE_LAYERS = {0: 4.0, 3: 3.0, 7: 2.0}
"""Three layers that matter, by how many nats their removal lowers the right option."""


def write_results(
    folder: Path,
    seed: int,
    costs: Mapping[int, float],
    documents: int = 100,
    name: str = "made-up",
    pairs: int = 0,
) -> None:
    """Measure a made-up model on two benchmarks, without and with each of its layers removed.

    A document's options have scores that the intact model and every other one see with errors of
    their own, drawn alike: without a layer that costs nothing, every figure is what it was but for
    chance, in both directions. A layer that costs lowers the score of the right option.

    Args:
        folder: Where to.
        seed: Of all that is drawn.
        costs: Layer → by how much its removal lowers the score of right options, in nats.
        documents: Of each benchmark.
        name: The model's.
        pairs: Of so many first layers every two are removed together as well.
    """
    generator = np.random.default_rng(seed)
    ledger = Ledger(folder)
    ledger.create()
    model = ModelIdentity(
        source="made up",
        name=name,
        revision=None,
        fingerprint=sha256(name.encode()).hexdigest(),
        architecture="LlamaForCausalLM",
        layers=LAYERS,
        parameters=1000,
        dtype="float32",
    )
    # One size of errors for all models: a larger one would cost accuracy by itself.
    sizes = np.random.default_rng(seed // N_ALIKE).choice([0.2, 1.0], len(BENCHMARKS))
    for benchmark_name, size in zip(BENCHMARKS, sizes, strict=True):
        task = TaskIdentity(
            name=benchmark_name,
            version="1.0",
            split="test",
            documents=documents,
            fingerprint="a" * 64,
            metrics={"acc": "mean"},
        )
        benchmark = BenchmarkIdentity(
            name=benchmark_name,
            tasks=(task,),
            data="hub",
            num_fewshot=0,
            seed=None,
            apply_chat_template=False,
            primary_metric="acc",
        )
        store = ledger.open_cell(model, benchmark, {"torch": "2"})
        _write_outcomes(store, generator, costs, documents, size, pairs)
        request = cell_request(model="m", benchmark=benchmark_name, layers=tuple(range(LAYERS)))
        store.views.add_request(request, "layers")


def draw_scores(
    generator: np.random.Generator,
    sets: Sequence[tuple[int, ...]],
    costs: Mapping[int, float],
    documents: int,
    size: float,
) -> tuple[NDArray[np.int64], list[NDArray[np.float64]]]:
    """Draw which options are right, and scores of all options without some sets of layers."""
    gold = generator.integers(0, OPTIONS, documents)
    truth = generator.normal(-8, 2, (documents, OPTIONS))
    truth[np.arange(documents), gold] += 1.5
    scores = [truth + generator.normal(0, size, truth.shape) for _ in sets]
    for removed, table in zip(sets, scores, strict=True):
        table[np.arange(documents), gold] -= sum(costs.get(layer, 0.0) for layer in removed)
    return gold, scores


def _write_outcomes(
    store: CellStore,
    generator: np.random.Generator,
    costs: Mapping[int, float],
    documents: int,
    size: float,
    pairs: int,
) -> None:
    (task,) = store.identity.benchmark.tasks
    sets = [(), *((layer,) for layer in range(LAYERS)), *combinations(range(pairs), 2)]
    gold, tables = draw_scores(generator, sets, costs, documents, size)
    scores = {
        Ablation.from_changes(removed=removed).name: table
        for removed, table in zip(sets, tables, strict=True)
    }
    cosine = 10 * generator.uniform(0.9, 1, LAYERS)
    proxies = (10, [cosine.tolist(), [1.0] * LAYERS, [1.0] * LAYERS])
    for block in store.blocks(ALL_DOCUMENTS):
        rows = [
            outcome_row(
                Document(task.name, doc, requests=(), gold=int(gold[doc]), choices=OPTIONS),
                name,
                [Response(float(score), False, 0) for score in table[doc]],
                {"acc": float(table[doc].argmax() == gold[doc])},
                proxies if name == INTACT.name else None,
            )
            for doc in store.documents(block, ALL_DOCUMENTS)
            for name, table in scores.items()
        ]
        store.write(block, rows, {"device": "cpu"})
