"""Fewer heads and experts: plain transformers loads the model that is sliced by hand here."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.helpers.families import tiny_model
from tests.helpers.mixtures import ONE_GROUP, tiny_mixture, without_experts
from tests.helpers.saved import logits, save_and_load
from tests.helpers.truth import NEURON_MAPS, neurons_of, pruned_copy, without_heads, without_neurons
from tracker.models.checkpoint import check_part_removal, savable_copies
from tracker.models.layers import find_layers
from tracker.models.sources import find_model
from tracker.schema.changes import Ablation, Change
from tracker.schema.errors import ModelError

pytestmark = pytest.mark.usefixtures("one_thread")


def removal(unit, numbers_by_layer):
    """Remove parts, given as the numbers in each layer."""
    parts = [(layer, n) for layer, numbers in enumerate(numbers_by_layer) for n in numbers]
    return Ablation.from_changes(*(Change(unit, (layer,), part=n) for layer, n in parts))


def narrow_and_load(model, ablation, folder):
    """Save the narrowed copy, and load it by plain transformers."""
    before = copy.deepcopy(model.state_dict())
    clone, measured = savable_copies(model, ablation)
    loaded = save_and_load(clone, folder)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert clone.num_parameters() == loaded.num_parameters() < model.num_parameters()
    return loaded, measured


def is_close(a, b):
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def slice_by_hand(model, kept_heads, n_groups):
    """Build the model with fewer heads of width 8, and fill it with slices by tensor names."""
    config = copy.deepcopy(model.config)
    per_group = model.config.num_attention_heads // model.config.num_key_value_heads
    heads, n_keys = model.config.num_attention_heads, model.config.num_key_value_heads
    config.num_attention_heads, config.num_key_value_heads = len(kept_heads[0]), n_groups
    config.head_dim = 8
    smaller = type(model)(config).float().eval()
    weights = model.state_dict()
    for layer, queries in enumerate(kept_heads):
        keys = sorted({head // per_group for head in queries})
        q, k = (torch.cat([torch.arange(8 * n, 8 * n + 8) for n in ns]) for ns in (queries, keys))
        rows = {"q_proj": q, "k_proj": k, "v_proj": k, "sinks": torch.tensor(queries)}
        rows["qkv_proj"] = torch.cat([q, 8 * heads + k, 8 * (heads + n_keys) + k])
        for name in [name for name in weights if f"layers.{layer}.self_attn" in name]:
            part = name.split("self_attn.")[1].split(".")[0]
            if name.endswith("o_proj.weight"):
                weights[name] = weights[name][:, q]
            elif part in rows:
                weights[name] = weights[name][rows[part]]
    smaller.load_state_dict(weights)
    return smaller


HEAD_FAMILIES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_mixed", "phi3", "granite", "mixtral",
    "gpt_oss",
]  # fmt: skip
GROUPS = ("kv_head", [[0], [1], [1], [0]], [(2, 3), (0, 1), (0, 1), (2, 3)], 1)
"""What is removed from each layer, the heads that stay, and their number of groups."""
HEADS = {family: (family, {}, *GROUPS) for family in HEAD_FAMILIES} | {
    # Gemma 3 270M has four heads and one group, which stays.
    "single group": (
        "gemma3_mixed", {"num_key_value_heads": 1}, "head", [[0, 1], [1, 2], [2, 3], [0, 3]],
        [(2, 3), (0, 3), (0, 1), (1, 2)], 1,
    ),
    # Groups keep their keys and values, and lose one of two queries each.
    "each group": (
        "qwen3", {}, "head", [[0, 3], [1, 2], [1, 3], [0, 2]],
        [(1, 2), (0, 3), (0, 2), (1, 3)], 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADS)
def test_fewer_heads_are_loaded(case, tmp_path):
    family, settings, unit, removed, head_numbers, n_groups = HEADS[case]
    model, ablation = tiny_model(family, **settings), removal(unit, removed)
    assert getattr(model.config, "head_dim", None) in (8, None), "four heads of eight"
    model.config.save_pretrained(tmp_path / "config")
    check_part_removal(find_model(str(tmp_path / "config")), ablation)
    loaded, measured = narrow_and_load(model, ablation, tmp_path / "saved")
    assert is_close(logits(loaded), logits(slice_by_hand(model, head_numbers, n_groups)))
    assert is_close(logits(measured), logits(without_heads(model, ablation)))
    assert is_close(logits(loaded), logits(measured))
    assert not torch.allclose(logits(loaded), logits(model), atol=1e-2), "they mattered"
    config = loaded.config
    numbers = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert numbers == (2, n_groups, 8)
    assert model.config.num_attention_heads == 4, "it is left alone"


def slice_neurons(model, family, numbers):
    """Build the model without two of four groups, and fill it with slices by tensor names."""
    config, weights = copy.deepcopy(model.config), model.state_dict()
    down, *others = NEURON_MAPS[family].split()
    layers = next(name for name in weights if f".0.{down}." in name).partition(".0.")[0]
    for layer, groups in enumerate(numbers):
        removed = neurons_of(model, family, layer, *groups)
        width = 2 * len(removed)
        names = [
            f"{layers}.{layer}.{path}.{kind}" for path in others for kind in ("weight", "bias")
        ]
        for name in {f"{layers}.{layer}.{down}.weight", *names} & weights.keys():
            axis = int((f".{down}." in name) != (family == "gpt2")) if weights[name].ndim > 1 else 0
            rows = [n for n in range(weights[name].shape[axis]) if n % width not in removed]
            weights[name] = weights[name].index_select(axis, torch.tensor(rows))
    key = {"gpt2": "n_inner", "opt": "ffn_dim"}.get(family, "intermediate_size")
    setattr(config, key, width // 2)
    smaller = type(model)(config).float().eval()
    smaller.load_state_dict(weights)
    return smaller


@pytest.mark.parametrize("family", NEURON_MAPS)
def test_fewer_neurons_are_loaded(family, tmp_path):
    model = tiny_model(family)
    numbers = [[0, 3], [1, 2], [2, 1], [3, 0]]
    loaded, measured = narrow_and_load(model, removal("neuron", numbers), tmp_path)
    by_hand = slice_neurons(model, family, numbers)
    assert loaded.num_parameters() == by_hand.num_parameters()
    assert is_close(logits(loaded), logits(by_hand))
    assert is_close(logits(loaded), logits(measured))
    assert is_close(
        logits(measured), logits(without_neurons(model, removal("neuron", numbers), family))
    )
    assert not torch.allclose(logits(loaded), logits(model), atol=1e-2), "they mattered"


@pytest.mark.parametrize(
    ("family", "width", "layers"),
    # All heads of Phi-3 together are as wide as the MLP.
    [("llama", 64, [1, 3]), ("gemma3_mixed", 64, [1, 3]), ("phi3", 32, [])],
)
def test_layers_heads_and_neurons_together(family, width, layers, tmp_path):
    """The parts of the removed layers need not be named; the model is also pruned by hand."""
    model = tiny_model(family, intermediate_size=width)
    heads, neurons = (
        removal(unit, [[number(n)] if n not in layers else [] for n in range(4)])
        for unit, number in (("kv_head", lambda n: n // 2), ("neuron", lambda n: 3 - n // 2))
    )
    ablation = Ablation.from_changes(*heads.changes, *neurons.changes, removed=layers)
    model.config.save_pretrained(tmp_path / "config")
    source = find_model(str(tmp_path / "config"))
    check_part_removal(source, ablation)
    loaded, measured = narrow_and_load(model, ablation, tmp_path / "saved")
    changed = without_heads(without_neurons(model, neurons, family[:6]), heads)
    expected = logits(pruned_copy(changed, layers))
    assert is_close(logits(loaded), expected)
    assert is_close(logits(measured), expected)
    config = loaded.config
    numbers = config.num_hidden_layers, config.intermediate_size, config.num_key_value_heads
    assert numbers == (4 - len(layers), width * 3 // 4, 1)
    with pytest.raises(ModelError, match="layer 4 is out of range"):
        check_part_removal(source, Ablation.from_changes(*heads.changes, removed=[4]))


MIXTURE_FAMILIES = {
    "mixtral": "num_local_experts",
    "qwen2_moe": "num_experts",
    "qwen3_moe": "num_experts",
    "olmoe": "num_experts",
    "deepseek_v2": "n_routed_experts",
    "deepseek_v3": "n_routed_experts",
    "gpt_oss": "num_local_experts",
}


def make_mixture(family, monkeypatch):
    settings = {"deepseek_v2": ONE_GROUP, "qwen2_moe": {"num_key_value_heads": 2}}
    monkeypatch.setitem(tiny_mixture.__globals__["MIXTURES"], family, MIXTURE_FAMILIES[family])
    return tiny_mixture(family, **settings.get(family, {}))


@pytest.mark.parametrize("family", MIXTURE_FAMILIES)
def test_fewer_experts_are_loaded(family, tmp_path, monkeypatch):
    model = make_mixture(family, monkeypatch)
    numbers = [[0, 3], [1, 2], [4, 2], [0, 4]]
    for layer, module in enumerate(find_layers(model)):  # the first ones of DeepSeek have none
        if not any(parameter.ndim == 3 for parameter in module.parameters()):
            numbers[layer] = []
    ablation = removal("expert", numbers)
    loaded, measured = narrow_and_load(model, ablation, tmp_path)
    by_hand = without_experts(model, family, ablation)
    assert is_close(logits(loaded), logits(by_hand))
    assert is_close(logits(measured), logits(by_hand))
    assert not torch.allclose(logits(loaded), logits(model), atol=1e-2), "they mattered"
    assert getattr(loaded.config, MIXTURE_FAMILIES[family]) == 3


def test_heads_and_experts_together(tmp_path):
    model = tiny_mixture("mixtral")
    heads, experts = removal("kv_head", [[0]] * 4), removal("expert", [[n] for n in range(4)])
    both = Ablation(heads.changes | experts.changes)
    loaded, _ = narrow_and_load(model, both, tmp_path)
    expected = without_experts(without_heads(model, heads), "mixtral", experts)
    assert is_close(logits(loaded), logits(expected))
    assert (loaded.config.num_local_experts, loaded.config.num_key_value_heads) == (4, 1)


def test_tied_weights_stay_tied(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    loaded, _ = narrow_and_load(model, removal("kv_head", [[0]] * 4), tmp_path)
    clone, _ = savable_copies(model, removal("kv_head", [[0]] * 4))
    assert clone.lm_head.weight is clone.model.embed_tokens.weight
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize(
    ("family", "settings", "unit", "numbers", "message"),
    [
        ("llama", {}, "kv_head", [[0], [1], [1], []], "layer 3 keeps 2 of 2 groups of heads"),
        ("llama", {}, "kv_head", [[0, 1], [1], [1], [0]], "no head of layer 0 .* would remain"),
        ("llama", {}, "head", [[0], [1], [1], [0]], "would keep 1 and 2 heads"),
        ("llama", {}, "kv_head", [[0], [1], [1], [0], [0]], "layer 4 .* has no attention heads"),
        ("llama", {}, "expert", [[0]] * 4, "does not state the number of experts"),
        ("llama", {}, "neuron", [[0], [1], [], [2]], "layer 2 keeps 4 of 4 groups of neurons"),
        ("llama", {}, "neuron", [[0, 1, 2, 3]] * 4, "no neuron of layer 0 .* would remain"),
        ("mixtral", {}, "neuron", [[0]] * 4, "no groups of neurons .* has no experts"),
        ("bloom", {}, "neuron", [[0]] * 4, "does not state the number of groups of neurons"),
        # 96 is no multiple of 10 heads. The miniature has fewer heads, which are accepted.
        (
            "llama", {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 6},
            "kv_head", [[0]] * 4, "LlamaConfig does not accept 5 instead of 6 .* 1, 2, 3 or 4 ",
        ),
        (
            "gemma3_mixed", {"num_key_value_heads": 1}, "head", [[0], [1], [2], [3]],
            "does not accept 3 instead of 4 heads in each layer; it accepts 1 or 2",
        ),
        ("olmo2", {}, "kv_head", [[0]] * 4, "the logits differ .* the remaining parts"),
        # Its map of queries and gates is as long as a map of queries, keys and values.
        ("qwen3_next", {}, "kv_head", [[], [0], [], [1]], "q_proj.weight .* it is not known"),
        ("gpt_neox", {}, "head", [[0, 1]] * 4, "the logits differ .* the remaining parts"),
        ("gpt2", {"n_embd": 64, "n_head": 8}, "head", [[0]] * 4, "built .*: 64 and `num_heads`: 7"),
        ("deepseek_v3", {}, "head", [[0]] * 4, "q_b_proj.weight .* it is not known"),
        ("mixtral", {}, "expert", [[0], [1], [2], [0, 1]], "keeps 2 of 4 .* keeps 3 of 4 experts"),
        ("mixtral", {}, "expert", [[0, 1, 2]] * 4, "only 1 would remain"),
    ],
)  # fmt: skip
def test_removals_that_no_configuration_describes(
    family, settings, unit, numbers, message, tmp_path
):
    tiny_model(family, **settings).config.save_pretrained(tmp_path)
    source = find_model(str(tmp_path))
    with pytest.raises(ModelError, match=message):
        check_part_removal(source, removal(unit, numbers))


@pytest.mark.parametrize(("heads", "numbers"), [(8, [0, 1, 4, 6]), (4, [3, 1, 0])])
def test_a_miniature_that_needs_other_numbers_refuses_nothing(heads, numbers, tmp_path):
    """The hidden size is a multiple of the number of remaining heads, but not of 3 of 4."""
    sizes = {"hidden_size": 8 * heads, "num_attention_heads": heads, "num_key_value_heads": heads}
    model = tiny_model("llama", **sizes)
    model.config.save_pretrained(tmp_path)
    ablation = removal("head", [numbers] * 4)
    check_part_removal(find_model(str(tmp_path)), ablation)
    loaded, _ = narrow_and_load(model, ablation, tmp_path / "saved")
    assert is_close(logits(loaded), logits(without_heads(model, ablation)))
    assert loaded.config.num_attention_heads == heads - len(numbers)


def test_a_model_on_several_devices_is_refused():
    model = tiny_model("llama")
    model.lm_head.to("meta")
    with pytest.raises(ModelError, match=r"several devices; .* use --device cpu"):
        savable_copies(model, removal("kv_head", [[0]] * 4))


def test_a_class_that_only_building_refuses():
    """Tensors are checked again with the real numbers, which a miniature does not have."""
    model = tiny_model("gpt2")
    with pytest.raises(
        ModelError, match=r"cannot be built with fewer heads and groups of heads: .*divisible"
    ):
        savable_copies(model, removal("head", [[0]] * 4))
