"""Define tokenised documents and the responses to them."""

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
        continuation: Token ids whose log-likelihood is computed; never empty.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def length(self) -> int:
        """The number of tokens of context and continuation together."""
        return len(self.context) + len(self.continuation)


@dataclass(frozen=True)
class Prompt:
    """Prompt that a model continues.

    Attributes:
        text: The prompt.
        settings: lm-eval's generation settings, such as stop strings and the number of tokens.
    """

    text: str
    settings: Mapping[str, Any]
    think_end_token: str | int | None = None

    @property
    def max_tokens(self) -> int:
        """The maximum number of generated tokens; lm-eval's default is 256."""
        return int(self.settings.get("max_gen_toks", 256))

    def with_limit(self, tokens: int) -> Prompt:
        """Return the same prompt with at most this number of generated tokens."""
        limit = min(tokens, self.max_tokens)
        return replace(self, settings={**self.settings, "max_gen_toks": limit})


@dataclass(frozen=True)
class Document:
    """One benchmark item.

    Attributes:
        task: The lm-eval task or the corpus that the document belongs to.
        index: The document's position in the task's split, 0-based.
        requests: The requests of the document, in lm-eval's order.
        gold: The request with the right answer; None where lm-eval names none or several.
        choices: Number of answers that a random predictor chooses from; 0 for open answers.
        rolling: True if the requests are consecutive windows of one text.
        prompt: The prompt of a generation task; None for others. The requests then hold the
            prompt with the task's own answer, for the proxies and its log-probability.
    """

    task: str
    index: int
    requests: tuple[Request, ...]
    gold: int | None
    choices: int
    rolling: bool = False
    prompt: Prompt | None = None

    @property
    def key(self) -> tuple[str, int]:
        """The task and the document's position in the task's split."""
        return self.task, self.index

    def tokens_digest(self, max_length: int) -> str:
        """Hash the tokens that a model with this context length reads, and the scored counts."""
        texts: list[Any] = []
        for request in self.requests:
            tokens = (request.context + request.continuation)[-(max_length + 1) :]
            texts.append([tokens, len(request.continuation)])
        if self.prompt is not None:
            n_tokens = max(1, max_length - self.prompt.max_tokens)
            texts += [self.requests[0].context[-n_tokens:], self.prompt.settings]
        return content_hash(texts)[:16]


@dataclass(frozen=True)
class DocumentText:
    """The text of a document for display, without few-shot examples and templates.

    Attributes:
        question: The end of the prompt; the whole text if the whole text is scored.
        choices: The options, in the order of the requests; none for open answers.
        answer: The gold answer of a document without options; None if the task gives no answer.
    """

    question: str
    choices: tuple[str, ...] = ()
    answer: str | None = None


class Response(NamedTuple):
    """The model's response to one request; lm-eval returns the first two fields for a choice.

    Attributes:
        loglikelihood: Summed log-probability of the continuation, in nats.
        greedy: True if every token of the continuation is the most likely one.
        hits: Number of the continuation's tokens that are the most likely one.
        text: The generated text; None where the document has no prompt.
    """

    loglikelihood: float
    greedy: bool
    hits: int
    text: str | None = None
