"""Choose formats of linear maps within a budget of bits.

First the smallest sum of losses is chosen. Then swaps of formats are measured as a whole, because
losses do not simply add up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize

from tracker.analysis.paired import PairedOutcomes
from tracker.core.changes import Ablation, Change
from tracker.core.config import CellRequest
from tracker.core.documents import Document
from tracker.core.errors import RequestError
from tracker.core.estimates import Estimate
from tracker.core.kinds import ENDS
from tracker.core.model_parts import ModelParts, check_parts, with_all_parts
from tracker.core.weight_formats import FORMATS
from tracker.engine.observers.layer_proxies import divergences
from tracker.engine.observers.rounding_error import rounding_errors, weight_errors
from tracker.engine.scoring.sweep import Engine
from tracker.ledger.shards import Arrays
from tracker.measuring.observing import Observe
from tracker.models.parts.anatomy import linear_map_shapes
from tracker.models.sources import find_model
from tracker.search.settings import read_amount
from tracker.stats.arrays import Array
from tracker.stats.support import together

FORMS = "4.5bpw, 80 MB, 2.1 GB or 25 % bytes"
"""Forms of budgets, for messages."""


@dataclass(frozen=True)
class Unit:
    """Linear maps of one layer that get one format, one or all; or the embedding, or the head.

    Attributes:
        layer: The layer, 0-based; 0 for the embedding and the head.
        which: Path of the map, as `Change.path`; empty for a whole layer.
        shapes: Outputs and inputs of each of its maps.
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
        """Return the change that gives the unit a format."""
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

        Raises RequestError if the rows of a map have no whole blocks of it.
        """
        total = 0.0
        for outputs, inputs in self.shapes:
            stored = FORMATS[form].for_rows(inputs)
            if stored is None:
                raise RequestError(
                    f"{form} keeps {FORMATS[form].block} inputs together, and "
                    f"{self.name if self.is_end else f'a map of {self.name}'} has rows of "
                    f"{inputs}; leave it out of --format"
                )
            total += outputs * inputs * stored.bits_of(inputs)
        return total


def units_of(
    maps: Sequence[Mapping[str, tuple[int, int]]],
    layers: Sequence[int],
    each: bool,
    ends: Mapping[str, tuple[int, int]] = {},
) -> list[Unit]:
    """List the units of some layers: each of their maps, or all of a layer together.

    Args:
        maps: Name of each map → its shape, for each layer.
        layers: The layers.
        each: Whether each map is a unit.
        ends: Names and shapes of the embedding and the head, if they are units too.

    Returns:
        The units, the layers' first.
    """
    others = [Unit(0, name, (shape,)) for name, shape in ends.items()]
    if each:
        units = [Unit(la, name, (shape,)) for la in layers for name, shape in maps[la].items()]
        return units + others
    return [Unit(layer, "", tuple(maps[layer].values())) for layer in layers] + others


Choice = Mapping[Unit, str]
"""The format of each unit."""


def ablation_of(choice: Choice) -> Ablation:
    """Return the ablation of a choice, in which all its units are rounded."""
    return Ablation.of(*(unit.change(form) for unit, form in choice.items()))


def bits_of(choice: Choice) -> float:
    """Return the average bits per weight over all units."""
    bits = sum(unit.bits(form) for unit, form in choice.items())
    return bits / sum(unit.weights for unit in choice)


@dataclass(frozen=True)
class BitBudget:
    """The average bits that a weight of the units may take.

    Attributes:
        text: The text as written.
        bits: The bits.
        rest: Bytes of all other weights of the model, in its own dtype.
        weights: Number of weights of the units.
    """

    text: str
    bits: float
    rest: int
    weights: int

    def holds(self, choice: Choice) -> bool:
        """Return whether a choice for all units is within the budget, up to rounding."""
        return bits_of(choice) <= self.bits * (1 + 1e-12)

    def bytes_of(self, bits: float) -> float:
        """Return the bytes of a model whose units have so many bits per weight."""
        return self.rest + bits * self.weights / 8


def budget(
    text: str, units: Sequence[Unit], rest: int, whole: int, formats: Collection[str]
) -> BitBudget:
    """Parse a budget.

    Args:
        text: Text as in `FORMS`.
        units: The units that get formats.
        rest: Bytes of all other weights.
        whole: Bytes of the whole unchanged model.
        formats: The available formats.

    Returns:
        The budget.

    Raises:
        RequestError: It is not a budget, or no choice of these formats is within it.
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


def least_loss(
    units: Sequence[Unit], formats: Sequence[str], losses: Array, budget: BitBudget
) -> Choice:
    """Choose formats of units so that the sum of losses is the least that the budget allows.

    This is the multiple-choice knapsack problem, solved exactly by integer programming (scipy's
    `milp`, HiGHS). That losses add up is an assumption, which measured sets test.

    Args:
        units: The units.
        formats: The formats.
        losses: Loss of each unit alone in each format `[units, formats]`; finite.
        budget: The budget; some choice is within it.

    Returns:
        The format of each unit; of two choices with equal loss the one of fewer bits.

    Examples:
        >>> units = [Unit(0, "a", ((32, 32),)), Unit(1, "a", ((32, 32),))]
        >>> losses = np.array([[0.0, 0.5], [0.0, 0.1]])
        >>> chosen = least_loss(units, ["q8_0", "q4_0"], losses, BitBudget("6.5bpw", 6.5, 0, 2048))
        >>> [*chosen.values()]
        ['q8_0', 'q4_0']
    """
    bits = np.array([[unit.bits(form) for form in formats] for unit in units])
    count, width = losses.shape
    one_each = np.kron(np.eye(count), np.ones(width))
    # Bits decide between choices of equal loss only.
    tie = 1e-9 * (np.ptp(losses) or 1.0) / max(bits.sum(), 1.0)
    solution = optimize.milp(
        (losses + tie * bits).ravel(),
        integrality=np.ones(count * width),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(bits.ravel()[None], ub=budget.bits * budget.weights),
        ],
        options={"mip_rel_gap": 1e-6},
    )
    assert solution.x is not None  # everything in the smallest format is within the budget
    picked = solution.x.reshape(count, width).argmax(axis=1)
    return {unit: formats[number] for unit, number in zip(units, picked.tolist(), strict=True)}


def alike(units: Sequence[Unit], formats: Sequence[str], budget: BitBudget) -> Choice:
    """Return the choice of one format for all units that uses most of the budget."""
    every = [dict.fromkeys(units, form) for form in formats]
    return max(filter(budget.holds, every), key=bits_of)


END_LAYERS = 2
"""Number of layers at either end that are kept in more bits, as tools do by convention."""


def ends_kept(units: Sequence[Unit], formats: Sequence[str], budget: BitBudget) -> Choice | None:
    """Return a choice with most bits for the first and last two layers, and one format for others.

    The embedding and the head have most bits too. None if no format fits the budget.
    """
    layers = sorted({unit.layer for unit in units if not unit.is_end})
    ends = {*layers[:END_LAYERS], *layers[-END_LAYERS:]}
    most = max(formats, key=lambda form: sum(unit.bits(form) for unit in units))
    every: list[Choice] = [
        {unit: most if unit.is_end or unit.layer in ends else form for unit in units}
        for form in formats
    ]
    return max(filter(budget.holds, every), key=bits_of, default=None)


class _Move(NamedTuple):
    """One unit in another format: the additional bits, and the additional loss alone."""

    unit: Unit
    form: str
    bits: float
    loss: float


def swaps(
    choice: Choice, formats: Sequence[str], losses: Array, budget: BitBudget, most: int
) -> list[Choice]:
    """Return swaps: one unit gets a format of no fewer bits, and others pay within the budget.

    The sums of losses decide which swaps come first and which units pay: the unit that loses least
    of those that suffice alone, or several that lose least per bit. Every raise is tried before a
    unit pays in the same format again, so that a unit with wrong sums spoils few swaps.

    Args:
        choice: The choice to change; its units in the order of `losses`.
        formats: The formats.
        losses: Loss of each unit alone in each format `[units, formats]`; finite.
        budget: The budget.
        most: Maximum number of swaps.

    Returns:
        The changed choices, all within the budget.

    Examples:
        >>> units = [Unit(layer, "a", ((32, 32),)) for layer in range(3)]
        >>> losses = np.array([[0.0, 0.5], [0.0, 0.1], [0.0, 0.2]])
        >>> within = BitBudget("6bpw", 6, 0, 3072)
        >>> chosen = dict(zip(units, ["q8_0", "q4_0", "q4_0"]))
        >>> [[*each.values()] for each in swaps(chosen, ["q8_0", "q4_0"], losses, within, 2)]
        [['q4_0', 'q4_0', 'q8_0'], ['q4_0', 'q8_0', 'q4_0']]
    """
    moves = [
        _Move(unit, form, unit.bits(form) - unit.bits(now), float(costs[number] - costs[at]))
        for (unit, now), costs in zip(choice.items(), losses, strict=True)
        for at in [formats.index(now)]
        for number, form in enumerate(formats)
        if form != now
    ]
    ups = sorted((move for move in moves if move.bits >= 0), key=lambda move: move.loss)
    downs = [move for move in moves if move.bits < 0]
    room = budget.bits * budget.weights * (1 + 1e-12)
    room -= sum(unit.bits(form) for unit, form in choice.items())
    choices: list[Choice] = []
    payers: dict[_Move, set[_Move]] = {}
    before = -1
    while len(choices) > before:
        before, paid = len(choices), set[_Move]()
        for up in ups:
            left = [move for move in downs if move not in paid | payers.get(up, set())]
            paying = _paying(up, left, up.bits - room)
            if paying is None or (not paying and up in payers):
                continue
            paid.update(paying)
            payers.setdefault(up, set()).update(paying)
            choices.append({**choice, **{move.unit: move.form for move in (up, *paying)}})
            if len(choices) == most:
                return choices
    return choices


def _paying(up: _Move, downs: Sequence[_Move], over: float) -> list[_Move] | None:
    """Return moves that release so many bits; None if they cannot."""
    paying: list[_Move] = []
    while over > 0:
        changed = {up.unit, *(move.unit for move in paying)}
        left = [move for move in downs if move.unit not in changed]
        if not left:
            return None
        enough = [move for move in left if move.bits <= -over]
        paying.append(
            min(enough, key=lambda move: move.loss)
            if enough
            else min(left, key=lambda move: -move.loss / move.bits)
        )
        over += paying[-1].bits
    return paying


SWAPS = 32
"""Number of changed choices per round, measured as streams of one evaluation."""
Measure = Callable[[Sequence[Choice]], PairedOutcomes]
"""Function that measures the outcomes of documents under whole choices."""


@dataclass(frozen=True)
class Refined:
    """Result of rounds of swaps.

    Attributes:
        choice: The choice.
        tried: Number of swaps that were measured.
        gains: Decrease of the loss by each swap that was kept, with intervals that hold for all
            swaps of its round at once.
    """

    choice: Choice
    tried: int
    gains: tuple[Estimate, ...]


def refined(
    start: Choice,
    formats: Sequence[str],
    losses: Array,
    budget: BitBudget,
    rounds: int,
    measure: Measure,
) -> Refined:
    """Swap formats while a swap is shown to cost less, each measured as a whole.

    Args:
        start: The initial choice; its units in the order of `losses`.
        formats: The formats.
        losses: Loss of each unit alone in each format `[units, formats]`, to order the swaps.
        budget: The budget.
        rounds: Maximum number of rounds.
        measure: Function that measures whole choices on the documents that choose.

    Returns:
        The choice that no swap of the last round is shown to beat on these documents, or that of
        the last round allowed.
    """
    choice, count, gains = start, 0, list[Estimate]()
    for _ in range(rounds):
        rivals = swaps(choice, formats, losses, budget, SWAPS)
        if not rivals:
            break
        count += len(rivals)
        paired = measure([choice, *rivals])
        gained = [apart(paired, number, 0) for number in range(1, len(rivals) + 1)]
        wide = together(gained, [len(paired.weights)] * len(gained), len(gained))
        shown = [n for n, gain in enumerate(wide) if gain.low is not None and gain.low > 0]
        if not shown:
            break
        best = max(shown, key=lambda n: wide[n].value or 0.0)
        choice = rivals[best]
        gains.append(wide[best])
    return Refined(choice, count, tuple(gains))


def apart(paired: PairedOutcomes, number: int, other: int) -> Estimate:
    """Estimate how much one choice keeps more than another, on the same documents."""
    return replace(
        paired, baseline=paired.ablated[:, number], ablated=paired.ablated[:, [other]]
    ).drop(0)


def each_layer(cell: CellRequest, formats: Sequence[str], ends: Sequence[str] = ()) -> CellRequest:
    """Return the request of each of a cell's layers and of some ends in each format only."""
    grid: dict[str, Any] = {"layers": cell.changes.layers, "interventions": tuple(formats)}
    if ends:
        grid |= {"components": ("layer", "linear"), "maps": tuple(ends)}
    return cell.with_changes(**grid)


def each_map(
    cell: CellRequest,
    formats: Sequence[str],
    trust_remote_code: bool = False,
    ends: Sequence[str] = (),
) -> CellRequest:
    """Return the request of each linear map of a cell's layers, or of its maps, in each format.

    Args:
        cell: The cell.
        formats: The formats.
        trust_remote_code: Whether code from the download may run.
        ends: The ends of `kinds.ENDS` to include.

    Returns:
        The request.

    Raises:
        ExperimentError: The model has no such map.
    """
    request = cell.with_changes(
        layers=cell.changes.layers,
        components=("linear",),
        interventions=tuple(formats),
        maps=cell.changes.maps,
    )
    names = tuple(map(tuple, linear_map_shapes(find_model(cell.model, trust_remote_code))))
    parts = ModelParts(len(names), maps=names)
    check_parts(request, parts)
    request = with_all_parts(request, parts)
    of_ends = (Change.parse(f"{form}:{end}") for form, end in product(formats, ends))
    return request.with_changes([*request.changes.expanded(), *of_ends]) if ends else request


def errors_of(engine: Engine, maps: Sequence[Change], kl: bool = False) -> Observe:
    """Build an observer of a document's `rounding_errors`, with `weight_error` the same for all.

    With `kl` it also measures the divergence of the model's output, which takes a pass per map.
    """
    weights = weight_errors(engine, maps)
    ablations = [Ablation.of(change) for change in maps]

    def watch(document: Document) -> Arrays:
        errors = {**rounding_errors(engine, document, maps), "weight_error": weights}
        if kl:
            errors["kl"] = divergences(engine, document, ablations)["kl"]
        return {name: np.asarray(value) for name, value in errors.items()}

    return watch
