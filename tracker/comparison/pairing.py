"""Match the documents of two models, and refuse answers to different questions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tracker.comparison.answers import AnswerText, TaskAnswers
from tracker.schema.errors import RequestError
from tracker.schema.formats import count_text
from tracker.stats.arrays import Array

PROMPT = "prompt"
"""Name of the setting that stands for any difference of prompts."""
PROMPT_SETTINGS = {PROMPT, "version", "num_fewshot", "chat_template", "system_instruction"}
"""Settings that change prompts."""
MAX_NAMED = 5
"""Maximum number of documents that a message names."""


@dataclass(frozen=True)
class PairedTask:
    """Answers of two models to the same documents of one task.

    Attributes:
        first: Answers of the first model.
        second: Answers of the second model.
        first_rows: Row of each common document in the first model's answers.
        second_rows: Row of each common document in the second model's answers.
    """

    first: TaskAnswers
    second: TaskAnswers
    first_rows: NDArray[np.intp]
    second_rows: NDArray[np.intp]

    @cached_property
    def unmatched(self) -> tuple[list[int], list[int]]:
        """The documents that only the first and only the second model answered."""
        first = np.delete(self.first.documents.index.to_numpy(), self.first_rows)
        second = np.delete(self.second.documents.index.to_numpy(), self.second_rows)
        return first.tolist(), second.tolist()

    def values(self, metric: str) -> tuple[Array, Array]:
        """Return a metric of the common documents in both models."""
        first, second = self.first.metrics[metric], self.second.metrics[metric]
        return first[self.first_rows], second[self.second_rows]

    def read_texts(self, number: int) -> tuple[int, AnswerText, AnswerText]:
        """Return a common document's number in the first model, and the texts of both answers."""
        doc = int(self.first.documents.index[self.first_rows[number]])
        second_doc = int(self.second.documents.index[self.second_rows[number]])
        return doc, self.first.read_text(doc), self.second.read_text(second_doc)


def pair_task(
    task: str, first: TaskAnswers, second: TaskAnswers, allowed: Collection[str] = ()
) -> PairedTask:
    """Match the documents of a task.

    Documents are matched by the hashes of document and right answer. Without hashes, they are
    matched by their numbers, and documents with different texts count as unmatched.

    Args:
        task: Name of the task.
        first: Answers of the first model.
        second: Answers of the second model.
        allowed: Settings that may differ.

    Raises:
        RequestError: A setting differs that may not differ.
    """
    different = {
        name: (value, second.settings[name])
        for name, value in first.settings.items()
        if name in second.settings and value != second.settings[name]
    }
    refuse_different(task, different, allowed)
    pairs = _match(first.documents, second.documents)
    prompts = pairs[["prompt_first", "prompt_second"]].replace("", np.nan).dropna()
    n_other = int((prompts["prompt_first"] != prompts["prompt_second"]).sum())
    if n_other and not PROMPT_SETTINGS & {*allowed}:
        counts = f"{n_other} of {count_text(len(pairs), 'document')}"
        refuse_different(task, {PROMPT: (f"the prompts of {counts}", "others")}, allowed)
    rows = [pairs[name].to_numpy(dtype=np.intp) for name in ("row_first", "row_second")]
    return PairedTask(first, second, *rows)


def refuse_different(
    task: str, different: Mapping[str, tuple[str, str]], allowed: Collection[str]
) -> None:
    """Raise RequestError if a setting differs that is not among the allowed ones."""
    for name, values in different.items():
        if name not in allowed:
            first, second = (value if len(value) < 60 else f"{value[:60]}…" for value in values)
            raise RequestError(
                f"{task}: {name} differs, {first} against {second}; evaluate both models in the "
                f"same way, or add --allow-different {name}"
            )


def _match(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Return one row per common document, with the columns of both tables."""
    has_keys = all(bool((frame["key"] != "").all()) for frame in (first, second))
    tables = []
    for frame in (first, second):
        table = frame.rename_axis("number").reset_index().assign(row=np.arange(len(frame)))
        # A data set may hold the same document several times.
        tables.append(table.assign(copy=table.groupby("key").cumcount()))
    on = ["key", "copy"] if has_keys else ["number"]
    pairs = tables[0].merge(tables[1], on=on, suffixes=("_first", "_second"))
    if not has_keys:
        endings = zip(pairs["ending_first"], pairs["ending_second"], strict=True)
        pairs = pairs[[_have_same_end(*texts) for texts in endings]]
    return pairs


def _have_same_end(first: str, second: str) -> bool:
    """Return whether one text ends with the other; an unknown text ends with any other."""
    return first.endswith(second) or second.endswith(first)
