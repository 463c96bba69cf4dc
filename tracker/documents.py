"""What the benchmarks hand to the engine: tokenised documents, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Request:
    """One (context, continuation) pair that lm-eval asks the model to score.

    Attributes:
        context: Token ids before the continuation; never empty.
        continuation: Token ids whose log-likelihood is wanted; never empty.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Document:
    """One benchmark item.

    Attributes:
        task: The lm-eval task it belongs to.
        index: Its place in the task's split, 0-based.
        requests: What the model is asked about it, in lm-eval's order.
        gold: Which request holds the right answer; None where lm-eval names none or several.
        choices: Between how many answers a random predictor would choose; 0 for open answers.
    """

    task: str
    index: int
    requests: tuple[Request, ...]
    gold: int | None
    choices: int


class Response(NamedTuple):
    """The model's answer to one request, as lm-eval defines it.

    Attributes:
        loglikelihood: Summed log-probability of the continuation, in nats.
        greedy: Whether every token of the continuation is the most likely one.
    """

    loglikelihood: float
    greedy: bool
