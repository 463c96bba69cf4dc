"""Test models without layers after saving and loading, against copies in memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.helpers.registry import make_registered
from tests.tools.variants import find
from tracker.core.changes import Change
from tracker.core.errors import ModelError
from tracker.models.pruned import as_loaded, as_made, lacking, left, pruned, reloaded

IDS = torch.tensor([[3, 5, 8, 13, 21, 34, 55, 7, 9, 11, 2, 40]])
COMPUTED = [
    ("diffllama", "plain"),  # lambda_init from the layer's place
    ("minicpm3", "plain"),  # a scale from how many layers there are
    ("gpt2", "scale_attn_by_inverse_layer_idx True"),
    ("beam", "plain"),
]
"""Where a copy in memory has what its class would compute otherwise."""
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


def saved_and_loaded(model: nn.Module, folder) -> nn.Module:
    model.save_pretrained(folder)
    again, found = type(model).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True,
        attn_implementation=model.config._attn_implementation,
    )  # fmt: skip
    if found["missing_keys"] or found["unexpected_keys"] or found["mismatched_keys"]:
        raise ValueError("other weights")
    return again


@pytest.mark.parametrize(("family", "name"), [*COMPUTED, *OTHERS])
def test_it_is_what_transformers_saves_and_loads(family, name, tmp_path) -> None:
    """`test_checkpoint` asks this of every family without two layers."""
    model = find(family, name).model()
    twin, kept = pruned(model, (0,)), left(4, (0,))
    try:
        said = logits(reloaded(twin, kept))
    except Exception:  # noqa: BLE001  whatever a class says where a layer is missing
        with pytest.raises(Exception):  # noqa: B017, PT011  the same
            logits(saved_and_loaded(twin, tmp_path))
        return
    as_loaded(model, twin, kept)
    assert torch.allclose(logits(twin), said, atol=1e-4)
    assert lacking(model, as_made(model), twin, reloaded(twin, kept), kept) == []
    assert torch.allclose(said, logits(saved_and_loaded(twin, tmp_path)), atol=1e-4)


@pytest.mark.parametrize(("family", "name"), COMPUTED)
def test_a_copy_gets_what_its_class_computes(family, name) -> None:
    model = find(family, name).model()
    twin, kept = pruned(model, (0,)), left(4, (0,))
    right = logits(reloaded(twin, kept))
    assert not torch.allclose(logits(twin), right, atol=1e-3), "nothing is computed"
    assert lacking(model, as_made(model), twin, reloaded(twin, kept), kept)
    before = logits(model)
    as_loaded(model, twin, kept)
    assert torch.allclose(logits(twin), right, atol=1e-6)
    assert torch.equal(logits(model), before)
    weights = {value.data_ptr() for value in model.parameters()}
    assert all(value.data_ptr() in weights for value in twin.parameters()), "they are shared"


@pytest.mark.parametrize("family", ["diffllama", "minicpm3"])
def test_layers_that_stand_twice_are_counted_too(family) -> None:
    model = make_registered(family)
    again = (Change.parse("repeat:1"),)
    twin, kept = pruned(model, repeated=again), left(4, repeated=again)
    right = logits(reloaded(twin, kept))
    as_loaded(model, twin, kept)
    assert torch.allclose(logits(twin), right, atol=1e-6)


def test_half_precision_keeps_the_tables_that_are_wider() -> None:
    model = make_registered("diffllama").bfloat16()
    rotary = model.model.rotary_emb
    rotary.inv_freq = torch.arange(rotary.inv_freq.numel(), dtype=torch.float32)
    twin = pruned(model, (0,))
    as_loaded(model, twin, (1, 2, 3))
    assert torch.equal(twin.model.rotary_emb.inv_freq, rotary.inv_freq)
    assert twin.model.layers[0].self_attn.lambda_init == pytest.approx(0.2)


def test_what_cannot_be_loaded_stays_as_it_was() -> None:
    model = make_registered("jamba")
    twin = pruned(model, (0,))
    before = logits(twin)
    with pytest.raises(ModelError, match=r"it asks for model\.layers\.0"):
        as_loaded(model, twin, (1, 2, 3))
    assert torch.equal(logits(twin), before)


def test_a_list_of_another_length_is_not_read_by_places() -> None:
    """Was: Granite got the rotary table of another theta, and was refused."""
    model = make_registered("granite_swa")
    for gone in range(4):
        twin, kept = pruned(model, (gone,)), left(4, (gone,))
        before = logits(twin)
        as_loaded(model, twin, kept)
        assert torch.equal(logits(twin), before)
        assert torch.allclose(before, logits(reloaded(twin, kept)), atol=1e-4)
