"""Every family, tiny: cut, saved, loaded by plain transformers, and asked; or refused in words."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.helpers.families import SMALL, tiny_model
from tests.helpers.registry import families, make_registered
from tests.helpers.truth import deeper
from tests.tools.variants import find
from tracker.core.changes import Ablation, Change
from tracker.core.errors import ModelError
from tracker.models.checkpoint import refuse_unsizable, resized, save, without
from tracker.models.layers import find_layers
from tracker.models.load import load_model
from tracker.models.offloaded import weight_bytes
from tracker.models.pruned import left, pruned
from tracker.models.pruned import reloaded as in_memory
from tracker.models.sources import find_model

REMOVED = (0, 2)
IDS = torch.tensor([[3, 5, 8, 13, 21, 34, 55, 7, 9, 11, 2, 40]])

pytestmark = pytest.mark.usefixtures("one_thread")


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


def reloaded(model, folder):
    model.save_pretrained(folder)
    again, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    return again


def source_of(variant, folder):
    """Return a folder with the configuration alone: no weights are read."""
    variant.config().save_pretrained(folder)
    return find_model(str(folder))


NOT_SAVED = {
    "blt": "names None layers",
    "dory": "n_input_layers",
    "emu3": "Unrecognized configuration class",
    "gemma3n_text": "embed_tokens_per_layer",
    "gemma4": "embed_tokens_per_layer",
    "gemma4_text": "embed_tokens_per_layer",
    "glm_moe_dsa": "does not run without layers 0, 2: Shared DSA layers",
    "hrm_text": "cannot tell which modules",
    "hy_v4": "does not run without layers 0, 2: Shared DSA layers",
    "inkling2_loop_text": "it has no place for",
    "inkling2_text": "it has no place for",
    "jamba": "cannot say that layers 0, 2 are gone: it asks for",
    "longcat_flash": "cannot tell which modules",
    "mllama": "Unrecognized configuration class",
    "modernbert-decoder": r"it has no place for model\.layers\.0\.attn_norm",
    "olmo_hybrid": "validate_architecture",
    "recurrent_gemma": "it asks for",
    "rwkv": "it asks for",
    "zaya": "it has no place for",
}
"""Families whose configuration cannot say that these layers are gone, and what is said of them."""


@pytest.mark.parametrize("family", families())
def test_what_is_saved_is_the_really_pruned_model_or_refused(family, tmp_path):
    variant = find(family, "plain")
    model = variant.model()
    if family in NOT_SAVED:
        with pytest.raises(ModelError, match=NOT_SAVED[family]):
            refuse_unsizable(source_of(variant, tmp_path), REMOVED)
        assert logits(model).isfinite().all(), "it can be measured all the same"
        return
    twin = without(model, REMOVED)
    again = reloaded(twin, tmp_path)
    said = logits(again)
    kept = twin.state_dict()
    assert all(torch.equal(weight, kept[name]) for name, weight in again.state_dict().items())
    # On some processors a matrix product adds up in another order where weights lie otherwise.
    assert torch.allclose(said, logits(twin), atol=1e-5)
    assert again.config.get_text_config().num_hidden_layers == len(find_layers(model)) - 2
    # What the self-check takes for it is made in memory.
    kept = left(len(find_layers(model)), REMOVED)
    made = in_memory(pruned(model, REMOVED), kept)
    assert torch.allclose(logits(made), said, atol=1e-4)
    assert not torch.allclose(said, logits(model), atol=1e-3), "they mattered"


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
"""Family → which of its variants."""


@pytest.mark.parametrize(
    ("family", "name"), [(family, n) for family, names in ONE_OF_EACH_KIND.items() for n in names]
)
def test_what_is_not_refused_before_is_saved_right(family, name, tmp_path):
    """The verdict falls on a miniature, before anything is searched; here on every kind."""
    variant = find(family, name)
    source, model = source_of(variant, tmp_path / "base"), variant.model()
    # Without layers 0 and 2 is the matter of the test above.
    for removed, again in (((1, 2), ()), ((), (Change.parse("repeat:1-2"),))):
        try:
            refuse_unsizable(source, removed, repeated=again)
        except ModelError:
            continue
        twin = without(model, removed, again)
        again = reloaded(twin, tmp_path / f"{len(removed)}")
        # What is saved has the usual attention, also where this variant computes it eagerly.
        assert torch.allclose(logits(again), logits(twin), atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3_mixed"])
@pytest.mark.parametrize(
    "stretch",
    [
        Change.parse("repeat:1-2"),
        Change.parse("repeat3:0"),
        Change.parse("repeat:0-3"),
        Change.parse("repeat:2-3"),
    ],
)
def test_layers_that_are_passed_again_are_saved_as_those_of_a_deeper_model(
    family, stretch, tmp_path
):
    """One made of a configuration with more layers, with the weights by their names."""
    model = tiny_model(family)
    twin = without(model, (), [stretch])
    again = reloaded(twin, tmp_path)
    wanted = deeper(family, model, Ablation.of(stretch))
    assert torch.equal(logits(again), logits(wanted))
    assert not torch.allclose(logits(wanted), logits(model), atol=1e-3)
    kinds = [getattr(each.config, "layer_types", None) for each in (again, wanted)]
    assert kinds[0] == kinds[1]
    # Really written as often as they are passed: nothing that is shared was dropped.
    written = load_file(tmp_path / "model.safetensors")
    assert sum(each.numel() for each in written.values()) == wanted.num_parameters()
    assert twin.num_parameters() == wanted.num_parameters() > model.num_parameters()
    assert len(find_layers(model)) == model.config.num_hidden_layers == 4, "it is left alone"


@pytest.mark.parametrize(
    ("family", "stretch", "why"),
    [
        ("jamba", Change.parse("repeat:1"), "cannot say that layer 1 is passed twice: it asks for"),
        (
            "deepseek_v3",
            Change.parse("repeat:0-1"),
            "cannot say that layers 0 to 1 are passed twice: ",
        ),
        ("llama", Change.parse("repeat:3-4"), "layer 4 is out of range: .* has 4 layers, 0 to 3"),
    ],
)
def test_a_stretch_that_no_configuration_says_is_refused(family, stretch, why, tmp_path):
    source = source_of(find(family, "plain"), tmp_path)
    with pytest.raises(ModelError, match=why):
        refuse_unsizable(source, (), repeated=[stretch])
    if family != "llama":  # the period stays, and no first layer comes again
        whole = Change.parse("repeat:0-1") if family == "jamba" else Change.parse("repeat:1-2")
        refuse_unsizable(source, (), repeated=[whole])


def test_first_layers_of_a_kind_are_counted_anew():
    """DeepSeek's first layers have no experts, and the configuration says how many have not."""
    model = make_registered("deepseek_v3")
    twins = [without(model, [layer]) for layer in (0, 2)]
    assert [each.config.first_k_dense_replace for each in (model, *twins)] == [1, 0, 1]


def test_windows_begin_at_the_layer_where_they_began():
    """Qwen2 counts the first layers, which see all; its list by layer says the same."""
    model = _qwen2(use_sliding_window=True, sliding_window=8, max_window_layers=4)
    twin = without(model, [1, 3])
    full, sliding = "full_attention", "sliding_attention"
    assert twin.config.layer_types == [full, full, sliding, sliding]
    assert twin.config.max_window_layers == 2
    assert model.config.max_window_layers == 4
    # mergekit and llama.cpp would leave both as they are.
    assert resized(model, twin) == ("layer_types", "max_window_layers")
    llama = tiny_model("llama")
    assert resized(llama, without(llama, [1])) == ()


def _qwen2(**more):
    config = transformers.Qwen2Config(**SMALL | {"num_hidden_layers": 6}, **more)
    return transformers.Qwen2ForCausalLM(config)


def test_tied_weights_stay_tied_and_are_saved_once(tmp_path):
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)
    twin = without(transformers.LlamaForCausalLM(config), [3])
    again = reloaded(twin, tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.num_parameters() == twin.num_parameters()
    assert weight_bytes(again) == weight_bytes(twin) == 4 * twin.num_parameters()


CODE = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XModel"}


def change(file, **entries):
    """Change entries of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.mark.parametrize("form", ["here", "elsewhere"])
def test_code_of_a_download_neither_runs_nor_stands_in_the_way(form, tiny_llama, tmp_path):
    """A native class, whose files name code too: nobody trusted it."""
    code = tmp_path / "code"
    code.mkdir()
    lines = f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise SystemExit('ran')\n"
    base = tiny_llama(tmp_path / "base")
    where = "" if form == "here" else f"{code}--"
    for folder in (code, base):
        for kind in ("configuration", "modeling", "tokenization"):
            (folder / f"{kind}_x.py").write_text(lines)
    named = {
        "config.json": {kind: f"{where}{place}" for kind, place in CODE.items()},
        "tokenizer_config.json": {"AutoTokenizer": [f"{where}tokenization_x.XTokenizer", None]},
    }
    for file, names in named.items():
        change(base / file, auto_map=names)
    source = find_model(str(base))
    refuse_unsizable(source, [1])
    loaded = load_model(source, "float32")
    save(loaded, without(loaded.model, [1]), tmp_path / "saved")
    for file in named:
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
    change(base / "config.json", model_type="x", architectures=["XModel"], auto_map=CODE)
    source = find_model(str(base))
    with pytest.raises(ModelError, match="--trust-remote-code"):
        refuse_unsizable(source, [1])
    trusted = find_model(str(base), trust_remote_code=True)
    refuse_unsizable(trusted, [1])
    with pytest.raises(ModelError, match="--trust-remote-code"):
        refuse_unsizable(source, [1])
    loaded = load_model(trusted, "float32")
    twin = without(loaded.model, [1])
    save(loaded, twin, tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", trust_remote_code=True
    )
    assert type(again).__name__ == "XModel"
    assert torch.equal(logits(again), logits(twin))


def test_what_is_no_one_checkpoint_is_refused(tiny_llama, tmp_path):
    folder = tiny_llama()
    for removed, why in (
        ([4], "layer 4 is out of range: .* has 4 layers, 0 to 3"),
        (range(4), "no layer would be left"),
    ):
        with pytest.raises(ModelError, match=why):
            refuse_unsizable(find_model(str(folder)), removed)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path / "packed")
    with pytest.raises(ModelError, match=r"is quantised.*quantise what is exported"):
        refuse_unsizable(find_model(str(tmp_path / "packed")), [1])
