"""Generation under all ablations at once, against generation by the really pruned model."""

from __future__ import annotations

import pytest
import torch

from tests.engine.plain import loaded
from tracker.ablations import INTACT, ablate
from tracker.engine.decode import decoding
from tracker.engine.prefix import cache_argument
from tracker.engine.score import read_prefix
from tracker.engine.streams import plan_streams
from tracker.engine.sweep import Engine
from tracker.models.layers import find_layers, layers_removed
from tracker.models.sublayers import find_sublayers, silenced

ABLATIONS = [
    INTACT,
    *(ablate(component, [layer]) for component in ("layer", "attention", "mlp") for layer in range(4)),
    ablate("layer", [1, 2]),
    ablate("mlp", [0], removed=[3]),
]  # fmt: skip
PROMPT = torch.tensor([[5, 9, 23, 7, 80, 41, 3, 11, 2, 66]])


def generate(model, ids, **cached):
    return model.generate(
        ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None, **cached
    ).tolist()


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "gemma3", "gpt_neox", "gpt2", "opt"]
)
@pytest.mark.parametrize(("length", "begun"), [(1, 0), (10, 0), (10, 6)])
def test_every_row_is_the_pruned_model(tiny_model, family, length, begun):
    model = tiny_model(family)
    engine = Engine(loaded(model), 64)
    plan = plan_streams(ABLATIONS, 4)
    parts = engine.parts(plan)
    prompt = PROMPT[:, :length]
    ids = prompt[0].tolist()
    prefix = read_prefix(parts, plan, tuple(ids[:begun])) if begun else None
    with torch.inference_mode(), decoding(parts, ABLATIONS, ids, prefix) as cache:
        rows = generate(model, prompt.repeat(len(ABLATIONS), 1), **{cache_argument(model): cache})
    sublayers = find_sublayers(model, find_layers(model))
    for ablation, row in zip(ABLATIONS, rows, strict=True):
        quiet = [sublayers[i].attention for i in ablation.attention]
        quiet += [sublayers[i].mlp for i in ablation.mlp]
        with layers_removed(model, ablation.layers), silenced(quiet):
            assert [row] == generate(model, prompt), ablation
