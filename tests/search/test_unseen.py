"""Sets of removals that a search asks for after its check."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma4TextConfig

from tests.conftest import save_tokenizer
from tests.helpers.truth import plain_loglikelihoods
from tracker.ledger.outcomes import REPEATED_COLUMN
from tracker.measuring.calibrate import MIN_REPEATED
from tracker.schema.changes import INTACT, Ablation
from tracker.search.cells import OpenCell
from tracker.search.search import find_budget, run_search

from .conftest import open_documents

CHECKED_SET, UNSEEN_SET = Ablation.parse("layers:0,2"), Ablation.parse("layers:0,1")


@pytest.mark.usefixtures("one_thread")
def test_unchecked_sets_are_exact(ask, make_cache, tmp_path: Path) -> None:
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
    cell = OpenCell(request, make_cache(tmp_path / "results"))
    cell.measure([CHECKED_SET])
    cell.measure([UNSEEN_SET])

    loaded, documents, max_length = open_documents(request)
    removed = [answers.removed() for answers in (INTACT, CHECKED_SET, UNSEEN_SET)]
    truths = plain_loglikelihoods(loaded, documents, removed, max_length, remembers=False)
    measured = cell.outcomes([INTACT, CHECKED_SET, UNSEEN_SET], "gold_logprob").ablated
    gold = [[s[d.gold or 0] for s in answers] for answers, d in zip(truths, documents, strict=True)]
    assert np.allclose(measured, gold, atol=1e-3)


@pytest.mark.usefixtures("one_thread")
def test_cells_of_a_model_share_one_check(ask, make_cache, tmp_path: Path) -> None:
    """Was: each step that was tested beside others had the model's class checked once more."""
    (request,) = ask(strategy="accuracy").calibration()
    verdicts = []
    for folder, single_layer, several_layers in (("one", (1,), (0, 2, 4)), ("other", (3,), (3, 4))):
        OpenCell(request, make_cache(tmp_path / folder)).measure(
            [
                Ablation.from_changes(removed=single_layer),
                Ablation.from_changes(removed=several_layers),
            ]
        )
        verdicts.append({path.name for path in tmp_path.glob(f"{folder}/checks/*")})
    assert len(verdicts[0] & verdicts[1]) == 2, "of short texts, and of texts as long as these"


@pytest.mark.usefixtures("one_thread")
def test_only_test_documents_are_repeated(ask, make_cache, tmp_path):
    race_settings = {"rescoring": "race", "sample": None, "remove": 1}
    race = ask(strategy="accuracy", dtype="bfloat16", **race_settings)
    cache = make_cache(tmp_path / "results")
    list(run_search(race, find_budget(race, cache), cache))
    assert REPEATED_COLUMN not in cache.cell(race.calibration()[0]).store.read()

    search_request = ask(strategy="accuracy", remove=2, dtype="bfloat16")
    requests = (*search_request.calibration(), search_request.test())
    calibration_cell, test_cell = map(make_cache(tmp_path / "results").cell, requests)
    calibration_cell.measure([CHECKED_SET], are_candidates=True)
    test_cell.measure([CHECKED_SET])
    assert REPEATED_COLUMN not in calibration_cell.store.read()
    frame = test_cell.store.read()
    frame = frame[frame[REPEATED_COLUMN].notna()]
    assert set(frame["ablation"]) == {INTACT.name, CHECKED_SET.name}
    assert frame["doc"].nunique() == MIN_REPEATED
