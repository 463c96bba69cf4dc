"""Read the files that lm-eval, lighteval and every_eval_ever write for each task.

`lm_eval --log_samples` and every_eval_ever write lines of JSON. `lighteval --save-details` writes
Parquet files. This module never executes code from these files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tracker.comparison.logged import ENDING_LENGTH, LogFormat, Report, Sample, explain_damage
from tracker.report.dataset import read_parquet
from tracker.schema.errors import RequestError

_ARGUMENTS, _SECOND_REQUEST, _RESPONSES = b'"arguments": {', b'"gen_args_1": {', b', "resps": '
_OPTION = b'"arg_1": '
_OPTIONS = "other_options"
"""Key of the options of all requests but the first, in place of these requests."""
_COLUMNS = [
    *("doc.query", "doc.choices", "doc.gold_index", "metric"),
    *("model_response.input", "model_response.text", "model_response.logprobs"),
]
_TASK_SETTINGS = ("generation_size", "stop_sequence", "num_samples")
"""Settings of a task that change the generated texts."""


def _read_report(samples: Path, date: str) -> Report:
    """Read lm-eval's results file from the folder of a samples file.

    The report is empty if the folder has no results file of this date.
    """
    path = min(samples.parent.glob(f"*_{date}.json"), default=None) if date else None
    if path is None:
        return Report()
    with explain_damage(path, "lm-eval"):
        return Report.model_validate(json.loads(path.read_bytes()))


def _read_samples(task: str, path: Path) -> Iterator[Sample]:
    """Read the model's answers to a task from lm-eval's samples file."""
    number = 0
    with path.open("rb") as file, explain_damage(lambda: f"{path}, line {number},", "lm-eval"):
        for number, line in enumerate(file, start=1):  # noqa: B007  the message needs it
            yield _parse_sample(task, line)


def _parse_sample(task: str, line: bytes) -> Sample:
    """Parse one line of lm-eval's samples file."""
    sample = _load_line(line)
    responses, target = sample["filtered_resps"], sample["target"]
    question, scores, gold = "", None, None
    choices: list[str] = []
    with suppress(ValueError, TypeError):
        scores, gold = [float(score) for score, _ in responses], int(target)
        if "acc_mutual_info" in sample:  # the other half are scores without the question
            scores = scores[: len(scores) // 2]
    with suppress(TypeError, LookupError, AttributeError):
        options = sample["arguments"].pop(_OPTIONS, [])
        requests = [*sample["arguments"].values()]
        question = str(requests[0]["arg_0"])[-ENDING_LENGTH:].strip()
        choices = [*(str(request["arg_1"]) for request in requests), *options]
    return Sample(
        task=task,
        doc=int(sample["doc_id"]),
        key=sample["doc_hash"] + sample["target_hash"] if "doc_hash" in sample else "",
        prompt=sample.get("prompt_hash", ""),
        question=question,
        choices=choices,
        gold=gold,
        answer=str(target),
        scores=scores,
        text=str(responses[0]) if responses else "",
        filter=sample["filter"],
        metrics={name: sample[name] for name in sample["metrics"]},
    )


def _load_line(line: bytes) -> Any:
    """Parse one line of a samples file; skip the prompts that repeat that of the first option."""
    start, end = line.find(_ARGUMENTS), line.find(_RESPONSES)
    second = line.find(_SECOND_REQUEST, start, end)
    if 0 < start < second:  # prompts can be long, and take most of the time
        texts = line[second:end].split(_OPTION)[1:]
        # Cut at an escaped quote, an option is no JSON.
        options = b", ".join(text[: text.find(b'"}') + 1] for text in texts)
        with suppress(ValueError):
            return json.loads(
                b'%b"%b": [%b]}%b' % (line[:second], _OPTIONS.encode(), options, line[end:])
            )
    return json.loads(line)


LM_EVAL = LogFormat("lm-eval", _read_report, _read_samples)


def _read_details_report(details: Path, date: str) -> Report:
    """Read lighteval's results file that belongs to a details file.

    For the details file `details/MODEL/DATE/details_TASK_DATE.parquet`, the results file is
    `results/MODEL/results_DATE.json`. The report is empty if there is no results file.
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
    """Return a task's name without the suite and the number of few-shot examples."""
    return re.sub(r"(\|\d+)+$", "", name).rpartition("|")[2]


def _read_details(task: str, path: Path) -> Iterator[Sample]:
    """Read the model's answers to a task from lighteval's details file."""
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


EVERY_EVAL_EVER = "every_eval_ever 0.3"
SHARED_SUFFIX = "_samples"
"""End of the stem of a file of every_eval_ever's samples; its record lacks this end."""


class _SharedReport(Report):
    """Results of a model that were read from a record of every_eval_ever."""

    def settings(self, tasks: Sequence[str]) -> dict[str, str]:
        """Return a dict with the number of few-shot examples; empty if unknown."""
        (config,) = map(self.configs.__getitem__, tasks)
        return {key: config[key] for key in ("num_fewshot",) if key in config}


@dataclass(frozen=True)
class SharedRecord:
    """Record of every_eval_ever: the results of one model on one task.

    Attributes:
        task: Name of the task.
        date: Time of the record in seconds, followed by the name of the task.
        report: Results of the model.
        metrics: Identifier of each result → (name of the metric, name of the filter).
    """

    task: str
    date: str
    report: Report
    metrics: Mapping[str, tuple[str, str]]

    @classmethod
    def read(cls, samples: Path) -> SharedRecord:
        """Read the record (`ID.json`) of a samples file (`ID_samples.jsonl`).

        Results with a parameter `change`, which belong to ablated models, are left out.
        """
        path = samples.with_name(f"{samples.stem.removesuffix(SHARED_SUFFIX)}.json")
        if not path.is_file():
            raise RequestError(f"{samples} needs {path.name}; copy it into the same folder")
        with explain_damage(path, EVERY_EVAL_EVER):
            return cls._convert(json.loads(path.read_bytes()))

    @classmethod
    def _convert(cls, content: Mapping[str, Any]) -> SharedRecord:
        """Build the record from the content of its JSON file."""
        entries = [
            entry
            for entry in content["evaluation_results"]
            if "change" not in (entry["metric_config"].get("metric_parameters") or {})
        ]
        task = str(entries[0]["source_data"]["dataset_name"])
        metrics, values, better = {}, {}, {}
        for entry in entries:
            metric = entry["metric_config"]
            name = metric.get("metric_name") or metric["metric_id"]
            part = entry["evaluation_name"].removeprefix(task).strip("/") or "none"
            metrics[_result_key(entry)] = name, part
            values[f"{name},{part}"] = entry["score_details"]["score"]
            lower = metric.get("lower_is_better")
            better[name] = None if lower is None else not lower
        config = entries[0].get("generation_config") or {}
        report = _SharedReport(
            model_name=content["model_info"]["id"],
            results={task: values},
            higher_is_better={task: better},
            configs={task: config.get("additional_details") or {}},
        )
        return cls(task, f"{content['retrieved_timestamp']} {task}", report, metrics)

    @property
    def format(self) -> LogFormat:
        """Functions that return the results of this record, and read its samples file."""
        return LogFormat(EVERY_EVAL_EVER, lambda path, date: self.report, self._read_samples)

    def _read_samples(self, task: str, path: Path) -> Iterator[Sample]:
        """Read the model's answers to a task from the samples file.

        The samples file has one line for each document, metric and filter.
        """
        numbers, latest = dict[str, int](), dict[tuple[str, str], Sample]()
        samples = list[Sample]()
        for line in path.read_bytes().splitlines():
            row = json.loads(line)
            if (key := _result_key(row)) in self.metrics:
                (name, part), doc = self.metrics[key], row["sample_id"]
                # A metric that a document has already begins a sample, which is then refused.
                if (doc, part) not in latest or name in latest[doc, part].metrics:
                    number = numbers.setdefault(doc, len(numbers))
                    samples.append(_parse_shared_sample(task, part, row, number))
                    latest[doc, part] = samples[-1]
                latest[doc, part].metrics[name] = row["evaluation"]["score"]
        yield from samples


def _result_key(entry: Mapping[str, Any]) -> str:
    """Return the identifier that a sample shares with its result in the record."""
    return str(entry.get("evaluation_result_id") or entry["evaluation_name"])


def _parse_shared_sample(task: str, part: str, row: Mapping[str, Any], number: int) -> Sample:
    """Convert a line of a samples file of every_eval_ever to a sample without metrics.

    `row` is the parsed line, and `part` is the name of the filter. `number` is the document's
    number for lines without a number.
    """
    text, hashes = row["input"], row.get("metadata") or {}
    choices, answer = text.get("choices") or [], "".join(text["reference"][:1])
    subtask, _, doc = row["sample_id"].rpartition(":")
    hash_names = ("doc_hash", "target_hash")
    return Sample(
        task=subtask or task,
        doc=int(doc) if doc.isdecimal() else number,
        key="".join(hashes.get(name, "") for name in hash_names) or row.get("sample_hash") or "",
        prompt=hashes.get("prompt_hash", ""),
        question=text["raw"][-ENDING_LENGTH:].strip(),
        choices=choices,
        gold=choices.index(answer) if answer in choices else None,
        answer=answer,
        scores=None,
        text="".join((row.get("output") or {}).get("raw", [])[:1]),
        filter=part,
        metrics={},
    )
