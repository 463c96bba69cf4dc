"""Choose number formats for a model's weight matrices within a budget of bits.

The first step measures the loss of rounding each matrix alone, and chooses the formats with the
smallest sum of these losses. The second step swaps formats between matrices, and measures the loss
of the whole model after each swap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize
from transformers import PreTrainedModel

from tracker.analysis.paired import PairedOutcomes
from tracker.engine.observers.layer_proxies import divergences
from tracker.engine.observers.rounding_error import rounding_errors, weight_errors
from tracker.engine.scoring.sweep import Engine
from tracker.ledger.shards import DocumentArrays
from tracker.measuring.observing import ObserveDocument
from tracker.models.parts.anatomy import linear_map_shapes
from tracker.models.parts.linear_maps import embedding_shapes
from tracker.models.sources import ModelSource, find_model
from tracker.schema.changes import Ablation, Change
from tracker.schema.config import CellRequest
from tracker.schema.documents import Document
from tracker.schema.errors import RequestError
from tracker.schema.estimates import Estimate
from tracker.schema.formats import join_words
from tracker.schema.grouping import group_by
from tracker.schema.kinds import OUTER_MATRICES
from tracker.schema.model_parts import ModelParts, check_parts, fill_parts, fused_map
from tracker.schema.weight_formats import FORMATS
from tracker.search.settings import match_amount
from tracker.stats.arrays import Array
from tracker.stats.support import widen

BUDGET_FORMS = "4.5bpw, 80 MB, 2.1 GB or 25 % bytes"
"""Examples of valid budgets, shown in messages."""


@dataclass(frozen=True)
class FormatUnit:
    """Weights that share a format: a linear map, maps that engines fuse, or all maps of a layer.

    Attributes:
        layer: Number of the layer, 0-based; 0 for the embedding and the output head.
        paths: Paths of the linear maps, as in `Change.path`. A single empty path stands for all
            maps of a layer. The loss of the unit is the sum of the losses of rounding each map
            alone.
        shapes: Number of outputs and number of inputs of each weight matrix.
    """

    layer: int
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        """The unit's name in messages, such as `layer 3 mlp.down_proj` or `embedding`."""
        names = ", ".join(self.paths)
        return names if self.is_embedding else f"layer {self.layer} {names}".strip()

    @property
    def keys(self) -> list[str]:
        """The unit's names in files, such as `3.mlp.down_proj`, `3` or `embedding`."""
        if self.is_embedding:
            return [*self.paths]
        return [f"{self.layer}.{path}".rstrip(".") for path in self.paths]

    def changes(self, form: str) -> list[Change]:
        """Return the changes that round the unit's weights to a format."""
        return [Change.parse(f"{form}:{key}") for key in self.keys]

    @property
    def is_embedding(self) -> bool:
        """True if the unit is the embedding or the output head."""
        return self.paths[0] in OUTER_MATRICES

    @property
    def n_weights(self) -> int:
        """The number of weights in the unit."""
        return sum(outputs * inputs for outputs, inputs in self.shapes)

    def bits(self, form: str) -> float:
        """Return the total number of bits of the unit's weights in a format.

        Raises RequestError if the format does not fit the row length of a matrix.
        """
        n_bits = 0.0
        for outputs, inputs in self.shapes:
            stored_format = FORMATS[form].for_rows(inputs)
            if stored_format is None:
                matrix = self.name if self.is_embedding else f"a linear map of {self.name}"
                raise RequestError(
                    f"{form} rounds blocks of {FORMATS[form].block} weights, but each row of "
                    f"{matrix} has {inputs} weights; leave {form} out of --format"
                )
            n_bits += outputs * inputs * stored_format.bits_per_weight(inputs)
        return n_bits


def list_units(
    maps: Sequence[Mapping[str, tuple[int, int]]],
    layers: Sequence[int],
    by_map: bool,
    embeddings: Mapping[str, tuple[int, int]] = {},
    is_tied: bool = False,
) -> list[FormatUnit]:
    """List the units of a model: groups of weights that each get one format.

    Args:
        maps: For each layer, a dict from linear maps to shapes (outputs, inputs).
        layers: Numbers of the layers whose maps get formats.
        by_map: True if each linear map is a unit; False if each layer is a unit.
        embeddings: Names and shapes of the embedding and the output head, if they get formats too.
        is_tied: True if linear maps that inference engines fuse are one unit.

    Returns:
        The units of the layers, followed by the embedding and the output head.
    """
    units = [FormatUnit(layer, ("",), tuple(maps[layer].values())) for layer in layers]
    if by_map:
        groups = {layer: group_by(maps[layer], fused_map if is_tied else str) for layer in layers}
        units = [
            FormatUnit(layer, tuple(paths), tuple(maps[layer][path] for path in paths))
            for layer in layers
            for paths in groups[layer].values()
        ]
    return units + [FormatUnit(0, (name,), (shape,)) for name, shape in embeddings.items()]


Units = Sequence[FormatUnit]
FormatChoice = Mapping[FormatUnit, str]
"""The chosen format of each unit."""


def find_units(
    source: ModelSource,
    model: PreTrainedModel,
    layers: Sequence[int],
    by_map: bool,
    with_embeddings: bool,
    is_tied: bool,
) -> list[FormatUnit]:
    """List the units of a model: groups of weights that each get one format.

    Args:
        source: The model's source, from which the shapes of its linear maps are read.
        model: The model, from which the shapes of embedding and output head are read.
        layers: Numbers of the layers whose linear maps get formats.
        by_map: True if each linear map is a unit; False if each layer is a unit.
        with_embeddings: True if the embedding and the output head are units too.
        is_tied: True if linear maps that inference engines fuse are one unit.

    Returns:
        The units of the layers, followed by the embedding and the output head.
    """
    embeddings = embedding_shapes(model) if with_embeddings else {}
    return list_units(linear_map_shapes(source), layers, by_map, embeddings, is_tied)


def choice_changes(choice: FormatChoice) -> list[Change]:
    """List the changes that round the weights of each unit to the chosen format."""
    return [change for unit, form in choice.items() for change in unit.changes(form)]


def choice_ablation(choice: FormatChoice) -> Ablation:
    """Return the ablation that rounds the weights of each unit to the chosen format."""
    return Ablation.from_changes(*choice_changes(choice))


def bits_per_weight(choice: FormatChoice) -> float:
    """Return the average number of bits per weight for the chosen formats."""
    n_bits = sum(unit.bits(form) for unit, form in choice.items())
    return n_bits / sum(unit.n_weights for unit in choice)


@dataclass(frozen=True)
class BitBudget:
    """Budget: the maximum average number of bits per weight.

    Attributes:
        text: The budget as the user wrote it.
        bits: The maximum average bits per weight.
        other_bytes: Size in bytes of the weights that get no format.
        n_weights: Number of weights that get a format.
    """

    text: str
    bits: float
    other_bytes: int
    n_weights: int

    def holds(self, choice: FormatChoice) -> bool:
        """Return whether the chosen formats of all units are within the budget."""
        return bits_per_weight(choice) <= self.bits * (1 + 1e-12)

    def model_bytes(self, bits: float) -> float:
        """Return the model's size in bytes at a given average number of bits per weight."""
        return self.other_bytes + bits * self.n_weights / 8


def parse_budget(
    text: str | None, units: Units, other_bytes: int, model_bytes: int, formats: Collection[str]
) -> BitBudget:
    """Parse a budget such as `4.5bpw` or `80 MB`.

    Args:
        text: The budget as the user wrote it; `BUDGET_FORMS` has examples. None for the smallest.
        units: The groups of weights that get one format each.
        other_bytes: Size in bytes of the weights that get no format.
        model_bytes: Size in bytes of the unchanged model.
        formats: The available formats.

    Returns:
        The budget.

    Raises:
        RequestError: The text is not a valid budget, or the budget is too small for these formats.
    """
    n_weights = sum(unit.n_weights for unit in units)
    smallest = smallest_choice(units, formats)
    min_bits = bits_per_weight(smallest)
    if text is None:
        return BitBudget("", min_bits, other_bytes, n_weights)
    amount = match_amount(text)
    if amount is None or amount.measure not in ("bits", "bytes"):
        raise RequestError(f"--budget: invalid budget {text!r}; expected e.g. {BUDGET_FORMS}")
    bits = amount.value
    if amount.measure == "bytes":
        bits = 8 * (bits * (model_bytes if amount.is_share else 1) - other_bytes) / n_weights
    budget = BitBudget(text, bits, other_bytes, n_weights)
    if bits < min_bits:
        sizes = (budget.model_bytes(min_bits), other_bytes)
        size, other_size = (f"{size / 1e6:,.1f} MB" for size in sizes)
        names = join_words(list(dict.fromkeys(smallest.values())), "or")
        raise RequestError(
            f"--budget {text} is too small. If every linear map has the format {names}, the linear "
            f"maps take {min_bits:.3g} bits per weight, and the model takes {size} ({other_size} "
            f"for other weights). Use at least --budget {math.ceil(1000 * min_bits) / 1000}bpw, or "
            "add a format of fewer bits to --format"
        )
    return budget


def smallest_choice(units: Units, formats: Collection[str]) -> FormatChoice:
    """Choose the format with the fewest bits for each unit."""
    return {unit: min(formats, key=unit.bits) for unit in units}


EDGE_LAYERS = 2
"""Number of layers at either end that get more bits, by a convention of other tools."""
BUDGET_SIZES = 8
"""Number of sizes that are tried for a budget of accuracy."""
MAX_SWAPS = 32
"""Maximum number of changed choices per round, all measured in one evaluation."""
MeasureChoices = Callable[[Sequence[FormatChoice]], PairedOutcomes]
"""Function that measures the documents' outcomes under some choices of all formats."""


class _Move(NamedTuple):
    """Change of one unit's format, with the number of added bits and the added loss."""

    unit: FormatUnit
    form: str
    bits: float
    loss: float


@dataclass(frozen=True)
class Refinement:
    """Improved choice of formats: the result of `FormatProblem.refine`.

    Attributes:
        choice: The final format of each unit.
        n_swaps: Number of swaps that were measured on the whole model.
        gains: Decrease of the loss by each accepted swap, with an interval that is corrected for
            the number of swaps in a round.
    """

    choice: FormatChoice
    n_swaps: int
    gains: tuple[Estimate, ...]


@dataclass(frozen=True)
class FormatProblem:
    """Choice of one format for each unit, with a small loss and within a budget of bits.

    Attributes:
        units: The groups of weights that get one format each.
        formats: The formats.
        budget: The budget, which must be large enough for `smallest_choice`.
        losses: Array `[units, formats]`, finite: loss of the model if only this unit is rounded to
            this format.
    """

    units: Units
    formats: Sequence[str]
    budget: BitBudget
    losses: Array

    def minimize_loss(self, losses: Array | None = None) -> FormatChoice:
        """Choose formats with the smallest sum of losses within the budget.

        This is the multiple-choice knapsack problem, solved exactly by scipy's `milp`. The method
        assumes that the loss of a model is the sum of its units' losses.

        Args:
            losses: Losses to use instead of the attribute `losses`, such as errors of weights.

        Returns:
            A dict from units to chosen formats.

        Examples:
            >>> units = [FormatUnit(n, ("a",), ((32, 32),)) for n in range(2)]
            >>> losses = np.array([[0.0, 0.5], [0.0, 0.1]])
            >>> budget = BitBudget("6.5bpw", 6.5, 0, 2048)
            >>> problem = FormatProblem(units, ["q8_0", "q4_0"], budget, losses)
            >>> [*problem.minimize_loss().values()]
            ['q8_0', 'q4_0']
        """
        losses, budget = self.losses if losses is None else losses, self.budget
        bits = np.array([[unit.bits(form) for form in self.formats] for unit in self.units])
        n_units, n_formats = losses.shape
        one_per_unit = np.kron(np.eye(n_units), np.ones(n_formats))
        # Bits decide between choices of equal loss only.
        tie_weight = 1e-9 * (np.ptp(losses) or 1.0) / max(bits.sum(), 1.0)
        solution = optimize.milp(
            (losses + tie_weight * bits).ravel(),
            integrality=np.ones(n_units * n_formats),
            bounds=optimize.Bounds(0, 1),
            constraints=[
                optimize.LinearConstraint(one_per_unit, 1, 1),
                optimize.LinearConstraint(bits.ravel()[None], ub=budget.bits * budget.n_weights),
            ],
            options={"mip_rel_gap": 1e-6},
        )
        assert solution.x is not None  # the smallest choice is within the budget
        indices = solution.x.reshape(n_units, n_formats).argmax(axis=1)
        return {u: self.formats[index] for u, index in zip(self.units, indices, strict=True)}

    def uniform_choice(self) -> FormatChoice:
        """Choose one format for all weights: the largest format within the budget.

        If every format exceeds the budget, each unit gets the format with the fewest bits.
        """
        return self._largest_choice({}) or smallest_choice(self.units, self.formats)

    def edge_choice(self) -> FormatChoice | None:
        """Choose the largest format for the first and last layers; one format for the others.

        The first two layers, the last two layers, the embedding and the output head get the largest
        format. The result is None if the budget is too small for these formats.
        """
        layers = sorted({unit.layer for unit in self.units if not unit.is_embedding})
        edges = {*layers[:EDGE_LAYERS], *layers[-EDGE_LAYERS:]}
        largest = max(self.formats, key=lambda form: sum(unit.bits(form) for unit in self.units))
        outer_units = (unit for unit in self.units if unit.is_embedding or unit.layer in edges)
        return self._largest_choice(dict.fromkeys(outer_units, largest))

    def ladder(self) -> list[FormatChoice]:
        """Choose the best formats for each of `BUDGET_SIZES` model sizes.

        At the first and largest size, all units have the largest format. The last size is the
        budget. For each size, the chosen formats have the smallest possible sum of losses.
        """
        unlimited = replace(self, budget=replace(self.budget, bits=math.inf))
        largest = unlimited.uniform_choice()
        sizes = np.linspace(bits_per_weight(largest), self.budget.bits, BUDGET_SIZES)[1:]
        budgets = (replace(self.budget, bits=float(bits)) for bits in sizes)
        choices = [largest, *(replace(self, budget=b).minimize_loss() for b in budgets)]
        distinct = {choice_ablation(choice): choice for choice in choices}.values()
        return sorted(distinct, key=bits_per_weight, reverse=True)

    def _largest_choice(self, given: FormatChoice) -> FormatChoice | None:
        """Choose one format for all units that are not in `given`: the largest within the budget.

        The result contains the formats of all units, including the units in `given`. The result is
        None if every format exceeds the budget.
        """
        choices = [{**dict.fromkeys(self.units, form), **given} for form in self.formats]
        return max(filter(self.budget.holds, choices), key=bits_per_weight, default=None)

    def find_swaps(self, choice: FormatChoice, max_swaps: int = MAX_SWAPS) -> list[FormatChoice]:
        """List choices of formats that give one unit more bits and other units fewer bits.

        All listed choices are within the budget. The list begins with the choices in which the
        additional bits lower the loss most. If possible, only one unit gets fewer bits: the unit
        whose loss increases least.

        Args:
            choice: The current format of each unit, in the order of `losses`.
            max_swaps: Maximum number of changed choices.

        Returns:
            The changed choices, each with the formats of all units.

        Examples:
            >>> units = [FormatUnit(layer, ("a",), ((32, 32),)) for layer in range(3)]
            >>> losses = np.array([[0.0, 0.5], [0.0, 0.1], [0.0, 0.2]])
            >>> budget = BitBudget("6bpw", 6, 0, 3072)
            >>> problem = FormatProblem(units, ["q8_0", "q4_0"], budget, losses)
            >>> swaps = problem.find_swaps(dict(zip(units, ["q8_0", "q4_0", "q4_0"])), 2)
            >>> [[*swap.values()] for swap in swaps]
            [['q4_0', 'q4_0', 'q8_0'], ['q4_0', 'q8_0', 'q4_0']]
        """
        raises, reductions = list[_Move](), list[_Move]()
        for (unit, old_form), costs in zip(choice.items(), self.losses, strict=True):
            old_bits, old_cost = unit.bits(old_form), costs[self.formats.index(old_form)]
            for form, cost in zip(self.formats, costs, strict=True):
                move = _Move(unit, form, unit.bits(form) - old_bits, float(cost - old_cost))
                if form != old_form:
                    (reductions if move.bits < 0 else raises).append(move)
        raises.sort(key=lambda move: move.loss)
        spare_bits = self.budget.bits * self.budget.n_weights * (1 + 1e-12)
        spare_bits -= sum(unit.bits(form) for unit, form in choice.items())
        choices: list[FormatChoice] = []
        payers: dict[_Move, set[_Move]] = {}
        n_before = -1
        while len(choices) > n_before:
            n_before, used_moves = len(choices), set[_Move]()
            for move in raises:
                excluded = used_moves | payers.get(move, set())
                free = [reduction for reduction in reductions if reduction not in excluded]
                paying = _choose_reductions(move, free, move.bits - spare_bits)
                if paying is None or (not paying and move in payers):
                    continue
                used_moves.update(paying)
                payers.setdefault(move, set()).update(paying)
                choices.append({**choice, **{m.unit: m.form for m in (move, *paying)}})
                if len(choices) == max_swaps:
                    return choices
        return choices

    def refine(self, start: FormatChoice, rounds: int, measure: MeasureChoices) -> Refinement:
        """Improve a choice of formats by swaps that significantly lower the model's loss.

        Args:
            start: The initial format of each unit, in the order of `losses`.
            rounds: Maximum number of rounds.
            measure: Function that measures several choices of formats on the calibration documents.

        Returns:
            The final formats, the number of measured swaps, and the decrease of the loss by each
            accepted swap.
        """
        choice, count, gains = start, 0, list[Estimate]()
        for _ in range(rounds):
            swaps = self.find_swaps(choice)
            if not swaps:
                break
            count += len(swaps)
            paired = measure([choice, *swaps])
            swap_gains = [paired_gain(paired, index, 0) for index in range(1, len(swaps) + 1)]
            swap_gains = widen(swap_gains, [len(paired.weights)] * len(swaps), len(swaps))
            proved = [
                n for n, gain in enumerate(swap_gains) if gain.low is not None and gain.low > 0
            ]
            if not proved:
                break
            best = max(proved, key=lambda n: swap_gains[n].value or 0.0)
            choice = swaps[best]
            gains.append(swap_gains[best])
        return Refinement(choice, count, tuple(gains))


def _choose_reductions(
    raised: _Move, reductions: Sequence[_Move], missing: float
) -> list[_Move] | None:
    """Choose format changes that free at least `missing` bits for the unit in `raised`.

    Args:
        raised: The format change of the unit that gets more bits.
        reductions: Possible changes of other units to formats with fewer bits.
        missing: Number of bits to free.

    Returns:
        The chosen changes; None if all changes together free too few bits.
    """
    payers: list[_Move] = []
    while missing > 0:
        changed = {raised.unit, *(move.unit for move in payers)}
        moves = [move for move in reductions if move.unit not in changed]
        if not moves:
            return None
        sufficient = [move for move in moves if move.bits <= -missing]
        payer = min(sufficient, key=lambda move: move.loss, default=None)
        payers.append(payer or min(moves, key=lambda move: -move.loss / move.bits))
        missing += payers[-1].bits
    return payers


def paired_gain(paired: PairedOutcomes, index: int, other_index: int) -> Estimate:
    """Estimate the mean gain of one choice of formats over another on the same documents."""
    reference = paired.ablated[:, [other_index]]
    return replace(paired, baseline=paired.ablated[:, index], ablated=reference).drop(0)


def layer_formats_request(
    cell: CellRequest, formats: Sequence[str], embeddings: Sequence[str] = ()
) -> CellRequest:
    """Build a request that measures the rounding of each layer or embedding to each format."""
    grid: dict[str, Any] = {"layers": cell.changes.layers, "interventions": tuple(formats)}
    if embeddings:
        grid |= {"components": ("layer", "linear"), "maps": tuple(embeddings)}
    return cell.with_changes(**grid)


def map_formats_request(
    cell: CellRequest,
    formats: Sequence[str],
    trust_remote_code: bool,
    embeddings: Sequence[str] = (),
) -> CellRequest:
    """Build a request that measures the rounding of each linear map to each format.

    Args:
        cell: Request that names the model, the benchmark, the layers and the linear maps.
        formats: The formats.
        trust_remote_code: Whether Python code that is downloaded with the model may run.
        embeddings: Embedding or output head to round too; names from `kinds.OUTER_MATRICES`.

    Returns:
        The request, with one ablation for each format of each matrix.

    Raises:
        ExperimentError: The model lacks a requested linear map.
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
    request = fill_parts(request, parts)
    if not embeddings:
        return request
    changes = [Change.parse(f"{form}:{name}") for form, name in product(formats, embeddings)]
    return request.with_changes([*request.changes.expand(), *changes])


def build_error_observer(
    engine: Engine, maps: Sequence[Change], kl: bool = False
) -> ObserveDocument:
    """Build a function that measures the errors of rounded linear maps on one document.

    The built function returns the values of `rounding_errors`, and `weight_error`, which is equal
    for all documents. If `kl` is true, the result contains the KL divergence of the model's output
    too.
    """
    weights = weight_errors(engine, maps)
    ablations = [Ablation.from_changes(change) for change in maps]

    def watch(document: Document) -> DocumentArrays:
        errors = {**rounding_errors(engine, document, maps), "weight_error": weights}
        if kl:
            errors["kl"] = divergences(engine, document, ablations)["kl"]
        return {name: np.asarray(value) for name, value in errors.items()}

    return watch
