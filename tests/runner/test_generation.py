"""Generated texts from the experiment file to the record, against plain lm-eval."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import save_tokenizer
from tests.helpers.ablations import single_layers
from tests.helpers.families import FAMILIES
from tests.helpers.lm_eval import (
    HFLM,
    TASKS,
    cut_layer,
    evaluate,
    folder_tasks,
    load_model_parts,
    write_plain,
    write_rows,
)
from tests.helpers.runs import RecordingProgress, read_outcomes, run_experiment
from tracker.benchmarks import factory
from tracker.engine.scoring.model import FULL
from tracker.measuring.scorer import Generation
from tracker.models.pruned import prune_model as without
from tracker.schema.documents import Prompt
from tracker.schema.records import CellRecord

pytestmark = pytest.mark.usefixtures("one_thread")
TRAIN = [
    ("The pump moves 12 litres a minute. How many litres in 5?", "12 * 5 = 60.\n#### 60"),
    ("A hen lays 3 eggs a day. How many eggs in a week?", "3 * 7 = 21.\n#### 21"),
    ("Ann had 8 pens and gave away 3. How many has she?", "8 - 3 = 5.\n#### 5"),
]
TEST = [
    ("A box holds 4 balls. How many balls do 6 boxes hold?", "4 * 6 = 24.\n#### 24"),
    ("Ben is 9 and Carl is twice as old. How old is Carl?", "9 * 2 = 18.\n#### 18"),
    ("A box holds 4 balls. How many balls do 6 boxes hold?", "4 * 6 = 24.\n#### 24"),
    ("7?", "#### 7"),
]
STOPS = ["Question:", "\n\n", "!", "th", "7"]
Truth = Callable[..., dict[str, Any]]


@pytest.fixture
def data(tmp_path) -> Path:
    """Write a folder of data, with questions of the form that gsm8k has."""
    splits = {
        split: [{"question": q, "answer": a} for q, a in pairs]
        for split, pairs in (("train", TRAIN), ("test", TEST))
    }
    write_rows(tmp_path / "DATA/openai/gsm8k/main", **splits)
    return tmp_path / "DATA"


@pytest.fixture
def sums(tmp_path, data, monkeypatch) -> Callable[..., Truth]:
    """Add a task `sums` to lm-eval's own: gsm8k with shorter texts; gives plain lm-eval on it."""

    def make(until: list[str], tokens: int, settings: str = "") -> Truth:
        folder, gsm8k = tmp_path / "tasks", "gsm8k/gsm8k.yaml"
        extra = f"generation_kwargs:\n  until: {json.dumps(until)}\n  max_gen_toks: {tokens}\n"
        extra += settings
        folder_path = data / "openai/gsm8k/main"
        files = {split: folder_path / f"{split}.jsonl" for split in ("train", "test")}
        write_plain(folder, "sums", gsm8k, "json", files, extra)
        (folder / "sums.yaml").write_text(f"include: {TASKS / gsm8k}\ntask: sums\n{extra}")
        manager = folder_tasks(folder)
        monkeypatch.setattr(factory, "list_tasks", lambda: manager.task_index)

        def truth(model: Any, tokenizer: Any, **settings: Any) -> dict[str, Any]:
            lm = HFLM(model, tokenizer=tokenizer, batch_size=1)
            evaluation = evaluate(lm, tasks=["plain_sums"], task_manager=manager, **settings)
            samples = {s["doc_id"]: s["resps"][0][0] for s in evaluation["samples"]["plain_sums"]}
            results = evaluation["results"]["plain_sums"].items()
            return {
                "texts": [samples[i] for i in sorted(samples)],
                "metrics": {n: value for n, value in results if n.startswith("exact_match,")},
            }

        return truth

    return make


def zero_output(module: Any, args: Any, output: Any) -> Any:
    """Return a hook by which a sublayer adds nothing."""
    return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0


def prune_model(model: Any, ablation: str) -> Any:
    """Take what an ablation's name says really out of a copy of a Llama."""
    component, _, layer = ablation.partition(":")
    if component in ("baseline", "layer"):
        return cut_layer(model, int(layer) if layer else None)
    model = cut_layer(model, None)
    name = {"attention": "self_attn", "mlp": "mlp"}[component]
    getattr(model.model.layers[int(layer)], name).register_forward_hook(zero_output)
    return model


def read_texts(results: Path) -> dict[str, list[str]]:
    """Return the texts of the only cell in the ledger, by ablation, in document order."""
    return {
        str(name): rows["text"].to_list()
        for name, rows in read_outcomes(results).groupby("ablation")
    }


@pytest.fixture
def as_lm_eval(sums, data, measure, tmp_path) -> Callable[..., tuple[CellRecord, set[int]]]:
    """Generate by the front door: every text and metric is lm-eval's on the really pruned model.

    The cell, and how many tokens the texts have.
    """

    def check(
        folder: Path, task_options: tuple[Any, ...], prune: Any = prune_model, **settings: Any
    ) -> tuple[CellRecord, set[int]]:
        truth = sums(*task_options)
        (cell,) = measure(folder, benchmark="sums", data=data, **settings).cells
        model, tokenizer = load_model_parts(folder)
        options = {name: settings[name] for name in ("num_fewshot", "limit") if name in settings}
        metrics = {record.ablation: record.metrics for record in cell.runs}
        metrics["baseline"] = cell.baseline_metrics
        lengths = set()
        for ablation, texts in read_texts(tmp_path / "results").items():
            expected = truth(prune(model, ablation), tokenizer, **options)
            assert texts == expected["texts"], ablation
            figures = dict(metrics.get(ablation, expected["metrics"]))
            figures.pop("cut_off", None)
            assert figures == expected["metrics"], ablation
            lengths |= {len(tokenizer.encode(text)) for text in texts}
        return cell, lengths

    return check


@pytest.mark.parametrize(
    ("shots", "room", "components"),
    [
        pytest.param(2, 1024, ["layer", "attention", "mlp"], id="a-common-beginning"),
        pytest.param(2, 72, ["layer"], id="prompts-are-truncated"),
        pytest.param(0, 256, ["layer"], id="nothing-in-common"),
    ],
)
def test_every_text_and_metric_is_lm_evals(
    tiny_llama, as_lm_eval, tmp_path, shots, room, components
):
    folder, heard = tiny_llama(max_position_embeddings=room), RecordingProgress()
    options = {"num_fewshot": shots, "component": components, "layer": [0, 3]}
    cell, lengths = as_lm_eval(folder, (STOPS, 24), heard=heard, **options)
    assert not [line for line in heard.lines if "less sharing" in line]
    # A prompt and the task's own answer to it, for each document and ablation.
    assert heard.n_counted == heard.n_expected == 2 * len(TEST) * (1 + 2 * len(components))
    assert len(read_texts(tmp_path / "results")) == 1 + 2 * len(components)
    assert cell.metric == "exact_match,strict-match"
    assert (cell.chance_accuracy, cell.n) == (0, len(TEST))
    # Rows ended at different times: at a stop string, and at the last token.
    assert len(lengths) > 5
    assert max(lengths) >= 20


# Mamba keeps a state, not keys and values; Bloom builds its ALiBi for the whole batch.
@pytest.mark.parametrize("family", ["mamba", "bloom"])
def test_a_model_that_refuses_is_generated_apart(family, as_lm_eval, tmp_path):
    folder, heard = tmp_path / family, RecordingProgress()
    config = FAMILIES[family].config()
    config.vocab_size = save_tokenizer(folder, bos=False)
    config.initializer_range, config.num_hidden_layers = 0.3, 2
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)

    def prune(model: Any, ablation: str) -> Any:
        return without(model, [int(layer) for layer in ablation.split(":")[1:]])

    task_options = (["Question:", "!"], 12)
    as_lm_eval(folder, task_options, prune, heard=heard, num_fewshot=1, limit=2, layer=[0])
    lines = [
        line for line in heard.lines if "generated separately for each ablation, because" in line
    ]
    assert len(lines) == 1, heard.lines


def test_a_text_that_leaves_no_room_for_a_prompt_is_refused(
    tiny_llama, sums, data, tmp_path, experiment
):
    sums(STOPS, 64)
    model, options = tiny_llama(max_position_embeddings=64), {"benchmark": "sums", "layer": 0}
    file = experiment(model, data=data, num_fewshot=0, **options)
    (reason,) = run_experiment(file, tmp_path / "results").outcome.failed.values()
    assert "max_gen_toks is 64, but the model reads only 64 tokens" in reason


def test_texts_that_end_by_themselves(tiny_llama, as_lm_eval):
    """At the tokenizer's end of text, or at the end that only the model's settings name."""
    folder = tiny_llama()
    model, tokenizer = load_model_parts(folder)
    assert (tokenizer.eos_token_id, model.generation_config.eos_token_id) == (1, 2)
    model.lm_head.weight.data[1:3] *= 2
    model.save_pretrained(folder)
    _, lengths = as_lm_eval(folder, ([], 24), num_fewshot=0, layer=[1, 2])
    assert len(lengths) > 3
    assert min(lengths) < 8


@pytest.mark.parametrize(
    ("answer", "settings"),
    [("word " * 400, ""), ("", "target_delimiter: ''\n"), ("", "doc_to_target: '[]'\n")],
    ids=["longer-than-the-model", "empty", "none"],
)
def test_an_answer_that_cannot_be_scored_costs_no_text(
    tiny_llama, data, as_lm_eval, answer, settings
):
    write_rows(data / "openai/gsm8k/main", test=[{"question": "7?", "answer": answer}])
    as_lm_eval(tiny_llama(), (STOPS, 8, settings), num_fewshot=0, layer=[1, 2])


def test_the_reason_for_generating_alone_is_in_words(monkeypatch) -> None:
    """Was: what the model's own code raised."""
    head = torch.nn.Linear(2, 2)

    def texts(self, prompt, ablations):
        if self.together:
            head(torch.zeros(1, 3))
        return [""] * len(ablations)

    monkeypatch.setattr(Generation, "generate", texts)
    engine = SimpleNamespace(sharing=FULL, loaded=SimpleNamespace(model=head))
    prompt = Prompt("Question:", {"until": ["!"], "max_gen_toks": 4})
    generation, reason = Generation(engine, None).choose_mode(prompt, single_layers([0]))
    assert not generation.together
    assert reason == (
        "texts are generated separately for each ablation, because the layers refuse a batch of "
        "hidden states of several ablations"
    )
