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
    """Return a dict from column names to the field and the part (value or bound) of an estimate."""
    return {name: (field, part) for name, part in zip(names, ("value", "low", "high"), strict=True)}


class EstimatesRecord(Record):
    """Base class of records with estimates; `FLAT` names their table columns."""

    FLAT: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """Name in data frames, in trackers and in records of former versions → the estimate's field,
    and its part."""

    @model_validator(mode="before")
    @classmethod
    def _read_flat(cls, fields: object) -> object:
        """Convert estimates that former versions stored as separate value and bound fields."""
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
        """Return the value with this column name or field name; None if it is undefined."""
        field, part = self.FLAT.get(name, (name, ""))
        value = getattr(self, field, None)
        figure: float | None = getattr(value, part) if part else value
        return figure


class FiguresRecord(EstimatesRecord):
    """Base class of records that store the reason for each undefined value."""

    NOTES: ClassVar[Mapping[str, str]] = {"provenance": "mismatch"}
    """Name in data frames, in trackers and in `reasons` of former versions → the field."""

    reasons: dict[str, str] = Field(default_factory=dict)
    """Name of a field, proxy, metric or interval end → the reason why it is undefined."""
    mismatch: str | None = Field(None, exclude_if=lambda text: text is None)
    """Differences between versions or devices of parts of the measurement; None if none."""

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
        """The reason for each undefined value, by the value's name; also other notes."""
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
    """The change, in addition to the layers that every run of the cell lacks."""

    @model_validator(mode="before")
    @classmethod
    def _read_former_fields(cls, fields: object) -> object:
        """Build the field `change` from the separate fields of former versions."""
        if not isinstance(fields, dict) or "change" in fields:
            return fields
        change = {name: fields[name] for name in CHANGE_COLUMNS if name in fields}
        return {name: fields[name] for name in fields if name not in change} | {"change": change}


class RunRecord(FiguresRecord, ChangeRecord):
    """Result of one run: the effect of one change of a model on one benchmark.

    Every accuracy drop is relative to the intact model. Extra fields contain proxies of the changed
    layer or part.
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
    """The ablation's name, e.g. `layer:3`; includes the layers that every run of the cell lacks."""
    n: int
    """Number of documents behind the figures."""
    clusters: float | None = Field(None, exclude_if=lambda count: count is None)
    """Effective number of clusters, lower if their weights differ; None if documents are
    independent."""
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
    choice_drop: Estimate = Estimate(None)
    """Mean probability of the gold option among its document's options (the softmax of their
    log-likelihoods), baseline minus ablated. Undefined without options."""
    gold_drop: Estimate = Estimate(None)
    """Mean log-probability of the gold answer, baseline minus ablated, in nats. A document of a
    corpus or a rolling task has no gold answer; the whole text's log-probability is used."""
    options_drop: Estimate = Estimate(None)
    """Mean log of the summed probability of a document's options, baseline minus ablated, in nats:
    the part of `gold_drop` that all options share. The rest moves to the other options."""
    metrics: dict[str, float | None]
    """Every metric of the benchmark, under lm-eval's names, under the ablation."""

    @property
    def units(self) -> float:
        """Number of independent units behind the intervals: clusters, or else documents."""
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
    """Upper end of the confidence sequence of the drop over all documents; `low` is the lower."""
    open: bool
    """True if the run is not decided yet."""
    chosen: bool
    """True if the run is in the requested set; for `sign`, if its drop is not 0."""


class AnswerRecord(Record):
    """Result of the stopping rule (`until`) for all runs, with the cost of the measurement."""

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
        """True if the stopping rule has decided about every run."""
        return not any(run.open for run in self.runs)


class CorrelationRecord(EstimatesRecord):
    """Correlation between one proxy and the measured drops."""

    FLAT: ClassVar = {n: ("estimate", n) for n in ("value", "low", "high", "p_value", "reason")}

    proxy: str
    """The proxy's name, e.g. `cosine_score`."""
    coefficient: Literal["spearman", "kendall", "pearson"]
    subset: Literal["all", "inner"]
    """The correlated layers: all layers, or all but the first two and the last two."""
    sample: str = "layer"
    """The parts that are correlated, e.g. `head` or `int4 linear` (`Change.sample`)."""
    within_layers: bool = False
    """True if the p-value permutes the parts of each layer."""
    estimate: Estimate
    """The coefficient. Its interval comes from resampling documents. Its p-value is two-sided,
    against unrelated series that are equally smooth over depth."""
    n: int
    """Number of layers or parts."""
    documents: int

    @model_validator(mode="before")
    @classmethod
    def _add_sample(cls, fields: Any) -> Any:
        """Add the field `sample` to a record of a former version."""
        if isinstance(fields, dict) and fields.get("proxy") in ("expert_saliency", "routed_share"):
            return {"sample": "expert", "within_layers": True, **fields}
        return fields


def view_name(removed: Sequence[int], selection: str, metric: str, primary_metric: str) -> str:
    """Build a name such as `without-3-17--acc_norm` from removed layers and metric."""
    prefix = "-".join(["without", *map(str, removed)]) if removed else INTACT_VIEW
    return f"{prefix}{selection}" + ("" if metric == primary_metric else f"--{metric}")


INTACT_VIEW = "intact"
"""The view of the whole model by the benchmark's own metric, on all documents."""


class CellRecord(FiguresRecord):
    """Results of one model on one benchmark: the intact model and all ablation runs."""

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
    cluster: SafeText | None = Field(None, exclude_if=lambda column: column is None)
    """The column whose value dependent documents share; None if documents are independent."""
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
    view: str
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
    outcome_seconds: float | None = None
    """Mean measuring time of one document under one ablation, in seconds; None if unknown."""
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
        """The display name with model, benchmark and settings, including the document selection."""
        return " · ".join(filter(None, (self.heading, self.sampling_text, self.beside, self.apart)))

    @property
    def heading(self) -> str:
        """The display name with model, benchmark and settings, without the document selection."""
        name = f"{self.model.name} · {self.benchmark.title} · {self.benchmark.num_fewshot}-shot"
        return " · ".join(filter(None, (name, self.other_metric, self.removed_text)))

    @property
    def sampling_text(self) -> str:
        """A text on how documents were sampled; empty if no documents were drawn at random.

        An example is `drawn at random (seed 1234)`.
        """
        seed = self.answer.seed if self.answer and self.is_raced else self.sample_seed
        text = "" if seed is None else f"drawn at random (seed {seed})"
        stop = "stopped at an answer" if self.is_stopped else ""
        clusters = f"clustered by {self.cluster}" if self.cluster else ""
        return ", ".join(filter(None, (text, stop, clusters)))

    @property
    def documents_text(self) -> str:
        """The documents in words, e.g. `200 documents drawn at random (seed 1234)`."""
        return self.describe_documents(self.counted)

    def describe_documents(self, count: str) -> str:
        """Return a text such as `200 documents drawn at random (seed 1234)`, with a given count."""
        noun = "document" if count == "1" else "documents"
        return " ".join(filter(None, (count, noun, self.sampling_text)))

    @property
    def counted(self) -> str:
        """The number of documents per run, e.g. `200`, or `64 to 320` if the runs differ."""
        largest = max([self.n, *(run.n for run in self.runs)])
        return f"{self.n:,}" if largest == self.n else f"{self.n:,} to {largest:,}"

    @property
    def other_metric(self) -> str:
        """The name of the metric; empty if it is the benchmark's primary metric."""
        return "" if self.metric == self.benchmark.primary_metric else self.metric

    @property
    def removed_text(self) -> str:
        """The layers removed in every run, e.g. `without layers 3, 17`; empty if there are none."""
        if not self.removed:
            return ""
        plural = "s" if len(self.removed) > 1 else ""
        return f"without layer{plural} {', '.join(map(str, self.removed))}"

    @property
    def record_key(self) -> RecordKey:
        """The record's unique key: hash of the settings, view name and number of documents."""
        return (self.key, self.view, self.n)

    def contains(self, other: CellRecord) -> bool:
        """Return whether the record contains all documents and runs of another record.

        If the other record is unfinished, only the numbers of documents are compared.
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
        """True if the stopping rule (`until`) decided the number of documents of each run.

        The intervals of the drops are then confidence sequences.
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
        """The changes (e.g. `layer:3`) of all requested runs, measured or not, sorted."""
        changes = (*(run.change for run in self.runs), *self.missing)
        return sorted(changes)

    @property
    def kinds(self) -> list[Change]:
        """The kinds of changes (e.g. removing one layer) in the requested runs."""
        return list(dict.fromkeys(change.kind for change in self.changes))

    def runs_of_kind(self, kind: Change = WHOLE_LAYER) -> dict[int, RunRecord]:
        """Return the measured runs of one kind of change, by their first changed layer."""
        return {run.change.layer: run for run in self.runs if run.change.kind == kind}

    def absence_reason(self, change: Change) -> str:
        """Return the reason why the record has no run with this change."""
        if {*self.removed} & {*change.layers}:
            return "removed already, beneath every run"
        return RUN_NOT_MEASURED if change in self.missing else "not asked for"

    def reason_of(self, field: str, run: RunRecord | None = None) -> str:
        """Return the reason why a value of a run, or of the whole record, is undefined.

        The result is `NO_REASON` if no reason is known.
        """
        for reasons in (run.all_reasons if run else {}, self.all_reasons):
            if reason := reasons.get(field) or reasons.get(f"metrics.{field}"):
                return reason
        return NO_REASON


def first_layers(kind: Change, *cells: CellRecord) -> list[int]:
    """List the first layer of each requested change of one kind in the given records."""
    changes = (change for cell in cells for change in cell.changes)
    return sorted({change.layer for change in changes if change.kind == kind})


PRIVATE_TEXTS = (
    "the texts of your own task are not uploaded (use --publish-documents to upload them)"
)


class ShownDocument(Record):
    """A document whose score changes in some run, with the intact model's response."""

    task: str
    doc: int
    """The document's position in the task's split, 0-based."""
    question: SafeText | None
    """The question; None where the text is unknown or private."""
    choices: tuple[SafeText, ...]
    answer: SafeText | None
    """The gold answer where there are no options."""
    gold: int | None
    choice: int | None
    """The option that the intact model chooses, 0-based."""
    margin: float | None
    text: SafeText | None
    """The text that the intact model generates."""


class DecidedDocument(Record):
    """The ablated model's response to a document with a changed score."""

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
    """Numbers and examples of documents with changed scores in one run."""

    run: Change
    lost: int
    """Number of documents on which the run does worse than the intact model."""
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
    """Number of lost documents of which the limit ends more texts than with the intact model."""

    def without_texts(self) -> RunDecisions:
        """Return a copy of the record without the texts that models generated."""
        documents = tuple(document.model_copy(update={"text": None}) for document in self.named)
        return self.model_copy(update={"named": documents})


class DecisionsRecord(Record):
    """The documents with changed scores, for one model and benchmark."""

    n: int
    """Number of documents."""
    right: int
    """Number of correct answers of the intact model; 0 for metrics without correct answers."""
    margins: Quartiles | None
    """Quartiles of the intact model's margins: gold option minus the best other option."""
    options: tuple[float, ...]
    gold: tuple[float, ...]
    """Frequency with which each option is the gold option."""
    documents: tuple[ShownDocument, ...]
    """The documents that at least one run lists in `named`."""
    runs: tuple[RunDecisions, ...]
    compared: tuple[int, ...]
    """The removed whole layers whose lost documents `both` compares in pairs."""
    both: tuple[tuple[int, ...], ...]
    cut: float | None = Field(None, exclude_if=lambda cut: cut is None)
    """Share of the intact model's texts that the token limit ended; None if unknown."""
    public: bool
    """True if every known text comes from the hub or a package."""
    reasons: dict[str, str] = Field(default_factory=dict)
    """Reasons why `texts`, `margin` or `agreement` are missing."""

    def without_texts(self) -> DecisionsRecord:
        """Return a copy of the record without the texts of documents and of models."""
        empty: dict[str, Any] = {"question": None, "choices": (), "answer": None, "text": None}
        documents = tuple(document.model_copy(update=empty) for document in self.documents)
        runs = tuple(run.without_texts() for run in self.runs)
        reasons = {**self.reasons, "texts": PRIVATE_TEXTS}
        return self.model_copy(update={"documents": documents, "runs": runs, "reasons": reasons})
