"""Calibration text: what a layer's stand-ins are fitted on, away from what is measured.

It is the documents at the end of the benchmark's random order, of which a sample is the beginning:
context and gold continuation, as the proxies read them. Their answers are not used as such.

In half precision some documents are computed twice, to see what rounding decides: which ones is
said here too.
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
"""One in so many documents is computed twice."""
LEAST_TWICE = 4
"""Documents of a cell that are at least: the first ones of its random order, which a question that
is answered early has looked at."""


def computed_twice(documents: Sequence[Document], seed: int) -> set[tuple[str, int]]:
    """Draw the documents, as (task, index), that are computed twice in half precision.

    Args:
        documents: The cell's documents. Only those have a margin that have two options.
        seed: Of the documents' random order.

    Returns:
        The same ones each time, and more of them when there are more documents.
    """
    of_task = _numbers(document for document in documents if document.choices > 1)
    every = [(task, index) for task, some in of_task.items() for index in some]
    drawn = {d for d in every if random.Random("/".join(map(str, d))).random() < 1 / RATE}
    return drawn | {*shuffled(seed, of_task)[:LEAST_TWICE]}


LEAST = 4
"""Tokens a dimension that a linear map needs at least: with fewer, it explains noise."""
ENOUGH = 16
"""Tokens a dimension after which no more are read."""
FIRST = 64
"""Documents that are read at first; then twice as many, until it is enough."""


class _End(Extent):
    """Documents of each task from the end of its random order, half of them at most."""

    @override
    def of(self, task: str, documents: Sequence[int]) -> Sequence[int]:
        order = random_order(self.seed, task, documents)
        return order[::-1][: min(self.sample or 1, max(1, len(documents) // 2))]


@dataclass(frozen=True)
class CalibrationTexts:
    """Texts that stand-ins are fitted on.

    Attributes:
        texts: Token ids, two or more of each.
        documents: Task → numbers in its split.
        tokens: How many of the tokens count.
    """

    texts: Sequence[Sequence[int]]
    documents: dict[str, list[int]]
    tokens: int

    @property
    def about(self) -> dict[str, object]:
        """What a shard says of it."""
        digest = content_hash([list(text) for text in self.texts])
        return {"documents": self.documents, "tokens": self.tokens, "sha256": digest}

    def fit(self, engine: Engine, ablations: Sequence[Ablation]) -> dict[int, Replacement]:
        """Fit what some ablations put in the place of layers.

        Args:
            engine: The model, whose quirks are known.
            ablations: What will be done to it.

        Returns:
            Layer → what stands in for it.

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
    """Choose calibration texts: until there are 16 tokens for each of `width` dimensions."""
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
    """Take what the proxies read of a document: its context and gold continuation."""
    request = document.requests[document.gold or 0]
    return (request.context + request.continuation)[-most:]
