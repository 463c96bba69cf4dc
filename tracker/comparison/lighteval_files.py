"""Read the details that `lighteval --save-details` writes: a Parquet file for each task."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from tracker.comparison.answers import AnswerText, BenchmarkAnswers, ModelAnswers
from tracker.comparison.lm_eval_files import (
    ENDING_LENGTH,
    BenchmarkReport,
    explain_damage,
    refuse_several_models,
)
from tracker.measuring.progress import Progress
from tracker.report.dataset import read_parquet
from tracker.schema.errors import RequestError

_NAME = re.compile(r"details_(?:\w+\|)?(.+?)(?:\|\d+)+_(\d{4}-\d\d-\d\dT[\d.-]+)", re.DOTALL)
"""Stem of a file's name: task without numbers of examples, and date."""
_COLUMNS = [
    *("doc.query", "doc.choices", "doc.gold_index", "metric"),
    *("model_response.input", "model_response.text", "model_response.logprobs"),
]
_TASK_SETTINGS = ("generation_size", "stop_sequence", "num_samples")
"""Settings of a task that change the generated texts."""


def find_details(path: Path) -> dict[str, Path]:
    """Find the newest file of details of each task.

    Args:
        path: Output folder of lighteval, one of its folders, or a file of details.

    Returns:
        Name of the task → file; empty if there are no details.

    Raises:
        RequestError: There are the details of several models, or a task has several numbers of
            examples.
    """
    paths = sorted(path.rglob("details_*.parquet")) if path.is_dir() else [path]
    matches = {file: match for file in paths if (match := _NAME.fullmatch(file.stem))}
    refuse_several_models(path, (file.parent.parent for file in matches))
    files: dict[str, Path] = {}
    for file, match in sorted(matches.items(), key=lambda item: item[1][2]):
        task, date = match.groups()
        if task in files and files[task].stem.endswith(date):
            raise RequestError(f"{path} has two files of {task} from {date}; name one of them")
        files[task] = file
    return files


def read_details(source: str, files: Mapping[str, Path], progress: Progress) -> ModelAnswers:
    """Read a model's answers from its files of details.

    Args:
        source: The argument that names the answers.
        files: Name of the task → file of details, as from `find_details`.
        progress: Receives the number of megabytes.

    Returns:
        The answers to all tasks.

    Raises:
        RequestError: A file is damaged or incomplete.
    """
    name, benchmarks, read_results = Path(source).name, {}, cache(_read_results)
    for task, path in files.items():
        with explain_damage(path, "lighteval 0.13 or newer"):
            results = read_results(path.parent)
            name = str(results.get("config_general", {}).get("model_name") or name)
            benchmarks[task] = _read_task(task, path, results)
        progress.advance(path.stat().st_size // 1_000_000)
    return ModelAnswers(name.rstrip("/").rpartition("/")[2], source, benchmarks)


def _read_results(details: Path) -> dict[str, Any]:
    """Read the results of a model and date, named by their folder of details; {} if unknown."""
    for folder in details.parents:
        if folder.name == "details":
            model = details.parent.relative_to(folder)
            results = folder.parent / "results" / model / f"results_{details.name}.json"
            return dict(json.loads(results.read_bytes())) if results.is_file() else {}
    return {}


def _read_task(task: str, path: Path, results: Mapping[str, Any]) -> BenchmarkAnswers:
    """Read the answers to a task."""
    rows = read_parquet(path, _COLUMNS).to_pylist()
    samples = [{"task": task, **_parse_row(row, number)} for number, row in enumerate(rows)]
    report = _convert_results(task, path, results)
    return BenchmarkReport(report, task, [task]).read(samples, partial(_read_text, rows))


def _parse_row(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Convert a row of details to the form of lm-eval's samples."""
    doc, response = row["doc"], row["model_response"]
    gold = doc["gold_index"]
    options = (response["logprobs"], gold) if isinstance(gold, int) else None
    return {
        "doc": number,
        "key": _hash([doc["query"], doc["choices"], gold]),
        "prompt": _hash(response["input"]) if response["input"] else "",
        "filter": "none",
        "metrics": row["metric"],
        "options": options if response["logprobs"] else None,
        "offset": number,
    }


def _hash(value: object) -> str:
    return sha256(json.dumps(value).encode()).hexdigest()


def _convert_results(task: str, path: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """Convert lighteval's results of a task to the form of lm-eval's."""
    name = path.stem.removeprefix("details_").rpartition("_")[0]
    config = results.get("config_tasks", {}).get(name)
    if config is None:
        return {}
    model = results["config_general"]["model_config"]
    higher: dict[str, bool] = {}
    for metric in config["metrics"]:
        names, value = metric["metric_name"], metric["higher_is_better"]
        higher |= value if isinstance(value, dict) else {names: value}
    kwargs = {key: config[key] for key in _TASK_SETTINGS} | model["generation_parameters"]
    means = {f"{metric},none": value for metric, value in results["results"][name].items()}
    return {
        "results": {task: means},
        "higher_is_better": {task: higher},
        "configs": {task: {"generation_kwargs": kwargs}},
        "versions": {task: config["version"]},
        "n-shot": {task: config["num_fewshots"]},
        "chat_template_sha": model.get("override_chat_template"),
        "system_instruction_sha": model.get("system_prompt"),
    }


def _read_text(
    rows: Sequence[Mapping[str, Any]], offsets: Mapping[tuple[str, int], int], task: str, doc: int
) -> AnswerText:
    """Return the texts of a document and of the model's answer."""
    row = rows[offsets[task, doc]]
    document, response = row["doc"], row["model_response"]
    texts, choices, target = response["text"] or [], document["choices"] or [], ""
    answer = texts[0] if texts else ""
    with suppress(TypeError, LookupError):
        target = choices[document["gold_index"]].strip()
        if response["logprobs"]:
            answer = choices[int(np.argmax(response["logprobs"]))].strip()
    return AnswerText(document["query"][-ENDING_LENGTH:], answer, target)
