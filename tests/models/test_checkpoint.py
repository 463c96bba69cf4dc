"""Every family, tiny: cut, saved, loaded by plain transformers, and asked; or refused in words."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.helpers.families import SMALL_CONFIG, tiny_model
from tests.helpers.registry import families, make_registered
from tests.helpers.saved import logits, save_and_load
from tests.helpers.truth import deeper_copy
from tests.tools.variants import find_variant
from tracker.models.checkpoint import check_layer_changes, config_changes, savable_copy, save_copy
from tracker.models.layers import find_layers
from tracker.models.load import load_model
from tracker.models.offloaded import weight_bytes
from tracker.models.pruned import prune_model, remaining_layers, simulate_reload
from tracker.models.sources import find_model
from tracker.schema.changes import Ablation, Change
from tracker.schema.errors import ModelError

REMOVED = (0, 2)

pytestmark = pytest.mark.usefixtures("one_thread")


def config_source(variant, folder):
    """Return a folder with the configuration alone: no weights are read."""
    variant.config().save_pretrained(folder)
    return find_model(str(folder))


NOT_SAVED = {
    "blt": "invalid number of layers in its configuration: None",
    "dory": "n_input_layers",
    **dict.fromkeys(("emu3", "mllama"), "Unrecognized configuration class"),
    **dict.fromkeys(("gemma3n_text", "gemma4", "gemma4_text"), "embed_tokens_per_layer"),
    **dict.fromkeys(("glm_moe_dsa", "hy_v4"), "does not run without layers 0, 2: Shared DSA"),
    **dict.fromkeys(("hrm_text", "longcat_flash"), "cannot tell which modules"),
    **dict.fromkeys(("inkling2_loop_text", "inkling2_text", "zaya"), "has no tensor"),
    "jamba": "cannot describe that layers 0, 2 are removed: a model with this configuration needs",
    "modernbert-decoder": r"this configuration has no tensor model\.layers\.0\.attn_norm",
    "olmo_hybrid": "validate_architecture",
    **dict.fromkeys(("recurrent_gemma", "rwkv"), "a model with this configuration needs"),
}
"""Family whose configuration cannot describe a model without these layers → message."""


@pytest.mark.parametrize("family", families())
def test_saved_copy_is_the_pruned_model_or_refused(family, tmp_path):
    variant = find_variant(family, "plain")
    model = variant.model()
    if family in NOT_SAVED:
        with pytest.raises(ModelError, match=NOT_SAVED[family]):
            check_layer_changes(config_source(variant, tmp_path), REMOVED)
        assert logits(model).isfinite().all(), "it can be measured all the same"
        return
    clone = savable_copy(model, REMOVED)
    loaded = save_and_load(clone, tmp_path)
    loaded_logits, weights = logits(loaded), clone.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.state_dict().items())
    # On some processors a matrix product adds up in another order where weights lie otherwise.
    assert torch.allclose(loaded_logits, logits(clone), atol=1e-5)
    assert loaded.config.get_text_config().num_hidden_layers == len(find_layers(model)) - 2
    # The self-check compares with a model that is built in memory.
    indices = remaining_layers(len(find_layers(model)), REMOVED)
    simulated = simulate_reload(prune_model(model, REMOVED), indices)
    assert torch.allclose(logits(simulated), loaded_logits, atol=1e-4)
    assert not torch.allclose(loaded_logits, logits(model), atol=1e-3), "they mattered"


ONE_OF_EACH_KIND = {
    # Positions: rotary of every kind, learned, alibi.
    "llama": ("plain", "eager", "rope yarn", "rope dynamic", "rope longrope"),
    **dict.fromkeys(("phi3", "gemma3_text", "minicpm3"), ("rope longrope",)),
    "smollm3": ("no_rope_layers [0, 1, 0, 1]",),
    "gpt2": ("scale_attn_by_inverse_layer_idx True",),
    "gpt_neox": ("use_parallel_residual False",),
    "falcon": ("alibi True",),
    **dict.fromkeys(("granite_swa", "opt", "bloom", "mpt"), ("plain",)),
    # Windows and chunks, in every layer, in some, in both orders.
    "qwen2": ("use_sliding_window True",),
    "gemma2": ("layer_types full_attention first",),
    "cohere2": ("layer_types sliding_attention first",),
    **dict.fromkeys(("mistral", "modernbert-decoder", "gpt_neo", "llama4_text"), ("plain",)),
    # Experts, low ranks, indices, more than one stream between the layers.
    "glm_moe_dsa": ("indexer_types all full", "indexer_types full around shared"),
    **dict.fromkeys(("mixtral", "phimoe", "deepseek_v3", "deepseek_v32"), ("plain",)),
    **dict.fromkeys(("gemma3n_text", "gemma4_text"), ("plain",)),
    # Recurrent, alone and mixed.
    **dict.fromkeys(("mamba", "mamba2", "rwkv", "recurrent_gemma", "jamba"), ("plain",)),
    **dict.fromkeys(("zamba2", "qwen3_next", "lfm2"), ("plain",)),
    # Blocks of other forms, other parts beside the text, layers that are not one list.
    **dict.fromkeys(("openai-gpt", "gemma3", "hrm_text", "blt"), ("plain",)),
}
"""Family → names of its variants."""


@pytest.mark.parametrize(
    ("family", "name"), [(family, n) for family, names in ONE_OF_EACH_KIND.items() for n in names]
)
def test_accepted_changes_are_saved_correctly(family, name, tmp_path):
    """Changes are accepted or refused by a miniature; here for every kind of architecture."""
    variant = find_variant(family, name)
    source, model = config_source(variant, tmp_path / "base"), variant.model()
    for removed, repeated in (((1, 2), ()), ((), (Change.parse("repeat:1-2"),))):
        try:
            check_layer_changes(source, removed, repeated=repeated)
        except ModelError:
            continue
        clone = savable_copy(model, removed, repeated)
        loaded = save_and_load(clone, tmp_path / f"{len(removed)}")
        # The loaded model has the usual attention, also if this variant computes it eagerly.
        assert torch.allclose(logits(loaded), logits(clone), atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3_mixed"])
@pytest.mark.parametrize("repetition", ["repeat:1-2", "repeat3:0", "repeat:0-3", "repeat:2-3"])
def test_repeated_layers_are_saved_as_a_deeper_model(family, repetition, tmp_path):
    """The truth is built from a configuration with more layers, with weights by name."""
    model, span = tiny_model(family), Change.parse(repetition)
    clone = savable_copy(model, (), [span])
    loaded = save_and_load(clone, tmp_path)
    deeper = deeper_copy(model, Ablation.from_changes(span))
    assert torch.equal(logits(loaded), logits(deeper))
    assert not torch.allclose(logits(deeper), logits(model), atol=1e-3)
    layer_types, expected = (getattr(m.config, "layer_types", None) for m in (loaded, deeper))
    assert layer_types == expected
    # A further pass has weights of its own: no shared ones were dropped.
    weights = load_file(tmp_path / "model.safetensors").values()
    assert sum(weight.numel() for weight in weights) == deeper.num_parameters()
    assert clone.num_parameters() == deeper.num_parameters() > model.num_parameters()
    assert len(find_layers(model)) == model.config.num_hidden_layers == 4, "it is left alone"


@pytest.mark.parametrize(
    ("family", "refused", "accepted", "message"),
    [
        # Accepted: the period stays, and no first layer is repeated.
        (
            "jamba",
            "repeat:1",
            "repeat:0-1",
            "that layer 1 is passed twice: a model with this configuration",
        ),
        ("deepseek_v3", "repeat:0-1", "repeat:1-2", "that layers 0 to 1 are passed twice: "),
        ("llama", "repeat:3-4", "repeat:3", "layer 4 is out of range: .* has layers 0 to 3"),
    ],
)
def test_repetition_beyond_the_configuration_is_refused(
    family, refused, accepted, message, tmp_path
):
    source = config_source(find_variant(family, "plain"), tmp_path)
    with pytest.raises(ModelError, match=message):
        check_layer_changes(source, (), repeated=[Change.parse(refused)])
    check_layer_changes(source, (), repeated=[Change.parse(accepted)])


def test_first_layers_of_a_kind_are_counted_anew():
    """DeepSeek's first layers have no experts, and the configuration says how many have not."""
    model = make_registered("deepseek_v3")
    clones = [savable_copy(model, [layer]) for layer in (0, 2)]
    assert [m.config.first_k_dense_replace for m in (model, *clones)] == [1, 0, 1]


def test_windows_begin_at_the_layer_where_they_began():
    """Qwen2 counts the first layers, which see all; its list by layer says the same."""
    model = _qwen2(use_sliding_window=True, sliding_window=8, max_window_layers=4)
    clone = savable_copy(model, [1, 3])
    full, sliding = "full_attention", "sliding_attention"
    assert clone.config.layer_types == [full, full, sliding, sliding]
    assert clone.config.max_window_layers == 2
    assert model.config.max_window_layers == 4
    # mergekit and llama.cpp would leave both as they are.
    assert config_changes(model, clone) == ("layer_types", "max_window_layers")
    llama = tiny_model("llama")
    assert config_changes(llama, savable_copy(llama, [1])) == ()


def _qwen2(**settings):
    config = transformers.Qwen2Config(**SMALL_CONFIG | {"num_hidden_layers": 6}, **settings)
    return transformers.Qwen2ForCausalLM(config)


def test_tied_weights_stay_tied_and_are_saved_once(tmp_path):
    config = transformers.LlamaConfig(**SMALL_CONFIG, tie_word_embeddings=True)
    clone = savable_copy(transformers.LlamaForCausalLM(config), [3])
    loaded = save_and_load(clone, tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.num_parameters() == clone.num_parameters()
    assert weight_bytes(loaded) == weight_bytes(clone) == 4 * clone.num_parameters()


CODE = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XModel"}


def change_json(file, **entries):
    """Change entries of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.mark.parametrize("form", ["here", "elsewhere"])
def test_code_of_a_download_does_not_run_without_trust(form, tiny_llama, tmp_path):
    """The class is transformers' own, and the files name code too."""
    code = tmp_path / "code"
    code.mkdir()
    lines = f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise SystemExit('ran')\n"
    base = tiny_llama(tmp_path / "base")
    prefix = "" if form == "here" else f"{code}--"
    kinds = ("configuration", "modeling", "tokenization")
    for folder, kind in itertools.product((code, base), kinds):
        (folder / f"{kind}_x.py").write_text(lines)
    code_names = {
        "config.json": {kind: f"{prefix}{class_path}" for kind, class_path in CODE.items()},
        "tokenizer_config.json": {"AutoTokenizer": [f"{prefix}tokenization_x.XTokenizer", None]},
    }
    for file, names in code_names.items():
        change_json(base / file, auto_map=names)
    source = find_model(str(base))
    check_layer_changes(source, [1])
    loaded = load_model(source, "float32")
    save_copy(loaded, savable_copy(loaded.model, [1]), tmp_path / "saved")
    for file in code_names:
        assert "auto_map" not in json.loads((tmp_path / "saved" / file).read_text())
    assert loaded.model.config.auto_map, "the model is left alone"
    assert not (tmp_path / "ran").exists()


def test_code_that_is_trusted_runs(tiny_llama, tmp_path):
    base = tiny_llama(tmp_path / "base")
    (base / "configuration_x.py").write_text(
        "from transformers import LlamaConfig\n\n"
        "class XConfig(LlamaConfig):\n    model_type = 'x'\n"
    )
    (base / "modeling_x.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_x import XConfig\n\n"
        "class XModel(LlamaForCausalLM):\n    config_class = XConfig\n"
    )
    change_json(base / "config.json", model_type="x", architectures=["XModel"], auto_map=CODE)
    trusted = find_model(str(base), trust_remote_code=True)
    for _ in range(2):  # trust is not remembered for the next call
        with pytest.raises(ModelError, match="--trust-remote-code"):
            check_layer_changes(find_model(str(base)), [1])
        check_layer_changes(trusted, [1])
    loaded = load_model(trusted, "float32")
    clone = savable_copy(loaded.model, [1])
    save_copy(loaded, clone, tmp_path / "saved")
    reread = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", trust_remote_code=True
    )
    assert type(reread).__name__ == "XModel"
    assert torch.equal(logits(reread), logits(clone))


def test_impossible_removals_and_packed_weights_are_refused(tiny_llama, tmp_path):
    folder = tiny_llama()
    out_of_range = "layer 4 is out of range: .* has layers 0 to 3"
    for removed, message in (([4], out_of_range), (range(4), "no layer would be left")):
        with pytest.raises(ModelError, match=message):
            check_layer_changes(find_model(str(folder)), removed)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path / "packed")
    with pytest.raises(ModelError, match=r"is quantised.*quantise the exported model"):
        check_layer_changes(find_model(str(tmp_path / "packed")), [1])
