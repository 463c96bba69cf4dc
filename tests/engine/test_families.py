"""Every architecture of the table, shared as far as the self-check allows, against plain ablation.

What is compared is what the layer's removal means: its output is its input. How far a removed layer
and a really pruned model agree is the matter of `test_sweep` and of the models' own tests.
"""

from __future__ import annotations

import pytest

from tests.helpers.ablations import parse_ablations
from tests.helpers.engines import (
    assert_naive_scores,
    assert_one_sentence,
    engine_of,
    make_documents,
    naive_answers,
    skipping_layers,
)
from tests.helpers.families import FAMILIES, tiny_model
from tracker.engine.scoring.model import FULL, PLAIN
from tracker.engine.scoring.score import MIN_PREFIX
from tracker.engine.selfcheck.check import check_sharing
from tracker.engine.selfcheck.reference import SHARING_DESCRIPTIONS, STATE, keeps_state
from tracker.models.hooks import silenced_sublayers
from tracker.models.parts.anatomy import LayerAnatomy
from tracker.models.parts.sublayers import Sublayers
from tracker.schema.errors import ModelError

CHECKED = parse_ablations("baseline layer:0 layers:1,2")
ABLATIONS = [*CHECKED, *parse_ablations("layer:1 layers:0,3")]

HALVES = parse_ablations("baseline attention:0 attention:1 mlp:0 mlp:1 layer:2+attention:0+mlp:3")


CHECKED_FAMILIES = {
    *("opt", "qwen2_sliding", "gemma3_mixed", "gpt_oss", "gpt_neo", "llama4", "deepseek_v3"),
    *("falcon_alibi", "bloom", "mpt", "mamba", "mamba2", "jamba_eager", "recurrent_gemma"),
    *("zamba2", "qwen3_next", "lfm2"),
}
"""Families whose sharing the self-check must find; `make families` checks every architecture."""

pytestmark = pytest.mark.usefixtures("one_thread")


def checked_engine(model, family, documents):
    """Check an engine of the family's model, and return it with the sharing found."""
    result = check_sharing(engine_of(model, row_tokens=40), documents, CHECKED)
    assert result.engine.sharing == FAMILIES[family].sharing, result.sharing_note
    if result.engine.sharing == FULL:
        assert result.sharing_note is None
    else:
        assert f"{SHARING_DESCRIPTIONS[result.engine.sharing]}, because " in result.sharing_note
        assert (STATE in result.sharing_note) == keeps_state(tiny_model(family))
        assert_one_sentence(result.sharing_note)
    assert result.difference < 1e-4
    return result.engine


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_every_stream_is_the_ablated_model(self, family):
        """Also with nothing shared, which the self-check compares with."""
        model, documents = tiny_model(family), make_documents(4)
        if family in CHECKED_FAMILIES:
            engine = checked_engine(model, family, documents)
        else:
            engine = engine_of(model, FAMILIES[family].sharing, row_tokens=40)
        scores = engine.score(documents, ABLATIONS)
        plain_scores = engine_of(model, PLAIN).score(documents[:2], ABLATIONS)
        assert_naive_scores([*scores, *plain_scores], model, ABLATIONS, skipping_layers)
        intact_answers, *other_answers = [[r.loglikelihood for r in e] for e in scores[0].responses]
        for answers in other_answers:  # else these equalities would say nothing
            assert max(abs(a - b) for a, b in zip(intact_answers, answers, strict=True)) > 0.05

    def test_its_sublayers_too_or_it_is_refused(self, family):
        model, documents = tiny_model(family), make_documents(2)
        if not FAMILIES[family].sublayers:
            with pytest.raises(ModelError, match="cannot be distinguished"):
                LayerAnatomy.of(model).find(Sublayers)
            return
        parts = LayerAnatomy.of(model).find(Sublayers)
        engine = engine_of(model, FAMILIES[family].sharing, row_tokens=40)
        scores = engine.score(documents, HALVES)
        for column, ablation in enumerate(HALVES):
            silent_modules = [
                *(parts[layer].attention for layer in ablation.removed("attention")),
                *(parts[layer].mlp for layer in ablation.removed("mlp")),
            ]
            with skipping_layers(model, ablation.removed()), silenced_sublayers(silent_modules):
                for score in scores:
                    expected = naive_answers(model, score.document)
                    for response, (loglikelihood, _) in zip(
                        score.responses[column], expected, strict=True
                    ):
                        assert response.loglikelihood == pytest.approx(loglikelihood, abs=2e-4)


@pytest.mark.parametrize("family", [f for f in FAMILIES if FAMILIES[f].sharing == FULL])
def test_a_long_common_beginning_is_read_once(family):
    """Kept keys and values, seen through each kind of layer's own mask."""
    model, documents = tiny_model(family), make_documents(3, shared=MIN_PREFIX + 2)
    engine = engine_of(model, row_tokens=40)
    assert engine.has_shared_prefix(documents)
    assert_naive_scores(engine.score(documents, ABLATIONS), model, ABLATIONS, skipping_layers)
