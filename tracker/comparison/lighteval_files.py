"""Read the details that `lighteval --save-details` writes: a Parquet file for each task."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from tracker.comparison.logged import ENDING_LENGTH, LogFormat, Report, Sample
from tracker.report.dataset import read_parquet

_COLUMNS = [
    *("doc.query", "doc.choices", "doc.gold_index", "metric"),
    *("model_response.input", "model_response.text", "model_response.logprobs"),
]
_TASK_SETTINGS = ("generation_size", "stop_sequence", "num_samples")
"""Settings of a task that change the generated texts."""


def _read_details_report(details: Path, date: str) -> Report:
    """Read the results of the model and date of a file of details; return an empty report if none.

    The file is `details/MODEL/DATE/details_TASK_DATE.parquet` beside
    `results/MODEL/results_DATE.json`.
    """
    for folder in details.parents:
        if folder.name == "details":
            model = details.parent.parent.relative_to(folder)
            path = folder.parent / "results" / model / f"results_{date}.json"
            if path.is_file():
                return _convert_results(json.loads(path.read_bytes()))
    return Report()


def _convert_results(content: Mapping[str, Any]) -> Report:
    """Convert lighteval's results to the form of lm-eval's."""
    model = content["config_general"]["model_config"]
    report: dict[str, dict[str, Any]] = {
        name: {} for name in ("results", "higher_is_better", "configs", "versions", "n-shot")
    }
    for name, config in content["config_tasks"].items():
        task = task_name(name)
        means = content["results"].get(name, {})
        report["results"][task] = {f"{metric},none": value for metric, value in means.items()}
        higher: dict[str, bool] = {}
        for metric in config["metrics"]:
            names, value = metric["metric_name"], metric["higher_is_better"]
            higher |= value if isinstance(value, dict) else {names: value}
        report["higher_is_better"][task] = higher
        kwargs = {key: config[key] for key in _TASK_SETTINGS} | model["generation_parameters"]
        report["configs"][task] = {"generation_kwargs": kwargs}
        report["versions"][task], report["n-shot"][task] = config["version"], config["num_fewshots"]
    return Report(
        model_name=content["config_general"]["model_name"],
        chat_template_sha=model.get("override_chat_template"),
        system_instruction_sha=model.get("system_prompt"),
        **report,
    )


def task_name(name: str) -> str:
    """Return the name of a task without its suite and its number of examples."""
    return re.sub(r"(\|\d+)+$", "", name).rpartition("|")[2]


def _read_details(task: str, path: Path) -> Iterator[Sample]:
    """Read the answers to a task."""
    for number, row in enumerate(read_parquet(path, _COLUMNS).to_pylist()):
        doc, response = row["doc"], row["model_response"]
        texts, choices, gold = response["text"], doc["choices"] or [], doc["gold_index"]
        answers = [choices[gold]] if isinstance(gold, int) and choices else []
        yield Sample(
            task=task,
            doc=number,
            key=_hash([doc["query"], doc["choices"], gold]),
            prompt=_hash(response["input"]) if response["input"] else "",
            question=doc["query"][-ENDING_LENGTH:],
            choices=choices if response["logprobs"] else [],
            gold=gold if isinstance(gold, int) else None,
            answer="".join(answers).strip(),
            scores=response["logprobs"] or None,
            text=texts[0] if texts else "",
            filter="none",
            metrics=row["metric"],
        )


def _hash(value: object) -> str:
    return sha256(json.dumps(value).encode()).hexdigest()


LIGHTEVAL = LogFormat("lighteval 0.13 or newer", _read_details_report, _read_details)
