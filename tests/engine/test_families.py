"""Every architecture of the table, shared as far as the self-check allows, against plain ablation.

What is compared is what the layer's removal means: its output is its input. How far a removed layer
and a really pruned model agree is the matter of `test_sweep` and of the models' own tests.
"""

from __future__ import annotations

import pytest

from tests.helpers.ablations import single_layers
from tests.helpers.engines import (
    agree,
    answers,
    engine_of,
    is_one_sentence,
    make_documents,
    skipped,
)
from tests.helpers.families import FAMILIES, tiny_model
from tracker.core.changes import INTACT, Ablation
from tracker.core.errors import ModelError
from tracker.engine.scoring.model import FULL, PLAIN
from tracker.engine.scoring.score import SHORTEST
from tracker.engine.selfcheck.check import check
from tracker.engine.selfcheck.reference import LEFT, STATE, keeps_a_state
from tracker.models.hooks import silenced
from tracker.models.parts.anatomy import LayerAnatomy
from tracker.models.parts.sublayers import Sublayers

ABLATIONS = [
    *single_layers((0, 1)),  # one of each kind that a family mixes
    Ablation.parse("layers:1,2"),
    Ablation.parse("layers:0,3"),
]

HALVES = [
    INTACT,
    *(Ablation.parse(f"attention:{layer}") for layer in (0, 1)),
    *(Ablation.parse(f"mlp:{layer}") for layer in (0, 1)),
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
        """The reference of the self-check is right: layers really removed, the rest re-indexed."""
        model, documents = tiny_model(family), make_documents(2)
        scores = engine_of(model, PLAIN).score(documents, ABLATIONS)
        agree(scores, model, ABLATIONS, skipped)
        intact, *others = [[r.loglikelihood for r in each] for each in scores[0].responses]
        for other in others:  # else these equalities would say nothing
            assert max(abs(a - b) for a, b in zip(intact, other, strict=True)) > 0.05

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


@pytest.mark.parametrize("family", [f for f in FAMILIES if FAMILIES[f].sharing == FULL])
def test_a_long_common_beginning_is_read_once(family):
    """Kept keys and values, seen through each kind of layer's own mask."""
    model, documents = tiny_model(family), make_documents(3, shared=SHORTEST + 2)
    engine = engine_of(model, row_tokens=40)
    assert engine.shares_a_prefix(documents)
    agree(engine.score(documents, ABLATIONS), model, ABLATIONS, skipped)
