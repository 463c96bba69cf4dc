"""Which model, and which benchmark: what an outcome depends on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tracker.core.extent import Part, half
from tracker.core.text import harmless

_CUT = 40
"""Characters of a setting that a label shows."""


class Record(BaseModel):
    """A frozen value object that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


HALF = ("bfloat16", "float16")
"""Names of half precision, as models state their dtype."""
Shown = Annotated[str, AfterValidator(harmless)]
"""What somebody chose and others read: on a terminal, on a page, in a tracker."""


class ModelIdentity(Record):
    """Which weights were measured."""

    source: Shown
    """What the user typed: a hub id, a folder, a GGUF file or `package:NAME`."""
    name: Shown
    """A short readable name, e.g. `SmolLM2-135M-Instruct`."""
    revision: Shown | None
    """The hub's commit, or None for files."""
    fingerprint: str
    """SHA-256 of the files, or the hub's commit: what decides the weights and the tokenizer."""
    architecture: Shown
    layers: int
    parameters: int
    dtype: str
    arguments: dict[str, Shown] = {}
    """How it was loaded, in lm-eval's words; the fingerprint covers it."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells models apart where people read: name, fingerprint and dtype."""
        return (self.name, self.fingerprint, self.dtype)

    @property
    def is_half(self) -> bool:
        """Whether it computes in half precision, where rounding decides some documents."""
        return self.dtype in HALF


class Half(Record):
    """One of two halves into which a task's documents were drawn at random."""

    part: Part
    seed: int
    of: int
    """How many documents both have together."""

    def numbers(self, task: str) -> Sequence[int]:
        """Which documents of the task these are, ascending, as lm-eval counts them."""
        return half(self.part, self.seed, task, self.of)


class TaskIdentity(Record):
    """One lm-eval task, alone or as part of a group, or one corpus."""

    name: str
    version: str
    split: str
    """The split whose documents are scored; `all` for a corpus file."""
    documents: int
    """How many documents there are, of the split or its half (not how many were measured)."""
    half: Half | None = Field(None, exclude_if=lambda half: half is None)
    """Which half of the split is scored; None = all of it."""
    fingerprint: str
    """SHA-256 of the task's configuration and of its documents; of a corpus's texts."""
    metrics: dict[str, str]
    """Every metric of the task, and how it is aggregated: `mean`, lm-eval's other names (`f1`, …),
    or `ratio` where every document brings a pair [sum, units] and both are summed."""
    higher_is_better: dict[str, bool] = {}
    """Which way each metric is better, as lm-eval says; higher where nothing is said."""

    @property
    def numbers(self) -> Sequence[int]:
        """The documents that there are, ascending, as lm-eval counts them."""
        return range(self.documents) if self.half is None else self.half.numbers(self.name)


class BenchmarkIdentity(Record):
    """Which documents were scored, and how they were put to the model."""

    name: Shown
    tasks: tuple[TaskIdentity, ...]
    data: Shown
    """Where the documents came from: `hub`, a folder, `package:NAME`, or a corpus's file."""
    num_fewshot: int
    seed: int | None
    """Of few-shot examples and of halves; None when neither is drawn."""
    apply_chat_template: bool
    primary_metric: str
    """The metric that the benchmark's field reports."""
    weight_by_size: bool = True
    """For a group: whether its accuracy weighs tasks by their documents, as lm-eval does."""
    settings: dict[str, Shown] = {}
    """What else was said under lm-eval's names and changes an outcome, as text or JSON."""
    found_by: dict[str, Shown] = {}
    """What it takes to find the benchmark again, where its name alone does not: the task's file,
    `include_path` and `metadata`. No outcome depends on it."""

    @property
    def documents(self) -> int:
        """Count the documents that there are, of all tasks."""
        return sum(task.documents for task in self.tasks)

    def sample_of(self, documents: int) -> int:
        """Return the `sample`, which counts for each task, that draws so many documents or all."""
        sizes = [task.documents for task in self.tasks]
        samples = range(1, max(sizes))
        enough = (n for n in samples if sum(min(n, size) for size in sizes) >= documents)
        return next(enough, max(sizes))

    @property
    def title(self) -> str:
        """The name where people read it, with the part: `arc_easy (calibration half)`."""
        part = self.settings.get("part")
        if part is None:
            return self.name
        halves = {task.half is not None for task in self.tasks}
        if halves == {False}:  # the training splits
            return f"{self.name} ({', '.join(sorted({task.split for task in self.tasks}))})"
        return f"{self.name} ({part} {'half' if halves == {True} else 'part'})"

    @property
    def said(self) -> str:
        """The settings in one line, long ones cut; empty without any."""
        cut = {n: v if len(v) <= _CUT else f"{v[:_CUT]}…" for n, v in self.settings.items()}
        return ", ".join(f"{name}={value}" for name, value in cut.items())
