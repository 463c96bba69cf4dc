"""What the benchmarks hand to the engine: tokenised documents, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tracker.core.provenance import content_hash


@dataclass(frozen=True)
class Request:
    """One (context, continuation) pair that lm-eval asks the model to score.

    Attributes:
        context: Token ids before the continuation; never empty.
        continuation: Token ids whose log-likelihood is wanted; never empty.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def length(self) -> int:
        """How many tokens both have."""
        return len(self.context) + len(self.continuation)


@dataclass(frozen=True)
class Prompt:
    """What a model is asked to continue.

    Attributes:
        text: The prompt.
        settings: lm-eval's generation settings: stop strings, how many tokens at most, and so on.
    """

    text: str
    settings: Mapping[str, Any]
    think_end_token: str | int | None = None

    @property
    def longest(self) -> int:
        """How many tokens are generated at most; lm-eval's default is 256."""
        return int(self.settings.get("max_gen_toks", 256))

    def limited_to(self, tokens: int) -> Prompt:
        """Make the same prompt for texts of so many tokens at most."""
        return replace(self, settings={**self.settings, "max_gen_toks": min(tokens, self.longest)})


@dataclass(frozen=True)
class Document:
    """One benchmark item.

    Attributes:
        task: The lm-eval task or the corpus that it belongs to.
        index: Its place in the task's split, 0-based.
        requests: What the model is asked about it, in lm-eval's order.
        gold: Which request holds the right answer; None where lm-eval names none or several.
        choices: Between how many answers a random predictor would choose; 0 for open answers.
        rolling: Whether the requests are consecutive windows of one text.
        prompt: What the model continues, where its text is judged; the requests are then the
            prompt with the task's own answer, for the proxies and its log-probability.
    """

    task: str
    index: int
    requests: tuple[Request, ...]
    gold: int | None
    choices: int
    rolling: bool = False
    prompt: Prompt | None = None

    def tokens_digest(self, max_length: int) -> str:
        """Hash the tokens that a model of this length reads of the document, and how many score."""
        texts: list[Any] = [
            [(text.context + text.continuation)[-(max_length + 1) :], len(text.continuation)]
            for text in self.requests
        ]
        if self.prompt is not None:
            room = max(1, max_length - self.prompt.longest)
            texts += [self.requests[0].context[-room:], self.prompt.settings]
        return content_hash(texts)[:16]


@dataclass(frozen=True)
class DocumentText:
    """What a document says in front of people, without examples and templates.

    Attributes:
        question: What the prompt ends with; of a text that is scored as a whole, the text.
        choices: The options, in the order of the requests; none for open answers.
        answer: The gold answer where there are no options; None where there is none.
    """

    question: str
    choices: tuple[str, ...] = ()
    answer: str | None = None


class Response(NamedTuple):
    """The model's answer to one request; for a choice the first two are what lm-eval asks for.

    Attributes:
        loglikelihood: Summed log-probability of the continuation, in nats.
        greedy: Whether every token of the continuation is the most likely one.
        hits: How many of the continuation's tokens are the most likely one.
        text: What the model generates, where the document has a prompt.
    """

    loglikelihood: float
    greedy: bool
    hits: int
    text: str | None = None
