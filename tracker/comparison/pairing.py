"""Match the documents of two models, and refuse answers to different questions."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import pandas as pd

from tracker.comparison.answers import BenchmarkAnswers
from tracker.schema.errors import RequestError

PROMPT = "prompt"
"""Name of the setting that stands for any difference of prompts."""
PROMPT_SETTINGS = {PROMPT, "version", "num_fewshot", "chat_template", "system_instruction"}
"""Settings that change prompts."""


class PairedTables(NamedTuple):
    """Two models' answers to the common documents, and the names of all other documents."""

    first: pd.DataFrame
    second: pd.DataFrame
    only_first: list[str]
    only_second: list[str]


def pair_documents(
    benchmark: str,
    first: BenchmarkAnswers,
    second: BenchmarkAnswers,
    allowed: Collection[str] = (),
) -> PairedTables:
    """Match the documents of a benchmark.

    Documents are matched by the hashes of document and right answer. Without hashes, they are
    matched by their numbers, and documents with different texts count as unmatched.

    Args:
        benchmark: Name of the benchmark.
        first: Answers of the first model.
        second: Answers of the second model.
        allowed: Settings that may differ.

    Returns:
        The rows of both tables for the common documents, and the names of all others.

    Raises:
        RequestError: A setting differs that may not differ, or no document is common.
    """
    for name in first.settings.keys() & second.settings.keys() - {*allowed}:
        if first.settings[name] != second.settings[name]:
            values = f"{first.settings[name][:60]} against {second.settings[name][:60]}"
            raise _different(benchmark, name, values)
    has_keys = all((answers.table["key"] != "").all() for answers in (first, second))
    columns = ["task", "key" if has_keys else "doc"]
    a, b = (answers.table.set_index(columns, drop=False) for answers in (first, second))
    common = a.index.intersection(b.index, sort=False)
    if not has_keys:
        common = common[[_have_same_end(first, second, *document) for document in common]]
    if not len(common):
        raise RequestError(f"{benchmark}: the models have no document in common")
    others = [table[~table.index.isin(common)] for table in (a, b)]
    names = ((table["task"] + " " + table["doc"].astype(str)).tolist() for table in others)
    pairs = PairedTables(a.loc[common], b.loc[common], *names)
    prompts = pairs.first["prompt"], pairs.second["prompt"]
    differs = (prompts[0] != prompts[1]) & (prompts[0] != "") & (prompts[1] != "")
    if differs.any() and not PROMPT_SETTINGS & {*allowed}:
        raise _different(benchmark, PROMPT, f"for {differs.sum()} of {len(common)} documents")
    return pairs


def _different(benchmark: str, name: str, values: str) -> RequestError:
    advice = f"evaluate both models in the same way, or add --allow-different {name}"
    return RequestError(f"{benchmark}: {name} differs, {values}; {advice}")


def _have_same_end(first: BenchmarkAnswers, second: BenchmarkAnswers, task: str, doc: int) -> bool:
    """Return whether one prompt ends with the other; an unknown text ends with any other."""
    a, b = (answers.read_text(task, doc).question.strip()[-100:] for answers in (first, second))
    return a.endswith(b) or b.endswith(a)
