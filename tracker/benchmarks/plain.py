"""lm-eval's own scoring, untouched: what tracker is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tracker.benchmarks.private import HFLM
from tracker.core.documents import Document


def score_with_lm_eval(
    model: Any, tokenizer: Any, documents: Sequence[Document], batch_size: int
) -> list[tuple[float, bool]]:
    """Score documents once, as `lm_eval` does, with its grouping of one-token continuations on.

    The model may be pruned. Log-likelihood and greedy flag of all requests of all documents, in
    order.
    """
    plain = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    requests = [
        (None, list(request.context), list(request.continuation))
        for document in documents
        for request in document.requests
    ]
    answers: list[tuple[float, bool]] = plain._loglikelihood_tokens(requests, disable_tqdm=True)
    return answers
