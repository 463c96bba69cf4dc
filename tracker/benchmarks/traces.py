"""Score texts that the intact model wrote for a generation task.

All changed models read the same texts.

The benchmark's name is `traces:TASK`, with the name of a task of lm-eval. The intact model writes
the texts (traces) of each document once. Metrics are means over the traces of a document.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, product
from statistics import fmean
from typing import NamedTuple

from tracker.benchmarks.base import MetricValue
from tracker.benchmarks.encoder import RequestEncoder
from tracker.benchmarks.tasks import LmEvalBenchmark, answer_request, first_text
from tracker.schema.config import TRACES_PREFIX, CellRequest, generation_spec
from tracker.schema.documents import Document, Request, Response
from tracker.schema.errors import BenchmarkError
from tracker.schema.identities import CUT_OFF, TaskIdentity, filter_name, filtered_metric
from tracker.schema.provenance import content_hash
from tracker.schema.safe_yaml import short_text

FIRST_TRACES = 8
"""Number of documents whose traces are checked before any is read."""
_ANSWER_METRICS = ("answer_kept", "answer_kept_right", "answer_kept_wrong", "answer_probability")
"""Metrics of the final answer that a filter extracts from the trace."""
_TRACE_METRICS = {"tokens_kept": True, "prefix_kept": True, "trace_loss": False}
"""Metrics of the whole trace; the value states whether higher is better."""


class _Answer(NamedTuple):
    """The final answer that a filter extracts from a trace.

    Attributes:
        request: Index of the request that scores the answer; None if the trace has no answer.
        right: Whether the task judges the answer as right.
    """

    request: int | None
    right: bool


class _Trace(NamedTuple):
    """A trace (text of the intact model), and the requests that score it in every model.

    Attributes:
        text: The text.
        request: Index of the request that scores the whole text.
        answers: The final answer that each filter extracts, by the filter's name.
    """

    text: str
    request: int
    answers: dict[str, _Answer]

    @property
    def gold(self) -> int | None:
        """Index of the request that scores the first filter's final answer; None if missing."""
        return next(iter(self.answers.values())).request


_NO_ANSWER = Response(-math.inf, greedy=False, hits=0)
"""Response of every model to an answer that a trace lacks: no model keeps it."""


class Traces(LmEvalBenchmark):
    """Benchmark of the texts that the intact model writes for a generation task.

    Changed models score the texts, but generate no texts.

    Raises BenchmarkError if the task or its data cannot be read, or if the task generates no texts.
    """

    def __init__(self, request: CellRequest) -> None:
        spec = generation_spec(request.benchmark)
        if spec.budgets:
            raise BenchmarkError(
                f"budgets: {request.benchmark} always scores whole texts; leave budgets out, or "
                f"write benchmark: {spec}"
            )
        super().__init__(replace(request, benchmark=spec))
        for name in self._tasks:
            if name not in self._generated:
                raise BenchmarkError(
                    f"{request.benchmark}: {name} scores given answers, so the model writes no "
                    f"text to read; name a generation task, or write benchmark: {spec}"
                )
        identity = self.identity
        self._judges = {task.name: _find_first_metrics(task) for task in identity.tasks}
        first_filter = next(iter(self._judges[identity.tasks[0].name]))
        self.identity = identity.model_copy(
            update={
                "name": TRACES_PREFIX + identity.name,
                "tasks": tuple(map(self._task_identity, identity.tasks)),
                "primary_metric": filtered_metric(_ANSWER_METRICS[0], first_filter),
            }
        )
        self._traces: dict[tuple[str, int], list[_Trace]] = {}

    def _task_identity(self, task: TaskIdentity) -> TaskIdentity:
        pairs = product(self._judges[task.name], _ANSWER_METRICS)
        names = [filtered_metric(metric, filter_name) for filter_name, metric in pairs]
        directions = dict.fromkeys(names, True) | _TRACE_METRICS
        return task.model_copy(
            update={
                "fingerprint": content_hash(["traces", task.fingerprint]),
                "metrics": dict.fromkeys(directions, "mean"),
                "higher_is_better": directions,
                "has_options": None,
            }
        )

    def assume_longest_traces(self, documents: Sequence[Document]) -> list[Document]:
        """Return copies of documents as if each trace had the maximum length, to estimate costs."""
        readings = []
        for document in documents:
            request, prompt = document.requests[0], document.prompt
            assert prompt is not None
            longest = Request(request.context, request.continuation[:1] * prompt.max_tokens)
            readings.append(replace(document, requests=(longest,) * prompt.samples))
        return readings

    def read_traces(
        self, document: Document, texts: Sequence[str], encoder: RequestEncoder
    ) -> Document:
        """Return a copy of a document with requests that score its traces and their final answers.

        Args:
            document: Document that `documents()` returned.
            texts: The texts that the intact model wrote for the document's prompt.
            encoder: Encoder that tokenises requests for the model as lm-eval does.

        Returns:
            The copy. With one trace, `gold` is the index of the request that scores the first
            filter's final answer. Without such an answer, or with several traces, `gold` is None.
        """
        requests: list[Request] = []
        traces = [self._read_trace(document, text, encoder, requests) for text in texts]
        self._traces[document.key] = traces
        gold = traces[0].gold if len(traces) == 1 else None
        return replace(
            document, requests=tuple(requests), gold=gold, prompt=None, traces=tuple(texts)
        )

    def _read_trace(
        self, document: Document, text: str, encoder: RequestEncoder, requests: list[Request]
    ) -> _Trace:
        """Find the final answers in a trace, and append the requests that score them to `requests`.

        The first appended request scores the whole trace.
        """
        prompt = document.prompt
        assert prompt is not None
        judged = self._judge(document, [text], [text] * prompt.samples)
        whole, trace = answer_request(encoder, prompt, text), _Trace(text, len(requests), {})
        # The model that wrote the text read no more of the prompt.
        context = whole.context[-max(1, encoder.max_length - prompt.max_tokens) :]
        requests.append(replace(whole, context=context))
        for name, metric in self._judges[document.task].items():
            span = find_tokens(encoder, whole.continuation, first_text(judged.answers[name]))
            number = len(requests) if span else None
            trace.answers[name] = _Answer(number, judged.metrics[metric] == 1)
            if span:
                before, answer = whole.continuation[: span.start], whole.continuation[span]
                requests.append(Request(context + before, answer))
        return trace

    def check_traces(self, documents: Sequence[Document]) -> None:
        """Raise BenchmarkError if no trace of the first documents has a final answer.

        `documents` are documents that `read_traces` returned.
        """
        traces = [*chain.from_iterable(self._traces[document.key] for document in documents)]
        if all(trace.gold is None for trace in traces):
            texts = ", ".join(short_text(trace.text) for trace in traces[:FIRST_TRACES])
            raise BenchmarkError(
                f"{self.identity.name}: the task finds no answer in the model's first "
                f"{len(traces)} texts: {texts}. Raise max_gen_toks in gen_kwargs, add few-shot "
                "examples or a chat template, or choose another task"
            )

    def outcomes(
        self, document: Document, responses: Sequence[Response]
    ) -> dict[str, MetricValue | None]:
        """Compute the metrics of a document's traces for one model.

        Metrics of the final answer are 0 for a trace without a final answer.
        """
        traces = self._traces[document.key]
        by_trace = [_trace_values(document, trace, responses) for trace in traces]
        is_finite = all(math.isfinite(response.loglikelihood) for response in responses)
        return {
            name: fmean(values[name] for values in by_trace) if is_finite else None
            for name in by_trace[0]
        }


def find_tokens(encoder: RequestEncoder, tokens: Sequence[int], answer: str) -> slice | None:
    """Find the last tokens of a text that contain an extracted answer.

    Returns None if the text does not contain the answer.

    The search ignores case if the exact answer does not occur: a filter can change the case.
    """
    *beginnings, text = (encoder.tok_decode(tokens[:n]) for n in range(len(tokens) + 1))
    answer = answer.strip()
    start = text.rfind(answer)
    if start < 0:
        start = text.lower().rfind(answer.lower())
    if not answer or start < 0:
        return None
    # A beginning can end within a character.
    lengths = {n: len(s) for n, s in enumerate([*beginnings, text]) if text.startswith(s)}
    first = max(n for n, length in lengths.items() if length <= start)
    stop = min(n for n, length in lengths.items() if length >= start + len(answer))
    return slice(first, stop)


def _trace_values(
    document: Document, trace: _Trace, responses: Sequence[Response]
) -> dict[str, float]:
    """Compute the metrics of one trace of a document for one model."""
    values: dict[str, float] = {}
    for name, (request, right) in trace.answers.items():
        response = _NO_ANSWER if request is None else responses[request]
        is_kept, probability = response.greedy, math.exp(min(response.loglikelihood, 0.0))
        figures = (is_kept, is_kept and right, is_kept and not right, probability)
        names = (filtered_metric(metric, name) for metric in _ANSWER_METRICS)
        values |= zip(names, map(float, figures), strict=True)
    whole = responses[trace.request]
    n_tokens = len(document.requests[trace.request].continuation)
    sums = (whole.hits, whole.leading or 0, -whole.loglikelihood)
    if not trace.text:  # it has no token that could change
        sums = (n_tokens, n_tokens, 0.0)
    return values | {name: n / n_tokens for name, n in zip(_TRACE_METRICS, sums, strict=True)}


def _find_first_metrics(task: TaskIdentity) -> dict[str, str]:
    """Map the name of each filter (answer extractor) to the name of the filter's first metric."""
    judges: dict[str, str] = {}
    for metric in (name for name in task.metrics if name != CUT_OFF):
        judges.setdefault(filter_name(metric), metric)
    return judges
