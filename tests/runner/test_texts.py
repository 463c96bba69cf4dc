"""Whole texts from the experiment file to the record, against naive loops and plain lm-eval."""

from __future__ import annotations

import math
import string
from pathlib import Path

import pytest
import torch

from tests.helpers.lm_eval import (
    AGGREGATIONS,
    HFLM,
    PLACES,
    TASKS,
    cut,
    evaluate,
    parts,
    tasks_in,
    token_by_token,
    write_plain,
    write_rows,
)
from tests.helpers.runs import run
from tracker.core.errors import BenchmarkError

LENGTH = 48
"""Tokens that the model reads."""
LAYERS = (0, 1, 2, 3)
TEXTS = [
    "The heart pumps the blood through the body. " * 4,
    "Paris",
    "The capital of France is Paris. " * 4,
    "It is a muscle.",
    # What a task cleans up.
    "= Paris = the heart 's ( @-@ ) pumps , not a .",
    # Its last window predicts one token, which the model has no room to read.
    "x" * (LENGTH + 1),
]


@pytest.fixture
def model(tiny_llama) -> Path:
    return tiny_llama(max_position_embeddings=LENGTH)


@pytest.fixture
def texts(model) -> list[str]:
    """Return the texts, and short ones whose second token is the model's most likely one."""
    intact, tokenizer = parts(model)
    found = list(TEXTS)
    for first in string.ascii_letters:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(first)]
        best = int(intact(torch.tensor([ids])).logits[0, -1].argmax())
        text = first + tokenizer.decode([best])
        if [tokenizer.bos_token_id, *tokenizer.encode(text)] == [*ids, best] and text.isprintable():
            found.append(text)
    return found


@pytest.fixture
def notes(tmp_path, texts) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("\n\n".join(texts))
    return path


def naive(folder: Path, layer: int | None, texts: list[str]) -> list[tuple[int, float, int]]:
    """Predict one token at a time: right tokens, nats and tokens of every text."""
    intact, tokenizer = parts(folder)
    model, prefix = cut(intact, layer), tokenizer.bos_token_id
    every = [tokenizer.encode(text) for text in texts]
    return [(*token_by_token(model, ids, prefix, LENGTH), len(ids)) for ids in every]


def test_a_corpus_gives_the_figures_of_single_tokens(model, notes, texts, experiment, tmp_path):
    file = experiment(model, benchmark=f"'corpus:{notes}'", data="hub")
    (cell,) = run(file, tmp_path / "results").cells
    before = naive(model, None, texts)
    hits, loss, tokens = (sum(column) for column in zip(*before, strict=True))
    assert (cell.metric, cell.n) == ("acc", len(texts))
    assert cell.benchmark.name == "corpus:notes.txt"
    assert hits
    assert cell.baseline.value == pytest.approx(hits / tokens, abs=1e-12)
    assert cell.chance_accuracy == 0
    assert cell.baseline_metrics == pytest.approx({"acc": hits / tokens, "loss": loss / tokens})
    # The last token of a full window is predicted, but not read.
    full = sum(math.ceil(count / LENGTH) for _, _, count in before if count >= LENGTH)
    assert cell.tokens == tokens - full
    for record in cell.runs:
        after = naive(model, record.change.layer, texts)
        fewer, more, _ = (sum(column) for column in zip(*after, strict=True))
        assert record.drop.value == pytest.approx((hits - fewer) / tokens, abs=1e-12)
        assert record.accuracy_relevance == pytest.approx(1 - fewer / hits)
        assert record.metrics == pytest.approx({"acc": fewer / tokens, "loss": more / tokens})
        assert record.gold_drop.value == pytest.approx((more - loss) / len(texts), rel=1e-3)


def test_a_loss_of_the_same_cell_costs_nothing_more(model, notes, experiment, tmp_path):
    settings = {"benchmark": f"'corpus:{notes}'", "data": "hub"}
    run(experiment(model, **settings), tmp_path / "results")
    again = experiment(model, "loss.yaml", metric="loss", **settings)
    results = run(again, tmp_path / "results")
    assert results.outcome.models_loaded == 0
    (cell,) = results.cells
    assert (cell.metric, cell.higher_is_better, cell.chance_accuracy) == ("loss", False, None)
    for record in cell.runs:
        increase = record.metrics["loss"] - cell.baseline_metrics["loss"]
        assert record.drop.value == pytest.approx(increase, abs=1e-9)
    wrong = experiment(model, "wrong.yaml", metric="lost", **settings)
    with pytest.raises(BenchmarkError, match="Did you mean 'loss'"):
        run(wrong, tmp_path / "results")
    # The refused request left no trace.
    assert run(again, tmp_path / "results").cells == results.cells


@pytest.mark.parametrize(("name", "bos"), [("wikitext", False), ("c4", True)])
def test_a_rolling_task_has_lm_evals_perplexities(tiny_llama, measure, tmp_path, name, bos):
    place, column, split = PLACES[name]
    write_rows(tmp_path / "DATA" / place, **{split: [{column: text} for text in TEXTS]})
    model = tiny_llama(max_position_embeddings=LENGTH, bos=bos)
    (cell,) = measure(model, benchmark=name, data=str(tmp_path / "DATA")).cells
    assert (cell.metric, cell.higher_is_better) == ("bits_per_byte", False)
    assert dict(cell.benchmark.tasks[0].metrics) == AGGREGATIONS

    tasks, config = tmp_path / "tasks", str(next((TASKS / name).glob("*.yaml")))
    files = {split: tmp_path / "DATA" / place / f"{split}.jsonl"}
    write_plain(tasks, name, config, "json", files)
    records = {record.change.layer: record for record in cell.runs}
    intact, tokenizer = parts(model)
    for layer in (None, *LAYERS):
        plain = HFLM(cut(intact, layer), tokenizer=tokenizer, batch_size=4)
        answer = evaluate(plain, tasks=[f"plain_{name}"], task_manager=tasks_in(tasks))
        found = answer["results"][f"plain_{name}"]
        ours = cell.baseline_metrics if layer is None else records[layer].metrics
        assert set(ours) == set(AGGREGATIONS)
        for metric, value in ours.items():
            assert value == pytest.approx(found[f"{metric},none"], rel=1e-4), (layer, metric)
        level = cell.baseline.value if layer is None else records[layer].accuracy
        assert level == pytest.approx(found["bits_per_byte,none"], rel=1e-4)
        if layer is not None:
            drop = found["bits_per_byte,none"] - cell.baseline_metrics["bits_per_byte"]
            assert records[layer].drop.value == pytest.approx(drop, abs=1e-3)
            assert records[layer].accuracy_relevance is None
            assert records[layer].reasons["accuracy_relevance"] == "bits_per_byte is no accuracy"
            assert math.isfinite(records[layer].drop.low)
