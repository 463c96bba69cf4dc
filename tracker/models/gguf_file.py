"""Read a GGUF file many times as fast as its library does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType

Parts = tuple[int, list[Any], list[int], list[GGUFValueType]]
"""A field's size in bytes, its parts, the indices of its values among them, and their types."""


class Reader(gguf.GGUFReader):  # type: ignore[misc]
    """A parsed file.

    The library reads each element of an array (a vocabulary may have 262,144) in several calls, and
    each of their slices would be a memory map of its own. A slice of the plain array used here is
    only a view.
    """

    @property
    def data(self) -> Any:
        """The mapped bytes of the file."""
        return self._bytes

    @data.setter
    def data(self, mapped: Any) -> None:
        self._bytes = mapped.view(np.ndarray)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Parts:
        if raw_type == GGUFValueType.ARRAY:
            start = orig_offs + 12
            head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
            kind, count = GGUFValueType(head[0][0]), int(head[1][0])
            types = [GGUFValueType.ARRAY, *([kind] if count else [])]
            if kind == GGUFValueType.STRING:
                parts, end = self._strings(start, count)
                return end - orig_offs, [*head, *parts], [*range(3, 3 + 2 * count, 2)], types
            if kind in self.gguf_scalar_to_np:
                values = self._get(start, self.gguf_scalar_to_np[kind], count)
                if len(values) < count:
                    raise ValueError("an array reaches beyond the end of the file")
                size = start + values.nbytes - orig_offs
                return size, [*head, *values.reshape(-1, 1)], [*range(2, 2 + count)], types
        usual: Parts = super()._get_field_parts(orig_offs, raw_type)
        return usual

    def _strings(self, start: int, count: int) -> tuple[list[Any], int]:
        """Find an array's strings, each with its length before it, and the end of the last."""
        data, parts, place = self.data, [], start
        order = self.endianess.name.lower()
        for _ in range(count):
            length = data[place : place + 8]
            end = place + 8 + int.from_bytes(length, order)
            if end > len(data):
                raise ValueError("a string reaches beyond the end of the file")
            parts += [length, data[place + 8 : end]]
            place = end
        return parts, place


@contextmanager
def one_parse() -> Iterator[None]:
    """Parse a GGUF file once for transformers' configuration, tokenizer and weights, until exit.

    transformers also lists all possible names of tensors, for every submodule of the model, and
    takes microseconds for each token of the vocabulary. Configuration, tokenizer and weights of
    SmolLM2-135M take 5.0 s, with the two caches alone 10.2 s, and without any of this 17.6 s (two
    cores of an EPYC).
    """
    from transformers import modeling_gguf_pytorch_utils as reading

    if hasattr(gguf.GGUFReader, "cache_info"):  # within another call
        yield
        return
    reader, names, value = gguf.GGUFReader, gguf.get_tensor_name_map, reading._gguf_parse_value
    # transformers looks these up when it reads a file.
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(Reader), cache(names)
    reading._gguf_parse_value = partial(_value, value)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names
        reading._gguf_parse_value = value


def _value(usual: Callable[..., Any], part: Any, types: Sequence[GGUFValueType]) -> Any:
    """Convert one value of a field as transformers does."""
    if len(types) > 2:  # an array of arrays
        return usual(part, types)
    return part.tobytes().decode() if types[-1] == GGUFValueType.STRING else part[0].item()
