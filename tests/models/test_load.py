from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from tests.conftest import save_tokenizer
from tests.helpers.llama_cpp import write_gguf
from tracker.models import gguf_file
from tracker.models.checkpoint import check_layer_changes
from tracker.models.load import LoadedModel, build_for_planning, bytes_to_load, load_model
from tracker.models.sources import find_model
from tracker.schema.errors import ModelError
from tracker.schema.identities import ModelIdentity


def load(folder: Path, *arguments, **settings) -> LoadedModel:
    return load_model(find_model(str(folder)), *arguments, device="cpu", **settings)


def refusal_message(folder: Path, **settings) -> str:
    with pytest.raises(ModelError) as caught:
        load(folder, **settings)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_folder_is_loaded_as_saved(tiny_llama) -> None:
    folder = tiny_llama()
    loaded = load(folder)
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.tensor([loaded.tokenizer("The capital of France is")["input_ids"]])
    with torch.inference_mode():
        assert torch.equal(loaded.model(tokens).logits, expected(tokens).logits)
    assert loaded.layers is loaded.model.model.layers
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.device == torch.device("cpu")


def check_exportable(folder: Path) -> None:
    check_layer_changes(find_model(str(folder)), [1])


@pytest.mark.parametrize("use", [load, check_exportable])
def test_threads_load_one_after_the_other(tiny_llama, monkeypatch, use) -> None:
    """Was: after two loads at once, later models of the process had no tied or no drawn weights."""
    folder, load_with_transformers = tiny_llama(), transformers.AutoModelForCausalLM.from_pretrained
    started: list[str] = []

    def observed(*arguments, **settings):
        assert not started, "another thread is loading"
        started.append("loading")
        result = load_with_transformers(*arguments, **settings)
        started.clear()
        return result

    tie_weights, init = transformers.PreTrainedModel.tie_weights, torch.nn.init.normal_
    monkeypatch.setattr(transformers.PreTrainedModel, "tie_weights", tie_weights)  # restores it
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", observed)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(use, [folder] * 6))
    assert transformers.PreTrainedModel.tie_weights is tie_weights
    assert torch.nn.init.normal_ is init


def test_identity(tiny_llama) -> None:
    folder = tiny_llama("my-llama", layers=3)
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert load(folder).identity == ModelIdentity(
        source=str(folder),
        name="my-llama",
        revision=None,
        fingerprint=find_model(str(folder)).fingerprint(),
        architecture="LlamaForCausalLM",
        layers=3,
        parameters=sum(p.numel() for p in expected.parameters()),
        dtype="float32",
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_as_requested_or_as_saved(tiny_llama, dtype: str) -> None:
    folder = tiny_llama()
    torch_dtype = getattr(torch, dtype)
    loaded = load(folder, dtype)
    assert {p.dtype for p in loaded.model.parameters()} == {torch_dtype}
    assert loaded.identity.dtype == dtype
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype)
    model.save_pretrained(folder)
    assert load(folder).identity.dtype == dtype
    assert load(folder, "float32").identity.dtype == "float32"


def test_a_pickle_is_refused_without_trust(tiny_llama) -> None:
    folder = tiny_llama()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert "safetensors" in refusal_message(folder)
    source = find_model(str(folder), trust_remote_code=True)
    loaded = load_model(source, device="cpu").model.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


# Was: a BERT is loaded with is_decoder=False: every token sees its successors, so the
# "log-likelihood" of a continuation is read off a model that has seen it.
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.T5Config(num_layers=2), r"an encoder-decoder \(t5\).*decoder-only"),
        (transformers.BertConfig(architectures=["BertForMaskedLM"]), r"an encoder \(bert\)"),
        (transformers.ViTConfig(num_hidden_layers=2), "cannot be read"),
    ],
)
def test_models_other_than_decoders_are_refused(tmp_path, config, message: str) -> None:
    save_tokenizer(tmp_path, bos=False)
    config.save_pretrained(tmp_path)
    assert re.search(message, refusal_message(tmp_path))


def test_a_folder_without_a_tokenizer_is_refused(tiny_llama) -> None:
    folder = tiny_llama()
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "tokenizer" in refusal_message(folder)


# Was: safetensors.SafetensorError is a bare Exception, so the user sees a traceback.
@pytest.mark.parametrize("size", [0, 100, -10])
def test_truncated_weights_are_refused(tiny_llama, size: int) -> None:
    folder = tiny_llama()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "cannot be read" in refusal_message(folder)


# Was: transformers fills missing weights with random numbers and only warns, so the
# numbers would be those of a layer that nobody trained.
@pytest.mark.parametrize(
    ("changes", "message"),
    [({"num_hidden_layers": 5}, "model.layers.4"), ({"intermediate_size": 50}, "cannot be read")],
)
def test_missing_weights_and_other_shapes_are_refused(tiny_llama, changes, message: str) -> None:
    folder = tiny_llama()
    change_config(folder, **changes)
    assert message in refusal_message(folder)


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "OPT"])
def test_a_configuration_with_fewer_layers_than_the_file_is_refused(tmp_path, kind) -> None:
    """Was: the file's last layer was left out, and the model measured without a word.

    OPT's weights are named from its inner model, without the prefix of the whole one.
    """
    folder = tmp_path / "model"
    vocabulary = save_tokenizer(folder, bos=False)
    settings = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4}
    if kind == "GPT2":
        settings = {"n_embd": 32, "n_head": 4, "n_layer": 4}
    settings |= {"word_embed_proj_dim": 32} if kind == "OPT" else {}
    config = getattr(transformers, f"{kind}Config")(vocab_size=vocabulary, **settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    assert len(load(folder).layers) == 4
    change_config(folder, **{config.attribute_map.get("num_hidden_layers", "num_hidden_layers"): 3})
    message = "holds weights of layer 3, but its configuration has 3 layers"
    assert message in refusal_message(folder)


def test_layers_that_predict_further_tokens_may_be_in_the_file(tiny_llama) -> None:
    """As in DeepSeek-V3's, after the layers that its configuration counts."""
    folder = tiny_llama(layers=4)
    change_config(folder, num_hidden_layers=3, num_nextn_predict_layers=1)
    assert len(load(folder).layers) == 3


# Was: torch.device("cuda:99") is well-formed; model.to(device) raises AssertionError
# (no CUDA) or AcceleratorError.
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "unknown device 'gpu'; a GPU is called cuda here, or mps on a Mac; use auto"),
        ("cuda:99", "cuda:99"),
    ],
)
def test_missing_device_is_refused(tiny_llama, device: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(find_model(str(tiny_llama())), device=device)


def test_bytes_to_load_depend_on_the_dtype(tiny_llama) -> None:
    """Was: once asked in float16, a model took half of what it takes as it is."""
    source = find_model(str(tiny_llama()))
    sizes = [bytes_to_load(source, dtype) for dtype in ("auto", "float16", "auto")]
    assert sizes[0] == sizes[2] == 2 * sizes[1]


def test_model_for_planning_has_the_shapes_of_the_real_one(tiny_llama) -> None:
    folder = tiny_llama()
    model, tokenizer = build_for_planning(find_model(str(folder)), "bfloat16")
    loaded = load(folder)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    shapes, expected = (
        {name: p.shape for name, p in m.named_parameters()} for m in (model, loaded.model)
    )
    assert shapes == expected
    assert tokenizer("Paris")["input_ids"] == loaded.tokenizer("Paris")["input_ids"]


def write_llama(path: Path, more_tokens: Sequence[str] = ()) -> Path:
    """Write a Llama of two layers, with the alphabet for a tokenizer."""
    tokens = ["<s>", "</s>", *string.ascii_lowercase, "ab", *more_tokens]
    shapes = {"token_embd": (len(tokens), 32), "output": (len(tokens), 32), "output_norm": (32,)}
    for layer in range(2):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{layer}.{name}"] = (32, 32)
        shapes |= {f"blk.{layer}.{name}": (48, 32) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{layer}.{name}": (32,) for name in ("attn_norm", "ffn_norm")}
        shapes[f"blk.{layer}.ffn_down"] = (32, 48)
    generator = np.random.default_rng(0)
    tensors = {name: generator.normal(size=shape) for name, shape in shapes.items()}
    scores = [-float(index) for index in range(len(tokens))]
    return write_gguf(
        path, "llama", tensors, tokens, block_count=2, embedding_length=32, feed_forward_length=48,
        vocab_size=len(tokens), token_scores=scores, token_merges=["a b"], bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip


def test_a_gguf_file_of_the_same_name_is_not_read(tmp_path, monkeypatch) -> None:
    """Was: transformers read the weights of such a file in the current folder."""
    (tmp_path / "here").mkdir()
    expected = load(write_llama(tmp_path / "model.gguf"), "float32").model.state_dict()
    write_llama(tmp_path / "here" / "model.gguf", ["and", "more"])
    monkeypatch.chdir(tmp_path / "here")
    loaded = load(tmp_path / "model.gguf", "float32").model.state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.fixture
def counted(monkeypatch):
    """Write down when some functions are called."""
    calls: list[str] = []

    def count(owner: object, name: str) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, **kwargs: calls.append(name) or original(*args, **kwargs)
        )

    return calls, count


def test_a_gguf_file_is_parsed_once(tmp_path, counted) -> None:
    """Was: four times, and the names of its tensors were listed for every submodule."""
    calls, count = counted
    count(gguf_file, "Reader")
    count(gguf, "get_tensor_name_map")
    old_functions = gguf.GGUFReader, gguf.get_tensor_name_map
    path = write_llama(tmp_path / "small.gguf")
    loaded = load(path)
    assert sorted(calls) == ["Reader", "get_tensor_name_map"]
    assert (loaded.identity.layers, loaded.tokenizer("cab")["input_ids"]) == (2, [4, 28])
    stored_tensor = gguf.GGUFReader(path).get_tensor(0)
    assert np.array_equal(loaded.model.get_input_embeddings().weight, stored_tensor.data)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == old_functions


def test_a_large_vocabulary_is_not_read_token_by_token(tmp_path, counted) -> None:
    """Was: eight calls of the library for each of its arrays' elements, millions for Gemma's."""
    library_calls, count = counted
    count(gguf.GGUFReader, "_get")
    call_counts = []
    for more_tokens in ((), [f"t{index}" for index in range(3000)]):
        library_calls.clear()
        path = write_llama(tmp_path / f"{len(more_tokens)}.gguf", more_tokens)
        reader = gguf_file.Reader(path)
        call_counts.append(len(library_calls))
        assert reader.get_field("tokenizer.ggml.tokens").contents()[29:] == list(more_tokens)
        assert reader.get_field("tokenizer.ggml.scores").contents(-1) == -28 - len(more_tokens)
    assert call_counts[0] == call_counts[1]


def test_a_plan_reads_a_model_s_tokenizer_once(tmp_path, counted, caplog) -> None:
    """Was: for each benchmark again, and the file twice each time: a minute for Gemma's 262,144
    tokens, before a word was printed."""
    calls, count = counted
    count(gguf_file, "Reader")
    count(transformers.AutoTokenizer, "from_pretrained")
    caplog.set_level("INFO", "tracker")
    path = write_llama(tmp_path / "small.gguf")
    plans = [build_for_planning(find_model(str(path)), "float32") for _ in range(2)]
    assert calls == ["Reader", "from_pretrained"]
    assert caplog.messages == ["reading the tokenizer of small"]
    assert [tokenizer("cab")["input_ids"] for _, tokenizer in plans] == [[4, 28]] * 2
    write_llama(path, ["ca"])
    _, new_tokenizer = build_for_planning(find_model(str(path)), "float32")
    assert len(new_tokenizer) == len(plans[0][1]) + 1
    assert sorted(calls) == ["Reader"] * 2 + ["from_pretrained"] * 2


def test_a_trained_model_from_a_package(smollm2) -> None:
    assert smollm2.identity.name == "SmolLM2-135M-Instruct"
    assert (smollm2.identity.layers, smollm2.identity.dtype) == (30, "float32")
    assert smollm2.identity.parameters == 134_515_008
    tokens = torch.tensor([smollm2.tokenizer("The capital of France is")["input_ids"]])
    with torch.inference_mode():
        best_token = smollm2.model(tokens.to(smollm2.device)).logits[0, -1].argmax()
    assert smollm2.tokenizer.decode(best_token) == " Paris"


def test_spread_over_a_single_device(tiny_llama) -> None:
    loaded = load_model(find_model(str(tiny_llama())), device="spread")
    assert loaded.device == loaded.model.device
