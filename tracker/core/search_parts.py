"""Number the parts that a search removes, through all layers of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from tracker.core.changes import Ablation, Change
from tracker.core.kinds import KINDS, NUMBERED, Component


@dataclass(frozen=True)
class SearchParts:
    """Numbering of the parts that a search removes: whole layers, or parts of them.

    A part is one number, so that strategies and budgets work for all units. A layer, an attention
    or an MLP has the number of its layer. Head or expert n of layer m is m × `per_layer` + n.

    Attributes:
        unit: The kind of the parts.
        layers: Number of layers of the model.
        per_layer: Number of parts of a layer.
        there: The layers that have such parts, ascending; None for all.
        stay: Minimum number of parts that stay in each of these layers; 0 for no minimum.

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
        """The numbers of all parts, ascending."""
        return self.of_layers(range(self.layers) if self.there is None else self.there)

    @property
    def total(self) -> int:
        """One more than the largest number that a part can have."""
        return self.layers * self.per_layer

    def of_layers(self, layers: Iterable[int]) -> tuple[int, ...]:
        """Return the parts of some layers."""
        each = self.per_layer
        return tuple(part for n in layers for part in range(each * n, each * (n + 1)))

    def layer_of(self, part: int) -> int:
        """Return the layer of a part."""
        return part // self.per_layer

    def number_of(self, part: int) -> int:
        """Return the number of a part in its layer."""
        return part % self.per_layer

    def name(self, part: int) -> str:
        """Return a part's name for display: `3` for a layer, `3.5` for head 5 of layer 3."""
        if self.unit not in NUMBERED:
            return str(part)
        return f"{self.layer_of(part)}.{self.number_of(part)}"

    def names(self, parts: Iterable[int]) -> str:
        """Return the names of several parts for display, in the given order."""
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
        """Return the parts, in order, whose removal leaves at least `stay` parts in each layer."""
        gone: Counter[int] = Counter()
        found = []
        for part in parts:
            gone[self.layer_of(part)] += 1
            if not self.stay or gone[self.layer_of(part)] <= self.per_layer - self.stay:
                found.append(part)
        return found


def many_of(unit: Component) -> str:
    """Return the plural of a kind of parts: `layers`, `heads`."""
    return KINDS[unit].many or f"{unit}s"
