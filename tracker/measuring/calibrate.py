"""Choose calibration texts for fitting the functions that replace layers.

A calibration text is the context and gold continuation of a document. Calibration texts come from
the end of a benchmark's random order, and measured samples from the beginning.

This module also chooses documents to score twice, to measure rounding errors in half precision.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import override

from tracker.benchmarks.base import Benchmark
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.documents import Document
from tracker.schema.errors import CellError
from tracker.schema.extent import Extent, random_order, shuffle_documents
from tracker.schema.grouping import group_by
from tracker.schema.kinds import Action
from tracker.schema.provenance import content_hash

if TYPE_CHECKING:
    from tracker.benchmarks.encoder import RequestEncoder
    from tracker.engine.forward.layer import Replacement
    from tracker.engine.scoring.sweep import Engine


REPEAT_INTERVAL = 64
"""Average number of documents for each document that is computed twice."""
MIN_REPEATED = 4
"""Minimum number of a cell's documents that are computed twice: the first ones of its random
order, because a question that is answered early has measured only these."""


def repeated_documents(documents: Sequence[Document], seed: int) -> set[tuple[str, int]]:
    """Choose documents to score twice, to measure rounding errors in half precision.

    Args:
        documents: The cell's documents. Only documents with two or more options are chosen.
        seed: The seed of the random order of documents.

    Returns:
        (Task, index) of each chosen document.
    """
    closed = [document for document in documents if document.choices > 1]
    draws = {document.key: random.Random("/".join(map(str, document.key))) for document in closed}
    drawn = {key for key, generator in draws.items() if generator.random() < 1 / REPEAT_INTERVAL}
    return drawn | {*shuffle_documents(seed, _group_numbers(closed))[:MIN_REPEATED]}


MIN_TOKENS_PER_DIM = 4
"""Minimum number of tokens per dimension for a linear map; with fewer, the map fits noise."""
TOKENS_PER_DIM = 16
"""Sufficient number of tokens per dimension; further documents are not read."""
FIRST_DOCUMENTS = 64
"""Number of documents that are read first; the number doubles until there are enough tokens."""


class _LastDocuments(Extent):
    """Selection of calibration documents: the last ones in each task's random order."""

    @override
    def select(self, task: str, documents: Sequence[int]) -> Sequence[int]:
        order = random_order(self.seed, task, documents)
        return order[::-1][: min(self.sample or 1, max(1, len(documents) // 2))]


@dataclass(frozen=True)
class CalibrationTexts:
    """Texts for fitting the functions that replace layers.

    Attributes:
        texts: Token ids of each text; a text has at least two tokens.
        documents: Task → numbers of the documents that contain the texts.
        tokens: Total number of tokens that are used for the fit.
    """

    texts: Sequence[Sequence[int]]
    documents: dict[str, list[int]]
    tokens: int

    @property
    def metadata(self) -> dict[str, object]:
        """Description of the texts that is stored with the outcomes."""
        digest = content_hash([list(text) for text in self.texts])
        return {"documents": self.documents, "tokens": self.tokens, "sha256": digest}

    def fit(self, engine: Engine, ablations: Sequence[Ablation]) -> dict[int, Replacement]:
        """Fit the functions that replace layers in ablations, e.g. linear maps.

        Args:
            engine: The engine of the model, after the self-check has set its `quirks`.
            ablations: The ablations; those that replace no layer are ignored.

        Returns:
            Layer number → fitted function that replaces the layer.

        Raises:
            CellError: The texts have too few tokens to fit a linear map.
        """
        from tracker.engine.fitting import fit_replacements

        changes = [change for ablation in ablations for change in ablation.replacements]
        layers = {change.layer for change in changes if change.action.is_fitted}
        has_linear = any(change.action is Action.LINEAR for change in changes)
        width = engine.loaded.model.config.get_text_config().hidden_size
        needed = MIN_TOKENS_PER_DIM * width
        if has_linear and self.tokens < needed:
            raise CellError(
                f"the calibration text has {self.tokens:,} tokens, but fitting a linear map of "
                f"{width:,} dimensions needs {needed:,}; leave 'linear' out of 'intervention', or "
                "use a benchmark with more documents"
            )
        intact = engine.ablate(INTACT)  # state that a call leaves behind stays with the copy
        return dict(fit_replacements(intact, self.texts, layers, has_linear))


def choose_calibration(
    benchmark: Benchmark, encoder: RequestEncoder, width: int
) -> CalibrationTexts:
    """Choose texts for fitting the functions that replace layers.

    Documents are added until there are `TOKENS_PER_DIM` × `width` tokens, or until half of the
    documents are used. `width` is the size of the model's hidden states. Raises CellError if there
    are no tokens.
    """
    from tracker.engine.fitting import first_fitted_tokens

    n_documents = max(1, FIRST_DOCUMENTS // len(benchmark.identity.tasks))
    max_documents = max(task.documents for task in benchmark.identity.tasks) // 2
    while True:
        documents = benchmark.documents(encoder, _LastDocuments(sample=n_documents))
        texts = [_proxy_tokens(document, encoder.max_length) for document in documents]
        texts = [text for text in texts if len(text) > 1]
        starts = first_fitted_tokens(texts)
        tokens = sum(len(text) - start for text, start in zip(texts, starts, strict=True))
        if tokens >= TOKENS_PER_DIM * width or n_documents >= max_documents:
            break
        n_documents *= 2
    if not tokens:
        raise CellError(f"{benchmark.identity.name} has no text for fitting layer replacements")
    return CalibrationTexts(texts, _group_numbers(documents), tokens)


def _group_numbers(documents: Iterable[Document]) -> dict[str, list[int]]:
    by_task = group_by(documents, lambda document: document.task)
    return {task: [document.index for document in group] for task, group in by_task.items()}


def _proxy_tokens(document: Document, max_length: int) -> tuple[int, ...]:
    """Return a document's context and gold continuation, cut to the last `max_length` tokens."""
    request = document.requests[document.gold or 0]
    return (request.context + request.continuation)[-max_length:]
