"""The GGUF file of a choice of formats holds the measured weights, and llama.cpp reads it."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.benchmarks.conftest import PACKAGE
from tests.conftest import cli, save_llama, save_tokenizer
from tests.export.conftest import reference_in_process
from tests.helpers.llama_cpp import write_gguf
from tests.helpers.serving import serving_in_process
from tracker import api
from tracker.export import gguf_model
from tracker.export.llama_cpp import quantize, read_logits
from tracker.models.gguf_file import Reader
from tracker.models.rounding import round_weight
from tracker.schema.distribution import package_folder
from tracker.schema.errors import WorkError

SETTINGS = {"benchmark": "copa", "data": PACKAGE, "sample": 6, "dtype": "float32", "track": []}
SETTINGS |= {"budget": "5.6bpw", "format": "q4_k,q6_k", "by": "layer", "refine": 0, "pairs": 0}

pytestmark = pytest.mark.skipif(
    package_folder("llama_cpp_py_sync") is None, reason="pip install -e '.[dev]' brings it"
)


def write_base(folder: Path) -> Path:
    """Write a Llama of two layers with a tokenizer, in Q4_K and an embedding in Q8_0."""
    save_tokenizer(folder / "tokenizer", bos=False)
    tokenizer = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    merges = [" ".join(pair) for pair in tokenizer["merges"]]
    maps = {f"attn_{name}": (256, 256) for name in ("q", "k", "v", "output")}
    maps |= {f"ffn_{name}": (256, 256) for name in ("gate", "up", "down")}
    maps |= {"attn_norm": (256,), "ffn_norm": (256,)}
    shapes = {f"blk.{layer}.{name}": shape for layer in (0, 1) for name, shape in maps.items()}
    shapes |= {"token_embd": (len(tokens), 256), "output_norm": (256,)}
    random = np.random.default_rng(0)
    tensors = {name: random.normal(0.0, 0.1, shape) for name, shape in shapes.items()}
    write_gguf(
        folder / "float32.gguf", "llama", tensors, tokens, block_count=2, embedding_length=256,
        feed_forward_length=256, vocab_size=len(tokens), token_merges=merges, bos_token_id=0,
        token_types=[3, 3] + [1] * (len(tokens) - 2), eos_token_id=1, file_type=0,
    )  # fmt: skip
    types = {"^blk.*_norm": "f32", "^blk": "q4_k"}
    quantize(folder / "float32.gguf", folder / "base.gguf", types, ftype=7)
    return folder / "base.gguf"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def written(base, tmp_path_factory):
    """Choose formats, and write a folder and a GGUF file."""
    folder = tmp_path_factory.mktemp("written")
    files = {"output": folder / "saved", "gguf": folder / "small.gguf"}
    with reference_in_process(), serving_in_process():
        results = api.quantise(str(base), **SETTINGS, **files, results=folder / "results")
    return results.saved


def dequantize(tensor: gguf.ReaderTensor) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def test_tensors_are_the_measured_weights(base, written) -> None:
    """A map that was in Q4_K is rounded to Q4_K again, as it was measured; others are copied."""
    readers = [Reader(file) for file in (base, written.gguf.path)]
    original, tensors = ({tensor.name: tensor for tensor in r.tensors} for r in readers)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    formats = {f"{names.get_name(path)}.weight": form for path, form in written.formats.items()}
    assert "q4_k" in formats.values()
    assert original.keys() == tensors.keys()
    for name, tensor in tensors.items():
        values = dequantize(original[name])
        if form := formats.get(name):
            values = round_weight(torch.from_numpy(values), form).numpy()
        assert np.array_equal(dequantize(tensor), values), name
        assert tensor.tensor_type.name == (form or original[name].tensor_type.name).upper()
    fields = [{n: f.contents() for n, f in r.fields.items()} for r in readers]
    assert all(values.pop("general.file_type") for values in fields)
    assert fields[0] == fields[1]


def test_llama_cpp_computes_what_the_checkpoint_computes(written, tmp_path) -> None:
    tokens = [5, 80, 140, 200, 31]
    model = AutoModelForCausalLM.from_pretrained(written.folder)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    unrounded = tmp_path / "float32.gguf"
    quantize(written.gguf.path, unrounded, {}, ftype=0)
    (logits,) = read_logits(unrounded, [tokens], exact=True)
    assert np.allclose(logits, expected, atol=1e-3)
    (logits,) = read_logits(written.gguf.path, [tokens])
    assert 1e-3 < np.abs(logits - expected).max() < 0.2 * np.ptp(expected)
    file = written.gguf
    assert file.difference < 1e-3
    assert 0 < file.equal_tokens <= file.tokens


def test_card_and_facts_name_the_file(written) -> None:
    facts = json.loads((written.folder / "tracker.json").read_text())
    size = written.gguf.path.stat().st_size
    assert facts["gguf"]["bytes"] == size
    assert Path(facts["gguf"]["path"]) == written.gguf.path
    names = ["llama_cpp_prefill_4", "llama_cpp_prefill_8", "llama_cpp_decode_1"]
    assert [figure["name"] for figure in facts["serving"]] == names
    figures = written.figures()
    assert figures["quantised/gguf_bytes"] == size
    assert all(figures[f"{kind}/{name}"] > 0 for kind in ("base", "quantised") for name in names)
    card = (written.folder / "README.md").read_text()
    assert f"{size:,} bytes" in card
    assert "tokens written per second, batch 1" in card


def refuse_writing(source: Path, *arguments) -> None:
    """Write a file, which the system refuses after 100,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        QUANTIZE(source, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


QUANTIZE = gguf_model._quantize


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("name", "fault", "reason"),
    [
        ("gguf_model._UNROUNDED_TYPES", {"float32": "F16"}, "GGUF file and the checkpoint differ"),
        ("gguf_model._quantize", refuse_writing, "iostream error|failed to"),
        ("proof.SINGLE_TOLERANCE", (0.0, 0.0), "llama.cpp loads a different model"),
    ],
)
def test_nothing_is_left_of_a_failure(name, fault, reason, base, written, tmp_path, monkeypatch):
    monkeypatch.setattr(f"tracker.export.{name}", fault)
    results = written.folder.parent / "results"
    target = tmp_path / "small.gguf"
    with pytest.raises(WorkError, match=reason):
        api.quantise(str(base), **SETTINGS, gguf=target, results=results)
    assert [*tmp_path.iterdir()] == []


def test_wrong_requests_are_refused_before_measuring(base, tmp_path, monkeypatch) -> None:
    folder = save_llama(tmp_path / "tiny")

    def refusal(model: Path, file: Path = tmp_path / "new.gguf", form: str = "q4_k,q6_k") -> str:
        options = {**SETTINGS, "format": form, "track": "none", "gguf": file}
        options |= {"results": tmp_path / "results"}
        words = (f"--{name}={value}" for name, value in options.items())
        result = cli("quantise", model, *words)
        assert (result.exit_code, (tmp_path / "results").exists()) == (2, False)
        return result.output

    assert "exists" in refusal(base, base)
    assert "there is no folder" in refusal(base, tmp_path / "none" / "new.gguf")
    assert "fp8 and int4" in refusal(base, form="fp8,int4,q4_k")
    assert "convert_hf_to_gguf.py" in refusal(folder)
    monkeypatch.setattr(gguf_model, "package_folder", lambda name: None)
    assert "[quantise]" in refusal(base)
