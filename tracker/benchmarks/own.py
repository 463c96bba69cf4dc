"""Read the user's own tasks: folders of YAML files and Python, or one YAML file, without lm-eval.

lm-eval is imported only when a task is built. This module checks tasks and detects changes without
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import yaml

from tracker.core.config import BenchmarkSpec
from tracker.core.errors import BenchmarkError
from tracker.core.fields import expanded
from tracker.core.provenance import file_stamp

_SUFFIXES = (".yaml", ".yml")
DATA_KEYS = ("data_files", "data_dir")
"""Settings of `dataset_kwargs` that name files."""


class _Loader(yaml.SafeLoader):
    """YAML loader that reads a task without its functions."""


_Loader.add_constructor("!function", lambda loader, node: f"!function {node.value}")


def as_file(benchmark: str) -> Path | None:
    """Return a benchmark's name as a path, if it looks like a task's file; else None."""
    return expanded(benchmark) if benchmark.endswith(_SUFFIXES) else None


def check_own(spec: BenchmarkSpec) -> bool:
    """Check that the user's folders and files exist; return whether the benchmark is the user's."""
    for folder in folders(spec):
        if not folder.is_dir():
            what = "is a file; name its folder" if folder.is_file() else "is no folder here"
            raise BenchmarkError(f"include_path: {folder} {what}")
    file = as_file(spec.benchmark)
    if file is not None:
        if not file.is_file():
            raise BenchmarkError(
                f"there is no task file {file}; name a YAML file, or a task: lm-eval ls tasks"
            )
        content = read_task(file)
        if not names(content):
            raise BenchmarkError(f"{file} names no task: it has neither 'task:' nor 'group:'")
        return True
    return any(spec.benchmark in names(read_task(path)) for path in _files(folders(spec)))


def folders(spec: BenchmarkSpec) -> list[Path]:
    """Return the folders of `include_path`."""
    return [expanded(folder) for folder in spec.include_path]


def names(content: dict[str, Any]) -> list[str]:
    """Return all names of the task, group and tags that a file defines."""
    stated = [content.get(key) for key in ("task", "group", "tag")]
    flat = [name for some in stated for name in (some if isinstance(some, list) else [some])]
    return [name for name in flat if isinstance(name, str)]


def read_task(path: Path) -> dict[str, Any]:
    """Read one file; BenchmarkError names the line with invalid YAML."""
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


def own_stamp(spec: BenchmarkSpec) -> object:
    """Return a cheap stamp of the user's own tasks: equal stamps mean equal tasks.

    It covers their folders and the files from which they read documents; None without own tasks.
    """
    task_folders = _task_folders(spec)
    if not task_folders:
        return None
    files = {path for folder in task_folders for path in folder.rglob("*") if path.is_file()}
    for path in _data(task_folders):
        files |= {file for file in (path, *path.rglob("*")) if file.is_file()}
    return file_stamp(path for path in sorted(files) if "__pycache__" not in path.parts)


def reads_files(spec: BenchmarkSpec) -> bool:
    """Return whether the user's own tasks read documents from files."""
    return any(True for _ in _data(_task_folders(spec)))


def _task_folders(spec: BenchmarkSpec) -> list[Path]:
    """Return the folders of the user's own tasks."""
    file = as_file(spec.benchmark)
    return [*folders(spec), *([file.parent] if file else [])]


def _data(task_folders: Sequence[Path]) -> Iterator[Path]:
    """Find the files and folders that the tasks of some folders read documents from."""
    for path in _files(task_folders):
        yield from data_files(located(read_task(path), path))


def _files(places: Sequence[Path]) -> Iterator[Path]:
    for place in places:
        yield from sorted(path for path in place.rglob("*") if path.suffix in _SUFFIXES)


def data_files(kwargs: dict[str, Any]) -> Iterator[Path]:
    """Find the files and folders from which a task reads its documents: its `dataset_kwargs`."""
    stack = [kwargs.get(key) for key in DATA_KEYS]
    while stack:
        match stack.pop():
            case dict() as named:
                stack += named.values()
            case list() as several:
                stack += several
            case str(name) if "://" not in name:
                yield from map(Path, glob(name, recursive=True) or [name])  # noqa: PTH207


def located(content: dict[str, Any], task: Path) -> dict[str, Any]:
    """Return a task's `dataset_kwargs` with relative names of files completed to paths.

    They are read from the working folder, as lm-eval reads them, or else from the folder of the
    task's file.
    """

    def locate(name: Any) -> Any:
        if isinstance(name, dict):
            return {key: locate(value) for key, value in name.items()}
        if isinstance(name, list):
            return [locate(value) for value in name]
        if not isinstance(name, str) or "://" in name or _exists(name):
            return name
        path = str(task.absolute().parent / name)
        return path if _exists(path) else name

    kwargs = content.get("dataset_kwargs") or {}
    return {key: locate(value) if key in DATA_KEYS else value for key, value in kwargs.items()}


def _exists(name: str) -> bool:
    """Return whether a name, or a pattern of names, is that of a file or folder."""
    return Path(name).exists() or bool(glob(name, recursive=True))  # noqa: PTH207
