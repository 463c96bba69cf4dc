"""Whole texts from the experiment file to the record, against naive loops and plain lm-eval."""

from __future__ import annotations

import math
import string
from pathlib import Path

import pytest
import torch

from tests.helpers.lm_eval import (
    AGGREGATIONS,
    CORPUS_PATHS,
    HFLM,
    TASKS,
    cut_layer,
    evaluate,
    folder_tasks,
    load_model_parts,
    predict_tokens,
    write_plain,
    write_rows,
)
from tests.helpers.runs import run_experiment
from tracker.schema.errors import BenchmarkError

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
    intact, tokenizer = load_model_parts(model)
    all_texts = list(TEXTS)
    for letter in string.ascii_letters:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(letter)]
        token = int(intact(torch.tensor([ids])).logits[0, -1].argmax())
        text = letter + tokenizer.decode([token])
        is_pair = [tokenizer.bos_token_id, *tokenizer.encode(text)] == [*ids, token]
        if is_pair and text.isprintable():
            all_texts.append(text)
    return all_texts


@pytest.fixture
def notes(tmp_path, texts) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("\n\n".join(texts))
    return path


def predict(folder: Path, layer: int | None, texts: list[str]) -> list[tuple[int, float, int]]:
    """Predict one token at a time: right tokens, nats and tokens of every text."""
    intact, tokenizer = load_model_parts(folder)
    model, prefix = cut_layer(intact, layer), tokenizer.bos_token_id
    token_lists = [tokenizer.encode(text) for text in texts]
    return [(*predict_tokens(model, ids, prefix, LENGTH), len(ids)) for ids in token_lists]


def test_a_corpus_gives_the_figures_of_single_tokens(model, notes, texts, experiment, tmp_path):
    file = experiment(model, benchmark=f"'corpus:{notes}'", data="hub")
    (cell,) = run_experiment(file, tmp_path / "results").cells
    intact_figures = predict(model, None, texts)
    hits, loss, tokens = (sum(column) for column in zip(*intact_figures, strict=True))
    assert (cell.metric, cell.n) == ("acc", len(texts))
    assert cell.benchmark.name == "corpus:notes.txt"
    assert hits
    assert cell.baseline.value == pytest.approx(hits / tokens, abs=1e-12)
    assert cell.chance_accuracy == 0
    assert cell.baseline_metrics == pytest.approx({"acc": hits / tokens, "loss": loss / tokens})
    # The last token of a full window is predicted, but not read.
    n_full = sum(math.ceil(count / LENGTH) for _, _, count in intact_figures if count >= LENGTH)
    assert cell.tokens == tokens - n_full
    for record in cell.runs:
        figures = predict(model, record.change.layer, texts)
        new_hits, new_loss, _ = (sum(column) for column in zip(*figures, strict=True))
        assert record.drop.value == pytest.approx((hits - new_hits) / tokens, abs=1e-12)
        assert record.accuracy_relevance == pytest.approx(1 - new_hits / hits)
        metrics = {"acc": new_hits / tokens, "loss": new_loss / tokens}
        assert record.metrics == pytest.approx(metrics)
        assert record.gold_drop.value == pytest.approx((new_loss - loss) / len(texts), rel=1e-3)


def test_a_loss_of_the_same_cell_costs_nothing_more(model, notes, experiment, tmp_path):
    settings = {"benchmark": f"'corpus:{notes}'", "data": "hub"}
    run_experiment(experiment(model, **settings), tmp_path / "results")
    file = experiment(model, "loss.yaml", metric="loss", **settings)
    results = run_experiment(file, tmp_path / "results")
    assert results.outcome.models_loaded == 0
    (cell,) = results.cells
    assert (cell.metric, cell.higher_is_better, cell.chance_accuracy) == ("loss", False, None)
    for record in cell.runs:
        increase = record.metrics["loss"] - cell.baseline_metrics["loss"]
        assert record.drop.value == pytest.approx(increase, abs=1e-9)
    wrong_file = experiment(model, "wrong.yaml", metric="lost", **settings)
    with pytest.raises(BenchmarkError, match="Did you mean 'loss'"):
        run_experiment(wrong_file, tmp_path / "results")
    # The refused request left no trace.
    assert run_experiment(file, tmp_path / "results").cells == results.cells


@pytest.mark.parametrize(("name", "bos"), [("wikitext", False), ("c4", True)])
def test_a_rolling_task_has_lm_evals_perplexities(tiny_llama, measure, tmp_path, name, bos):
    folder, column, split = CORPUS_PATHS[name]
    write_rows(tmp_path / "DATA" / folder, **{split: [{column: text} for text in TEXTS]})
    model = tiny_llama(max_position_embeddings=LENGTH, bos=bos)
    (cell,) = measure(model, benchmark=name, data=str(tmp_path / "DATA")).cells
    assert (cell.metric, cell.higher_is_better) == ("bits_per_byte", False)
    assert dict(cell.benchmark.tasks[0].metrics) == AGGREGATIONS

    tasks, config = tmp_path / "tasks", str(next((TASKS / name).glob("*.yaml")))
    files = {split: tmp_path / "DATA" / folder / f"{split}.jsonl"}
    write_plain(tasks, name, config, "json", files)
    records = {record.change.layer: record for record in cell.runs}
    intact, tokenizer = load_model_parts(model)
    for layer in (None, *LAYERS):
        lm = HFLM(cut_layer(intact, layer), tokenizer=tokenizer, batch_size=4)
        answer = evaluate(lm, tasks=[f"plain_{name}"], task_manager=folder_tasks(tasks))
        metrics = answer["results"][f"plain_{name}"]
        ours = cell.baseline_metrics if layer is None else records[layer].metrics
        assert set(ours) == set(AGGREGATIONS)
        for metric, value in ours.items():
            assert value == pytest.approx(metrics[f"{metric},none"], rel=1e-4), (layer, metric)
        accuracy = cell.baseline.value if layer is None else records[layer].accuracy
        assert accuracy == pytest.approx(metrics["bits_per_byte,none"], rel=1e-4)
        if layer is not None:
            drop = metrics["bits_per_byte,none"] - cell.baseline_metrics["bits_per_byte"]
            assert records[layer].drop.value == pytest.approx(drop, abs=1e-3)
            assert records[layer].accuracy_relevance is None
            assert records[layer].reasons["accuracy_relevance"] == "bits_per_byte is no accuracy"
            assert math.isfinite(records[layer].drop.low)
