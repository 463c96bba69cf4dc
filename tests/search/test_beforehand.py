"""Test searches of a model with periodic layers against the period."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, JambaConfig

from tests.conftest import cli, printed, refused, save_tokenizer
from tracker.schema.errors import ModelError
from tracker.search.planning import possible_results, refuse_unsavable
from tracker.search.scores import PartSet
from tracker.search.search import find_budget

LAYERS, PERIOD = 8, 4


def save_jamba(folder: Path, layers: int = LAYERS, period: int = PERIOD) -> Path:
    """Make a Jamba with attention in one layer of a period, and experts in every other layer."""
    config = JambaConfig(
        vocab_size=save_tokenizer(folder, bos=False), hidden_size=32, intermediate_size=48,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, num_experts=4,
        attn_layer_period=period, attn_layer_offset=period // 2, expert_layer_period=2,
        expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def jamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention in every fourth layer, from layer 2 on."""
    return save_jamba(tmp_path_factory.mktemp("jamba"))


def fits(removed: PartSet) -> bool:
    """Return whether each remaining layer moves to the position of a layer of its kind."""
    kept_layers = [layer for layer in range(LAYERS) if layer not in removed]
    kinds = [(layer % PERIOD == 2, layer % 2 == 1) for layer in range(LAYERS)]
    return all(kinds[layer] == kinds[position] for position, layer in enumerate(kept_layers))


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "last", "remove": 4},
        {"strategy": "last", "remove": 3},
        {"strategy": "last", "remove": 2},
        {"strategy": "random", "remove": 2, "draws": 9},
        {"strategy": "random", "remove": 1, "draws": 1},
        {"strategy": "angular", "remove": 4},
        {"strategy": "angular", "remove": 3},
        {"strategy": "accuracy", "remove": 4},
        {"strategy": "gold_logprob_oneshot", "remove": 4},
        {"strategy": "accuracy", "remove": 4, "among": "4-7"},
        {"strategy": "accuracy", "remove": 4, "among": "3-7"},
        {"strategy": "accuracy", "remove": 4, "protect": {"kind": "attention"}},
    ],
)
def test_unsavable_sets_are_refused_early(ask, make_cache, jamba, settings):
    request = ask(model=str(jamba), **settings)
    cache = make_cache()
    budget = find_budget(request, cache)
    savable = [fits(removed) for removed in possible_results(request, budget)]
    suggestion = (
        "4 adjacent layers, or a multiple of 4, can be removed. To remove 4, write strategy"
    )
    if all(savable):
        assert refuse_unsavable([request], [budget], cache) == [""]
    elif any(savable):
        (note,) = refuse_unsavable([request], [budget], cache)
        assert "cannot be saved as a checkpoint: the configuration of JambaForCausalLM" in note
        assert suggestion in note
    else:
        with pytest.raises(ModelError, match="cannot describe that layer") as refusal:
            refuse_unsavable([request], [budget], cache)
        assert suggestion in str(refusal.value)


def test_commands_report_unsavable_sets(write, prune, jamba, tmp_path):
    partly_savable = write(model=str(jamba), strategy="random", remove=1, draws=9)
    note = "copa, random, remove 1: perhaps the pruned model cannot be saved as a checkpoint"
    assert note in " ".join(printed("validate", partly_savable).split())
    unsavable = write(model=str(jamba), strategy="gold_logprob_oneshot", remove=4)
    for result in (prune(unsavable), cli("validate", unsavable)):
        refused(result, "To remove 4, write strategy: {value: angular} and remove: {value: 4}")
    assert not (tmp_path / "results").exists()
    assert "1 search" in printed("validate", write(model=str(jamba), strategy="last", remove=4))


@pytest.mark.usefixtures("in_process")
def test_periodic_removals_are_saved(write, prune, tmp_path: Path) -> None:
    model = save_jamba(tmp_path / "short", layers=4, period=2)
    path = write(model=str(model), strategy="last", remove=2, test_sample=4, dtype="float32")
    result = prune(path, "--output", tmp_path / "lighter")
    assert result.exit_code == 0, result.output
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "lighter").config
    assert config.num_hidden_layers == 2
