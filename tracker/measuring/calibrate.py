"""Choose calibration text for fitted replacements of layers, apart from measured documents.

It consists of documents from the end of the benchmark's random order, whose beginning is a sample:
context and gold continuation, as for the proxies. Their answers are not used as labels.

In half precision, some documents are computed twice to measure the effect of rounding. They are
chosen here too.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import override

from tracker.benchmarks.base import Benchmark
from tracker.core.changes import INTACT, Ablation
from tracker.core.documents import Document
from tracker.core.errors import CellError
from tracker.core.extent import Extent, random_order, shuffled
from tracker.core.grouping import grouped
from tracker.core.kinds import Action
from tracker.core.provenance import content_hash

if TYPE_CHECKING:
    from tracker.benchmarks.encoder import RequestEncoder
    from tracker.engine.forward.layer import Replacement
    from tracker.engine.scoring.sweep import Engine


RATE = 64
"""One document in this number is computed twice."""
LEAST_TWICE = 4
"""Minimum number of documents of a cell that are computed twice: the first ones of its random
order, which a question that is answered early has used."""


def computed_twice(documents: Sequence[Document], seed: int) -> set[tuple[str, int]]:
    """Choose the documents, as (task, index), that are computed twice in half precision.

    Args:
        documents: The cell's documents. Only those with two or more options are chosen.
        seed: The seed of the documents' random order.

    Returns:
        The same documents in every call, and additional ones if there are more documents.
    """
    of_task = _numbers(document for document in documents if document.choices > 1)
    every = [(task, index) for task, some in of_task.items() for index in some]
    drawn = {d for d in every if random.Random("/".join(map(str, d))).random() < 1 / RATE}
    return drawn | {*shuffled(seed, of_task)[:LEAST_TWICE]}


LEAST = 4
"""Minimum number of tokens per dimension for a linear map; with fewer, it fits noise."""
ENOUGH = 16
"""Sufficient number of tokens per dimension, after which no more are read."""
FIRST = 64
"""Number of documents that are read first; it is doubled until there are enough tokens."""


class _End(Extent):
    """Documents from the end of each task's random order, at most half of the task."""

    @override
    def of(self, task: str, documents: Sequence[int]) -> Sequence[int]:
        order = random_order(self.seed, task, documents)
        return order[::-1][: min(self.sample or 1, max(1, len(documents) // 2))]


@dataclass(frozen=True)
class CalibrationTexts:
    """Texts on which replacements of layers are fitted.

    Attributes:
        texts: Token ids, at least two per text.
        documents: Task → numbers of its documents.
        tokens: Number of tokens that are used.
    """

    texts: Sequence[Sequence[int]]
    documents: dict[str, list[int]]
    tokens: int

    @property
    def about(self) -> dict[str, object]:
        """The description of the texts in a shard's metadata."""
        digest = content_hash([list(text) for text in self.texts])
        return {"documents": self.documents, "tokens": self.tokens, "sha256": digest}

    def fit(self, engine: Engine, ablations: Sequence[Ablation]) -> dict[int, Replacement]:
        """Fit the replacements of layers that some ablations use.

        Args:
            engine: The engine of the model, with known quirks.
            ablations: The ablations.

        Returns:
            Layer → its replacement.

        Raises:
            CellError: The text is too short for a linear map.
        """
        from tracker.engine.fitting import fit

        asked = [(change.action, change.layer) for each in ablations for change in each.replaced]
        layers = {layer for action, layer in asked if action.is_fitted}
        linear = any(action is Action.LINEAR for action, _ in asked)
        width = engine.loaded.model.config.get_text_config().hidden_size
        if linear and self.tokens < LEAST * width:
            raise CellError(
                f"the calibration text has {self.tokens:,} tokens, and a linear map of {width:,} "
                f"dimensions needs {LEAST * width:,}: leave 'linear' out of 'intervention', or "
                "take a benchmark with more documents"
            )
        alone = engine.without(INTACT)  # whatever a call leaves behind stays with the copy
        return dict(fit(alone, self.texts, layers, linear))


def calibration(benchmark: Benchmark, encoder: RequestEncoder, width: int) -> CalibrationTexts:
    """Choose calibration texts with `ENOUGH` tokens per dimension, or half of all documents."""
    from tracker.engine.fitting import first_tokens

    each = max(1, FIRST // len(benchmark.identity.tasks))
    most = max(task.documents for task in benchmark.identity.tasks) // 2
    while True:
        documents = benchmark.documents(encoder, _End(sample=each))
        texts = [text for one in documents if len(text := _text(one, encoder.max_length)) > 1]
        starts = first_tokens(texts)
        tokens = sum(len(text) - start for text, start in zip(texts, starts, strict=True))
        if tokens >= ENOUGH * width or each >= most:
            break
        each *= 2
    if not tokens:
        raise CellError(f"{benchmark.identity.name} has no text to fit anything on")
    return CalibrationTexts(texts, _numbers(documents), tokens)


def _numbers(documents: Iterable[Document]) -> dict[str, list[int]]:
    by_task = grouped(documents, lambda document: document.task)
    return {task: [document.index for document in some] for task, some in by_task.items()}


def _text(document: Document, most: int) -> tuple[int, ...]:
    """Return a document's tokens as the proxies read them: context and gold continuation."""
    request = document.requests[document.gold or 0]
    return (request.context + request.continuation)[-most:]
