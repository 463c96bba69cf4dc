from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers.families import tiny_model
from tests.helpers.truth import model_logits
from tracker.models.layers import find_base, find_layers
from tracker.models.pruned import prune_model
from tracker.schema.errors import ModelError

PATHS = {
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "gemma3_mixed": "model.layers",
}
HYBRIDS = (
    *("jamba_eager", "zamba2", "bamba_eager", "recurrent_gemma"),
    *("qwen3_next", "lfm2", "gemma2"),
)
TOKENS = (3, 1, 4, 1, 5, 9, 2, 6)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", PATHS)
def test_pruning_shares_weights_and_leaves_the_model_unchanged(family: str) -> None:
    model = tiny_model(family)
    layers = find_layers(model)
    assert layers is model.get_submodule(PATHS[family])
    old_weights = {name: value.clone() for name, value in model.state_dict().items()}
    config, output, modules = model.config.to_dict(), model_logits(model, TOKENS), list(layers)
    clone = prune_model(model, [0, 2])
    model_logits(clone, TOKENS)
    assert find_layers(model) is layers
    assert all(layer is old_layer for layer, old_layer in zip(layers, modules, strict=True))
    assert model.config.to_dict() == config
    assert all(torch.equal(value, old_weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model_logits(model, TOKENS), output)
    addresses = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in clone.parameters()} < addresses


@pytest.mark.parametrize("family", [*PATHS, *HYBRIDS])
@pytest.mark.parametrize("removed", [[0], [1], [1, 2]])
def test_pruned_model_generates(family: str, removed: list[int]) -> None:
    """Each layer gets the mask and the cache of its own kind, not of its new position.

    With a gap in the cache, a step would differ from the whole text at once.
    """
    model = tiny_model(family)
    kinds = list(getattr(model.config, "layer_types", None) or ())
    clone = prune_model(model, removed)
    remaining = [kind for layer, kind in enumerate(kinds) if layer not in removed]
    assert list(getattr(clone.config, "layer_types", None) or ()) == remaining
    assert list(getattr(model.config, "layer_types", None) or ()) == kinds
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    (generated,) = clone.generate(torch.tensor([TOKENS]), max_new_tokens=4, **settings)
    for length in range(len(TOKENS), len(generated)):
        logits = model_logits(clone, generated[:length].tolist())
        assert logits[-1].argmax() == generated[length]


def test_configuration_with_another_number_of_layers_is_refused() -> None:
    """The model has layers of several kinds, of which the configuration counts only some."""
    model = tiny_model("jamba_eager")
    model.config.num_hidden_layers = 2
    with pytest.raises(ModelError, match=r"its 2 decoder layers; .*model\.layers \(4\)"):
        find_layers(model)


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("llama", "model"), ("gpt2", "transformer"), ("opt", "model.decoder"), ("llama4", "model"),
        ("mamba", "backbone"),
    ],
)  # fmt: skip
def test_base_is_the_module_that_the_head_calls(family: str, path: str) -> None:
    model = tiny_model(family)
    base = find_base(model)
    assert base is model.get_submodule(path)
    calls = []
    hook = base.register_forward_hook(lambda *_: calls.append(1))
    model_logits(model, TOKENS)
    hook.remove()
    assert calls == [1]


def test_ambiguous_lists_of_layers_are_refused() -> None:
    model = tiny_model("llama")
    model.draft = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    with pytest.raises(ModelError, match=r"model\.layers \(4\), draft \(4\)"):
        find_layers(model)
    model.config.num_hidden_layers = 7
    message = r"^LlamaForCausalLM: cannot tell which modules are its 7 decoder layer.*model\.layers"
    with pytest.raises(ModelError, match=message):
        find_layers(model)
    del model.draft
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(ModelError, match="lists of modules found: none"):
        find_layers(model)


@pytest.mark.parametrize("inside", [True, False])
def test_inner_lists_and_lists_without_weights_are_ignored(inside: bool) -> None:
    """As many experts as layers, each in a list of its own; dropouts, one a layer."""
    model = tiny_model("llama")
    for layer in model.model.layers if inside else ():
        layer.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    model.dropouts = nn.ModuleList(nn.Dropout() for _ in range(0 if inside else 4))
    assert find_layers(model) is model.model.layers
