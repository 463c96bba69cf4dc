"""Generation under all ablations at once, against generation by the really pruned model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.ablations import parse_ablations
from tests.helpers.engines import PROMPT, generate_tokens, wrap_model
from tests.helpers.families import FAMILIES, tiny_model
from tests.helpers.registry import Variant, tiny_settings
from tracker.engine.scoring.generation import fork_decoding, prepare_generation
from tracker.engine.scoring.model import FULL
from tracker.engine.scoring.score import MIN_PREFIX, find_cache_argument, read_prefix
from tracker.engine.scoring.sweep import Engine
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.documents import Document, Request

FEW = parse_ablations("baseline layer:0 layer:2 attention:3 mlp:0 layer:3+mlp:0")
"""Those of most families."""
ABLATIONS = [*FEW, *parse_ablations("layer:1 layer:3 attention:0 mlp:3 layers:1,2")]
ALL_CASES = [(name, *n) for name in ("llama", "gemma3", "gpt2") for n in ((1, 0), (10, 6))]
CASES = [(n, 10, 0) for n, family in FAMILIES.items() if family.sharing == FULL] + ALL_CASES
"""Families, the lengths of prompts, and how much of them is read apart."""


def generate_as_pruned(
    model: Any, ablations: list[Ablation], prefix_tokens: int, prompt: torch.Tensor = PROMPT
) -> list[tuple[int, ...]]:
    """Generate a row an ablation, which the really pruned model generates alike."""
    engine, ids = Engine(wrap_model(model), 64), prompt[0].tolist()
    beginning = tuple(ids[:prefix_tokens])
    prefix = read_prefix(engine, engine.plan(ablations), beginning) if beginning else None
    with torch.inference_mode(), fork_decoding(engine, ablations, ids, prefix) as cache:
        rows = generate_tokens(
            model, prompt.repeat(len(ablations), 1), **{find_cache_argument(model): cache}
        )
    for ablation, row in zip(ablations, rows, strict=True):
        assert [row] == generate_tokens(engine.ablate(ablation).loaded.model, prompt), ablation
    return [tuple(row) for row in rows]


@pytest.mark.parametrize(("family", "length", "prefix_tokens"), CASES)
def test_every_row_is_the_pruned_model(family, length, prefix_tokens):
    model = tiny_model(family)
    ablations = ABLATIONS if (family, length, prefix_tokens) in ALL_CASES else FEW
    ablations = [a for a in ablations if FAMILIES[family].sublayers or not a.has_sublayers]
    generate_as_pruned(model, ablations, prefix_tokens, PROMPT[:, :length])


@pytest.mark.parametrize("prefix_tokens", [0, 6])
def test_texts_are_generated_by_layers_that_are_not_divided(prefix_tokens):
    """Gemma 4's attention, MLP and experts add to more than one stream."""
    settings = tiny_settings("gemma4_text") | {"enable_moe_block": True}
    model = Variant("gemma4_text", "plain", settings).model()
    part_ablations = parse_ablations(
        "head:0.1 head:0.3 head:2.1 head:2.3 expert:0.1 expert:0.3 expert:2.1 expert:2.3"
    )
    ablations = [INTACT, *part_ablations, Ablation.parse("int4_row:2")]
    rows = generate_as_pruned(model, ablations, prefix_tokens)
    assert len({*rows[: 1 + len(part_ablations)]}) > 1


@pytest.mark.parametrize(
    ("family", "prefix_tokens"),
    [("llama", 6), ("gemma3", 6), ("gpt2", 0), ("mixtral", 6), ("gpt_oss", 0)],
)
def test_texts_are_generated_without_heads_and_experts_and_with_rounded_ones(family, prefix_tokens):
    model = tiny_model(family)
    kind = "expert" if family in ("mixtral", "gpt_oss") else "head"
    part_ablations = [Ablation.parse(f"{kind}:{layer}.{n}") for layer in (0, 2) for n in (1, 3)]
    others = "int4_row:2 attention:2 layer:1"
    if kind == "expert":
        others += " int4_row:2.mlp.experts.down_proj int4_row:2.mlp.experts.1.gate_up_proj"
    ablations = [INTACT, *part_ablations, *parse_ablations(others)]
    rows = generate_as_pruned(model, ablations, prefix_tokens)
    # Somewhere a part decides what is said.
    assert len({*rows[: 1 + len(part_ablations)]}) > 1


def test_a_beginning_that_rows_were_scored_behind_serves_generation():
    """Was: outside inference mode nothing could be written into its buffer."""
    model, ablations = tiny_model("llama"), ABLATIONS[:3]
    engine = Engine(wrap_model(model), 256)
    beginning = tuple(torch.arange(3, 3 + MIN_PREFIX + 4).tolist())
    prompts = [(*beginning, 5 + n, 9) for n in range(3)]
    engine.score(
        [Document("t", n, (Request(p, (7,)),), 0, 0) for n, p in enumerate(prompts)], ablations
    )
    prompt = torch.tensor([prompts[1]])
    with prepare_generation(engine, ablations, prompts[1]) as cached:
        rows = generate_tokens(model, prompt.repeat(len(ablations), 1), **cached)
    assert engine.find_read_prefix(engine.plan(ablations), prompts[1])
    for ablation, row in zip(ablations, rows, strict=True):
        assert [row] == generate_tokens(engine.ablate(ablation).loaded.model, prompt), ablation


def test_keys_that_a_layer_lacks_are_no_shorter_model():
    ids = PROMPT[0].tolist()
    engine = Engine(wrap_model(tiny_model("llama")), 64)
    prefix = read_prefix(engine, engine.plan(ABLATIONS), tuple(ids[:-1]))
    prefix.cache.layers.pop()
    with (
        pytest.raises(ValueError, match="longer than"),
        fork_decoding(engine, ABLATIONS, ids, prefix),
    ):
        pass
