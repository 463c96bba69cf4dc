"""The shortest way from a request's tokens to its log-likelihood: one call of the model as it is.

No row, no stream, no cache, no head of our own: it is read as lm-eval reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tracker.core.documents import Request, Response
from tracker.engine.refusal import RefusalError
from tracker.models.load import LoadedModel


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Ask a model for texts [texts, tokens] in one call: logits [texts, tokens, vocabulary].

    RefusalError if it returns something else.
    """
    said = getattr(model(input_ids=ids, use_cache=False), "logits", None)
    if not isinstance(said, Tensor) or said.shape[:2] != ids.shape:
        raise RefusalError("it does not return 'logits' of every token")
    return said


@torch.inference_mode()
def read(loaded: LoadedModel, tokens: Sequence[int]) -> Tensor:
    """Ask a model for one text in a call of its own: logits [tokens, vocabulary]."""
    return logits_of(loaded.model, torch.tensor([tokens], device=loaded.device))[0]


def read_for(request: Request, max_length: int) -> tuple[int, ...]:
    """The tokens that lm-eval lets a model read to score a request."""
    return (request.context + request.continuation)[-(max_length + 1) :][:-1]


@torch.inference_mode()
def scored(logits: Tensor, continuation: Sequence[int]) -> Response:
    """Score a continuation by the logits of the text that ends before its last token.

    Log-likelihood in nats, greedy flag and hits, as lm-eval computes them.
    """
    logits = logits[-len(continuation) :]
    wanted = torch.tensor(continuation, device=logits.device)
    logprobs = logits.log_softmax(-1).gather(1, wanted[:, None]).sum()
    hits = int((logits.argmax(-1) == wanted).sum())
    return Response(float(logprobs), hits == len(continuation), hits)
