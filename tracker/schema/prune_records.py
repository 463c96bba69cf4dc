"""Define the records of a pruning search: the removed parts at each step, and the cost.

Values are stored as fractions or nats. An undefined value is `None`; the step's field `reasons`
explains why.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from tracker.schema.estimates import Estimate
from tracker.schema.extent import Positive
from tracker.schema.fields import Layers
from tracker.schema.identities import BenchmarkIdentity, ModelIdentity, Record, SafeText
from tracker.schema.records import EstimatesRecord, RecordKey, flat_names
from tracker.schema.search_parts import MixedParts, SearchParts, SearchUnits

Rescoring = Literal["full", "lazy", "race"]
"""Method by which a greedy search scores its candidates again after each removal."""


class HeldOutResult(EstimatesRecord):
    """Result of the pruned or intact model on the test documents."""

    FLAT: ClassVar = {
        **flat_names("level", "accuracy", "low", "high"),
        **flat_names("lost", "drop", "drop_low", "drop_high"),
    }

    n: int
    level: Estimate
    """The benchmark's metric."""
    lost: Estimate = Estimate(None)
    """The decline of the metric relative to the intact model; positive = worse."""
    rounded: int | None = Field(None, exclude_if=lambda count: count is None)
    """Number of documents whose result rounding may reverse, as `RunRecord.rounded`."""


class PruneStep(EstimatesRecord):
    """One step of a search: the removed parts, their score, and the result on test documents."""

    FLAT: ClassVar = flat_names("margin", "margin", "margin_low", "margin_high")

    removed: Layers
    """All removed parts after the step, ascending: layers, or numbers of `SearchParts`."""
    layer: int | None = None
    """The removed part; None unless the step's set is the previous step's set plus one part."""
    score: float | None = None
    """The figure that the strategy minimised; None if the strategy minimises no figure."""
    runner_up: Layers = ()
    """The parts of the second-best candidate; empty if there was no other."""
    margin: Estimate = Estimate(None)
    """The runner-up's score minus the best score, on the calibration documents. The 95 % interval
    is simultaneous over all candidates of the step."""
    separates: int | None = None
    """Estimated number of calibration documents that would separate best and runner-up; None where
    they are separated already, or equal, so that no number separates them."""
    test: HeldOutResult | None = None
    parameters: int | None = Field(None, exclude_if=lambda count: count is None)
    """Number of parameters of the model after the step; None for heads, experts and neurons."""
    seconds: float | None = Field(None, exclude_if=lambda seconds: seconds is None)
    """Estimated seconds per token after the step: the intact model's time minus the times of the
    removed layers. None unless the requested amount is a time."""
    reasons: dict[str, str] = Field(default_factory=dict)


class CalibrationSet(Record):
    """The benchmark and documents with which a search chose the removed parts."""

    key: str
    """The cell's key in the ledger."""
    benchmark: SafeText
    metric: str
    n: int
    part: str | None = None
    """The part of the benchmark with the documents; None = the whole benchmark."""
    documents: dict[str, tuple[int, ...]]
    """Task → the documents' numbers in its split."""


class PruneCost(Record):
    """Cost of a pruning search without reused results."""

    evaluations: float
    """Number of scored sets of removals, including the intact model, each on all calibration
    documents. A loop over really pruned models needs as many evaluations."""
    passes: float
    """The engine's work; 1 = all calibration documents pass through the whole intact model."""
    seconds: float
    """The time of measuring, in seconds."""


class PruneRecord(Record):
    """Settings, steps and cost of one pruning search."""

    name: str
    """The unique name among the searches of a results folder."""
    model: ModelIdentity
    benchmark: BenchmarkIdentity
    """The benchmark of the test documents."""
    metric: str
    higher_is_better: bool = True
    part: str | None = None
    """The part of the benchmark with the test documents; None = the whole benchmark."""
    unit: SearchUnits = "layer"
    per_layer: Positive = Field(1, exclude_if=lambda count: count == 1)
    """Number of parts of a layer that has several: part n is number n % `per_layer` of layer
    n // `per_layer`."""
    per_layers: tuple[Positive, ...] = Field((), exclude_if=lambda counts: not counts)
    """`per_layer` of each of several units."""
    there: Positive | None = Field(None, exclude_if=lambda count: count is None)
    """Number of parts of the model, where a layer has several; else None."""
    strategy: str
    draw: Positive | None = None
    """Number of the random draw; None for strategies that do not draw."""
    rescoring: Rescoring = "full"
    amount: SafeText
    """The requested amount: `remove 8`, `keep 100M parameters`."""
    budget: SafeText | None = Field(None, exclude_if=lambda budget: budget is None)
    """The budget of accuracy, such as `lose at most 2pp`: test documents decide how many parts of
    the search's order are removed. None if the amount alone ends the search."""
    protected: Layers = ()
    """Layers that must not be removed."""
    among: Layers | None = None
    """The layers that may be removed; None = all."""
    at_least: dict[str, str] = Field(default_factory=dict)
    """Kind of layers → minimum number that stays: `2`, or `1 of 4` in any four in a row."""
    calibration: tuple[CalibrationSet, ...] = ()
    """The calibration benchmarks; empty where the strategy uses no documents."""
    steps: tuple[PruneStep, ...]
    baseline: HeldOutResult
    """The intact model on the test documents."""
    cost: PruneCost
    rests_on: tuple[RecordKey, ...] = ()
    """The tracked cells of the search's steps: key, view and number of documents of each."""

    @property
    def parts(self) -> SearchParts:
        """The layers or parts of layers that the search can remove, numbered consecutively."""
        units, counts = self.unit.split(","), self.per_layers or (self.per_layer,)
        pairs = zip(units, counts, strict=True)
        return MixedParts.of([SearchParts(unit, self.model.layers, n) for unit, n in pairs])

    @property
    def removed(self) -> tuple[int, ...]:
        """The numbers of all parts that are removed after the last step, ascending."""
        return self.steps[-1].removed

    @property
    def names(self) -> str:
        """The removed parts for display: `3, 17`, or `3.5, 17.0` for heads of layers 3 and 17."""
        return self.parts.names(self.removed)

    @property
    def order(self) -> tuple[int, ...]:
        """The removed parts in order of removal, if each step removed one part; else ascending."""
        order = tuple(step.layer for step in self.steps if step.layer is not None)
        return order if sorted(order) == list(self.removed) else self.removed

    @property
    def kept(self) -> tuple[int, ...]:
        """The layers without removed parts, ascending."""
        changed_layers = set(map(self.parts.layer_of, self.removed))
        return tuple(layer for layer in range(self.model.layers) if layer not in changed_layers)

    @property
    def label(self) -> str:
        """The strategy with random draw and rescoring method: `random 2`, `accuracy (lazy)`."""
        draw = self.draw if self.draw is not None else ""
        rescoring = "" if self.rescoring == "full" else f"({self.rescoring})"
        return " ".join(str(word) for word in (self.strategy, draw, rescoring) if word != "")
