"""Split a benchmark into calibration and test documents, which are disjoint.

Calibration uses the training split of a task if it has one; else half of its documents.
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
    """Configure a task of lm-eval to score the requested part.

    Args:
        task: Task. If it has a training split, calibration scores that split.
        documents: Requested part.
        num_fewshot: Number of few-shot examples.

    Returns:
        The half of its documents that is scored; None if all are.

    Raises:
        BenchmarkError: It has too few documents for two halves, or its few-shot examples could
            include scored documents.
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
    # lm-eval excludes a document from its own examples only if both come from the same split.
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
    """Return the split of a task's few-shot examples, as lm-eval does; None if it lists them."""
    config, examples = task.config, task.fewshot_cfg
    split: str | None = examples.split
    if split is None and examples.samples is None:
        split = config.training_split or config.validation_split or config.test_split
    return split


def half_of(documents: Documents, task: str, total: int) -> Half:
    """Return the requested half of a task's documents; BenchmarkError for a single document."""
    assert documents.part is not None
    if total < 2:
        raise BenchmarkError(f"part: {task} has {total} document, which makes no two halves")
    return Half(part=documents.part, seed=documents.seed, of=total)


def said_part(documents: Documents, halves: Collection[Half | None]) -> dict[str, str]:
    """Return the part as a setting; empty if it equals what lm-eval scores anyway."""
    if documents.part is None or (documents.part == "test" and not any(halves)):
        return {}
    return {"part": documents.part}
