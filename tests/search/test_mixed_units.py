"""Searches that remove layers, heads and neurons together, held against changed models."""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import AutoModelForCausalLM

from tests.conftest import cli, printed, save_llama
from tests.helpers.truth import pruned_copy, without_heads, without_neurons
from tracker.ledger.store import Ledger
from tracker.measuring.job import Options
from tracker.measuring.progress import Silent
from tracker.models.load import LoadedModel
from tracker.schema.changes import Ablation, Change
from tracker.schema.errors import ExperimentError
from tracker.schema.prune_records import PruneRecord
from tracker.schema.search_parts import MixedParts
from tracker.search import search
from tracker.search.cells import ModelCache, OpenCell
from tracker.search.planning import RandomScores
from tracker.search.request import search_request
from tracker.search.scores import Scores
from tracker.search.search import find_budget
from tracker.search.settings import MixedBudget
from tracker.search.strategies import STRATEGIES, Search

from .conftest import SETTINGS, Truth, stored_searches

pytestmark = pytest.mark.usefixtures("one_thread", "fast_timing", "in_process")
LAYERS, GROUPS, NEURONS = 3, 2, 4
UNITS = "layer,kv_head,neuron"


class Removal(NamedTuple):
    """Removed layers, and of each layer the removed groups of heads and of neurons."""

    layers: tuple[int, ...] = ()
    heads: tuple[tuple[int, ...], ...] = ((),) * LAYERS
    neurons: tuple[tuple[int, ...], ...] = ((),) * LAYERS

    @property
    def parts(self) -> tuple[Ablation, Ablation]:
        """The removals of heads and of neurons."""
        pairs = (("kv_head", self.heads), ("neuron", self.neurons))
        return tuple(  # type: ignore[return-value]
            Ablation.from_changes(
                *(Change(u, (m,), part=n) for m, ns in enumerate(numbers) for n in ns)
            )
            for u, numbers in pairs
        )

    @property
    def ablation(self) -> Ablation:
        heads, neurons = self.parts
        return Ablation.from_changes(*heads.changes, *neurons.changes, removed=self.layers)

    def apply(self, model: Any) -> Any:
        """Zero the columns of heads and neurons in a copy, and cut the layers."""
        heads, neurons = self.parts
        return pruned_copy(
            without_heads(without_neurons(model, neurons, "llama"), heads), self.layers
        )

    def count_parameters(self, model: Any) -> int:
        """Count the parameters of a new model with the smaller numbers."""
        config, n_heads = copy.deepcopy(model.config), GROUPS - len(self.heads[0])
        config.head_dim = config.hidden_size // config.num_attention_heads
        config.num_attention_heads = config.num_attention_heads // GROUPS * n_heads
        config.num_key_value_heads, config.num_hidden_layers = n_heads, LAYERS - len(self.layers)
        width = config.intermediate_size // NEURONS
        config.intermediate_size -= width * len(self.neurons[0])
        return int(type(model)(config).num_parameters())

    def extend(self, ranks: dict[str, list[list[int]]]) -> Iterator[Removal]:
        """Yield the candidates of the next step."""
        remaining = [layer for layer in range(LAYERS) if layer not in self.layers]
        for layer in remaining if len(remaining) > 1 else ():
            yield self._replace(layers=tuple(sorted((*self.layers, layer))))
        if (n := len(self.heads[0]) + 1) < GROUPS:
            yield self._replace(heads=tuple(tuple(rank[:n]) for rank in ranks["kv_head"]))
        if (n := len(self.neurons[0]) + 1) < NEURONS:
            yield self._replace(neurons=tuple(tuple(rank[:n]) for rank in ranks["neuron"]))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(
        tmp_path_factory.mktemp("mixed") / "llama", seed=3, layers=LAYERS, tie_word_embeddings=True
    )


def make_request(tiny: Path, **options: Any) -> Any:
    merged = {**SETTINGS, "sample": 4, "test_sample": 4, "remove": "60 %", "unit": UNITS}
    return search_request({**merged, "model": str(tiny), "strategy": "gold_logprob", **options})


@pytest.fixture(scope="module")
def cache(results: Path) -> ModelCache:
    return ModelCache(Ledger(results), Options("cpu"), Silent())


@pytest.mark.parametrize("by", ["gold_logprob", "accuracy"])
def test_each_step_loses_least_per_parameter(tiny: Path, cache: ModelCache, by: str) -> None:
    request = make_request(tiny, strategy=by)
    truth = Truth(request.calibration()[0], lambda model, r: (r or Removal()).apply(model))

    def key(removal: Removal, former: Removal) -> tuple[float, ...]:
        other_measure = "accuracy" if by == "gold_logprob" else "gold_logprob"
        counts = [r.count_parameters(truth.model) / 1e6 for r in (former, removal)]
        return tuple(
            (truth.lost(name, removal) - truth.lost(name, former)) / (counts[0] - counts[1])  # type: ignore[arg-type]
            for name in (by, other_measure)
        )

    def rank(field: str, layer: int, count: int) -> list[int]:
        def alone(number: int) -> Removal:
            numbers = tuple((number,) if n == layer else () for n in range(LAYERS))
            return Removal(**{field: numbers})

        def losses(number: int) -> tuple[float, float, int]:
            names = (by, "accuracy" if by == "gold_logprob" else "gold_logprob")
            first, second = (round(truth.lost(name, alone(number)), 4) for name in names)  # type: ignore[arg-type]
            return first, second, -number

        return sorted(range(count), key=losses)

    ranks = {
        "kv_head": [rank("heads", layer, GROUPS) for layer in range(LAYERS)],
        "neuron": [rank("neurons", layer, NEURONS) for layer in range(LAYERS)],
    }
    budget = find_budget(request, cache)
    assert isinstance(budget, MixedBudget)
    scores = Scores([OpenCell(request.calibration()[0], cache)], budget.parts)
    former, kinds, total = Removal(), set(), truth.model.num_parameters()
    for step in STRATEGIES[by](Search(scores, budget)):
        keys = {removal: key(removal, former) for removal in former.extend(ranks)}
        best = min(keys, key=keys.__getitem__)
        assert budget.parts.removal(step.removed) == best.ablation
        assert step.score == pytest.approx(keys[best][0], abs=1e-2)
        assert total - budget.size_of(step.removed) == best.count_parameters(truth.model)
        kinds |= {name for name in best._fields if getattr(best, name) != getattr(former, name)}
        former = best
    assert len(kinds) > 1, "more than one unit was removed"
    removed_share = 1 - former.count_parameters(truth.model) / total
    assert removed_share >= 0.6


def test_each_step_loses_least_per_millisecond(tiny: Path, results: Path, monkeypatch) -> None:
    """The times follow the shapes of really narrowed models: 4 ms a group of neurons."""

    def time_layers(loaded: LoadedModel, is_decoding: bool) -> tuple[list[float], float]:
        config = loaded.model.config
        neurons = loaded.layers[-1].mlp.up_proj.weight.shape[0] / 12
        milliseconds = 1 + config.num_key_value_heads + 4 * neurons
        return [1e-3 * milliseconds] * len(loaded.layers), 0.06

    monkeypatch.setattr(search, "_time_layers", time_layers)
    cache = ModelCache(Ledger(results), Options("cpu"), Silent())
    request = make_request(tiny, remove="50 % latency")
    assert "remove 50 % latency" in request.title
    budget = find_budget(request, cache)
    sizes = [19e-3] * LAYERS + [1e-3] * LAYERS * GROUPS + [4e-3] * LAYERS * NEURONS
    assert budget.sizes == pytest.approx(sizes)
    assert budget.min_removed == pytest.approx(0.03)
    parameters = find_budget(make_request(tiny), cache)
    assert isinstance(budget, MixedBudget)
    (draw,) = search.run_search(request, budget, cache)
    scores = Scores([OpenCell(request.calibration()[0], cache)], budget.parts)
    alone = scores.losses("gold_logprob", [(part,) for part in budget.numbered_parts])
    order = [budget.numbered_parts[n] for n in alone.order]
    former: tuple[int, ...] = ()
    for step in draw.steps:
        candidates = [c for group in budget.candidates(former, order) for c in group]
        sets = [former, *(tuple(sorted({*former, *candidate})) for candidate in candidates)]
        first, *others = scores.losses("gold_logprob", sets).means
        saved = [1e3 * (budget.size_of(s) - budget.size_of(former)) for s in sets[1:]]
        prices = [(other - first) / size for other, size in zip(others, saved, strict=True)]
        assert step.score == pytest.approx(min(prices), abs=1e-3)
        assert step.removed in sets
        assert step.seconds == pytest.approx(0.06 - budget.size_of(step.removed))
        assert step.parameters == parameters.model_size - parameters.size_of(step.removed)
        former = step.removed
    monkeypatch.setattr(search, "_time_layers", lambda *given: ([19e-3] * LAYERS, 0.06))
    with pytest.raises(ExperimentError, match="leave kv_head out of 'unit'"):
        find_budget(make_request(tiny, remove="50 % seconds"), cache)


def test_a_choice_of_several_units_is_saved(tiny: Path, write, prune, tmp_path: Path) -> None:
    """Plain transformers loads what lm-eval has judged, within a budget of accuracy too."""
    settings = {"model": str(tiny), "unit": {"value": UNITS.split(",")}, "sample": 4}
    strategies = {"strategy": ["gold_logprob", "random"], "draws": 1}
    path = write(remove="60 %", test_sample=4, **strategies, **settings)
    plan_text = " ".join(printed("plan", path, "--gflops=1", f"--results={tmp_path}/new").split())
    assert "gold_logprob, remove 60 % of the parameters" in plan_text
    result = prune(path)
    assert result.exit_code == 0, result.output
    records = {record.strategy: record for record in stored_searches(tmp_path)}
    best = records["gold_logprob"]
    assert isinstance(best.parts, MixedParts)
    assert PruneRecord.model_validate_json(best.model_dump_json()) == best
    assert f"removes {best.names}." in " ".join(result.output.split())
    command = result.output.split("to save the recommended model: ")[1].splitlines()[0]
    words = [tmp_path / "saved" if word == "lighter" else word for word in shlex.split(command)[1:]]
    saved = cli(*words, "--results", tmp_path / "results")
    assert saved.exit_code == 0, saved.output
    facts = json.loads((tmp_path / "saved" / "tracker.json").read_text())
    removal = best.parts.removal(best.removed)
    assert (tuple(facts["removed"]), facts["removed_parts"]) == (
        removal.removed(),
        [str(part) for part in removal.parts],
    )
    assert (facts["strategy"], facts["proof"]["documents"]) == ("gold_logprob", 4)
    assert facts["after"]["parameters"] == best.steps[-1].parameters
    (accuracy,) = facts["accuracy"]
    assert accuracy["after"]["value"] == best.steps[-1].test.level.value  # type: ignore[union-attr]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.num_parameters() == best.steps[-1].parameters
    settings |= {"remove": None, "max_drop": "60pp", "strategy": "gold_logprob"}
    within = prune(write(test_sample=16, **settings), "--output", tmp_path / "within")
    assert within.exit_code == 0, within.output
    (record,) = (record for record in stored_searches(tmp_path) if record.budget is not None)
    assert record.steps[: len(best.steps)] == tuple(
        step.model_copy(update={"test": record.steps[n].test}) for n, step in enumerate(best.steps)
    )
    count = AutoModelForCausalLM.from_pretrained(tmp_path / "within").num_parameters()
    assert count in [step.parameters for step in record.steps]


def test_random_steps_reach_the_amount(tiny: Path, cache: ModelCache) -> None:
    for share in (20, 40, 60):
        request = make_request(tiny, strategy="random", remove=f"{share} %")
        budget = find_budget(request, cache)
        assert isinstance(budget, MixedBudget)
        steps = list(STRATEGIES["random"](Search(RandomScores(budget.parts), budget)))
        sizes = [budget.size_of(step.removed) for step in steps]
        assert sizes[-1] >= budget.min_removed > [0.0, *sizes][-2]
        for step in steps:
            layers, *numbered = budget.parts.split(step.removed)
            assert len(layers) < LAYERS
            for numbers, count in zip(numbered, (GROUPS, NEURONS), strict=True):
                counts = [
                    sum(part // count == layer for part in numbers) for layer in range(LAYERS)
                ]
                assert len(set(counts)) == 1
                assert counts[0] < count
