"""Number the removable parts of a model (layers, heads, …) consecutively."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from tracker.schema.changes import Ablation, Change
from tracker.schema.kinds import KIND_STYLES, NUMBERED_COMPONENTS, Component


@dataclass(frozen=True)
class SearchParts:
    """Numbering of the parts that a search can remove: layers, sublayers, heads, etc.

    Each part has a single number. The number of a layer, attention or MLP is the layer's number.
    The number of part n, e.g. a head, of layer m is m × `per_layer` + n.

    Attributes:
        unit: The kind of the parts, such as `layer` or `head`.
        layers: Number of layers of the model.
        per_layer: Number of parts in each layer.
        used_layers: Numbers of the layers that have parts of this kind, ascending; None for all
            layers.
        min_kept: Minimum number of parts that must remain in each layer; 0 for no minimum.

    Examples:
        >>> heads = SearchParts("head", layers=30, per_layer=9, min_kept=1)
        >>> heads.name(32), heads.numbers[-1]
        ('3.5', 269)
    """

    unit: Component
    layers: int
    per_layer: int = 1
    used_layers: tuple[int, ...] | None = None
    min_kept: int = 0

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of all parts of the model, ascending."""
        layers = range(self.layers) if self.used_layers is None else self.used_layers
        return self.parts_of_layers(layers)

    @property
    def total(self) -> int:
        """The product of `layers` and `per_layer`."""
        return self.layers * self.per_layer

    def parts_of_layers(self, layers: Iterable[int]) -> tuple[int, ...]:
        """List the numbers of all parts of these layers."""
        size = self.per_layer
        return tuple(part for n in layers for part in range(size * n, size * (n + 1)))

    def layer_of(self, part: int) -> int:
        """Return the number of the layer that contains a part."""
        return part // self.per_layer

    def number_in_layer(self, part: int) -> int:
        """Return the number of a part within its layer, 0-based."""
        return part % self.per_layer

    def name(self, part: int) -> str:
        """Return a part's name for display: `3` for a layer, `3.5` for head 5 of layer 3."""
        if self.unit not in NUMBERED_COMPONENTS:
            return str(part)
        return f"{self.layer_of(part)}.{self.number_in_layer(part)}"

    def names(self, parts: Iterable[int]) -> str:
        """Return the display names of several parts, separated by commas."""
        return ", ".join(map(self.name, parts))

    def removal(self, removed: Iterable[int]) -> Ablation:
        """Build the ablation that removes the parts with the given numbers."""
        if self.unit not in NUMBERED_COMPONENTS:
            return Ablation.from_changes(*(Change(self.unit, (layer,)) for layer in removed))
        pairs = (divmod(part, self.per_layer) for part in removed)
        return Ablation.from_changes(*(Change(self.unit, (m,), part=n) for m, n in pairs))

    def filter_allowed(self, parts: Iterable[int]) -> list[int]:
        """Drop the parts whose removal would leave fewer than `min_kept` parts in a layer."""
        counts: Counter[int] = Counter()
        allowed = []
        limit = self.per_layer - self.min_kept if self.min_kept else math.inf
        for part in parts:
            counts[self.layer_of(part)] += 1
            if counts[self.layer_of(part)] <= limit:
                allowed.append(part)
        return allowed


def unit_plural(unit: Component) -> str:
    """Return the plural name of a kind of parts, such as `layers` or `heads`."""
    return KIND_STYLES[unit].plural or f"{unit}s"
