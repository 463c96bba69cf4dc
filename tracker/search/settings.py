"""Define the settings of a search: the constraints and the amount to remove.

protect: {value: [0, 1, last]}
among: {value: {min: 8, max: 24}}
at_least: {value: {full_attention: 1 of 4}}
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from tracker.schema import fields
from tracker.schema.changes import MAX_LAYERS
from tracker.schema.config import FIELDS_BY_KEY, FILE_KEYS
from tracker.schema.errors import ExperimentError, ModelError
from tracker.schema.extent import Positive
from tracker.schema.fields import JsonArguments, Name, StrictModel, as_tuple, decode_arguments
from tracker.schema.formats import count_text
from tracker.schema.kinds import NUMBERED_COMPONENTS
from tracker.schema.model_parts import layers_of_kind
from tracker.schema.prune_records import Rescoring
from tracker.schema.safe_yaml import parse_yaml, short_text
from tracker.schema.search_parts import MixedParts, SearchParts, SearchUnits, unit_plural

CONSTRAINTS = ("protect", "among", "at_least", "uniform")
"""Keys of a search that define constraints."""
ACCURACY_KEYS = ("max_drop", "keep_accuracy")
"""Keys of a search that define a budget of accuracy."""
AMOUNT_KEYS = ("remove", "keep", *ACCURACY_KEYS)
"""Keys of a search that end it."""
LAST_LAYER = "last"
"""Word for the last layer in settings."""
LAYER_FORMS = "[0, 1, last], 3-7, {min: 8, max: 24}, odd, even, or {kind: sliding_attention}"
"""Examples of valid layers in settings, shown in messages."""
MINIMUM_FORMS = "{full_attention: 2}, or {full_attention: 1 of 4}"
"""Examples of valid minimum numbers of layers, shown in messages."""

_KIND = re.compile(r"[A-Za-z]\w*")
_SETTINGS: TypeAdapter[str] = TypeAdapter(JsonArguments)
_RATIO = re.compile(r"(\d+)(?: of (\d+))?", re.ASCII)


def _parse_layers(layers: object) -> tuple[int | str, ...]:
    """Parse a setting that names layers, from YAML, W&B or the command line."""
    text = layers.strip() if isinstance(layers, str) else ""
    if text.startswith("{"):
        with suppress(ExperimentError):
            layers = parse_yaml(text, "layers")
    elif text[:1] in ("[", "("):
        layers = re.sub("['\"]", "", text.strip("[]()"))
    if isinstance(layers, dict):
        layers = _parse_mapping(layers)
    if isinstance(layers, str):
        layers = layers.split(",")
    if not isinstance(layers, list | tuple):
        layers = [layers]
    words = [word for value in layers for word in _parse_layer(value)]
    if not words:
        raise ValueError(f"the list of layers is empty; expected e.g. {LAYER_FORMS}")
    if len(set(words)) < len(words):
        raise ValueError("a layer is listed twice")
    numbers = sorted(value for value in words if isinstance(value, int))
    return (*numbers, *sorted(value for value in words if isinstance(value, str)))


def _parse_mapping(mapping: dict[Any, Any]) -> Any:
    """Parse layers that are written as a mapping with the keys `min` and `max`, or `kind`."""
    if mapping.keys() == {"min", "max"}:
        return f"{mapping['min']}-{mapping['max']}"
    if mapping.keys() == {"kind"}:
        return mapping["kind"]
    raise ValueError(f"invalid layers {short_text(mapping)}; expected e.g. {LAYER_FORMS}")


def _parse_layer(value: object) -> Iterator[int | str]:
    """Yield the layer numbers or the word of one list entry, such as `3`, `3-7` or `last`."""
    text = str(value).strip()
    layers = fields.parse_layer_range(text)
    if isinstance(value, bool) or (layers is None and not _KIND.fullmatch(text)):
        raise ValueError(f"invalid layer {short_text(value)}; expected e.g. {LAYER_FORMS}")
    if layers and layers[-1] >= MAX_LAYERS:
        raise ValueError(f"no model has a layer {layers[-1]:,}")
    yield from [text] if layers is None else layers


def _parse_minimums(value: object) -> str:
    """Parse the setting `at_least`, the minimum number of layers of each kind.

    For example, `{full_attention: 1 of 4}` becomes JSON text with sorted keys.
    """
    expected = f"expected e.g. {MINIMUM_FORMS}"
    try:
        minimums = decode_arguments(_SETTINGS.validate_python(value))
    except ValidationError:
        raise ValueError(f"invalid minimum {short_text(value)}; {expected}") from None
    if not minimums:
        raise ValueError(f"no kind is named; {expected}")
    texts = {kind: " ".join(str(text).split()) for kind, text in minimums.items()}
    for kind, text in texts.items():
        match = _RATIO.fullmatch(text)
        if match is None or int(match[1]) < 1:
            raise ValueError(f"{kind}: invalid number of layers {short_text(text)}; {expected}")
        if match[2] and int(match[2]) < int(match[1]):
            raise ValueError(f"{kind}: {match[1]} of {match[2]} layers cannot stay; {expected}")
    return json.dumps(texts, sort_keys=True)


LayerWords = Annotated[tuple[int | str, ...], BeforeValidator(_parse_layers)]
"""Layers: first numbers, ascending, then words: kinds, `odd`, `even`, `last`."""
LayerMinimums = Annotated[str, BeforeValidator(_parse_minimums)]
"""Minimum numbers of layers by kind, as canonical JSON."""


@dataclass(frozen=True)
class LayerMinimum:
    """Constraint of a search: a minimum number of layers of one kind must stay.

    Attributes:
        kind: Kind of the layers, such as `full_attention`.
        layers: Numbers of the layers of this kind.
        count: Minimum number of layers that stay.
        window: If the window is 4, the minimum applies to any four consecutive layers. None means
            that the minimum applies to the whole model.
    """

    kind: str
    layers: tuple[int, ...]
    count: int
    window: int | None

    def __str__(self) -> str:
        """Format the minimum as in an experiment file: `2`, or `1 of 4`."""
        return f"{self.count}" if self.window is None else f"{self.count} of {self.window}"

    def groups(self, n_layers: int) -> Iterator[tuple[int, ...]]:
        """Yield groups of layers; at least `count` layers of each group must stay."""
        width = n_layers if self.window is None else self.window
        for start in range(n_layers - width + 1):
            yield tuple(layer for layer in self.layers if start <= layer < start + width)


@dataclass(frozen=True)
class Constraints:
    """Constraints of a search: the layers of a model that must stay.

    Attributes:
        protected: Layers that must stay.
        among: Layers that the search can remove; None for all layers.
        minimums: Minimum number of remaining layers for some kinds of layers.
    """

    protected: tuple[int, ...] = ()
    among: tuple[int, ...] | None = None
    minimums: tuple[LayerMinimum, ...] = ()

    @property
    def names(self) -> str:
        """The names of the constraints that are set, for messages: e.g. `'protect' and 'among'`."""
        values = {"protect": self.protected, "among": self.among, "at_least": self.minimums}
        return " and ".join(f"'{key}'" for key, value in values.items() if value)

    def fixed(self, n_layers: int) -> frozenset[int]:
        """Return the layers that must stay, in a model of `n_layers` layers."""
        candidates = range(n_layers) if self.among is None else self.among
        return frozenset(range(n_layers)) - (frozenset(candidates) - frozenset(self.protected))


NO_CONSTRAINTS = Constraints()
"""No constraints."""


def resolve_constraints(
    protect: Sequence[int | str],
    among: Sequence[int | str],
    at_least: str | None,
    n_layers: int,
    config: Callable[[], Any],
) -> Constraints:
    """Convert words in constraints, such as `last` or `odd`, to numbers of layers.

    Args:
        protect: Value of the setting `protect`: layer numbers and words such as `last`.
        among: Value of the setting `among`: layer numbers and words such as `odd`; empty if all
            layers are removable.
        at_least: Value of the setting `at_least` as JSON, such as `{"mamba": "1 of 4"}`; None if
            there is no minimum.
        n_layers: Number of layers of the model.
        config: Function that reads the configuration of the model's text part, which names kinds of
            layers.

    Returns:
        The constraints, with numbers of layers.

    Raises:
        ExperimentError: A layer or kind does not exist, a minimum is too high, or no layer is
            removable.
    """
    protected = _resolve_layers("protect", protect, n_layers, config)
    allowed = _resolve_layers("among", among, n_layers, config) if among else None
    texts = decode_arguments(at_least).items()
    minimums = tuple(_parse_minimum(kind, text, n_layers, config) for kind, text in texts)
    if not set(range(n_layers) if allowed is None else allowed) - set(protected):
        layers = f"all {n_layers} layers" if allowed is None else "every layer of 'among'"
        raise ExperimentError(
            f"'protect' lists {layers}: no layer is left to remove; protect fewer layers"
        )
    return Constraints(protected, allowed, minimums)


def _resolve_layers(
    key: str, words: Sequence[int | str], n_layers: int, config: Callable[[], Any]
) -> tuple[int, ...]:
    """Convert layer numbers and words such as `last` to layer numbers.

    Args:
        key: Name of the setting, for error messages.
        words: Layer numbers, kinds of layers, and words such as `last`.
        n_layers: Number of layers of the model.
        config: Function that reads the configuration of the model's text part.

    Returns:
        The numbers of the layers, ascending.

    Raises:
        ExperimentError: A layer or kind does not exist.
    """
    kinds = [word for word in words if isinstance(word, str) and word != LAST_LAYER]
    numbers = {word for word in words if isinstance(word, int)}
    if numbers and max(numbers) >= n_layers:
        raise ExperimentError(
            f"'{key}': there is no layer {max(numbers)}; the model has layers 0 to {n_layers - 1}"
        )
    last_layer = {n_layers - 1} if LAST_LAYER in words else set()
    return tuple(sorted({*numbers, *last_layer, *_find_layers(key, kinds, config)}))


def _find_layers(key: str, kinds: Sequence[str], config: Callable[[], Any]) -> tuple[int, ...]:
    """Return the numbers of all layers of the given kinds, such as `sliding_attention`.

    The function `config` reads the model's configuration. Raises ExperimentError for an unknown
    kind of layers; the message contains the setting `key`.
    """
    try:
        return layers_of_kind(config(), kinds) if kinds else ()
    except ModelError as error:
        raise ExperimentError(f"'{key}': {error}") from None


def _parse_minimum(kind: str, text: str, n_layers: int, config: Callable[[], Any]) -> LayerMinimum:
    """Parse a minimum number of layers of one kind, written as `N` or `N of M`.

    Raises ExperimentError if the intact model has too few layers of this kind.
    """
    layers = _find_layers("at_least", [kind], config)
    n, _, width = text.partition(" of ")
    minimum = LayerMinimum(kind, layers, int(n), int(width) if width else None)
    setting, window = f"'at_least': {kind}: {text}", minimum.window or n_layers
    if window > n_layers:
        largest = f"{n} of {n_layers}"
        raise ExperimentError(f"{setting}: the model has only {n_layers} layers; write '{largest}'")
    for first, group in enumerate(minimum.groups(n_layers)):
        if len(group) < minimum.count:
            raise ExperimentError(
                f"{setting}: only {len(group)} of the layers {first} to {first + window - 1} are "
                f"of kind {kind}; lower the minimum to {len(group)}"
            )
    return minimum


def format_layers(layers: Sequence[int | str]) -> list[str]:
    """Format layers as texts; three or more consecutive layers are written as `8 to 24`."""
    runs: list[list[int | str]] = []
    for layer in layers:
        if runs and isinstance(layer, int) and layer - 1 == runs[-1][-1]:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    texts = ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run) for run in runs)
    return list(chain.from_iterable(texts))


AmountMeasure = Literal["parts", "parameters", "bytes", "seconds", "latency", "bits"]
MILLION, MILLISECOND = 1e6, 1e-3
"""Sizes for which a search of several units compares losses, in parameters or seconds."""
TIMED: tuple[AmountMeasure, ...] = ("seconds", "latency")
"""Measures for which each layer is timed: per token read, or per token written."""
AMOUNT_FORMS = "8, 25 %, 25 % parameters, 25 % bytes, 25 % latency, 34M parameters, 70 MB or 5 ms"
"""Examples of valid amounts, shown in messages."""

_TOO_FEW: Mapping[str, str] = {
    "layer": "no layer would remain",
    "head": "some layers would have no attention head",
    "kv_head": "some layers would have no group of attention heads",
    "expert": "some layers would have fewer experts than their routers choose",
    "neuron": "some layers would have no group of neurons",
}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?) ?(.*)")
_SHARES: Mapping[str, AmountMeasure] = {
    "%": "parts",
    "% parameters": "parameters",
    "% bytes": "bytes",
    "% seconds": "seconds",
    "% latency": "latency",
}
_SIZES: Mapping[AmountMeasure, Mapping[str, float]] = {
    "parameters": {"parameters": 1, "K parameters": 1e3, "M parameters": 1e6, "B parameters": 1e9},
    "bytes": {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    "seconds": {"ms": 1e-3, "s": 1},
    "bits": {"bpw": 1},
}
_UNITS = {unit: (measure, n) for measure, sizes in _SIZES.items() for unit, n in sizes.items()}


@dataclass(frozen=True)
class Amount:
    """Amount to remove or keep, in parts, parameters, bytes, bits or seconds.

    Attributes:
        text: The amount as the user wrote it.
        value: The amount as a number; a fraction if it is a share.
        measure: The counted quantity, such as `parts` or `bytes`. Seconds are per token, and bits
            are per weight.
        is_share: True if the amount is a share of the whole model or of all parts.
    """

    text: str
    value: float
    measure: AmountMeasure
    is_share: bool = False


def parse_amount(value: int | str) -> Amount:
    """Parse an amount such as `8` or `25 % parameters`.

    Args:
        value: A whole number of parts, or a text; `AMOUNT_FORMS` has examples.

    Returns:
        The amount.

    Raises:
        ValueError: The value is not an amount, or the amount is 0, or 100 % or more.

    Examples:
        >>> parse_amount("25 % parameters").measure, parse_amount("34M parameters").value
        ('parameters', 34000000.0)
    """
    amount = match_amount(str(value))
    if isinstance(value, bool) or amount is None or amount.measure == "bits":
        raise ValueError(f"invalid amount {short_text(value)}; expected e.g. {AMOUNT_FORMS}")
    if amount.value <= 0 or (amount.is_share and amount.value >= 1):
        allowed = "expected a number above 0, or a percentage above 0 and below 100 %"
        raise ValueError(f"invalid amount {amount.text!r}; {allowed}")
    return amount


def match_amount(text: str) -> Amount | None:
    """Parse a number of parts, or an amount with a unit; return None for any other text."""
    text = " ".join(text.split())
    match = _AMOUNT.fullmatch(text)
    if match is None:
        return None
    number, unit = float(match[1]), match[2]
    if unit in _SHARES:
        return Amount(text, number / 100, _SHARES[unit], is_share=True)
    if unit in _UNITS:
        measure, size = _UNITS[unit]
        return Amount(text, number * size, measure)
    return Amount(text, number, "parts") if not unit and number.is_integer() else None


@dataclass(frozen=True)
class Budget:
    """Minimum total size of the removed parts, and the parts that must stay.

    Attributes:
        sizes: Size of each part in parameters, bytes or seconds per token. Each size is 1 if the
            amount to remove is a number of parts.
        min_removed: Minimum total size to remove; 0 if only a budget of accuracy ends the search.
        fixed: Parts that must stay.
        minimums: Groups of parts, each with the minimum number of parts that must stay.
        parts: Numbering of the parts.
        model_size: Size of the whole model, in the unit of `sizes`.
    """

    sizes: tuple[float, ...]
    min_removed: float
    fixed: frozenset[int] = frozenset()
    minimums: tuple[tuple[tuple[int, ...], int], ...] = ()
    parts: SearchParts = field(kw_only=True)
    model_size: float = field(default=0.0, kw_only=True)

    @property
    def is_uniform(self) -> bool:
        """True if a search must remove equally many parts from each block."""
        return False

    def block_of(self, part: int) -> int:
        """Return the number of the block that contains a part; here, each part is a block."""
        return part

    @property
    def free_parts(self) -> list[int]:
        """The parts that can be removed."""
        return [part for part in range(len(self.sizes)) if part not in self.fixed]

    def allows(self, removed: Collection[int]) -> bool:
        """Return whether the constraints allow the removal of all these parts together."""
        return self.fixed.isdisjoint(removed) and all(
            len(set(parts).difference(removed)) >= count for parts, count in self.minimums
        )

    def size_of(self, removed: Collection[int]) -> float:
        """Return the total size of parts that are removed together."""
        return sum(self.sizes[part] for part in removed)

    def is_met(self, removed: Collection[int]) -> bool:
        """Return whether the removed parts together have at least the size `min_removed`."""
        return self.size_of(removed) >= self.min_removed * (1 - 1e-9)

    def is_finished(self, removed: Collection[int]) -> bool:
        """Return whether a search is finished when these parts are removed.

        A search is finished when the removed parts have at least the total size `min_removed`. If
        `min_removed` is 0, the search is finished when no further part can be removed.
        """
        return self.is_met(removed) if self.min_removed else self.is_exhausted(removed)

    def is_exhausted(self, removed: Collection[int]) -> bool:
        """Return whether the constraints allow no further removal."""
        return len(removed) >= len(self.largest_removal(removed))

    def can_reach(self, removed: Collection[int]) -> bool:
        """Return whether a search that removes these parts can reach the size `min_removed`."""
        return self.allows(removed) and self.is_met(self.largest_removal(removed))

    def largest_removal(self, removed: Collection[int] = ()) -> set[int]:
        """Return the largest set of parts that contains `removed` and can be removed."""
        if self.minimums:
            return _largest_removal(self, frozenset(removed))
        free_parts = set(self.free_parts)
        if self.fixed or not (removable := free_parts.difference(removed)):
            return free_parts
        return free_parts - {min(removable, key=lambda part: self.sizes[part])}

    @property
    def largest_size(self) -> float:
        """Total size of the largest set of parts that can be removed."""
        return self.size_of(self.largest_removal())

    def next_parts(self, removed: Collection[int]) -> list[int]:
        """Return the parts that the next step can remove while `min_removed` stays reachable."""
        largest = self.largest_removal(removed)
        certain = largest if self.is_met(largest) else set()
        parts = [part for part in self.free_parts if part not in removed]
        return [part for part in parts if part in certain or self.can_reach((*removed, part))]


@dataclass(frozen=True)
class PartsBudget(Budget):
    """Budget for the removal of heads, experts or neurons; each part has the size 1.

    Attributes:
        uniform_block: Number of consecutive parts in a block (e.g. a layer), if a search must
            remove equally many parts from each block; otherwise None.
    """

    uniform_block: int | None = None

    @property
    def is_uniform(self) -> bool:
        """True if a search must remove equally many parts from each block."""
        return self.uniform_block is not None

    @cached_property
    def _max_removals(self) -> Mapping[int, int]:
        """The maximum number of parts that can be removed from each block."""
        room = (self.uniform_block or self.parts.per_layer) - self.parts.min_kept
        counts = self._count_by_block(self.free_parts)
        return {block: min(count, room) for block, count in counts.items()}

    def block_of(self, part: int) -> int:
        """Return the number of the block that contains a part.

        A block is `uniform_block` consecutive parts, or a layer if `uniform_block` is None.
        """
        return part // (self.uniform_block or self.parts.per_layer)

    def _count_by_block(self, parts: Iterable[int]) -> Counter[int]:
        """Count how many of the given parts each block contains."""
        return Counter(map(self.block_of, parts))

    @property
    def largest_size(self) -> float:
        """Number of parts in the largest set of parts that can be removed."""
        counts = self._max_removals.values()
        total = sum(counts) if self.uniform_block is None else min(counts) * len(counts)
        return float(total)

    def is_exhausted(self, removed: Collection[int]) -> bool:
        """Return whether the constraints allow no further removal."""
        return len(removed) >= self.largest_size

    def allows(self, removed: Collection[int]) -> bool:
        """Return whether the constraints allow the removal of all these parts together."""
        counts = self._count_by_block(removed).items()
        fits_blocks = all(count <= self._max_removals.get(block, 0) for block, count in counts)
        return fits_blocks and self.fixed.isdisjoint(removed)

    def can_reach(self, removed: Collection[int]) -> bool:
        """Return whether a search that removes these parts can reach the size `min_removed`."""
        return self.allows(removed) and self.largest_size >= self.min_removed * (1 - 1e-9)

    def next_parts(self, removed: Collection[int]) -> list[int]:
        """Return the parts that the next step can remove while `min_removed` stays reachable."""
        if not self.can_reach(removed):
            return []
        counts = self._count_by_block(removed)
        rooms = {block: count - counts[block] for block, count in self._max_removals.items()}
        parts = set(self.free_parts).difference(removed)
        return sorted(part for part in parts if rooms[self.block_of(part)] > 0)


@dataclass(frozen=True)
class UniformKind:
    """Removable parts of one kind, such as heads, grouped into blocks.

    A search must remove equally many of these parts from each block.

    Attributes:
        blocks: Numbers of the removable parts in each block. A block is a layer, or a group of
            heads that share keys and values.
        counts: Possible numbers of parts to remove from each block, ascending.
    """

    blocks: tuple[tuple[int, ...], ...]
    counts: tuple[int, ...]

    def next_removal(self, removed: Collection[int], order: Sequence[int]) -> set[int]:
        """Return the next larger set of parts to remove, with equally many parts of each block.

        Args:
            removed: The parts that are removed so far.
            order: All parts; within a block, a part that comes earlier in `order` is removed
                earlier.

        Returns:
            All removed parts of this kind; empty if no larger set is possible.
        """
        n_removed = len({*self.blocks[0]}.intersection(removed))
        larger = [count for count in self.counts if count > n_removed]
        ranks = {part: rank for rank, part in enumerate(order)}
        blocks = [sorted(block, key=ranks.__getitem__) for block in self.blocks]
        return {part for block in blocks for part in block[: larger[0] if larger else 0]}

    def largest_extension(self, removed: Collection[int]) -> set[int]:
        """Return a largest set of parts of this kind that can be removed besides `removed`."""
        n_left = self.counts[-1] - len({*self.blocks[0]}.intersection(removed))
        remaining = ([part for part in block if part not in removed] for block in self.blocks)
        return {part for block in remaining for part in block[:n_left]}


@dataclass(frozen=True)
class MixedBudget(Budget):
    """Budget for searches that remove several kinds of parts, such as whole layers and heads.

    A search removes equally many heads, experts or neurons from each layer. The size of a removed
    layer includes its heads, experts and neurons.

    Attributes:
        n_layers: Number of layers, or 0 if the search removes no whole layers. One layer always
            stays.
        kinds: Removable parts of each kind other than whole layers, such as heads and neurons.
        price_unit: Unit of size for comparing losses per size: a million parameters or a
            millisecond.
    """

    n_layers: int = 0
    kinds: tuple[UniformKind, ...] = ()
    price_unit: float = MILLION

    @cached_property
    def numbered_parts(self) -> list[int]:
        """The numbers of all removable heads, experts and neurons."""
        return [part for kind in self.kinds for block in kind.blocks for part in block]

    def size_of(self, removed: Collection[int]) -> float:
        """Return the total size of parts that are removed together."""
        layers = {part for part in removed if part < self.n_layers}
        layer_of = self.parts.layer_of
        return sum(self.sizes[p] for p in removed if p in layers or layer_of(p) not in layers)

    def largest_removal(self, removed: Collection[int] = ()) -> set[int]:
        """Return the largest set of parts that contains `removed` and can be removed."""
        largest = set(removed).union(*(kind.largest_extension(removed) for kind in self.kinds))
        if remaining := {*range(self.n_layers)}.difference(removed):
            largest |= remaining - {min(remaining, key=lambda layer: self.sizes[layer])}
        return largest

    def candidates(self, removed: Collection[int], order: Sequence[int]) -> list[list[set[int]]]:
        """List the sets of parts among which the next step of a search can choose.

        Args:
            removed: The parts that are removed so far.
            order: All parts other than whole layers, in the order in which each layer loses its
                parts.

        Returns:
            One list of sets for each kind of parts. For layers, each set is a single layer. For
            other kinds (e.g. heads), the only set leaves equally many parts in each block.
        """
        layers = [{layer} for layer in range(self.n_layers) if layer not in removed]
        extended = [kind.next_removal(removed, order) for kind in self.kinds]
        groups = [layers if layers[1:] else [], *([parts] for parts in extended if parts)]
        reachable = ([s for s in group if self.can_reach({*removed, *s})] for group in groups)
        return [group for group in reachable if group]

    def is_exhausted(self, removed: Collection[int]) -> bool:
        """Return whether the constraints allow no further removal."""
        return not self.candidates(removed, self.numbered_parts)


def unmet_budget_error(reason: str) -> ExperimentError:
    """Build the error for a strategy that cannot remove the requested amount."""
    return ExperimentError(
        f"the search cannot remove enough, because {reason}; remove less, or use another strategy, "
        "such as accuracy"
    )


def build_budget(
    key: Literal["remove", "keep"],
    amount: Amount | None,
    sizes: Sequence[float],
    model_size: float,
    title: str,
    constraints: Constraints = NO_CONSTRAINTS,
    parts: SearchParts | None = None,
    uniform_block: int | None = None,
    kinds: Sequence[UniformKind] = (),
) -> Budget:
    """Build the budget of a search that removes or keeps a given amount of the model.

    Args:
        key: `remove` if the amount is a minimum to remove, `keep` if it is a maximum to keep.
        amount: The amount to remove or to keep; None if only a budget of accuracy ends the search.
        sizes: Size of each part, in the quantity of `amount.measure`.
        model_size: Size of the whole model in the same quantity.
        title: The name of the search in messages.
        constraints: Layers that must stay.
        parts: Numbering of the parts that can be removed; None for whole layers.
        uniform_block: The attribute of `PartsBudget`.
        kinds: The attribute of `MixedBudget`.

    Returns:
        The budget.

    Raises:
        ExperimentError: The amount would remove nothing, everything, or more than allowed.
    """
    min_removed = 0.0
    if amount is not None:
        value = amount.value * model_size if amount.is_share else amount.value
        min_removed = value if key == "remove" else model_size - value
        if min_removed <= 0:
            raise ExperimentError(
                f"{title}: '{key}: {amount.text}' removes nothing: the model has "
                f"{_format_amount(model_size, amount.measure)}; keep less"
            )
    parts = parts or SearchParts("layer", len(sizes))
    fixed = frozenset(range(parts.total)).difference(parts.numbers)
    fixed |= {*parts.parts_of_layers(constraints.fixed(parts.layers))}
    shared: dict[str, Any] = {"fixed": fixed, "parts": parts, "model_size": model_size}
    arguments = tuple(sizes), min_removed
    budget: Budget
    if isinstance(parts, MixedParts):
        n_layers = parts.layers if parts.kinds[0].unit == "layer" else 0
        unit = MILLISECOND if amount is not None and amount.measure in TIMED else MILLION
        budget = MixedBudget(
            *arguments, **shared, n_layers=n_layers, kinds=tuple(kinds), price_unit=unit
        )
    elif parts.unit in NUMBERED_COMPONENTS:
        budget = PartsBudget(*arguments, **shared, uniform_block=uniform_block)
    else:
        pairs = ((m.count, m.groups(parts.layers)) for m in constraints.minimums)
        minimums = dict.fromkeys((group, count) for count, groups in pairs for group in groups)
        budget = Budget(*arguments, **shared, minimums=tuple(minimums))
    if amount is not None and not budget.can_reach(()):
        limit, bound = "at most", budget.largest_size
        if key == "keep":
            limit, bound = "no less than", model_size - bound
        names = constraints.names
        reason = f"it contradicts {names}" if names else _TOO_FEW.get(parts.unit, _TOO_FEW["layer"])
        if isinstance(budget, MixedBudget):
            reason = f"the model has too few removable {unit_plural(parts.unit)}"
        raise ExperimentError(
            f"{title}: '{key}: {amount.text}' is impossible, because {reason}. The model has "
            f"{_format_amount(model_size, amount.measure)}; "
            f"{key} {limit} {_format_amount(bound, amount.measure)}"
        )
    return budget


@lru_cache(maxsize=4096)
def _largest_removal(budget: Budget, removed: frozenset[int]) -> set[int]:
    """Return the largest set of parts that contains `removed` and can be removed.

    The function uses integer programming, because a layer can belong to several groups of
    `minimums`.
    """
    # Imported here, since most commands do not need it.
    import numpy as np
    from scipy import optimize

    parts = range(len(budget.sizes))
    # At least one of all parts stays, and the minimum number of each group.
    groups = [(parts, 1), *budget.minimums]
    membership = np.array([np.isin(parts, group) for group, _ in groups], dtype=float)
    max_removed = membership.sum(axis=1) - [minimum for _, minimum in groups]
    solution = optimize.milp(
        -np.array(budget.sizes) / max(budget.sizes),
        integrality=np.ones(len(parts)),
        bounds=optimize.Bounds(np.isin(parts, [*removed]), ~np.isin(parts, [*budget.fixed])),
        constraints=optimize.LinearConstraint(membership, ub=max_removed),
        options={"mip_rel_gap": 0},
    )
    assert solution.x is not None  # `removed` itself is allowed
    return {part for part in parts if solution.x[part] > 0.5}


def _format_amount(value: float, measure: AmountMeasure) -> str:
    """Format a number of parts, parameters, bytes or seconds."""
    if measure == "parts":
        return count_text(round(value), "part")
    if measure == "parameters":
        return f"{value / 1e6:,.1f}M parameters"
    if measure == "bytes":
        return f"{value / 1e6:,.1f} MB"
    return f"{1000 * value:,.3g} ms a token"


def _parse_names(value: Any) -> Any:
    """Parse one name, a list of names, or a list written as text."""
    if isinstance(value, str) and not value.startswith("["):
        return tuple(name.strip() for name in value.split(","))
    return as_tuple(value)


_ACCURACY_FORMS = {"max_drop": ("pp", "2pp"), "keep_accuracy": ("%", "95%")}
"""Unit and example of each setting."""
_PERCENTAGE = re.compile(r"(\d+(?:\.\d+)?) ?(pp|%)")


def parse_percentage(key: str, value: object) -> str:
    """Parse a budget of accuracy such as `2pp` or `95%`; return it without a space.

    Args:
        key: The setting, `max_drop` or `keep_accuracy`.
        value: The value from a file or an option.

    Returns:
        The budget as text.

    Raises:
        ValueError: The unit is missing or wrong, or the number is not between 0 and 100.

    Examples:
        >>> parse_percentage("max_drop", "2 pp")
        '2pp'
    """
    unit, example = _ACCURACY_FORMS[key]
    text = " ".join(str(value).split())
    match = _PERCENTAGE.fullmatch(text)
    if match is None or match[2] != unit:
        raise ValueError(f"invalid budget {short_text(value)}; expected e.g. {example}")
    if not 0 < float(match[1]) < 100:
        raise ValueError(f"invalid budget {text!r}; expected a value above 0 and below 100 {unit}")
    return f"{match[1]}{unit}"


AmountText = Annotated[str, BeforeValidator(lambda value: parse_amount(value).text)]
MaxDrop = Annotated[str, BeforeValidator(partial(parse_percentage, "max_drop"))]
KeptAccuracy = Annotated[str, BeforeValidator(partial(parse_percentage, "keep_accuracy"))]


class SearchSettings(StrictModel):
    """Settings of a pruning search, without the settings of the model and benchmark."""

    strategy: Name
    """Strategy of the search, e.g. accuracy, cosine_oneshot, last or random."""
    remove: AmountText | None = None
    """Minimum amount to remove, e.g. 8, 25 %, 25 % parameters, 70 MB or 5 ms."""
    keep: AmountText | None = None
    """Maximum amount to keep, e.g. 22, 100M parameters or 200 MB."""
    max_drop: MaxDrop | None = None
    """Largest loss of accuracy, in percentage points, e.g. 2pp."""
    keep_accuracy: KeptAccuracy | None = None
    """Smallest share of the intact model's accuracy to keep, e.g. 95%."""
    unit: SearchUnits = "layer"
    """Unit to remove: layer, attention, mlp, head, kv_head, expert or neuron. For several units,
    such as layer,neuron, the search minimises the loss per removed parameter."""
    protect: LayerWords = ()
    """Layers to keep, e.g. 0,1,last or 3-7, odd, even, or a kind such as full_attention."""
    among: LayerWords = ()
    """Layers that may be removed, in the notation of 'protect' (default: all)."""
    at_least: LayerMinimums | None = None
    """Minimum number of layers of a kind to keep. full_attention=2: two in the whole model.
    'full_attention=1 of 4': one in any four consecutive layers."""
    uniform: bool = False
    """Remove the same number of heads, experts or groups of neurons from each layer, so that the
    model can be saved (default: true with --output)."""
    calibrate: Annotated[tuple[Name, ...], BeforeValidator(_parse_names)] = ()
    """Calibration benchmarks, comma-separated (default: the benchmark itself)."""
    sample: Positive | None = None
    """Number of calibration documents per task (default: all)."""
    test_sample: Positive | None = None
    """Number of test documents per task (default: all)."""
    rescoring: Rescoring = "full"
    """Method of a greedy search to score candidates after each removal. full: score all candidates.
    lazy: skip candidates that cannot be the best. race: stop measuring a candidate as soon as it is
    significantly worse."""
    draws: Positive = 3
    """Number of draws of random strategies."""


CELL_KEYS = tuple(
    key
    for key in FIELDS_BY_KEY
    if key not in FILE_KEYS.values()
    and key not in ("removed", "control", "part", "limit", "sample", "until", "cluster", "observe")
)
"""Keys of `CellSettings` in a search file; the search itself removes parts and draws documents."""
