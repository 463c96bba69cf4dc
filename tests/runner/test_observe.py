"""`observe: kl`: the KL divergence of every run, also of results that were measured before it."""

from __future__ import annotations

import pytest
from scipy.stats import entropy

import tracker
from tests.conftest import cli, refused
from tests.helpers.lm_eval import load_model_parts, write_rows
from tests.helpers.own_tasks import write_choices
from tests.helpers.runs import run_experiment, write_study
from tests.helpers.truth import model_logits, pruned_copy, without_heads
from tracker.measuring import observing
from tracker.measuring.meter import Meter
from tracker.schema.changes import Ablation

ROWS = [{"q": "A pump", "a": 0}, {"q": "An animal", "a": 1}, {"q": "A heart", "a": 0}]
COLOURS = ["red", "of a deep blue"]


@pytest.fixture
def file(tmp_path, tiny_llama):
    folder = write_rows(tmp_path / "tasks", rows=ROWS)
    write_choices(folder, "paint", folder / "rows.jsonl", "{{q}} is", doc_to_choice=COLOURS)
    grid = {"model": str(tiny_llama()), "component": ["layer", "head"], "layer": [0, 1, 2]}
    return write_study(tmp_path / "a.yaml", benchmark="paint", include_path=str(folder), **grid)


def naive_divergence(model, tokenizer, change):
    """Return the mean over the tokens of right answers, by a really changed model."""
    removed = [change.layer] if change.component == "layer" else []
    changed = without_heads(pruned_copy(model, removed), Ablation.from_changes(change))
    values = []
    for row in ROWS:
        prompt = f"{row['q']} is"
        tokens = tokenizer(f"{prompt} {COLOURS[row['a']]}").input_ids
        p, q = (model_logits(m, tokens).softmax(-1).numpy() for m in (model, changed))
        values += entropy(p, q, axis=-1)[len(tokenizer(prompt).input_ids) - 1 : -1].tolist()
    return sum(values) / len(values)


def test_the_divergence_is_that_of_a_really_changed_model(tmp_path, file, spy):
    results = tmp_path / "results"
    (before,) = run_experiment(file, results).cells
    assert not any("kl_divergence" in {*run.proxies, *run.reasons} for run in before.runs)
    # Another week: no answer is measured again.
    measured = spy(Meter, "measure", lambda *_: "a block")
    observed = spy(observing, "answer_divergences", lambda _, doc, runs: (doc.index, len(runs)))
    (cell,) = run_experiment(file, results, observe="kl").cells
    assert (measured, observed) == ([], [(0, 15), (1, 15), (2, 15)])
    parts = load_model_parts(tmp_path / "tiny-llama")
    for run in cell.runs:
        assert run.kl_divergence == pytest.approx(naive_divergence(*parts, run.change), rel=1e-3)
    assert {c.sample for c in cell.correlations if c.proxy == "kl_divergence"} == {"head", "layer"}
    # The study finds these divergences. A further layer is observed alone.
    assert tracker.study("displacement", file, results=results, track=[]).outcome.exit_code == 0
    assert len(observed) == 3
    run_experiment(file, results, observe=["kl"], layer=[0, 1, 2, 3], component="layer")
    assert observed[3:] == [(0, 1), (1, 1), (2, 1)]


def test_an_unknown_statistic_is_refused(file):
    refused(cli("run", file, "--observe", "lk"), "observe", "'kl'", "'lk'")
    refused(cli("run", file, "--observe", "kl", "--until", "top 2"), "observe", "until")
