"""Read the files that `lm_eval --log_samples --output_path` writes.

The files are data from others: nothing in them is executed. Files of samples are read line by line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tracker.comparison.answers import AnswerText, BenchmarkAnswers, ModelAnswers, setting_text
from tracker.measuring.progress import Progress
from tracker.schema.errors import RequestError, first_line, translate_errors
from tracker.schema.identities import CHOICE_PROBABILITY
from tracker.stats.accuracy import weights_by_task
from tracker.stats.decisions import choice_probabilities, choose_options

_NAME = re.compile(r"(?:samples_)?(.*?)(?:_(\d{4}-\d\d-\d\dT[\d.-]+))?", re.DOTALL)
"""Stem of a file's name: task and date."""
_ARGUMENTS, _RESPONSES = b'"arguments": {"gen_args_0"', b'"resps": ['
_MEGABYTE = 1_000_000
ENDING_LENGTH = 600
"""Number of characters of a prompt that are displayed."""
_TOLERANCE = 1e-6
"""Largest difference between lm-eval's mean and ours by rounding."""


def find_samples(path: Path) -> dict[str, Path]:
    """Find the newest file of samples of each task.

    Args:
        path: Folder of one model, a folder with one such folder, or a file of samples.

    Returns:
        Name of the task → file.

    Raises:
        RequestError: There are no samples, or the samples of several models.
    """
    if not path.exists():
        raise RequestError(
            f"{path} does not exist; expected e.g. a folder with samples_TASK_DATE.jsonl of "
            "lm-eval or details_TASK_DATE.parquet of lighteval, or a run as FOLDER:CELL:CHANGE"
        )
    files = [path] if path.is_file() else [*path.glob("samples_*.jsonl")]
    if not files:
        files = [*path.glob("*/samples_*.jsonl")]
    refuse_several_models(path, (file.parent for file in files))
    if not files or path.suffix == ".json":
        command = "run lm_eval with --log_samples and --output_path"
        details = "or lighteval with --save-details"
        raise RequestError(f"{path} holds no samples_TASK_DATE.jsonl; {command}, {details}")
    files.sort(key=lambda file: _task_and_date(file)[1])
    return {_task_and_date(file)[0]: file for file in files}


def refuse_several_models(path: Path, folders: Iterable[Path]) -> None:
    """Raise RequestError if the files of a path are in the folders of several models."""
    if len(models := {*map(str, folders)}) > 1:
        names = ", ".join(sorted(models)[:5])
        raise RequestError(f"{path} holds {len(models)} models; name one of: {names}")


def _task_and_date(path: Path) -> tuple[str, str]:
    match = _NAME.fullmatch(path.stem)
    assert match
    return match[1], match[2] or ""


def read_model(source: str, files: Mapping[str, Path], progress: Progress) -> ModelAnswers:
    """Read a model's answers from its files of samples.

    Args:
        source: The argument that names the answers.
        files: Name of the task → file of samples, as from `find_samples`.
        progress: Receives the number of megabytes.

    Returns:
        The answers to all tasks and groups.

    Raises:
        RequestError: A file is damaged or incomplete.
    """
    name = Path(source).name
    benchmarks: dict[str, BenchmarkAnswers] = {}
    for date in dict.fromkeys(_task_and_date(path)[1] for path in files.values()):
        paths = {task: path for task, path in files.items() if _task_and_date(path)[1] == date}
        report = _read_report(next(iter(paths.values())).parent, date)
        with explain_damage(source):
            name = str(report.get("model_name") or name).rstrip("/").rpartition("/")[2]
            for benchmark, tasks in _benchmarks(report, paths).items():
                if benchmark in benchmarks:
                    raise RequestError(
                        f"{source} has results of {benchmark} from two dates; give the files of "
                        "one date"
                    )
                rows = [row for task in tasks for row in _read_samples(task, paths[task], progress)]
                read_text = partial(_read_text, paths)
                benchmarks[benchmark] = BenchmarkReport(report, benchmark, tasks).read(
                    rows, read_text
                )
    return ModelAnswers(name, source, benchmarks)


def explain_damage(source: object, program: str = "lm-eval") -> AbstractContextManager[None]:
    """Convert errors about unexpected content in a `with` block to RequestError."""

    def convert(error: Exception) -> RequestError | None:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)
        text = f"{source} is incomplete or not of {program} ({reason}); copy the file again"
        return None if isinstance(error, OSError) else RequestError(text)

    return translate_errors(convert)


def _read_report(folder: Path, date: str) -> dict[str, Any]:
    """Read the file of results of a date; return {} if there is none."""
    path = min(folder.glob(f"*_{date}.json"), default=None) if date else None
    if path is None:
        return {}
    with explain_damage(path):
        return dict(json.loads(path.read_bytes()))


def _benchmarks(report: Mapping[str, Any], paths: Mapping[str, Path]) -> dict[str, list[str]]:
    """Return the tasks of each outermost group with all samples, and of each other task."""
    subtasks: Mapping[str, list[str]] = report.get("group_subtasks") or {}
    inner_names = {child for children in subtasks.values() for child in children}
    benchmarks: dict[str, list[str]] = {}
    others = dict.fromkeys(paths)
    for group in [name for name in subtasks if name not in inner_names]:
        names = [group]
        for name in names:
            names += [child for child in subtasks.get(name, ()) if child not in names]
        tasks = [name for name in names[1:] if not subtasks.get(name)]
        if tasks and others.keys() >= {*tasks}:
            benchmarks[group] = tasks
            for task in tasks:
                del others[task]
    return benchmarks | {task: [task] for task in others}


def _read_samples(task: str, path: Path, progress: Progress) -> list[dict[str, Any]]:
    """Read what is needed of each line of a file."""
    samples: list[dict[str, Any]] = []
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            with explain_damage(f"{path}, line {number},"):
                samples.append({"task": task, **_parse_sample(line), "offset": offset})
            offset += len(line)
            if finished := offset // _MEGABYTE - (offset - len(line)) // _MEGABYTE:
                progress.advance(finished)
    return samples


def _parse_sample(line: bytes) -> dict[str, Any]:
    """Parse a line of samples, without the requests' texts where they can be skipped."""
    start = line.find(_ARGUMENTS)
    end = line.find(_RESPONSES, start)
    sample, options = None, None
    if 0 < start < end:
        with suppress(ValueError):
            sample = json.loads(line[:start] + line[end:])
    sample = sample or json.loads(line)
    with suppress(ValueError, TypeError):
        scores = [float(score) for score, _ in sample["filtered_resps"]]
        options = None if "acc_mutual_info" in sample else (scores, int(sample["target"]))
    return {
        "doc": int(sample["doc_id"]),
        "key": sample["doc_hash"] + sample["target_hash"] if "doc_hash" in sample else "",
        "prompt": sample.get("prompt_hash", ""),
        "filter": sample["filter"],
        "metrics": {name: sample[name] for name in sample["metrics"]},
        "options": options,
    }


_ACCURACIES = ("acc", "exact_match", "f1", "em", "bleu", "rouge", "mcc")
"""Starts of the names of metrics of which higher is better, if no file of results says so."""
_CONFIG_SETTINGS = ("filter_list", "repeats", "generation_kwargs")
"""Settings in a task's configuration that change the answers."""


class BenchmarkReport:
    """Content of a file of results about a benchmark and its tasks."""

    def __init__(self, report: Mapping[str, Any], benchmark: str, tasks: Sequence[str]) -> None:
        self._report, self._tasks = report, tasks
        results = report.get("results", {})
        self._reported: Mapping[str, Any] = results.get(benchmark, {})
        self._count = sum(results.get(task, {}).get("sample_len", 1) for task in tasks)

    def read(
        self, samples: Sequence[Mapping[str, Any]], read_text: Callable[..., AnswerText]
    ) -> BenchmarkAnswers:
        """Build the answers from the samples of all tasks."""
        rows = {(row["task"], row["doc"]): row for row in samples}
        if len(rows) < self._count:
            names = ", ".join(self._tasks)
            raise ValueError(f"{len(rows)} of {self._count} documents of {names}")
        table = pd.DataFrame([*rows.values()], pd.MultiIndex.from_tuples(rows))
        offsets, options = table["offset"].to_dict(), table["options"].tolist()
        copies = table.groupby(["task", "key"]).cumcount().astype(str)
        table["key"] = table["key"].where(table["key"] == "", table["key"] + copies)
        table = table[["task", "doc", "key", "prompt"]]
        left_out, by_size = {}, True
        for name, values in _metric_values(samples).items():
            column = pd.Series(values).reindex(table.index)
            reason, by_size = self._check_mean(name, column, by_size)
            if self._is_better(name) is None:
                reason = reason or "it is not known whether higher is better"
            if reason:
                left_out[name] = reason
            else:
                table = table.assign(**{name: column.astype(np.float64)})
        probabilities = _choice_probabilities(options, table.get("acc"))
        if probabilities is not None:
            table[CHOICE_PROBABILITY] = probabilities
        metrics = map(str, table.columns[4:])
        is_better = {name: self._is_better(name) is not False for name in metrics}
        read_text = partial(read_text, offsets)
        settings = self._settings() if self._report else {}
        table = table.sort_index()
        return BenchmarkAnswers(table, is_better, settings, left_out, by_size, read_text)

    def _is_better(self, metric: str) -> bool | None:
        """Return whether higher values of a metric are better; None if it is not known."""
        name = metric.partition(",")[0]
        higher = self._report.get("higher_is_better", {}).get(self._tasks[0], {})
        value: bool | None = higher.get(name, True if name.startswith(_ACCURACIES) else None)
        return value

    def _check_mean(self, name: str, values: pd.Series[Any], by_size: bool) -> tuple[str, bool]:
        """Return why a metric cannot be compared, and whether the mean is over documents."""
        if values.dtype == object:
            return "its value for a document is not a number", by_size
        value = self._reported.get(name if "," in name else f"{name},none")
        if not isinstance(value, float | int):
            return "", by_size
        tasks = values.index.get_level_values(0).tolist()
        for flag in (by_size, not by_size):
            if abs(values @ weights_by_task(tasks, flag) - value) < _TOLERANCE:
                return "", flag
        return f"the reported {value:.4f} is no mean over the documents of the samples", by_size

    def _settings(self) -> dict[str, str]:
        """Return the settings that change the answers."""

        def join(values: Iterable[object]) -> str:
            return ", ".join(dict.fromkeys(map(setting_text, values)))

        report = self._report
        configs = [report.get("configs", {}).get(task, {}) for task in self._tasks]
        settings = {key: join(config.get(key) for config in configs) for key in _CONFIG_SETTINGS}
        for name, key in (("version", "versions"), ("num_fewshot", "n-shot")):
            settings[name] = join(report.get(key, {}).get(task) for task in self._tasks)
        for name in ("chat_template", "system_instruction"):
            settings[name] = setting_text(report.get(f"{name}_sha"))
        return settings


def _metric_values(samples: Iterable[Mapping[str, Any]]) -> dict[str, dict[tuple[str, int], Any]]:
    """Return metric → document → value; raise ValueError if a document has two values."""
    metrics: dict[str, dict[tuple[str, int], Any]] = {}
    for sample in samples:
        suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
        for metric, value in sample["metrics"].items():
            values = metrics.setdefault(f"{metric}{suffix}", {})
            if (sample["task"], sample["doc"]) in values:
                document = f"document {sample['doc']} of {sample['task']}"
                raise ValueError(f"{document} occurs twice: repeated runs are mixed")
            values[sample["task"], sample["doc"]] = value
    return metrics


def _choice_probabilities(options: Sequence[Any], acc: pd.Series[Any] | None) -> Any:
    """Return the probability of each right option; None if `acc` tests something else."""
    if acc is None or None in options:
        return None
    scores = pd.DataFrame([scores for scores, _ in options]).to_numpy(dtype=np.float64)
    gold = np.array([target for _, target in options], dtype=np.float64)
    is_option = (gold >= 0) & (gold < (~np.isnan(scores)).sum(axis=1))
    is_right = choose_options(scores) == gold
    is_known = is_option.all() and np.array_equal(is_right, acc == 1)
    return choice_probabilities(scores, gold) if is_known else None


def _read_text(
    paths: Mapping[str, Path], offsets: Mapping[tuple[str, int], int], task: str, doc: int
) -> AnswerText:
    """Read the texts of a document and of the model's answer."""
    with paths[task].open("rb") as file:
        file.seek(offsets[task, doc])
        sample = json.loads(file.readline())
    responses, target, question = sample["filtered_resps"], str(sample["target"]), ""
    answer = responses[0] if responses else ""
    with suppress(ValueError, TypeError, LookupError, AttributeError):
        requests = [*sample["arguments"].values()]
        question = str(requests[0]["arg_0"]).strip()
        options = [str(request["arg_1"]).strip() for request in requests]
        answer = options[int(np.argmax([float(score) for score, _ in responses]))]
        target = options[int(target)]
    return AnswerText(question[-ENDING_LENGTH:], str(answer), target)
