"""Score a cell both ways and compare every response with the truth."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Collection, Sequence
from typing import Any

import pytest

from tests.helpers.ablations import single_layers
from tests.helpers.engines import VerdictMemory, wrap_model
from tests.helpers.families import VOCABULARY, Family
from tests.helpers.truth import LayerRemover, plain_loglikelihoods, without_layers
from tracker.engine.scoring.model import FULL, Sharing
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck.check import check_sharing
from tracker.schema.documents import Document, Request
from tracker.schema.errors import CellError, ModelError

MAX_LENGTH = 256


LETTER_ANSWERS = ((3,), (4,), (5,), (6,))
"""Answers of one token, as those of mmlu."""


FALSE_REASON = "depend on each other by their numbers"
"""Error of a model whose layers cannot be removed; no model here is one."""


VERDICTS = VerdictMemory()
"""On architectures, each of which is checked once for all documents that are as long."""


def tiny_model_of(family: str, **changes: Any) -> Any:
    """Make a random model of a family of transformers, as those of `families` are."""
    return Family(family, family, changes, FULL, True).model()


class DocumentGenerator:
    """Documents of random tokens."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = random.Random(seed)
        self._n_made = 0

    def draw_tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._generator.randrange(VOCABULARY) for _ in range(count))

    def make_document(
        self, context: Sequence[int], continuations: Sequence[Sequence[int]], gold: int = 0
    ) -> Document:
        self._n_made += 1
        requests = tuple(Request(tuple(context), tuple(answer)) for answer in continuations)
        return Document("task", self._n_made - 1, requests, gold, len(requests))

    def letter_documents(self, lengths: Sequence[int], shared: int = 0) -> list[Document]:
        """Documents with one-token answers, whose contexts have these lengths."""
        common = self.draw_tokens(shared)
        contexts = (common + self.draw_tokens(length - shared) for length in lengths)
        return [self.make_document(context, LETTER_ANSWERS) for context in contexts]

    def long_documents(
        self, contexts: Sequence[int], answers: Sequence[int], shared: int = 0
    ) -> list[Document]:
        """Documents whose contexts and answers have these lengths."""
        common, documents = self.draw_tokens(shared), []
        for length in contexts:
            context = common + self.draw_tokens(length - shared)
            documents.append(self.make_document(context, [self.draw_tokens(n) for n in answers]))
        return documents


def long_documents(
    contexts: Sequence[int], answers: Sequence[int], shared: int = 0, seed: int = 0
) -> list[Document]:
    """Documents of a new generator whose contexts and answers have these lengths."""
    return DocumentGenerator(seed).long_documents(contexts, answers, shared)


def measure_cell(
    model: Any,
    documents: Sequence[Document],
    layers: Collection[int],
    *,
    ablate: LayerRemover = without_layers,
    block: int | None = None,
    row_tokens: int | None = None,
    max_length: int = MAX_LENGTH,
    refusal: str | None = None,
    atol: float = 2e-4,
    notes: str | None = None,
) -> set[Sharing]:
    """Score a cell in both orders, compare every response with the truth, and say what was shared.

    `block` documents are scored at a time, all at once without it. `refusal` is what a refusal must
    say, where the model may be refused. `notes` is what the check must say, in a refusal or in one
    of its fields, where the model itself may give several numbers.
    """
    ablations = single_layers(tuple(layers))
    removed = [ablation.removed() for ablation in ablations]
    expected = plain_loglikelihoods(model, documents, removed, max_length, ablate)
    shared = set()
    for name, step in (("in order", 1), ("in reverse", -1)):
        ordered, truth = documents[::step], expected[::step]
        engine = Engine(wrap_model(copy.deepcopy(model)), max_length, row_tokens=row_tokens)
        try:
            checked = check_sharing(engine, ordered, ablations, VERDICTS)
            size = block or len(ordered)
            blocks = [ordered[start : start + size] for start in range(0, len(ordered), size)]
            scores = [score for part in blocks for score in checked.engine.score(part, ablations)]
        except (CellError, ModelError) as error:
            if refusal is None or FALSE_REASON in str(error) or not re.search(refusal, str(error)):
                pytest.fail(f"{name}: wrongly refused: {error}")
            break  # the other order would be refused alike
        shared.add(checked.engine.sharing)
        rows = [
            (abs(response.loglikelihood - expected), ablation.name, document.index)
            for document, score, expected_rows in zip(ordered, scores, truth, strict=True)
            for ablation, *answers in zip(ablations, score.responses, expected_rows, strict=True)
            for response, expected in zip(*answers, strict=True)
        ]
        text = " ".join(value for value in vars(checked).values() if isinstance(value, str))
        wrong = [row for row in rows if not row[0] <= atol]
        if wrong and not (notes and re.search(notes, text)):
            difference, ablation, index = max(wrong)
            pytest.fail(
                f"{name}: {len(wrong)} of {len(rows)} are wrong, at worst by {difference:.3g} "
                f"nats ({ablation}, document {index}); {checked.engine.sharing}, "
                f"the check saw {checked.difference:.2g} and said {checked.sharing_note}"
            )
    return shared


TRAINED_LENGTH = 64
"""Tokens up to which the rotary factors below are the short ones."""


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0,
    "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": TRAINED_LENGTH,
}  # fmt: skip
