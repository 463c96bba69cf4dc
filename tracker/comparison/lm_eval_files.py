"""Read the files that `lm_eval --log_samples --output_path` writes.

The files are data from others: nothing in them is executed. Files of samples are read line by line.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tracker.comparison.answers import (
    ENDING_LENGTH,
    AnswerText,
    ModelAnswers,
    TaskAnswers,
    TaskGroup,
)
from tracker.measuring.progress import Progress
from tracker.schema.errors import RequestError
from tracker.schema.identities import CHOICE_PROBABILITY
from tracker.stats.accuracy import weights_by_task
from tracker.stats.arrays import Array
from tracker.stats.decisions import choice_probabilities, choose_options

_DATE = r"\d{4}-\d\d-\d\dT[\d.-]+"
_SAMPLES = re.compile(rf"samples_(.+)_({_DATE})\.jsonl", re.DOTALL)
_HASHES = ("doc_hash", "target_hash")
_MEGABYTE = 1_000_000
LOG_SAMPLES = "run lm_eval with --log_samples and --output_path"


def find_samples(path: Path) -> dict[str, Path]:
    """Find the newest file of samples of each task.

    Args:
        path: Folder of one model, a folder with one such folder, a file of samples, or a file of
            results with files of samples beside it.

    Returns:
        Name of the task → file.

    Raises:
        RequestError: There are no samples, or the samples of several models.
    """
    if path.suffix == ".jsonl" and path.is_file():
        files = [path]
    elif path.suffix == ".json" and path.is_file():
        date = re.search(rf"_({_DATE})\.json$", path.name)
        files = sorted(path.parent.glob(f"samples_*_{date[1]}.jsonl")) if date else []
    elif path.is_dir():
        files = sorted(_model_folder(path).glob("samples_*.jsonl"), key=_sample_date)
    else:
        raise RequestError(
            f"{path} is neither a folder nor a file of lm-eval's results; expected e.g. a folder "
            "with results_DATE.json and samples_TASK_DATE.jsonl, or FOLDER:CELL:CHANGE"
        )
    if not files:
        raise RequestError(f"{path} holds no samples; {LOG_SAMPLES}")
    return {_task_name(file): file for file in files}


def _model_folder(folder: Path) -> Path:
    """Return the folder with the files of one model; refuse the files of several models."""
    patterns = ("results_*.json", "samples_*.jsonl")
    if any(any(folder.glob(pattern)) for pattern in patterns):
        return folder
    folders = sorted({file.parent for pattern in patterns for file in folder.glob(f"*/{pattern}")})
    if len(folders) > 1:
        names = ", ".join(str(path) for path in folders[:5])
        raise RequestError(f"{folder} holds {len(folders)} models; name one of: {names}")
    return folders[0] if folders else folder


def _task_name(path: Path) -> str:
    match = _SAMPLES.fullmatch(path.name)
    return match[1] if match else path.stem.removeprefix("samples_")


def _sample_date(path: Path) -> str:
    match = _SAMPLES.fullmatch(path.name)
    return match[2] if match else ""


def read_answers(source: str, files: Mapping[str, Path], progress: Progress) -> ModelAnswers:
    """Read a model's answers from its files of samples.

    Args:
        source: The argument that names the answers.
        files: Name of the task → file of samples, as from `find_samples`.
        progress: Receives the number of megabytes.

    Raises:
        RequestError: A file is damaged or incomplete.
    """
    reports = {task: _read_report(path) for task, path in files.items()}
    tasks = {
        task: _TaskReader(task, path, reports[task], progress).read()
        for task, path in files.items()
    }
    report = next(iter(reports.values()))
    name = str(report.get("model_name") or Path(source).name).rstrip("/").rpartition("/")[2]
    groups = {
        name: TaskGroup(leaves, _weighs_by_size(name, leaves, report, tasks))
        for report in reports.values()
        for name, leaves in _top_groups(report.get("group_subtasks") or {}, tasks)
    }
    return ModelAnswers(name or source, source, tasks, groups)


def _read_report(samples: Path) -> dict[str, Any]:
    """Read the file of results that belongs to a file of samples; return {} if there is none."""
    date = _sample_date(samples)
    path = min(samples.parent.glob(f"*_{date}.json"), default=None) if date else None
    if path is None:
        return {}
    try:
        report = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is no complete JSON file: {error}") from None
    return report if isinstance(report, dict) else {}


def _top_groups(
    subtasks: Mapping[str, Sequence[str]], tasks: Mapping[str, TaskAnswers]
) -> Iterator[tuple[str, list[str]]]:
    """Yield the outermost groups, each with its tasks that have samples."""

    def leaves(name: str, above: tuple[str, ...] = ()) -> Iterator[str]:
        if name in tasks:
            yield name
        for child in subtasks.get(name, ()):
            if child not in above:
                yield from leaves(child, (*above, name))

    inner_names = {child for children in subtasks.values() for child in children}
    for name in subtasks:
        group_tasks = [] if name in inner_names else list(dict.fromkeys(leaves(name)))
        if group_tasks != [name] and group_tasks:
            yield name, group_tasks


def _weighs_by_size(
    group: str, leaves: Sequence[str], report: Mapping[str, Any], tasks: Mapping[str, TaskAnswers]
) -> bool:
    """Find out whether a group's reported metric gives every document the same weight."""
    reported = report.get("results", {}).get(group, {})
    for metric in tasks[leaves[0]].metrics:
        value = _reported_value(reported, metric)
        columns = [tasks[leaf].metrics[metric] for leaf in leaves if metric in tasks[leaf].metrics]
        if value is not None and len(columns) == len(leaves):
            names = np.repeat(np.array(leaves), list(map(len, columns))).tolist()
            values = np.concatenate(columns)
            by_size, by_task = (values @ weights_by_task(names, flag) for flag in (True, False))
            return bool(abs(by_size - value) <= abs(by_task - value) + 1e-9)
    return True


def _reported_value(reported: Mapping[str, Any], metric: str) -> float | None:
    name, _, filter_name = metric.partition(",")
    value = reported.get(f"{name},{filter_name or 'none'}")
    return value if isinstance(value, float | int) else None


class _TaskReader:
    """Reader of the samples of one task."""

    def __init__(
        self, task: str, path: Path, report: Mapping[str, Any], progress: Progress
    ) -> None:
        self._task, self._path, self._report, self._progress = task, path, report, progress
        self._offsets: dict[int, int] = {}
        self._rows: dict[int, tuple[str, str, str]] = {}
        self._metrics: dict[str, dict[int, float]] = {}
        self._options: dict[int, tuple[list[float], int]] = {}
        self._left_out: dict[str, str] = {}

    def read(self) -> TaskAnswers:
        """Read all samples; raise RequestError if the file is damaged or incomplete."""
        for number, (offset, line) in enumerate(self._lines(), start=1):
            try:
                self._add(_parse_sample(line), offset)
            except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
                reason = f"it lacks {error}" if isinstance(error, KeyError) else error
                raise RequestError(
                    f"{self._path}, line {number} is no complete sample of lm-eval ({reason}); "
                    "copy the file again"
                ) from None
        reported = self._report.get("results", {}).get(self._task, {})
        count = reported.get("sample_len", len(self._rows))
        if not self._rows or len(self._rows) < count:
            raise RequestError(
                f"{self._path} holds {len(self._rows)} of {count or 'its'} documents; "
                "copy the file again"
            )
        columns = ["key", "prompt", "ending"]
        documents = pd.DataFrame.from_dict(self._rows, orient="index", columns=columns)
        documents = documents.sort_index()
        metrics = self._read_metrics(documents.index.tolist(), reported)
        higher = self._report.get("higher_is_better", {}).get(self._task, {})
        return TaskAnswers(
            documents,
            metrics,
            {metric: higher.get(metric.partition(",")[0]) is not False for metric in metrics},
            self._settings(),
            self._left_out,
            partial(_read_text, self._path, self._offsets),
            self._path,
        )

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield each line with its position in the file, and report progress."""
        offset = reported = 0
        with self._path.open("rb") as file:
            for line in file:
                if line.strip():
                    yield offset, line
                offset += len(line)
                if offset - reported >= _MEGABYTE:
                    self._progress.advance((offset - reported) // _MEGABYTE)
                    reported += (offset - reported) // _MEGABYTE * _MEGABYTE

    def _add(self, sample: Mapping[str, Any], offset: int) -> None:
        """Keep what is needed of a sample."""
        doc, filter_name = int(sample["doc_id"]), str(sample.get("filter", "none"))
        suffix = "" if filter_name == "none" else f",{filter_name}"
        for metric in sample["metrics"]:
            value = sample[metric]
            if not isinstance(value, float | int):
                self._left_out[metric + suffix] = "its value for a document is not a number"
                continue
            values = self._metrics.setdefault(metric + suffix, {})
            if doc in values:
                raise RequestError(
                    f"{self._path}: document {doc} occurs twice; the file mixes repeated runs, "
                    "so give the file of one run"
                )
            values[doc] = float(value)
        if doc not in self._rows:
            key = "".join(sample.get(name, "") for name in _HASHES)
            prompt = sample.get("prompt_hash", "")
            # Only documents without hashes, or beside runs of tracker, are matched by their text.
            self._rows[doc] = (key[:32] + key[64:96], prompt[:32], _prompt_ending(sample))
            self._offsets[doc] = offset
            self._add_options(doc, sample)

    def _add_options(self, doc: int, sample: Mapping[str, Any]) -> None:
        """Keep the log-likelihoods of a document's options if the right one is known."""
        if "acc" in sample["metrics"] and "acc_mutual_info" not in sample["metrics"]:
            with suppress(ValueError, TypeError):
                scores = [float(score) for score, _ in sample["filtered_resps"]]
                self._options[doc] = (scores, int(sample["target"]))

    def _read_metrics(self, docs: Sequence[int], reported: Mapping[str, Any]) -> dict[str, Array]:
        """Return the metrics that are means over documents, and the choice probability."""
        metrics = {
            name: np.array([values.get(doc, math.nan) for doc in docs])
            for name, values in self._metrics.items()
        }
        for name, values in metrics.items():
            value, mean = _reported_value(reported, name), float(values.mean())
            if value is not None and not math.isclose(value, mean, abs_tol=1e-6):
                reason = f"the reported {value:.4f} is not the mean over documents ({mean:.4f})"
                self._left_out[name] = reason
        metrics = {name: metrics[name] for name in metrics if name not in self._left_out}
        if "acc" in metrics and len(self._options) == len(docs):
            options = [self._options[doc] for doc in docs]
            probabilities = _choice_probabilities(options, metrics["acc"])
            metrics |= {} if probabilities is None else {CHOICE_PROBABILITY: probabilities}
        return metrics

    def _settings(self) -> dict[str, str]:
        """Return the settings that change the answers; empty without a file of results."""
        if not self._report:
            return {}
        report, config = self._report, self._report.get("configs", {}).get(self._task, {})
        settings = {
            "version": report.get("versions", {}).get(self._task),
            "num_fewshot": report.get("n-shot", {}).get(self._task),
            "chat_template": report.get("chat_template_sha"),
            "system_instruction": report.get("system_instruction_sha"),
            "filter": config.get("filter_list"),
            "repeats": config.get("repeats"),
            "generation_kwargs": config.get("generation_kwargs"),
        }
        return {name: setting_text(value) for name, value in settings.items()}


def setting_text(value: object) -> str:
    """Write a setting's value as text; the text of None is `none`."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _parse_sample(line: bytes) -> dict[str, Any]:
    """Parse one line."""
    sample = json.loads(line)
    if not isinstance(sample, dict):
        raise ValueError("no JSON object")
    if "metrics" not in sample:  # lm-eval before 0.4.4
        fixed = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter"}
        fixed |= {"doc_hash", "prompt_hash", "target_hash"}
        sample["metrics"] = [name for name in sample if name not in fixed]
    return sample


def _prompt_ending(sample: Mapping[str, Any]) -> str:
    arguments = sample.get("arguments") or {}
    first = next(iter(arguments.values() if isinstance(arguments, dict) else arguments), ())
    prompt = next(iter(first.values() if isinstance(first, dict) else first), "")
    return str(prompt).strip()[-ENDING_LENGTH:]


def _choice_probabilities(options: Sequence[tuple[list[float], int]], acc: Array) -> Array | None:
    """Return the probability of each right option; None if `acc` tests something else."""
    scores = np.full((len(options), max(len(row) for row, _ in options)), np.nan)
    for row, (values, _) in enumerate(options):
        scores[row, : len(values)] = values
    gold = np.array([target for _, target in options], dtype=np.float64)
    is_known = (gold >= 0) & (gold < (~np.isnan(scores)).sum(axis=1))
    if not is_known.all() or not np.array_equal(choose_options(scores) == gold, acc == 1):
        return None
    return choice_probabilities(scores, gold)


def _read_text(path: Path, offsets: Mapping[int, int], doc: int) -> AnswerText:
    """Read the text of a document and of the model's answer."""
    with path.open("rb") as file:
        file.seek(offsets[doc])
        sample = _parse_sample(file.readline())
    arguments, answers = sample.get("arguments") or {}, sample.get("filtered_resps") or [""]
    target, answer = str(sample["target"]), answers[0]
    with suppress(ValueError, TypeError, KeyError, IndexError, AttributeError):
        options = [str(request["arg_1"]).strip() for request in arguments.values()]
        scores = [float(score) for score, _ in answers]
        answer = options[int(np.argmax(scores))]
        target = options[int(target)]
    return AnswerText(_prompt_ending(sample), str(answer), target)
