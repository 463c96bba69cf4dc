"""Searches for heads and experts, held against models from which they were really taken."""

from __future__ import annotations

import json
import random
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import cli, printed, refused, save_llama
from tests.helpers.mixtures import save_mixture, without_experts
from tests.helpers.truth import find_layer_list, without_heads, without_neurons
from tracker.measuring.job import Options
from tracker.measuring.progress import Silent
from tracker.schema.changes import Ablation, Change
from tracker.schema.errors import ExperimentError
from tracker.schema.prune_records import PruneRecord, PruneStep
from tracker.schema.search_parts import SearchParts
from tracker.search import conduct
from tracker.search.cells import ModelCache, OpenCell
from tracker.search.planning import RandomScores
from tracker.search.request import SearchRequest, search_request
from tracker.search.scores import PartSet, Scores
from tracker.search.search import find_budget
from tracker.search.settings import PartsBudget
from tracker.search.strategies import LAYER_STRATEGIES, STRATEGIES, UNIFORM_STRATEGIES, Search

from .conftest import SETTINGS, Truth, stored_searches

pytestmark = pytest.mark.usefixtures("one_thread", "fast_timing", "in_process")
N_REMOVED, DOCUMENTS = 3, 4
UNITS = {"head": (4, 1), "kv_head": (2, 1), "expert": (4, 2), "neuron": (4, 1)}
"""What goes → how many a layer has, and how many of them must stay."""


class PartsTruth(Truth):
    """The same of heads, or of experts."""

    def __init__(self, unit: str, request: Any) -> None:
        self.per_layer, self.stay = UNITS[unit]

        def change_model(model: Any, removed: PartSet) -> Any:
            parts = [divmod(part, self.per_layer) for part in removed]
            changes = [Change(unit, (layer,), part=n) for layer, n in parts]
            ablation = Ablation.from_changes(*changes)
            if unit == "expert":
                return without_experts(model, "mixtral", ablation)
            if unit == "neuron":
                return without_neurons(model, ablation, "llama")
            return without_heads(model, ablation)

        super().__init__(request, change_model)
        self.all_parts = range(self.per_layer * len(find_layer_list(self.model)))

    def fits(self, removed: PartSet) -> bool:
        """Return whether enough parts of each layer remain."""
        layers = [part // self.per_layer for part in removed]
        return all(self.per_layer - layers.count(n) >= self.stay for n in set(layers))

    def candidates(self, removed: PartSet) -> Iterator[PartSet]:
        """Return each set with one more part of those that may be removed."""
        for part in self.all_parts:
            extended = tuple(sorted((*removed, part)))
            if part not in removed and self.fits(extended):
                yield extended


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parts")
    llama = save_llama(folder / "llama", seed=3, layers=2, vocab_size=352)
    save_mixture(mixtral := folder / "mixtral", "mixtral")
    return {"head": llama, "kv_head": llama, "expert": mixtral, "neuron": llama}


MakeRequest = Callable[..., SearchRequest]


@pytest.fixture(scope="module")
def make_request(models: dict[str, Path]) -> MakeRequest:
    """Make a request for a search of a unit."""

    def make(unit: str, **options: Any) -> SearchRequest:
        merged = {**SETTINGS, "sample": DOCUMENTS, "test_sample": DOCUMENTS, "remove": N_REMOVED}
        merged |= {"model": str(models[unit]), "unit": unit, "strategy": "accuracy"}
        return search_request(merged | options)

    return make


@pytest.fixture(scope="module", params=UNITS)
def unit(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def truth(unit: str, make_request: MakeRequest, one_thread: None) -> PartsTruth:
    return PartsTruth(unit, make_request(unit).calibration()[0])


@pytest.fixture(scope="module")
def model_cache(results: Path) -> ModelCache:
    from tracker.ledger.store import Ledger

    return ModelCache(Ledger(results), Options("cpu"), Silent())


def run_strategy(cache: ModelCache, request: SearchRequest) -> list[PruneStep]:
    budget = find_budget(request, cache)
    cell = OpenCell(request.calibration()[0], cache)
    scores = Scores([cell], budget.parts)
    search = Search(scores, budget, request.cell.documents.seed, rescoring=request.used_rescoring)
    return list(STRATEGIES[request.strategy](search))


@pytest.mark.parametrize("by", ["accuracy", "gold_logprob"])
def test_greedy_matches_really_changed_models(unit, truth, make_request, model_cache, by) -> None:
    removed: PartSet = ()
    count = 2 if unit == "kv_head" else N_REMOVED
    for step in run_strategy(model_cache, make_request(unit, strategy=by, remove=count)):
        order = sorted(truth.candidates(removed), key=lambda part_set: truth.key(by, part_set))
        assert step.removed == order[0]
        assert step.score is not None
        assert step.score == pytest.approx(truth.lost(by, order[0]), abs=1e-4)
        assert step.runner_up == (order[1] if len(order) > 1 else ())
        assert (step.layer,) == tuple(set(step.removed) - set(removed))
        removed = step.removed
    assert len(removed) == count


@pytest.mark.parametrize("by", ["accuracy", "gold_logprob"])
def test_one_shot_leaves_each_layer_enough(unit, truth, make_request, model_cache, by) -> None:
    """As many as may go: the smallest of all would take too many of some layer."""
    order = sorted(truth.candidates(()), key=lambda part_set: truth.key(by, part_set))
    max_removed = 2 * (truth.per_layer - truth.stay)
    expected: list[int] = []
    for (part,) in order:
        if truth.fits((*expected, part)):
            expected.append(part)
    request = make_request(unit, strategy=f"{by}_oneshot", remove=max_removed)
    steps = run_strategy(model_cache, request)
    assert [step.layer for step in steps] == expected[:max_removed]


BLOCKS = {"head": 2, "kv_head": 2, "expert": 4, "neuron": 4}
"""What goes → the size of a group of heads, or of a layer."""


@pytest.mark.parametrize("by", ["accuracy", "gold_logprob"])
def test_uniform_takes_the_best_of_every_block(unit, truth, make_request, model_cache, by) -> None:
    """The naive one: the ranks of a block's parts, each rank a step. Of experts two may go."""
    blocks = [truth.all_parts[n : n + BLOCKS[unit]] for n in truth.all_parts[:: BLOCKS[unit]]]
    ranked = [sorted(block, key=lambda part: truth.key(by, (part,))) for block in blocks]
    n_steps = 2 if unit == "expert" else 1
    remove = (n_steps - 1) * len(blocks) + 1  # more is removed where blocks are of more
    request = make_request(unit, strategy=f"{by}_oneshot", remove=remove, uniform=True)
    steps = run_strategy(model_cache, request)
    for n, step in enumerate(steps, 1):
        assert step.removed == tuple(sorted(part for block in ranked for part in block[:n]))
    assert len(steps) == n_steps


@pytest.mark.parametrize("strategy", UNIFORM_STRATEGIES)
def test_uniform_strategies_remove_as_much_of_each_layer(strategy: str) -> None:
    parts = SearchParts("expert", 4, per_layer=4, used_layers=(0, 2, 3), min_kept=2)
    fixed = frozenset(parts.parts_of_layers([1]))
    for needed in range(1, 8):
        sizes = (1.0,) * parts.total
        budget = PartsBudget(sizes, needed, fixed, parts=parts, uniform_block=4)
        assert budget.can_reach(()) == (needed <= 6)
        if needed <= 6:
            steps = list(STRATEGIES[strategy](Search(RandomScores(parts), budget)))
            counts = [Counter(map(parts.layer_of, step.removed)) for step in steps]
            assert counts == [dict.fromkeys((0, 2, 3), n) for n in range(1, len(steps) + 1)]
            assert len(steps) == -(-needed // 3)


def test_a_uniform_choice_is_saved(write, prune, tmp_path) -> None:
    """`--output` makes it uniform, and plain transformers loads what lm-eval has judged."""
    model = save_llama(tmp_path / "tiny", layers=3, vocab_size=352)
    settings = {"model": str(model), "unit": "kv_head", "remove": 2, "sample": 4, "test_sample": 4}
    path = write(strategy=["gold_logprob_oneshot", "random"], **settings)
    for option, problem in (
        ("--strategy=accuracy", "accuracy removes one part in each step"),
        ("--uniform=false", "only if each layer loses the same number"),
        ("--protect=0", "leave 'protect' and 'among' out"),
        ("--unit=mlp", "if 'unit' is mlp"),
    ):
        refused(prune(path, option, "--output", tmp_path / "saved"), problem)
    result = prune(path, "--output", tmp_path / "saved")
    assert result.exit_code == 0, result.output
    records = {record.strategy: record for record in stored_searches(tmp_path)}
    best = records["gold_logprob_oneshot"]
    removed = [str(part) for part in best.parts.removal(best.removed).parts]
    facts = json.loads((tmp_path / "saved" / "tracker.json").read_text())
    assert facts["removed_parts"] == removed
    assert [best.parts.layer_of(part) for part in best.removed] == [0, 1, 2]
    (accuracy,) = facts["accuracy"]
    assert accuracy["after"]["value"] == best.steps[-1].test.level.value  # type: ignore[union-attr]
    assert facts["proof"]["documents"] == 4
    assert facts["strategy"] == "gold_logprob_oneshot"
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 1)
    # The command that is printed without `--output` saves the same model, and measures it anew.
    output = prune(path, "--uniform=true").output
    command = output.split("to save the recommended model: ")[1].splitlines()[0]
    words = [tmp_path / "again" if word == "lighter" else word for word in shlex.split(command)[1:]]
    assert cli(*words, "--results", tmp_path / "new").exit_code == 0
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("saved", "again")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_budget_recommends_what_can_be_saved(write, prune, tmp_path, monkeypatch) -> None:
    """Of 6 groups of 2 heads, 5 cannot stay: 96 is no multiple of 10."""
    shape = {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 6}
    model = save_llama(tmp_path / "tiny", layers=2, **shape)
    settings = {"model": str(model), "unit": "kv_head", "strategy": "gold_logprob_oneshot"}
    settings |= {"sample": 4, "test_sample": 16}
    output = tmp_path / "saved"
    refused(prune(write(remove=1, **settings), "--output", output), "does not accept 5 ")
    # The later steps can be saved too, so a test refuses them here.
    monkeypatch.setattr(conduct, "find_part_refusal", lambda _, r: "no" * (len(r.parts) != 4))
    result = prune(write(remove=None, max_drop="60pp", **settings), "--output", output)
    assert result.exit_code == 0, result.output
    (record,) = stored_searches(tmp_path)
    assert [len(step.removed) for step in record.steps] == [2, 4, 6, 8, 10]
    assert AutoModelForCausalLM.from_pretrained(output).config.num_key_value_heads == 4


PARTS = SearchParts("expert", 4, per_layer=3, used_layers=(0, 2, 3), min_kept=2)
"""Of which one a layer may go; layer 1 has none."""


def naive_sets(parts: SearchParts, fixed: frozenset[int], min_removed: int) -> list[set[int]]:
    """All sets that are enough, of parts that are there and may go, and leave each layer enough."""
    part_sets = []
    for size in range(min_removed, len(parts.numbers) + 1):
        for subset in combinations(parts.numbers, size):
            counts = Counter(part // parts.per_layer for part in subset)
            if not fixed & set(subset) and max(counts.values()) <= parts.per_layer - parts.min_kept:
                part_sets.append(set(subset))
    return part_sets


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - set(LAYER_STRATEGIES)))
def test_no_strategy_leaves_too_few_parts(strategy: str) -> None:
    rng = random.Random(5)
    for needed in (1, 2, 3):
        fixed = frozenset(rng.sample(PARTS.numbers, 2)) | set(PARTS.parts_of_layers([1]))
        budget = PartsBudget((1.0,) * PARTS.total, needed, fixed, parts=PARTS)
        ends = naive_sets(PARTS, fixed, needed)
        assert budget.can_reach(()) == bool(ends)
        for size in range(needed):
            part_set = set(rng.sample(PARTS.numbers, size))
            can_lead = any(part_set <= end for end in ends)
            assert budget.can_reach(part_set) == can_lead
            if can_lead:
                remaining = (part for part in PARTS.numbers if part not in part_set)
                expected = [p for p in remaining if any({*part_set, p} <= end for end in ends)]
                assert budget.next_parts(part_set) == expected
        try:
            steps = list(STRATEGIES[strategy](Search(RandomScores(PARTS), budget)))
        except ExperimentError:
            assert strategy == "last"
            continue
        assert set(steps[-1].removed) in ends
        assert len(steps[-1].removed) == needed


def test_a_file_of_heads_is_searched_and_shown(write, prune, tmp_path) -> None:
    settings = {"unit": "head", "protect": {"value": [0, "last"]}, "remove": 2, "sample": 4}
    settings |= {"model": str(save_llama(tmp_path / "tiny", layers=3))}
    path = write(strategy=["gold_logprob_oneshot", "random"], draws=1, test_sample=4, **settings)
    plan_text = printed("plan", path, "--gflops=1", f"--results={tmp_path}/new")
    assert "copa: gold_logprob_oneshot, remove 2 heads" in " ".join(plan_text.split())
    result = prune(path)
    assert result.exit_code == 0, result.output
    records = {r.strategy: r for r in stored_searches(tmp_path)}
    assert len(records) == 2
    for record in records.values():
        assert (record.per_layer, record.there, record.protected) == (4, 12, (0, 2))
        assert PruneRecord.model_validate_json(record.model_dump_json()) == record
        assert {record.parts.layer_of(part) for part in record.removed} == {1}
        assert set(record.kept) >= {0, 2}
    best_record = records["gold_logprob_oneshot"]
    names = ", ".join(f"{part // 4}.{part % 4}" for part in best_record.removed)
    assert best_record.names == names
    # The first head alone is a run, as any that is asked for.
    assert len(best_record.rests_on) == 1
    text = " ".join(result.output.split())
    assert f"removes heads {names} (2 of 12)" in text
    assert "add: --uniform true" in text
