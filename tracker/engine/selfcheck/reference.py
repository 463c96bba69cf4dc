"""Compute reference results on changed copies of a model, and define a self-check's result.

The self-check compares log-likelihoods from shared computation with these reference results. The
result of the self-check is called the verdict.
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

from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.model import (
    DEPTH_ONLY,
    FULL,
    NO_PREFIX,
    ONE_BY_ONE,
    PLAIN,
    Quirks,
    Sharing,
    input_tokens,
    score_continuation,
)
from tracker.engine.scoring.rows import Lengths
from tracker.engine.scoring.sweep import Engine
from tracker.models.miniature import NumberPath, find_numbers
from tracker.models.pruned import record_state
from tracker.schema.changes import Ablation
from tracker.schema.documents import Request, Response
from tracker.schema.errors import attempt
from tracker.schema.grouping import group_by

MAX_ROUNDING_FACTOR = 10.0
"""Maximum difference between two ways, as a multiple of the effect of rounding on the model."""
NOISE_EPSILONS = 16
"""Size of perturbations of embeddings, in machine epsilons: the rounding of a few layers."""
NOISE_DRAWS = 32
"""Maximum number of times that a request is scored with perturbed embeddings."""


@dataclass(frozen=True)
class Comparison:
    """Comparison of log-likelihoods from shared computation and from changed model copies.

    Attributes:
        compared: Number of compared log-likelihoods.
        difference: The largest difference, in nats.
        unsteady: Number of log-likelihoods whose difference exceeds the tolerance, but can be
            explained by rounding errors.
        wrong: Description of the first log-likelihood whose difference cannot be explained by
            rounding errors; None if there is no such log-likelihood.
    """

    compared: int = 0
    difference: float = 0.0
    unsteady: int = 0
    wrong: str | None = None

    def __add__(self, other: Comparison) -> Comparison:
        """Combine two comparisons into one."""
        return Comparison(
            self.compared + other.compared,
            max(self.difference, other.difference),
            self.unsteady + other.unsteady,
            self.wrong or other.wrong,
        )


class Reference:
    """Scorer of single requests on changed copies of a model, without shared computation.

    A changed copy lacks the removed layers, for example. All copies of a miniature stay in memory.
    For other models, one copy stays in memory, and two NaN values count as equal.
    """

    def __init__(self, engine: Engine, is_miniature: bool = False) -> None:
        self.engine = engine
        self.is_miniature = is_miniature
        self._copies: dict[Ablation, Engine] = {}
        self._last_logits: tuple[tuple[Ablation, tuple[int, ...]], Tensor] | None = None
        self._answers: dict[tuple[Ablation, Request], Response] = {}

    def ablate(self, ablation: Ablation) -> Engine:
        """Return an engine for a copy of the model with the ablation, if possible a cached one."""
        if ablation not in self._copies:
            if not self.is_miniature:  # requests are sorted by ablation
                self._copies.clear()
            self._copies[ablation] = self.engine.ablate(ablation, brief=True)
        return self._copies[ablation]

    def answer_all(self, questions: Sequence[tuple[Ablation, Request]]) -> None:
        """Score (ablation, request) pairs in advance, so that `answer` reads cached scores.

        If no weights are offloaded, the method does nothing.
        """
        if self.engine.loaded.offloaded is None:
            return
        questions = [question for question in questions if question not in self._answers]
        texts = group_by(questions, lambda q: (q[0], input_tokens(q[1], self.engine.max_length)))

        def answer_text(ablation: Ablation, text: tuple[int, ...]) -> None:
            logits = self.engine.ablate(ablation).read_logits(text)
            for question in texts[ablation, text]:
                self._answers[question] = score_continuation(logits, question[1].continuation)

        deque(self.engine.run_lockstep(partial(answer_text, *text) for text in texts), maxlen=0)

    def answer(self, ablation: Ablation, request: Request) -> Response:
        """Return the score of one request on a copy of the model that is changed by `ablation`."""
        key = (ablation, request)
        if key not in self._answers:
            engine = self.ablate(ablation)
            text = ablation, input_tokens(request, engine.max_length)
            if self._last_logits is None or self._last_logits[0] != text:
                self._last_logits = None  # logits of a long text are large: never two at a time
                self._last_logits = text, engine.read_logits(text[1])
            self._answers[key] = score_continuation(self._last_logits[1], request.continuation)
        return self._answers[key]

    def is_unsteady(self, ablation: Ablation, request: Request, nats: float) -> bool:
        """Test whether rounding errors can change a request's log-likelihood by `nats`.

        Rounding errors are simulated by noise in the token embeddings, with up to `NOISE_DRAWS`
        random seeds. For example, a rounding error can make a router select another expert.
        """
        engine = self.ablate(ablation)
        expected = self.answer(ablation, request).loglikelihood
        for seed in range(NOISE_DRAWS):
            with perturb_embeddings(engine.loaded.model, seed):
                if abs(engine.answer(request).loglikelihood - expected) >= nats:
                    return True
        return False

    @property
    def is_half(self) -> bool:
        """True if the model computes in half precision."""
        return self.engine.loaded.model.dtype not in (torch.float32, torch.float64)

    def compare(
        self, value: float, ablation: Ablation, request: Request, abs_tol: float, rel_tol: float
    ) -> Comparison:
        """Compare a log-likelihood from shared computation with that of a changed model copy.

        If the difference exceeds the tolerance, `is_unsteady` tests whether rounding errors explain
        the difference.

        Args:
            value: The log-likelihood that was computed with sharing, in nats.
            ablation: The ablation of the model.
            request: The request.
            abs_tol: Absolute tolerance in nats.
            rel_tol: Relative tolerance, which is added to the absolute tolerance.

        Returns:
            The comparison of a single log-likelihood.
        """
        expected = self.answer(ablation, request).loglikelihood
        both_nan = math.isnan(value) and math.isnan(expected)
        if value == expected or (both_nan and not self.is_miniature):
            return Comparison(1)
        difference = abs(value - expected)
        if math.isnan(difference):
            difference = math.inf
        if difference <= abs_tol + rel_tol * abs(expected) and math.isfinite(difference):
            return Comparison(1, difference)
        if self.is_unsteady(ablation, request, difference / MAX_ROUNDING_FACTOR):
            return Comparison(1, difference, 1)
        message = (
            f"shared computation gives a log-likelihood of {value:.6g} nats, "
            f"but the changed model gives {expected:.6g} nats"
        )
        return Comparison(1, difference, wrong=message)


@contextmanager
def perturb_embeddings(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Simulate rounding errors by adding noise to token embeddings in a `with` block."""
    generator = torch.Generator().manual_seed(seed)

    def add_noise(
        module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor
    ) -> torch.Tensor:
        noise = torch.randn(output.shape, generator=generator).to(output)
        # A model in float64 computes parts of itself in float32 too.
        eps = max(torch.finfo(output.dtype).eps, torch.finfo(torch.float32).eps)
        return output * (1 + NOISE_EPSILONS * eps * noise)

    with model.get_input_embeddings().register_forward_hook(add_noise):
        yield


@dataclass(frozen=True)
class SharingVerdict:
    """Result of the self-check of an architecture on a miniature model.

    Attributes:
        sharing: The kinds of computation that ablations can share without changing any result.
        sharing_note: One line that states which shared computation was disabled and why; None if
            nothing was disabled.
        difference: The largest difference, in nats, between log-likelihoods computed with `sharing`
            and the reference results.
        compared: Number of log-likelihoods compared.
        unsteady: Number of log-likelihoods that differ by more than the tolerance because of
            rounding errors.
        lengths: Pairs (path, flag). The path locates a number in the configuration, e.g. an
            attention window. Texts with fewer and with more tokens than this number are computed
            differently. If the flag is True, every longer text length has its own computation. The
            path is empty if every text length has its own computation.
        leftovers: Names of model attributes that a call changes and that affect the next call.
        first: Module and name of each attribute that the first call changes permanently.
        in_place: True if removed layers stay in the model and return their input.
        as_loaded: True if a copy without some layers gets the attribute values of a model that is
            loaded from a checkpoint without these layers.
        checkpoint_note: One line that lists the ablations that cannot be saved as a checkpoint;
            None if there are none.
        tested_on: `a miniature`, or `the model` if no miniature can be built.
        switches: Pairs of a text length, found by experiment, and a flag as in `lengths`.
    """

    sharing: Sharing
    sharing_note: str | None = None
    difference: float = 0.0
    compared: int = 0
    unsteady: int = 0
    lengths: tuple[tuple[NumberPath, bool], ...] = ()
    leftovers: tuple[str, ...] = ()
    first: tuple[tuple[str, str], ...] = ()
    in_place: bool = False
    as_loaded: bool = False
    checkpoint_note: str | None = None
    tested_on: str = "a miniature"
    switches: tuple[tuple[int, bool], ...] = ()

    @property
    def is_clean(self) -> bool:
        """True if sharing everything is exact, and no text length or call changes logits."""
        special = (self.unsteady, self.lengths, self.switches, self.leftovers, self.first)
        return self.sharing == FULL and not any(special)

    def make_quirks(self, model: PreTrainedModel) -> Quirks:
        """Convert the self-check's result to quirks: effects that the engine must handle.

        Examples are attributes that a call changes. The quirks contain attribute values of `model`,
        which must not have been called yet.
        """
        values = dict(find_numbers(model.config.get_text_config()))
        thresholds = (
            *(int(values[path]) for path, _ in self.lengths if path in values),
            *(tokens for tokens, _ in self.switches),
        )
        first = record_state(model, {name for _, name in self.first})
        all_differ = any(differs for _, differs in (*self.lengths, *self.switches))
        return Quirks(
            lengths=Lengths(thresholds, all_differ),
            leftovers=record_state(model, self.leftovers),
            first={attribute: first[attribute] for attribute in self.first if attribute in first},
            in_place=self.in_place,
            as_loaded=self.as_loaded,
        )


log = logging.getLogger(__name__)
SHARING_DESCRIPTIONS = {
    NO_PREFIX: "the common beginning of all documents is not cached",
    DEPTH_ONLY: "common beginnings of requests are computed separately",
    PLAIN: "each ablation is computed separately",
    ONE_BY_ONE: "each request and each ablation is computed separately",
}
"""Descriptions of the levels of sharing, by what is not computed together."""
REFUSAL_REASONS = {
    FULL: "the key-value cache of the model cannot be reset to an earlier token",
    NO_PREFIX: "the model does not support separate attention masks for several texts in one row",
    DEPTH_ONLY: "the layers refuse a batch of hidden states of several ablations",
    PLAIN: "the model does not accept several texts in one call",
}
"""Reasons why a model does not support a way of sharing."""
STATE = "the model keeps a recurrent state for each text"


def extend_sharing_note(previous: str | None, sharing: Sharing, reason: str | None) -> str | None:
    """Extend the note for users about disabled sharing of computation.

    The note states which computation is not shared, and why. `reason` is None if
    nothing more is disabled.
    """
    if reason is None:
        return previous
    sentence = f"{SHARING_DESCRIPTIONS[sharing]}, because {reason}"
    # A later loss includes the earlier ones, and its reason applies to them.
    if previous is None or previous.startswith(tuple(SHARING_DESCRIPTIONS.values())):
        return sentence
    return f"{previous}; {sentence}"


def describe_error(error: Exception, way: Sharing, name: str) -> str:
    """Log an error of a model, and return the probable cause of the error for users."""
    log.debug("%s, shared over %s: %s", name, way, error)
    return str(error) if isinstance(error, RefusalError) else REFUSAL_REASONS[way]


def describe_difference(way: Sharing, comparison: Comparison) -> str:
    """Describe for users how much a log-likelihood changes if computation is shared."""
    cause = "a call of several texts" if way == PLAIN else "sharing more computation"
    sentence = f"{cause} changes a log-likelihood by {comparison.difference:.3g} nats"
    if not comparison.unsteady:
        return sentence
    return f"{sentence}. Rounding errors alone change {comparison.unsteady} answers"


@torch.inference_mode()
def keeps_state(model: PreTrainedModel) -> bool:
    """Return whether a model has a recurrent state, i.e. a cached tensor of constant size."""

    def read_shapes() -> list[list[torch.Size]]:
        texts = [torch.arange(tokens, device=model.device)[None] + 3 for tokens in (2, 3)]
        outputs = [model(input_ids=ids, use_cache=True) for ids in texts]
        return [[*_tensor_shapes(out if isinstance(out, dict) else {})] for out in outputs]

    shapes = attempt(read_shapes)
    if isinstance(shapes, Exception):  # called only to explain an earlier refusal
        log.debug("%s keeps nothing: %s", type(model).__name__, shapes)
        return False

    return len(shapes[0]) == len(shapes[1]) and any(
        x == y and len(x) > 2 and 0 not in x for x, y in zip(*shapes, strict=True)
    )


def _tensor_shapes(output: object) -> Iterator[torch.Size]:
    """Yield the shape of each tensor in a model's output, except the logits."""
    if isinstance(output, Tensor):
        yield output.shape
    elif isinstance(output, dict):
        yield from _tensor_shapes([value for name, value in output.items() if name != "logits"])
    elif isinstance(output, (list, tuple)):
        yield from chain.from_iterable(map(_tensor_shapes, output))
    elif type(output).__module__.startswith("transformers."):
        yield from _tensor_shapes(vars(output))
