"""Reference answers of really changed models, one request at a time, and verdicts on sharing.

The engine's shared results are compared with these. A verdict explains in one sentence for users
why sharing was lost: the experiment that failed. Errors of the model's own code go to the log.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tracker.core.changes import Ablation
from tracker.core.documents import Request, Response
from tracker.core.errors import attempt
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.model import (
    DEPTH_ONLY,
    FULL,
    NO_PREFIX,
    ONE_BY_ONE,
    PLAIN,
    Quirks,
    Sharing,
    read_for,
    scored,
)
from tracker.engine.scoring.rows import Lengths
from tracker.engine.scoring.sweep import Engine
from tracker.models.miniature import NumberPath, numbers
from tracker.models.pruned import remember

CALM = 10.0
"""Factor by which two ways may differ, relative to how far rounding moves the model itself."""
SHAKE = 16
"""Machine epsilons by which embeddings are perturbed: rounding sums up to this in a few layers."""
DRAWS = 32
"""Maximum number of times that a request is scored with perturbed embeddings."""


@dataclass(frozen=True)
class Comparison:
    """Answers that were computed both ways.

    Attributes:
        compared: Number of log-likelihoods.
        difference: The largest difference, in nats.
        unsteady: Number that differ by more than rounding should, where the model itself moves as
            far when its embeddings move by rounding: it is discontinuous there.
        wrong: Description of the first that differs by more; None if none does.
    """

    compared: int = 0
    difference: float = 0.0
    unsteady: int = 0
    wrong: str | None = None

    def __add__(self, other: Comparison) -> Comparison:
        """Combine two comparisons."""
        return Comparison(
            self.compared + other.compared,
            max(self.difference, other.difference),
            self.unsteady + other.unsteady,
            self.wrong or other.wrong,
        )


class Reference:
    """Answers requests on models that were really changed.

    The engine provides the model, the side effects of its calls, and changed copies. Every copy of
    a `miniature` is kept, and NaN on both sides is no agreement for it: it would agree with
    anything, while a real model may well return it.
    """

    def __init__(self, engine: Engine, miniature: bool = False) -> None:
        self.engine = engine
        self.miniature = miniature
        self._made: dict[Ablation, Engine] = {}
        self._read: tuple[tuple[Ablation, tuple[int, ...]], Tensor] | None = None
        self._answers: dict[tuple[Ablation, Request], Response] = {}

    def without(self, ablation: Ablation) -> Engine:
        """Return an engine for a copy without the ablation's parts, reusing one made before."""
        if ablation not in self._made:
            if not self.miniature:  # requests are sorted by ablation
                self._made.clear()
            self._made[ablation] = self.engine.without(ablation, briefly=True)
        return self._made[ablation]

    def ask(self, questions: Sequence[tuple[Ablation, Request]]) -> None:
        """Answer questions in lockstep if weights are offloaded, so that they are loaded once."""
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
        """Score one request, once, on a model without what the ablation removes."""
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
        """Return whether an answer moves by so many nats when embeddings move by their rounding.

        Near a tie of a router or a top-k, it may in one of `DRAWS` draws: the model is
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
        """True if the model computes in half precision."""
        return self.engine.loaded.model.dtype not in (torch.float32, torch.float64)

    def compare(
        self, ours: float, ablation: Ablation, request: Request, nats: float, share: float
    ) -> Comparison:
        """Compare a log-likelihood with that of the reference.

        A difference that is too large is compared with how far the model itself moves when its
        embeddings move by their rounding.

        Args:
            ours: The log-likelihood.
            ablation: The ablation of the model.
            request: The request.
            nats: Absolute tolerance in nats.
            share: Relative tolerance, added to it.

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
def shaken(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Perturb a model's token embeddings by about their rounding, drawn by `seed`, until exit."""
    generator = torch.Generator().manual_seed(seed)

    def shake(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(output.shape, generator=generator).to(output)
        # A model in float64 computes parts of itself in float32 too.
        eps = max(torch.finfo(output.dtype).eps, torch.finfo(torch.float32).eps)
        return output * (1 + SHAKE * eps * noise)

    with model.get_input_embeddings().register_forward_hook(shake):
        yield


@dataclass(frozen=True)
class Verdict:
    """Result of checking an architecture on a miniature.

    Attributes:
        sharing: As much sharing as is exact.
        lost: One line that states which sharing was lost and why; None if none was.
        difference: The largest difference that remained, in nats.
        compared: Number of log-likelihoods compared.
        unsteady: Number of them that differ by more, where the model itself moves as far by
            rounding.
        lengths: Numbers of the configuration at which the length of a call matters, with whether
            every length beyond differs from every other; the empty path if every length matters.
        leftovers: Names of attributes that one call leaves changed for the next.
        first: Module and attribute of all that the first call changes for good.
        stay: Whether removed layers stay in place, because the model cannot be cut.
        loaded: Whether copies get the values that their class computes on loading without layers.
        which: One line that states which results are of no checkpoint; None if all are.
        tried_on: `a miniature`, or `the model` if none can be built.
        switches: More lengths of a call that matter, found by experiment; True as in `lengths`.
    """

    sharing: Sharing
    lost: str | None = None
    difference: float = 0.0
    compared: int = 0
    unsteady: int = 0
    lengths: tuple[tuple[NumberPath, bool], ...] = ()
    leftovers: tuple[str, ...] = ()
    first: tuple[tuple[str, str], ...] = ()
    stay: bool = False
    loaded: bool = False
    which: str | None = None
    tried_on: str = "a miniature"
    switches: tuple[tuple[int, bool], ...] = ()

    @property
    def is_clean(self) -> bool:
        """True if all is shared and no length matters, so that shorter texts are alike."""
        special = (self.unsteady, self.lengths, self.switches, self.leftovers, self.first)
        return self.sharing == FULL and not any(special)

    def quirks(self, model: PreTrainedModel) -> Quirks:
        """Return the quirks of a model of this architecture that no call has changed yet."""
        values = dict(numbers(model.config.get_text_config()))
        thresholds = (
            *(int(values[path]) for path, _ in self.lengths if path in values),
            *(tokens for tokens, _ in self.switches),
        )
        first = remember(model, {name for _, name in self.first})
        is_each = any(is_every for _, is_every in (*self.lengths, *self.switches))
        return Quirks(
            lengths=Lengths(thresholds, is_each),
            leftovers=remember(model, self.leftovers),
            first={attribute: first[attribute] for attribute in self.first if attribute in first},
            stay=self.stay,
            loaded=self.loaded,
        )


log = logging.getLogger(__name__)
LEFT = {
    NO_PREFIX: "shared over depth and tokens, and not what documents begin with",
    DEPTH_ONLY: "shared over depth alone, and not over tokens or documents",
    PLAIN: "nothing is shared",
    ONE_BY_ONE: "nothing is shared, and each request is asked alone",
}
"""Description of the sharing that is left, and of the sharing that is not."""
REFUSED = {
    FULL: "it does not go on from a beginning that was read before: its cache cannot be rewound",
    NO_PREFIX: "it refuses a row of several texts with a mask of their own",
    DEPTH_ONLY: "its layers refuse the states of several ablations as one batch",
    PLAIN: "it refuses several texts in one call",
}
"""Requirement of a way of sharing that a model's own code does not meet."""
STATE = "it keeps a state of its own for each text"
MOVED = {PLAIN: "a call of several texts"}
"""Cause of a different answer, where it is not the sharing itself."""


def less(before: str | None, sharing: Sharing, why: str | None) -> str | None:
    """Describe the sharing that was lost, and why; return `before` if nothing more was lost."""
    if why is None:
        return before
    sentence = f"{LEFT[sharing]}, because {why}"
    # A later loss includes the earlier ones, and its reason applies to them.
    if before is None or before.startswith(tuple(LEFT.values())):
        return sentence
    return f"{before}; {sentence}"


def in_words(error: Exception, way: Sharing, name: str) -> str:
    """Describe why a model refuses some sharing; errors of its own code go to the log."""
    log.debug("%s, shared over %s: %s", name, way, error)
    return str(error) if isinstance(error, RefusalError) else REFUSED[way]


def of_refusal(way: Sharing, reason: str, engine: Engine) -> str:
    """Return why a model does not run with some sharing; a copy of it is called to find out."""
    return STATE if way == NO_PREFIX and keeps_a_state(engine.copy()) else reason


def of_difference(way: Sharing, comparison: Comparison, engine: Engine) -> str:
    """Describe how far answers with some sharing are from the reference, and why."""
    cause, nats = MOVED.get(way, "sharing more"), comparison.difference
    sentence = f"{cause} changes a log-likelihood by {nats:.3g} nats"
    if comparison.unsteady:
        return (
            f"{sentence}, mostly where the model is discontinuous ({comparison.unsteady} answers)"
        )
    return f"{STATE}: {sentence}" if way == NO_PREFIX and keeps_a_state(engine.copy()) else sentence


@torch.inference_mode()
def keeps_a_state(model: PreTrainedModel) -> bool:
    """Check whether a model keeps a state of a text whose size does not grow with it.

    Keys and values grow; the states of recurrent layers and convolutions do not. Each token
    overwrites them, so texts in one row would overwrite each other's.
    """
    shapes: list[list[torch.Size]] = []
    for tokens in (2, 3):
        state = attempt(partial(_state_shapes, model, tokens))
        if isinstance(state, Exception):  # called only to explain an earlier refusal
            log.debug("%s keeps nothing: %s", type(model).__name__, state)
            return False
        shapes.append(state)
    return len(shapes[0]) == len(shapes[1]) and any(
        shape == other and len(shape) > 2 and 0 not in shape
        for shape, other in zip(*shapes, strict=True)
    )


def _state_shapes(model: PreTrainedModel, tokens: int) -> list[torch.Size]:
    """Return the shapes of the tensors that a model keeps of a text of so many tokens."""
    ids = torch.arange(tokens, device=model.device)[None] + 3
    output = model(input_ids=ids, use_cache=True)
    return list(_shapes(output if isinstance(output, dict) else {}))


def _shapes(output: Any) -> Iterator[torch.Size]:
    """Yield the shapes of all tensors in the output of a call, including those in caches."""
    if isinstance(output, Tensor):
        yield output.shape
    elif isinstance(output, dict):
        yield from _shapes([value for name, value in output.items() if name != "logits"])
    elif isinstance(output, (list, tuple)):
        yield from chain.from_iterable(map(_shapes, output))
    elif type(output).__module__.startswith("transformers."):
        yield from _shapes(vars(output))
