"""Budgets of searches: a number of parts, or of their parameters, bytes or seconds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal

from tracker.core.errors import ExperimentError
from tracker.core.formats import counted
from tracker.core.kinds import NUMBERED, Component
from tracker.core.safe_yaml import short
from tracker.core.search_parts import SearchParts
from tracker.search.constraints import FREE, Constraints

Measure = Literal["parts", "parameters", "bytes", "seconds", "bits"]
FORMS = "8, 25 %, 25 % parameters, 25 % bytes, 25 % seconds, 34M parameters, 70 MB or 5 ms"
"""How an amount is written."""

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
    """An amount: of parts, of what they take, or a share of what the model takes.

    Attributes:
        text: As it was written.
        value: The number; a fraction where it is a share.
        measure: The quantity; seconds are those of one token, bits those of one weight.
        share: Whether it is a share of the whole model, of all parts for `parts`.
    """

    text: str
    value: float
    measure: Measure
    share: bool = False


def amount(given: int | str) -> Amount:
    """Read an amount.

    Args:
        given: A whole number of parts, or a text as in `FORMS`.

    Returns:
        What it says.

    Raises:
        ValueError: It is no amount, or nothing.

    Examples:
        >>> amount("25 % parameters").measure, amount("34M parameters").value
        ('parameters', 34000000.0)
    """
    read = read_amount(str(given))
    if isinstance(given, bool) or read is None or read.measure == "bits":
        raise ValueError(f"{short(given)} is no amount; write one of: {FORMS}")
    if read.value <= 0 or (read.share and read.value >= 1):
        raise ValueError(
            f"{read.text} is nothing, or everything; write more than 0 and less than 100 %"
        )
    return read


def read_amount(text: str) -> Amount | None:
    """Read a number of parts, or an amount with a unit; None where it is none."""
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
    """A budget: it is met when enough is removed.

    Attributes:
        each: What each part takes: 1, parameters, bytes or seconds.
        needed: What is to go at least; `budget` sees to it that a part can stay.
        fixed: Parts that stay.
        least: Some parts, and how many of them stay at least.
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
        """Return whether these parts may go together."""
        return self.fixed.isdisjoint(removed) and all(
            sum(part not in removed for part in parts) >= stay for parts, stay in self.least
        )

    def enough(self, removed: Collection[int]) -> bool:
        """Return whether it is enough to remove these parts."""
        gone = sum(self.each[part] for part in removed)
        return gone >= self.needed * (1 - 1e-9)

    def reachable(self, removed: Collection[int]) -> bool:
        """Return whether these may go, and enough with them, and a part stay."""
        return self.allows(removed) and self.enough(self.most(removed))

    def most(self, removed: Collection[int] = ()) -> set[int]:
        """Return the largest set with these parts that may go, so that a part stays."""
        free = set(self.free)
        if self.least:
            return _largest(self, frozenset(removed))
        stay = {} if self.fixed else free.difference(removed)
        return free - {min(stay, key=lambda part: self.each[part])} if stay else free

    @property
    def largest(self) -> float:
        """The most that may go."""
        return sum(self.each[part] for part in self.most())

    def left(self, removed: Collection[int]) -> list[int]:
        """Return the parts that could go next."""
        most = self.most(removed)
        sure = most if self.enough(most) else set()
        parts = [part for part in self.free if part not in removed]
        return [part for part in parts if part in sure or self.reachable((*removed, part))]


@dataclass(frozen=True)
class BudgetOfParts(Budget):
    """A budget of parts of which a layer has several, each of size 1.

    Attributes:
        parts: What they are, and how many of each layer's stay at least.
    """

    parts: SearchParts = field(kw_only=True)

    def parts_of(self, unit: Component) -> SearchParts:
        """Return the parts of the budget."""
        return self.parts

    @cached_property
    def _rooms(self) -> Mapping[int, int]:
        """Layer → how many of its parts may go."""
        most = self.parts.per_layer - self.parts.stay
        return {layer: min(free, most) for layer, free in self._of_layers(self.free).items()}

    def _of_layers(self, parts: Iterable[int]) -> Counter[int]:
        return Counter(map(self.parts.layer_of, parts))

    @property
    def largest(self) -> float:
        """The most that may go."""
        return float(sum(self._rooms.values()))

    def allows(self, removed: Collection[int]) -> bool:
        """Return whether these parts may go together."""
        gone = self._of_layers(removed).items()
        fit = all(count <= self._rooms.get(layer, 0) for layer, count in gone)
        return fit and self.fixed.isdisjoint(removed)

    def reachable(self, removed: Collection[int]) -> bool:
        """Return whether these may go, and enough with them."""
        return self.allows(removed) and self.largest >= self.needed * (1 - 1e-9)

    def left(self, removed: Collection[int]) -> list[int]:
        """Return the parts that could go next."""
        if not self.reachable(removed):
            return []
        counts, gone = self._of_layers(removed), set(removed)
        full = {layer for layer, room in self._rooms.items() if counts[layer] >= room}
        free = (part for part in self.free if part not in gone)
        return [part for part in free if self.parts.layer_of(part) not in full]


def out_of_reach(why: str) -> ExperimentError:
    """Make the error of a strategy that cannot remove enough."""
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
    """Make the budget of an amount.

    Args:
        word: Whether the amount is to go at least, or may be left at most.
        asked: The amount.
        each: What each part takes, in the amount's measure.
        total: What the whole model takes; for `parts`, how many there are.
        title: The search, for messages.
        constraints: What must stay, in layers.
        parts: What goes; None = whole layers.

    Returns:
        The budget.

    Raises:
        ExperimentError: Nothing would go, or everything, or more than may.
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
    """Return the largest set with some parts that may go: by integer programming."""
    # Commands that ask nothing of the kind begin without it.
    import numpy as np
    from scipy import optimize

    parts = range(len(within.each))
    # Which parts stay of all, at least one, and of each group so many.
    groups = [(parts, 1), *within.least]
    holds = np.array([[part in group for part in parts] for group, _ in groups], dtype=float)
    may_go = holds.sum(axis=1) - [stay for _, stay in groups]
    found = optimize.milp(
        -np.array(within.each) / max(within.each),
        integrality=np.ones(len(parts)),
        bounds=optimize.Bounds(
            [float(part in removed) for part in parts],
            [float(part not in within.fixed) for part in parts],
        ),
        constraints=optimize.LinearConstraint(holds, ub=may_go),
        options={"mip_rel_gap": 0},
    )
    assert found.x is not None  # what is removed is allowed
    return {part for part in parts if found.x[part] > 0.5}


def _written(value: float, measure: Measure) -> str:
    if measure == "parts":
        return counted(round(value), "part")
    if measure == "parameters":
        return f"{value / 1e6:,.1f}M parameters"
    if measure == "bytes":
        return f"{value / 1e6:,.1f} MB"
    return f"{1000 * value:,.3g} ms a token"
