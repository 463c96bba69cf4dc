from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from tests.engine.families import FAMILIES as WITH_KINDS
from tracker.core.errors import ModelError
from tracker.models.layers import find_base, find_layers
from tracker.models.pruned import cut_config, pruned

SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_head": 4}
FAMILIES = {
    "llama": lambda n: transformers.LlamaConfig(
        **{**SMALL, "num_hidden_layers": n}, intermediate_size=48
    ),
    "gpt2": lambda n: transformers.GPT2Config(**GPT2, n_layer=n),
    "gpt_neox": lambda n: transformers.GPTNeoXConfig(
        **{**SMALL, "num_hidden_layers": n}, intermediate_size=48
    ),
    "gemma3": lambda n: transformers.Gemma3TextConfig(
        **{**SMALL, "num_hidden_layers": n},
        intermediate_size=48,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention"] * (n // 2)
        + ["sliding_attention"] * (n % 2),
    ),
}
PATHS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


pytestmark = pytest.mark.usefixtures("one_thread")


def make(family: str, layers: int = 4, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = FAMILIES[family](layers)
    config.initializer_range = 0.3
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def logits(model: nn.Module, **arguments) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS, **arguments).logits


def indices(model: nn.Module) -> list[list[int]]:
    """The index that each layer's modules go by in the key-value cache."""
    return [
        sorted({m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")})
        for layer in find_layers(model)
    ]


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_the_layers_are_the_models_own(self, family: str) -> None:
        model = make(family)
        path = PATHS.get(family, "model.layers")
        assert find_layers(model) is model.get_submodule(path)
        assert len(find_layers(model)) == 4

    @pytest.mark.parametrize("removed", [[0], [3], [1, 2], [0, 3]])
    def test_the_rest_is_a_model_of_the_remaining_layers(
        self, family: str, removed: list[int]
    ) -> None:
        model = make(family)
        kept = [layer for layer in range(4) if layer not in removed]
        if family == "gemma3":
            types = [model.config.layer_types[layer] for layer in kept]
        truth = make(family, len(kept), seed=1)
        if family == "gemma3":
            # Built with the same kinds of layers, not with the default pattern.
            config = FAMILIES[family](len(kept))
            config.layer_types = types
            truth = transformers.AutoModelForCausalLM.from_config(config).eval()
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

    def test_the_remaining_layers_are_counted_anew(self, family: str) -> None:
        model = make(family)
        copy = pruned(model, [1])
        assert indices(copy) == [[0], [1], [2]]
        assert copy.config.num_hidden_layers == 3
        assert torch.equal(logits(copy, use_cache=True), logits(copy, use_cache=False))
        assert indices(model) == [[0], [1], [2], [3]]

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


HYBRIDS = ["jamba", "zamba2", "bamba_eager", "recurrent_gemma", "qwen3_next", "lfm2", "gemma2"]


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


def test_what_has_one_entry_a_layer_is_cut_and_rope_factors_are_not() -> None:
    """As many factors as layers: a list is a layer's by its length, unless it is rope's."""
    config = transformers.LlamaConfig(**SMALL, intermediate_size=48)
    config.widths = [1, 2, 3, 4]
    config.by_layer = {0: "a", 1: "b", 2: "c", 3: "d"}
    config.moe_layers = [1, 3]
    config.hybrid_layers = [0, 1, 2, 3]
    config.rope_parameters = {"rope_type": "longrope", "short_factor": [1.0, 2.0, 3.0, 4.0]}
    cut_config(config, [0, 2, 3])
    assert config.num_hidden_layers == 3
    assert config.widths == [1, 3, 4]
    assert config.by_layer == {0: "a", 1: "c", 2: "d"}
    assert config.moe_layers == [2]
    assert config.hybrid_layers == [0, 1, 2], "places of all layers, not an entry for each"
    assert config.rope_parameters["short_factor"] == [1.0, 2.0, 3.0, 4.0]


def test_a_layer_may_stay_and_hand_on_its_input() -> None:
    model = make("llama")
    assert len(find_layers(pruned(model, [1], stay=True))) == 4
    assert torch.equal(logits(pruned(model, [1], stay=True)), logits(pruned(model, [1])))


def test_a_configuration_that_counts_otherwise_is_refused() -> None:
    """Layers of several kinds, of which the configuration counts some only."""
    model = WITH_KINDS["jamba"].model()
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


def test_a_model_with_no_fitting_list_is_refused() -> None:
    model = make("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelError) as caught:
        find_layers(model)
    message = str(caught.value)
    assert message.startswith("LlamaForCausalLM: cannot tell which modules are its 7 decoder layer")
    assert "model.layers (4)" in message


def test_a_model_with_two_fitting_lists_is_refused() -> None:
    model = make("llama")
    model.draft = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    with pytest.raises(ModelError, match=r"model\.layers \(4\), draft \(4\)"):
        find_layers(model)


def test_lists_inside_the_layers_are_no_candidates() -> None:
    """As many experts as layers, each in a list of its own."""
    model = make("llama")
    for layer in model.model.layers:
        layer.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    assert find_layers(model) is model.model.layers


def test_a_list_without_weights_is_no_candidate() -> None:
    model = make("llama")
    model.dropouts = nn.ModuleList(nn.Dropout() for _ in range(4))
    assert find_layers(model) is model.model.layers


def test_a_model_without_any_list_is_refused() -> None:
    model = make("llama")
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(ModelError, match="lists of modules found: none"):
        find_layers(model)
