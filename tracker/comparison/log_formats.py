"""Read the files that lm-eval and lighteval write: a file for each task.

`lm_eval --log_samples` writes lines of JSON, `lighteval --save-details` writes Parquet files. The
files are data from others: nothing in them is executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from tracker.comparison.logged import ENDING_LENGTH, LogFormat, Report, Sample, explain_damage
from tracker.report.dataset import read_parquet

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
    """Read the results beside a file of samples; return an empty report if there are none."""
    path = min(samples.parent.glob(f"*_{date}.json"), default=None) if date else None
    if path is None:
        return Report()
    with explain_damage(path, "lm-eval"):
        return Report.model_validate(json.loads(path.read_bytes()))


def _read_samples(task: str, path: Path) -> Iterator[Sample]:
    """Read the answers to a task."""
    number = 0
    with path.open("rb") as file, explain_damage(lambda: f"{path}, line {number},", "lm-eval"):
        for number, line in enumerate(file, start=1):  # noqa: B007  the message needs it
            yield _parse_sample(task, line)


def _parse_sample(task: str, line: bytes) -> Sample:
    """Parse a line of samples."""
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
    """Load a line of samples; of the prompts of several options, only the first."""
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
