"""How many bits there are: the units that get a format each, and what a choice takes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tracker.core.changes import Ablation, Change
from tracker.core.errors import RequestError
from tracker.core.kinds import ENDS
from tracker.core.weight_formats import FORMATS

FORMS = "4.5bpw, 80 MB, 2.1 GB or 25 % bytes"
"""How a budget is written."""
_BUDGET = re.compile(r"(\d+(?:\.\d+)?) ?(bpw|MB|GB|MiB|GiB|% bytes)")
_BYTES = {"MB": 1e6, "GB": 1e9, "MiB": 2**20, "GiB": 2**30}


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
        """What it is called: `layer 3 mlp.down_proj`, `layer 3`, `embedding`."""
        if self.is_end:
            return self.which
        return f"layer {self.layer} {self.which}".strip()

    @property
    def place(self) -> str:
        """The same in a file: `3.mlp.down_proj`, `3`, `embedding`."""
        return self.which if self.is_end else f"{self.layer}.{self.which}".rstrip(".")

    def change(self, form: str) -> Change:
        """Return the change that gives it a format."""
        return Change.parse(f"{form}:{self.place}")

    @property
    def is_end(self) -> bool:
        """Whether it is the embedding or the head."""
        return self.which in ENDS

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return sum(outputs * inputs for outputs, inputs in self.shapes)

    def bits(self, form: str) -> float:
        """What they take in a format, in bits; maps whose rows have no whole blocks are refused.

        RequestError says which format.
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
    """Make the ablation that gives a model these formats."""
    return Ablation.of(*(unit.change(form) for unit, form in choice.items()))


def bits_of(choice: Choice) -> float:
    """Bits of a weight, on average over all units."""
    bits = sum(unit.bits(form) for unit, form in choice.items())
    return bits / sum(unit.weights for unit in choice)


@dataclass(frozen=True)
class BitBudget:
    """How many bits a weight of the units may take on average.

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
        """Whether a choice of all units is within it, but for rounding."""
        return bits_of(choice) <= self.bits * (1 + 1e-12)

    def bytes_of(self, bits: float) -> float:
        """What a model takes whose units have so many bits a weight."""
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
    found = _BUDGET.fullmatch(" ".join(text.split()))
    if found is None:
        raise RequestError(f"--budget: {text} is no budget; write one of: {FORMS}")
    number, unit = float(found[1]), found[2]
    weights = sum(each.weights for each in units)
    if unit == "bpw":
        bits = number
    else:
        size = number / 100 * whole if unit == "% bytes" else number * _BYTES[unit]
        bits = 8 * (size - rest) / weights
    made = BitBudget(text, bits, rest, weights)
    least = min(formats, key=lambda form: sum(each.bits(form) for each in units))
    lowest = bits_of(dict.fromkeys(units, least))
    if bits < lowest:
        size = made.bytes_of(lowest)
        raise RequestError(
            f"--budget: {text} is less than {least} takes everywhere: {lowest:.3g} bits a weight "
            f"of the linear maps, {size / 1e6:,.1f} MB with all else ({rest / 1e6:,.1f} MB); give "
            "more, or add a format of fewer bits to --format"
        )
    return made
