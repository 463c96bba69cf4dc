"""Whole texts from the experiment file to the record, against naive loops and plain lm-eval."""

from __future__ import annotations

import copy
import json
import math
import string
from pathlib import Path

import lm_eval
import lm_eval.tasks
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import tracker
from tests.plain import evaluate
from tracker.core.errors import BenchmarkError

LENGTH = 48
"""Tokens that the model reads."""
LAYERS = (0, 1, 2, 3)
TEXTS = [
    "The heart pumps the blood through the body. " * 9,
    "Paris",
    "The capital of France is Paris. " * 4,
    "It is a muscle.",
    # Its last window predicts one token, which the model has no room to read.
    "x" * (LENGTH + 1),
]
TASK = """\
include: {include}
task: plain
dataset_path: json
dataset_name: null
training_split: null
validation_split: null
dataset_kwargs:
  data_files:
    test: {file}
"""


@pytest.fixture
def model(tiny_llama) -> Path:
    return tiny_llama(max_position_embeddings=LENGTH)


@pytest.fixture
def texts(model) -> list[str]:
    """The texts, and short ones whose second token is the one that the model finds most likely."""
    intact, tokenizer = pruned(model, None)
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


def pruned(folder: Path, layer: int | None):
    """Load the model and take a layer really out of it."""
    model = copy.deepcopy(AutoModelForCausalLM.from_pretrained(folder))
    if layer is not None:
        del model.model.layers[layer]
        for index, module in enumerate(model.model.layers):
            module.self_attn.layer_idx = index
        model.config.num_hidden_layers -= 1
    return model, AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def naive(folder: Path, layer: int | None, texts: list[str]) -> list[tuple[int, float, int]]:
    """Predict one token at a time: right tokens, nats and tokens of every text."""
    model, tokenizer = pruned(folder, layer)
    found = []
    for text in texts:
        ids = tokenizer.encode(text)
        hits, loss = 0, 0.0
        for place, token in enumerate(ids):
            end = min((place // LENGTH + 1) * LENGTH, len(ids))
            context = [tokenizer.bos_token_id, *ids][max(0, end - LENGTH) : place + 1]
            logprobs = model(torch.tensor([context])).logits[0, -1].log_softmax(-1)
            hits += int(logprobs.argmax()) == token
            loss -= float(logprobs[token])
        found.append((hits, loss, len(ids)))
    return found


def test_a_corpus_gives_the_figures_of_single_tokens(
    model, notes, texts, experiment, tmp_path
) -> None:
    file = experiment(model, benchmark=f"'corpus:{notes}'", data="hub")
    results = tracker.run(file, results=tmp_path / "results", track=[])
    (cell,) = results.cells
    before = naive(model, None, texts)
    hits, loss, tokens = (sum(column) for column in zip(*before, strict=True))
    assert (cell.metric, cell.n, cell.benchmark.name) == (
        "acc",
        len(texts),
        "corpus:notes.txt",
    )
    assert hits
    assert cell.baseline_accuracy == pytest.approx(hits / tokens, abs=1e-12)
    assert cell.chance_accuracy == 0
    assert cell.baseline_metrics == pytest.approx({"acc": hits / tokens, "loss": loss / tokens})
    # The last token of a full window is predicted, but not read.
    full = sum(math.ceil(count / LENGTH) for _, _, count in before if count >= LENGTH)
    assert cell.tokens == tokens - full
    for record in cell.runs:
        after = naive(model, record.layer, texts)
        fewer, more, _ = (sum(column) for column in zip(*after, strict=True))
        assert record.accuracy_drop == pytest.approx((hits - fewer) / tokens, abs=1e-12)
        assert record.accuracy_relevance == pytest.approx(1 - fewer / hits)
        assert record.metrics == pytest.approx({"acc": fewer / tokens, "loss": more / tokens})
        assert record.gold_logprob_drop == pytest.approx((more - loss) / len(texts), rel=1e-3)


def test_a_loss_of_the_same_cell_costs_nothing_more(model, notes, experiment, tmp_path) -> None:
    settings = {"benchmark": f"'corpus:{notes}'", "data": "hub"}
    tracker.run(experiment(model, **settings), results=tmp_path / "results", track=[])
    again = experiment(model, "loss.yaml", metric="loss", **settings)
    results = tracker.run(again, results=tmp_path / "results", track=[])
    assert results.outcome.models_loaded == 0
    (cell,) = results.cells
    assert (cell.metric, cell.higher_is_better, cell.chance_accuracy) == ("loss", False, None)
    for record in cell.runs:
        increase = record.metrics["loss"] - cell.baseline_metrics["loss"]
        assert record.accuracy_drop == pytest.approx(increase, abs=1e-9)
    wrong = experiment(model, "wrong.yaml", metric="lost", **settings)
    with pytest.raises(BenchmarkError, match="Did you mean 'loss'"):
        tracker.run(wrong, results=tmp_path / "results", track=[])
    # The refused request left no trace.
    assert tracker.run(again, results=tmp_path / "results", track=[]).cells == results.cells


def test_a_changed_corpus_is_measured_again(model, notes, texts, experiment, tmp_path) -> None:
    file = experiment(model, benchmark=f"'corpus:{notes}'", data="hub")
    first = tracker.run(file, results=tmp_path / "results", track=[]).cells
    notes.write_text("Another text.")
    second = tracker.run(file, results=tmp_path / "results", track=[]).cells
    assert [cell.n for cell in (*first, *second)] == [len(texts), 1]
    assert first[0].key != second[0].key


def test_a_rolling_task_has_lm_evals_perplexities(model, experiment, tmp_path) -> None:
    place = tmp_path / "DATA/EleutherAI/wikitext_document_level/wikitext-2-raw-v1"
    place.mkdir(parents=True)
    rows = "".join(json.dumps({"page": text}) + "\n" for text in TEXTS)
    (place / "test.jsonl").write_text(rows)
    file = experiment(model, benchmark="wikitext", data=str(tmp_path / "DATA"))
    results = tracker.run(file, results=tmp_path / "results", track=[])
    (cell,) = results.cells
    assert (cell.metric, cell.higher_is_better) == ("bits_per_byte", False)

    tasks = tmp_path / "tasks"
    tasks.mkdir()
    own = Path(lm_eval.tasks.__file__).parent / "wikitext/wikitext.yaml"
    (tasks / "plain.yaml").write_text(TASK.format(include=own, file=place / "test.jsonl"))
    manager = lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False)
    records = {record.layer: record for record in cell.runs}
    for layer in (None, *LAYERS):
        plain, tokenizer = pruned(model, layer)
        found = evaluate(
            HFLM(plain, tokenizer=tokenizer, batch_size=4),
            tasks=["plain"],
            task_manager=manager,
        )["results"]["plain"]
        ours = cell.baseline_metrics if layer is None else records[layer].metrics
        assert set(ours) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
        for metric, value in ours.items():
            assert value == pytest.approx(found[f"{metric},none"], rel=1e-4), (layer, metric)
        level = cell.baseline_accuracy if layer is None else records[layer].accuracy
        assert level == pytest.approx(found["bits_per_byte,none"], rel=1e-4)
        if layer is not None:
            drop = found["bits_per_byte,none"] - cell.baseline_metrics["bits_per_byte"]
            assert records[layer].accuracy_drop == pytest.approx(drop, abs=1e-3)
            assert records[layer].accuracy_relevance is None
            assert records[layer].reasons["accuracy_relevance"] == "bits_per_byte is no accuracy"
            assert math.isfinite(records[layer].accuracy_drop_low)
