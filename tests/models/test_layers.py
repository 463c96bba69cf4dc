from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers.families import FAMILIES as WITH_KINDS
from tests.helpers.small_models import FAMILIES, TOKENS, logits, make
from tracker.core.errors import ModelError
from tracker.models.layers import find_base, find_layers
from tracker.models.pruned import pruned

PATHS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_the_layers_are_the_models_own(self, family: str) -> None:
        model = make(family)
        assert find_layers(model) is model.get_submodule(PATHS.get(family, "model.layers"))

    @pytest.mark.parametrize("removed", [[0], [3], [1, 2], [0, 3]])
    def test_the_rest_is_a_model_of_the_remaining_layers(
        self, family: str, removed: list[int]
    ) -> None:
        model = make(family)
        kept = [layer for layer in range(4) if layer not in removed]
        truth = make(family, kept, seed=1)
        weights = {
            name: value
            for name, value in model.state_dict().items()
            if not name.startswith(f"{PATHS.get(family, 'model.layers')}.")
        }
        truth.load_state_dict(weights, strict=False)
        for new, old in enumerate(kept):
            find_layers(truth)[new].load_state_dict(find_layers(model)[old].state_dict())
        copy = pruned(model, removed)
        assert len(find_layers(copy)) == len(kept)
        assert torch.equal(logits(copy), logits(truth))
        assert not torch.allclose(logits(copy), logits(model))

    def test_the_rest_can_generate(self, family: str) -> None:
        """With a hole in the key-value cache a step would differ from the whole text at once."""
        generates_as_it_reads(pruned(make(family), [0, 2]))

    def test_the_model_is_not_touched_and_its_weights_are_shared(self, family: str) -> None:
        model = make(family)
        layers = find_layers(model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        config, output, modules = model.config.to_dict(), logits(model), list(layers)
        copy = pruned(model, [0, 2])
        logits(copy)
        assert find_layers(model) is layers
        assert all(now is was for now, was in zip(layers, modules, strict=True))
        assert model.config.to_dict() == config
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(logits(model), output)
        own = {parameter.data_ptr() for parameter in model.parameters()}
        assert {parameter.data_ptr() for parameter in copy.parameters()} < own


def generates_as_it_reads(model: nn.Module) -> None:
    """Each step says what reading the whole text at once says."""
    made = model.generate(
        TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    with torch.inference_mode():
        for place in range(TOKENS.shape[1], made.shape[1]):
            best = model(made[:, :place], use_cache=False).logits[0, -1].argmax()
            assert best == made[0, place]


HYBRIDS = [
    "jamba_eager",
    "zamba2",
    "bamba_eager",
    "recurrent_gemma",
    "qwen3_next",
    "lfm2",
    "gemma2",
]


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("removed", [[0], [1], [1, 2]])
def test_layers_of_several_kinds_keep_their_kinds(family: str, removed: list[int]) -> None:
    """Each layer gets the mask and the cache of its own kind, not of the place it moved to."""
    model = WITH_KINDS[family].model()
    types = list(model.config.layer_types)
    copy = pruned(model, removed)
    assert copy.config.layer_types == [t for i, t in enumerate(types) if i not in removed]
    generates_as_it_reads(copy)
    assert model.config.layer_types == types


def test_a_layer_may_stay_and_hand_on_its_input() -> None:
    model = make("llama")
    assert len(find_layers(pruned(model, [1], stay=True))) == 4
    assert torch.equal(logits(pruned(model, [1], stay=True)), logits(pruned(model, [1])))


def test_a_configuration_that_counts_otherwise_is_refused() -> None:
    """Layers of several kinds, of which the configuration counts some only."""
    model = WITH_KINDS["jamba_eager"].model()
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
    model = WITH_KINDS[family].model()
    base = find_base(model)
    assert base is model.get_submodule(path)
    seen = []
    hook = base.register_forward_hook(lambda *_: seen.append(1))
    logits(model)
    hook.remove()
    assert seen == [1]


def test_removing_nothing_changes_nothing() -> None:
    model = make("llama")
    assert torch.equal(logits(pruned(model)), logits(model))


def test_removals_can_be_nested() -> None:
    model = make("llama")
    assert torch.equal(logits(pruned(pruned(model, [3]), [2])), logits(pruned(model, [2, 3])))


def test_a_model_whose_layers_cannot_be_told_is_refused() -> None:
    model = make("llama")
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
    model = make("llama")
    for layer in model.model.layers if inside else ():
        layer.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    model.dropouts = nn.ModuleList(nn.Dropout() for _ in range(0 if inside else 4))
    assert find_layers(model) is model.model.layers
