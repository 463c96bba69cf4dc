"""Define a model's answers to the documents of several benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd

CLUSTER = "(cluster)"
"""Column with the number of a document's cluster; no metric has this name."""


class AnswerText(NamedTuple):
    """Texts for display: end of the prompt, chosen or generated answer, right answer."""

    question: str
    answer: str
    target: str


@dataclass(frozen=True)
class BenchmarkAnswers:
    """A model's answers to the documents of a task or a group of tasks.

    Attributes:
        table: Table with one row per document. The columns are `task`, `doc` (the document's
            number), `key` (hash of document and right answer, unique), `prompt` (hash of the
            prompt), the metrics, and `CLUSTER` (number of the document's cluster) if the user named
            clusters. Unknown hashes are empty, and undefined metrics are NaN.
        higher_is_better: Metric of the table → whether higher is better.
        settings: Setting that changes the answers → its value as text; unknown settings are absent.
        left_out: Metric that cannot be compared → reason.
        by_size: Whether metrics are means over documents; otherwise over tasks.
        read_text: Function that reads the texts of a document, given by task and number.
    """

    table: pd.DataFrame
    higher_is_better: Mapping[str, bool]
    settings: Mapping[str, str]
    left_out: Mapping[str, str]
    by_size: bool
    read_text: Callable[[str, int], AnswerText]


@dataclass(frozen=True)
class ModelAnswers:
    """A model's answers to all its benchmarks.

    Attributes:
        name: Short name of the model.
        source: The argument that names the answers, as typed.
        benchmarks: Name of the benchmark → answers.
    """

    name: str
    source: str
    benchmarks: Mapping[str, BenchmarkAnswers]


def setting_text(value: object) -> str:
    """Write the value of a setting as text."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
