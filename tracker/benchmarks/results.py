"""Write lm-eval's result files from stored model answers, without running a model.

lm-eval evaluates a substitute for the model that returns the stored answers. lm-eval's own code
then writes the files.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.loggers.evaluation_tracker import EvaluationTracker, GeneralConfigTracker
from lm_eval.utils import sanitize_model_name

from tracker.benchmarks.base import MetricValue
from tracker.benchmarks.encoder import RequestEncoder
from tracker.benchmarks.tasks import LmEvalBenchmark, storable_value
from tracker.schema.errors import CellError, WorkError
from tracker.schema.extent import Extent
from tracker.schema.grouping import group_by
from tracker.schema.identities import filtered_metric
from tracker.schema.provenance import content_hash

BOOTSTRAP_ITERS = 100_000
"""Number of bootstrap iterations, lm-eval's own default."""
_MAX_NAME = 200
"""Maximum length of a folder's name; file systems allow 255 characters."""
_DATE_FORMAT = "%Y-%m-%dT%H-%M-%S.%f"
"""Format of the dates in the names of lm-eval's files."""
AnswerKey = tuple[str, int]
"""Key of a document: the name of its task, and its number in the task's split."""


@dataclass(frozen=True)
class JudgedAnswers:
    """A model's answers to one document, and the metrics of the answers.

    Attributes:
        loglikelihoods: Log-likelihoods of the requests, in order.
        greedy: Whether each continuation is the model's greedy continuation.
        texts: Generated texts, one per sample; empty if the task generates no text.
        metrics: Value of each metric, by name. All values are None if a log-likelihood is not
            finite.
    """

    loglikelihoods: Sequence[float]
    greedy: Sequence[bool]
    texts: Sequence[str]
    metrics: Mapping[str, MetricValue | None]


@dataclass(frozen=True)
class EvaluatedModel:
    """Description of an evaluated model for lm-eval's result files.

    Attributes:
        name: Name of the model; it determines the name of the output folder.
        model_args: Arguments as for `lm_eval --model_args`, including the removed layers or other
            parts.
        system_instruction: System prompt; None = no system prompt.
        fewshot_as_multiturn: Whether few-shot examples are separate turns of a chat.
        config: Further entries of lm-eval's result files, about the model and the evaluation.
        versions: Further entries of lm-eval's result files, about installed versions.
    """

    name: str
    model_args: str
    system_instruction: str | None
    fewshot_as_multiturn: bool
    config: Mapping[str, Any]
    versions: Mapping[str, Any]


class ResultFileWriter:
    """Writer of lm-eval's result files for several models.

    `encoder` applies the chat template; it is None if no chat template is used. Raises
    BenchmarkError if a document lacks a column that its task reads.
    """

    def __init__(
        self, benchmarks: Sequence[LmEvalBenchmark], extent: Extent, encoder: RequestEncoder | None
    ) -> None:
        self._tasks: dict[str, Any] = {}
        self._groups: dict[str, Any] = {}
        self._requests: dict[str, dict[int, list[Any]]] = {}
        for benchmark in benchmarks:
            self._groups |= benchmark.task_dict["groups"]
            for name, task in benchmark.task_dict["tasks"].items():
                self._tasks[name] = task
                self._requests[name] = benchmark.build_requests(name, extent, encoder)
        self._chat_template = encoder.chat_template(True) if encoder else None

    def write(
        self, model: EvaluatedModel, answers: Mapping[AnswerKey, JudgedAnswers], output: Path
    ) -> list[Path]:
        """Write the result files that lm-eval would write after evaluating the model.

        Args:
            model: Description of the evaluated model.
            answers: The model's answers to each document.
            output: Output folder, as for `lm_eval --output_path`.

        Returns:
            Paths of the results file and of each task's file of samples, in this order.

        Raises:
            CellError: A metric computed by lm-eval differs from the stored metric.
            WorkError: A file could not be written.
        """
        documents = group_by(sorted(answers), lambda key: key[0])
        tasks, subsets = {}, {}
        by_position: dict[AnswerKey, JudgedAnswers] = {}
        for name, task in self._tasks.items():
            if name not in documents:
                continue
            numbers = [number for _, number in documents[name]]
            tasks[name] = _PreparedTask(task, [self._requests[name][n] for n in numbers])
            if len(numbers) < len(task.eval_docs):
                subsets[name] = numbers
            # lm-eval counts the documents of each task from 0, in this order.
            by_position |= {(name, i): answers[name, n] for i, n in enumerate(numbers)}
        with redirect_stdout(io.StringIO()):  # lm-eval prints the name of each resampled metric
            results: dict[str, Any] = evaluate(
                lm=_RecordedModel(by_position),
                task_dict={"tasks": tasks, "groups": self._groups},
                samples=subsets or None,
                bootstrap_iters=BOOTSTRAP_ITERS,
            )
        samples = results.pop("samples")
        _refuse_contradictions(samples, answers)
        for config in results["configs"].values():
            config.pop("custom_dataset", None)  # how tracker reads a task's data
        results["config"] = {"model": "hf", "model_args": model.model_args, **model.config}
        results |= model.versions
        return self._save(model, results, samples, output)

    def _save(
        self, model: EvaluatedModel, results: dict[str, Any], samples: dict[str, Any], output: Path
    ) -> list[Path]:
        """Write the result files with lm-eval, and check that they are complete.

        Raises WorkError if a file is missing or incomplete.
        """
        writer = EvaluationTracker(output_path=str(output))
        config_tracker = writer.general_config_tracker = _UntimedTracker()
        config_tracker.log_experiment_args(
            model_source="hf",
            model_args=model.model_args,
            system_instruction=model.system_instruction,
            chat_template=self._chat_template,
            fewshot_as_multiturn=self._chat_template is not None and model.fewshot_as_multiturn,
        )
        config_tracker.model_name = model.name
        config_tracker.model_name_sanitized = name = model_folder(model.name)
        writer.save_results_aggregated(results=results, samples=samples)
        folder = output / name
        if not hasattr(writer, "date_id"):
            raise WorkError(f"{output}: lm-eval failed to write the results of {model.name}")
        path = folder / f"results_{writer.date_id}.json"
        writer.date_id = _newest_date(writer.date_id, folder)
        files = {folder / f"results_{writer.date_id}.json": 0}
        with suppress(OSError):  # a missing file is reported below
            path.rename(*files)
        for task, rows in samples.items():
            writer.save_results_samples(task_name=task, samples=rows)
            files[folder / f"samples_{task}_{writer.date_id}.jsonl"] = len(rows)
        for path, rows in files.items():
            try:
                lines = path.read_text(encoding="utf-8").split("\n")
                is_complete = len(lines) == rows + 1 if rows else bool(json.loads("\n".join(lines)))
            except (OSError, ValueError):
                is_complete = False
            if not is_complete:
                raise WorkError(f"{path} could not be written; is there room on the disk?")
        return list(files)


def _newest_date(date: str, folder: Path) -> str:
    """Return a date that makes a new results file the newest results file in `folder`.

    The result is `date`, or one second more than the date of a later results file in `folder`.
    Programs that read the folder use only the newest results file.
    """
    names = {path.stem.removeprefix("results_") for path in folder.glob("results_*.json")}
    last_date = max(names - {date}, default="")
    if last_date > date:
        with suppress(ValueError):  # a date without microseconds, or a file not of lm-eval
            next_date = datetime.strptime(last_date, _DATE_FORMAT) + timedelta(seconds=1)
            return next_date.strftime(_DATE_FORMAT)
    return date


def model_folder(model: str) -> str:
    """Return the name that lm-eval gives to a model's folder.

    A name that is too long for file systems is shortened.
    """
    name: str = sanitize_model_name(model)
    return name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}--{content_hash(name)[:12]}"


class _PreparedTask:
    """Wrapper of an lm-eval task that uses requests which were built before."""

    def __init__(self, task: ConfigurableTask, requests: Sequence[Sequence[Any]]) -> None:
        self._task = task
        self._requests = requests

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def build_all_requests(self, **settings: object) -> None:
        """Use copies of the prepared requests in the task, with documents numbered from 0."""
        self._task._instances = [
            replace(i, metadata=(i.task_name, position, i.repeats), resps=[], filtered_resps={})
            for position, instances in enumerate(self._requests)
            for i in instances
        ]


class _RecordedModel(LM):  # type: ignore[misc]
    """Substitute for a model in lm-eval that returns stored answers."""

    def __init__(self, answers: Mapping[AnswerKey, JudgedAnswers]) -> None:
        super().__init__()
        self._answers = answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return the stored log-likelihood of each continuation, and whether it is greedy."""
        pairs = [(self._find_answer(request), request.idx) for request in requests]
        return [(float(answer.loglikelihoods[n]), bool(answer.greedy[n])) for answer, n in pairs]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return the stored log-likelihood of each text."""
        return [sum(map(float, self._find_answer(request).loglikelihoods)) for request in requests]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the stored texts.

        lm-eval repeats a request for each sampled text, so each repetition gets the next text.
        """
        texts = {id(request): iter(self._find_answer(request).texts) for request in requests}
        return [next(texts[id(request)]) for request in requests]

    def _find_answer(self, request: Instance) -> JudgedAnswers:
        return self._answers[request.task_name, request.doc_id]


class _UntimedTracker(GeneralConfigTracker):  # type: ignore[misc]
    """Variant of lm-eval's `EvaluationTracker` that records no durations."""

    def log_end_time(self) -> None:
        """Do nothing, so that lm-eval records no duration."""


def _refuse_contradictions(
    samples: Mapping[str, Sequence[Mapping[str, Any]]], answers: Mapping[AnswerKey, JudgedAnswers]
) -> None:
    """Raise CellError if lm-eval's metrics of an answer differ from the stored metrics.

    Documents with several sampled texts are not compared: lm-eval judges only the first text, but
    the stored metrics are means over all texts.
    """
    for task, rows in samples.items():
        for row in rows:
            answer = answers[task, row["doc_id"]]
            metrics = {} if len(answer.texts) > 1 else answer.metrics
            for metric in row["metrics"]:
                name = filtered_metric(metric, row["filter"])
                stored, current = metrics.get(name), storable_value(row[metric])
                if stored is not None and not _are_equal(stored, current):
                    raise CellError(
                        f"document {row['doc_id']} of {task}: the stored {name} is {stored}, but "
                        f"the installed lm-eval computes {current} from the same model outputs"
                    )


def _are_equal(stored: MetricValue, current: MetricValue) -> bool:
    if isinstance(stored, str) or isinstance(current, str):
        return stored == current
    return bool(np.isclose(stored, current, rtol=1e-9, atol=0.0, equal_nan=True))
