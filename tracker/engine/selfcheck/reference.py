"""The numbers of the really pruned model, asked one request at a time (`single`).

What the engine shares is held against this.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tracker.core.changes import Ablation
from tracker.core.documents import Request, Response
from tracker.engine.scoring.plain_call import read_for, scored
from tracker.engine.scoring.sweep import Engine

CALM = 10.0
"""How many times as far as rounding moves the model itself two ways of computing it may differ."""
SHAKE = 16
"""Machine epsilons by which embeddings are moved: what rounding adds up to within a few layers."""
DRAWS = 32
"""Times at most that a request is asked again with its embeddings moved by rounding."""


@dataclass(frozen=True)
class Comparison:
    """Answers that were computed both ways.

    Attributes:
        compared: Log-likelihoods.
        difference: The largest difference, in nats.
        unsteady: How many differ by more than rounding should, while the model itself moves as far
            when its embeddings move by rounding: it is discontinuous there.
        wrong: The first that differs by more, in words; None where none does.
    """

    compared: int = 0
    difference: float = 0.0
    unsteady: int = 0
    wrong: str | None = None

    def __add__(self, other: Comparison) -> Comparison:
        """Put two together."""
        return Comparison(
            self.compared + other.compared,
            max(self.difference, other.difference),
            self.unsteady + other.unsteady,
            self.wrong or other.wrong,
        )


class Reference:
    """Answers requests on models that were really changed.

    The engine knows the model, what a call of it leaves behind, and how to take layers out. Of a
    `miniature` every copy is kept, and NaN on both sides is no agreement: it would prove anything,
    while a real model may well say it.
    """

    def __init__(self, engine: Engine, miniature: bool = False) -> None:
        self.engine = engine
        self.miniature = miniature
        self._made: dict[Ablation, Engine] = {}
        self._read: tuple[tuple[Ablation, tuple[int, ...]], Tensor] | None = None
        self._answers: dict[tuple[Ablation, Request], Response] = {}

    def without(self, ablation: Ablation) -> Engine:
        """Make an engine for a copy from which the ablation is taken out, or use the one made."""
        if ablation not in self._made:
            if not self.miniature:  # requests come ablation by ablation
                self._made.clear()
            self._made[ablation] = self.engine.without(ablation, briefly=True)
        return self._made[ablation]

    def ask(self, questions: Sequence[tuple[Ablation, Request]]) -> None:
        """Ask all of some questions side by side, where weights come past: once for all of them."""
        if self.engine.loaded.offloaded is None:
            return
        questions = [question for question in questions if question not in self._answers]

        def answered(ablation: Ablation, requests: Sequence[Request]) -> None:
            engine = self.engine.without(ablation)
            logits = engine.read(read_for(requests[0], engine.max_length))
            for request in requests:
                self._answers[ablation, request] = scored(logits, request.continuation)

        texts: dict[tuple[Ablation, tuple[int, ...]], list[Request]] = {}
        for ablation, request in questions:
            text = read_for(request, self.engine.max_length)
            texts.setdefault((ablation, text), []).append(request)
        passes = (partial(answered, ablation, some) for (ablation, _), some in texts.items())
        deque(self.engine.side_by_side(passes), maxlen=0)

    def answer(self, ablation: Ablation, request: Request) -> Response:
        """Score one request, once, by a model without what the ablation removes."""
        place = (ablation, request)
        if place not in self._answers:
            engine = self.without(ablation)
            text = ablation, read_for(request, engine.max_length)
            if self._read is None or self._read[0] != text:
                self._read = None  # logits of a long text are large: never two at a time
                self._read = text, engine.read(text[1])
            self._answers[place] = scored(self._read[1], request.continuation)
        return self._answers[place]

    def moves(self, ablation: Ablation, request: Request, nats: float) -> bool:
        """Say whether an answer moves by so many nats when embeddings move by their rounding.

        Where a router or a top-k is near a tie, it may in one of `DRAWS` draws: the model is
        discontinuous there, and no two ways to compute it agree.
        """
        engine = self.without(ablation)
        calm = self.answer(ablation, request).loglikelihood
        for seed in range(DRAWS):
            with shaken(engine.loaded.model, seed):
                if abs(engine.answer(request).loglikelihood - calm) >= nats:
                    return True
        return False

    @property
    def is_half(self) -> bool:
        """Whether the model computes in half precision."""
        return self.engine.loaded.model.dtype not in (torch.float32, torch.float64)

    def compare(
        self, ours: float, ablation: Ablation, request: Request, nats: float, share: float
    ) -> Comparison:
        """Hold a log-likelihood against the truth.

        What differs by more than is allowed is held against how far the model itself moves when
        its embeddings move by their rounding.

        Args:
            ours: The log-likelihood.
            ablation: What the model lacks.
            request: What was asked.
            nats: By how much it may differ,
            share: and by what share of itself besides.

        Returns:
            The comparison.
        """
        right = self.answer(ablation, request).loglikelihood
        if ours == right or (math.isnan(ours) and math.isnan(right) and not self.miniature):
            return Comparison(1)
        difference = abs(ours - right)
        if math.isnan(difference):
            difference = math.inf
        allowed = nats + share * abs(right)
        if difference <= allowed and math.isfinite(difference):
            return Comparison(1, difference)
        if self.moves(ablation, request, difference / CALM):
            return Comparison(1, difference, 1)
        wrong = f"{ours:.6g} nats shared, {right:.6g} on the really pruned model"
        return Comparison(1, difference, wrong=wrong)


@contextmanager
def shaken(model: Any, seed: int) -> Iterator[None]:
    """Let a model's token embeddings be off by about their rounding, drawn by `seed`.

    On exit they are what they were.
    """
    generator = torch.Generator().manual_seed(seed)

    def shake(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(output.shape, generator=generator).to(output)
        # Also a model in float64 computes parts of itself in float32.
        eps = max(torch.finfo(output.dtype).eps, torch.finfo(torch.float32).eps)
        return output * (1 + SHAKE * eps * noise)

    with model.get_input_embeddings().register_forward_hook(shake):
        yield
