"""Define number formats for weights (e.g. int4, GGUF's Q4_0) and their bits per weight.

To simulate a format, tracker rounds the weights to values that the format can represent, and stores
the rounded weights in the model's dtype. The rounding does not use calibration text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tracker.schema.extensions import load_extensions

_TORCHAO = "torchao's IntxWeightOnlyConfig, symmetric"
_COMPRESSED_TENSORS = "compressed-tensors' fake_quantize"
_GGUF, _LLAMA = "GGUF, rounded by the package gguf", "GGUF, rounded by llama.cpp"

SCALE_BITS = 16
"""Number of bits of a scale of integer or fp8 weights; scales have the checkpoint's dtype."""


@dataclass(frozen=True)
class WeightFormat:
    """Definition of one weight format.

    Attributes:
        name: The format's name in files and on the command line.
        label: The format's display name, as used by the authors of the format.
        block: Number of weights in a block; 0 for one block per row. The length of a row must be a
            multiple of this number.
        bits: Bits per weight, without the scale of a whole row.
        source: The definition of the format and the library that rounds the weights.
        instead: Name of the format that replaces this format if the row length is not a multiple of
            `block`; empty if there is none.
        extra: True if the rounding library is installed only with the extra `quantise`.
        round: Function that rounds a float32 tensor [rows, inputs] and returns the rounded weights;
            None for the formats in `models/rounding.py`.
    """

    name: str
    label: str
    block: int
    bits: float
    source: str
    instead: str = ""
    extra: bool = False
    round: Callable[[Any], Any] | None = None

    @property
    def is_gguf(self) -> bool:
        """True if the format is one of the formats of GGUF files."""
        return self.source in (_GGUF, _LLAMA)

    def for_rows(self, inputs: int) -> WeightFormat | None:
        """Choose this format or its replacement, for a matrix with `inputs` weights in each row.

        The result is this format if its blocks fill each row exactly. Otherwise, the format named
        by `instead` is tried. The result is None if no format fits.
        """
        if not self.block or inputs % self.block == 0:
            return self
        return FORMATS[self.instead].for_rows(inputs) if self.instead else None

    def bits_per_weight(self, inputs: int) -> float:
        """Return the bits per weight, with scales, of a matrix with `inputs` weights in a row."""
        return self.bits if self.block else self.bits + SCALE_BITS / inputs


_OWN_FORMATS: Mapping[str, WeightFormat] = {
    form.name: form
    for form in (
        WeightFormat("int8", "int8, a scale a row", 0, 8, _TORCHAO),
        WeightFormat("int8_g32", "int8, groups of 32", 32, 8.5, _TORCHAO),
        WeightFormat("int8_g128", "int8, groups of 128", 128, 8.125, _TORCHAO),
        WeightFormat("int4", "int4, groups of 32", 32, 4.5, _TORCHAO),
        WeightFormat("int4_g128", "int4, groups of 128", 128, 4.125, _TORCHAO),
        WeightFormat("int4_row", "int4, a scale a row", 0, 4, _TORCHAO),
        WeightFormat(
            "nf4", "NF4, blocks of 64", 64, 4.5, "bitsandbytes' quantize_4bit", extra=True
        ),
        WeightFormat("fp8", "fp8 e4m3, a scale a row", 0, 8, "torch.float8_e4m3fn"),
        WeightFormat("mxfp4", "MXFP4", 32, 4.25, _GGUF),
        WeightFormat("nvfp4", "NVFP4", 16, 4.5, _COMPRESSED_TENSORS, extra=True),
        WeightFormat("mxfp8", "MXFP8", 32, 8.25, _COMPRESSED_TENSORS, extra=True),
        WeightFormat("q2_k", "Q2_K", 256, 2.625, _LLAMA, instead="q4_0", extra=True),
        WeightFormat("q3_k", "Q3_K", 256, 3.4375, _LLAMA, instead="q4_0", extra=True),
        WeightFormat("q4_0", "Q4_0", 32, 4.5, _GGUF),
        WeightFormat("q4_1", "Q4_1", 32, 5, _GGUF),
        WeightFormat("q4_k", "Q4_K", 256, 4.5, _LLAMA, instead="q5_0", extra=True),
        WeightFormat("iq4_nl", "IQ4_NL", 32, 4.5, _LLAMA, extra=True),
        WeightFormat("q5_0", "Q5_0", 32, 5.5, _GGUF),
        WeightFormat("q5_1", "Q5_1", 32, 6, _GGUF),
        WeightFormat("q5_k", "Q5_K", 256, 5.5, _LLAMA, instead="q5_1", extra=True),
        WeightFormat("q6_k", "Q6_K", 256, 6.5625, _LLAMA, instead="q8_0", extra=True),
        WeightFormat("q8_0", "Q8_0", 32, 8.5, _GGUF),
    )
}
_RESERVED_WORDS = (
    *("layer", "attention", "mlp", "head", "kv_head", "expert", "neuron", "shared_expert"),
    *("embedding", "lm_head", "remove", "mean", "scale", "linear", "repeat", "drawn"),
)
"""Names that no format may have, since they mean something else in the text of a change."""


def _check_format(extension: object) -> WeightFormat:
    """Check a weight format of another package, and return it unchanged.

    TypeError or ValueError is raised if the format is invalid.
    """
    if not isinstance(extension, WeightFormat):
        raise TypeError(f"expected a tracker.schema.weight_formats.WeightFormat, not {extension!r}")
    if not callable(extension.round):
        raise ValueError("it has no function `round`")
    if extension.instead and extension.instead not in _OWN_FORMATS:
        names = ", ".join(_OWN_FORMATS)
        raise ValueError(f"the field `instead` is {extension.instead!r}; expected one of {names}")
    return extension


_RESERVED_NAMES = (*_OWN_FORMATS, *_RESERVED_WORDS)
_ADDED_FORMATS = load_extensions("formats", _check_format, _RESERVED_NAMES)
FORMATS: Mapping[str, WeightFormat] = {**_OWN_FORMATS, **_ADDED_FORMATS}
"""Name → format: tracker's own formats, and the entry points of other packages."""
