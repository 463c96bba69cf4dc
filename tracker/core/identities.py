"""Define what identifies a model and a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tracker.core.extent import Part, half
from tracker.core.text import harmless

_CUT = 40
"""Maximum number of characters of a setting in a label."""


class Record(BaseModel):
    """A frozen value object that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


HALF = ("bfloat16", "float16")
"""Names of half precision, as models state their dtype."""
Shown = Annotated[str, AfterValidator(harmless)]
"""Text from a user that is shown to others, on a terminal, a page or in a tracker."""


class ModelIdentity(Record):
    """Identity of the measured weights."""

    source: Shown
    """The source as typed: a hub id, a folder, a GGUF file or `package:NAME`."""
    name: Shown
    """A short readable name, e.g. `SmolLM2-135M-Instruct`."""
    revision: Shown | None
    """The hub's commit, or None for files."""
    fingerprint: str
    """SHA-256 of the files, or the hub's commit, which fixes the weights and the tokenizer."""
    architecture: Shown
    layers: int
    parameters: int
    dtype: str
    arguments: dict[str, Shown] = {}
    """Loading arguments under lm-eval's names; the fingerprint covers them."""

    @property
    def key(self) -> tuple[str, str, str]:
        """The key that distinguishes models for display: name, fingerprint and dtype."""
        return (self.name, self.fingerprint, self.dtype)

    @property
    def is_half(self) -> bool:
        """True if it computes in half precision, where rounding decides some documents."""
        return self.dtype in HALF


class Half(Record):
    """One of two halves into which a task's documents were drawn at random."""

    part: Part
    seed: int
    of: int
    """Number of documents of both halves together."""

    def numbers(self, task: str) -> Sequence[int]:
        """Return the half's document numbers in the task, ascending, as lm-eval counts them."""
        return half(self.part, self.seed, task, self.of)


class TaskIdentity(Record):
    """One lm-eval task, alone or as part of a group, or one corpus."""

    name: str
    version: str
    split: str
    """The split whose documents are scored; `all` for a corpus file."""
    documents: int
    """Number of documents of the split or its half, measured or not."""
    half: Half | None = Field(None, exclude_if=lambda half: half is None)
    """The half of the split that is scored; None = all of it."""
    fingerprint: str
    """SHA-256 of the task's configuration and of its documents; of a corpus's texts."""
    metrics: dict[str, str]
    """Metric → its aggregation: `mean`, lm-eval's other names (`f1`, …), or `ratio` where every
    document has a pair [sum, units] and both are summed."""
    higher_is_better: dict[str, bool] = {}
    """Metric → True if higher is better, as in lm-eval; the default is True."""

    @property
    def numbers(self) -> Sequence[int]:
        """The numbers of all documents, ascending, as lm-eval counts them."""
        return range(self.documents) if self.half is None else self.half.numbers(self.name)


class BenchmarkIdentity(Record):
    """Identity of the scored documents and of their prompts."""

    name: Shown
    tasks: tuple[TaskIdentity, ...]
    data: Shown
    """Source of the documents: `hub`, a folder, `package:NAME`, or a corpus's file."""
    num_fewshot: int
    seed: int | None
    """Seed of few-shot examples and of halves; None if neither is drawn."""
    apply_chat_template: bool
    primary_metric: str
    """The metric that the benchmark's field reports."""
    weight_by_size: bool = True
    """True if a group's accuracy weights tasks by their documents, as in lm-eval."""
    settings: dict[str, Shown] = {}
    """Other settings under lm-eval's names that change an outcome, as text or JSON."""
    found_by: dict[str, Shown] = {}
    """Settings that locate the benchmark besides its name: the task's file, `include_path` and
    `metadata`. No outcome depends on them."""

    @property
    def documents(self) -> int:
        """The number of documents of all tasks, measured or not."""
        return sum(task.documents for task in self.tasks)

    def sample_of(self, documents: int) -> int:
        """Return the smallest `sample` per task that draws this number of documents, or all."""
        sizes = [task.documents for task in self.tasks]
        samples = range(1, max(sizes))
        enough = (n for n in samples if sum(min(n, size) for size in sizes) >= documents)
        return next(enough, max(sizes))

    @property
    def title(self) -> str:
        """The name for display, with the part: `arc_easy (calibration half)`."""
        part = self.settings.get("part")
        if part is None:
            return self.name
        halves = {task.half is not None for task in self.tasks}
        if halves == {False}:  # the training splits
            return f"{self.name} ({', '.join(sorted({task.split for task in self.tasks}))})"
        return f"{self.name} ({part} {'half' if halves == {True} else 'part'})"

    @property
    def said(self) -> str:
        """The settings in one line, with long values cut; empty if there are none."""
        cut = {n: v if len(v) <= _CUT else f"{v[:_CUT]}…" for n, v in self.settings.items()}
        return ", ".join(f"{name}={value}" for name, value in cut.items())
