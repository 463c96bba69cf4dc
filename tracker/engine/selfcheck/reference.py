"""The numbers of the really changed model, asked one request at a time, and verdicts on sharing.

What the engine shares is held against this. Why a model shares no more than it does is one sentence
for people: which experiment failed says why; what the model's own code raised then goes to the log.
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
def shaken(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Let a model's token embeddings be off by about their rounding, drawn by `seed`.

    On exit they are what they were.
    """
    generator = torch.Generator().manual_seed(seed)

    def shake(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(output.shape, generator=generator).to(output)
        # Also a model in float64 computes parts of itself in float32.
        eps = max(torch.finfo(output.dtype).eps, torch.finfo(torch.float32).eps)
        return output * (1 + SHAKE * eps * noise)

    with model.get_input_embeddings().register_forward_hook(shake):
        yield


@dataclass(frozen=True)
class Verdict:
    """Result of checking an architecture on a miniature.

    Attributes:
        sharing: As much as is exact.
        lost: One line that says which sharing was lost and why; None when none was.
        difference: The largest difference that was left, in nats.
        compared: Log-likelihoods behind it.
        unsteady: How many of them differ by more, while the model itself moves as far by rounding.
        lengths: Numbers of the configuration at which the length of a call matters, with whether
            beyond it every length is another; the empty path for a model to which it always does.
        leftovers: Names of attributes that one call leaves changed for the next.
        first: Where in the model is what the first call changes for good: module, attribute.
        stay: Whether removed layers stay in their places, because the model cannot be cut.
        loaded: Whether copies get what their class computes when they are loaded without layers.
        which: One line that says where the numbers are those of no checkpoint; None where all are.
        tried_on: `a miniature`, or `the model` where none can be built.
        switches: Lengths of a call at which it matters too, found by trying; True as in `lengths`.
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
        """Return whether all is shared and no length matters, so that shorter texts are alike."""
        special = (self.unsteady, self.lengths, self.switches, self.leftovers, self.first)
        return self.sharing == FULL and not any(special)

    def quirks(self, model: PreTrainedModel) -> Quirks:
        """Return the quirks of such a model, one that no call has changed yet."""
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
"""What is left, and what is not."""
REFUSED = {
    FULL: "it does not go on from a beginning that was read before: its cache cannot be rewound",
    NO_PREFIX: "it refuses a row of several texts with a mask of their own",
    DEPTH_ONLY: "its layers refuse the states of several ablations as one batch",
    PLAIN: "it refuses several texts in one call",
}
"""What a way of sharing asks of a model, where its own code refused."""
STATE = "it keeps a state of its own for each text"
MOVED = {PLAIN: "a call of several texts"}
"""What moves an answer, where it is not the sharing itself."""


def less(before: str | None, sharing: Sharing, why: str | None) -> str | None:
    """Describe what is shared less, and why; return `before` where nothing more was lost."""
    if why is None:
        return before
    sentence = f"{LEFT[sharing]}, because {why}"
    # What was lost later is more, and its reason holds for what was lost before.
    if before is None or before.startswith(tuple(LEFT.values())):
        return sentence
    return f"{before}; {sentence}"


def in_words(error: Exception, way: Sharing, name: str) -> str:
    """Describe what a model refuses; what its own code raised goes to the log."""
    log.debug("%s, shared over %s: %s", name, way, error)
    return str(error) if isinstance(error, RefusalError) else REFUSED[way]


def of_refusal(way: Sharing, reason: str, engine: Engine) -> str:
    """Return why a model runs in no such way; a copy of it is called to see that."""
    return STATE if way == NO_PREFIX and keeps_a_state(engine.copy()) else reason


def of_difference(way: Sharing, comparison: Comparison, engine: Engine) -> str:
    """Describe how far answers computed in some way are from the truth, and why."""
    cause, nats = MOVED.get(way, "sharing more"), comparison.difference
    sentence = f"{cause} changes a log-likelihood by {nats:.3g} nats"
    if comparison.unsteady:
        return (
            f"{sentence}, mostly where the model is discontinuous ({comparison.unsteady} answers)"
        )
    return f"{STATE}: {sentence}" if way == NO_PREFIX and keeps_a_state(engine.copy()) else sentence


@torch.inference_mode()
def keeps_a_state(model: PreTrainedModel) -> bool:
    """Check whether a model keeps something of a text whose size does not grow with it.

    Keys and values do; what recurrent layers and convolutions keep does not, and there each token
    writes over what others have left: texts in one row would too.
    """
    shapes: list[list[torch.Size]] = []
    for tokens in (2, 3):
        state = attempt(partial(_state_shapes, model, tokens))
        if isinstance(state, Exception):  # it is asked only to find why it refused before
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
    """The shapes of all tensors in what a call returns, and in caches among it."""
    if isinstance(output, Tensor):
        yield output.shape
    elif isinstance(output, dict):
        yield from _shapes([value for name, value in output.items() if name != "logits"])
    elif isinstance(output, (list, tuple)):
        yield from chain.from_iterable(map(_shapes, output))
    elif type(output).__module__.startswith("transformers."):
        yield from _shapes(vars(output))
