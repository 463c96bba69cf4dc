"""The parts that a search removes, numbered through all layers of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from tracker.core.changes import Ablation, Change
from tracker.core.kinds import KINDS, NUMBERED, Component


@dataclass(frozen=True)
class SearchParts:
    """What a search removes: whole layers, or parts of them.

    A part is one number, so that strategies and budgets need not know what it is: of a layer, an
    attention or an MLP that of its layer, of a head or an expert its layer's times `per_layer`, and
    its own.

    Attributes:
        unit: What the parts are.
        layers: How many layers the model has.
        per_layer: How many parts a layer has.
        there: The layers that have them, ascending; None for all.
        stay: How many of each of these layers' stay at least, if a layer has several.

    Examples:
        >>> heads = SearchParts("head", layers=30, per_layer=9, stay=1)
        >>> heads.name(32), heads.numbers[-1]
        ('3.5', 269)
    """

    unit: Component
    layers: int
    per_layer: int = 1
    there: tuple[int, ...] | None = None
    stay: int = 0

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """All parts that there are, ascending."""
        return self.of_layers(range(self.layers) if self.there is None else self.there)

    @property
    def total(self) -> int:
        """One more than the largest number that a part can have."""
        return self.layers * self.per_layer

    def of_layers(self, layers: Iterable[int]) -> tuple[int, ...]:
        """The parts of some layers."""
        each = self.per_layer
        return tuple(part for n in layers for part in range(each * n, each * (n + 1)))

    def layer_of(self, part: int) -> int:
        """The layer of a part."""
        return part // self.per_layer

    def number_of(self, part: int) -> int:
        """The number of a part in its layer."""
        return part % self.per_layer

    def name(self, part: int) -> str:
        """A part as people read it: `3` for a layer, `3.5` for head 5 of layer 3."""
        if self.unit not in NUMBERED:
            return str(part)
        return f"{self.layer_of(part)}.{self.number_of(part)}"

    def names(self, parts: Iterable[int]) -> str:
        """Several parts, as they are given."""
        return ", ".join(map(self.name, parts))

    def without(self, removed: Iterable[int]) -> Ablation:
        """Return the ablation that removes some parts."""
        several = self.unit in NUMBERED
        changes = (
            Change(
                self.unit,
                (self.layer_of(part),),
                part=self.number_of(part) if several else None,
            )
            for part in removed
        )
        return Ablation.of(*changes)

    def allowed(self, parts: Iterable[int]) -> list[int]:
        """Leave out of some parts, in their order, those with which too few of a layer stay."""
        gone: Counter[int] = Counter()
        found = []
        for part in parts:
            gone[self.layer_of(part)] += 1
            if not self.stay or gone[self.layer_of(part)] <= self.per_layer - self.stay:
                found.append(part)
        return found


def many_of(unit: Component) -> str:
    """What several parts of a kind are called: `layers`, `heads`."""
    return KINDS[unit].many or f"{unit}s"
