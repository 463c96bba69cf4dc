"""Define the records of a pruning search: the removed parts at each step, and the cost.

Values are stored as fractions or nats. An undefined value is `None`, and the field `reasons` of the
step contains the reason.
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
"""Method by which a greedy search updates the scores of its candidates after each removal."""


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
    """The change of the metric relative to the intact model; a positive change is worse."""
    rounded: int | None = Field(None, exclude_if=lambda count: count is None)
    """Number of documents whose result rounding may reverse, as `RunRecord.rounded`."""


class PruneStep(EstimatesRecord):
    """One step of a search: the removed parts, their score, and the test result."""

    FLAT: ClassVar = flat_names("margin", "margin", "margin_low", "margin_high")

    removed: Layers
    """All removed parts after the step, ascending: layers, or numbers of `SearchParts`."""
    layer: int | None = None
    """The part that this step removed; None if the step did not just add one part to the set."""
    score: float | None = None
    """The score that the strategy minimised; None if the strategy has no score."""
    runner_up: Layers = ()
    """The parts of the second-best candidate; empty if there was only one candidate."""
    margin: Estimate = Estimate(None)
    """The runner-up's score minus the best score, on the calibration documents. The 95 % interval
    is simultaneous over all candidates of the step."""
    separates: int | None = None
    """Estimated number of calibration documents that would distinguish the best candidate from the
    runner-up. None if the two already differ significantly, or if their scores are equal."""
    test: HeldOutResult | None = None
    parameters: int | None = Field(None, exclude_if=lambda count: count is None)
    """Number of parameters of the model after the step; None for heads, experts and neurons."""
    seconds: float | None = Field(None, exclude_if=lambda seconds: seconds is None)
    """Estimated seconds per token after the step: the intact model's time minus the times of the
    removed layers. None if the requested amount is not a time."""
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
    """Cost of a pruning search, as if the search had reused no stored results."""

    evaluations: float
    """Number of sets of removed parts that were scored on all calibration documents, including the
    empty set. A loop over pruned models needs as many evaluations."""
    passes: float
    """The engine's work; 1 = a forward pass of the intact model on all calibration documents."""
    seconds: float
    """Measuring time, in seconds."""


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
    """Number of parts in each layer. Part n of the model is part n % `per_layer` of layer n //
    `per_layer`."""
    per_layers: tuple[Positive, ...] = Field((), exclude_if=lambda counts: not counts)
    """The value of `per_layer` for each unit, if the search has several units."""
    there: Positive | None = Field(None, exclude_if=lambda count: count is None)
    """Number of parts of the model; None if each layer has only one part."""
    strategy: str
    draw: Positive | None = None
    """Number of the random draw; None for strategies that do not draw."""
    rescoring: Rescoring = "full"
    amount: SafeText
    """The requested amount: `remove 8`, `keep 100M parameters`."""
    budget: SafeText | None = Field(None, exclude_if=lambda budget: budget is None)
    """The accuracy budget, such as `lose at most 2pp`; None if there is no budget. With a budget,
    results on the test documents determine how many parts of the search's order are removed."""
    protected: Layers = ()
    """Layers that must not be removed."""
    among: Layers | None = None
    """The layers that may be removed; None = all."""
    at_least: dict[str, str] = Field(default_factory=dict)
    """Kind of layers → minimum number of remaining layers. `1 of 4` means one of any four
    consecutive layers."""
    calibration: tuple[CalibrationSet, ...] = ()
    """The calibration benchmarks; empty if the strategy uses no documents."""
    steps: tuple[PruneStep, ...]
    baseline: HeldOutResult
    """The intact model on the test documents."""
    cost: PruneCost
    rests_on: tuple[RecordKey, ...] = ()
    """The cells from which the steps were computed: key, view and number of documents of each."""

    @property
    def parts(self) -> SearchParts:
        """The layers or parts of layers that the search can remove, numbered consecutively."""
        units, counts = self.unit.split(","), self.per_layers or (self.per_layer,)
        pairs = zip(units, counts, strict=True)
        return MixedParts.of([SearchParts(unit, self.model.layers, n) for unit, n in pairs])

    @property
    def removed(self) -> tuple[int, ...]:
        """The numbers of all parts that the search removed, ascending."""
        return self.steps[-1].removed

    @property
    def names(self) -> str:
        """The removed parts for display: `3, 17`, or `3.5, 17.0` for heads of layers 3 and 17."""
        return self.parts.names(self.removed)

    @property
    def order(self) -> tuple[int, ...]:
        """The removed parts in the order of removal.

        If the parts were not removed one by one, they are in ascending order.
        """
        order = tuple(step.layer for step in self.steps if step.layer is not None)
        return order if sorted(order) == list(self.removed) else self.removed

    @property
    def kept(self) -> tuple[int, ...]:
        """The layers without removed parts, ascending."""
        changed_layers = set(map(self.parts.layer_of, self.removed))
        return tuple(layer for layer in range(self.model.layers) if layer not in changed_layers)

    @property
    def label(self) -> str:
        """The display name of the strategy, such as `random 2` or `accuracy (lazy)`.

        The number is that of the random draw. The method that updates scores is in parentheses,
        unless it is `full`.
        """
        draw = self.draw if self.draw is not None else ""
        rescoring = "" if self.rescoring == "full" else f"({self.rescoring})"
        return " ".join(str(word) for word in (self.strategy, draw, rescoring) if word != "")
