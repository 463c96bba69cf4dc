"""Read tasks that the user wrote (folders of YAML and Python files, or one YAML file).

This module checks task files and detects changes without importing lm-eval.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import yaml

from tracker.schema.config import BenchmarkSpec
from tracker.schema.errors import BenchmarkError
from tracker.schema.fields import expand_home
from tracker.schema.provenance import file_stamp

_SUFFIXES = (".yaml", ".yml")
DATA_KEYS = ("data_files", "data_dir")
"""Settings of `dataset_kwargs` that name files."""


class _Loader(yaml.SafeLoader):
    """YAML loader that reads a task file without importing the functions named in the file."""


_Loader.add_constructor("!function", lambda loader, node: f"!function {node.value}")


def task_file(benchmark: str) -> Path | None:
    """Return the path of the task file that a benchmark names.

    Returns None if the benchmark's name does not end like a task file.
    """
    return expand_home(benchmark) if benchmark.endswith(_SUFFIXES) else None


def check_own_tasks(spec: BenchmarkSpec) -> bool:
    """Check that the user's task files exist; return whether they define the benchmark."""
    for folder in include_folders(spec):
        if folder.is_file():
            raise BenchmarkError(f"include_path: {folder} is a file; name the folder of the file")
        if not folder.is_dir():
            raise BenchmarkError(f"include_path: {folder} does not exist")
    file = task_file(spec.benchmark)
    if file is not None:
        if not file.is_file():
            raise BenchmarkError(
                f"there is no task file {file}; name a YAML file, or a task from: lm-eval ls tasks"
            )
        content = read_task(file)
        if not task_names(content):
            raise BenchmarkError(
                f"{file} does not define a task: the key 'task:' or 'group:' is missing"
            )
        return True
    paths = _find_task_files(include_folders(spec))
    return any(spec.benchmark in task_names(read_task(path)) for path in paths)


def include_folders(spec: BenchmarkSpec) -> list[Path]:
    """Return the folders that a benchmark's `include_path` lists."""
    return [expand_home(folder) for folder in spec.include_path]


def task_names(content: dict[str, Any]) -> list[str]:
    """Return the names of the task, group and tags that a task file defines."""
    values = [content.get(key) for key in ("task", "group", "tag")]
    entries = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return [name for name in entries if isinstance(name, str)]


def read_task(path: Path) -> dict[str, Any]:
    """Read one task file; raise BenchmarkError if its YAML is invalid."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise BenchmarkError(f"{path}{line}: not valid YAML: {problem}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{path} cannot be read: {error}") from None
    return content if isinstance(content, dict) else {}


def own_tasks_stamp(spec: BenchmarkSpec) -> object:
    """Return a value that changes if the user's task files or documents change.

    Returns None if the benchmark does not refer to tasks that the user wrote.
    """
    task_folders = _task_folders(spec)
    if not task_folders:
        return None
    files = {path for folder in task_folders for path in folder.rglob("*") if path.is_file()}
    for path in _find_data(task_folders):
        files |= {file for file in (path, *path.rglob("*")) if file.is_file()}
    return file_stamp(path for path in sorted(files) if "__pycache__" not in path.parts)


def reads_local_files(spec: BenchmarkSpec) -> bool:
    """Return whether the user's own tasks read local document files."""
    return any(True for _ in _find_data(_task_folders(spec)))


def _task_folders(spec: BenchmarkSpec) -> list[Path]:
    """Return the folders with the files of the user's own tasks."""
    file = task_file(spec.benchmark)
    return [*include_folders(spec), *([file.parent] if file else [])]


def _find_data(task_folders: Sequence[Path]) -> Iterator[Path]:
    """Yield the document files and folders of the tasks in `task_folders`."""
    for path in _find_task_files(task_folders):
        yield from find_data_files(resolve_dataset_kwargs(read_task(path), path))


def _find_task_files(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES)


def find_data_files(kwargs: dict[str, Any]) -> Iterator[Path]:
    """Yield the document files and folders in a task's `dataset_kwargs`."""
    values = [kwargs.get(key) for key in DATA_KEYS]
    while values:
        match values.pop():
            case dict() as mapping:
                values += mapping.values()
            case list() as items:
                values += items
            case str(pattern) if "://" not in pattern:
                yield from map(Path, glob(pattern, recursive=True) or [pattern])  # noqa: PTH207


def resolve_dataset_kwargs(content: dict[str, Any], task: Path) -> dict[str, Any]:
    """Return a task's `dataset_kwargs` with full paths instead of relative paths.

    A relative path is searched first in the working folder, and then in the task file's folder.
    """

    def resolve(name: Any) -> Any:
        if isinstance(name, dict):
            return {key: resolve(value) for key, value in name.items()}
        if isinstance(name, list):
            return [resolve(value) for value in name]
        if not isinstance(name, str) or "://" in name or _exists(name):
            return name
        path = str(task.absolute().parent / name)
        return path if _exists(path) else name

    kwargs = content.get("dataset_kwargs") or {}
    return {key: resolve(value) if key in DATA_KEYS else value for key, value in kwargs.items()}


def _exists(name: str) -> bool:
    """Return whether a file or folder has a name or matches a pattern."""
    return Path(name).exists() or bool(glob(name, recursive=True))  # noqa: PTH207
