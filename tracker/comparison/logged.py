"""Build a model's answers to a benchmark from logged samples, e.g. of lm-eval."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pydantic import BaseModel, Field, ValidationError

from tracker.comparison.answers import BenchmarkAnswers, setting_text
from tracker.schema.errors import RequestError, first_line, translate_errors
from tracker.schema.fields import first_problem
from tracker.schema.identities import CHOICE_PROBABILITY
from tracker.stats.accuracy import weights_by_task
from tracker.stats.decisions import choose_options, gold_probabilities

_TOLERANCE = 1e-6
"""Largest difference between the reported mean and ours by rounding."""
_ACCURACIES = ("acc", "exact_match", "f1", "em", "bleu", "rouge", "mcc")
"""Starts of the names of metrics of which higher is better, if no file of results says so."""
_CONFIG_SETTINGS = ("filter_list", "repeats", "generation_kwargs")
"""Settings in a task's configuration that change the answers."""
ENDING_LENGTH = 600
"""Number of characters of a prompt that are displayed."""
_DOCUMENT = ["task", "doc"]
"""Columns that name a document."""


class Sample(NamedTuple):
    """A model's answer to one document, after lm-eval applied one filter to the answer.

    Attributes:
        task: Name of the task.
        doc: Number of the document.
        key: Hash of document and right answer; empty if unknown.
        prompt: Hash of the prompt; empty if unknown.
        question: End of the prompt.
        choices: Texts of the options; empty if unknown.
        gold: Number of the right option; None if unknown.
        answer: Text of the right answer without options.
        scores: Log-likelihoods of the options; None without options.
        text: Generated text.
        filter: Name of the filter; `none` without a filter.
        metrics: Name of the metric → value.
    """

    task: str
    doc: int
    key: str
    prompt: str
    question: str
    choices: Sequence[str]
    gold: int | None
    answer: str
    scores: Sequence[float] | None
    text: str
    filter: str
    metrics: dict[str, Any]


class Report(BaseModel):
    """Results of a model, as in lm-eval's file of results; most mappings have tasks as keys."""

    name: str | None = Field(None, alias="model_name")
    results: Mapping[str, Mapping[str, Any]] = {}
    group_subtasks: Mapping[str, Sequence[str]] = {}
    higher_is_better: Mapping[str, Mapping[str, bool | None]] = {}
    configs: Mapping[str, Mapping[str, Any]] = {}
    versions: Mapping[str, Any] = {}
    num_fewshot: Mapping[str, Any] = Field({}, alias="n-shot")
    chat_template: Any = Field(None, alias="chat_template_sha")
    system_instruction: Any = Field(None, alias="system_instruction_sha")

    def benchmarks(self, logged_tasks: Iterable[str]) -> dict[str, list[str]]:
        """Group the logged tasks into benchmarks; return benchmark name → task names.

        A group of tasks is one benchmark if all its tasks were logged. Every other task is a
        benchmark by itself. Groups inside other groups are not benchmarks.
        """
        inner_names = {child for children in self.group_subtasks.values() for child in children}
        others, benchmarks = dict.fromkeys(logged_tasks), {}
        for group in [name for name in self.group_subtasks if name not in inner_names]:
            tasks = self._group_tasks(group)
            if others.keys() >= {*tasks}:
                benchmarks[group] = tasks
                others = {task: None for task in others if task not in tasks}
        return benchmarks | {task: [task] for task in others}

    def _group_tasks(self, name: str) -> list[str]:
        """Return the tasks of a group and of its subgroups.

        If `name` is the name of a task, the list contains only this task.
        """
        children = self.group_subtasks.get(name) or ()
        tasks = [task for child in children for task in self._group_tasks(child)]
        return [*dict.fromkeys(tasks or [name])]

    def is_better(self, task: str, metric: str) -> bool | None:
        """Return whether higher values of a metric are better; None if it is not known."""
        name = metric.partition(",")[0]
        default = True if name.startswith(_ACCURACIES) else None
        return self.higher_is_better.get(task, {}).get(name, default)

    def settings(self, tasks: Sequence[str]) -> dict[str, str]:
        """Return the settings that change answers, such as `num_fewshot`, as texts.

        The dict is empty if the report has no results of `tasks`.
        """
        if not any(task in self.results for task in tasks):
            return {}

        configs = [self.configs.get(task, {}) for task in tasks]
        values = {key: [config.get(key) for config in configs] for key in _CONFIG_SETTINGS}
        values |= {
            "version": [self.versions.get(task) for task in tasks],
            "num_fewshot": [self.num_fewshot.get(task) for task in tasks],
            "chat_template": [self.chat_template],
            "system_instruction": [self.system_instruction],
        }
        texts = {name: dict.fromkeys(map(setting_text, values[name])) for name in values}
        return {name: ", ".join(different) for name, different in texts.items()}


class LogFormat(NamedTuple):
    """Format of the files in which an evaluation program logs a model's answers.

    Attributes:
        program: Name of the program.
        read_report: Function (path, date) that reads the model's results.
        read_samples: Function (task, path) that reads the model's answers to a task.
    """

    program: str
    read_report: Callable[[Path, str], Report]
    read_samples: Callable[[str, Path], Iterator[Sample]]


def build_answers(
    samples: Iterable[Sample], report: Report, benchmark: str, tasks: Sequence[str]
) -> BenchmarkAnswers:
    """Build the answers to a benchmark from the samples of its tasks.

    Args:
        samples: Logged answers to the documents of `tasks`.
        report: Reported settings and mean metrics of the model.
        benchmark: Name of the benchmark.
        tasks: Names of the benchmark's tasks.

    Returns:
        The answers, with all metrics that are means over documents.

    Raises:
        ValueError: Samples are missing, or a document occurs twice.
    """
    rows = pd.DataFrame(samples, columns=list(Sample._fields))
    table = rows.drop_duplicates(_DOCUMENT).sort_values(_DOCUMENT, ignore_index=True)
    table["gold"], table["choice"] = table["gold"].astype(np.float64), np.nan
    expected = sum(report.results.get(task, {}).get("sample_len", 1) for task in tasks)
    if len(table) < expected:
        names, n = ", ".join(tasks), len(table)
        raise ValueError(f"the samples of {names} contain only {n} of {expected} documents")
    for task, doc in rows.loc[rows.duplicated([*_DOCUMENT, "filter"]), _DOCUMENT].to_numpy():
        raise ValueError(f"document {doc} of {task} occurs twice; give the files of one run")
    copies = table.groupby(["task", "key"]).cumcount().astype(str)
    table["key"] = table["key"].where(table["key"] == "", table["key"] + copies)
    values = pd.concat([*map(_metric_columns, rows.groupby("filter", sort=False))], axis=1)
    values = values.reindex(pd.MultiIndex.from_frame(table[_DOCUMENT]))
    reported = report.results.get(benchmark, {})
    by_size, is_better, left_out = True, {}, {}
    for name in map(str, values):
        mean = reported.get(name if "," in name else f"{name},none")
        higher, weightings = report.is_better(tasks[0], name), _find_weights(values[name], mean)
        if name in table:
            left_out[name] = "the metric has the name of another column of tracker"
        elif values[name].dtype == object:
            left_out[name] = "the metric's value for a document is not a number"
        elif not weightings:
            left_out[name] = (
                f"the reported value {mean:.4f} is not the mean over the documents in the samples"
            )
        elif higher is None:
            left_out[name] = "it is not known whether higher values of the metric are better"
        else:
            by_size, is_better[name] = by_size and weightings[0], higher
            table[name] = values[name].to_numpy(dtype=np.float64)
    if (table["scores"].notna() & table["gold"].notna()).all():
        _add_choices(table)
    if CHOICE_PROBABILITY in table:
        is_better[CHOICE_PROBABILITY] = True
    table = table.drop(columns=["filter", "metrics", "scores"])
    return BenchmarkAnswers(table, is_better, report.settings(tasks), by_size, left_out)


def _add_choices(table: pd.DataFrame) -> None:
    """Add the column `choice`: the number of the option with the highest score.

    If choosing this option gives the stored `acc` for every document, the function also adds the
    probability of the right option.
    """
    scores = pd.DataFrame(table["scores"].tolist()).to_numpy(dtype=np.float64)
    is_option = (table["gold"] >= 0) & (table["gold"] < (~np.isnan(scores)).sum(axis=1))
    table["choice"] = choose_options(scores)
    is_right = table["choice"] == table["gold"]
    if is_option.all() and "acc" in table and (is_right == table["acc"]).all():
        table[CHOICE_PROBABILITY] = gold_probabilities(scores, table["gold"].to_numpy())


def _metric_columns(filtered: tuple[Any, pd.DataFrame]) -> pd.DataFrame:
    """Build a table with a row per document and a column per metric.

    `filtered` is a pair: the name of an lm-eval filter, and the samples with this filter.
    """
    name, rows = filtered
    metrics = pd.DataFrame(rows["metrics"].tolist(), pd.MultiIndex.from_frame(rows[_DOCUMENT]))
    return metrics if name == "none" else metrics.add_suffix(f",{name}")


def _find_weights(values: pd.Series[Any], mean: object) -> list[bool]:
    """Find whether a reported mean gives equal weights to documents or to tasks.

    Args:
        values: Metric of each document.
        mean: The reported mean; None if it is unknown.

    Returns:
        The weightings that give the reported mean: True for equal weights of documents, False for
        equal weights of tasks. [True] if the mean is unknown.
    """
    if values.dtype == object or not isinstance(mean, float | int):
        return [True]
    tasks = values.index.get_level_values(0).tolist()
    errors = {flag: values @ weights_by_task(tasks, flag) - mean for flag in (True, False)}
    return [by_size for by_size, error in errors.items() if abs(error) < _TOLERANCE]


def explain_damage(
    source: object | Callable[[], object], program: str
) -> AbstractContextManager[None]:
    """Return a context manager that reports a damaged file as RequestError.

    An OSError is passed on unchanged.

    Args:
        source: Name of the file in the message, or a function that returns this name.
        program: Program that wrote the file.

    Returns:
        The context manager.
    """

    def convert(error: Exception) -> RequestError | None:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)
        if isinstance(error, ValidationError):
            reason = first_problem(error, Report)
        name = source() if callable(source) else source
        text = f"{name} is incomplete or not written by {program} ({reason}); copy the file again"
        return None if isinstance(error, OSError) else RequestError(text)

    return translate_errors(convert)
