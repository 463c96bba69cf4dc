"""Calibration and test documents: two parts of a benchmark that never meet.

The training split is for calibration where a task has one; else a half of its documents is.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from tracker.core.config import Documents
from tracker.core.errors import BenchmarkError
from tracker.core.identities import Half

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask


def choose_part(task: ConfigurableTask, documents: Documents, num_fewshot: int) -> Half | None:
    """Make a task of lm-eval score the requested part.

    Args:
        task: The task; one with a training split is turned to it for calibration.
        documents: Which part.
        num_fewshot: How many examples stand before each document.

    Returns:
        The half of its documents that is meant; None where it is all of them.

    Raises:
        BenchmarkError: It has too few documents for two halves, or examples could be what is asked.
    """
    if documents.part is None:
        return None
    config, examples = task.config, task.fewshot_cfg
    training = config.training_split
    scored = config.test_split or config.validation_split
    if num_fewshot and documents.part == "calibration" and _examples_from(task) == scored:
        raise BenchmarkError(
            f"part: {task.task_name} draws few-shot examples from its split {scored!r}, which is "
            "scored, so that test documents would stand with their answers in the prompts of "
            "calibration documents; use num_fewshot 0, or a benchmark whose examples come from a "
            "split of their own"
        )
    if training == scored or training not in task.dataset:
        return half_of(documents, task.task_name, len(task.eval_docs))
    if documents.part == "test":
        return None
    config.test_split = training
    # lm-eval leaves a document out of its own examples where both are said to be of one split.
    if examples.split is None and examples.samples is None:
        examples.split = training
    if num_fewshot and examples.split == training and examples.process_docs != config.process_docs:
        raise BenchmarkError(
            f"part: {task.task_name} reads the documents of its split {training!r} otherwise when "
            "they are few-shot examples, so that a document could be its own example; use "
            "num_fewshot 0"
        )
    return None


def _examples_from(task: ConfigurableTask) -> str | None:
    """Name the split of a task's few-shot examples, as lm-eval does; None if it states them."""
    config, examples = task.config, task.fewshot_cfg
    split: str | None = examples.split
    if split is None and examples.samples is None:
        split = config.training_split or config.validation_split or config.test_split
    return split


def half_of(documents: Documents, task: str, total: int) -> Half:
    """Choose the half of a task's documents that is asked for; BenchmarkError for a single one."""
    assert documents.part is not None
    if total < 2:
        raise BenchmarkError(f"part: {task} has {total} document, which makes no two halves")
    return Half(part=documents.part, seed=documents.seed, of=total)


def said_part(documents: Documents, halves: Collection[Half | None]) -> dict[str, str]:
    """Return the part as a setting; nothing where it is all that lm-eval scores."""
    if documents.part is None or (documents.part == "test" and not any(halves)):
        return {}
    return {"part": documents.part}
