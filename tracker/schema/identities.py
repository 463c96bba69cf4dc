"""Define records that identify a model and a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tracker.schema.extent import DocumentPart, half_numbers
from tracker.schema.hub import check_name
from tracker.schema.text import replace_controls

_MAX_SETTING_LENGTH = 40
"""Maximum number of characters of a setting in a label."""


class Record(BaseModel):
    """Base class of records: immutable objects that refuse unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


HALF_PRECISION = ("bfloat16", "float16")
"""Names of half precision, as models state their dtype."""
SafeText = Annotated[str, AfterValidator(replace_controls)]
"""Text from a user that is shown to others, on a terminal, a page or in a tracker."""


class ModelIdentity(Record):
    """The model that was measured: its source, weights and dtype."""

    source: SafeText
    """The source as typed: a hub id, a folder, a GGUF file or `package:NAME`."""
    name: SafeText
    """A short readable name, such as `SmolLM2-135M-Instruct`."""
    revision: SafeText | None
    """The hub's commit, or None for files."""
    fingerprint: str
    """SHA-256 of the files, or the hub's commit; it identifies the weights and the tokenizer."""
    architecture: SafeText
    layers: int
    parameters: int
    dtype: str
    arguments: dict[str, SafeText] = {}
    """Loading arguments under lm-eval's names; the fingerprint depends on them."""

    @property
    def key(self) -> tuple[str, str, str]:
        """The name, fingerprint and dtype of the model."""
        return (self.name, self.fingerprint, self.dtype)

    @property
    def is_on_hub(self) -> bool:
        """True if the model was loaded from the Hugging Face hub."""
        try:
            check_name(self.source)
        except ValueError:
            return False
        return self.revision is not None

    @property
    def is_half(self) -> bool:
        """True if the dtype is half precision, so that rounding errors can change outcomes."""
        return self.dtype in HALF_PRECISION


class Half(Record):
    """One random half of the documents of a task: calibration or test."""

    part: DocumentPart
    seed: int
    of: int
    """Number of documents of both halves together."""

    def numbers(self, task: str) -> Sequence[int]:
        """Return the numbers of this half's documents in lm-eval's numbering, ascending."""
        return half_numbers(self.part, self.seed, task, self.of)


CHOICE_PROBABILITY = "choice_probability"
CHOICE_PROBABILITIES = (CHOICE_PROBABILITY, "choice_probability_norm")
"""Metrics that are derived from the log-likelihoods of answer options."""


def filtered_metric(metric: str, filter_name: str) -> str:
    """Return the name of a metric in stored outcomes.

    The name is `METRIC,FILTER`, or only `METRIC` if the metric has no filter.
    """
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def filter_name(metric: str) -> str:
    """Return lm-eval's filter (answer extraction) from a metric's name in stored outcomes.

    The result is `none` if the metric has no filter.
    """
    return metric.partition(",")[2] or "none"


CUT_OFF = "cut_off"
"""Metric of generated texts: share of a document's texts that the token limit ended."""


class TaskIdentity(Record):
    """One scored task: an lm-eval task (alone or in a group) or a text corpus."""

    name: str
    version: str
    split: str
    """The split whose documents are scored; `all` for a corpus file."""
    documents: int
    """Number of all documents of the split or its half, including unmeasured documents."""
    half: Half | None = Field(None, exclude_if=lambda half: half is None)
    """The half of the split that is scored; None = all of it."""
    fingerprint: str
    """SHA-256 of the task's configuration and documents, or of a corpus's texts."""
    metrics: dict[str, str]
    """Metric → its aggregation: `mean`, lm-eval's other names (`f1`, …), or `ratio` where every
    document has a pair [sum, units] and both are summed."""
    higher_is_better: dict[str, bool] = {}
    """Metric → True if higher is better, as in lm-eval; the default is True."""
    has_options: bool | None = Field(None, exclude_if=lambda has_options: has_options is None)
    """Whether documents have answer options; None if `metrics` imply it."""

    @property
    def offers_choices(self) -> bool:
        """True if documents have answer options."""
        if self.has_options is not None:
            return self.has_options
        # Tasks without options that report an accuracy have a perplexity too; corpora have ratios.
        is_accuracy = "mean" in (self.metrics.get("acc"), self.metrics.get("acc_norm"))
        return is_accuracy and "perplexity" not in self.metrics

    @property
    def all_metrics(self) -> dict[str, str]:
        """The aggregation (e.g. `mean`) of each metric, including derived choice probabilities."""
        names = [*CHOICE_PROBABILITIES] if self.offers_choices else []
        if "acc_norm" not in self.metrics:
            names = names[:1]
        return self.metrics | dict.fromkeys(names, "mean")

    @property
    def numbers(self) -> Sequence[int]:
        """The numbers of all documents of the task in lm-eval's numbering, ascending."""
        return range(self.documents) if self.half is None else self.half.numbers(self.name)


class BenchmarkIdentity(Record):
    """The benchmark that was measured: the documents, and the settings of the prompts."""

    name: SafeText
    tasks: tuple[TaskIdentity, ...]
    data: SafeText
    """Source of the documents: `hub`, a folder, `package:NAME`, or a corpus's file."""
    num_fewshot: int
    seed: int | None
    """Seed of few-shot examples and of halves; None if neither is drawn."""
    apply_chat_template: bool
    primary_metric: str
    """The metric that the benchmark's field reports."""
    weight_by_size: bool = True
    """True if a group's accuracy weights tasks by their documents, as in lm-eval."""
    settings: dict[str, SafeText] = {}
    """Other settings under lm-eval's names that change an outcome, as text or JSON."""
    found_by: dict[str, SafeText] = {}
    """Settings that locate the benchmark besides its name: the task's file, `include_path` and
    `metadata`. No outcome depends on them."""

    @property
    def is_shared(self) -> bool:
        """True if the documents are from the hub or a package, and not from the user."""
        return self.data == "hub" or self.data.startswith("package:")

    @property
    def documents(self) -> int:
        """The number of documents of all tasks, including documents that are not measured."""
        return sum(task.documents for task in self.tasks)

    @property
    def numbers(self) -> dict[str, Sequence[int]]:
        """The numbers of all documents of each task, in lm-eval's numbering, ascending."""
        return {task.name: task.numbers for task in self.tasks}

    def sample_size(self, documents: int) -> int:
        """Return the smallest sample size per task that gives `documents` documents in total.

        A task with fewer documents than the sample size contributes all its documents.
        """
        sizes = [task.documents for task in self.tasks]
        samples = range(1, max(sizes))
        large_samples = (n for n in samples if sum(min(n, size) for size in sizes) >= documents)
        return next(large_samples, max(sizes))

    @property
    def title(self) -> str:
        """The benchmark's display name with its measured part: `arc_easy (calibration half)`."""
        part = self.settings.get("part")
        if part is None:
            return self.name
        have_halves = {task.half is not None for task in self.tasks}
        if have_halves == {False}:  # the training splits
            return f"{self.name} ({', '.join(sorted({task.split for task in self.tasks}))})"
        return f"{self.name} ({part} {'half' if have_halves == {True} else 'part'})"

    @property
    def settings_text(self) -> str:
        """The prompt settings as `name=value` pairs in one line; long values are truncated."""
        limit = _MAX_SETTING_LENGTH
        texts = (v if len(v) <= limit else f"{v[:limit]}…" for v in self.settings.values())
        return ", ".join(map("{}={}".format, self.settings, texts))
