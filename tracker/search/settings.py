"""Settings of a search: the constraints, the amount to remove, and the keys of a file.

protect: {value: [0, 1, last]}
among: {value: {min: 8, max: 24}}
at_least: {value: {full_attention: 1 of 4}}
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from tracker.core.changes import MAX_LAYERS
from tracker.core.config import IN_THE_FILE, KEYS
from tracker.core.errors import ExperimentError, ModelError
from tracker.core.extent import Positive
from tracker.core.fields import Arguments, Name, Strict, decoded, several
from tracker.core.formats import counted
from tracker.core.kinds import NUMBERED, Component, SearchUnit
from tracker.core.model_parts import layers_of_kind
from tracker.core.prune_records import Rescoring
from tracker.core.safe_yaml import short
from tracker.core.search_parts import SearchParts

CONSTRAINTS = ("protect", "among", "at_least")
"""Keys of a search that define constraints."""
LAST = "last"
"""Word for the last layer."""
LAYER_FORMS = "[0, 1, last], 3-7, {min: 8, max: 24}, odd, even, or {kind: sliding_attention}"
"""Forms of layers in settings, for messages."""
LEAST = "{full_attention: 2}, or {full_attention: 1 of 4}"
"""Forms of minimum numbers of layers, for messages."""

_RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d+))?", re.ASCII)
_KIND = re.compile(r"[A-Za-z]\w*")
_SETTINGS: TypeAdapter[str] = TypeAdapter(Arguments)
_RATIO = re.compile(r"(\d+)(?: of (\d+))?", re.ASCII)


def _words(given: Any) -> tuple[int | str, ...]:
    """Parse layers as YAML gives them, as W&B passes them on, or as users type them."""
    text = given.strip() if isinstance(given, str) else ""
    if text[:1] in ("[", "(", "{"):
        for read in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError):
                given = read(text)
                break
        else:  # a list typed without quotes
            given = text.strip("[]()")
    if isinstance(given, dict):
        given = _of_mapping(given)
    if isinstance(given, str):
        given = given.split(",")
    if not isinstance(given, list | tuple):
        given = [given]
    words = [word for value in given for word in _read(value)]
    if not words:
        raise ValueError(f"it names no layer; write {LAYER_FORMS}")
    if len(set(words)) < len(words):
        raise ValueError("a layer stands twice in it")
    numbers = sorted(value for value in words if isinstance(value, int))
    return (*numbers, *sorted(value for value in words if isinstance(value, str)))


def _of_mapping(given: dict[Any, Any]) -> Any:
    if given.keys() == {"min", "max"}:
        return f"{given['min']}-{given['max']}"
    if given.keys() == {"kind"}:
        return given["kind"]
    raise ValueError(f"{short(given)} is no choice of layers; write {LAYER_FORMS}")


def _read(given: Any) -> Iterator[int | str]:
    text = str(given).strip()
    numbers = _RANGE.fullmatch(text)
    if isinstance(given, bool) or not (numbers or _KIND.fullmatch(text)):
        raise ValueError(f"{short(given)} is no layer; write {LAYER_FORMS}")
    if numbers is None:
        yield text
        return
    first, end = int(numbers[1]), int(numbers[2] or numbers[1])
    if end < first:
        raise ValueError(f"{text} ends before it begins; write {end}-{first}")
    if end >= MAX_LAYERS:
        raise ValueError(f"no model has a layer {end:,}")
    yield from range(first, end + 1)


def _ratios(given: Any) -> str:
    """Validate the number of layers, or `N of M`, that stay of each kind; return canonical JSON."""
    try:
        read = decoded(_SETTINGS.validate_python(given))
    except ValidationError:
        raise ValueError(f"{short(given)} says of no kind how many stay; write {LEAST}") from None
    ratios = {kind: " ".join(str(text).split()) for kind, text in read.items()}
    for kind, text in ratios.items():
        ratio = _RATIO.fullmatch(text)
        if ratio is None or int(ratio[1]) < 1:
            raise ValueError(f"{kind}: {short(text)} is no number of layers; write {LEAST}")
        if ratio[2] and int(ratio[2]) < int(ratio[1]):
            raise ValueError(f"{kind}: of {ratio[2]} layers {ratio[1]} cannot stay; write {LEAST}")
    if not ratios:
        raise ValueError(f"it names no kind; write {LEAST}")
    return json.dumps(ratios, sort_keys=True)


Chosen = Annotated[tuple[int | str, ...], BeforeValidator(_words)]
"""Layers: numbers, ascending, then words: kinds, `odd`, `even`, `last`."""
Ratios = Annotated[str, BeforeValidator(_ratios)]
"""Minimum numbers of layers by kind, as canonical JSON."""


@dataclass(frozen=True)
class Least:
    """A constraint: a minimum number of layers of a kind stays.

    Attributes:
        kind: The kind.
        layers: The layers of the kind.
        count: Minimum number of layers that stay.
        of: Number of consecutive layers of the intact model among which they stay; None = all.
    """

    kind: str
    layers: tuple[int, ...]
    count: int
    of: int | None

    def __str__(self) -> str:
        """Format the number as in a file."""
        return f"{self.count}" if self.of is None else f"{self.count} of {self.of}"

    def groups(self, total: int) -> Iterator[tuple[int, ...]]:
        """Yield the sets of layers, of `total` layers, of each of which `count` stay."""
        width = total if self.of is None else self.of
        for first in range(total - width + 1):
            yield tuple(layer for layer in self.layers if first <= layer < first + width)


@dataclass(frozen=True)
class Constraints:
    """Constraints of a search: the layers of a model that must stay.

    Attributes:
        protected: Layers that stay.
        among: The only layers that may go; None for all.
        least: Minimum numbers of layers by kind.
    """

    protected: tuple[int, ...] = ()
    among: tuple[int, ...] | None = None
    least: tuple[Least, ...] = ()

    @property
    def names(self) -> str:
        """The keys of the constraints, as messages name them."""
        values = {"protect": self.protected, "among": self.among, "at_least": self.least}
        return " and ".join(f"'{key}'" for key, value in values.items() if value)

    def fixed(self, total: int) -> frozenset[int]:
        """Return the layers, of `total` layers, that always stay."""
        among = range(total) if self.among is None else self.among
        return frozenset(range(total)) - (frozenset(among) - frozenset(self.protected))


FREE = Constraints()
"""No constraints."""


def constraints_of(
    protect: Sequence[int | str],
    among: Sequence[int | str],
    at_least: str | None,
    total: int,
    config: Callable[[], Any],
) -> Constraints:
    """Resolve the layers named in constraints.

    Args:
        protect: The layers of `protect`, as `Chosen`; empty for none.
        among: The layers of `among`, as `Chosen`; empty for none.
        at_least: The minimum numbers, as `Ratios`; None for none.
        total: Number of layers of the model.
        config: Function that reads its text configuration, which names kinds of layers.

    Returns:
        The constraints.

    Raises:
        ExperimentError: A layer or a kind does not exist, the intact model violates a constraint,
            or nothing could be removed.
    """
    protected = _layers("protect", protect, total, config)
    only = _layers("among", among, total, config) if among else None
    least = tuple(_least(kind, text, total, config) for kind, text in decoded(at_least).items())
    if not set(range(total) if only is None else only) - set(protected):
        held = f"all {total} layers" if only is None else "every layer of 'among'"
        raise ExperimentError(
            f"'protect' holds {held}, so that nothing can go; protect fewer layers"
        )
    return Constraints(protected, only, least)


def _layers(
    key: str, words: Sequence[int | str], total: int, config: Callable[[], Any]
) -> tuple[int, ...]:
    """Resolve layers from words."""
    kinds = [word for word in words if isinstance(word, str) and word != LAST]
    numbers = {word for word in words if isinstance(word, int)}
    if numbers and max(numbers) >= total:
        raise ExperimentError(
            f"'{key}': there is no layer {max(numbers)}; the model has layers 0 to {total - 1}"
        )
    last = {total - 1} if LAST in words else set()
    return tuple(sorted({*numbers, *last, *_of_kinds(key, kinds, config)}))


def _of_kinds(key: str, kinds: Sequence[str], config: Callable[[], Any]) -> tuple[int, ...]:
    try:
        return layers_of_kind(config(), kinds) if kinds else ()
    except ModelError as error:
        raise ExperimentError(f"'{key}': {error}") from None


def _least(kind: str, text: str, total: int, config: Callable[[], Any]) -> Least:
    """Parse `N`, or `N of M`; raise ExperimentError if the intact model violates it."""
    layers = _of_kinds("at_least", [kind], config)
    count, _, width = text.partition(" of ")
    least = Least(kind, layers, int(count), int(width) if width else None)
    head = f"'at_least': {kind}: {text}"
    if least.of is not None and least.of > total:
        raise ExperimentError(f"{head}: the model has {total} layers; write {count} of {total}")
    for first, group in enumerate(least.groups(total)):
        if len(group) < least.count:
            among = f" among layers {first} to {first + least.of - 1}" if least.of else ""
            raise ExperimentError(
                f"{head}: the intact model has {len(group)} of that kind{among}; ask for no "
                "more than it has"
            )
    return least


def in_words(layers: Sequence[int | str]) -> list[str]:
    """Format layers, runs of three and more as `8 to 24`."""
    runs: list[list[int | str]] = []
    for layer in layers:
        if runs and isinstance(layer, int) and layer - 1 == runs[-1][-1]:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return [
        word
        for run in runs
        for word in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))
    ]


Measure = Literal["parts", "parameters", "bytes", "seconds", "bits"]
AMOUNT_FORMS = "8, 25 %, 25 % parameters, 25 % bytes, 25 % seconds, 34M parameters, 70 MB or 5 ms"
"""Forms of amounts, for messages."""

_TOO_FEW: Mapping[Component, str] = {
    "layer": "leaves no layer",
    "head": "leaves layers without a head",
    "kv_head": "leaves layers without a group of heads",
    "expert": "leaves layers fewer experts than their routers choose",
}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?) ?(.*)")
_SHARES: Mapping[str, Measure] = {
    "%": "parts",
    "% parameters": "parameters",
    "% bytes": "bytes",
    "% seconds": "seconds",
}
_UNITS: Mapping[str, tuple[Measure, float]] = {
    "parameters": ("parameters", 1),
    "K parameters": ("parameters", 1e3),
    "M parameters": ("parameters", 1e6),
    "B parameters": ("parameters", 1e9),
    "KB": ("bytes", 1e3),
    "MB": ("bytes", 1e6),
    "GB": ("bytes", 1e9),
    "KiB": ("bytes", 2**10),
    "MiB": ("bytes", 2**20),
    "GiB": ("bytes", 2**30),
    "ms": ("seconds", 1e-3),
    "s": ("seconds", 1),
    "bpw": ("bits", 1),
}


@dataclass(frozen=True)
class Amount:
    """An amount of parts or of what they take, absolute or as a share of the model's.

    Attributes:
        text: The text as written.
        value: The number; a fraction if it is a share.
        measure: The quantity; seconds are those of one token, bits those of one weight.
        share: Whether it is a share of the whole model, of all parts for `parts`.
    """

    text: str
    value: float
    measure: Measure
    share: bool = False


def amount(given: int | str) -> Amount:
    """Parse an amount.

    Args:
        given: A whole number of parts, or a text as in `AMOUNT_FORMS`.

    Returns:
        The amount.

    Raises:
        ValueError: It is no amount, or nothing, or everything.

    Examples:
        >>> amount("25 % parameters").measure, amount("34M parameters").value
        ('parameters', 34000000.0)
    """
    read = read_amount(str(given))
    if isinstance(given, bool) or read is None or read.measure == "bits":
        raise ValueError(f"{short(given)} is no amount; write one of: {AMOUNT_FORMS}")
    if read.value <= 0 or (read.share and read.value >= 1):
        raise ValueError(
            f"{read.text} is nothing, or everything; write more than 0 and less than 100 %"
        )
    return read


def read_amount(text: str) -> Amount | None:
    """Parse a number of parts, or an amount with a unit; None if it is neither."""
    text = " ".join(text.split())
    match = _AMOUNT.fullmatch(text)
    if match is None:
        return None
    number, unit = float(match[1]), match[2]
    if unit in _SHARES:
        return Amount(text, number / 100, _SHARES[unit], share=True)
    if unit in _UNITS:
        measure, size = _UNITS[unit]
        return Amount(text, number * size, measure)
    return Amount(text, number, "parts") if not unit and number.is_integer() else None


@dataclass(frozen=True)
class Budget:
    """A budget, which is met when enough is removed.

    Attributes:
        each: The size of each part: 1, parameters, bytes or seconds.
        needed: Minimum size to remove; `budget` ensures that a part can stay.
        fixed: Parts that stay.
        least: Groups of parts, each with the minimum number of its parts that stay.
    """

    each: tuple[float, ...]
    needed: float
    fixed: frozenset[int] = frozenset()
    least: tuple[tuple[tuple[int, ...], int], ...] = ()

    @property
    def free(self) -> list[int]:
        """The parts that may go."""
        return [part for part in range(len(self.each)) if part not in self.fixed]

    def parts_of(self, unit: Component) -> SearchParts:
        """Return the parts of the budget."""
        return SearchParts(unit, len(self.each))

    def allows(self, removed: Collection[int]) -> bool:
        """Return whether these parts may be removed together."""
        return self.fixed.isdisjoint(removed) and all(
            sum(part not in removed for part in parts) >= stay for parts, stay in self.least
        )

    def enough(self, removed: Collection[int]) -> bool:
        """Return whether removing these parts is enough."""
        gone = sum(self.each[part] for part in removed)
        return gone >= self.needed * (1 - 1e-9)

    def reachable(self, removed: Collection[int]) -> bool:
        """Return whether these parts may be removed so that enough can follow and a part stays."""
        return self.allows(removed) and self.enough(self.most(removed))

    def most(self, removed: Collection[int] = ()) -> set[int]:
        """Return the largest removable set with these parts such that a part stays."""
        free = set(self.free)
        if self.least:
            return _largest(self, frozenset(removed))
        stay = {} if self.fixed else free.difference(removed)
        return free - {min(stay, key=lambda part: self.each[part])} if stay else free

    @property
    def largest(self) -> float:
        """The maximum size that may be removed."""
        return sum(self.each[part] for part in self.most())

    def left(self, removed: Collection[int]) -> list[int]:
        """Return the parts that could be removed next."""
        most = self.most(removed)
        sure = most if self.enough(most) else set()
        parts = [part for part in self.free if part not in removed]
        return [part for part in parts if part in sure or self.reachable((*removed, part))]


@dataclass(frozen=True)
class BudgetOfParts(Budget):
    """A budget of parts of size 1, several per layer.

    Attributes:
        parts: Their kind, with the minimum number of each layer that stays.
    """

    parts: SearchParts = field(kw_only=True)

    def parts_of(self, unit: Component) -> SearchParts:
        """Return the parts of the budget."""
        return self.parts

    @cached_property
    def _rooms(self) -> Mapping[int, int]:
        """Layer → the number of its parts that may be removed."""
        most = self.parts.per_layer - self.parts.stay
        return {layer: min(free, most) for layer, free in self._of_layers(self.free).items()}

    def _of_layers(self, parts: Iterable[int]) -> Counter[int]:
        return Counter(map(self.parts.layer_of, parts))

    @property
    def largest(self) -> float:
        """The maximum size that may be removed."""
        return float(sum(self._rooms.values()))

    def allows(self, removed: Collection[int]) -> bool:
        """Return whether these parts may be removed together."""
        gone = self._of_layers(removed).items()
        fit = all(count <= self._rooms.get(layer, 0) for layer, count in gone)
        return fit and self.fixed.isdisjoint(removed)

    def reachable(self, removed: Collection[int]) -> bool:
        """Return whether these parts may be removed so that enough can follow."""
        return self.allows(removed) and self.largest >= self.needed * (1 - 1e-9)

    def left(self, removed: Collection[int]) -> list[int]:
        """Return the parts that could be removed next."""
        if not self.reachable(removed):
            return []
        counts, gone = self._of_layers(removed), set(removed)
        full = {layer for layer, room in self._rooms.items() if counts[layer] >= room}
        free = (part for part in self.free if part not in gone)
        return [part for part in free if self.parts.layer_of(part) not in full]


def out_of_reach(why: str) -> ExperimentError:
    """Return the error of a strategy that cannot remove enough."""
    return ExperimentError(
        f"{why}, and that is not enough; let less go, or take a strategy that chooses one by one, "
        "such as accuracy"
    )


def budget(
    word: Literal["remove", "keep"],
    asked: Amount,
    each: Sequence[float],
    total: float,
    title: str,
    constraints: Constraints = FREE,
    parts: SearchParts | None = None,
) -> Budget:
    """Build the budget of an amount.

    Args:
        word: Whether the amount is a minimum to remove, or a maximum to keep.
        asked: The amount.
        each: The size of each part, in the amount's measure.
        total: The size of the whole model; for `parts`, their number.
        title: The search, for messages.
        constraints: The constraints, in layers.
        parts: The parts that may be removed; None = whole layers.

    Returns:
        The budget.

    Raises:
        ExperimentError: Nothing would be removed, or everything, or more than allowed.
    """
    value = asked.value * total if asked.share else asked.value
    needed = value if word == "remove" else total - value
    if needed <= 0:
        raise ExperimentError(
            f"{title}: '{word}: {asked.text}' removes nothing: the model has "
            f"{_written(total, asked.measure)}; keep less"
        )
    parts = parts or SearchParts("layer", len(each))
    fixed = {*parts.of_layers(constraints.fixed(parts.layers))}
    fixed |= set(range(parts.total)).difference(parts.numbers)
    if parts.unit in NUMBERED:
        found: Budget = BudgetOfParts(tuple(each), needed, frozenset(fixed), parts=parts)
    else:
        groups = ((one.groups(parts.layers), one.count) for one in constraints.least)
        least = dict.fromkeys((layers, count) for some, count in groups for layers in some)
        found = Budget(tuple(each), needed, frozenset(fixed), tuple(least))
    if not found.reachable(()):
        most = found.largest
        limit, bound = ("at most", most) if word == "remove" else ("no less than", total - most)
        names = constraints.names
        why = f"does not fit {names}" if names else _TOO_FEW.get(parts.unit, _TOO_FEW["layer"])
        raise ExperimentError(
            f"{title}: '{word}: {asked.text}' {why}: of "
            f"{_written(total, asked.measure)}, {word} {limit} {_written(bound, asked.measure)}"
        )
    return found


@lru_cache(maxsize=4096)
def _largest(within: Budget, removed: frozenset[int]) -> set[int]:
    """Return the largest removable set with some parts, by integer programming."""
    # Imported here, since most commands do not need it.
    import numpy as np
    from scipy import optimize

    parts = range(len(within.each))
    # At least one of all parts stays, and the minimum number of each group.
    groups = [(parts, 1), *within.least]
    holds = np.array([[part in group for part in parts] for group, _ in groups], dtype=float)
    may_go = holds.sum(axis=1) - [stay for _, stay in groups]
    solution = optimize.milp(
        -np.array(within.each) / max(within.each),
        integrality=np.ones(len(parts)),
        bounds=optimize.Bounds(
            [float(part in removed) for part in parts],
            [float(part not in within.fixed) for part in parts],
        ),
        constraints=optimize.LinearConstraint(holds, ub=may_go),
        options={"mip_rel_gap": 0},
    )
    assert solution.x is not None  # `removed` itself is allowed
    return {part for part in parts if solution.x[part] > 0.5}


def _written(value: float, measure: Measure) -> str:
    if measure == "parts":
        return counted(round(value), "part")
    if measure == "parameters":
        return f"{value / 1e6:,.1f}M parameters"
    if measure == "bytes":
        return f"{value / 1e6:,.1f} MB"
    return f"{1000 * value:,.3g} ms a token"


def _several(given: Any) -> Any:
    """Parse one name, or a list of names, also as W&B writes one, or as lm-eval's `--tasks`."""
    if isinstance(given, str) and not given.startswith("["):
        return tuple(name.strip() for name in given.split(","))
    return several(given)


Written = Annotated[str, BeforeValidator(lambda given: amount(given).text)]


class SearchSettings(Strict):
    """Settings of a search, beside those of its benchmarks, which are `CellSettings`."""

    strategy: Name
    """Strategy of the search, e.g. accuracy, cosine_oneshot, last or random."""
    remove: Written | None = None
    """Minimum amount to remove, e.g. 8, 25 %, 25 % parameters, 70 MB or 5 ms."""
    keep: Written | None = None
    """Maximum amount to keep, e.g. 22, 100M parameters or 200 MB."""
    unit: SearchUnit = "layer"
    """Unit to remove."""
    protect: Chosen = ()
    """Layers to keep, e.g. 0,1,last or 3-7, odd, even, or a kind such as full_attention."""
    among: Chosen = ()
    """Layers that may be removed, in the same notation (default: all)."""
    at_least: Ratios | None = None
    """Minimum number of layers of a kind to keep, of all or of each run of consecutive layers, e.g.
    full_attention=2 or 'full_attention=1 of 4'."""
    calibrate: Annotated[tuple[Name, ...], BeforeValidator(_several)] = ()
    """Calibration benchmarks, comma-separated (default: the benchmark itself)."""
    sample: Positive | None = None
    """Number of calibration documents per task (default: all)."""
    test_sample: Positive | None = None
    """Number of test documents per task (default: all)."""
    rescoring: Rescoring = "full"
    """Scoring of candidates after each removal of a greedy search. full: all candidates. lazy:
    those that can still win. race: on as few documents as a decision takes."""
    draws: Positive = 3
    """Number of draws of random strategies."""


OF_CELLS = tuple(
    key
    for key in KEYS
    if key not in IN_THE_FILE.values()
    and key not in ("removed", "control", "part", "limit", "sample", "until")
)
"""Keys of benchmarks that a search sets itself: it removes parts and draws documents."""
