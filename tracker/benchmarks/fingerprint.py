"""Identify a task by its documents, its settings and the code that it brings."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from datasets import Dataset
from lm_eval.api.registry import AGGREGATION_REGISTRY
from lm_eval.api.task import ConfigurableTask

from tracker.benchmarks.factory import is_installed
from tracker.core.identities import Half, TaskIdentity
from tracker.core.provenance import content_hash

_NOT_CONTENT = (
    *("custom_dataset", "dataset_path", "dataset_name", "dataset_kwargs", "metadata"),
    *("training_split", "validation_split", "test_split", "fewshot_split", "num_fewshot"),
)
"""Settings that locate documents; they are left out, because the documents are hashed."""


def task_identity(task: ConfigurableTask, num_fewshot: int, half: Half | None) -> TaskIdentity:
    """Identify a task of lm-eval, or half of it, by its content, independent of its location."""
    config = {
        name: value
        for name, value in task.config.to_dict(keep_callable=True).items()
        if name not in _NOT_CONTENT
    }
    examples: Iterable[Any] = (task.fewshot_docs() or []) if num_fewshot else []
    names = {function: name for name, function in AGGREGATION_REGISTRY.items()}
    how, better = task.aggregation(), task.higher_is_better()
    return TaskIdentity(
        name=task.task_name,
        version=str(task.VERSION),
        split=task.config.test_split or task.config.validation_split,
        documents=len(half.numbers(task.task_name) if half else task.eval_docs),
        half=half,
        fingerprint=content_hash([_stable(config), listed(task.eval_docs), listed(examples)]),
        metrics={n: names.get(how[m], how[m].__name__) for n, m in metric_names(task).items()},
        higher_is_better={n: better.get(m) is not False for n, m in metric_names(task).items()},
    )


def listed(documents: Iterable[Any]) -> list[Any]:
    """List documents; converting a data set at once is ten times as fast as row by row."""
    if isinstance(documents, Dataset) and documents.format["type"] is None:
        rows: list[Any] = documents.to_list()
        return rows
    return list(documents)


def metric_names(task: ConfigurableTask) -> dict[str, str]:
    """Return every metric's name in outcomes → lm-eval's name of the metric."""
    filters = [each.name for each in task._filters] or ["none"]
    return {metric_name(metric, name): metric for name in filters for metric in task.aggregation()}


def metric_name(metric: str, answers: str) -> str:
    """Name a metric of filtered answers, as outcomes name it."""
    return metric if answers == "none" else f"{metric},{answers}"


def _stable(value: Any) -> Any:
    """Replace functions by stable values: their name and the content of their file."""
    if isinstance(value, dict):
        return {name: _stable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_stable(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return _stable({f.name: getattr(value, f.name) for f in fields(value)})
    if callable(value):
        texts = [path.read_text(encoding="utf-8") for path in _sources(value)]
        return [getattr(value, "__qualname__", type(value).__name__), "".join(texts)]
    return value


def is_own(value: object) -> bool:
    """Check whether a value of a task's configuration is a function of the user."""
    file = _file_of(value)
    return file is not None and not is_installed(str(file))


def _file_of(value: object) -> Path | None:
    """Return the file that defines a function; None if it has none."""
    code = getattr(getattr(value, "func", value), "__code__", None)
    return Path(code.co_filename) if code else None


def _sources(function: Any) -> list[Path]:
    """Return a function's file, and for the user's code also the neighbouring files it imports."""
    file = _file_of(function)
    if file is None or not file.is_file():
        return []
    found, stack = {file}, [getattr(function, "func", function).__globals__]
    while stack and not is_installed(str(file)):
        for value in stack.pop().values():
            name = getattr(value, "__module__", None) or ""
            module = value if isinstance(value, ModuleType) else sys.modules.get(name)
            path = Path(getattr(module, "__file__", None) or "")
            if path.is_relative_to(file.parent) and path.is_file() and path not in found:
                found.add(path)
                stack.append(vars(module))
    return sorted(found)
