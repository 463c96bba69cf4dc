"""Identify a task by hashes of its documents, its settings and its own code."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

from datasets import Dataset
from lm_eval.api.registry import AGGREGATION_REGISTRY
from lm_eval.api.task import ConfigurableTask

from tracker.benchmarks.factory import is_installed_code
from tracker.schema.identities import Half, TaskIdentity, filtered_metric
from tracker.schema.provenance import content_hash

_NOT_CONTENT = (
    *("custom_dataset", "dataset_path", "dataset_name", "dataset_kwargs", "metadata"),
    *("training_split", "validation_split", "test_split", "fewshot_split", "num_fewshot"),
)
"""Settings that locate documents; hashes omit them, because the documents are hashed."""


def task_identity(task: ConfigurableTask, num_fewshot: int, half: Half | None) -> TaskIdentity:
    """Build the identity (hash, metrics, size) of an lm-eval task, or of half of its documents."""
    config = {
        name: value
        for name, value in task.config.to_dict(keep_callable=True).items()
        if name not in _NOT_CONTENT
    }
    examples: Iterable[Any] = (task.fewshot_docs() or []) if num_fewshot else []
    registered = {function: name for name, function in AGGREGATION_REGISTRY.items()}
    metrics, functions, directions = metric_names(task), task.aggregation(), task.higher_is_better()
    content = [_stable_value(config), list_rows(task.eval_docs), list_rows(examples)]
    identity = TaskIdentity(
        name=task.task_name,
        version=str(task.VERSION),
        split=task.config.test_split or task.config.validation_split,
        documents=len(half.numbers(task.task_name) if half else task.eval_docs),
        half=half,
        fingerprint=content_hash(content),
        metrics={
            name: registered.get(functions[m], functions[m].__name__) for name, m in metrics.items()
        },
        higher_is_better={name: directions.get(m) is not False for name, m in metrics.items()},
    )
    has_options = task.OUTPUT_TYPE == "multiple_choice"
    is_implied = identity.offers_choices == has_options
    return identity if is_implied else identity.model_copy(update={"has_options": has_options})


def list_rows(data_set: Iterable[Any]) -> list[Any]:
    """Return the rows of a data set as a list."""
    if isinstance(data_set, Dataset) and data_set.format["type"] is None:
        rows: list[Any] = data_set.to_list()
        return rows
    return list(data_set)


def metric_names(task: ConfigurableTask) -> dict[str, str]:
    """Return a dictionary from stored metric names to lm-eval's metric names."""
    filters = [ensemble.name for ensemble in task._filters] or ["none"]
    pairs = product(filters, task.aggregation())
    return {filtered_metric(metric, name): metric for name, metric in pairs}


def _stable_value(value: object) -> Any:
    """Replace each function in a nested value by its name and the text of its source files."""
    if isinstance(value, dict):
        return {name: _stable_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_stable_value(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return _stable_value({f.name: getattr(value, f.name) for f in fields(value)})
    if callable(value):
        texts = [path.read_text(encoding="utf-8") for path in _source_files(value)]
        return [getattr(value, "__qualname__", type(value).__name__), "".join(texts)]
    return value


def is_user_function(value: object) -> bool:
    """Return whether a value of a task's configuration is a function that the user wrote."""
    file = _defining_file(value)
    return file is not None and not is_installed_code(str(file))


def _defining_file(value: object) -> Path | None:
    """Return the file that defines a function; None if there is no file."""
    code = getattr(getattr(value, "func", value), "__code__", None)
    return Path(code.co_filename) if code else None


def _source_files(function: Any) -> list[Path]:
    """Return the file that defines a function, and the imported files of the same folder."""
    file = _defining_file(function)
    if file is None or not file.is_file():
        return []
    paths, namespaces = {file}, [getattr(function, "func", function).__globals__]
    while namespaces and not is_installed_code(str(file)):
        for value in namespaces.pop().values():
            name = getattr(value, "__module__", None) or ""
            module = value if isinstance(value, ModuleType) else sys.modules.get(name)
            path = Path(getattr(module, "__file__", None) or "")
            if path.is_relative_to(file.parent) and path.is_file() and path not in paths:
                paths.add(path)
                namespaces.append(vars(module))
    return sorted(paths)
