"""Define immutable records of measurements, runs and correlations.

Accuracies and drops are stored as fractions, never in percent, and layers are numbered from 0. An
undefined value is `None`. The reason is stored in the `Estimate` or in the record's `reasons`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from tracker.schema.changes import CHANGE_COLUMNS, WHOLE_LAYER, Change
from tracker.schema.estimates import Estimate
from tracker.schema.identities import BenchmarkIdentity, ModelIdentity, Record, SafeText


def utc_date(date: str) -> str:
    """Convert a date to UTC, in ISO 8601 with seconds; raise ValueError if it is invalid."""
    try:
        return datetime.fromisoformat(date).astimezone(UTC).isoformat(timespec="seconds")
    except OverflowError as error:
        raise ValueError(f"{date} is no date") from error


RecordKey = tuple[str, str, int]
"""Key of a record: the cell, its view and the number of documents."""
NO_REASON = "no reason was recorded"
RUN_NOT_MEASURED = "not measured yet"


def flat_names(field: str, *names: str) -> dict[str, tuple[str, str]]:
    """Return the entries of `FLAT` for the numbers of the estimate in `field`.

    `names` are the column names of `value`, `low` and `high`, in this order.
    """
    return {name: (field, part) for name, part in zip(names, ("value", "low", "high"), strict=True)}


class EstimatesRecord(Record):
    """Base class of records with estimates.

    The class variable `FLAT` maps each table column to one part of an estimate, such as `low`.
    """

    FLAT: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """Column name in data frames, in tracking backends and in records of former versions → the
    field of the estimate, and the part of the estimate."""

    @model_validator(mode="before")
    @classmethod
    def _read_former_estimates(cls, fields: object) -> object:
        """Build estimates from the separate fields (value and bounds) of former versions."""
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
        """Return the number in a column of `FLAT` or in a field; None if it is undefined."""
        field, part = self.FLAT.get(name, (name, ""))
        value = getattr(self, field, None)
        figure: float | None = getattr(value, part) if part else value
        return figure


class FiguresRecord(EstimatesRecord):
    """Base class of records that store the reason for each undefined value."""

    NOTES: ClassVar[Mapping[str, str]] = {"provenance": "mismatch"}
    """Column name in data frames, in tracking backends and in `reasons` of former versions → the
    field."""

    reasons: dict[str, str] = Field(default_factory=dict)
    """Name of a field, proxy, metric or interval end → the reason why it is undefined."""
    mismatch: str | None = Field(None, exclude_if=lambda text: text is None)
    """Differences in versions or devices within the measurement; None if there are no
    differences."""

    @model_validator(mode="before")
    @classmethod
    def _move_former_notes(cls, fields: object) -> object:
        """Move notes that former versions stored in `reasons` to fields such as `mismatch`."""
        if not isinstance(fields, dict) or not isinstance(reasons := fields.get("reasons"), dict):
            return fields
        notes = {cls.NOTES[name]: reason for name, reason in reasons.items() if name in cls.NOTES}
        reasons = {name: reason for name, reason in reasons.items() if name not in cls.NOTES}
        return fields | notes | {"reasons": reasons}

    @property
    def all_reasons(self) -> dict[str, str]:
        """The reasons for undefined values, by the name of the value.

        The dict also includes notes on the record, such as `mismatch` (different package versions).
        """
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
    """Base class of records of one change of a model, e.g. removing layer 3."""

    change: Change
    """The change. The layers that are removed in every run of the cell are not included."""

    @model_validator(mode="before")
    @classmethod
    def _read_former_fields(cls, fields: object) -> object:
        """Build the field `change` from the fields that former versions stored instead."""
        if not isinstance(fields, dict) or "change" in fields:
            return fields
        change = {name: fields[name] for name in CHANGE_COLUMNS if name in fields}
        return {name: fields[name] for name in fields if name not in change} | {"change": change}


class RunRecord(FiguresRecord, ChangeRecord):
    """Result of one run: the effect of one change of a model on one benchmark.

    Every accuracy drop is relative to the intact model. Extra fields contain proxies: cheap
    estimates of the importance of the changed layer or part.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | None] = Field(init=False)
    FLAT: ClassVar = {
        **flat_names("drop", "accuracy_drop", "accuracy_drop_low", "accuracy_drop_high"),
        "mcnemar_p": ("drop", "p_value"),
        **flat_names(
            "choice_drop",
            "choice_probability_drop",
            "choice_probability_low",
            "choice_probability_high",
        ),
        **flat_names("gold_drop", "gold_logprob_drop", "gold_logprob_low", "gold_logprob_high"),
        **flat_names(
            "options_drop", "options_logprob_drop", "options_logprob_low", "options_logprob_high"
        ),
    }

    ablation: str
    """The ablation's name, such as `layer:3`. Layers that are removed in every run are included."""
    n: int
    """Number of documents from which the values are computed."""
    clusters: float | None = Field(None, exclude_if=lambda count: count is None)
    """Effective number of clusters, which is lower if the weights of clusters differ. None if
    documents are independent."""
    accuracy: float | None
    """The metric of the changed model."""
    drop: Estimate
    """Baseline minus ablated, or ablated minus baseline if lower values are better. A positive drop
    means that the changed model is worse. The p-value is from the exact McNemar test."""
    drop_sd: float | None = None
    """Standard deviation of the documents' drops, which gives the sample size for smaller drops."""
    accuracy_relevance: float | None
    """Fraction of the accuracy above chance that is lost; None if lower values are better."""
    rounded: int | None = Field(None, exclude_if=lambda count: count is None)
    """Number of documents whose result may be reversed by rounding errors. None in single
    precision, where rounding errors are not measured."""
    drop_rounding: float | None = Field(None, exclude_if=lambda moved: moved is None)
    """Half width of a 95 % interval for the effect of rounding errors on `drop`."""
    choice_drop: Estimate = Estimate(None)
    """Mean probability of the gold option among its document's options (the softmax of their
    log-likelihoods), baseline minus ablated. Undefined without options."""
    gold_drop: Estimate = Estimate(None)
    """Mean log-probability of the gold answer, baseline minus ablated, in nats. A document of a
    corpus or a rolling task has no gold answer; the whole text's log-probability is used."""
    options_drop: Estimate = Estimate(None)
    """Mean logarithm of the summed probability of a document's options, baseline minus ablated, in
    nats. This is the part of `gold_drop` that is common to all options. The remaining part is
    probability that moves to the other options."""
    metrics: dict[str, float | None]
    """All metrics of the changed model on the benchmark, by lm-eval's names."""

    @property
    def units(self) -> float:
        """Number of independent units (clusters or documents) behind the intervals."""
        return self.clusters or self.n

    @property
    def proxies(self) -> Mapping[str, float | None]:
        """The proxies of the changed layer or part by name; None for an undefined value."""
        return self.__pydantic_extra__

    @property
    def cosine_score(self) -> float | None:
        """The proxy `cosine_score` of the removed layer; None if it is undefined."""
        return self.proxies.get("cosine_score")


class RunAnswer(ChangeRecord):
    """Result of the stopping rule (`until`) for one run."""

    n: int
    """Number of documents used until the run was decided."""
    low: float
    high: float
    """Upper end of the confidence sequence for the drop over all documents. The field `low`
    contains the lower end."""
    open: bool
    """True if the run is not decided yet."""
    chosen: bool
    """True if the run belongs to the requested largest or smallest drops. For the question `sign`,
    True if the run's drop is not 0."""


class AnswerRecord(Record):
    """Result of the stopping rule (`until`) for all runs, with the cost of the measurement."""

    question: str
    level: float
    """The probability that the answer and the bounds of all runs are right."""
    seed: int
    """The seed of the random order of the documents."""
    looked: int
    """Number of documents that the stopping rule used, from the beginning of the random order."""
    measured: int
    """Number of documents that were measured for the answer. It can be larger than `looked` for a
    group of tasks, because the tasks are measured in separate blocks."""
    population: int
    """Number of all documents of the benchmark."""
    over: bool
    """True if the measurement has ended, with an answer or because all documents are measured."""
    passes: int
    """Number of layer passes so far, including the intact model's passes. A layer pass is the
    computation of one layer for one document."""
    passes_of: int
    """Number of layer passes that measuring all documents and runs would need."""
    runs: tuple[RunAnswer, ...]

    @property
    def answered(self) -> bool:
        """True if no run is undecided any more."""
        return not any(run.open for run in self.runs)


class CorrelationRecord(EstimatesRecord):
    """Correlation between one proxy and the measured drops."""

    FLAT: ClassVar = {n: ("estimate", n) for n in ("value", "low", "high", "p_value", "reason")}

    proxy: str
    """The proxy's name, such as `cosine_score`."""
    coefficient: Literal["spearman", "kendall", "pearson"]
    subset: Literal["all", "inner"]
    """The correlated layers. `inner` means all layers except the first two and the last two."""
    sample: str = "layer"
    """The observations of the correlation, such as `head` or `int4 linear` (`Change.sample`)."""
    within_layers: bool = False
    """True if the p-value is from permutations of the parts within each layer."""
    estimate: Estimate
    """The coefficient. Its interval is a bootstrap interval over documents. The null hypothesis of
    the two-sided p-value is that the series are unrelated but equally smooth over depth."""
    n: int
    """Number of layers or parts."""
    documents: int

    @model_validator(mode="before")
    @classmethod
    def _add_sample(cls, fields: Any) -> Any:
        """Set `sample` to experts in correlations over experts that former versions stored."""
        if isinstance(fields, dict) and fields.get("proxy") in ("expert_saliency", "routed_share"):
            return {"sample": "expert", "within_layers": True, **fields}
        return fields


def view_name(removed: Sequence[int], selection: str, metric: str, primary_metric: str) -> str:
    """Return the name of a view (selected runs and documents), e.g. `without-3-17--acc_norm`.

    The name is built from the removed layers, the selection of documents and the metric.
    """
    prefix = "-".join(["without", *map(str, removed)]) if removed else INTACT_VIEW
    return f"{prefix}{selection}" + ("" if metric == primary_metric else f"--{metric}")


INTACT_VIEW = "intact"
"""Name of the view with the whole model, the benchmark's primary metric and all documents."""


class CellRecord(FiguresRecord):
    """Results of one model on one benchmark: the intact model and all ablation runs."""

    FLAT: ClassVar = {
        **flat_names("baseline", "baseline_accuracy", "baseline_low", "baseline_high"),
        **flat_names("remaining", "removed_accuracy", "removed_low", "removed_high"),
    }
    NOTES: ClassVar = {"n": "unfinished", "provenance": "mismatch", "checkpoint": "unsaved"}

    key: str
    """The cell's key in the ledger: a hash of everything that affects a document's outcome."""
    model: ModelIdentity
    benchmark: BenchmarkIdentity
    metric: str
    """The metric that every field named `accuracy` in this record contains, in the metric's
    unit."""
    higher_is_better: bool = True
    """False for a loss. The drop of a loss is its increase."""
    n: int
    """Number of measured documents, over all tasks of a group."""
    unfinished: str | None = Field(None, exclude_if=lambda text: text is None)
    """Reason why fewer documents are measured than requested; None if all of them are measured."""
    unsaved: str | None = Field(None, exclude_if=lambda text: text is None)
    """Reason why no saved checkpoint contains the measured model; None if a checkpoint does."""
    cluster: SafeText | None = Field(None, exclude_if=lambda column: column is None)
    """The column whose value dependent documents share; None if documents are independent."""
    sample_seed: int | None = None
    """The seed of randomly drawn documents; None for the first documents or for all documents."""
    beside: str = Field("", exclude_if=lambda text: not text)
    """Text that distinguishes the view from the cell's other views, such as `64 documents`."""
    supersedes: tuple[str, ...] = Field((), exclude=True)
    """Names of the views that this record's view replaces in all tracking backends."""
    apart: SafeText = Field("", exclude_if=lambda text: not text)
    """Text that distinguishes the cell from published cells with the same title; usually empty."""
    tokens: int
    """Number of tokens from which the proxies are computed. For tasks, these are the tokens of each
    document's context and gold continuation, counted once. For a corpus or a rolling task, these
    are the predicted tokens, except for the last token of a full window, which the model does not
    read."""
    baseline: Estimate = Estimate(None)
    """The intact model's accuracy or loss."""
    baseline_rounded: int | None = Field(None, exclude_if=lambda count: count is None)
    """Number of documents whose result may be reversed by rounding errors, as in
    `RunRecord.rounded`."""
    baseline_rounding: float | None = Field(None, exclude_if=lambda moved: moved is None)
    """Half width of a 95 % interval for the effect of rounding errors on `baseline`."""
    chance_accuracy: float | None
    """Expected accuracy of a random predictor; None for a loss, or if nothing is measured."""
    baseline_metrics: dict[str, float | None]
    baseline_options_logprob: float | None = None
    """Mean logarithm of the summed probability of a document's options, in nats; None without
    options."""
    removed: tuple[int, ...] = ()
    """Whole layers that are removed in every run but not in the baseline, ascending."""
    view: str
    """The name of the view that this record shows."""
    explicit: bool = Field(False, exclude_if=lambda explicit: not explicit)
    """True if the view was requested directly, and not only by a study or a search."""
    remaining: Estimate = Estimate(None)
    """The metric of the model without the layers in `removed`; undefined if `removed` is empty."""
    runs: tuple[RunRecord, ...]
    """The measured runs, sorted by component, then by span, then by layer."""
    answer: AnswerRecord | None = Field(None, exclude_if=lambda answer: answer is None)
    """The answer to the cell's question; None if there is no question."""
    correlations: tuple[CorrelationRecord, ...]
    """Correlations over the runs that remove one whole layer; empty without such runs."""
    missing: tuple[Change, ...]
    """Changes of the requested runs that are not measured yet."""
    fitted_on: SafeText | None = Field(None, exclude_if=lambda text: text is None)
    """The text on which replacements of layers were fitted; None if no layer was replaced."""
    provenance: dict[str, SafeText]
    """Package versions, machine and device of the measurement; all values are listed if they
    differ."""
    seconds: float | None = None
    """Measuring time of all processes together, in seconds; None if unknown."""
    outcome_seconds: float | None = None
    """Mean measuring time of one document under one ablation, in seconds; None if unknown."""
    peak_bytes: int | None = None
    """Peak memory of a process, on the accelerator if there is one; None if unknown."""
    measured: Annotated[str, AfterValidator(utc_date)] | None = Field(
        None, exclude_if=lambda when: when is None
    )
    """Time of the last measured outcome (UTC, ISO 8601); None if unknown."""
    compared: int = 0
    """Number of responses to random documents that were checked on a model without the layers."""
    compared_difference: float | None = None
    """The largest difference between the log-likelihoods of a compared response, in nats."""
    compared_unsteady: int = 0
    """Number of compared responses that differ by more than rounding because the model is
    discontinuous."""

    @property
    def title(self) -> str:
        """The display name with model, benchmark and settings, including the document selection."""
        return " · ".join(filter(None, (self.heading, self.sampling_text, self.beside, self.apart)))

    @property
    def heading(self) -> str:
        """The display name with model, benchmark and settings, without the document selection."""
        name = f"{self.model.name} · {self.benchmark.title} · {self.benchmark.num_fewshot}-shot"
        return " · ".join(filter(None, (name, self.other_metric, self.removed_text)))

    @property
    def sampling_text(self) -> str:
        """A text such as `drawn at random (seed 1234)` that says how documents were selected.

        The text mentions random selection, an early end of the measurement, and clusters of
        dependent documents.
        """
        seed = self.answer.seed if self.answer and self.is_raced else self.sample_seed
        text = "" if seed is None else f"drawn at random (seed {seed})"
        stop = "stopped at an answer" if self.is_stopped else ""
        clusters = f"clustered by {self.cluster}" if self.cluster else ""
        return ", ".join(filter(None, (text, stop, clusters)))

    @property
    def documents_text(self) -> str:
        """A description such as `200 documents drawn at random (seed 1234)`."""
        return self.describe_documents(self.counted)

    def describe_documents(self, count: str) -> str:
        """Return a text such as `200 documents drawn at random (seed 1234)`.

        The argument `count` is the number of documents as text, such as `200` or `64 to 320`.
        """
        noun = "document" if count == "1" else "documents"
        return " ".join(filter(None, (count, noun, self.sampling_text)))

    @property
    def counted(self) -> str:
        """The number of documents per run as text: `200`, or `64 to 320` if runs differ."""
        largest = max([self.n, *(run.n for run in self.runs)])
        return f"{self.n:,}" if largest == self.n else f"{self.n:,} to {largest:,}"

    @property
    def other_metric(self) -> str:
        """The name of the metric; empty if it is the benchmark's primary metric."""
        return "" if self.metric == self.benchmark.primary_metric else self.metric

    @property
    def removed_text(self) -> str:
        """A text such as `without layers 3, 17` with the layers that every run removes.

        The text is empty if no layer is removed in every run.
        """
        if not self.removed:
            return ""
        plural = "s" if len(self.removed) > 1 else ""
        return f"without layer{plural} {', '.join(map(str, self.removed))}"

    @property
    def record_key(self) -> RecordKey:
        """The record's unique key: hash of the settings, name of the view, number of documents.

        A view is a selection of runs and documents.
        """
        return (self.key, self.view, self.n)

    def contains(self, other: CellRecord) -> bool:
        """Return whether the record contains all documents and runs of `other`.

        Both must have the same settings. This record may have more documents only if `other` is
        unfinished.
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
        """True if the stopping rule (`until`) determined the number of documents of each run.

        With a stopping rule, the intervals of the drops are confidence sequences (valid at any
        time).
        """
        return self.answer is not None and self.unfinished is not None

    @property
    def is_stopped(self) -> bool:
        """True if the stopping rule (`until`) ended the measurement early."""
        return self.answer is not None and self.answer.over and self.is_raced

    @property
    def is_complete(self) -> bool:
        """True if all requested runs are measured on all requested documents."""
        return not self.missing_labels

    @property
    def missing_labels(self) -> tuple[str, ...]:
        """Messages about requested documents and runs that have not been measured yet."""
        documents = () if self.unfinished is None else (self.unfinished,)
        return (*documents, *(change.label() for change in self.missing))

    @property
    def whole_layers(self) -> tuple[RunRecord, ...]:
        """The records of the runs that remove one whole layer."""
        return tuple(self.runs_of_kind().values())

    @property
    def changes(self) -> list[Change]:
        """The sorted changes of all requested runs, measured or not."""
        changes = (*(run.change for run in self.runs), *self.missing)
        return sorted(changes)

    @property
    def kinds(self) -> list[Change]:
        """The kinds of changes (e.g. removing one layer) in the requested runs."""
        return list(dict.fromkeys(change.kind for change in self.changes))

    def runs_of_kind(self, kind: Change = WHOLE_LAYER) -> dict[int, RunRecord]:
        """Return the measured runs of one kind of change, by the first changed layer."""
        return {run.change.layer: run for run in self.runs if run.change.kind == kind}

    def absence_reason(self, change: Change) -> str:
        """Return the reason why the record has no run with a change, e.g. `not asked for`."""
        if {*self.removed} & {*change.layers}:
            return "removed already, beneath every run"
        return RUN_NOT_MEASURED if change in self.missing else "not asked for"

    def reason_of(self, field: str, run: RunRecord | None = None) -> str:
        """Return the reason why the value of a field is undefined.

        `field` is a field of `run`, or of this record if `run` is None. The result is `NO_REASON`
        if no reason is known.
        """
        for reasons in (run.all_reasons if run else {}, self.all_reasons):
            if reason := reasons.get(field) or reasons.get(f"metrics.{field}"):
                return reason
        return NO_REASON


def first_layers(kind: Change, *cells: CellRecord) -> list[int]:
    """Return the first changed layer of each requested change of one kind.

    The layers are sorted and contain no duplicates.
    """
    changes = (change for cell in cells for change in cell.changes)
    return sorted({change.layer for change in changes if change.kind == kind})


PRIVATE_TEXTS = (
    "the texts of your own task are not uploaded (use --publish-documents to upload them)"
)


class ShownDocument(Record):
    """A document with the intact model's response.

    At least one run has a better or worse score on the document than the intact model.
    """

    task: str
    doc: int
    """The document's position in the task's split, 0-based."""
    question: SafeText | None
    """The question; None if the text is unknown or private."""
    choices: tuple[SafeText, ...]
    answer: SafeText | None
    """The gold answer of a document without options."""
    gold: int | None
    choice: int | None
    """The option that the intact model chooses, 0-based."""
    margin: float | None
    text: SafeText | None
    """The text that the intact model generates."""


class DecidedDocument(Record):
    """The ablated model's response to a document.

    The ablated model has a better or worse score on the document than the intact model.
    """

    document: int
    """The document's position in `DecisionsRecord.documents`."""
    choice: int | None
    margin: float | None
    text: SafeText | None
    cut: bool = Field(False, exclude_if=lambda cut: not cut)
    """True if the token limit ended the text."""


Quartiles = tuple[float, float, float]
"""Lower quartile, median, upper quartile."""


class RunDecisions(Record):
    """Counts and examples of the documents on which a run changes the score.

    A document is lost if the run has a worse score than the intact model. A document is won if the
    run has a better score than the intact model.
    """

    run: Change
    lost: int
    """Number of documents on which the run has a worse score than the intact model."""
    won: int
    margins: Quartiles | None
    options: tuple[float, ...]
    """Frequency with which the run chooses each option; empty without options."""
    named_lost: int
    """Number of lost documents in `named`; they are listed first."""
    named: tuple[DecidedDocument, ...]
    """The lost and won documents whose margin changes most."""
    cut: float | None = Field(None, exclude_if=lambda cut: cut is None)
    """Share of the generated texts that the token limit ended; None if unknown."""
    lost_cut: int = Field(0, exclude_if=lambda lost: not lost)
    """Number of lost documents for which the limit ends more texts than in the intact model."""

    def without_texts(self) -> RunDecisions:
        """Return a copy of the record without the texts that models generated."""
        documents = tuple(document.model_copy(update={"text": None}) for document in self.named)
        return self.model_copy(update={"named": documents})


class DecisionsRecord(Record):
    """The documents of one benchmark on which runs change the score of a model."""

    n: int
    """Number of documents."""
    right: int
    """Number of right answers of the intact model; 0 for metrics without right answers."""
    margins: Quartiles | None
    """Quartiles of the intact model's margins: score of the gold option minus best other score."""
    options: tuple[float, ...]
    gold: tuple[float, ...]
    """Frequency with which each option is the gold option."""
    documents: tuple[ShownDocument, ...]
    """The documents that at least one run lists in `named`."""
    runs: tuple[RunDecisions, ...]
    compared: tuple[int, ...]
    """The removed layers whose lost documents are compared in pairs in the field `both`."""
    both: tuple[tuple[int, ...], ...]
    cut: float | None = Field(None, exclude_if=lambda cut: cut is None)
    """Share of the intact model's texts that the token limit ended; None if unknown."""
    public: bool
    """True if all known texts are from the hub or a package."""
    reasons: dict[str, str] = Field(default_factory=dict)
    """Reasons why `texts`, `margin` or `agreement` are missing."""

    def without_texts(self) -> DecisionsRecord:
        """Return a copy of the record without the texts of documents and of models."""
        empty: dict[str, Any] = {"question": None, "choices": (), "answer": None, "text": None}
        documents = tuple(document.model_copy(update=empty) for document in self.documents)
        runs = tuple(run.without_texts() for run in self.runs)
        reasons = {**self.reasons, "texts": PRIVATE_TEXTS}
        return self.model_copy(update={"documents": documents, "runs": runs, "reasons": reasons})
