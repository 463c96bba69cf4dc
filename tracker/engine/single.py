"""The shortest way from a request's tokens to its log-likelihood: one call of the model as it is.

No row, no stream, no cache, no head of our own: it is read as lm-eval reads it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tracker.documents import Request, Response
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
def answer(loaded: LoadedModel, request: Request, max_length: int) -> Response:
    """Score one request by the model's own forward pass.

    Log-likelihood in nats, greedy flag and hits, as lm-eval computes them.
    """
    tokens = (request.context + request.continuation)[-(max_length + 1) :]
    ids = torch.tensor([tokens[:-1]], device=loaded.device)
    logits = logits_of(loaded.model, ids)[0, -len(request.continuation) :]
    wanted = torch.tensor(request.continuation, device=logits.device)
    logprobs = logits.log_softmax(-1).gather(1, wanted[:, None]).sum()
    hits = int((logits.argmax(-1) == wanted).sum())
    return Response(float(logprobs), hits == len(request.continuation), hits)
