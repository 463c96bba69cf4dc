"""A generation task of one's own, and what a changed model makes of a text, read plainly."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.helpers.lm_eval import write_rows
from tests.helpers.truth import model_logits

PATTERNS = {"last-letter": "([a-z])", "number": "#### ([0-9]+)"}
"""Filter → pattern whose last match is the answer; the second matches no text of these models."""
METRICS = ("answer_kept", "answer_kept_right", "answer_kept_wrong", "answer_probability")


def write_task(
    folder: Path,
    questions: Sequence[str],
    targets: Sequence[str],
    patterns: dict[str, str] = PATTERNS,
    ignored: Sequence[str] = (),
    **settings: Any,
) -> Path:
    """Write the task `letters` and its rows; returns the folder.

    Answers are compared without what the patterns in `ignored` match.
    """
    rows = [{"question": q, "answer": a} for q, a in zip(questions, targets, strict=True)]
    file = write_rows(folder, letters=rows) / "letters.jsonl"
    regex = {"function": "regex", "group_select": -1}
    task = {
        "task": "letters",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": 12, **settings},
        "filter_list": [
            {"name": name, "filter": [regex | {"regex_pattern": p}, {"function": "take_first"}]}
            for name, p in patterns.items()
        ],
        "metric_list": [{"metric": "exact_match", "regexes_to_ignore": [*ignored]}],
    }
    (folder / "letters.yaml").write_text(yaml.safe_dump(task))
    return folder


def write_paired_tasks(folder: Path) -> Path:
    """Write `letters`, `sampled` and `options` over the same rows; returns the folder.

    `sampled` writes two random texts, and `options` has two options. A random model is right in
    about half of the documents of each task.
    """
    first_words, last_words = ["blood", "water", "heat", "light"], ["planets", "animals", "metals"]
    questions = [f"Which {last} need {first}?" for first in first_words for last in last_words]
    write_task(folder, questions, "abcdefghijkl", {"last-letter": "([a-z])"}, ["[a-m]"])
    task = yaml.safe_load((folder / "letters.yaml").read_text())
    sampling = {"do_sample": True, "temperature": 1.0, **task["generation_kwargs"]}
    sampled = task | {"task": "sampled", "repeats": 2, "generation_kwargs": sampling}
    (folder / "sampled.yaml").write_text(yaml.safe_dump(sampled))
    task = {name: task[name] for name in ("dataset_path", "dataset_kwargs", "test_split")}
    task |= {"task": "options", "output_type": "multiple_choice", "doc_to_text": "{{question}}"}
    task |= {
        "doc_to_choice": ["the first", "no other"],
        "doc_to_target": "{{1 if answer in 'abdfgk' else 0}}",
    }
    task |= {"metric_list": [{"metric": "acc"}]}
    (folder / "options.yaml").write_text(yaml.safe_dump(task))
    return folder


def read_plainly(
    model: Any, tokenizer: Any, prompt: str, text: str, target: str, pattern: str
) -> dict[str, float]:
    """Read a text in one pass of a model; the answer's tokens are those of its characters."""
    encoding = tokenizer(prompt + text, return_offsets_mapping=True)
    n_prompt = len(tokenizer(prompt).input_ids)
    ids, offsets = (encoding[name][n_prompt:] for name in ("input_ids", "offset_mapping"))
    logprobs = model_logits(model, encoding["input_ids"])[n_prompt - 1 : -1].log_softmax(-1)
    is_top = (logprobs.argmax(-1) == torch.tensor(ids)).tolist()
    values = logprobs.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
    figures: tuple[Any, ...] = (0, 0, 0, 0)
    for match in re.finditer(pattern, text):  # the last one counts
        start, stop = (len(prompt) + position for position in match.span(1))
        answer = [n for n, (a, b) in enumerate(offsets) if a < stop and b > start]
        is_kept, is_right = all(is_top[n] for n in answer), match[1] == target
        probability = torch.tensor([values[n] for n in answer]).double().sum().exp()
        figures = (is_kept, is_kept and is_right, is_kept and not is_right, probability)
    return {
        **dict(zip(METRICS, map(float, figures), strict=True)),
        "tokens_kept": sum(is_top) / len(ids),
        "prefix_kept": [*is_top, False].index(False) / len(ids),
        "trace_loss": -sum(values) / len(ids),
    }
