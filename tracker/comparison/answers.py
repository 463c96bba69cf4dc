"""Define a model's answers to the documents of several tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from tracker.stats.arrays import Array

ENDING_LENGTH = 200
"""Number of characters at the end of a prompt that identify a document without hashes."""


@dataclass(frozen=True)
class AnswerText:
    """Text of a document and of a model's answer, for display.

    Attributes:
        question: The prompt, or its end.
        answer: The chosen option, or the generated text.
        target: The right answer.
    """

    question: str
    answer: str
    target: str


@dataclass(frozen=True)
class TaskAnswers:
    """A model's answers to the documents of one task.

    Attributes:
        documents: Table with one row per document. The index is the document's number. The columns
            are `key` (hash of document and right answer), `prompt` (hash of the prompt) and
            `ending` (end of the prompt); an unknown entry is empty.
        metrics: Metric → its value for each document, in the same order; NaN if undefined.
        higher_is_better: Metric → whether higher is better.
        settings: Setting that changes the answers → its value as text; unknown settings are absent.
        left_out: Metric that cannot be compared → reason.
        read_text: Function that reads the text of a document, given by its number.
        path: File of the answers; None if they are not in one file.
    """

    documents: pd.DataFrame
    metrics: Mapping[str, Array]
    higher_is_better: Mapping[str, bool]
    settings: Mapping[str, str]
    left_out: Mapping[str, str]
    read_text: Callable[[int], AnswerText]
    path: Path | None = None


@dataclass(frozen=True)
class TaskGroup:
    """Group of tasks whose accuracies are averaged into one.

    Attributes:
        tasks: Names of the tasks.
        by_size: Whether every document has the same weight; otherwise every task.
    """

    tasks: Sequence[str]
    by_size: bool = True


@dataclass(frozen=True)
class ModelAnswers:
    """A model's answers to all its tasks.

    Attributes:
        name: Short name of the model.
        source: The argument that names the answers, as typed.
        tasks: Name of a task → answers.
        groups: Name of a group → its tasks.
    """

    name: str
    source: str
    tasks: Mapping[str, TaskAnswers]
    groups: Mapping[str, TaskGroup] = field(default_factory=dict)
