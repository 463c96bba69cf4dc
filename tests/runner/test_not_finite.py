"""A removed layer that blows a model up costs its own figures, and nobody else's."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers.lm_eval import write_rows
from tests.helpers.runs import read_outcomes

CHANNEL = 5
SHAPE = {"max_position_embeddings": 320, "mlp_bias": True}
SHORT = {"limit": 1, "gen_kwargs": "max_gen_toks=16"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "DATA"
    choice = {"text": ["this", "that one", "it"], "label": ["A", "B", "C"]}
    for data_set, row in (
        ("allenai/ai2_arc/ARC-Easy", {"choices": choice, "answerKey": "B"}),
        ("openai/gsm8k/main", {"answer": "Twice two. #### 4"}),
    ):
        write_rows(folder / data_set, test=[{"question": f"Is it {n}?", **row} for n in range(3)])
    (folder / "notes.txt").write_text("The heart pumps.\n\nParis is a capital.")
    return folder


def overflow_layer(folder: Path, factor: float) -> Path:
    """Change a model so that layer 1 alone cancels a constant that makes layer 2 overflow.

    Args:
        folder: A Llama whose MLPs have biases.
        factor: What layer 2 multiplies the constant with; it overflows above 1e20.

    Returns:
        The folder.
    """
    model = AutoModelForCausalLM.from_pretrained(folder)
    layers = model.model.layers
    model.model.embed_tokens.weight.data[:, CHANNEL] = -1.0
    for layer in layers:
        layer.self_attn.o_proj.weight.data[CHANNEL] = 0.0
        layer.mlp.down_proj.weight.data[CHANNEL] = 0.0
        layer.mlp.down_proj.bias.data[CHANNEL] = 0.0
    layers[1].mlp.down_proj.bias.data[CHANNEL] = 1.0
    layers[2].mlp.gate_proj.weight.data[:, CHANNEL] = -factor
    layers[2].mlp.up_proj.weight.data[:, CHANNEL] = factor
    model.save_pretrained(folder)
    return folder


def benchmarks(data: Path) -> dict[str, dict[str, object]]:
    return {
        "arc_easy": {"benchmark": "arc_easy", "data": data},
        "corpus": {"benchmark": f"'corpus:{data / 'notes.txt'}'", "data": "hub"},
        "gsm8k": {"benchmark": "gsm8k", "data": data, "num_fewshot": 0, **SHORT},
    }


@pytest.mark.parametrize("name", ["arc_easy", "corpus", "gsm8k"])
def test_one_ablation_is_undefined_and_the_others_are_not(
    tiny_llama, measure, tmp_path, data, name
):
    cells = []
    for kind, factor in (("whole", 0.0), ("fused", 1e30)):
        model = overflow_layer(tiny_llama(f"{kind}-llama", **SHAPE), factor)
        cells += measure(model, kind, **benchmarks(data)[name]).cells
    intact, overflowing = cells
    assert overflowing.baseline.value == intact.baseline.value is not None
    assert overflowing.baseline_metrics == pytest.approx(intact.baseline_metrics)
    for intact_run, run in zip(intact.runs, overflowing.runs, strict=True):
        if run.change.layer != 1:
            assert run.drop.value == pytest.approx(intact_run.drop.value)
            assert run.metrics == pytest.approx(intact_run.metrics)
            continue
        figures = ("accuracy", "accuracy_drop", "accuracy_relevance", "gold_logprob_drop")
        for figure in figures:
            assert run.figure(figure) is None
            assert run.all_reasons[figure]
        assert run.metrics == dict.fromkeys(intact_run.metrics)
        assert all(run.reasons[f"metrics.{metric}"] for metric in intact_run.metrics)
        # What is about the intact layer is known.
        assert run.cosine_similarity == pytest.approx(intact_run.cosine_similarity)
    frame = read_outcomes(tmp_path / "fused").set_index("ablation")
    assert frame.loc[["layer:1"]].filter(like="metric/").isna().all(axis=None)
    assert frame.drop("layer:1").filter(like="metric/").notna().all(axis=None)


@pytest.mark.parametrize("name", ["arc_easy", "corpus", "gsm8k"])
def test_a_model_that_is_not_finite_itself(tiny_llama, measure, data, name):
    folder = tiny_llama(**SHAPE)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[2].mlp.down_proj.weight.data[:] = float("nan")
    model.save_pretrained(folder)
    (cell,) = measure(folder, **benchmarks(data)[name]).cells
    assert cell.baseline.value is None
    assert cell.baseline.reason
    assert cell.baseline_metrics == dict.fromkeys(cell.baseline_metrics)
    for record in cell.runs:
        assert record.drop.value is None
        assert record.drop.reason
        # Without the layer that is broken the model works.
        assert (record.accuracy is not None) == (record.change.layer == 2)
    estimates = [correlation.estimate for correlation in cell.correlations]
    assert all(estimate.value is None and estimate.reason for estimate in estimates)
