"""Recognise corpora and traces by the prefix of a benchmark's name."""

from __future__ import annotations

from tracker.schema.config import BenchmarkSpec
from tracker.schema.errors import BenchmarkError

CORPUS_PREFIX = "corpus:"
TRACES_PREFIX = "traces:"


def names_corpus(benchmark: str) -> bool:
    """Return whether a benchmark's name denotes a corpus instead of a task of lm-eval."""
    return benchmark.startswith(CORPUS_PREFIX)


def names_traces(benchmark: str) -> bool:
    """Return whether a benchmark's name denotes texts to read instead of a task of lm-eval."""
    return benchmark.startswith(TRACES_PREFIX)


def written_spec(spec: BenchmarkSpec) -> BenchmarkSpec:
    """Return the settings of the benchmark whose texts are read; other settings are unchanged.

    Raises BenchmarkError if the name of the benchmark contains no task.
    """
    task = spec.benchmark.removeprefix(TRACES_PREFIX)
    if names_traces(spec.benchmark) and (not task or names_traces(task) or names_corpus(task)):
        raise BenchmarkError(
            f"{spec.benchmark!r} does not name a generation task; write traces:TASK, e.g. "
            "traces:gsm8k"
        )
    return spec.renamed(task)
