"""Quantise, read and time GGUF files with llama.cpp.

This module also runs as a separate program: `python -P -m tracker.export.llama_cpp REQUEST.json`.
The separate process is needed, because llama.cpp ends its process on some errors. llama.cpp prints
the reasons of these errors.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

FLOAT32, Q8_0 = 0, 7
"""Numbers of `llama_ftype`, the type of weights for which no other type is given."""
_READ_AT_ONCE = 512
"""llama.cpp's own number of tokens per forward pass."""


def quantize(
    source: str | Path, target: str | Path, types: Mapping[str, str], **settings: Any
) -> None:
    """Write a copy of a GGUF file in which some tensors are converted to other types.

    Args:
        source: The file to read.
        target: The file to write.
        types: Regular expression → type, e.g. `q4_k`. A tensor gets the type of the first regular
            expression that matches a part of its name.
        **settings: Fields of llama.cpp's `llama_model_quantize_params`.
    """
    from llama_cpp_py_sync import _cffi_bindings

    ffi, library = _cffi_bindings.ffi, _cffi_bindings.get_lib()  # type: ignore[no-untyped-call]
    defaults = library.llama_model_quantize_default_params()
    parameters = ffi.new("llama_model_quantize_params *", defaults)
    patterns = [ffi.new("char[]", pattern.encode()) for pattern in types]
    # An entry without a pattern ends the list.
    overrides = ffi.new("struct llama_model_tensor_override[]", len(types) + 1)
    for override, pattern, kind in zip(overrides, patterns, types.values(), strict=False):
        override.pattern, override.type = pattern, type_number(kind)
    fields = {"nthread": 1, "allow_requantize": True, **settings}
    for name, value in (fields | ({"tt_overrides": overrides} if types else {})).items():
        setattr(parameters, name, value)
    files = os.fsencode(source), os.fsencode(target)
    if library.llama_model_quantize(*files, parameters) != 0:
        raise SystemExit(1)  # the reason is printed


def type_number(kind: str) -> int:
    """Return the number by which llama.cpp identifies a tensor type such as `q4_k`."""
    return int(GGMLQuantizationType[kind.upper()])


def load_file(file: str | Path, length: int, threads: int = 1, exact: bool = False) -> Any:
    """Load a GGUF file into main memory, with memory for `length` tokens.

    By default, attention rounds to float16, as in llama.cpp's programs. With `exact`, attention is
    computed in float32.
    """
    from llama_cpp_py_sync import Llama

    settings: dict[str, Any] = {"n_ubatch": _READ_AT_ONCE, "flash_attn_type": -1}  # automatic
    if exact:
        settings |= {"flash_attn_type": 0, "type_k": "f32", "type_v": "f32"}
    model = Llama(str(file), n_ctx=length, n_batch=length, n_threads=threads, **settings)
    model._lib.llama_set_embeddings(model._ctx, False)  # they would cost time
    return model


def read_tokens(model: Any, tokens: Sequence[int], start: int = 0, n_logits: int = 1) -> np.ndarray:
    """Return the logits after the last tokens, computed in one forward pass.

    Args:
        model: The loaded model.
        tokens: The tokens to read.
        start: Number of earlier tokens that the model has read; 0 to begin a new text.
        n_logits: Number of tokens, from the end, for which logits are returned.

    Returns:
        The logits `[n_logits, vocabulary]`.
    """
    library, context, count = model._lib, model._ctx, len(tokens)
    if start == 0:
        library.llama_memory_clear(library.llama_get_memory(context), True)
    batch = library.llama_batch_init(count, 0, 1)
    batch.n_tokens = count
    for index, token in enumerate(tokens):
        batch.token[index], batch.pos[index] = token, start + index
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
        batch.logits[index] = index >= count - n_logits
    code = library.llama_decode(context, batch)
    library.llama_batch_free(batch)
    if code != 0:
        raise RuntimeError(f"llama.cpp cannot read {count} tokens (code {code})")
    buffer = model._ffi.buffer(library.llama_get_logits(context), 4 * n_logits * model.n_vocab)
    return np.frombuffer(buffer, np.float32).reshape(n_logits, -1).copy()


def read_logits(
    file: str | Path, texts: Sequence[Sequence[int]], exact: bool = False
) -> list[np.ndarray]:
    """Return the logits after each token of each text; if `exact`, with attention in float32."""
    with load_file(file, max(map(len, texts)), exact=exact) as model:
        return [read_tokens(model, tokens, n_logits=len(tokens)) for tokens in texts]


def save_logits(output: str, **arguments: Any) -> None:
    """Write the logits that `read_logits` returns to an NPZ file."""
    np.savez(output, *read_logits(**arguments))


def time_tokens(model: Any, batch: int, length: int, new_tokens: int) -> float:
    """Measure the seconds to read a prompt, or the seconds to write new tokens.

    Args:
        model: The loaded model.
        batch: Number of texts; only 1 is supported.
        length: Number of tokens in the prompt.
        new_tokens: Number of tokens to write after the prompt; 0 to measure reading the prompt.

    Returns:
        The seconds. The seconds for writing do not include reading the prompt.
    """
    assert batch == 1
    tokens, position = [token % model.n_vocab for token in range(length)], 0
    start = time.perf_counter()
    for step in range(new_tokens + 1):
        logits = read_tokens(model, tokens, position)
        tokens, position = [int(logits.argmax())], position + len(tokens)
        if step == 0 and new_tokens:
            start = time.perf_counter()
    return time.perf_counter() - start


def time_files(files: Sequence[str], threads: int, **timing: Any) -> dict[str, Any]:
    """Measure the seconds that each GGUF file needs for several tasks.

    Args:
        files: The GGUF files.
        threads: The number of CPU threads.
        **timing: Request for `time_by_turns`.

    Returns:
        A dict with the key `seconds` and the result of `time_by_turns`.
    """
    from tracker.export.serving_process import time_by_turns  # imports torch

    length = max(length + new_tokens for _, length, new_tokens in timing["tasks"].values())
    models = [load_file(file, length, threads) for file in files]
    return {"seconds": time_by_turns(models, timing, time_tokens)}


PROGRAMS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (quantize, save_logits, time_files)
}
"""Functions that a request can name."""


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answer = Path(request.pop("answer"))
    answer.write_text(json.dumps(PROGRAMS[request.pop("function")](**request)), encoding="utf-8")
