"""Define tokenised benchmark documents and a model's responses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tracker.schema.provenance import content_hash


@dataclass(frozen=True)
class Request:
    """One (context, continuation) pair that lm-eval asks the model to score.

    Attributes:
        context: Token ids that the model reads before the continuation; never empty.
        continuation: Token ids whose log-likelihood is computed; never empty.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def length(self) -> int:
        """The total number of tokens of the context and the continuation."""
        return len(self.context) + len(self.continuation)


@dataclass(frozen=True)
class Prompt:
    """Prompt of a generation task, which the model continues with text.

    Attributes:
        text: The text of the prompt.
        settings: lm-eval's generation settings, such as stop strings and the maximum number of
            tokens.
        think_end_token: Token that ends the thinking; None if the whole text is the answer.
        samples: Number of texts that are generated for the prompt.
        seed: Seed of the random numbers of sampled texts.
        budgets: Smaller maximum numbers of tokens, ascending. The text is also evaluated as if
            generation had ended at each smaller maximum.
    """

    text: str
    settings: Mapping[str, Any]
    think_end_token: str | int | None = None
    samples: int = 1
    seed: int = 0
    budgets: tuple[int, ...] = ()

    @property
    def is_sampled(self) -> bool:
        """True if texts are sampled at random, by the same rule as in lm-eval."""
        return samples_texts(self.settings)

    @property
    def max_tokens(self) -> int:
        """The maximum number of generated tokens; lm-eval's default is 256."""
        return int(self.settings.get("max_gen_toks", 256))

    def with_limit(self, tokens: int) -> Prompt:
        """Return a copy of the prompt that allows at most `tokens` generated tokens."""
        limit = min(tokens, self.max_tokens)
        return replace(self, settings={**self.settings, "max_gen_toks": limit})


def samples_texts(settings: Mapping[str, Any]) -> bool:
    """Return whether texts are sampled at random with these generation settings of lm-eval."""
    do_sample = settings.get("do_sample")
    return bool(float(settings.get("temperature") or 0) > 0 if do_sample is None else do_sample)


@dataclass(frozen=True)
class Document:
    """One item of a benchmark, tokenised for a model.

    Attributes:
        task: The lm-eval task or the text corpus that contains the document.
        index: The document's position in the task's split, 0-based.
        requests: The (context, continuation) pairs to score, in lm-eval's order.
        gold: The index of the request with the right answer; None unless there is exactly one.
        choices: Number of answer options; 0 for free-form answers.
        rolling: True if the requests are consecutive windows of one text.
        prompt: The prompt of a generation task; None for other tasks.
        traces: The texts that the intact model generated and that the requests score; empty for
            benchmarks with given texts.
    """

    task: str
    index: int
    requests: tuple[Request, ...]
    gold: int | None
    choices: int
    rolling: bool = False
    prompt: Prompt | None = None
    traces: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, int]:
        """The document's key: the task's name and the position in the task's split."""
        return self.task, self.index

    def tokens_digest(self, max_length: int) -> str:
        """Return a hash of the tokens of all requests.

        Requests are truncated to the tokens that fit into the context length `max_length`.
        """
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
        question: The part of the prompt after the few-shot examples, or the whole text of a corpus
            document.
        choices: The answer options, in the order of the requests; empty for free-form answers.
        answer: The gold answer of a document without answer options; None if the task defines no
            answer.
    """

    question: str
    choices: tuple[str, ...] = ()
    answer: str | None = None


class GeneratedText(NamedTuple):
    """A text that the model generates for a prompt.

    Attributes:
        text: The text, up to the first stop string.
        tokens: Number of generated tokens before the end of the text; None if unknown.
        is_cut: True if the maximum number of tokens ended the text; None if unknown.
        early: The text after each number of tokens in the prompt's `budgets`.
    """

    text: str
    tokens: int | None = None
    is_cut: bool | None = None
    early: tuple[str, ...] = ()


class Response(NamedTuple):
    """The model's response to one request.

    Attributes:
        loglikelihood: Summed log-probability of the continuation, in nats.
        greedy: True if the model ranks every token of the continuation first.
        hits: Number of continuation tokens that the model ranks first.
        texts: The generated texts; empty if the document is not part of a generation task.
        leading: Number of continuation tokens before the first token that the model does not rank
            first; None if unknown.
    """

    loglikelihood: float
    greedy: bool
    hits: int
    texts: tuple[GeneratedText, ...] = ()
    leading: int | None = None
