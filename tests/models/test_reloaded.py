"""Test models without layers after saving and loading, against copies in memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.helpers.registry import make_registered
from tests.tools.variants import find_variant
from tracker.models.pruned import (
    build_from_config,
    find_stale_attributes,
    prune_model,
    reload_values,
    remaining_layers,
    simulate_reload,
)
from tracker.schema.changes import Change
from tracker.schema.errors import ModelError

IDS = torch.tensor([[3, 5, 8, 13, 21, 34, 55, 7, 9, 11, 2, 40]])
COMPUTED = [
    ("diffllama", "plain"),  # lambda_init from the layer's place
    ("minicpm3", "plain"),  # a scale from how many layers there are
    ("gpt2", "scale_attn_by_inverse_layer_idx True"),
    ("beam", "plain"),
]
"""Variants whose copy in memory differs from what its class computes."""
OTHERS = [
    ("deepseek_v3", "plain"),  # the first layer without experts is counted anew
    ("glm_moe_dsa", "plain"),
    ("qwen2", "use_sliding_window True"),
    ("rwkv", "plain"),
    ("zamba2", "plain"),  # which weights are tied depends on the places
]

pytestmark = pytest.mark.usefixtures("one_thread")


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return copy.deepcopy(model).eval()(IDS, use_cache=False).logits


def save_and_load(model: nn.Module, folder) -> nn.Module:
    model.save_pretrained(folder)
    loaded, info = type(model).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True,
        attn_implementation=model.config._attn_implementation,
    )  # fmt: skip
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        raise ValueError("other weights")
    return loaded


def prune(model: nn.Module, removed=(), repeated=()) -> tuple[nn.Module, list[int]]:
    """Return a copy without some layers, and the original indices of its layers."""
    indices = remaining_layers(4, removed, repeated)
    return prune_model(model, removed, repeated=repeated), indices


def stale_attributes(model: nn.Module, clone: nn.Module, indices: list[int]) -> list:
    reloaded = simulate_reload(clone, indices)
    return find_stale_attributes(model, build_from_config(model), clone, reloaded, indices)


@pytest.mark.parametrize(("family", "name"), [*COMPUTED, *OTHERS])
def test_simulated_reload_equals_save_and_load(family, name, tmp_path) -> None:
    """`test_checkpoint` tests this for every family without two layers."""
    model = find_variant(family, name).model()
    clone, indices = prune(model, (0,))
    try:
        reload_logits = logits(simulate_reload(clone, indices))
    except Exception:  # noqa: BLE001  a class may raise anything if a layer is missing
        with pytest.raises(Exception):  # noqa: B017, PT011  the same
            logits(save_and_load(clone, tmp_path))
        return
    reload_values(model, clone, indices)
    assert torch.allclose(logits(clone), reload_logits, atol=1e-4)
    assert stale_attributes(model, clone, indices) == []
    assert torch.allclose(reload_logits, logits(save_and_load(clone, tmp_path)), atol=1e-4)


@pytest.mark.parametrize(("family", "name"), COMPUTED)
def test_copy_gets_values_that_its_class_computes(family, name) -> None:
    model = find_variant(family, name).model()
    clone, indices = prune(model, (0,))
    reload_logits = logits(simulate_reload(clone, indices))
    assert not torch.allclose(logits(clone), reload_logits, atol=1e-3), "nothing is computed"
    assert stale_attributes(model, clone, indices)
    old_logits = logits(model)
    reload_values(model, clone, indices)
    assert torch.allclose(logits(clone), reload_logits, atol=1e-6)
    assert torch.equal(logits(model), old_logits)
    weights = {value.data_ptr() for value in model.parameters()}
    assert all(value.data_ptr() in weights for value in clone.parameters()), "they are shared"


@pytest.mark.parametrize("family", ["diffllama", "minicpm3"])
def test_repeated_layers_are_counted(family) -> None:
    model = make_registered(family)
    clone, indices = prune(model, repeated=(Change.parse("repeat:1"),))
    reload_logits = logits(simulate_reload(clone, indices))
    reload_values(model, clone, indices)
    assert torch.allclose(logits(clone), reload_logits, atol=1e-6)


def test_half_precision_keeps_wider_tables() -> None:
    model = make_registered("diffllama").bfloat16()
    rotary = model.model.rotary_emb
    rotary.inv_freq = torch.arange(rotary.inv_freq.numel(), dtype=torch.float32)
    clone = prune_model(model, (0,))
    reload_values(model, clone, (1, 2, 3))
    assert torch.equal(clone.model.rotary_emb.inv_freq, rotary.inv_freq)
    assert clone.model.layers[0].self_attn.lambda_init == pytest.approx(0.2)


def test_copy_is_unchanged_if_it_cannot_be_loaded() -> None:
    model = make_registered("jamba")
    clone = prune_model(model, (0,))
    old_logits = logits(clone)
    with pytest.raises(ModelError, match=r"a model with this configuration needs model\.layers\.0"):
        reload_values(model, clone, (1, 2, 3))
    assert torch.equal(logits(clone), old_logits)


def test_lists_of_another_length_are_not_read_by_index() -> None:
    """Was: Granite got the rotary table of another theta, and was refused."""
    model = make_registered("granite_swa")
    for removed in range(4):
        clone, indices = prune(model, (removed,))
        old_logits = logits(clone)
        reload_values(model, clone, indices)
        assert torch.equal(logits(clone), old_logits)
        assert torch.allclose(old_logits, logits(simulate_reload(clone, indices)), atol=1e-4)
