"""Define the frozen records of cells, runs and correlations.

Values are fractions, never percentage points; `layer` is 0-based. An undefined value is `None`. Its
reason is in the estimate itself, or else in the record's `reasons` under the field's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from operator import itemgetter
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from tracker.core.changes import COLUMNS, WHOLE_LAYER, Change
from tracker.core.estimates import Estimate
from tracker.core.identities import BenchmarkIdentity, ModelIdentity, Record, Shown


def utc(date: str) -> str:
    """Return a date in UTC, ISO 8601 to the second; raise ValueError if it is invalid."""
    try:
        return datetime.fromisoformat(date).astimezone(UTC).isoformat(timespec="seconds")
    except OverflowError as error:
        raise ValueError(f"{date} is no date") from error


Place = tuple[str, str, int]
"""Key of a record: the cell, its view and the number of documents."""
NO_REASON = "no reason was recorded"
NOT_MEASURED = "not measured yet"


def flat_names(field: str, *names: str) -> dict[str, tuple[str, str]]:
    """Return entries of `EstimatesRecord.FLAT` for an estimate's value and interval."""
    return {name: (field, part) for name, part in zip(names, ("value", "low", "high"), strict=True)}


class EstimatesRecord(Record):
    """Record of estimates, with flat names for their parts."""

    FLAT: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """Name in data frames, in trackers and in records of former versions → the estimate's field,
    and its part."""

    @model_validator(mode="before")
    @classmethod
    def _read_flat(cls, fields: object) -> object:
        """Convert the flat parts of estimates of former versions to estimates."""
        if not isinstance(fields, dict):
            return fields
        read, reasons = dict(fields), fields.get("reasons")
        for name, (field, part) in cls.FLAT.items():
            if name not in read or isinstance(read[name], dict | Estimate):
                continue
            estimate = read.get(field)
            parts = {**(estimate if isinstance(estimate, dict) else {}), part: read.pop(name)}
            if part == "value" and isinstance(reasons, dict) and name in reasons:
                parts["reason"] = reasons[name]
                read["reasons"] = reasons = {n: why for n, why in reasons.items() if n != name}
            read[field] = parts
        return read

    def figure(self, name: str) -> float | None:
        """Return a figure by its displayed name; None if it is undefined."""
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
    """Differences between the versions and devices that measured it; None if there are none."""

    @model_validator(mode="before")
    @classmethod
    def _of_former_reasons(cls, fields: object) -> object:
        """Move the notes that former versions stored as reasons to their fields."""
        if not isinstance(fields, dict) or not isinstance(reasons := fields.get("reasons"), dict):
            return fields
        notes = {cls.NOTES[name]: why for name, why in reasons.items() if name in cls.NOTES}
        reasons = {name: why for name, why in reasons.items() if name not in cls.NOTES}
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
        return {name: why for name, why in {**reasons, **self.reasons, **notes}.items() if why}


class ChangeRecord(Record):
    """Figures of one change."""

    change: Change
    """The change, in addition to the layers that the whole cell lacks."""

    @model_validator(mode="before")
    @classmethod
    def _of_former_version(cls, fields: object) -> object:
        """Convert the flat parts of a change of former versions to a change."""
        if not isinstance(fields, dict) or "change" in fields:
            return fields
        change = {name: fields[name] for name in COLUMNS if name in fields}
        return {name: fields[name] for name in fields if name not in change} | {"change": change}


class RunRecord(FiguresRecord, ChangeRecord):
    """One run: the effect of its change on one benchmark.

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
    """The ablation's name, e.g. `layer:3`; it names the layers that the whole cell lacks too."""
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
    """Documents whose judgement is within rounding, so that an equivalent computation may reverse
    it. None in single precision, where that is not measured."""
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
    """Answer for one run; its bounds hold for all interim analyses and runs together."""

    n: int
    """Number of documents used until the run was decided."""
    low: float
    high: float
    """Upper end of the confidence sequence of its drop over all documents; `low` is the lower."""
    open: bool
    """True if the run is not decided yet."""
    chosen: bool
    """True if it is in the requested set; for `sign`, if its drop is not 0."""


class AnswerRecord(Record):
    """Answer to a cell's question, and its cost."""

    question: str
    level: float
    """The probability that the answer is right, and that all bounds hold together."""
    seed: int
    """The seed of the random order of the documents."""
    looked: int
    """Number of documents used, from the beginning of the order."""
    measured: int
    """Number of documents measured for that; more for a group, whose tasks are measured in separate
    blocks."""
    population: int
    """Number of all documents of the benchmark."""
    over: bool
    """True if measuring has ended: with an answer, or because no documents are left."""
    passes: int
    """Passes of a document through a layer so far, including the intact model's."""
    passes_of: int
    """Passes of a document through a layer for all documents and runs."""
    runs: tuple[RunAnswer, ...]

    @property
    def answered(self) -> bool:
        """True if no run is open."""
        return not any(run.open for run in self.runs)


class CorrelationRecord(EstimatesRecord):
    """Correlation of one proxy with the measured drops of single whole layers."""

    FLAT: ClassVar = {
        part: ("estimate", part) for part in ("value", "low", "high", "p_value", "reason")
    }

    proxy: str
    """Its name, e.g. `cosine_score`."""
    coefficient: Literal["spearman", "kendall", "pearson"]
    subset: Literal["all", "inner"]
    """The layers: all of them, or all but the first two and the last two."""
    estimate: Estimate
    """The coefficient. Its interval comes from resampling documents. Its p-value is two-sided,
    against unrelated series that are equally smooth over depth."""
    n: int
    """Number of layers."""
    documents: int


def view_name(removed: Sequence[int], selection: str, metric: str, primary_metric: str) -> str:
    """Return a view's name from its removed layers, its documents and its metric."""
    name = "-".join(["without", *map(str, removed)]) if removed else INTACT_VIEW
    return f"{name}{selection}" + ("" if metric == primary_metric else f"--{metric}")


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
    """Reason why no saved checkpoint holds the measured model; None if one does."""
    sample_seed: int | None = None
    """The seed of randomly drawn documents; None for the first ones, or all."""
    beside: str = Field("", exclude_if=lambda text: not text)
    """Distinction from other views of the cell for display, e.g. `64 documents`."""
    supersedes: tuple[str, ...] = Field((), exclude=True)
    """Names of the views that it replaces, wherever they are tracked."""
    apart: Shown = Field("", exclude_if=lambda text: not text)
    """Distinction from published cells with the same title; usually empty."""
    tokens: int
    """Tokens behind the proxies: each document's context and gold continuation, once; of a corpus
    or a rolling task the predicted tokens, without the last of a full window, which is not read."""
    baseline: Estimate = Estimate(None)
    """The intact model's accuracy, or loss."""
    baseline_rounded: int | None = Field(None, exclude_if=lambda count: count is None)
    """Documents whose judgement is within rounding, as `RunRecord.rounded`."""
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
    """True if a run requested it, and not only a study or a search."""
    remaining: Estimate = Estimate(None)
    """The metric with only `removed` taken out; undefined if `removed` is empty."""
    runs: tuple[RunRecord, ...]
    """The measured runs: components outermost, then spans, then layers."""
    answer: AnswerRecord | None = Field(None, exclude_if=lambda answer: answer is None)
    """The answer to its question; None if there is no question."""
    correlations: tuple[CorrelationRecord, ...]
    """Correlations over the runs that remove one whole layer; empty without such runs."""
    missing: tuple[Change, ...]
    """Requested runs that are not measured yet."""
    fitted_on: Shown | None = Field(None, exclude_if=lambda text: text is None)
    """The text on which replacements of layers were fitted; None if no run has one."""
    provenance: dict[str, Shown]
    """Package versions, machine and device of the outcomes; values that differ are all listed."""
    seconds: float | None = None
    """Measuring time of all processes together, in seconds; None if unknown."""
    peak_bytes: int | None = None
    """Peak memory of a process: the accelerator's, else its own; None if unknown."""
    measured: Annotated[str, AfterValidator(utc)] | None = Field(
        None, exclude_if=lambda when: when is None
    )
    """Time of the last measured outcome (UTC, ISO 8601); None if unknown."""
    compared: int = 0
    """Number of responses, on random documents, repeated with a really pruned model."""
    compared_difference: float | None = None
    """The largest difference of a log-likelihood among them, in nats."""
    compared_unsteady: int = 0
    """Number of them that differ by more than rounding since the model is discontinuous."""

    @property
    def title(self) -> str:
        """The cell's name for display, with the choice of its documents."""
        return " · ".join(filter(None, (self.heading, self.drawn, self.beside, self.apart)))

    @property
    def heading(self) -> str:
        """The cell's name for display, without the choice of its documents."""
        name = f"{self.model.name} · {self.benchmark.title} · {self.benchmark.num_fewshot}-shot"
        return " · ".join(filter(None, (name, self.other_metric, self.beneath)))

    @property
    def drawn(self) -> str:
        """The random choice of the documents; empty for the first ones, or all.

        For example `drawn at random (seed 1234)`.
        """
        seed = self.answer.seed if self.answer and self.is_raced else self.sample_seed
        drawn = "" if seed is None else f"drawn at random (seed {seed})"
        return f"{drawn}, stopped at an answer" if self.is_stopped else drawn

    @property
    def documents(self) -> str:
        """The measured documents, e.g. `200 documents drawn at random (seed 1234)`."""
        return self.documents_of(self.counted)

    def documents_of(self, count: str) -> str:
        """Describe this number of documents in the same form as `documents`."""
        noun = "document" if count == "1" else "documents"
        return " ".join(filter(None, (count, noun, self.drawn)))

    @property
    def counted(self) -> str:
        """The number of documents of its runs, e.g. `200`, or `64 to 320` if they differ."""
        most = max([self.n, *(run.n for run in self.runs)])
        return f"{self.n:,}" if most == self.n else f"{self.n:,} to {most:,}"

    @property
    def other_metric(self) -> str:
        """The metric; empty if it is the benchmark's own."""
        return "" if self.metric == self.benchmark.primary_metric else self.metric

    @property
    def beneath(self) -> str:
        """The layers that every run lacks, e.g. `without layers 3, 17`; empty if none."""
        if not self.removed:
            return ""
        plural = "s" if len(self.removed) > 1 else ""
        return f"without layer{plural} {', '.join(map(str, self.removed))}"

    @property
    def place(self) -> Place:
        """The key among several records: the cell, its view and the number of documents."""
        return (self.key, self.view, self.n)

    def holds(self, other: CellRecord) -> bool:
        """Check whether it contains another record: its documents and all its runs.

        An unfinished record may hold any documents, not just the first ones.
        """
        if other.answer != self.answer:
            return False
        mine, theirs = (
            (one.key, one.removed, one.metric, one.sample_seed) for one in (self, other)
        )
        growing = other.unfinished is not None
        enough = self.n >= other.n if growing else self.n == other.n and self.unfinished is None
        changes = {run.change for run in self.runs}
        return mine == theirs and enough and changes >= {run.change for run in other.runs}

    @property
    def is_raced(self) -> bool:
        """True if an answer decides the number of documents of each run.

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
        return not self.lacks

    @property
    def lacks(self) -> tuple[str, ...]:
        """Requested documents and runs, by their labels, that are not measured yet."""
        documents = () if self.unfinished is None else (self.unfinished,)
        return (*documents, *(change.label() for change in self.missing))

    @property
    def whole_layers(self) -> tuple[RunRecord, ...]:
        """The runs that remove one whole layer."""
        return tuple(self.runs_of().values())

    @property
    def changes(self) -> list[Change]:
        """The changes, measured or missing: components outermost, then spans, then layers."""
        changes = (*(run.change for run in self.runs), *self.missing)
        return sorted(changes)

    @property
    def kinds(self) -> list[Change]:
        """The kinds of changes, measured or missing, in their order."""
        return list(dict.fromkeys(change.kind for change in self.changes))

    def runs_of(self, kind: Change = WHOLE_LAYER) -> dict[int, RunRecord]:
        """Return the measured runs of a kind: first layer → run."""
        return {run.change.layer: run for run in self.runs if run.change.kind == kind}

    def absence(self, change: Change) -> str:
        """Return the reason why a change has no record."""
        if {*self.removed} & {*change.layers}:
            return "removed already, beneath every run"
        return NOT_MEASURED if change in self.missing else "not asked for"

    def reason_of(self, field: str, run: RunRecord | None = None) -> str:
        """Return why a field or metric of a run, or of the cell if `run` is None, is undefined.

        The run's reason comes first, then the cell's, then `NO_REASON`.
        """
        for reasons in (run.all_reasons if run else {}, self.all_reasons):
            found = reasons.get(field) or reasons.get(f"metrics.{field}")
            if found:
                return found
        return NO_REASON


def former_view_name(
    removed: Sequence[int], metric: str, benchmark: BenchmarkIdentity, seed: int | None, beside: str
) -> str:
    """Return the name that former versions gave to a view."""
    selection = "" if seed is None else f"-sample-{seed}"
    if beside:
        selection += f"-{beside.replace(' ', '-')}"
    return view_name(removed, selection, metric, benchmark.primary_metric)


def layers_of(kind: Change, *cells: CellRecord) -> list[int]:
    """List the first layers of the changes of a kind in some cells, measured or missing."""
    changes = (change for cell in cells for change in cell.changes)
    return sorted({change.layer for change in changes if change.kind == kind})
