"""Sets of removals that a search asks for after its check."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma4TextConfig

from tests.conftest import save_tokenizer
from tests.helpers.truth import truths, without
from tracker.core.changes import INTACT, Ablation
from tracker.ledger.outcomes import AGAIN
from tracker.measuring.calibrate import LEAST_TWICE
from tracker.search.cells import OpenCell
from tracker.search.search import budget_of, search

from .conftest import opened

FIRST, LATER = Ablation.parse("layers:0,2"), Ablation.parse("layers:0,1")


@pytest.mark.usefixtures("one_thread")
def test_a_set_that_the_check_has_not_seen_is_exact(ask, lend, tmp_path: Path) -> None:
    """Layer 1 is the one that lends its keys and values to the last, through a dictionary."""
    folder = tmp_path / "lending"
    folder.mkdir()
    vocabulary = save_tokenizer(folder, bos=False)
    config = Gemma4TextConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        head_dim=8, global_head_dim=8, num_global_key_value_heads=2,
        layer_types=["full_attention"] * 3, num_kv_shared_layers=1,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=vocabulary,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (request,) = ask(model=str(folder), strategy="accuracy").calibration()
    cell = OpenCell(request, lend(tmp_path / "results"))
    cell.measure([FIRST])
    cell.measure([LATER])

    loaded, documents, max_length = opened(request)
    removed = [each.removed() for each in (INTACT, FIRST, LATER)]
    plain = truths(loaded, documents, removed, max_length, without, remembers=False)
    measured = cell.paired([INTACT, FIRST, LATER], "gold_logprob").ablated
    gold = [[s[d.gold or 0] for s in each] for each, d in zip(plain, documents, strict=True)]
    assert np.allclose(measured, gold, atol=1e-3)


@pytest.mark.usefixtures("one_thread")
def test_cells_and_searches_of_a_model_have_one_verdict(ask, lend, tmp_path: Path) -> None:
    """Was: each step that was tested beside others had the model's class checked once more."""
    (request,) = ask(strategy="accuracy").calibration()
    verdicts = []
    for folder, alone, together in (("one", (1,), (0, 2, 4)), ("other", (3,), (3, 4))):
        OpenCell(request, lend(tmp_path / folder)).measure(
            [Ablation.of(removed=alone), Ablation.of(removed=together)]
        )
        verdicts.append({path.name for path in tmp_path.glob(f"{folder}/checks/*")})
    assert len(verdicts[0] & verdicts[1]) == 2, "of short texts, and of texts as long as these"


@pytest.mark.usefixtures("one_thread")
def test_of_candidates_nothing_is_computed_twice_and_of_what_is_tested_some_is(ask, lend, tmp_path):
    raced = {"rescoring": "race", "sample": None, "remove": 1}
    race = ask(strategy="accuracy", dtype="bfloat16", **raced)
    lender, cells = lend(tmp_path / "results"), {}
    list(search(race, budget_of(race, lender), lender, cells))
    assert AGAIN not in cells[race.calibration()[0]].store.read()

    asked = ask(strategy="accuracy", remove=2, dtype="bfloat16")
    (request,), test = asked.calibration(), asked.test()
    chosen, tested = (OpenCell(each, lend(tmp_path / "results")) for each in (request, test))
    chosen.measure([FIRST], candidates=True)
    tested.measure([FIRST])
    assert AGAIN not in chosen.store.read()
    twice = tested.store.read()
    twice = twice[twice[AGAIN].notna()]
    assert set(twice["ablation"]) == {INTACT.name, FIRST.name}
    assert twice["doc"].nunique() == LEAST_TWICE
