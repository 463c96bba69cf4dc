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
from tracker.core.errors import ModelError
from tracker.core.identities import ModelIdentity
from tracker.models import gguf_file
from tracker.models.checkpoint import refuse_unsizable
from tracker.models.load import LoadedModel, bytes_to_load, load_model, weightless
from tracker.models.sources import find_model


def load(folder: Path, *arguments, **settings) -> LoadedModel:
    return load_model(find_model(str(folder)), *arguments, device="cpu", **settings)


def refusal(folder: Path, **settings) -> str:
    with pytest.raises(ModelError) as caught:
        load(folder, **settings)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_a_folder_is_loaded_as_it_was_saved(tiny_llama) -> None:
    folder = tiny_llama()
    loaded = load(folder)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.tensor([loaded.tokenizer("The capital of France is")["input_ids"]])
    with torch.inference_mode():
        assert torch.equal(loaded.model(tokens).logits, plain(tokens).logits)
    assert loaded.layers is loaded.model.model.layers
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.device == torch.device("cpu")


def check_export(folder: Path) -> None:
    refuse_unsizable(find_model(str(folder)), [1])


@pytest.mark.parametrize("use", [load, check_export])
def test_threads_load_one_after_the_other(tiny_llama, monkeypatch, use) -> None:
    """Was: after two loads at once, no model of the process had tied weights any more."""
    folder, load_with_transformers = tiny_llama(), transformers.AutoModelForCausalLM.from_pretrained
    started: list[str] = []

    def observed(*arguments, **settings):
        assert not started, "another thread is loading"
        started.append("loading")
        result = load_with_transformers(*arguments, **settings)
        started.clear()
        return result

    tie_weights = transformers.PreTrainedModel.tie_weights
    monkeypatch.setattr(transformers.PreTrainedModel, "tie_weights", tie_weights)  # restores it
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", observed)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(use, [folder] * 6))
    assert transformers.PreTrainedModel.tie_weights is tie_weights


def test_its_identity(tiny_llama) -> None:
    folder = tiny_llama("my-llama", layers=3)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert load(folder).identity == ModelIdentity(
        source=str(folder),
        name="my-llama",
        revision=None,
        fingerprint=find_model(str(folder)).fingerprint(),
        architecture="LlamaForCausalLM",
        layers=3,
        parameters=sum(p.numel() for p in plain.parameters()),
        dtype="float32",
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_that_was_asked_for_or_is_the_checkpoints(tiny_llama, dtype: str) -> None:
    folder = tiny_llama()
    kind = getattr(torch, dtype)
    loaded = load(folder, dtype)
    assert {p.dtype for p in loaded.model.parameters()} == {kind}
    assert loaded.identity.dtype == dtype
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    model.save_pretrained(folder)
    assert load(folder).identity.dtype == dtype
    assert load(folder, "float32").identity.dtype == "float32"


def test_a_pickle_is_refused_without_trust(tiny_llama) -> None:
    folder = tiny_llama()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert "safetensors" in refusal(folder)
    source = find_model(str(folder), trust_remote_code=True)
    trusted = load_model(source, device="cpu").model.state_dict()
    assert all(torch.equal(value, trusted[name]) for name, value in model.state_dict().items())


# Was: a BERT is loaded with is_decoder=False: every token sees its successors, so the
# "log-likelihood" of a continuation is read off a model that has seen it.
@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            transformers.T5Config(d_model=16, num_layers=2),
            r"an encoder-decoder \(t5\).*decoder-only",
        ),
        (transformers.BertConfig(architectures=["BertForMaskedLM"]), r"an encoder \(bert\)"),
        (transformers.ViTConfig(num_hidden_layers=2), "cannot be read"),
    ],
)
def test_what_is_no_decoder_is_refused(tmp_path, config, said: str) -> None:
    save_tokenizer(tmp_path, bos=False)
    config.save_pretrained(tmp_path)
    assert re.search(said, refusal(tmp_path))


def test_a_folder_without_a_tokenizer_is_refused(tiny_llama) -> None:
    folder = tiny_llama()
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "tokenizer" in refusal(folder)


# Was: safetensors.SafetensorError is a bare Exception, so the user sees a traceback.
@pytest.mark.parametrize("kept", [0, 100, -10])
def test_truncated_weights_are_refused(tiny_llama, kept: int) -> None:
    folder = tiny_llama()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "cannot be read" in refusal(folder)


# Was: transformers fills missing weights with random numbers and only warns, so the
# numbers would be those of a layer that nobody trained.
@pytest.mark.parametrize(
    ("changes", "said"),
    [({"num_hidden_layers": 5}, "model.layers.4"), ({"intermediate_size": 50}, "cannot be read")],
)
def test_weights_that_are_missing_or_of_another_shape(tiny_llama, changes, said: str) -> None:
    folder = tiny_llama()
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert said in refusal(folder)


# Was: torch.device("cuda:99") is well-formed; model.to(place) raises AssertionError
# (no CUDA) or AcceleratorError.
def configure(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "OPT"])
def test_a_configuration_with_fewer_layers_than_the_file_is_refused(tmp_path, kind) -> None:
    """Was: the file's last layer was left out, and the model measured without a word.

    OPT's weights are named from its inner model, without the prefix of the whole one.
    """
    folder, common = tmp_path / "model", {"vocab_size": save_tokenizer(tmp_path / "model", False)}
    name = {"GPT2": "n_layer"}.get(kind, "num_hidden_layers")
    width = {"GPT2": {"n_embd": 32, "n_head": 4}, "OPT": {"word_embed_proj_dim": 32}}
    shape = {"hidden_size": 32, "num_attention_heads": 4, name: 4} | width.get(kind, {})
    config = getattr(transformers, f"{kind}Config")(**common, **shape)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    assert len(load(folder).layers) == 4
    configure(folder, **{name: 3})
    assert "holds weights of layer 3, and its configuration has 3 layers, 0 to 2" in refusal(folder)


def test_layers_that_predict_further_tokens_may_be_in_the_file(tiny_llama) -> None:
    """As in DeepSeek-V3's, after the layers that its configuration counts."""
    folder = tiny_llama(layers=4)
    configure(folder, num_hidden_layers=3, num_nextn_predict_layers=1)
    assert len(load(folder).layers) == 3


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("gpu", "unknown device 'gpu'; a GPU is called cuda here, or mps on a Mac; use auto"),
        ("cuda:99", "cuda:99"),
    ],
)
def test_a_device_that_is_not_there_is_refused(tiny_llama, device: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        load_model(find_model(str(tiny_llama())), device=device)


def test_what_a_model_takes_in_one_dtype_is_not_what_it_takes_in_the_next(tiny_llama) -> None:
    """Was: once asked in float16, a model took half of what it takes as it is."""
    source = find_model(str(tiny_llama()))
    own, half, again = (bytes_to_load(source, dtype) for dtype in ("auto", "float16", "auto"))
    assert own == again == 2 * half


def test_a_model_without_weights_has_the_shape_of_the_real_one(tiny_llama) -> None:
    folder = tiny_llama()
    model, tokenizer = weightless(find_model(str(folder)), "bfloat16")
    loaded = load(folder)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in loaded.model.named_parameters()
    }
    assert tokenizer("Paris")["input_ids"] == loaded.tokenizer("Paris")["input_ids"]


def write_llama(path: Path, more: Sequence[str] = ()) -> Path:
    """Write a Llama of two layers, with the alphabet for a tokenizer."""
    tokens = ["<s>", "</s>", *string.ascii_lowercase, "ab", *more]
    shapes = {"token_embd": (len(tokens), 32), "output": (len(tokens), 32), "output_norm": (32,)}
    for layer in range(2):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{layer}.{name}"] = (32, 32)
        shapes |= {f"blk.{layer}.{name}": (48, 32) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{layer}.{name}": (32,) for name in ("attn_norm", "ffn_norm")}
        shapes[f"blk.{layer}.ffn_down"] = (32, 48)
    random = np.random.default_rng(0)
    tensors = {name: random.normal(size=shape) for name, shape in shapes.items()}
    scores = [-float(place) for place in range(len(tokens))]
    return write_gguf(
        path, "llama", tensors, tokens, block_count=2, embedding_length=32, feed_forward_length=48,
        vocab_size=len(tokens), token_scores=scores, token_merges=["a b"], bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip


@pytest.fixture
def counted(monkeypatch):
    """Write down when some functions are called."""
    calls: list[str] = []

    def count(place: object, name: str) -> None:
        real = getattr(place, name)
        monkeypatch.setattr(
            place, name, lambda *given, **named: calls.append(name) or real(*given, **named)
        )

    return calls, count


def test_a_gguf_file_is_parsed_once(tmp_path, counted) -> None:
    """Was: four times, and the names of its tensors were listed for every submodule."""
    calls, count = counted
    count(gguf_file, "Reader")
    count(gguf, "get_tensor_name_map")
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    path = write_llama(tmp_path / "small.gguf")
    loaded = load(path)
    assert sorted(calls) == ["Reader", "get_tensor_name_map"]
    assert (loaded.identity.layers, loaded.tokenizer("cab")["input_ids"]) == (2, [4, 28])
    there = gguf.GGUFReader(path).get_tensor(0)
    assert np.array_equal(loaded.model.get_input_embeddings().weight, there.data)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_a_large_vocabulary_is_not_read_token_by_token(tmp_path, counted) -> None:
    """Was: eight calls of the library for each of its arrays' elements, millions for Gemma's."""
    asked, count = counted
    count(gguf.GGUFReader, "_get")
    calls = []
    for more in ((), [f"t{place}" for place in range(3000)]):
        asked.clear()
        path = write_llama(tmp_path / f"{len(more)}.gguf", more)
        read = gguf_file.Reader(path)
        calls.append(len(asked))
        assert read.get_field("tokenizer.ggml.tokens").contents()[29:] == list(more)
        assert read.get_field("tokenizer.ggml.scores").contents(-1) == -28 - len(more)
    assert calls[0] == calls[1]


def test_a_plan_reads_a_model_s_tokenizer_once(tmp_path, counted, caplog) -> None:
    """Was: for each benchmark again, and the file twice each time: a minute for Gemma's 262,144
    tokens, before a word was printed."""
    calls, count = counted
    count(gguf_file, "Reader")
    count(transformers.AutoTokenizer, "from_pretrained")
    caplog.set_level("INFO", "tracker")
    path = write_llama(tmp_path / "small.gguf")
    plans = [weightless(find_model(str(path)), "float32") for _ in range(2)]
    assert calls == ["Reader", "from_pretrained"]
    assert caplog.messages == ["reading the tokenizer of small"]
    assert [tokenizer("cab")["input_ids"] for _, tokenizer in plans] == [[4, 28]] * 2
    write_llama(path, ["ca"])
    _, other = weightless(find_model(str(path)), "float32")
    assert len(other) == len(plans[0][1]) + 1
    assert sorted(calls) == ["Reader"] * 2 + ["from_pretrained"] * 2


def test_a_trained_model_from_a_package(smollm2) -> None:
    assert smollm2.identity.name == "SmolLM2-135M-Instruct"
    assert (smollm2.identity.layers, smollm2.identity.dtype) == (30, "float32")
    assert smollm2.identity.parameters == 134_515_008
    tokens = torch.tensor([smollm2.tokenizer("The capital of France is")["input_ids"]])
    with torch.inference_mode():
        best = smollm2.model(tokens.to(smollm2.device)).logits[0, -1].argmax()
    assert smollm2.tokenizer.decode(best) == " Paris"


def test_spread_over_a_single_device(tiny_llama) -> None:
    loaded = load_model(find_model(str(tiny_llama())), device="spread")
    assert loaded.device == loaded.model.device
