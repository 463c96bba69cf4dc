"""Find and read the answers that an argument of `tracker compare` names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from tracker.comparison.answers import BenchmarkAnswers, ModelAnswers
from tracker.comparison.log_formats import (
    LIGHTEVAL,
    LM_EVAL,
    SHARED_SUFFIX,
    SharedRecord,
    task_name,
)
from tracker.comparison.logged import LogFormat, Sample, build_answers, explain_damage
from tracker.comparison.stored_runs import RunName, parse_run_name, read_run
from tracker.measuring.progress import Progress, Silent, report_work
from tracker.schema.errors import RequestError
from tracker.schema.grouping import group_by

MIN_SHOWN_SIZE = 20
"""Size of files in megabytes from which a progress bar is shown."""
_NAME = re.compile(r"(?:samples_|details_)?(.*?)(?:_(\d{4}-\d\d-\d\dT[\d.-]+))?", re.DOTALL)
"""Stem of a file's name: task and date."""


class LoggedFile(NamedTuple):
    """File with a model's answers to one task; `date` is empty if the file's name has no date."""

    path: Path
    format: LogFormat
    model: Path
    task: str
    date: str


def _parse_path(path: Path) -> LoggedFile:
    match = _NAME.fullmatch(path.stem)
    assert match
    task, date = match[1], match[2] or ""
    if path.suffix == ".parquet":
        return LoggedFile(path, LIGHTEVAL, path.parent.parent, task_name(task), date)
    if path.stem.endswith(SHARED_SUFFIX) and not path.stem.startswith("samples_"):
        record = SharedRecord.read(path)  # in the folder BENCHMARK/OWNER/MODEL
        return LoggedFile(path, record.format, Path(*path.parts[-3:-1]), record.task, record.date)
    return LoggedFile(path, LM_EVAL, path.parent, task, date)


def find_files(path: Path) -> list[LoggedFile]:
    """Find the newest file with answers to each task.

    Args:
        path: Folder of one model's files, its parent folder, or a file.

    Returns:
        A file for each task.

    Raises:
        RequestError: The folder has no answers, or the answers of several models.
    """
    if not path.exists():
        raise RequestError(
            f"{path} does not exist; expected a folder with samples_TASK_DATE.jsonl of lm-eval, "
            "details_TASK_DATE.parquet of lighteval or ID_samples.jsonl of every_eval_ever, or a "
            "run as FOLDER:CELL:CHANGE"
        )
    patterns = ["samples_*.jsonl", "*/samples_*.jsonl", "**/details_*.parquet"]
    patterns.append(f"**/*{SHARED_SUFFIX}.jsonl")
    candidates = [[path]] if path.is_file() else [[*path.glob(pattern)] for pattern in patterns]
    files = [*map(_parse_path, next(filter(None, candidates), []))]
    if not files or path.suffix == ".json":
        raise RequestError(
            f"{path} has no file samples_TASK_DATE.jsonl; run lm_eval with --log_samples and "
            "--output_path, or lighteval with --save-details"
        )
    if len(models := {str(file.model) for file in files}) > 1:
        n, names = len(models), ", ".join(sorted(models)[:5])
        raise RequestError(f"{path} has the answers of {n} models; name one of the folders {names}")
    newest: dict[str, LoggedFile] = {}
    for file in sorted(files, key=lambda file: file.date):
        if file.task in newest and newest[file.task].date == file.date:
            raise RequestError(f"{path} has two files of {file.task} from {file.date}; name one")
        newest[file.task] = file
    return [*newest.values()]


def read_models(sources: Sequence[str], progress: Progress) -> list[ModelAnswers]:
    """Read the answers of two or more models.

    Args:
        sources: Arguments of `tracker compare`: paths of logged answers, or names of stored runs.
        progress: Receiver of the number of megabytes that have been read.

    Returns:
        The answers of each model.

    Raises:
        RequestError: There are fewer than two arguments, two arguments name the same answers, an
            argument is invalid, or a file is damaged.
    """
    if len(sources) < 2:
        raise RequestError("give at least two models, for example: tracker compare A B")
    inputs = [(s, parse_run_name(s) or find_files(Path(s))) for s in sources]
    for (source, answers), (other, other_answers) in combinations(inputs, 2):
        if _identity(answers) & _identity(other_answers):
            raise RequestError(
                f"{source} and {other} contain the same answers; replace one of them"
            )
    files = [file for _, files in inputs if isinstance(files, list) for file in files]
    size = sum(map(_megabytes, files))
    progress = progress if size >= MIN_SHOWN_SIZE else Silent()
    with report_work(progress, "reading", size, "MB"):
        models = [
            read_run(source, answers)
            if isinstance(answers, RunName)
            else _read_files(source, answers, progress)
            for source, answers in inputs
        ]
    names = [model.name for model in models]
    return [replace(m, name=m.source) if names.count(m.name) > 1 else m for m in models]


def _identity(answers: RunName | list[LoggedFile]) -> set[object]:
    """Return the files or the run that an argument names, to detect duplicate arguments."""
    return {answers} if isinstance(answers, RunName) else {f.path.resolve() for f in answers}


def _megabytes(file: LoggedFile) -> int:
    return file.path.stat().st_size // 1_000_000


def _read_files(source: str, files: Sequence[LoggedFile], progress: Progress) -> ModelAnswers:
    """Read a model's answers from its files."""
    name = Path(source).name
    benchmarks: dict[str, BenchmarkAnswers] = {}
    for date, dated in group_by(files, lambda file: file.date).items():
        by_task, file_format = {file.task: file for file in dated}, dated[0].format
        with explain_damage(source, file_format.program):
            report = file_format.read_report(dated[0].path, date)
            name = (report.name or name).rstrip("/").rpartition("/")[2]
            for benchmark, tasks in report.benchmarks(by_task).items():
                if benchmark in benchmarks:
                    dates = f"{source} has results of {benchmark} from two dates"
                    raise RequestError(f"{dates}; name only the files of one date")
                samples: list[Sample] = []
                for file in map(by_task.__getitem__, tasks):
                    with explain_damage(file.path, file_format.program):
                        samples += file_format.read_samples(file.task, file.path)
                    progress.advance(_megabytes(file))
                benchmarks[benchmark] = build_answers(samples, report, benchmark, tasks)
    return ModelAnswers(name, source, benchmarks)
