"""Models whose weights rest on disk: equal to those in memory, and read once for everybody."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch

from tests.helpers.ablations import single_layers
from tests.helpers.engines import (
    MAX_LENGTH,
    StoredVerdict,
    assert_same_scores,
    make_documents,
    save_model,
)
from tests.helpers.families import FAMILIES, tiny_model
from tracker.bench.doctor import FEATURES as COMPUTED
from tracker.bench.doctor import largest_difference
from tracker.engine.observers.layer_proxies import measure_expert_load
from tracker.engine.scoring.model import DEPTH_ONLY, FULL, ONE_BY_ONE, PLAIN
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck.check import check_sharing
from tracker.models.load import load_model
from tracker.models.offloaded import min_weight_bytes
from tracker.schema.changes import INTACT, Ablation, Change
from tracker.schema.errors import CellError

ABLATIONS = [*single_layers((0, 1, 2, 3)), Ablation.parse("layers:1,2")]
pytestmark = pytest.mark.usefixtures("one_thread")
SOME_FAMILIES = ("llama", "gemma3", "gpt2", "mixtral", "bloom")


@pytest.fixture
def both(tmp_path):
    """Build a family's tiny model, loaded as it is and with all of its layers on disk."""

    def made(family, dtype="float32", **more):
        model = tiny_model(family).to(getattr(torch, dtype))
        source = save_model(model, tmp_path / family)
        engines = [
            Engine(load_model(source, dtype, "cpu", weights=weights), MAX_LENGTH, **more)
            for weights in (None, min_weight_bytes(model))
        ]
        assert engines[0].loaded.offloaded is None
        assert sorted(engines[1].loaded.offloaded.load_counts) == [0, 1, 2, 3]
        return engines

    return made


CASES = [
    *product(SOME_FAMILIES, ["layers after a common beginning"]),
    ("deepseek_v3", "shared experts"),
]


@pytest.mark.parametrize(("family", "feature"), CASES)
def test_every_answer_is_that_of_the_model_in_memory(both, family, feature):
    engines = both(family)
    others = (DEPTH_ONLY, ONE_BY_ONE) if family == "llama" else ()
    for sharing in (FAMILIES[family].sharing, PLAIN, *others):
        pair = (engine.with_sharing(sharing) for engine in engines)
        assert largest_difference(*map(COMPUTED[feature], pair)) == 0


def test_weights_come_past_once_for_a_check_and_once_for_a_block(both):
    """Two sweeps for the check: where masks are looked at meanwhile, and where rows are scored."""
    resident, offloaded = both("llama")
    documents = make_documents(6)
    weights = offloaded.loaded.offloaded
    engine = check_sharing(resident, documents, ABLATIONS, StoredVerdict()).engine
    expected = engine.score(documents, ABLATIONS)
    result = check_sharing(offloaded, documents, ABLATIONS, StoredVerdict())
    assert result.engine.sharing == FULL
    assert set(weights.load_counts.values()) == {2}
    scores = result.engine.score(documents, ABLATIONS)
    assert set(weights.load_counts.values()) == {3}
    assert [score.responses for score in scores] == [e.responses for e in expected]


def test_a_layer_that_comes_past_is_progress(both):
    documents = make_documents(6)
    n_due = sum(len(document.requests) for document in documents) * len(ABLATIONS)
    resident, offloaded = [], []
    for engine, progress in zip(both("llama"), (resident, offloaded), strict=True):
        engine.score(documents, ABLATIONS, progress.append)
    assert sum(resident) == sum(offloaded) == n_due
    expected = [n_due * layers**2 // 16 for layers in (1, 2, 3, 4)]  # all rows end together
    assert [sum(offloaded[:count]) for count in (1, 2, 3, 4)] == expected


def test_a_plain_call_brings_in_each_layer_once(both):
    resident, offloaded = both("llama")
    text = range(3, 20)
    assert torch.equal(offloaded.read_logits(text), resident.read_logits(text))
    assert offloaded.loaded.offloaded.load_counts == dict.fromkeys(range(4), 1)


def test_experts_are_observed_beside_a_sweep(both):
    """Both wait for the same layers, which come past once for them."""
    parts = [Change.parse(f"expert:{layer}.{number}") for layer in (1, 3) for number in (0, 1)]
    documents, ablations = make_documents(3), [INTACT, *map(Ablation.from_changes, parts)]

    def compute(engine):
        observe = [partial(measure_expert_load, engine, document, parts) for document in documents]
        passes = [partial(engine.score, documents, ablations), lambda: engine.run_lockstep(observe)]
        scores, loads = engine.run_lockstep(passes)
        return [score.responses for score in scores], [*loads]

    resident, offloaded = map(compute, both("mixtral"))
    assert resident == offloaded


def check_and_score(engines, ablations):
    """Check each engine and score some documents with what it shares."""
    documents = make_documents(4)
    checks = [check_sharing(engine, documents, ablations, StoredVerdict()) for engine in engines]
    return [(result, result.engine.score(documents, ablations)) for result in checks]


FAMILY_ABLATIONS = {
    "llama": "int8:2 int4_row:2 int4_row:embedding int4_row:lm_head",
    "mixtral": "int4_row:2 int4_row:2.mlp.experts.down_proj "
    "int4_row:2.mlp.experts.1.gate_up_proj expert:2.0 expert:2.3",
}


@pytest.mark.parametrize(("family", "dtype"), [("llama", "bfloat16"), ("mixtral", "float32")])
def test_parts_and_interventions_are_those_of_the_model_in_memory(both, family, dtype):
    names = f"baseline {FAMILY_ABLATIONS[family]} attention:1 mlp:3 repeat:2 head:2.1"
    ablations = [Ablation.parse(name) for name in names.split()]
    (resident, expected), (offloaded, scores) = check_and_score(both(family, dtype), ablations)
    assert offloaded.engine.sharing == resident.engine.sharing
    assert offloaded.difference == resident.difference
    assert [score.responses for score in scores] == [e.responses for e in expected]


def test_a_stretch_that_is_passed_again_is_asked_of_a_deeper_model(both):
    """Was: its first layers were gone by then, and the cell was refused."""
    ablations = [INTACT, Ablation.parse("repeat:1-2"), Ablation.parse("layer:2")]
    (_, expected), (offloaded, scores) = check_and_score(both("llama"), ablations)
    assert not offloaded.engine.sharing.depth
    assert "cannot run twice" in offloaded.sharing_note
    assert_same_scores(scores, expected)


def test_a_file_that_changes_meanwhile_is_said(both, tmp_path):
    _, offloaded = both("llama")
    text = range(3, 20)
    offloaded.read_logits(text)
    file = tmp_path / "llama" / "model.safetensors"
    file.write_bytes(file.read_bytes())
    with pytest.raises(CellError, match=r"model\.safetensors has changed while"):
        offloaded.read_logits(text)


def test_some_layers_stay_in_memory(tmp_path):
    model = tiny_model("llama").bfloat16()
    source, scored = save_model(model, tmp_path), []
    for weights in (None, min_weight_bytes(model, 1)):
        loaded = load_model(source, "bfloat16", "cpu", weights=weights)
        scores = Engine(loaded, MAX_LENGTH).score(make_documents(3), ABLATIONS)
        scored.append([score.responses for score in scores])
    assert len(loaded.offloaded.load_counts) == 3
    assert scored[0] == scored[1]


def test_a_layer_that_uses_another_ones_weights_is_refused(both):
    """Was: both ways would have computed with nothing, and agreed."""
    _, offloaded = both("llama")
    first_layer, last_layer = offloaded.loaded.layers[0], offloaded.loaded.layers[3]
    last_layer.mlp.forward = lambda state: first_layer.mlp.down_proj(first_layer.mlp.up_proj(state))
    with pytest.raises(CellError, match="uses another layer's weights"):
        check_sharing(offloaded, make_documents(3), [INTACT])
