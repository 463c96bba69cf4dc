"""Test budgets, and the choices within them, by hand and by trying all."""

from __future__ import annotations

import itertools
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest

from tests.helpers.registry import make_registered
from tracker.models.parts.anatomy import LayerAnatomy
from tracker.schema.changes import Change
from tracker.schema.errors import RequestError
from tracker.search.formats import (
    BitBudget,
    FormatProblem,
    FormatUnit,
    bits_per_weight,
    choice_ablation,
    list_units,
    parse_budget,
)
from tracker.studies.quantise import unit_losses

FORMATS = ("q4_0", "q5_1", "q8_0")
UNITS = [FormatUnit(layer, (name,), ((32, 64), (64, 32))) for layer in range(3) for name in "ab"]


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("6bpw", 6),
        ("6.25 bpw", 6.25),
        ("118784 bytes", None),
        ("0.114 MB", 5.97),
        ("30 % bytes", 6),
    ],
)
def test_a_budget_is_read(text: str, bits: float | None) -> None:
    """The units have 24,576 weights, all else takes 95,232 bytes, and the whole 98,304 more."""
    arguments = (text, UNITS, 95_232, 0 if "%" not in text else 378_880, FORMATS)
    if bits is None:
        with pytest.raises(RequestError, match=r"invalid budget .*; expected e\.g\. 4\.5bpw"):
            parse_budget(*arguments)
        return
    assert parse_budget(*arguments).bits == pytest.approx(bits, rel=0.03)


def test_too_small_budgets_are_refused() -> None:
    with pytest.raises(
        RequestError, match=r"4bpw is too small\. If every linear map has the format q4_0"
    ):
        parse_budget("4bpw", UNITS, 0, 0, FORMATS)
    with pytest.raises(RequestError, match=r"int4_g128 rounds blocks of 128 weights.* has 64"):
        parse_budget("5bpw", UNITS, 0, 0, ("int4_g128", "q8_0"))


@pytest.mark.parametrize(
    ("formats", "inputs"),
    # The rows of `UNITS` are too short for Q3_K, so MXFP4 is smaller there.
    [(("q4_k", "q6_k"), 576), (("int4_row",), 72), (("q3_k", "mxfp4"), 512)],
)
def test_the_smallest_budget_that_works_is_named(formats, inputs: int) -> None:
    units = [FormatUnit(0, ("a", "b"), ((32, inputs), (48, inputs))), *UNITS]
    with pytest.raises(RequestError) as error:
        parse_budget("2bpw", units, 0, 0, formats)
    (budget,) = re.findall(r"at least --budget (\S+)bpw", str(error.value))
    limit = parse_budget(f"{budget}bpw", units, 0, 0, formats)
    assert limit.bits == float(budget)
    products = itertools.product(formats, repeat=len(units))
    smallest = min(bits_per_weight(dict(zip(units, forms, strict=True))) for forms in products)
    assert limit.bits - 0.001 <= smallest <= limit.bits
    assert limit.holds(FormatProblem(units, formats, limit, np.empty(0)).uniform_choice())
    with pytest.raises(RequestError, match="too small"):
        parse_budget(f"{float(budget) - 0.001:.4f}bpw", units, 0, 0, formats)


GATE_UP, QKV = {"mlp.gate_proj", "mlp.up_proj"}, {f"self_attn.{name}_proj" for name in "qkv"}
EXPERTS = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
SHARED = {f"mlp.shared_experts.{name}_proj" for name in ("gate", "up")}
MLA = {"self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"}


@pytest.mark.parametrize(
    ("family", "layer", "groups"),
    [
        ("llama", 0, [QKV, GATE_UP]),
        ("opt", 0, [QKV]),
        ("phi3", 0, []),  # its query, key and value are one map already
        ("olmoe", 0, [QKV, EXPERTS]),
        ("deepseek_v3", 0, [MLA, GATE_UP]),
        ("deepseek_v3", 3, [MLA, EXPERTS, SHARED]),
    ],
)
def test_maps_that_vllm_fuses_are_one_unit(family: str, layer: int, groups) -> None:
    anatomy = LayerAnatomy.of(make_registered(family))
    maps = {path: linear.shape for path, linear in anatomy.linear_maps(layer).items()}
    units = list_units({layer: maps}, [layer], by_map=True, is_tied=True)
    several = [{*unit.paths} for unit in units if len(unit.paths) > 1]
    assert sorted(map(sorted, several)) == sorted(map(sorted, groups))
    shapes = (zip(unit.paths, unit.shapes, strict=True) for unit in units)
    assert dict(itertools.chain(*shapes)) == maps
    alone = list_units({layer: maps}, [layer], by_map=True)
    assert [unit.paths for unit in alone] == [(path,) for path in maps]


@pytest.mark.parametrize("seed", range(6))
def test_least_loss_of_tied_maps_equals_exhaustive_search(seed: int) -> None:
    """Over all formats of single maps, without those that split query, key and value."""
    generator = random.Random(seed)
    sizes = {f"self_attn.{name}_proj": 32 * generator.randint(1, 4) for name in "qkvo"}
    losses = {f"{form}:0.{path}": generator.uniform(-0.1, 1) for path in sizes for form in FORMATS}
    runs = [
        SimpleNamespace(change=Change.parse(name), gold_drop=SimpleNamespace(value=loss))
        for name, loss in losses.items()
    ]
    budget = BitBudget("", generator.uniform(4.6, 8), 0, 64 * sum(sizes.values()))
    maps = {path: (size, 64) for path, size in sizes.items()}
    units = list_units([maps], [0], by_map=True, is_tied=True)
    unit_costs = unit_losses(SimpleNamespace(runs=runs), units, FORMATS)
    choice = FormatProblem(units, FORMATS, budget, unit_costs).minimize_loss()
    products = itertools.product(FORMATS, repeat=len(sizes))
    choices = [dict(zip(sizes, forms, strict=True)) for forms in products if len({*forms[:3]}) == 1]
    bits = {"q4_0": 4.5, "q5_1": 6, "q8_0": 8.5}
    best = min(
        sum(losses[f"{form}:0.{path}"] for path, form in choice.items())
        for choice in choices
        if 64 * sum(sizes[path] * bits[form] for path, form in choice.items())
        <= budget.bits * budget.n_weights
    )
    assert budget.holds(choice)
    changes = choice_ablation(choice).changes
    assert sum(losses[str(change)] for change in changes) == pytest.approx(best)
    del runs[0]
    assert unit_losses(SimpleNamespace(runs=runs), units, FORMATS) is None


@pytest.mark.parametrize("seed", range(6))
def test_least_loss_equals_exhaustive_search(seed: int) -> None:
    generator = random.Random(seed)
    sizes = [generator.choice([32, 64, 128]) for _ in range(5)]
    units = [FormatUnit(n, ("a",), ((size, 32),)) for n, size in enumerate(sizes)]
    losses = np.array([[generator.uniform(-0.1, 1) for _ in FORMATS] for _ in units])
    budget = BitBudget("", generator.uniform(4.6, 8), 0, sum(unit.n_weights for unit in units))
    chosen = FormatProblem(units, FORMATS, budget, losses).minimize_loss()
    products = itertools.product(FORMATS, repeat=5)
    choices = [dict(zip(units, forms, strict=True)) for forms in products]

    def loss(choice) -> float:
        return sum(losses[n, FORMATS.index(choice[unit])] for n, unit in enumerate(units))

    allowed_choices = [choice for choice in choices if bits_per_weight(choice) <= budget.bits]
    assert bits_per_weight(chosen) <= budget.bits
    assert loss(chosen) == pytest.approx(min(map(loss, allowed_choices)))


@pytest.mark.parametrize("seed", range(6))
def test_swaps_stay_within_the_budget(seed: int) -> None:
    generator = random.Random(seed)
    units = [FormatUnit(n, ("a",), ((generator.choice([32, 64, 96]), 32),)) for n in range(9)]
    losses = np.array([[generator.uniform(-0.1, 1) for _ in FORMATS] for _ in units])
    budget = BitBudget("", generator.uniform(4.8, 7.5), 0, sum(unit.n_weights for unit in units))
    problem = FormatProblem(units, FORMATS, budget, losses)
    start = problem.minimize_loss()
    swapped = problem.find_swaps(start, 8)
    assert 0 < len(swapped) <= 8
    assert len({tuple(choice.values()) for choice in swapped}) == len(swapped)
    for choice in swapped:
        assert [*choice] == units
        assert budget.holds(choice)
        added_bits = {unit: unit.bits(choice[unit]) - unit.bits(start[unit]) for unit in units}
        assert sum(bits > 0 for bits in added_bits.values()) == 1
