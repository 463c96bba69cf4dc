"""Builds lm-eval's tasks on data from one of our sources."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import TemplateError
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory

from tracker.benchmarks.sources import HUB, DataSource, unreachable
from tracker.errors import BenchmarkError, did_you_mean

UNREADABLE = (KeyError, ValueError, TypeError, IndexError, AttributeError, TemplateError)
"""What a task raises over documents that are not as it expects."""


class _SourcedFactory(TaskFactory):  # type: ignore[misc]
    """Builds lm-eval's tasks on data from one of our sources."""

    def __init__(self, source: DataSource, num_fewshot: int | None) -> None:
        super().__init__()
        self._source = source
        self._num_fewshot = num_fewshot

    def _load_full_config(
        self, entry: Any, overrides: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        config: dict[str, Any] = super()._load_full_config(entry, overrides)
        if "dataset_path" not in config:
            return config
        if self._source.root is None:
            self._source.ask_hub(config["dataset_path"])
            return config
        splits = self._source.load(config["dataset_path"], config.get("dataset_name"))
        config["custom_dataset"] = lambda **_: splits
        config["dataset_kwargs"] = None
        self._fit_splits(config, splits)
        return config

    def _fit_splits(self, config: dict[str, Any], splits: Mapping[str, Any]) -> None:
        """Let the configuration name only splits that are there."""
        task = config["task"]
        scored = config.get("test_split") or config.get("validation_split")
        if scored not in splits:
            if not (self._source.shipped and config.get("validation_split") in splits):
                raise BenchmarkError(
                    f"{task} is scored on the split {scored!r}, which {self._source.name} does "
                    f"not hold; it holds: {', '.join(splits)}"
                )
            config["test_split"] = None
        examples = config.get("fewshot_split") or config.get("training_split")
        own = config.get("num_fewshot")
        wanted = own if self._num_fewshot is None or own == 0 else self._num_fewshot
        in_the_task = "samples" in (config.get("fewshot_config") or {})
        if wanted and examples not in splits and not in_the_task:
            raise BenchmarkError(
                f"{task} draws few-shot examples from the split {examples!r}, which "
                f"{self._source.name} does not hold; use num_fewshot 0, or another source of data"
            )
        for key in ("training_split", "validation_split", "fewshot_split"):
            if config.get(key) not in splits:
                config[key] = None


@cache
def _index() -> TaskManager:
    return TaskManager()


def check_task(name: str) -> None:
    """Refuse a task or group that lm-eval does not know (BenchmarkError), naming the nearest."""
    if name not in _index().task_index:
        near = did_you_mean(name, _index().all_tasks)
        raise BenchmarkError(
            f"lm-eval has no task or group {name!r}.{near} All names: lm-eval ls tasks"
        )


def build(name: str, source: DataSource, num_fewshot: int | None) -> Task | Group | list[Task]:
    """Build a task or a group of lm-eval on the documents of a source.

    `num_fewshot` None is what the task itself asks for. BenchmarkError for unreadable data.
    """
    index = _index().task_index
    try:
        return _SourcedFactory(source, num_fewshot).build(
            index[name], overrides=None, registry=index
        )
    except BenchmarkError:
        raise
    except Exception as error:  # noqa: BLE001  what a library makes of a hub, a disk, a task
        if source.root is None and not isinstance(error, UNREADABLE):
            entry = index[name].cfg or {}
            raise unreachable(
                entry.get("dataset_path", name), entry.get("dataset_name"), HUB, error
            ) from None
        raise unreadable(name, source, error) from None


def unreadable(task: str, source: DataSource, error: Exception) -> BenchmarkError:
    """Make the error that says that a task stumbled over its documents."""
    said = str(error).strip() or type(error).__name__
    return BenchmarkError(
        f"{task} cannot read its documents from {source.name}: "
        f"{type(error).__name__}: {said.splitlines()[0]}. Does the data have all the columns "
        "that the task reads?"
    )
