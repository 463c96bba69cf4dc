"""Write results in the format of every_eval_ever, a shared collection of evaluations.

In this format, a record names one model: the intact model. The accuracy drops of ablated models are
therefore a separate metric of the intact model.

References:
    eval.schema.json and instance_level_eval.schema.json of every_eval_ever 0.3.0 (PyPI).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np

from tracker.analysis.decisions import Decisions, ModelDecisions
from tracker.ledger.files import write_atomically, write_text
from tracker.schema.answers import interval_name
from tracker.schema.changes import INTACT
from tracker.schema.distribution import __version__
from tracker.schema.documents import DocumentText
from tracker.schema.errors import RequestError
from tracker.schema.estimates import Estimate
from tracker.schema.formats import is_finite, metric_format
from tracker.schema.identities import ModelIdentity
from tracker.schema.provenance import content_hash
from tracker.schema.records import CellRecord, RunRecord
from tracker.stats.arrays import Array

Decide = Callable[[CellRecord], Decisions | None]
"""Function that reads a record's outcomes of documents; None if they are not stored."""
SCHEMA_VERSION = "0.3.0"
Json = dict[str, Any]
_SOURCE = {"source_name": "layer-tracker", "source_type": "evaluation_run"}
_SOURCE |= {"source_organization_name": "unknown", "evaluator_relationship": "other"}
_PAIRED_METHOD = (
    "interval for differences paired by document: the Bonett-Price interval if all outcomes are 0 "
    "or 1, otherwise a t interval"
)


def write_evaluations(
    cells: Sequence[CellRecord], path: Path, decide: Decide, with_private: bool = False
) -> list[Path]:
    """Write one record per model and benchmark, and a file with the documents' outcomes.

    Args:
        cells: Results of each model and benchmark.
        path: Folder in which `data/BENCHMARK/OWNER/MODEL/` is created.
        decide: Function that reads the outcomes of the documents of a benchmark.
        with_private: Whether to write the texts of documents that are not from the hub or a
            package.

    Returns:
        The paths of the files.

    Raises:
        RequestError: The accuracy or loss of the intact model is undefined on every benchmark.
    """
    evaluations = [_Evaluation(cell) for cell in cells if is_finite(cell.baseline.value)]
    if not evaluations:
        raise RequestError(
            "the accuracy or loss of the intact model is undefined on every benchmark"
        )
    paths = []
    for evaluation in evaluations:
        content, file = evaluation.as_json(), path / "data" / f"{evaluation.id}.json"
        if decisions := decide(evaluation.cell):
            samples = file.with_name(f"{file.stem}_samples.jsonl")
            write_atomically(samples, partial(evaluation.write_samples, decisions, with_private))
            details = {"format": "jsonl", "file_path": samples.relative_to(path).as_posix()}
            content["detailed_evaluation_results"] = details
            paths.append(samples)
        write_text(file, f"{json.dumps(content, indent=2, allow_nan=False)}\n")
        paths.append(file)
    return paths


@dataclass(frozen=True)
class _Evaluation:
    """The results of one model on one benchmark, as a record of every_eval_ever."""

    cell: CellRecord

    @property
    def name(self) -> str:
        """The name of the benchmark."""
        return self.cell.benchmark.name

    @property
    def id(self) -> str:
        """The identifier `BENCHMARK/OWNER/MODEL/UUID`; the same in every report."""
        unique = UUID(content_hash([*self.cell.record_key, self.cell.apart])[:32], version=4)
        return f"{_path_part(self.name)}/{model_id(self.cell.model)}/{unique}"

    @property
    def runs(self) -> list[RunRecord]:
        """The runs whose accuracy drop (or loss increase) is defined."""
        return [run for run in self.cell.runs if is_finite(run.drop.value)]

    def as_json(self) -> Json:
        """Return the record as a dictionary that can be stored as JSON."""
        cell, model = self.cell, self.cell.model
        is_open = model.is_on_hub or model.source.startswith("package:")
        availability = "open_weights" if is_open else "unknown"
        details = {"fingerprint": model.fingerprint, "dtype": model.dtype, **model.arguments}
        details |= {"deployment_type": "self_deployed", "model_availability": availability}
        library = {"name": "layer-tracker", "version": __version__}
        info: Json = {"name": model.name, "id": model_id(model), "additional_details": details}
        record = {
            "schema_version": SCHEMA_VERSION,
            "evaluation_id": self.id,
            "retrieved_timestamp": f"{time.time():.0f}",
            "source_metadata": _SOURCE,
            "model_info": info,
            "eval_library": {**library, "additional_details": dict(cell.provenance)},
            "evaluation_results": [self._intact_result(), *map(self._drop_result, self.runs)],
        }
        return record | ({"evaluation_timestamp": cell.measured} if cell.measured else {})

    def _intact_result(self) -> Json:
        cell = self.cell
        metric: Json = {"metric_id": "accuracy" if cell.metric == "acc" else cell.metric}
        metric |= {"metric_name": cell.metric, "lower_is_better": not cell.higher_is_better}
        details = _score_details(cell.baseline, cell.n, 0.95, interval_name(cell), "Wilson or t")
        return self._build_entry(self.name, INTACT.name, metric | self._bounds(0), details)

    def _drop_result(self, run: RunRecord) -> Json:
        cell, change = self.cell, metric_format(self.cell).change
        metric: Json = {"metric_id": change.replace(" ", "_"), "metric_name": change}
        parameters = {"change": run.ablation, "metric": cell.metric}
        metric |= {"metric_parameters": parameters, "lower_is_better": True, **self._bounds(-1)}
        level = cell.answer.level if cell.answer and cell.is_raced else 0.95
        details = _score_details(run.drop, run.n, level, interval_name(cell), _PAIRED_METHOD)
        figures = {"changed": run.accuracy, "mcnemar_p": run.drop.p_value}
        details["details"] = {name: repr(x) for name, x in figures.items() if is_finite(x)}
        return self._build_entry(self.drop_name(run), run.ablation, metric, details)

    def drop_name(self, run: RunRecord) -> str:
        """Return the name of a run's drop, such as `piqa/accuracy drop by layer:3`."""
        return f"{self.name}/{metric_format(self.cell).change} by {run.ablation}"

    def _bounds(self, lowest: int) -> Json:
        """Return JSON fields with the smallest and the largest possible score.

        Fractions, such as accuracies, range from `lowest` to 1. Other metrics have no limits.
        """
        is_fraction = metric_format(self.cell).unit == "pp" and self.cell.baseline.side(1) <= 0
        low, high = (lowest, 1) if is_fraction else ("-Infinity", "Infinity")
        return {"score_type": "continuous", "min_score": low, "max_score": high}

    def _build_entry(self, name: str, key: str, metric: Json, score: Json) -> Json:
        """Build the JSON entry for one score, such as an accuracy or an accuracy drop.

        `name` is the displayed name of the entry, and `key` is its identifier. `metric` describes
        the metric, and `score` contains the value and its interval.
        """
        benchmark = self.cell.benchmark
        data = {"data": benchmark.data if benchmark.is_shared else "own"}
        data |= {"documents": self.cell.documents_text}
        source: Json = {"dataset_name": self.name, "source_type": "other"}
        source |= {"additional_details": data}
        settings = {"num_fewshot": str(benchmark.num_fewshot), **benchmark.settings}
        result = {"evaluation_result_id": key, "evaluation_name": name, "source_data": source}
        result |= {"metric_config": metric, "score_details": score}
        return result | {"generation_config": {"additional_details": settings}}

    def write_samples(self, decisions: Decisions, with_private: bool, path: Path) -> None:
        """Write one line of JSON for each document and model (intact or ablated)."""
        answers, intact = dict(decisions.runs), decisions.baseline
        sign = 1.0 if self.cell.higher_is_better else -1.0
        groups = [(INTACT.name, self.name, intact, sign * intact.score)]
        for run in self.runs:
            if changed := answers.get(run.change):
                drops = intact.score - changed.score
                groups.append((run.ablation, self.drop_name(run), changed, drops))
        with path.open("w", encoding="utf-8") as file:
            for key, name, model, scores in groups:
                rows = _outcome_rows(model, scores, decisions, with_private, key == INTACT.name)
                ids = {"schema_version": SCHEMA_VERSION, "model_id": model_id(self.cell.model)}
                ids |= {"evaluation_id": self.id, "evaluation_name": name}
                ids |= {"evaluation_result_id": key}
                file.writelines(f"{json.dumps(ids | row, allow_nan=False)}\n" for row in rows)


def _score_details(score: Estimate, n: int, level: float, interval: str, method: str) -> Json:
    """Build the JSON fields for a score and its confidence interval.

    `n` is the number of documents, and `level` is the confidence level, such as 0.95. `interval`
    and `method` describe the interval, such as `95 % interval` and `Wilson or t`.
    """
    uncertainty: Json = {"num_samples": n}
    if score.bounds:
        ends = {"lower": score.low, "upper": score.high, "confidence_level": level}
        uncertainty["confidence_interval"] = {**ends, "method": f"{interval}; {method}"}
    return {"score": score.value, "uncertainty": uncertainty}


def _outcome_rows(
    answers: ModelDecisions,
    scores: Array,
    decisions: Decisions,
    with_private: bool,
    is_intact: bool,
) -> Iterator[Json]:
    """Yield a model's outcome on each document, in the form of every_eval_ever.

    `scores` has one score per document; documents without a finite score are skipped. Only outcomes
    of the intact model contain the question and the answer options. Private texts are included if
    `with_private` is true.
    """
    right = answers.score > 0 if decisions.binary else answers.choice == decisions.gold
    for index in np.flatnonzero(np.isfinite(scores)).tolist():
        task, doc = decisions.documents[index]
        stored, generated = decisions.texts[index], answers.text[index]
        is_shown = stored is not None and (with_private or stored.public)
        text = stored.text if stored is not None and is_shown else DocumentText("")
        gold, choice = decisions.gold[index], answers.choice[index]
        output = [generated] if is_shown and isinstance(generated, str) else _option(text, choice)
        document: Json = {"raw": "", "reference": []}
        if is_intact:
            reference = _option(text, gold) or ([text.answer] if text.answer else [])
            document = {"raw": text.question, "reference": reference, "choices": [*text.choices]}
        row = {"sample_id": f"{task}:{doc}", "interaction_type": "single_turn", "input": document}
        row |= {"output": {"raw": output}, "answer_attribution": []}
        row["evaluation"] = {"score": float(scores[index]), "is_correct": bool(right[index])}
        yield row | ({} if np.isnan(choice) else {"metadata": {"choice": f"{choice:.0f}"}})


def _option(text: DocumentText, choice: float) -> list[str]:
    """Return a list with the text of the answer option `choice`.

    The list is empty if `choice` is NaN, or if `text` contains no answer options.
    """
    return [] if np.isnan(choice) else [*text.choices[int(choice) : int(choice) + 1]]


def model_id(model: ModelIdentity) -> str:
    """Return a model's id on the Hugging Face hub, or `local/NAME` for other models.

    A model with an adapter has an id of the form `local/NAME`. Both parts of an id are valid names
    of folders.
    """
    is_plain = model.is_on_hub and "peft" not in model.arguments
    name = Path(model.arguments.get("peft", model.name)).name
    owner, _, name = model.source.rpartition("/") if is_plain else ("local", "", name)
    return f"{_path_part(owner or 'local')}/{_path_part(name)}"


def _path_part(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:80].strip(".-") or "unnamed"
