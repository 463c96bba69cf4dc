"""The bits of a budget, the units that get a format each, and the bits of a choice."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tracker.core.changes import Ablation, Change
from tracker.core.errors import RequestError
from tracker.core.kinds import ENDS
from tracker.core.weight_formats import FORMATS
from tracker.search.budgets import read_amount

FORMS = "4.5bpw, 80 MB, 2.1 GB or 25 % bytes"
"""How a budget is written."""


@dataclass(frozen=True)
class Unit:
    """Linear maps of one layer that get one format, one or all; or the embedding, or the head.

    Attributes:
        layer: The layer, 0-based; 0 for what is of none.
        which: As `Change.path`.
        shapes: Of each of its maps outputs and inputs.
    """

    layer: int
    which: str
    shapes: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        """The name in messages: `layer 3 mlp.down_proj`, `layer 3`, `embedding`."""
        if self.is_end:
            return self.which
        return f"layer {self.layer} {self.which}".strip()

    @property
    def place(self) -> str:
        """The name in a file: `3.mlp.down_proj`, `3`, `embedding`."""
        return self.which if self.is_end else f"{self.layer}.{self.which}".rstrip(".")

    def change(self, form: str) -> Change:
        """Return the change that gives it a format."""
        return Change.parse(f"{form}:{self.place}")

    @property
    def is_end(self) -> bool:
        """True for the embedding and the head."""
        return self.which in ENDS

    @property
    def weights(self) -> int:
        """The number of its weights."""
        return sum(outputs * inputs for outputs, inputs in self.shapes)

    def bits(self, form: str) -> float:
        """Return the bits of its weights in a format.

        RequestError where the rows of a map have no whole blocks of it.
        """
        total = 0.0
        for outputs, inputs in self.shapes:
            own = FORMATS[form].for_rows(inputs)
            if own is None:
                raise RequestError(
                    f"{form} keeps {FORMATS[form].block} inputs together, and "
                    f"{self.name if self.is_end else f'a map of {self.name}'} has rows of "
                    f"{inputs}; leave it out of --format"
                )
            total += outputs * inputs * own.bits_of(inputs)
        return total


def units_of(
    maps: Sequence[Mapping[str, tuple[int, int]]],
    layers: Sequence[int],
    each: bool,
    ends: Mapping[str, tuple[int, int]] = {},
) -> list[Unit]:
    """List the units of some layers: each of their maps, or all of a layer together.

    Args:
        maps: Of each layer the name of each map → its shape.
        layers: The layers.
        each: Whether each map is a unit.
        ends: The same of the embedding and the head, where they are units too.

    Returns:
        The units, the layers' first.
    """
    others = [Unit(0, name, (shape,)) for name, shape in ends.items()]
    if each:
        own = [Unit(la, name, (shape,)) for la in layers for name, shape in maps[la].items()]
        return own + others
    return [Unit(layer, "", tuple(maps[layer].values())) for layer in layers] + others


Choice = Mapping[Unit, str]
"""Each unit's format."""


def ablation_of(choice: Choice) -> Ablation:
    """Return the ablation of a choice: all its units are rounded."""
    return Ablation.of(*(unit.change(form) for unit, form in choice.items()))


def bits_of(choice: Choice) -> float:
    """Bits of a weight, on average over all units."""
    bits = sum(unit.bits(form) for unit, form in choice.items())
    return bits / sum(unit.weights for unit in choice)


@dataclass(frozen=True)
class BitBudget:
    """The bits that a weight of the units may take on average.

    Attributes:
        text: As it was written.
        bits: The bits.
        rest: Bytes of all else that the model has, in its own dtype.
        weights: How many weights the units have.
    """

    text: str
    bits: float
    rest: int
    weights: int

    def holds(self, choice: Choice) -> bool:
        """Return whether a choice of all units is within it, but for rounding."""
        return bits_of(choice) <= self.bits * (1 + 1e-12)

    def bytes_of(self, bits: float) -> float:
        """Return the bytes of a model whose units have so many bits a weight."""
        return self.rest + bits * self.weights / 8


def budget(
    text: str, units: Sequence[Unit], rest: int, whole: int, formats: Collection[str]
) -> BitBudget:
    """Read a budget.

    Args:
        text: As in `FORMS`.
        units: What gets formats.
        rest: Bytes of all else.
        whole: Bytes of the whole model as it is.
        formats: What may be taken.

    Returns:
        The budget.

    Raises:
        RequestError: It is none, or no choice of these formats is within it.
    """
    amount = read_amount(text)
    if amount is None or amount.measure not in ("bits", "bytes"):
        raise RequestError(f"--budget: {text} is no budget; write one of: {FORMS}")
    weights, bits = sum(unit.weights for unit in units), amount.value
    if amount.measure == "bytes":
        bits = 8 * (bits * (whole if amount.share else 1) - rest) / weights
    within = BitBudget(text, bits, rest, weights)
    least = min(formats, key=lambda form: sum(unit.bits(form) for unit in units))
    lowest = bits_of(dict.fromkeys(units, least))
    if bits < lowest:
        size = within.bytes_of(lowest)
        raise RequestError(
            f"--budget: {text} is less than {least} takes everywhere: {lowest:.3g} bits a weight "
            f"of the linear maps, {size / 1e6:,.1f} MB with all else ({rest / 1e6:,.1f} MB); give "
            "more, or add a format of fewer bits to --format"
        )
    return within
