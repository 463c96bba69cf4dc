"""What a search for what to prune found: sets of parts, step by step, and what they cost.

Fractions and nats, as in the other records. A step's score is what its strategy made as small as
possible; a figure that is not defined is `None`, and the step's `reasons` says why.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from tracker.core.estimates import Estimate
from tracker.core.extent import Positive
from tracker.core.fields import Layers
from tracker.core.identities import BenchmarkIdentity, ModelIdentity, Record, Shown
from tracker.core.kinds import Component
from tracker.core.records import EstimatesRecord, Place, flat_names
from tracker.core.search_parts import SearchParts

Rescoring = Literal["full", "lazy", "race"]
"""How a greedy search by outcomes scores its candidates again after each removal."""


class Tested(EstimatesRecord):
    """What the model without some parts answers of the test documents."""

    FLAT: ClassVar = {
        **flat_names("level", "accuracy", "low", "high"),
        **flat_names("lost", "drop", "drop_low", "drop_high"),
    }

    n: int
    level: Estimate
    """The benchmark's metric."""
    lost: Estimate = Estimate(None)
    """What is lost to the intact model; positive = worse."""


class PruneStep(EstimatesRecord):
    """One step: what is removed then, by which score, and what that does to the test documents."""

    FLAT: ClassVar = flat_names("margin", "margin", "margin_low", "margin_high")

    removed: Layers
    """All that is removed after the step, ascending: layers, or parts as `SearchParts` numbers
    them."""
    layer: int | None = None
    """What the step removed, likewise; None where its set is not that of the step before, and one
    more."""
    score: float | None = None
    """What the strategy made as small as possible; None where it looks at none."""
    runner_up: Layers = ()
    """What would have been removed instead; empty where there was nothing else."""
    margin: Estimate = Estimate(None)
    """By how much the runner-up scores worse, on the calibration documents; with 95 % its interval
    holds beside every other candidate of the step."""
    separates: int | None = None
    """About how many calibration documents would separate the two; None where these do, or where
    they are level and no number does."""
    test: Tested | None = None
    reasons: dict[str, str] = Field(default_factory=dict)


class Calibrated(Record):
    """What chose: one benchmark, and which of its documents."""

    key: str
    """The cell's key in the ledger."""
    benchmark: Shown
    metric: str
    n: int
    part: str | None = None
    """Which part of the benchmark they are of; None = all of it."""
    documents: dict[str, tuple[int, ...]]
    """Task → their numbers in its split."""


class PruneCost(Record):
    """What a search would have taken alone, whoever measured it."""

    evaluations: float
    """Sets of removals that were scored, each on all calibration documents, the intact model among
    them; what a loop over really pruned models would evaluate."""
    passes: float
    """What the engine computed for them, in passes of all calibration documents through the whole
    intact model."""
    seconds: float
    """What measuring took."""


class PruneRecord(Record):
    """One search."""

    name: str
    """What tells it from other searches of a results folder."""
    model: ModelIdentity
    benchmark: BenchmarkIdentity
    """Of the test documents."""
    metric: str
    higher_is_better: bool = True
    part: str | None = None
    """Which part of the benchmark the test documents are of."""
    unit: Component = "layer"
    per_layer: Positive = Field(1, exclude_if=lambda count: count == 1)
    """How many parts a layer has, where it has several: part n is number n % `per_layer` of layer
    n // `per_layer`."""
    there: Positive | None = Field(None, exclude_if=lambda count: count is None)
    """How many parts the model has, where a layer has several."""
    strategy: str
    draw: Positive | None = None
    """Which random draw, where the strategy draws."""
    rescoring: Rescoring = "full"
    amount: Shown
    """How much was to go: `remove 8`, `keep 100M parameters`."""
    protected: Layers = ()
    """Layers that were not to go."""
    among: Layers | None = None
    """The only layers that were to go; None = all."""
    at_least: dict[str, str] = Field(default_factory=dict)
    """Kind of layers → how many were to stay: `2`, or `1 of 4` of any four in a row."""
    calibration: tuple[Calibrated, ...] = ()
    """Empty where the strategy looks at no document."""
    steps: tuple[PruneStep, ...]
    baseline: Tested
    """The intact model on the test documents."""
    cost: PruneCost
    rests_on: tuple[Place, ...] = ()
    """The tracked cells of its steps: key, view, documents."""

    @property
    def parts(self) -> SearchParts:
        """What is removed of: names its parts."""
        return SearchParts(self.unit, self.model.layers, self.per_layer)

    @property
    def removed(self) -> tuple[int, ...]:
        """What is removed in the end, ascending."""
        return self.steps[-1].removed

    @property
    def names(self) -> str:
        """The same as people read it: `3, 17`, or `3.5, 17.0` for heads of layers 3 and 17."""
        return self.parts.names(self.removed)

    @property
    def order(self) -> tuple[int, ...]:
        """What is removed, in the order in which it went; ascending where sets do not grow."""
        order = tuple(step.layer for step in self.steps if step.layer is not None)
        return order if sorted(order) == list(self.removed) else self.removed

    @property
    def kept(self) -> tuple[int, ...]:
        """The places, in the intact model, of the layers that nothing is removed of."""
        gone = set(map(self.parts.layer_of, self.removed))
        return tuple(layer for layer in range(self.model.layers) if layer not in gone)

    @property
    def label(self) -> str:
        """The strategy as people read it: with its draw, and how it rescored if not fully."""
        more = self.draw if self.draw is not None else ""
        how = "" if self.rescoring == "full" else f"({self.rescoring})"
        return " ".join(str(word) for word in (self.strategy, more, how) if word != "")
