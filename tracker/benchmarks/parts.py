"""Split a benchmark into disjoint sets of calibration and test documents.

Calibration uses the training split of a task. For a task without a training split, calibration uses
half of the documents.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from tracker.schema.config import DocumentSpec
from tracker.schema.errors import BenchmarkError
from tracker.schema.identities import Half

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask


def choose_part(task: ConfigurableTask, documents: DocumentSpec, num_fewshot: int) -> Half | None:
    """Configure a task of lm-eval to score only its calibration or only its test documents.

    Args:
        task: Task to configure.
        documents: Selection of documents; its `part` is `calibration`, `test` or None (all
            documents).
        num_fewshot: Number of few-shot examples.

    Returns:
        The half that is scored; None if a whole split is scored.

    Raises:
        BenchmarkError: The task has too few documents for two halves, or its few-shot examples
            could include scored documents.
    """
    if documents.part is None:
        return None
    config, fewshot, training = task.config, task.fewshot_cfg, task.config.training_split
    scored = config.test_split or config.validation_split
    if num_fewshot and documents.part == "calibration" and _example_split(task) == scored:
        raise BenchmarkError(
            f"part: {task.task_name} scores the split {scored!r}, and also draws few-shot examples "
            "from it. Prompts could therefore show test documents with their answers. "
            "Use num_fewshot 0, or a benchmark with a separate split of examples"
        )
    if training == scored or training not in task.dataset:
        return requested_half(documents, task.task_name, len(task.eval_docs))
    if documents.part == "test":
        return None
    config.test_split = training
    # lm-eval excludes a document from its own examples only if both come from the same split.
    if fewshot.split is None and fewshot.samples is None:
        fewshot.split = training
    if num_fewshot and fewshot.split == training and fewshot.process_docs != config.process_docs:
        raise BenchmarkError(
            f"part: {task.task_name} preprocesses its split {training!r} differently for few-shot "
            "examples, so a document could be an example in its own prompt; use num_fewshot 0"
        )
    return None


def _example_split(task: ConfigurableTask) -> str | None:
    """Return the split with a task's few-shot examples; None if the task lists its examples."""
    config, fewshot = task.config, task.fewshot_cfg
    split: str | None = fewshot.split
    if split is None and fewshot.samples is None:
        split = config.training_split or config.validation_split or config.test_split
    return split


def requested_half(documents: DocumentSpec, task: str, total: int) -> Half:
    """Return the calibration half or the test half of a task's documents.

    Raises BenchmarkError if the task has fewer than two documents.
    """
    assert documents.part is not None
    if total < 2:
        raise BenchmarkError(f"part: {task} has {total} document, which is too few for two halves")
    return Half(part=documents.part, seed=documents.seed, of=total)


def part_setting(documents: DocumentSpec, halves: Collection[Half | None]) -> dict[str, str]:
    """Return the setting `part` as a dictionary; empty if lm-eval scores the part by default."""
    if documents.part is None or (documents.part == "test" and not any(halves)):
        return {}
    return {"part": documents.part}
