"""Define a model's answers to the documents of several benchmarks, and match documents."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import pandas as pd

from tracker.schema.errors import RequestError

CLUSTER = "(cluster)"
"""Column with the number of a document's cluster; no metric has this name."""


@dataclass(frozen=True)
class BenchmarkAnswers:
    """A model's answers to the documents of a task or a group of tasks.

    Attributes:
        table: Table with one row per document and one column per metric; undefined metrics are NaN.
            The columns `task` and `doc` identify the document. The column `key` is a unique hash of
            the document and its right answer. The column `prompt` is a hash of the prompt. Unknown
            hashes are empty strings. The column `question` is the prompt or its end. The column
            `choices` is the list of options. The columns `gold` and `choice` are the numbers of the
            right option and the chosen option. The column `answer` is the right answer. The column
            `text` is the generated answer. The column `CLUSTER` is the number of the document's
            cluster; the column is absent if the user named no clusters.
        higher_is_better: Name of each metric in the table → whether higher values are better.
        settings: Name of a setting that changes answers (e.g. `num_fewshot`) → value as text.
            Unknown settings are absent.
        by_size: True if each metric is a mean over all documents; False if each metric is a mean
            over tasks.
        left_out: Name of each metric that cannot be compared → reason.
    """

    table: pd.DataFrame
    higher_is_better: Mapping[str, bool]
    settings: Mapping[str, str]
    by_size: bool
    left_out: Mapping[str, str] = field(default_factory=dict)


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


PROMPT = "prompt"
"""Name of the setting that stands for any difference of prompts."""
PROMPT_SETTINGS = {PROMPT, "version", "num_fewshot", "chat_template", "system_instruction"}
"""Settings that change prompts."""


class PairedTables(NamedTuple):
    """Two models' answers to their common documents, and names of unmatched documents.

    Attributes:
        first: Answers of the first model to the common documents.
        second: Answers of the second model to the common documents, in the same order.
        only_first: Names of the documents that only the first model answered.
        only_second: Names of the documents that only the second model answered.
    """

    first: pd.DataFrame
    second: pd.DataFrame
    only_first: list[str]
    only_second: list[str]


def pair_documents(
    benchmark: str, first: BenchmarkAnswers, second: BenchmarkAnswers, allowed: Collection[str] = ()
) -> PairedTables:
    """Match the documents that two models answered on a benchmark.

    Documents are matched by a hash of the document and its right answer. If any hash is missing,
    documents are matched by their number and their text.

    Args:
        benchmark: Name of the benchmark.
        first: Answers of the first model.
        second: Answers of the second model.
        allowed: Names of settings in which the two models may differ.

    Returns:
        The rows of both tables for the common documents, and the names of unmatched documents.

    Raises:
        RequestError: The models have no common document, or differ in settings outside `allowed`.
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
        texts = (table.loc[common, "question"].str.strip().str[-100:] for table in (a, b))
        common = common[[x.endswith(y) or y.endswith(x) for x, y in zip(*texts, strict=True)]]
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
    advice = f"evaluate both models with the same {name}, or add --allow-different {name}"
    return RequestError(f"{benchmark}: the models differ in {name}, {values}; {advice}")
