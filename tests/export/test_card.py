"""Cards and what the terminal prints of made-up models, as golden text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.stored_cells import model_identity
from tracker.cli.printing import print_export
from tracker.export.card import card_text
from tracker.export.changes import part_removal, removal, rounding
from tracker.export.facts import Accuracy, ExportedModel, ModelChange, Proof, Size
from tracker.export.serving import ServingFigure
from tracker.schema.changes import Ablation, Change
from tracker.schema.estimates import Estimate

GOLDEN = Path(__file__).parent / "cards.md"
NAME = "<img src=x onerror=alert(1)>|"
"""A page that shows Markdown must not run what a name says."""
BASE = model_identity(source="my`model", name=NAME, architecture="Llama")
COSTS = (
    Accuracy(NAME, 0, NAME, NAME, 40, Estimate(0.5, 0.4, 0.6), Estimate(0.45)),
    Accuracy("own", 2, "ppl", "9 texts", 9, Estimate(0.5, 0.4, 0.6), Estimate(None), "bits"),
)
PROOF = Proof(4, 0.0, ("copa",), 40, {"acc": 0.45}, 0.1, 1, {"transformers": "5", "lm-eval": "0.5"})
FIGURES = (
    ServingFigure("decode_1", "speed", (10, 9, 11), (12.71, 12.49, 13), (1.271, 1.249, 1.3)),
    ServingFigure("cache_bytes", "bytes", (4096,) * 3, (2048,) * 3),
)
PRUNED = ExportedModel(
    Path("lighter"), BASE, removal((2, 1)), (0, 3), Size(4, 1000, 4000), Size(2, 500, 2000),
    FIGURES, "both by turns", {"llama.cpp": "quantize\n", "mergekit": "a: b\n"},
    accuracy=COSTS, proof=PROOF,
)  # fmt: skip
REPEATED = replace(
    PRUNED,
    change=ModelChange(
        Ablation.from_changes(Change.parse("repeat3:1-2")), calibration="9 documents"
    ),
    kept_layers=(0, 1, 2, 1, 2, 1, 2, 3),
    after=Size(8, 2000, 8000),
    proof=Proof(4, 1e-6),
)
MODELS = {
    "named by hand": PRUNED,
    "chosen by a search": replace(
        PRUNED,
        base=BASE.model_copy(update={"revision": "c0ffee"}),
        change=removal((1,), strategy="accuracy", calibration=NAME, recommendation=NAME),
        proof=replace(PROOF, measured=0.425, is_half=True),
        serving=(),
        speed_on="the program failed: <b>",
        accuracy=(),
        recipes={},
        resized=("layer_types", "max_window_layers"),
    ),
    "without heads and experts": replace(
        PRUNED,
        change=part_removal(["kv_head:0.1", "expert:0.2", "kv_head:1.0", "expert:1.0"]),
        kept_layers=(0, 1),
        recipes={},
        resized=("num_experts",),
    ),
    "without a layer and neurons": replace(
        PRUNED,
        change=part_removal(["1", "neuron:0.3", "neuron:2.1"]),
        kept_layers=(0, 2),
        recipes={},
    ),
    "repeated": REPEATED,
    "quantised": replace(
        PRUNED,
        change=rounding({"0.mlp.down_proj": "q4_0", "1": "q8_0", "embedding": "q4_0"}),
        formats={"model.layers.0.mlp.down_proj": "q4_0", "model.embed_tokens": "q4_0"},
        after=Size(4, 1000, 1200),
        serving=(),
        speed_on="",
    ),
}


def test_cards_and_terminal_match_the_golden_files(capsys: pytest.CaptureFixture[str]) -> None:
    text = ""
    for title, model in MODELS.items():
        card = card_text(model)
        assert NAME not in card
        print_export(model)
        text += f"===== {title}\n{card}----- printed\n{capsys.readouterr().out}"
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_the_terminal_gives_the_reason_for_each_missing_recipe(capsys) -> None:
    problems = {"llama.cpp": "too many formats", "mlx-lm": "it has no q8_0"}
    print_export(replace(MODELS["quantised"], recipes={}, problems=problems))
    printed = capsys.readouterr().out
    assert all(f"{tool}: {reason}\n" in printed for tool, reason in problems.items())
    assert "each layer" not in printed, "this is a reason for removed layers"
