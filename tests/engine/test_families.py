"""Every architecture of the table, shared as far as the self-check allows, against plain ablation.

What is compared is what the layer's removal means: its output is its input. How far a removed layer
and a really pruned model agree is the matter of `test_sweep` and of the models' own tests.
"""

from __future__ import annotations

import pytest

from tests.helpers.ablations import single_layers
from tests.helpers.engines import (
    MAX_LENGTH,
    agree,
    answers,
    engine_of,
    is_one_sentence,
    loaded,
    make_documents,
    skipped,
)
from tests.helpers.families import FAMILIES, LAYERS, tiny_model
from tracker.core.changes import INTACT, Ablation
from tracker.core.errors import CellError, ModelError
from tracker.engine.scoring.model import FULL, PLAIN
from tracker.engine.scoring.score import SHORTEST
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck.check import check
from tracker.engine.selfcheck.reference import LEFT, STATE, keeps_a_state
from tracker.models.hooks import silenced
from tracker.models.layers import find_layers
from tracker.models.parts.anatomy import LayerAnatomy
from tracker.models.parts.sublayers import Sublayers

ABLATIONS = [
    *single_layers(tuple(range(LAYERS))),
    Ablation.parse("layers:1,2"),
    Ablation.parse("layers:0,3"),
]

HALVES = [
    INTACT,
    *(Ablation.parse(f"attention:{layer}") for layer in range(LAYERS)),
    *(Ablation.parse(f"mlp:{layer}") for layer in range(LAYERS)),
    Ablation.parse("layer:2+attention:0+mlp:3"),
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_every_stream_is_the_ablated_model(self, family):
        model, documents = tiny_model(family), make_documents()
        checked = check(engine_of(model, row_tokens=40), documents, ABLATIONS)
        assert checked.engine.sharing == FAMILIES[family].sharing, checked.lost
        if checked.engine.sharing == FULL:
            assert checked.lost is None
        else:
            assert f"{LEFT[checked.engine.sharing]}, because " in checked.lost
            assert (STATE in checked.lost) == keeps_a_state(tiny_model(family))
            is_one_sentence(checked.lost)
        assert checked.difference < 1e-4
        agree(checked.engine.score(documents, ABLATIONS), model, ABLATIONS, skipped)

    def test_without_sharing_too(self, family):
        """What the self-check trusts: the layers really taken out, and the rest re-indexed."""
        model, documents = tiny_model(family), make_documents(2)
        engine = engine_of(model, PLAIN)
        agree(engine.score(documents, ABLATIONS), model, ABLATIONS, skipped)

    def test_its_sublayers_too_or_it_is_refused(self, family):
        model, documents = tiny_model(family), make_documents(2)
        if not FAMILIES[family].sublayers:
            with pytest.raises(ModelError, match="cannot be told apart"):
                LayerAnatomy.of(model).find(Sublayers)
            return
        parts = LayerAnatomy.of(model).find(Sublayers)
        engine = engine_of(model, FAMILIES[family].sharing, row_tokens=40)
        scores = engine.score(documents, HALVES)
        for column, ablation in enumerate(HALVES):
            quiet = [
                *(parts[layer].attention for layer in ablation.removed("attention")),
                *(parts[layer].mlp for layer in ablation.removed("mlp")),
            ]
            with skipped(model, ablation.removed()), silenced(quiet):
                for score in scores:
                    truth = answers(model, score.document)
                    for ours, (loglikelihood, _) in zip(
                        score.responses[column], truth, strict=True
                    ):
                        assert ours.loglikelihood == pytest.approx(loglikelihood, abs=2e-4)

    def test_every_layer_matters(self, family):
        """Else the equalities above would say nothing."""
        model, document = tiny_model(family), make_documents(1)[0]
        intact = answers(model, document)
        for ablation in ABLATIONS[1:]:
            with skipped(model, ablation.removed()):
                ablated = answers(model, document)
            assert max(abs(a - b) for (a, _), (b, _) in zip(intact, ablated, strict=True)) > 0.05

    def test_its_layers_are_found(self, family):
        assert len(find_layers(tiny_model(family))) == LAYERS


@pytest.mark.parametrize("family", [f for f in FAMILIES if FAMILIES[f].sharing == FULL])
def test_a_long_common_beginning_is_read_once(family):
    """Kept keys and values, seen through each kind of layer's own mask."""
    model, documents = tiny_model(family), make_documents(3, shared=SHORTEST + 2)
    engine = engine_of(model, row_tokens=40)
    assert engine.shares_a_prefix(documents)
    agree(engine.score(documents, ABLATIONS), model, ABLATIONS, skipped)


def test_a_model_that_cannot_be_measured_says_what_it_does():
    """Gemma 3n passes on several predictions of the hidden state, and the batch comes second."""
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    config = Gemma3nTextConfig(
        vocab_size=300,
        vocab_size_per_layer_input=300,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_kv_shared_layers=2,
        head_dim=8,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    engine = Engine(loaded(Gemma3nForCausalLM(config).eval()), MAX_LENGTH)
    with pytest.raises(CellError, match=r"its layers pass on \(2, 1, 18, 32\), and not \[texts"):
        check(engine, make_documents(2), ABLATIONS)
