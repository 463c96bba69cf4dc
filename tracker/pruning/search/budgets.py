"""How much is to go: so many layers, or parameters, bytes or seconds of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tracker.core.errors import ExperimentError
from tracker.core.safe_yaml import short

Measure = Literal["parts", "parameters", "bytes", "seconds"]
FORMS = "8, 25 %, 25 % parameters, 25 % bytes, 25 % seconds, 34M parameters, 70 MB or 5 ms"
"""How an amount is written."""

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
}


@dataclass(frozen=True)
class Amount:
    """A number of parts, or so much of what they take, or a share of what the model takes.

    Attributes:
        text: As it was written.
        value: The number; a fraction where it is a share.
        measure: Of what; seconds are those of one token.
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
    text = " ".join(str(given).split())
    found = _read(text)
    if isinstance(given, bool) or found is None:
        raise ValueError(f"{short(given)} is no amount; write one of: {FORMS}")
    if found.value <= 0 or (found.share and found.value >= 1):
        raise ValueError(f"{text} is nothing, or everything; write more than 0 and less than 100 %")
    return found


def _read(text: str) -> Amount | None:
    match = _AMOUNT.fullmatch(text)
    if match is None:
        return None
    number, unit = float(match[1]), match[2]
    if unit in _SHARES:
        return Amount(text, number / 100, _SHARES[unit], share=True)
    if unit in _UNITS:
        measure, each = _UNITS[unit]
        return Amount(text, number * each, measure)
    return Amount(text, number, "parts") if not unit and number.is_integer() else None


@dataclass(frozen=True)
class Budget:
    """When enough is removed.

    Attributes:
        each: What each part takes: 1, parameters, bytes or seconds.
        needed: What is to go at least; `budget` sees to it that a part can stay.
    """

    each: tuple[float, ...]
    needed: float

    @property
    def count(self) -> int:
        """How many parts are enough, whichever; ExperimentError if not even all but one."""
        smallest = sorted(range(len(self.each)), key=lambda part: self.each[part])
        for n in range(1, len(self.each)):
            if self.enough(smallest[:n]):
                return n
        raise out_of_reach("evolutionary takes so many layers, whichever they are")

    def enough(self, removed: Collection[int]) -> bool:
        """Whether it is enough to remove these parts."""
        gone = sum(self.each[part] for part in removed)
        return gone >= self.needed * (1 - 1e-9)

    def reachable(self, removed: Collection[int]) -> bool:
        """Whether enough can still go once these are gone, and a part stay."""
        parts = set(range(len(self.each)))
        return any(self.enough(parts - {stays}) for stays in parts.difference(removed))

    def left(self, removed: Collection[int]) -> list[int]:
        """The parts that could go next."""
        parts = [part for part in range(len(self.each)) if part not in removed]
        return [part for part in parts if self.reachable((*removed, part))]


def out_of_reach(why: str) -> ExperimentError:
    """Make the error of a strategy that cannot remove enough."""
    return ExperimentError(
        f"{why}, and that is not enough, since layers differ in size; let less go, or take a "
        "strategy that chooses layer by layer, such as accuracy"
    )


def budget(
    word: Literal["remove", "keep"], asked: Amount, each: Sequence[float], total: float, title: str
) -> Budget:
    """Say when enough is removed.

    Args:
        word: Whether the amount is to go at least, or may be left at most.
        asked: The amount.
        each: What each part takes, in the amount's measure.
        total: What the whole model takes; for `parts`, how many there are.
        title: The search, for messages.

    Returns:
        The budget.

    Raises:
        ExperimentError: Nothing would go, or everything.
    """
    value = asked.value * total if asked.share else asked.value
    needed = value if word == "remove" else total - value
    if needed <= 0:
        raise ExperimentError(
            f"{title}: '{word}: {asked.text}' removes nothing: the model has "
            f"{_written(total, asked.measure)}; keep less"
        )
    most = sum(each) - min(each)
    if needed > most * (1 + 1e-9):
        limit, bound = ("at most", most) if word == "remove" else ("no less than", total - most)
        raise ExperimentError(
            f"{title}: '{word}: {asked.text}' leaves no layer: of "
            f"{_written(total, asked.measure)}, {word} {limit} {_written(bound, asked.measure)}"
        )
    return Budget(tuple(each), needed)


def _written(value: float, measure: Measure) -> str:
    if measure == "parts":
        return f"{value:,.0f} parts"
    if measure == "parameters":
        return f"{value / 1e6:,.1f}M parameters"
    if measure == "bytes":
        return f"{value / 1e6:,.1f} MB"
    return f"{1000 * value:,.3g} ms a token"
