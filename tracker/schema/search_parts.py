"""Number the removable parts of a model (layers, heads, …) consecutively."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Annotated, Any, cast

from pydantic import BeforeValidator

from tracker.schema.changes import Ablation, Change
from tracker.schema.fields import as_tuple
from tracker.schema.formats import join_words
from tracker.schema.kinds import KIND_STYLES, NUMBERED_COMPONENTS, SEARCH_UNITS, Component
from tracker.schema.safe_yaml import short_text

SAVED_UNITS: tuple[Component, ...] = ("layer", *NUMBERED_COMPONENTS)
"""Units that a saved checkpoint can omit. A search can combine several of these units."""


def parse_units(value: Any) -> str:
    """Parse the setting for the units (e.g. layers, heads) that a search removes.

    Args:
        value: A unit such as `layer`, a list of units, or units separated by commas.

    Returns:
        The units in the order of `SearchUnit`, separated by commas.

    Raises:
        ValueError: A unit is unknown or listed twice, or the units cannot be combined.

    Examples:
        >>> parse_units(["neuron", "layer"])
        'layer,neuron'
    """
    units = as_tuple(value)
    if isinstance(value, str) and not value.startswith("["):
        units = tuple(word.strip() for word in value.split(","))
    if not isinstance(units, tuple) or not units or any(u not in SEARCH_UNITS for u in units):
        raise ValueError(
            f"invalid unit {short_text(value)}; expected {join_words(SEARCH_UNITS, 'or')}, or "
            "several of them such as layer,neuron"
        )
    if len({*units}) < len(units):
        raise ValueError(f"a unit is listed twice in {short_text(value)}")
    if len(units) > 1 and (not {*units} <= {*SAVED_UNITS} or {"head", "kv_head"} <= {*units}):
        raise ValueError(
            f"{join_words(units)} cannot be combined; a search can combine layer, neuron, expert, "
            "and one of head and kv_head"
        )
    return ",".join(sorted(units, key=SEARCH_UNITS.index))


SearchUnits = Annotated[str, BeforeValidator(parse_units)]
"""A unit of a search such as `layer`, or several units separated by commas."""


@dataclass(frozen=True)
class SearchParts:
    """Numbering of the parts that a search can remove, such as layers or heads.

    A whole layer, an attention sublayer and an MLP have the number of the layer. If layers have
    several parts, such as heads, the number of part n of layer m is m × `per_layer` + n.

    Attributes:
        unit: The kind of the parts, such as `layer` or `head`. Several kinds are separated by
            commas.
        layers: Number of layers of the model.
        per_layer: Number of parts in each layer.
        used_layers: Numbers of the layers that contain parts of this kind, ascending; None for all
            layers.
        min_kept: Minimum number of parts that must remain in each layer; 0 for no minimum.

    Examples:
        >>> heads = SearchParts("head", layers=30, per_layer=9, min_kept=1)
        >>> heads.name(32), heads.numbers[-1]
        ('3.5', 269)
    """

    unit: str
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
        """The number of layers times the number of parts per layer."""
        return self.layers * self.per_layer

    def parts_of_layers(self, layers: Iterable[int]) -> tuple[int, ...]:
        """Return the numbers of all parts of the given layers."""
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
        component = cast("Component", self.unit)
        if component not in NUMBERED_COMPONENTS:
            return Ablation.from_changes(*(Change(component, (layer,)) for layer in removed))
        pairs = (divmod(part, self.per_layer) for part in removed)
        return Ablation.from_changes(*(Change(component, (m,), part=n) for m, n in pairs))

    def filter_allowed(self, parts: Iterable[int]) -> list[int]:
        """Select parts that can be removed together, in the order of `parts`.

        A part is left out if its removal would leave fewer than `min_kept` parts in its layer.
        """
        counts: Counter[int] = Counter()
        allowed = []
        limit = self.per_layer - self.min_kept if self.min_kept else math.inf
        for part in parts:
            counts[self.layer_of(part)] += 1
            if counts[self.layer_of(part)] <= limit:
                allowed.append(part)
        return allowed


@dataclass(frozen=True)
class MixedParts(SearchParts):
    """Numbering of the parts of several kinds.

    The numbers of the first kind begin with 0. The numbers of the second kind begin after the last
    number of the first kind.

    Attributes:
        kinds: One separate numbering for each kind of part.

    Examples:
        >>> parts = MixedParts.of([SearchParts("layer", 3), SearchParts("neuron", 3, per_layer=4)])
        >>> str(parts.removal([1, 3, 11])), parts.names([1, 3, 7, 11])
        ('layer:1+neuron:0.0+neuron:2.0', 'layer 1 and 1 of 4 groups of neurons of each layer')
    """

    kinds: tuple[SearchParts, ...] = ()

    @classmethod
    def of(cls, kinds: Sequence[SearchParts]) -> SearchParts:
        """Combine the numberings of several kinds of parts into one numbering.

        A single numbering is returned unchanged.
        """
        if len(kinds) == 1:
            return kinds[0]
        return cls(",".join(kind.unit for kind in kinds), kinds[0].layers, kinds=tuple(kinds))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The number of the first part of each kind, followed by the total number of parts."""
        return (0, *accumulate(kind.total for kind in self.kinds))

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of all parts of the model, ascending."""
        pairs = zip(self.starts, self.kinds, strict=False)
        return tuple(start + number for start, kind in pairs for number in kind.numbers)

    @property
    def total(self) -> int:
        """The total number of parts of all kinds, as if every layer had parts of each kind."""
        return self.starts[-1]

    def split(self, parts: Iterable[int]) -> list[list[int]]:
        """Split part numbers by kind, and convert them to each kind's own numbering."""
        parts, starts = sorted(parts), self.starts
        spans = pairwise(starts)
        return [[part - start for part in parts if start <= part < end] for start, end in spans]

    def layer_of(self, part: int) -> int:
        """Return the number of the layer that contains a part."""
        index = sum(start <= part for start in self.starts[1:])
        return self.kinds[index].layer_of(part - self.starts[index])

    def names(self, parts: Iterable[int]) -> str:
        """Describe several parts, such as `layer 16 and 2 of 9 heads of each layer`.

        Layers are listed by number. For heads, experts and neurons, the text gives the largest
        number in one layer.
        """
        texts = []
        for kind, numbers in zip(self.kinds, self.split(parts), strict=True):
            if numbers and kind.unit == "layer":
                texts.append(f"{'layers' if numbers[1:] else 'layer'} {kind.names(numbers)}")
            elif numbers:
                n = max(Counter(map(kind.layer_of, numbers)).values())
                texts.append(f"{n} of {kind.per_layer} {unit_plural(kind.unit)} of each layer")
        return join_words(texts)

    def name(self, part: int) -> str:
        """Return the display name of a part."""
        return self.names([part])

    def removal(self, removed: Iterable[int]) -> Ablation:
        """Build the ablation that removes the parts with the given numbers."""
        pairs = zip(self.kinds, self.split(removed), strict=True)
        return Ablation.combine(kind.removal(numbers) for kind, numbers in pairs)


def unit_plural(unit: str) -> str:
    """Return the plural name of the parts of a unit, such as `layers` or `heads`."""
    if "," in unit:
        return join_words([unit_plural(kind) for kind in unit.split(",")])
    return KIND_STYLES[unit].plural or f"{unit}s"
