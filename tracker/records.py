"""The frozen records that every part of tracker exchanges.

Fractions, never percentage points; `layer` is 0-based. A value that is not defined is `None`, and
the record's `reasons` says why under the name of the field.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

BASELINE = "baseline"


class Record(BaseModel):
    """A frozen value object that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelIdentity(Record):
    """Which weights were measured."""

    source: str
    """What the user typed: a hub id, a folder, a GGUF file or `package:NAME`."""
    name: str
    """A short readable name, e.g. `SmolLM2-135M-Instruct`."""
    revision: str | None
    """The hub's commit, or None for files."""
    fingerprint: str
    """SHA-256 of the files, or the hub's commit: what decides the weights and the tokenizer."""
    architecture: str
    layers: int
    parameters: int
    dtype: str


class TaskIdentity(Record):
    """One lm-eval task, alone or as part of a group, or one corpus."""

    name: str
    version: str
    split: str
    """The split whose documents are scored; `all` for a corpus file."""
    documents: int
    """How many documents the split holds (not how many were measured)."""
    fingerprint: str
    """SHA-256 of the task's configuration and of its documents; of a corpus's texts."""
    metrics: dict[str, str]
    """Every metric of the task, and how it is aggregated: `mean`, lm-eval's other names (`f1`, …),
    or `ratio` where every document brings a pair [sum, units] and both are summed."""
    higher_is_better: dict[str, bool] = {}
    """Which way each metric is better, as lm-eval says; higher where nothing is said."""


class BenchmarkIdentity(Record):
    """Which documents were scored, and how they were put to the model."""

    name: str
    tasks: tuple[TaskIdentity, ...]
    data: str
    """Where the documents came from: `hub`, a folder, `package:NAME`, or a corpus's file."""
    num_fewshot: int
    seed: int | None
    """The few-shot seed; None when no few-shot example is drawn."""
    apply_chat_template: bool
    primary_metric: str
    """The metric that the benchmark's field reports."""
    weight_by_size: bool = True
    """For a group: whether its accuracy weighs tasks by their documents, as lm-eval does."""


class LayerRecord(Record):
    """One run: what the removal of one layer did to the model on one benchmark."""

    ablation: str
    """The ablation's name, e.g. `layer:3`."""
    layer: int
    n: int
    """Documents that the figures rest on."""
    accuracy: float | None
    """The cell's metric with the layer removed."""
    accuracy_drop: float | None
    """Baseline minus ablated, or ablated minus baseline where lower is better; positive = the
    layer mattered."""
    accuracy_drop_low: float | None
    accuracy_drop_high: float | None
    """Both ends of the 95 % interval of `accuracy_drop`."""
    mcnemar_p: float | None
    """Exact McNemar p-value of the paired outcomes."""
    accuracy_relevance: float | None
    """Share of the accuracy above chance that is lost; None where lower is better."""
    cosine_similarity: float | None
    cosine_score: float | None
    angular_distance: float | None
    relative_update: float | None
    gold_logprob_drop: float | None
    """Mean log-probability of the gold answer, baseline minus ablated, in nats. A document of a
    corpus or a rolling task has no gold answer: the whole text's log-probability stands for it."""
    metrics: dict[str, float | None]
    """Every metric of the benchmark, under lm-eval's names, with the layer removed."""
    reasons: dict[str, str] = {}


class CorrelationRecord(Record):
    """How well one proxy ranks the layers by the accuracy that they really cost."""

    proxy: str
    """`cosine_score`, `angular_distance` or `relative_update`."""
    coefficient: Literal["spearman", "kendall", "pearson"]
    subset: Literal["all", "inner"]
    """Which layers: all of them, or all but the first two and the last two."""
    value: float | None
    low: float | None
    high: float | None
    """95 % interval from resampling the documents."""
    p_value: float | None
    """Permutation p-value, two-sided."""
    n: int
    """Layers."""
    documents: int
    reason: str | None = None


class CellRecord(Record):
    """One (model, benchmark): everything that its outcomes say."""

    key: str
    """The ledger's key: the hash of what decides a document's outcome."""
    model: ModelIdentity
    benchmark: BenchmarkIdentity
    metric: str
    """The metric behind every `accuracy` in this record, in the metric's own unit."""
    higher_is_better: bool = True
    """False for a loss: it is no accuracy, and a drop is its increase."""
    n: int
    """Documents measured (all tasks of a group together)."""
    tokens: int
    """Tokens behind the proxies: each document's context and gold continuation, once; of a corpus
    or a rolling task the predicted tokens, without the last of a full window, which is not read."""
    baseline_accuracy: float | None
    baseline_low: float | None
    baseline_high: float | None
    """Both ends of the 95 % interval of the baseline accuracy."""
    chance_accuracy: float | None
    """Expected accuracy of a random predictor; None while nothing is measured, and where lower is
    better."""
    baseline_metrics: dict[str, float | None]
    layers: tuple[LayerRecord, ...]
    correlations: tuple[CorrelationRecord, ...]
    missing_layers: tuple[int, ...]
    """Layers that were asked for and are not measured yet."""
    provenance: dict[str, str]
    """Package versions, device, times: what a reader needs to repeat the measurement."""
    reasons: dict[str, str] = {}

    @property
    def title(self) -> str:
        """The cell's name where people read it."""
        return f"{self.model.name} · {self.benchmark.name} · {self.benchmark.num_fewshot}-shot"
