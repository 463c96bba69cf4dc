"""Define the frozen records of cells, runs and correlations.

Values are fractions, never percentage points; `layer` is 0-based. An undefined value is `None`. Its
reason is in the estimate itself, or else in the record's `reasons` under the field's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from operator import attrgetter, itemgetter
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from tracker.core.changes import CHANGE_COLUMNS, WHOLE_LAYER, Change
from tracker.core.estimates import Estimate
from tracker.core.identities import BenchmarkIdentity, ModelIdentity, Record, SafeText


def utc_date(date: str) -> str:
    """Return a date in UTC, ISO 8601 to the second; raise ValueError if it is invalid."""
    try:
        return datetime.fromisoformat(date).astimezone(UTC).isoformat(timespec="seconds")
    except OverflowError as error:
        raise ValueError(f"{date} is no date") from error


RecordKey = tuple[str, str, int]
"""Key of a record: the cell, its view and the number of documents."""
NO_REASON = "no reason was recorded"
RUN_NOT_MEASURED = "not measured yet"


def flat_names(field: str, *names: str) -> dict[str, tuple[str, str]]:
    """Build the entries of `EstimatesRecord.FLAT` for an estimate's value and interval ends."""
    return {name: (field, part) for name, part in zip(names, ("value", "low", "high"), strict=True)}


class EstimatesRecord(Record):
    """Record of estimates, with a flat name for each value and interval end."""

    FLAT: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """Name in data frames, in trackers and in records of former versions → the estimate's field,
    and its part."""

    @model_validator(mode="before")
    @classmethod
    def _read_flat(cls, fields: object) -> object:
        """Convert estimates that older versions stored as flat fields."""
        if not isinstance(fields, dict):
            return fields
        converted, reasons = dict(fields), fields.get("reasons")
        for name, (field, part) in cls.FLAT.items():
            if name not in converted or isinstance(converted[name], dict | Estimate):
                continue
            estimate = converted.get(field)
            parts = {**(estimate if isinstance(estimate, dict) else {}), part: converted.pop(name)}
            if part == "value" and isinstance(reasons, dict) and name in reasons:
                parts["reason"] = reasons[name]
                converted["reasons"] = reasons = {n: r for n, r in reasons.items() if n != name}
            converted[field] = parts
        return converted

    def figure(self, name: str) -> float | None:
        """Return the figure with this displayed name; None if it is undefined."""
        field, part = self.FLAT.get(name, (name, ""))
        value = getattr(self, field, None)
        figure: float | None = getattr(value, part) if part else value
        return figure


class FiguresRecord(EstimatesRecord):
    """Record of figures, with reasons for undefined ones."""

    NOTES: ClassVar[Mapping[str, str]] = {"provenance": "mismatch"}
    """Name in data frames, in trackers and in `reasons` of former versions → the field."""

    reasons: dict[str, str] = Field(default_factory=dict)
    """Name of a field, proxy, metric or interval end → the reason why it is undefined."""
    mismatch: str | None = Field(None, exclude_if=lambda text: text is None)
    """Differences between versions or devices of parts of the measurement; None if none."""

    @model_validator(mode="before")
    @classmethod
    def _move_former_notes(cls, fields: object) -> object:
        """Move the notes that former versions stored as reasons to their fields."""
        if not isinstance(fields, dict) or not isinstance(reasons := fields.get("reasons"), dict):
            return fields
        notes = {cls.NOTES[name]: reason for name, reason in reasons.items() if name in cls.NOTES}
        reasons = {name: reason for name, reason in reasons.items() if name not in cls.NOTES}
        return fields | notes | {"reasons": reasons}

    @property
    def all_reasons(self) -> dict[str, str]:
        """Displayed name → the reason why a figure is undefined, or a note."""
        notes = {name: getattr(self, field) for name, field in self.NOTES.items()}
        values = {field: name for name, (field, part) in self.FLAT.items() if part == "value"}
        reasons = {
            values.get(field, field): getattr(self, field).reason
            if field in values
            else notes.get(field) or self.reasons.get(field)
            for field in type(self).model_fields
        }
        reasons |= self.reasons | notes
        return {name: reason for name, reason in reasons.items() if reason}


class ChangeRecord(Record):
    """Figures of one change."""

    change: Change
    """The change, in addition to the layers that every run of the cell lacks."""

    @model_validator(mode="before")
    @classmethod
    def _read_former_fields(cls, fields: object) -> object:
        """Convert the flat parts of a change of former versions to a change."""
        if not isinstance(fields, dict) or "change" in fields:
            return fields
        change = {name: fields[name] for name in CHANGE_COLUMNS if name in fields}
        return {name: fields[name] for name in fields if name not in change} | {"change": change}


class RunRecord(FiguresRecord, ChangeRecord):
    """One run: the effect of one change on one benchmark.

    Every drop is relative to the intact model. Where the whole cell lacks layers, it includes their
    cost. Extra fields are proxies by name: those of the layer in the intact model, for whole single
    layers only.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | None] = Field(init=False)
    FLAT: ClassVar = {
        **flat_names("drop", "accuracy_drop", "accuracy_drop_low", "accuracy_drop_high"),
        "mcnemar_p": ("drop", "p_value"),
        **flat_names("gold_drop", "gold_logprob_drop", "gold_logprob_low", "gold_logprob_high"),
        **flat_names(
            "options_drop", "options_logprob_drop", "options_logprob_low", "options_logprob_high"
        ),
    }

    ablation: str
    """The ablation's name, e.g. `layer:3`; includes the layers that every run of the cell lacks."""
    n: int
    """Number of documents behind the figures."""
    accuracy: float | None
    """The cell's metric under the ablation."""
    drop: Estimate
    """Baseline minus ablated, or ablated minus baseline where lower is better; positive = the
    removed part mattered. Its p-value is McNemar's, exact."""
    drop_sd: float | None = None
    """Standard deviation of the documents' drops, which gives the sample size for smaller drops."""
    accuracy_relevance: float | None
    """Share of the accuracy above chance that is lost; None where lower is better."""
    rounded: int | None = Field(None, exclude_if=lambda count: count is None)
    """Number of documents whose result may be reversed by rounding in an equivalent computation.
    None in single precision, where it is not measured."""
    drop_rounding: float | None = Field(None, exclude_if=lambda moved: moved is None)
    """Largest effect of rounding on `drop`, up or down, in 95 of 100 cases."""
    gold_drop: Estimate = Estimate(None)
    """Mean log-probability of the gold answer, baseline minus ablated, in nats. A document of a
    corpus or a rolling task has no gold answer; the whole text's log-probability is used."""
    options_drop: Estimate = Estimate(None)
    """Mean log of the summed probability of a document's options, baseline minus ablated, in nats:
    the part of `gold_drop` that all options share. The rest moves to the other options."""
    metrics: dict[str, float | None]
    """Every metric of the benchmark, under lm-eval's names, under the ablation."""

    @property
    def cosine_score(self) -> float | None:
        """The cosine score, which pages show beside every drop; None if undefined."""
        return self.__pydantic_extra__.get("cosine_score")


class RunAnswer(ChangeRecord):
    """Answer for one run; the bounds hold for all interim analyses and runs together."""

    n: int
    """Number of documents used until the run was decided."""
    low: float
    high: float
    """Upper end of the confidence sequence of the drop over all documents; `low` is the lower."""
    open: bool
    """True if the run is not decided yet."""
    chosen: bool
    """True if the run is in the requested set; for `sign`, if its drop is not 0."""


class AnswerRecord(Record):
    """Answer to a cell's question, and the cost of the answer."""

    question: str
    level: float
    """The probability that the answer is right, and that all bounds hold together."""
    seed: int
    """The seed of the random order of the documents."""
    looked: int
    """Number of documents used, from the beginning of the order."""
    measured: int
    """Number of documents measured for the answer; more for a group, whose tasks are in separate
    blocks."""
    population: int
    """Number of all documents of the benchmark."""
    over: bool
    """True if measuring has ended: with an answer, or because no documents are left."""
    passes: int
    """Number of passes of one document through one layer so far, including the intact model's."""
    passes_of: int
    """Number of such passes that measuring all documents and runs takes."""
    runs: tuple[RunAnswer, ...]

    @property
    def answered(self) -> bool:
        """True if no run is open."""
        return not any(run.open for run in self.runs)


class CorrelationRecord(EstimatesRecord):
    """Correlation of one proxy with the measured drops of single whole layers."""

    FLAT: ClassVar = {n: ("estimate", n) for n in ("value", "low", "high", "p_value", "reason")}

    proxy: str
    """The proxy's name, e.g. `cosine_score`."""
    coefficient: Literal["spearman", "kendall", "pearson"]
    subset: Literal["all", "inner"]
    """The correlated layers: all layers, or all but the first two and the last two."""
    estimate: Estimate
    """The coefficient. Its interval comes from resampling documents. Its p-value is two-sided,
    against unrelated series that are equally smooth over depth."""
    n: int
    """Number of layers."""
    documents: int


def view_name(removed: Sequence[int], selection: str, metric: str, primary_metric: str) -> str:
    """Return a view's name from its removed layers, its documents and its metric."""
    prefix = "-".join(["without", *map(str, removed)]) if removed else INTACT_VIEW
    return f"{prefix}{selection}" + ("" if metric == primary_metric else f"--{metric}")


INTACT_VIEW = "intact"
"""The view of the whole model by the benchmark's own metric, on all documents."""
_FORMER_VIEW = itemgetter("removed", "metric", "benchmark", "sample_seed", "beside")
"""The fields that give the view's name in records of former versions, which did not store it."""


class CellRecord(FiguresRecord):
    """Results of one (model, benchmark), intact or without some layers."""

    FLAT: ClassVar = {
        **flat_names("baseline", "baseline_accuracy", "baseline_low", "baseline_high"),
        **flat_names("remaining", "removed_accuracy", "removed_low", "removed_high"),
    }
    NOTES: ClassVar = {"n": "unfinished", "provenance": "mismatch", "checkpoint": "unsaved"}

    key: str
    """The ledger's key: the hash of everything that affects a document's outcome."""
    model: ModelIdentity
    benchmark: BenchmarkIdentity
    metric: str
    """The metric behind every `accuracy` in this record, in the metric's own unit."""
    higher_is_better: bool = True
    """False for a loss, whose drop is its increase."""
    n: int
    """Number of measured documents (all tasks of a group together)."""
    unfinished: str | None = Field(None, exclude_if=lambda text: text is None)
    """Reason why fewer documents are measured than requested; None if all are."""
    unsaved: str | None = Field(None, exclude_if=lambda text: text is None)
    """Reason why no saved checkpoint holds the measured model; None if a checkpoint does."""
    sample_seed: int | None = None
    """The seed of randomly drawn documents; None for the first ones, or all."""
    beside: str = Field("", exclude_if=lambda text: not text)
    """Text that distinguishes the view from the cell's other views, e.g. `64 documents`."""
    supersedes: tuple[str, ...] = Field((), exclude=True)
    """Names of the views that this record's view replaces in all tracking backends."""
    apart: SafeText = Field("", exclude_if=lambda text: not text)
    """Text that distinguishes the cell from published ones with the same title; usually empty."""
    tokens: int
    """Tokens behind the proxies: each document's context and gold continuation, once; of a corpus
    or a rolling task the predicted tokens, without the last of a full window, which is not read."""
    baseline: Estimate = Estimate(None)
    """The intact model's accuracy, or loss."""
    baseline_rounded: int | None = Field(None, exclude_if=lambda count: count is None)
    """Number of documents whose result rounding may reverse, as `RunRecord.rounded`."""
    baseline_rounding: float | None = Field(None, exclude_if=lambda moved: moved is None)
    """Largest effect of rounding on `baseline`, as `RunRecord.drop_rounding`."""
    chance_accuracy: float | None
    """Expected accuracy of a random predictor; None if nothing is measured or lower is better."""
    baseline_metrics: dict[str, float | None]
    baseline_options_logprob: float | None = None
    """Mean log of the summed probability of a document's options, in nats; None without options."""
    removed: tuple[int, ...] = ()
    """Whole layers that are removed in every run, but not in the baseline, ascending."""
    view: str = Field(default_factory=lambda fields: former_view_name(*_FORMER_VIEW(fields)))
    """The name of the shown view."""
    explicit: bool = Field(False, exclude_if=lambda explicit: not explicit)
    """True if a run requested the view, and not only a study or a search."""
    remaining: Estimate = Estimate(None)
    """The metric of the model that lacks only `removed`; undefined if `removed` is empty."""
    runs: tuple[RunRecord, ...]
    """The measured runs: components outermost, then spans, then layers."""
    answer: AnswerRecord | None = Field(None, exclude_if=lambda answer: answer is None)
    """The answer to the cell's question; None if there is no question."""
    correlations: tuple[CorrelationRecord, ...]
    """Correlations over the runs that remove one whole layer; empty without such runs."""
    missing: tuple[Change, ...]
    """Requested runs that are not measured yet."""
    fitted_on: SafeText | None = Field(None, exclude_if=lambda text: text is None)
    """The text on which replacements of layers were fitted; None if no run has one."""
    provenance: dict[str, SafeText]
    """Package versions, machine and device of the outcomes; values that differ are all listed."""
    seconds: float | None = None
    """Measuring time of all processes together, in seconds; None if unknown."""
    peak_bytes: int | None = None
    """Peak memory of a process: on the accelerator, or else in main memory; None if unknown."""
    measured: Annotated[str, AfterValidator(utc_date)] | None = Field(
        None, exclude_if=lambda when: when is None
    )
    """Time of the last measured outcome (UTC, ISO 8601); None if unknown."""
    compared: int = 0
    """Number of responses, on random documents, that a really pruned model repeated as a check."""
    compared_difference: float | None = None
    """The largest difference of a log-likelihood among the compared responses, in nats."""
    compared_unsteady: int = 0
    """Number of compared responses beyond rounding because the model is discontinuous."""

    @property
    def title(self) -> str:
        """The cell's name for display, including which documents were chosen."""
        return " · ".join(filter(None, (self.heading, self.sampling_text, self.beside, self.apart)))

    @property
    def heading(self) -> str:
        """The cell's name for display, not including which documents were chosen."""
        name = f"{self.model.name} · {self.benchmark.title} · {self.benchmark.num_fewshot}-shot"
        return " · ".join(filter(None, (name, self.other_metric, self.removed_text)))

    @property
    def sampling_text(self) -> str:
        """The random choice of the documents; empty for the first ones, or all.

        For example `drawn at random (seed 1234)`.
        """
        seed = self.answer.seed if self.answer and self.is_raced else self.sample_seed
        text = "" if seed is None else f"drawn at random (seed {seed})"
        return f"{text}, stopped at an answer" if self.is_stopped else text

    @property
    def documents_text(self) -> str:
        """The measured documents, e.g. `200 documents drawn at random (seed 1234)`."""
        return self.describe_documents(self.counted)

    def describe_documents(self, count: str) -> str:
        """Describe this number of documents in the form of `documents_text`."""
        noun = "document" if count == "1" else "documents"
        return " ".join(filter(None, (count, noun, self.sampling_text)))

    @property
    def counted(self) -> str:
        """The number of documents of the runs, e.g. `200`, or `64 to 320` if runs differ."""
        largest = max([self.n, *(run.n for run in self.runs)])
        return f"{self.n:,}" if largest == self.n else f"{self.n:,} to {largest:,}"

    @property
    def other_metric(self) -> str:
        """The metric's name; empty for the benchmark's own metric."""
        return "" if self.metric == self.benchmark.primary_metric else self.metric

    @property
    def removed_text(self) -> str:
        """The layers that every run lacks, e.g. `without layers 3, 17`; empty if none."""
        if not self.removed:
            return ""
        plural = "s" if len(self.removed) > 1 else ""
        return f"without layer{plural} {', '.join(map(str, self.removed))}"

    @property
    def record_key(self) -> RecordKey:
        """The key among several records: the cell, its view and the number of documents."""
        return (self.key, self.view, self.n)

    def contains(self, other: CellRecord) -> bool:
        """Check whether the record contains all documents and runs of another record.

        An unfinished record may hold any documents, not just the first ones.
        """
        fields = attrgetter("key", "removed", "metric", "sample_seed", "answer")
        if other.unfinished is None:
            has_documents = self.n == other.n and self.unfinished is None
        else:
            has_documents = self.n >= other.n
        changes, others = ({run.change for run in record.runs} for record in (self, other))
        return fields(self) == fields(other) and has_documents and changes >= others

    @property
    def is_raced(self) -> bool:
        """True if an answer decides how many documents each run needs.

        Fixed-sample intervals are then left out, and those of drops are confidence sequences.
        """
        return self.answer is not None and self.unfinished is not None

    @property
    def is_stopped(self) -> bool:
        """True if an answer ended the measuring before all documents were used."""
        return self.answer is not None and self.answer.over and self.is_raced

    @property
    def is_complete(self) -> bool:
        """True if every requested run and document is measured."""
        return not self.missing_labels

    @property
    def missing_labels(self) -> tuple[str, ...]:
        """Requested documents and runs, by their labels, that are not measured yet."""
        documents = () if self.unfinished is None else (self.unfinished,)
        return (*documents, *(change.label() for change in self.missing))

    @property
    def whole_layers(self) -> tuple[RunRecord, ...]:
        """The runs that remove one whole layer."""
        return tuple(self.runs_of_kind().values())

    @property
    def changes(self) -> list[Change]:
        """The changes, measured or missing: components outermost, then spans, then layers."""
        changes = (*(run.change for run in self.runs), *self.missing)
        return sorted(changes)

    @property
    def kinds(self) -> list[Change]:
        """The kinds of changes, measured or missing, in their order."""
        return list(dict.fromkeys(change.kind for change in self.changes))

    def runs_of_kind(self, kind: Change = WHOLE_LAYER) -> dict[int, RunRecord]:
        """Map the first layer of each measured run of a kind to the run."""
        return {run.change.layer: run for run in self.runs if run.change.kind == kind}

    def absence_reason(self, change: Change) -> str:
        """Return the reason why no run with this change is recorded."""
        if {*self.removed} & {*change.layers}:
            return "removed already, beneath every run"
        return RUN_NOT_MEASURED if change in self.missing else "not asked for"

    def reason_of(self, field: str, run: RunRecord | None = None) -> str:
        """Return the reason why a field or metric is undefined, of a run or (None) of the cell.

        The run's reason comes first, then the cell's, then `NO_REASON`.
        """
        for reasons in (run.all_reasons if run else {}, self.all_reasons):
            if reason := reasons.get(field) or reasons.get(f"metrics.{field}"):
                return reason
        return NO_REASON


def former_view_name(
    removed: Sequence[int], metric: str, benchmark: BenchmarkIdentity, seed: int | None, label: str
) -> str:
    """Return the name that former versions gave to a view."""
    selection = "" if seed is None else f"-sample-{seed}"
    if label:
        selection += f"-{label.replace(' ', '-')}"
    return view_name(removed, selection, metric, benchmark.primary_metric)


def first_layers(kind: Change, *cells: CellRecord) -> list[int]:
    """List the first layers of the changes of a kind in some cells, measured or missing."""
    changes = (change for cell in cells for change in cell.changes)
    return sorted({change.layer for change in changes if change.kind == kind})
