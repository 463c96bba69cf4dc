"""llama.cpp's own library, from the wheel llama-cpp-py-sync: its quantiser and its logits."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

FLOAT32, COPY = 0, "COPY"
"""Of `llama_ftype`: all in float32; and what llama-quantize calls changing nothing."""


def write_gguf(
    file: Path, architecture: str, tensors: Mapping[str, Any], tokens: Sequence[str], **fields: Any
) -> Path:
    """Write a file as llama.cpp does, in float32: `fields` by the names of the writer's methods."""
    writer = GGUFWriter(file, architecture)
    sizes = {"context_length": 64, "head_count": 4, "head_count_kv": 4, "layer_norm_rms_eps": 1e-5}
    for name, value in (sizes | {"tokenizer_model": "gpt2", "token_list": tokens} | fields).items():
        getattr(writer, f"add_{name}")(value)
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@cache
def _library() -> tuple[Any, Any, Any]:
    from llama_cpp_py_sync import _cffi_bindings as bindings

    silent = bindings.ffi.callback(
        "void(enum ggml_log_level, const char *, void *)", lambda *_: None
    )
    library = bindings.get_lib()
    library.llama_log_set(silent, bindings.ffi.NULL)
    return bindings.ffi, library, silent  # which must live as long as the library


def quantize(
    source: Path,
    made: Path,
    layers: Sequence[int] = (),
    to: int | str = COPY,
    pure: bool = False,
    types: Sequence[tuple[str, str]] = (),
    embedding: str = "f16",
    output: str = "f16",
) -> None:
    """Do what llama-quantize does (tools/quantize/quantize.cpp).

    With its --prune-layers, --pure, and --tensor-type, with which --token-embedding-type and
    --output-tensor-type are told too.
    """
    ffi, library, _ = _library()
    asked = ffi.new("llama_model_quantize_params *", library.llama_model_quantize_default_params())
    asked.nthread, asked.only_copy, asked.allow_requantize = 1, to == COPY, to != COPY
    asked.pure = pure
    if types:
        end = len(types)
        asked.token_embedding_type = int(GGMLQuantizationType[embedding.upper()])
        asked.output_tensor_type = int(GGMLQuantizationType[output.upper()])
        patterns = [ffi.new("char[]", pattern.encode()) for pattern, _ in types]
        told = ffi.new("struct llama_model_tensor_override[]", end + 1)
        for place, (pattern, (_, kind)) in enumerate(zip(patterns, types, strict=True)):
            told[place].pattern = pattern
            told[place].type = int(GGMLQuantizationType[kind.upper()])
        told[end].pattern = ffi.NULL
        asked.tt_overrides = told
    asked.ftype = FLOAT32 if to == COPY else to
    gone = ffi.new("int32_t[]", [*layers, -1])
    asked.prune_layers = gone if layers else ffi.NULL
    assert library.llama_model_quantize(str(source).encode(), str(made).encode(), asked) == 0


def obey(line: str, folder: Path) -> Path:
    """Obey a line that calls llama-quantize in a folder; says what it made."""
    program, option, layers, source, made, how = shlex.split(line)
    assert (program, option, how) == ("llama-quantize", "--prune-layers", COPY)
    quantize(folder / source, folder / made, [int(layer) for layer in layers.split(",")])
    return folder / made


def logits(file: Path, tokens: Sequence[int]) -> np.ndarray:
    """Read tokens in one go: the logits after each."""
    ffi, library, _ = _library()
    model = library.llama_model_load_from_file(
        str(file).encode(), library.llama_model_default_params()
    )
    assert model != ffi.NULL
    asked, count = library.llama_context_default_params(), len(tokens)
    asked.n_ctx = asked.n_batch = asked.n_ubatch = max(64, count)
    asked.n_threads = asked.n_threads_batch = 1
    context = library.llama_init_from_model(model, asked)
    batch = library.llama_batch_init(count, 0, 1)
    batch.n_tokens = count
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    assert library.llama_decode(context, batch) == 0
    width = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    there = ffi.buffer(library.llama_get_logits(context), 4 * count * width)
    found = np.frombuffer(there, dtype=np.float32).reshape(count, width).copy()
    library.llama_batch_free(batch)
    library.llama_free(context)
    library.llama_model_free(model)
    return found
