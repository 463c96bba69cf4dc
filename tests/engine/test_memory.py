from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from transformers import OlmoeConfig, Qwen3MoeConfig

from tests.helpers.families import tiny_model
from tracker.engine.scoring.model import stream_bytes
from tracker.models.devices import keep_freed_memory

KEEP = """
import ctypes
import psutil
from tracker.models.devices import keep_freed_memory

program = ctypes.CDLL(None)
program.sbrk.restype = program.malloc.restype = ctypes.c_void_p
program.malloc.argtypes, program.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
held = psutil.Process().memory_info
keep_freed_memory()
before, resident = program.sbrk(0), held().rss
block = program.malloc(300 << 20)
ctypes.memset(block, 1, 300 << 20)
grown = program.sbrk(0) - before
program.free(block)
print(grown >> 20, held().rss - resident >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="there is nothing to tell malloc")
def test_what_is_freed_is_kept() -> None:
    """Taken from the heap, with 64 MB to spare, and not given back, though it is its end."""
    keep_freed_memory()
    output = subprocess.check_output([sys.executable, "-c", KEEP], text=True)
    n_grown, n_kept = map(int, output.split())
    assert 360 <= n_grown < 370
    assert n_kept >= 295


@pytest.mark.parametrize(
    ("dtype", "itemsize"), [(torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 2)]
)
def test_a_stream_holds_states_and_the_inside_of_an_mlp(dtype, itemsize: int) -> None:
    model = tiny_model("llama").to(dtype)
    assert stream_bytes(model) == (6 * 32 + 3 * 48) * itemsize


def test_a_mixture_holds_a_token_once_for_each_of_its_experts() -> None:
    """Measured: 75 kB of 70 of an OLMoE of these widths, and 60 of 63 of a Mixtral."""
    olmoe = OlmoeConfig(
        vocab_size=97, hidden_size=512, intermediate_size=256, num_experts=32,
        num_experts_per_tok=8, num_hidden_layers=1, num_attention_heads=8, pad_token_id=0,
    )  # fmt: skip
    qwen = Qwen3MoeConfig(
        hidden_size=512, intermediate_size=2000, moe_intermediate_size=256, num_experts_per_tok=2
    )
    model = tiny_model("llama")
    # Layers without experts may be the wider ones.
    for config, widest in ((olmoe, 8 * (2 * 512 + 3 * 256)), (qwen, 3 * 2000)):
        model.config = config
        assert stream_bytes(model) == (6 * 512 + widest) * 4
