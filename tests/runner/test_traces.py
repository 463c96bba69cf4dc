"""Traces from the experiment file to the ledger: written once, and read by every change."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import pytest

from tests.conftest import cli, refused
from tests.helpers.lm_eval import HFLM, cut_layer, evaluate, folder_tasks, load_model_parts
from tests.helpers.runs import RecordingProgress, list_shards, read_outcomes, run_experiment
from tests.helpers.trace_tasks import PATTERNS, read_plainly, write_task
from tracker.ledger.outcomes import stored_texts
from tracker.measuring.scorer import Generation
from tracker.schema.errors import BenchmarkError

pytestmark = pytest.mark.usefixtures("one_thread")
QUESTIONS = [f"Question: Which organ pumps {n} litres of blood? Answer:" for n in range(12)]


@pytest.fixture
def study(tiny_llama, experiment, tmp_path) -> Callable[..., Path]:
    """Write an experiment that reads traces of a task of one's own."""
    model = tiny_llama(hidden_size=128, intermediate_size=256)  # too large for 2 MiB

    def write(name: str = "study.yaml", **settings: object) -> Path:
        folder = tmp_path / "tasks"
        if not folder.exists():
            write_task(folder, QUESTIONS, ["e"] * len(QUESTIONS))
        defaults = {"benchmark": "traces:letters", "include_path": str(folder), "limit": None}
        return experiment(model, name, **{**defaults, "data": None, **settings})

    return write


@pytest.fixture
def written(spy) -> list[Any]:
    """List the ablations of each generated text."""
    calls: list[Any] = spy(Generation, "generate", lambda _, prompt, ablations: len(ablations))
    return calls


def outcomes_of(results: Path) -> pd.DataFrame:
    frame = read_outcomes(results).sort_values(["ablation", "doc"], ignore_index=True)
    names = [name for name in frame if name.startswith("metric/") or name == "loglikelihoods"]
    return frame[["doc", "ablation", *names]]


def test_later_changes_read_the_stored_texts(study, written, tmp_path) -> None:
    """Texts are lm-eval's of the intact model, written once for each document."""
    results, whole = tmp_path / "results", tmp_path / "whole"
    assert not run_experiment(study(layer=[0, 1]), results).outcome.failed
    n_checked = len(written) - len(QUESTIONS)
    assert {*written} == {1}
    written.clear()
    assert not run_experiment(study(layer=[2]), results).outcome.failed
    assert len(written) == n_checked
    assert not run_experiment(study(layer=[0, 1, 2]), whole).outcome.failed
    pd.testing.assert_frame_equal(outcomes_of(results), outcomes_of(whole), atol=1e-5)
    rows = read_outcomes(results)
    texts = rows[rows["ablation"] == "baseline"].sort_values("doc")["text"].tolist()
    assert rows[rows["ablation"] != "baseline"]["text"].isna().all()
    model, tokenizer = load_model_parts(tmp_path / "tiny-llama")
    lm = HFLM(model, tokenizer=tokenizer, batch_size=1)
    manager = folder_tasks(tmp_path / "tasks")
    samples = evaluate(lm, tasks=["letters"], task_manager=manager)["samples"]["letters"]
    by_number = sorted((s for s in samples if s["filter"] == "number"), key=lambda s: s["doc_id"])
    assert texts == [sample["resps"][0][0] for sample in by_number]


SAMPLING = {"samples": 3, "gen_kwargs": {"temperature": 1.0}}


def test_metrics_are_means_over_the_sampled_texts_of_a_document(study, tmp_path) -> None:
    """Each text is read once more in one plain pass of a really changed model."""
    results, fewer, heard = tmp_path / "results", tmp_path / "fewer", RecordingProgress()
    assert not run_experiment(study(layer=[1], **SAMPLING), results, heard).outcome.failed
    # Twelve tokens end most texts.
    assert sum("max_gen_toks" in line for line in heard.lines) == 1
    rows = read_outcomes(results).set_index(["ablation", "doc"])
    texts = {doc: stored_texts(rows.loc["baseline", doc]) for doc in range(len(QUESTIONS))}
    assert len({text for group in texts.values() for text in group}) > 2 * len(QUESTIONS)
    model, tokenizer = load_model_parts(tmp_path / "tiny-llama")
    for name, changed in (("baseline", model), ("layer:1", cut_layer(model, 1))):
        for doc, group in texts.items():
            values = [
                read_plainly(changed, tokenizer, QUESTIONS[doc], text, "e", PATTERNS["last-letter"])
                for text in group
            ]
            for metric in ("answer_kept_right", "answer_kept_wrong", "answer_probability"):
                expected = fmean(value[metric] for value in values)
                stored = rows.loc[name, doc][f"metric/{metric},last-letter"]
                assert stored == pytest.approx(expected, abs=1e-4)
            expected = fmean(value["tokens_kept"] for value in values)
            assert rows.loc[name, doc]["metric/tokens_kept"] == pytest.approx(expected)
    # A text does not depend on the number of texts in its batch.
    file = study(layer=[0], **SAMPLING | {"samples": 2})
    assert not run_experiment(file, fewer).outcome.failed
    rows = read_outcomes(fewer).set_index(["ablation", "doc"])
    assert {doc: stored_texts(rows.loc["baseline", doc]) for doc in texts} == {
        doc: group[:2] for doc, group in texts.items()
    }


@pytest.mark.parametrize(
    "options", [{"workers": 1}, {"weights": 2**21}], ids=["worker", "offloaded"]
)
def test_workers_and_offloaded_weights_give_the_same(study, tmp_path, options) -> None:
    """Later changes read all stored texts of a document."""
    here, other = tmp_path / "here", tmp_path / "other"
    assert not run_experiment(study(layer=[0], **SAMPLING), here).outcome.failed
    shutil.copytree(here, other)
    file = study(layer=[2], intervention=["remove", "int4"], **SAMPLING)
    assert not run_experiment(file, here).outcome.failed
    assert not run_experiment(file, other, **options).outcome.failed
    pd.testing.assert_frame_equal(outcomes_of(here), outcomes_of(other), atol=1e-4)


def test_until_stops_early_and_takes_no_loss(study, tmp_path) -> None:
    results = run_experiment(
        study(metric="tokens_kept", until="top 1", layer=[0, 3]), tmp_path / "results"
    )
    assert not results.outcome.failed
    assert results.cells[0].answer is not None
    result = cli("run", study(metric="trace_loss", until="top 1"), "--results", tmp_path / "other")
    refused(result, "until", "trace_loss")


def test_texts_without_answers_are_refused_before_they_are_read(study, tmp_path, written) -> None:
    write_task(tmp_path / "tasks", QUESTIONS, ["e"] * 12, {"number": PATTERNS["number"]})
    with pytest.raises(
        BenchmarkError, match="the task finds no answer in the model's first 8 texts"
    ):
        run_experiment(study(), tmp_path / "results")
    assert len(written) == 8 + 2  # the check writes one text in two ways
    assert not list_shards(tmp_path / "results")
