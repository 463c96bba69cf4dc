"""Build lm-eval's tasks on data from one of our sources.

The index of lm-eval's task names and files is built once, then cached.
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
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.tasks
from datasets.exceptions import DatasetsError
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from jinja2 import TemplateError
from lm_eval.api.group import Group
from lm_eval.api.task import Task, TaskConfig
from lm_eval.tasks import TaskManager

from tracker.benchmarks.own import DATA_KEYS, as_file, data_files, located, read_task
from tracker.benchmarks.private import Entry, Kind, TaskFactory, TaskIndex
from tracker.benchmarks.sources import HUB, DataSource, unreachable
from tracker.core.errors import BenchmarkError, did_you_mean, translate_errors
from tracker.core.provenance import content_hash, file_stamp, package_versions
from tracker.ledger.cache import keep, recall

log = logging.getLogger(__name__)
_DATA = ("dataset_path", "dataset_name")
_FORMAT = 2
"""Version of the cached index, because builds of the same version may share a cache."""


@cache
def known_tasks() -> dict[str, Any]:
    """List lm-eval's tasks, groups and tags.

    lm-eval reads 14,000 files for that, in 5.1 s (two cores of an EPYC). The index is cached until
    one of them changes, and is read in 0.4 s.

    Returns:
        lm-eval's entry of each name; of its settings only the location of the data on the hub.
    """
    folder = Path(lm_eval.tasks.__file__).parent
    stamp = file_stamp(_files(folder))
    versions = package_versions()
    key = content_hash([stamp, versions["lm-eval"], versions["tracker"], _FORMAT])
    # Store one string: verifying its digest serialises the content again, slow for 14,000 values.
    known = json.loads(recall("tasks", key).get("tasks", "{}"))
    if not known or not all(_is_inside(path) for _, path, *_ in known.values()):
        log.info("reading lm-eval's list of tasks, once")
        known = {name: _row(entry, folder) for name, entry in TaskManager().task_index.items()}
        keep("tasks", key, {"tasks": json.dumps(known)})
    return {
        name: Entry(name, Kind[kind], folder / path if path else None, data, set(tags))
        for name, (kind, path, tags, data) in known.items()
    }


def _files(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """Find all files that can define tasks; templates have no suffix."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                yield entry
            elif entry.name != "__pycache__":
                yield from _files(entry.path)


def _row(entry: Entry, folder: Path) -> list[Any]:
    path = entry.yaml_path and str(entry.yaml_path.relative_to(folder))
    data = {key: entry.cfg[key] for key in _DATA if key in (entry.cfg or {})}
    return [entry.kind.name, path, sorted(entry.tags), data]


def _is_inside(path: str | None) -> bool:
    """Return whether a path stays inside its folder, because a task's file runs code."""
    return path is None or not (Path(path).is_absolute() or ".." in Path(path).parts)


UNREADABLE = (KeyError, ValueError, TypeError, IndexError, AttributeError, TemplateError)
"""Errors that a task raises if its documents are not as it expects."""
_INSTALLED = (
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
    Path(lm_eval.__file__).parent,
    Path(__file__).parents[1],
    "<",
)


@dataclass(frozen=True)
class SourceSplits:
    """Function that gives a task the splits of a source, where lm-eval expects a task's own."""

    splits: Mapping[str, Any]

    def __call__(self, **_: object) -> Mapping[str, Any]:
        """Return the splits, whatever lm-eval's metadata are."""
        return self.splits


def makes_documents(config: TaskConfig) -> bool:
    """Return whether a task makes its documents itself, for one model's tokenizer as a rule."""
    own = config.custom_dataset
    return callable(own) and not isinstance(own, SourceSplits)


class SourcedFactory(TaskFactory):  # type: ignore[misc]
    """Builds lm-eval's tasks on data from one of our sources.

    `given` maps a task's name to the splits that it was given. `files` lists the files from which
    the task that was built last reads its documents.
    """

    def __init__(
        self, source: DataSource, num_fewshot: int | None, metadata: Mapping[str, Any]
    ) -> None:
        super().__init__(meta=dict(metadata))
        self._source = source
        self._num_fewshot = num_fewshot
        self.given: dict[str, Mapping[str, Any]] = {}
        self.files: list[Path] = []

    def _load_full_config(
        self, entry: Entry, overrides: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        config: dict[str, Any] = super()._load_full_config(entry, overrides)
        self.files = []
        if "dataset_path" not in config:
            return config
        if _brings_its_data(config):
            if entry.yaml_path and config.get("dataset_kwargs"):
                config["dataset_kwargs"] = located(config, entry.yaml_path)
                self.files = [*data_files(config["dataset_kwargs"])]
                _refuse_missing(config["task"], self.files, entry.yaml_path)
            return config
        if self._source.root is None:
            self._source.ask_hub(config["dataset_path"])
            return config
        splits = self._source.load(config["dataset_path"], config.get("dataset_name"))
        config["custom_dataset"] = SourceSplits(splits)
        config["dataset_kwargs"] = None
        self._fit_splits(config, splits)
        self.given[config["task"]] = splits
        return config

    def _fit_splits(self, config: dict[str, Any], splits: Mapping[str, Any]) -> None:
        """Remove splits that do not exist from a task's configuration."""
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
        wanted = shots(config.get("num_fewshot"), self._num_fewshot)
        in_the_task = "samples" in (config.get("fewshot_config") or {})
        if wanted and examples not in splits and not in_the_task:
            raise BenchmarkError(
                f"{task} draws few-shot examples from the split {examples!r}, which "
                f"{self._source.name} does not hold; use num_fewshot 0, or another source of data"
            )
        for key in ("training_split", "validation_split", "fewshot_split"):
            if config.get(key) not in splits:
                config[key] = None


def _refuse_missing(name: str, files: Sequence[Path], task: Path) -> None:
    """Raise BenchmarkError for a file of a task's documents that does not exist."""
    for file in files:
        if not file.exists():
            near = did_you_mean(file.name, [path.name for path in task.parent.iterdir()])
            raise BenchmarkError(
                f"{name}: there is no file {file}, from which {task} reads its documents.{near} "
                f"A relative name is one of {Path.cwd()} or {task.absolute().parent}."
            )


def shots(own: int | None, asked: int | None) -> int:
    """Return the number of few-shot examples by lm-eval's own rule.

    A task that sets 0 takes none, even if the request sets another number.
    """
    return (own if own == 0 or asked is None else asked) or 0


def _brings_its_data(config: Mapping[str, Any]) -> bool:
    """Return whether a task makes its documents, or reads files that it names itself."""
    named = (config.get("dataset_kwargs") or {}).keys() & {*DATA_KEYS}
    return callable(config.get("custom_dataset")) or bool(
        named and config["dataset_path"] in _PACKAGED_DATASETS_MODULES
    )


def entries(own: Sequence[Path]) -> dict[str, Entry]:
    """Return all tasks by name; as in lm-eval, the user's folders take precedence."""
    return {**known_tasks(), **TaskIndex.build(own)}


def find_task(name: str, own: Sequence[Path] = ()) -> Entry:
    """Find a task, a group or a tag, by its name or its file.

    Args:
        name: Name or file, as for lm-eval's `--tasks`.
        own: Folders with the user's tasks, as for `--include_path`.

    Returns:
        lm-eval's entry.

    Raises:
        BenchmarkError: No such task exists; the message lists similar names.
    """
    file = as_file(name)
    if file is not None:
        entry = TaskIndex.entry_from_path(file.absolute())
        if entry is None:
            raise BenchmarkError(f"there is no task file {name}")
        if entry.kind is Kind.GROUP:  # lm-eval takes its list of tasks for its name
            entry.name = read_task(file)["group"]
        return entry
    known = entries(own)
    if name not in known:
        near = did_you_mean(name, list(known))
        where = f" or in {', '.join(map(str, own))}" if own else ""
        raise BenchmarkError(
            f"lm-eval has no task or group {name!r}{where}.{near} All names: lm-eval ls tasks"
        )
    return known[name]


def build(
    entry: Entry,
    source: DataSource,
    num_fewshot: int | None,
    own: Sequence[Path],
    metadata: Mapping[str, Any],
) -> Task | Group | list[Task]:
    """Build a task or a group of lm-eval on the documents of a source.

    Args:
        entry: Entry returned by `find_task`.
        source: Source of the documents, except for tasks that bring their own.
        num_fewshot: Requested number of examples; None = the task's own number.
        own: Folders with the user's tasks, as in `find_task`.
        metadata: Metadata for tasks that make their documents.

    Returns:
        lm-eval's task, group or list of tasks.

    Raises:
        BenchmarkError: Its data cannot be read, or its code fails.
    """
    factory = SourcedFactory(source, num_fewshot, metadata)

    def problem(error: Exception) -> BenchmarkError:
        if factory.files:
            return unreadable(entry.name, DataSource(", ".join(map(str, factory.files))), error)
        if source.root is None and not isinstance(error, UNREADABLE) and not _line_of(error):
            said = entry.cfg or {}
            path, name = said.get("dataset_path", entry.name), said.get("dataset_name")
            return unreachable(path, name, HUB, error)
        return unreadable(entry.name, source, error)

    with translate_errors(problem):
        return factory.build(entry, overrides=None, registry=entries(own))


def unreadable(task: str, source: DataSource, error: Exception) -> BenchmarkError:
    """Build the error for a task that cannot read its documents."""
    cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
    said = f"{type(cause).__name__}: {(str(cause).strip() or 'no message').splitlines()[0]}"
    if line := _line_of(error):
        return BenchmarkError(f"{task} fails in its own code, {line}: {said}")
    return BenchmarkError(
        f"{task} cannot read its documents from {source.name}: {said}. Does the data have all the "
        "columns that the task reads?"
    )


def _line_of(error: BaseException) -> str:
    """Name the line of a task's own code that raised an error; return "" if none did."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = [
        frame
        for each in (error, error.__cause__)
        if each is not None
        for frame in traceback.extract_tb(each.__traceback__)
        if Path(frame.filename).suffix == ".py" and not is_installed(frame.filename)
    ]
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else ""


def is_installed(file: str) -> bool:
    """Return whether a file of code belongs to tracker or an installed library."""
    return any(file.startswith(str(root)) for root in _INSTALLED)
