from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers.families import tiny_model
from tests.helpers.truth import logits
from tracker.core.errors import ModelError
from tracker.models.layers import find_base, find_layers
from tracker.models.pruned import pruned

PATHS = {
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "gemma3_mixed": "model.layers",
}
HYBRIDS = (
    "jamba_eager",
    "zamba2",
    "bamba_eager",
    "recurrent_gemma",
    "qwen3_next",
    "lfm2",
    "gemma2",
)
TOKENS = (3, 1, 4, 1, 5, 9, 2, 6)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", PATHS)
def test_the_model_is_not_touched_and_its_weights_are_shared(family: str) -> None:
    model = tiny_model(family)
    layers = find_layers(model)
    assert layers is model.get_submodule(PATHS[family])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config, output, modules = model.config.to_dict(), logits(model, TOKENS), list(layers)
    copy = pruned(model, [0, 2])
    logits(copy, TOKENS)
    assert find_layers(model) is layers
    assert all(now is was for now, was in zip(layers, modules, strict=True))
    assert model.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model, TOKENS), output)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in copy.parameters()} < own


@pytest.mark.parametrize("family", [*PATHS, *HYBRIDS])
@pytest.mark.parametrize("removed", [[0], [1], [1, 2]])
def test_the_rest_can_generate(family: str, removed: list[int]) -> None:
    """Each layer gets the mask and the cache of its own kind, not of the place it moved to.

    With a hole in the cache a step would differ from the whole text at once.
    """
    model = tiny_model(family)
    kinds = list(getattr(model.config, "layer_types", None) or ())
    copy = pruned(model, removed)
    left = [kind for layer, kind in enumerate(kinds) if layer not in removed]
    assert list(getattr(copy.config, "layer_types", None) or ()) == left
    assert list(getattr(model.config, "layer_types", None) or ()) == kinds
    text = torch.tensor([TOKENS])
    made = copy.generate(text, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    for place in range(len(TOKENS), made.shape[1]):
        assert logits(copy, made[0, :place].tolist())[-1].argmax() == made[0, place]


def test_a_configuration_that_counts_otherwise_is_refused() -> None:
    """Layers of several kinds, of which the configuration counts some only."""
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
def test_the_base_is_what_the_head_asks(family: str, path: str) -> None:
    model = tiny_model(family)
    base = find_base(model)
    assert base is model.get_submodule(path)
    seen = []
    hook = base.register_forward_hook(lambda *_: seen.append(1))
    logits(model, TOKENS)
    hook.remove()
    assert seen == [1]


def test_a_model_whose_layers_cannot_be_told_is_refused() -> None:
    model = tiny_model("llama")
    model.draft = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    with pytest.raises(ModelError, match=r"model\.layers \(4\), draft \(4\)"):
        find_layers(model)
    model.config.num_hidden_layers = 7
    said = r"^LlamaForCausalLM: cannot tell which modules are its 7 decoder layer.*model\.layers"
    with pytest.raises(ModelError, match=said):
        find_layers(model)
    del model.draft
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(ModelError, match="lists of modules found: none"):
        find_layers(model)


@pytest.mark.parametrize("inside", [True, False])
def test_lists_inside_the_layers_and_without_weights_are_no_candidates(inside: bool) -> None:
    """As many experts as layers, each in a list of its own; dropouts, one a layer."""
    model = tiny_model("llama")
    for layer in model.model.layers if inside else ():
        layer.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    model.dropouts = nn.ModuleList(nn.Dropout() for _ in range(0 if inside else 4))
    assert find_layers(model) is model.model.layers
