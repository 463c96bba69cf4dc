"""The numbers of the really pruned model, by the shortest way from its tokens to its logits.

One request a call, read as lm-eval reads it: no row, no stream, no cache, no head of our own. What
the engine shares is held against this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tracker.ablations import Ablation
from tracker.documents import Request, Response
from tracker.engine.sweep import Engine
from tracker.models.pruned import put_back

DRAWS = 3
"""Times that a request is asked again with its embeddings moved by rounding."""


class Truth:
    """Answers requests on models that were really changed.

    Args:
        engine: Knows the model, what a call of it leaves behind, and how to take layers out.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._made: tuple[Ablation, Engine] | None = None

    def answer(self, ablation: Ablation, request: Request) -> Response:
        """Score one request.

        Args:
            ablation: What the model lacks.
            request: What is asked.

        Returns:
            The answer.
        """
        return answer(self._without(ablation), request)

    def spread(self, ablation: Ablation, request: Request) -> float:
        """Say how far an answer moves when its embeddings move by no more than rounding.

        Where a router or a top-k is near a tie, that may be far: the model is discontinuous there,
        and no two ways to compute it agree.

        Args:
            ablation: What the model lacks.
            request: What is asked.

        Returns:
            The largest difference of the log-likelihood, in nats.
        """
        engine = self._without(ablation)
        calm = answer(engine, request).loglikelihood
        moved = []
        for seed in range(DRAWS):
            with _shaken(engine.loaded.model, seed):
                moved.append(answer(engine, request).loglikelihood)
        return max(abs(value - calm) for value in moved)

    def _without(self, ablation: Ablation) -> Engine:
        # One copy is kept: requests come ablation by ablation.
        if self._made is None or self._made[0] != ablation:
            self._made = (ablation, self._engine.without(ablation))
        return self._made[1]


@torch.inference_mode()
def answer(engine: Engine, request: Request) -> Response:
    """Score one request by the model's own forward pass.

    Args:
        engine: The model as it is.
        request: What is asked.

    Returns:
        Log-likelihood in nats, greedy flag and hits, as lm-eval computes them.
    """
    loaded = engine.loaded
    put_back(loaded.model, engine.habits.leftovers)
    tokens = (request.context + request.continuation)[-(engine.max_length + 1) :]
    ids = torch.tensor([tokens[:-1]], device=loaded.device)
    logits = loaded.model(input_ids=ids, use_cache=False).logits[0, -len(request.continuation) :]
    wanted = torch.tensor(request.continuation, device=logits.device)
    logprobs = logits.log_softmax(-1).gather(1, wanted[:, None]).sum()
    hits = int((logits.argmax(-1) == wanted).sum())
    return Response(float(logprobs), hits == len(request.continuation), hits)


@contextmanager
def _shaken(model: Any, seed: int) -> Iterator[None]:
    """Let a model's token embeddings differ from what they are by about their rounding."""
    generator = torch.Generator().manual_seed(seed)

    def shake(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(output.shape, generator=generator).to(output)
        return output * (1 + 2 * torch.finfo(output.dtype).eps * noise)

    handle = model.get_input_embeddings().register_forward_hook(shake)
    try:
        yield
    finally:
        handle.remove()
