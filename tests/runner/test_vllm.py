"""`tracker bench --against vllm`: refusals, and layers that are passed over."""

from __future__ import annotations

import sys
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.conftest import cli, refused
from tests.helpers.engines import engine_of
from tests.helpers.families import tiny_model
from tracker.bench import loops
from tracker.bench.loops import SkippingWorker, skip_layers
from tracker.schema.changes import Ablation

AGAINST = ["bench", "no-such-model", "--benchmark", "arc_easy", "--against", "vllm"]


class Layer(nn.Module):
    """A decoder layer as vLLM's: an update, and the stream it is to be added to."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(8), nn.Linear(8, 8)

    def forward(self, positions, hidden_states, residual):
        residual = hidden_states if residual is None else hidden_states + residual
        return self.linear(self.norm(residual)) * positions, residual


def pass_layers(layers):
    """Pass some layers as the models of vLLM do, up to the addition in front of the last norm."""
    positions = torch.arange(5)[:, None]
    hidden, residual = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), None
    for layer in layers:
        hidden, residual = layer(positions, hidden, residual)
    return hidden if residual is None else hidden + residual


@torch.inference_mode()
def test_layers_are_passed_over_and_come_back():
    torch.manual_seed(0)
    layers = nn.ModuleList(Layer() for _ in range(4))
    cases = [(0,), (2,), (3,), (0, 1), (0, 1, 2, 3), (1,), ()]
    outputs = [pass_layers([layers[n] for n in range(4) if n not in removed]) for removed in cases]
    assert not any(torch.equal(*pair) for pair in combinations(outputs, 2))
    for removed, output in zip(cases, outputs, strict=True):
        skip_layers(layers, removed)
        assert torch.equal(pass_layers(layers), output)


@torch.inference_mode()
def test_a_worker_finds_the_layers_of_its_model():
    """Of a model whose layers return the stream alone, as some of vLLM's do."""
    model, ids = tiny_model("llama"), torch.arange(7)[None]
    pruned = engine_of(model).ablate(Ablation.parse("layers:1,2")).loaded.model
    expected = pruned(ids, use_cache=False).logits
    SkippingWorker.pass_over(SimpleNamespace(get_model=lambda: model), [1, 2])
    assert torch.equal(model(ids, use_cache=False).logits, expected)


def test_vllm_that_cannot_be_used_is_refused_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text("raise OSError('libcudart.so.13: no such file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lm_eval.models.vllm_causallms", raising=False)
    refused(cli(*AGAINST), "cannot use the installed vLLM (OSError: libcudart.so.13: no such file)")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "vLLM is not installed in this environment; type pip"),
        (["--component=mlp"], "not mlp"),
        (["--model_args=load_in_8bit=true"], "model_args"),
    ],
)
def test_requests_that_vllm_cannot_serve_are_refused_at_once(monkeypatch, options, reason) -> None:
    monkeypatch.setattr(loops, "find_spec", lambda name: None)
    refused(cli(*AGAINST, *options), reason, "leave --against out")
