"""The registry names every causal model; a few variants are measured here.

The whole is `make families`, which takes hours; what it found stands in `docs/families.csv`. Here
is what neither `test_families.py` nor `test_once_wrong.py` holds against a truth of its own.
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers.registry import FAMILY_NAMES, NOT_BUILT, NOT_SAVED, families, find, variants
from tests.tools import survey
from tests.tools.survey import (
    DISCONTINUOUS,
    EXACT,
    REFUSED,
    examine,
)
from tracker.core.changes import INTACT, Ablation

MEASURED = [
    # Positions by the kind of layer, a window of other kinds of layers.
    ("gemma3_text", "rope longrope"),
    ("modernbert-decoder", "plain"),
    # Other parts beside the text, layers that are not one list.
    ("gemma3", "plain"),
    ("hrm_text", "plain"),
    ("blt", "plain"),
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def few(monkeypatch):
    """A layer alone, and two together, in place of every layer."""
    monkeypatch.setattr(
        survey, "ABLATIONS", [INTACT, Ablation.parse("layer:0"), Ablation.parse("layers:1,2")]
    )


@pytest.mark.parametrize(("family", "name"), MEASURED)
def test_it_is_exact_or_said_not_to_be(family, name, few):
    verdict = examine(find(family, name))
    assert verdict.verdict in (EXACT, REFUSED, DISCONTINUOUS), verdict
    assert verdict.verdict == REFUSED or not verdict.idle, verdict


def test_the_registry_is_complete():
    """Every causal model of the installed transformers is built, or listed with a reason.

    Here are those that `test_checkpoint` does not build, where it asks all others.
    """
    assert {*families(), *NOT_BUILT} >= {*FAMILY_NAMES}
    causes = []
    for family in NOT_SAVED:
        try:
            model = next(variants(family)).model()
            said = model(torch.tensor([[3, 5, 8]]), use_cache=False).logits
            if not said.isfinite().all():
                causes.append(f"{family}: its logits are not finite")
        except Exception as error:  # noqa: BLE001 - all of them are listed
            causes.append(f"{family}: {error!r:.200}")
    assert not causes
