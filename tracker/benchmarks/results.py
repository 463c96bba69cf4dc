"""Write lm-eval's own result files from stored answers; no model runs.

lm-eval evaluates a model that returns the answers of the ledger, and its own tracker writes files.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.loggers.evaluation_tracker import EvaluationTracker, GeneralConfigTracker
from lm_eval.utils import sanitize_model_name

from tracker.benchmarks.base import MetricValue
from tracker.benchmarks.encoder import RequestEncoder
from tracker.benchmarks.fingerprint import metric_name
from tracker.benchmarks.tasks import LmEvalBenchmark, plain
from tracker.core.errors import CellError, WorkError
from tracker.core.extent import Extent
from tracker.core.provenance import content_hash

BOOTSTRAP_ITERS = 100_000
"""lm-eval's own default."""
_LONGEST = 200
"""Maximum length of a folder's name; file systems allow 255 characters."""
_DATE = "%Y-%m-%dT%H-%M-%S.%f"
"""In the names of lm-eval's files."""
Place = tuple[str, int]
"""A document: its task, and its number in the task's split."""


@dataclass(frozen=True)
class Judged:
    """A model's answers to one document, and its task's metrics of them.

    Attributes:
        loglikelihoods: Log-likelihoods of the requests, in order.
        greedy: Whether each continuation is the greedy one.
        text: Generated text; None if nothing is generated.
        metrics: All metrics by their names in outcomes. All are None if a log-likelihood is not
            finite.
    """

    loglikelihoods: Sequence[float]
    greedy: Sequence[bool]
    text: str | None
    metrics: Mapping[str, MetricValue | None]


@dataclass(frozen=True)
class Evaluated:
    """Evaluated model, described as lm-eval does.

    Attributes:
        name: Name of the model, from which lm-eval derives that of its folder.
        model_args: Arguments as for `lm_eval --model_args`, with the removed parts.
        system_instruction: System prompt; None = none.
        fewshot_as_multiturn: Whether few-shot examples are turns of a chat, if there is a chat.
        config: Further entries of lm-eval's files about a model and its evaluation.
        versions: Further entries about the installation.
    """

    name: str
    model_args: str
    system_instruction: str | None
    fewshot_as_multiturn: bool
    config: Mapping[str, Any]
    versions: Mapping[str, Any]


class Questions:
    """Questions of some benchmarks' documents, built once for all models.

    `encoder` applies the chat template; None = no template. Raises BenchmarkError if a document
    lacks a column that its task reads.
    """

    def __init__(
        self, benchmarks: Sequence[LmEvalBenchmark], extent: Extent, encoder: RequestEncoder | None
    ) -> None:
        loaded = [benchmark.loaded for benchmark in benchmarks]
        self._tasks = {name: task for each in loaded for name, task in each["tasks"].items()}
        self._groups = {name: group for each in loaded for name, group in each["groups"].items()}
        self._prompts = {
            name: benchmark.prompts(name, extent, encoder)
            for benchmark in benchmarks
            for name in benchmark.loaded["tasks"]
        }
        self._chat_template = encoder.chat_template(True) if encoder else None

    def write(self, model: Evaluated, known: Mapping[Place, Judged], output: Path) -> list[Path]:
        """Write the files that lm-eval would have written for a model.

        Args:
            model: Evaluated model.
            known: Document → answers; only these documents are written.
            output: Folder, as for `lm_eval --output_path`.

        Returns:
            The files: the results, then the samples of each task.

        Raises:
            CellError: lm-eval now judges an answer differently.
            WorkError: A file could not be written.
        """
        documents: dict[str, list[int]] = {}
        for task, number in sorted(known):
            documents.setdefault(task, []).append(number)
        asked = {
            name: _Asked(task, [self._prompts[name][number] for number in documents[name]])
            for name, task in self._tasks.items()
            if name in documents
        }
        some = {
            name: numbers
            for name, numbers in documents.items()
            if len(numbers) < len(self._tasks[name].eval_docs)
        }
        answers = {
            (name, place): known[name, number]
            for name, numbers in documents.items()
            for place, number in enumerate(numbers)
        }
        with redirect_stdout(io.StringIO()):  # it prints what it resamples
            results: dict[str, Any] = evaluate(
                lm=_Answering(answers),
                task_dict={"tasks": asked, "groups": self._groups},
                samples=some or None,
                bootstrap_iters=BOOTSTRAP_ITERS,
            )
        samples = results.pop("samples")
        _refuse_contradictions(samples, known)
        for config in results["configs"].values():
            config.pop("custom_dataset", None)  # how tracker reads a task's data
        results["config"] = {"model": "hf", "model_args": model.model_args, **model.config}
        results |= model.versions
        return self._save(model, results, samples, output)

    def _save(
        self, model: Evaluated, results: dict[str, Any], samples: dict[str, Any], output: Path
    ) -> list[Path]:
        """Write the files with lm-eval, and check them, because it ignores a full disk."""
        writer = EvaluationTracker(output_path=str(output))
        about = writer.general_config_tracker = _Timeless()
        about.log_experiment_args(
            model_source="hf",
            model_args=model.model_args,
            system_instruction=model.system_instruction,
            chat_template=self._chat_template,
            fewshot_as_multiturn=self._chat_template is not None and model.fewshot_as_multiturn,
        )
        about.model_name = model.name
        about.model_name_sanitized = name = folder_name(model.name)
        writer.save_results_aggregated(results=results, samples=samples)
        folder = output / name
        if not hasattr(writer, "date_id"):
            raise WorkError(f"{output}: lm-eval could not make the results of {model.name}")
        path = folder / f"results_{writer.date_id}.json"
        writer.date_id = _later(writer.date_id, folder)
        files = {folder / f"results_{writer.date_id}.json": 0}
        with suppress(OSError):  # it is looked for below
            path.rename(*files)
        for task, rows in samples.items():
            writer.save_results_samples(task_name=task, samples=rows)
            files[folder / f"samples_{task}_{writer.date_id}.jsonl"] = len(rows)
        for path, rows in files.items():
            try:
                lines = path.read_text(encoding="utf-8").split("\n")
                whole = len(lines) == rows + 1 if rows else bool(json.loads("\n".join(lines)))
            except (OSError, ValueError):
                whole = False
            if not whole:
                raise WorkError(f"{path} could not be written; is there room on the disk?")
        return list(files)


def _later(date: str, folder: Path) -> str:
    """Return the date for new files, or one after all existing files.

    Readers take the latest file, and the clock of an earlier writer may have been ahead.
    """
    names = {path.stem.removeprefix("results_") for path in folder.glob("results_*.json")}
    last = max(names - {date}, default="")
    if last > date:
        with suppress(ValueError):  # whole seconds, or not of lm-eval
            return (datetime.strptime(last, _DATE) + timedelta(seconds=1)).strftime(_DATE)
    return date


def folder_name(model: str) -> str:
    """Name a model's folder as lm-eval does; a name that no file system takes is cut."""
    name: str = sanitize_model_name(model)
    return name if len(name) <= _LONGEST else f"{name[:_LONGEST]}--{content_hash(name)[:12]}"


class _Asked:
    """A task of lm-eval whose requests are built already; all else is the task's own."""

    def __init__(self, task: ConfigurableTask, prompts: Sequence[Sequence[Any]]) -> None:
        self._task = task
        self._prompts = prompts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def build_all_requests(self, **settings: Any) -> None:
        """Set the requests of the wanted documents, which lm-eval counts from 0."""
        self._task._instances = [
            replace(one, metadata=(one.task_name, place, one.repeats), resps=[], filtered_resps={})
            for place, instances in enumerate(self._prompts)
            for one in instances
        ]


class _Answering(LM):  # type: ignore[misc]
    """A model of lm-eval's whose answers are known: (task, place among the wanted) → answers."""

    def __init__(self, known: Mapping[Place, Judged]) -> None:
        super().__init__()
        self._known = known

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return the log-likelihood and greedy flag of each continuation."""
        known = [(self._of(request), request.idx) for request in requests]
        return [(float(one.loglikelihoods[n]), bool(one.greedy[n])) for one, n in known]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return the log-likelihood of each text."""
        return [sum(map(float, self._of(request).loglikelihoods)) for request in requests]

    def generate_until(self, requests: Sequence[Any]) -> list[str | None]:
        """Return the generated texts."""
        return [self._of(request).text for request in requests]

    def _of(self, request: Instance) -> Judged:
        return self._known[request.task_name, request.doc_id]


class _Timeless(GeneralConfigTracker):  # type: ignore[misc]
    """lm-eval's notes on an evaluation, without a time: all models were measured together."""

    def log_end_time(self) -> None:
        """Leave the seconds out."""


def _refuse_contradictions(
    samples: Mapping[str, Sequence[Mapping[str, Any]]], known: Mapping[Place, Judged]
) -> None:
    """Raise CellError if lm-eval judges an answer differently from the ledger."""
    for task, rows in samples.items():
        for row in rows:
            kept = known[task, row["doc_id"]].metrics
            for metric in row["metrics"]:
                name = metric_name(metric, row["filter"])
                then, now = kept.get(name), plain(row[metric])
                if then is not None and not _same(then, now):
                    raise CellError(
                        f"document {row['doc_id']} of {task}: {name} was {then} when it was "
                        f"measured, and the installed lm-eval makes {now} of the same answers"
                    )


def _same(one: MetricValue, other: MetricValue) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return math.isclose(one, other, rel_tol=1e-9) or (math.isnan(one) and math.isnan(other))
