"""Score a cell both ways and compare every response with the truth."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Collection, Sequence
from typing import Any

import pytest

from tests.helpers.ablations import single_layers
from tests.helpers.engines import Memory, loaded
from tests.helpers.families import VOCABULARY, Family
from tests.helpers.truth import Without, truths, without
from tracker.core.documents import Document, Request
from tracker.core.errors import CellError, ModelError
from tracker.engine.scoring.model import FULL, Sharing
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck.check import check

MAX_LENGTH = 256


LETTERS = ((3,), (4,), (5,), (6,))
"""Answers of one token, as those of mmlu."""


FALSE_REASON = "depend on each other by their numbers"
"""Error of a model whose layers cannot be removed; no model here is one."""


VERDICTS = Memory()
"""On architectures, each of which is checked once for all documents that are as long."""


def tiny(family: str, **changes: Any) -> Any:
    """Make a random model of a family of transformers, as those of `families` are."""
    return Family(family, family, changes, FULL, True).model()


class Draw:
    """Documents of random tokens."""

    def __init__(self, seed: int = 0) -> None:
        self._draw = random.Random(seed)
        self._made = 0

    def tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._draw.randrange(VOCABULARY) for _ in range(count))

    def document(
        self, context: Sequence[int], continuations: Sequence[Sequence[int]], gold: int = 0
    ) -> Document:
        self._made += 1
        requests = tuple(Request(tuple(context), tuple(each)) for each in continuations)
        return Document("task", self._made - 1, requests, gold, len(requests))

    def letters(self, lengths: Sequence[int], shared: int = 0) -> list[Document]:
        """Documents with one-token answers, whose contexts have these lengths."""
        common = self.tokens(shared)
        return [self.document(common + self.tokens(length - shared), LETTERS) for length in lengths]

    def spoken(
        self, contexts: Sequence[int], answers: Sequence[int], shared: int = 0
    ) -> list[Document]:
        """Documents whose contexts and answers have these lengths."""
        common = self.tokens(shared)
        return [
            self.document(
                common + self.tokens(length - shared), [self.tokens(answer) for answer in answers]
            )
            for length in contexts
        ]


def measure(
    model: Any,
    documents: Sequence[Document],
    layers: Collection[int],
    *,
    ablate: Without = without,
    block: int | None = None,
    row_tokens: int | None = None,
    max_length: int = MAX_LENGTH,
    says: str | None = None,
    atol: float = 2e-4,
    notes: str | None = None,
) -> set[Sharing]:
    """Score a cell in both orders, compare every response with the truth, and say what was shared.

    `block` documents are scored at a time, all at once without it. `says` is what a refusal must
    say, where the model may be refused. `notes` is what the check must say, in a refusal or in one
    of its fields, where the model itself may give several numbers.
    """
    ablations = single_layers(tuple(layers))
    removed = [ablation.removed() for ablation in ablations]
    expected = truths(model, documents, removed, max_length, ablate)
    shared = set()
    for name, step in (("in order", 1), ("in reverse", -1)):
        ordered, truth = documents[::step], expected[::step]
        engine = Engine(loaded(copy.deepcopy(model)), max_length, row_tokens=row_tokens)
        try:
            checked = check(engine, ordered, ablations, VERDICTS)
            size = block or len(ordered)
            blocks = [ordered[start : start + size] for start in range(0, len(ordered), size)]
            scores = [one for some in blocks for one in checked.engine.score(some, ablations)]
        except (CellError, ModelError) as error:
            if says is None or FALSE_REASON in str(error) or not re.search(says, str(error)):
                pytest.fail(f"{name}: wrongly refused: {error}")
            break  # the other order would be refused alike
        shared.add(checked.engine.sharing)
        found = [
            (abs(response.loglikelihood - right), ablation.name, document.index)
            for document, score, rights in zip(ordered, scores, truth, strict=True)
            for ablation, ours, theirs in zip(ablations, score.responses, rights, strict=True)
            for response, right in zip(ours, theirs, strict=True)
        ]
        said = " ".join(value for value in vars(checked).values() if isinstance(value, str))
        wrong = [each for each in found if not each[0] <= atol]
        if wrong and not (notes and re.search(notes, said)):
            pytest.fail(
                f"{name}: {len(wrong)} of {len(found)} are wrong, at worst by {max(wrong)[0]:.3g} "
                f"nats ({max(wrong)[1]}, document {max(wrong)[2]}); {checked.engine.sharing}, "
                f"the check saw {checked.difference:.2g} and said {checked.lost}"
            )
    return shared


TRAINED = 64
"""Tokens up to which the rotary factors below are the short ones."""


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0,
    "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": TRAINED,
}  # fmt: skip
