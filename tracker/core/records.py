"""The frozen records that every part of tracker exchanges.

Fractions, never percentage points; `layer` is 0-based. A value that is not defined is `None`. Why,
the estimate itself says, or else the record's `reasons` under the name of the field.
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
    """Write a date as all are written, to the second; ValueError if it is none."""
    try:
        return datetime.fromisoformat(date).astimezone(UTC).isoformat(timespec="seconds")
    except OverflowError as error:
        raise ValueError(f"{date} is no date") from error


Place = tuple[str, str, int]
"""What several records are told apart by: the cell, the view of it, how many documents."""
NO_REASON = "no reason was recorded"
NOT_MEASURED = "not measured yet"


def flat_names(field: str, *names: str) -> dict[str, tuple[str, str]]:
    """Name the value of an estimate, and both ends of its interval, for `EstimatesRecord.FLAT`."""
    return {name: (field, part) for name, part in zip(names, ("value", "low", "high"), strict=True)}


class EstimatesRecord(Record):
    """Estimates, with names for their parts where they are shown or stored one by one."""

    FLAT: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """Name in data frames, in trackers and in records of former versions → the field that holds the
    estimate, and which part of it."""

    @model_validator(mode="before")
    @classmethod
    def _read_flat(cls, fields: object) -> object:
        """Gather the parts of estimates that a former version wrote one by one."""
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
        """Find a figure by its name where it is shown; None where it is undefined."""
        field, part = self.FLAT.get(name, (name, ""))
        value = getattr(self, field, None)
        figure: float | None = getattr(value, part) if part else value
        return figure


class FiguresRecord(EstimatesRecord):
    """Figures, and why some of them are undefined."""

    NOTES: ClassVar[Mapping[str, str]] = {"provenance": "mismatch"}
    """Name in data frames, in trackers and in `reasons` of former versions → the field."""

    reasons: dict[str, str] = Field(default_factory=dict)
    """Field, or name of a proxy, a metric or the end of an interval → why it is undefined."""
    mismatch: str | None = Field(None, exclude_if=lambda text: text is None)
    """Differences between the versions and devices that measured it; None where there are none."""

    @model_validator(mode="before")
    @classmethod
    def _of_former_reasons(cls, fields: object) -> object:
        """Read the notes where a former version kept them among the reasons."""
        if not isinstance(fields, dict) or not isinstance(reasons := fields.get("reasons"), dict):
            return fields
        notes = {cls.NOTES[name]: why for name, why in reasons.items() if name in cls.NOTES}
        reasons = {name: why for name, why in reasons.items() if name not in cls.NOTES}
        return fields | notes | {"reasons": reasons}

    @property
    def all_reasons(self) -> dict[str, str]:
        """Why figures are undefined, and notes, by the names under which they are shown."""
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
    """What is changed, besides the layers that the whole cell lacks."""

    @model_validator(mode="before")
    @classmethod
    def _of_former_version(cls, fields: object) -> object:
        """Read the change where a former version wrote its parts one by one."""
        if not isinstance(fields, dict) or "change" in fields:
            return fields
        change = {name: fields[name] for name in COLUMNS if name in fields}
        return {name: fields[name] for name in fields if name not in change} | {"change": change}


class RunRecord(FiguresRecord, ChangeRecord):
    """One run: what its removal did to the model on one benchmark.

    Every drop is relative to the intact model, also where the whole cell lacks layers: it holds
    what these cost too. What else it has are proxies, each by its name: those of the layer in the
    intact model, of whole single layers only.
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
    """Documents that the figures rest on."""
    accuracy: float | None
    """The cell's metric under the ablation."""
    drop: Estimate
    """Baseline minus ablated, or ablated minus baseline where lower is better; positive = what was
    removed mattered. Its p-value is McNemar's, exact."""
    drop_sd: float | None = None
    """Standard deviation of the documents' own drops: how many of them reveal a smaller drop."""
    accuracy_relevance: float | None
    """Share of the accuracy above chance that is lost; None where lower is better."""
    rounded: int | None = Field(None, exclude_if=lambda count: count is None)
    """Documents whose judgement is within rounding: another way of computing the same model may
    turn it round. None in single precision, where that is not measured."""
    drop_rounding: float | None = Field(None, exclude_if=lambda moved: moved is None)
    """By how much that moves `drop` on these documents, up or down, in 95 of 100 cases."""
    gold_drop: Estimate = Estimate(None)
    """Mean log-probability of the gold answer, baseline minus ablated, in nats. A document of a
    corpus or a rolling task has no gold answer: the whole text's log-probability stands for it."""
    options_drop: Estimate = Estimate(None)
    """Mean log of the summed probability of a document's options, baseline minus ablated, in nats:
    the part of `gold_drop` that all options lose alike. What is left of it is lost to the other
    options."""
    metrics: dict[str, float | None]
    """Every metric of the benchmark, under lm-eval's names, under the ablation."""

    @property
    def cosine_score(self) -> float | None:
        """The proxy that the field uses, which pages set beside every drop."""
        return self.__pydantic_extra__.get("cosine_score")


class RunAnswer(ChangeRecord):
    """What the looks at a cell say of one run, all of them and of all runs together."""

    n: int
    """Documents that were looked at until its part was settled."""
    low: float
    high: float
    """Both ends of the confidence sequence of its accuracy drop, over all documents there are."""
    open: bool
    """Whether its part of the answer is not settled."""
    chosen: bool
    """Whether it is in the set that is asked for; of `sign`, whether its drop is not 0."""


class AnswerRecord(Record):
    """What a cell answers to the question that it was measured for, and what that took."""

    question: str
    level: float
    """The probability with which the answer is right, and that with which all bounds hold."""
    seed: int
    """Of the random order of the documents."""
    looked: int
    """Documents that were looked at, from the beginning of the order."""
    measured: int
    """Documents that had to be measured for that: of a group more, since its tasks are measured in
    blocks of their own."""
    population: int
    """Documents that there are."""
    over: bool
    """Whether nothing more is to be measured: it is answered, or there are no more documents."""
    passes: int
    """Passes of a document through a layer that this took, the intact model's with them."""
    passes_of: int
    """How many all documents take under all runs."""
    runs: tuple[RunAnswer, ...]

    @property
    def answered(self) -> bool:
        """Whether no run is open."""
        return not any(run.open for run in self.runs)


class CorrelationRecord(EstimatesRecord):
    """How well one proxy ranks the whole single layers by the accuracy that they really cost."""

    FLAT: ClassVar = {
        part: ("estimate", part) for part in ("value", "low", "high", "p_value", "reason")
    }

    proxy: str
    """Its name, e.g. `cosine_score`."""
    coefficient: Literal["spearman", "kendall", "pearson"]
    subset: Literal["all", "inner"]
    """Which layers: all of them, or all but the first two and the last two."""
    estimate: Estimate
    """The interval is from resampling the documents. The p-value is two-sided, against series that
    are as smooth over depth but unrelated."""
    n: int
    """Layers."""
    documents: int


def view_name(removed: Sequence[int], selection: str, metric: str, primary_metric: str) -> str:
    """Return the name of a view without these layers, on a selection of documents."""
    name = "-".join(["without", *map(str, removed)]) if removed else INTACT_VIEW
    return f"{name}{selection}" + ("" if metric == primary_metric else f"--{metric}")


INTACT_VIEW = "intact"
"""The view of the whole model by the benchmark's own metric, on all documents."""
_FORMER_VIEW = itemgetter("removed", "metric", "benchmark", "sample_seed", "beside")
"""What names the view of a record of a former version, which did not keep the name."""


class CellRecord(FiguresRecord):
    """One (model, benchmark), as it is or without some layers: everything that its outcomes say."""

    FLAT: ClassVar = {
        **flat_names("baseline", "baseline_accuracy", "baseline_low", "baseline_high"),
        **flat_names("remaining", "removed_accuracy", "removed_low", "removed_high"),
    }
    NOTES: ClassVar = {"n": "unfinished", "provenance": "mismatch", "checkpoint": "unsaved"}

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
    unfinished: str | None = Field(None, exclude_if=lambda text: text is None)
    """Why fewer documents are measured than were asked for; None where all are."""
    unsaved: str | None = Field(None, exclude_if=lambda text: text is None)
    """Why no saved checkpoint holds the model that was measured; None where one does."""
    sample_seed: int | None = None
    """The seed with which they were drawn at random; None where they are the first ones, or all."""
    beside: str = Field("", exclude_if=lambda text: not text)
    """What distinguishes it from other views of the cell, for display, e.g. `64 documents`."""
    supersedes: tuple[str, ...] = Field((), exclude=True)
    """Names of the views whose place it has taken, wherever they are tracked."""
    apart: Shown = Field("", exclude_if=lambda text: not text)
    """What tells it, where it is published, from others that read the same; mostly nothing."""
    tokens: int
    """Tokens behind the proxies: each document's context and gold continuation, once; of a corpus
    or a rolling task the predicted tokens, without the last of a full window, which is not read."""
    baseline: Estimate = Estimate(None)
    """The intact model's accuracy, or loss."""
    baseline_rounded: int | None = Field(None, exclude_if=lambda count: count is None)
    """Documents whose judgement is within rounding, as `RunRecord.rounded`."""
    baseline_rounding: float | None = Field(None, exclude_if=lambda moved: moved is None)
    """By how much that moves `baseline`, as `RunRecord.drop_rounding`."""
    chance_accuracy: float | None
    """Expected accuracy of a random predictor; None while nothing is measured, and where lower is
    better."""
    baseline_metrics: dict[str, float | None]
    baseline_options_logprob: float | None = None
    """Mean log of the summed probability of a document's options, in nats; None without options."""
    removed: tuple[int, ...] = ()
    """Layers that are removed as a whole beneath every run, ascending; the baseline has them."""
    view: str = Field(default_factory=lambda fields: former_view_name(*_FORMER_VIEW(fields)))
    """The name of the view that it shows."""
    explicit: bool = Field(False, exclude_if=lambda explicit: not explicit)
    """Whether a run requested it, and not only a study or a search."""
    remaining: Estimate = Estimate(None)
    """The metric with `removed` alone taken out; undefined where nothing is removed beneath."""
    runs: tuple[RunRecord, ...]
    """Components outermost, then spans, then layers."""
    answer: AnswerRecord | None = Field(None, exclude_if=lambda answer: answer is None)
    """What it was measured for; None where that was all of its documents."""
    correlations: tuple[CorrelationRecord, ...]
    """Over the runs that remove one whole layer; none where there is no such run."""
    missing: tuple[Change, ...]
    """Runs that are part of what was asked for and are not measured yet."""
    fitted_on: Shown | None = Field(None, exclude_if=lambda text: text is None)
    """What the stand-ins of layers were fitted on; None where no run has one."""
    provenance: dict[str, Shown]
    """Package versions, machine and device that measured the outcomes; where they differ, each."""
    seconds: float | None = None
    """What measuring the outcomes took, of all processes together; None where none says."""
    peak_bytes: int | None = None
    """The most memory a process has held by then: the accelerator's, else its own; None unknown."""
    measured: Annotated[str, AfterValidator(utc)] | None = Field(
        None, exclude_if=lambda when: when is None
    )
    """When the last of its outcomes was measured (UTC, ISO 8601); None where none says."""
    compared: int = 0
    """Answers to documents drawn at random that were asked again on a really pruned model."""
    compared_difference: float | None = None
    """The largest difference of a log-likelihood among them, in nats."""
    compared_unsteady: int = 0
    """How many of them differ by more than rounding because the model itself is discontinuous."""

    @property
    def title(self) -> str:
        """The cell's name where people read it, with how its documents were chosen."""
        return " · ".join(filter(None, (self.heading, self.drawn, self.beside, self.apart)))

    @property
    def heading(self) -> str:
        """The cell's name beside which it is said on which documents it was measured."""
        name = f"{self.model.name} · {self.benchmark.title} · {self.benchmark.num_fewshot}-shot"
        return " · ".join(filter(None, (name, self.other_metric, self.beneath)))

    @property
    def drawn(self) -> str:
        """How the documents were chosen, where it was at random; empty for the first ones, or all.

        For example `drawn at random (seed 1234)`.
        """
        seed = self.answer.seed if self.answer and self.is_raced else self.sample_seed
        drawn = "" if seed is None else f"drawn at random (seed {seed})"
        return f"{drawn}, stopped at an answer" if self.is_stopped else drawn

    @property
    def documents(self) -> str:
        """What it was measured on, e.g. `200 documents drawn at random (seed 1234)`."""
        return self.documents_of(self.counted)

    def documents_of(self, count: str) -> str:
        """Say the same of so many documents."""
        noun = "document" if count == "1" else "documents"
        return " ".join(filter(None, (count, noun, self.drawn)))

    @property
    def counted(self) -> str:
        """How many documents its runs rest on, e.g. `200`, or `64 to 320` where they differ."""
        most = max([self.n, *(run.n for run in self.runs)])
        return f"{self.n:,}" if most == self.n else f"{self.n:,} to {most:,}"

    @property
    def other_metric(self) -> str:
        """The metric; empty where it is the benchmark's own, which goes without saying."""
        return "" if self.metric == self.benchmark.primary_metric else self.metric

    @property
    def beneath(self) -> str:
        """What lies beneath every run, e.g. `without layers 3, 17`; empty for the intact model."""
        if not self.removed:
            return ""
        plural = "s" if len(self.removed) > 1 else ""
        return f"without layer{plural} {', '.join(map(str, self.removed))}"

    @property
    def place(self) -> Place:
        """What several records are told apart by: the cell, the view of it, how many documents."""
        return (self.key, self.view, self.n)

    def holds(self, other: CellRecord) -> bool:
        """Whether it shows all that another record does: as many documents, and every run.

        Documents that are not yet as many as were asked for are any, not the first ones.
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
        """Whether an answer decides how many documents each run has: then one look’s intervals are
        left out, and those of drops are confidence sequences."""
        return self.answer is not None and self.unfinished is not None

    @property
    def is_stopped(self) -> bool:
        """Whether an answer ended it before its documents did."""
        return self.answer is not None and self.answer.over and self.is_raced

    @property
    def is_complete(self) -> bool:
        """Whether every run and every document that was asked for is measured."""
        return not self.lacks

    @property
    def lacks(self) -> tuple[str, ...]:
        """What was asked for and is not measured yet: documents, and runs by their labels."""
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
        """Find the measured runs of a kind: first layer → run."""
        return {run.change.layer: run for run in self.runs if run.change.kind == kind}

    def absence(self, change: Change) -> str:
        """Return why there is no record of a change."""
        if {*self.removed} & {*change.layers}:
            return "removed already, beneath every run"
        return NOT_MEASURED if change in self.missing else "not asked for"

    def reason_of(self, field: str, run: RunRecord | None = None) -> str:
        """Say why a field or metric of a run, or of the cell where `run` is None, is undefined.

        The reason recorded for the run, else for the cell, else that there is none.
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
    """List the layers that the changes of a kind start from in some cells, measured or missing."""
    changes = (change for cell in cells for change in cell.changes)
    return sorted({change.layer for change in changes if change.kind == kind})
