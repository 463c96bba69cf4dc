"""A weight in a format is what the file of its makers gives back."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from tests.helpers import llama_cpp
from tests.helpers.llama_cpp import write_gguf
from tracker.core.errors import CellError
from tracker.core.weight_formats import FORMATS
from tracker.models.parts.linear_maps import RoundedWeights, map_of
from tracker.models.rounding import in_format

GGUF = [form for form in FORMATS.values() if "GGUF" in form.source]


def weight(outputs: int = 24, inputs: int = 256) -> torch.Tensor:
    return 0.05 * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(inputs))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, gguf.GGUFReader]:
    """Write a llama of one layer with llama.cpp's own program in each of its types."""
    pytest.importorskip("llama_cpp_py_sync", reason="pip install -e '.[dev]' brings it")
    folder = tmp_path_factory.mktemp("gguf")
    shapes = {"attn_q": (256, 256), "attn_k": (128, 256), "attn_v": (128, 256)}
    shapes |= {"attn_output": (256, 256), "ffn_gate": (288, 256), "ffn_up": (288, 256)}
    shapes |= {"ffn_down": (256, 288)}
    tensors = {"token_embd": weight(64), "output_norm": np.ones(256)}
    tensors |= {f"blk.0.{name}": np.ones(256) for name in ("attn_norm", "ffn_norm")}
    tensors |= {f"blk.0.{name}": weight(*shape) for name, shape in shapes.items()}
    write_gguf(
        folder / "float32.gguf", "llama", tensors, [f"t{n}" for n in range(64)], block_count=1,
        embedding_length=256, feed_forward_length=288, head_count_kv=2, file_type=0,
    )  # fmt: skip
    made = {}
    for form in GGUF:
        path = folder / f"{form.name}.gguf"
        kind = int(gguf.LlamaFileType[_FILE_TYPES.get(form.name, f"MOSTLY_{form.label}")])
        llama_cpp.quantize(folder / "float32.gguf", path, to=kind, pure=True)
        made[form.name] = gguf.GGUFReader(path)
    return made


_FILE_TYPES = {
    "q3_k": "MOSTLY_Q3_K_M",
    "q4_k": "MOSTLY_Q4_K_M",
    "q5_k": "MOSTLY_Q5_K_M",
    "mxfp4": "MOSTLY_MXFP4_MOE",
}


@pytest.mark.parametrize("name", [form.name for form in GGUF])
def test_it_is_what_llama_cpp_puts_into_its_file(files, name) -> None:
    """Also where rows have no whole blocks, and llama.cpp takes another type instead."""
    tensors = {each.name: each for each in files[name].tensors}
    for part, rows in (("attn_k", (128, 256)), ("ffn_down", (256, 288))):
        there = tensors[f"blk.0.{part}.weight"]
        form = FORMATS[name].for_rows(rows[1])
        assert form is not None
        assert there.tensor_type.name == form.label
        read = gguf.quants.dequantize(there.data, there.tensor_type)
        np.testing.assert_array_equal(in_format(weight(*rows), name).numpy(), read)
        assert 8 * there.n_bytes / there.n_elements == form.bits_of(rows[1])


def test_integers_are_steps_of_the_largest_of_their_group() -> None:
    given = weight(3, 256)
    for name, size, half in (("int4_g128", 128, 7.5), ("int8_g32", 32, 127.5), ("int4", 32, 7.5)):
        found = in_format(given, name).reshape(-1, size)
        for old, new in zip(given.reshape(-1, size), found, strict=True):
            step = old.abs().max() / half
            torch.testing.assert_close((new / step).round() * step, new)
            assert (new - old).abs().max() <= step * 0.51


def test_fp8_has_three_bits_behind_the_point() -> None:
    given = weight(2, 64)
    for old, new in zip(given, in_format(given, "fp8"), strict=True):
        scale = old.abs().max() / 448
        for before, after in zip(old / scale, new / scale, strict=True):
            spacing = 2.0 ** (max(before.abs().log2().floor().item(), -6) - 3)
            assert abs(float(after - before)) <= spacing / 2 * 1.001


def test_experts_are_rounded_one_by_one() -> None:
    given = torch.stack([weight() * factor for factor in (1, 3, 0.1)])
    for name in FORMATS:
        found = in_format(given, name)
        assert all(map(torch.equal, found, [in_format(each, name) for each in given])), name


def test_rows_without_whole_blocks_are_refused() -> None:
    with pytest.raises(CellError, match=r"int4_g128 keeps 128 inputs together.*rows of 576"):
        in_format(weight(2, 576), "int4_g128")


def test_what_is_wanted_again_is_kept_as_far_as_it_fits() -> None:
    module = map_of(torch.nn.Linear(64, 8, bias=False))
    kept = RoundedWeights(most=2 * 64 * 8 * 4)
    first = kept.of(0, "a", module, "int8")
    assert kept.of(0, "a", module, "int8") is first
    kept.of(0, "b", module, "int8")
    assert kept.of(0, "a", module, "int8") is first
    kept.of(1, "a", module, "int8")
    assert kept.of(0, "a", module, "int8") is first
    assert kept.of(1, "a", module, "int8") is kept.of(1, "a", module, "int8")
