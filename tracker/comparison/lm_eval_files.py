"""Read the files that `lm_eval --log_samples --output_path` writes.

The files are data from others: nothing in them is executed. Files of samples are read line by line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tracker.comparison.logged import ENDING_LENGTH, LogFormat, Report, Sample, explain_damage

_ARGUMENTS, _SECOND_REQUEST, _RESPONSES = b'"arguments": {', b'"gen_args_1": {', b', "resps": '
_OPTION = re.compile(rb'"arg_1": ("(?:[^"\\]|\\.)*")')
_OPTIONS = "other_options"
"""Key of the options of all requests but the first, in place of these requests."""


def _read_report(samples: Path, date: str) -> Report:
    """Read the results beside a file of samples; return an empty report if there are none."""
    path = min(samples.parent.glob(f"*_{date}.json"), default=None) if date else None
    if path is None:
        return Report()
    with explain_damage(path, "lm-eval"):
        return Report.model_validate(json.loads(path.read_bytes()))


def _read_samples(task: str, path: Path) -> Iterator[Sample]:
    """Read the answers to a task."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            with explain_damage(f"{path}, line {number},", "lm-eval"):
                sample = _parse_sample(task, line)
            yield sample


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
        options = b", ".join(_OPTION.findall(line, second, end))
        with suppress(ValueError):
            return json.loads(
                b'%b"%b": [%b]}%b' % (line[:second], _OPTIONS.encode(), options, line[end:])
            )
    return json.loads(line)


LM_EVAL = LogFormat("lm-eval", _read_report, _read_samples)
