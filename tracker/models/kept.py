"""In which format a checkpoint keeps its weights: those that are rounded once more were before."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

from tracker.models.sources import ModelSource, read_config

_WHOLE = ("F64", "F32", "F16", "BF16")
"""Types of tensors in GGUF files that are not rounded to fewer bits."""


@cache
def kept_in(source: ModelSource, trust_remote_code: bool = False) -> str:
    """Say in which format a model's weights are kept, where that is one of fewer bits.

    Args:
        source: The model; a GGUF file's list of tensors is read, of others the configuration.
        trust_remote_code: Whether code from the download may run.

    Returns:
        For a GGUF file the type of most of its weights, such as `Q4_1`; otherwise what
        `quantization_config` says, such as `gptq, 4 bits`; empty for weights of 16 bits or more.

    Raises:
        ModelError: The configuration cannot be reached or read.
    """
    if source.gguf_file:
        from tracker.models.gguf_file import Reader

        weights: Counter[str] = Counter()
        for tensor in Reader(Path(source.location) / source.gguf_file).tensors:
            weights[tensor.tensor_type.name] += int(tensor.n_elements)
        ((most, _),) = weights.most_common(1)
        return "" if most in _WHOLE else most
    told = getattr(read_config(source, trust_remote_code), "quantization_config", None)
    if not isinstance(told, dict):
        return ""
    bits, method = told.get("bits"), str(told.get("quant_method", "fewer bits"))
    return f"{method}, {bits} bits" if isinstance(bits, int) else method
