"""Sampled texts and their beginnings, against plain transformers on a really changed model."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from scipy.stats import chisquare
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

import tracker
from tests.conftest import cli, printed, refused
from tests.helpers.ablations import parse_ablations
from tests.helpers.lm_eval import HFLM, cut_layer, load_model_parts, write_rows
from tests.helpers.runs import read_outcomes
from tracker.analysis.decisions import decisions_record, derive_decisions
from tracker.benchmarks.encoder import RequestEncoder
from tracker.benchmarks.generation import CoupledNoise, TextGenerator, gumbel_noise
from tracker.benchmarks.tasks import LmEvalBenchmark
from tracker.engine.scoring.sweep import Engine
from tracker.ledger.cache import Drafts
from tracker.ledger.store import Ledger
from tracker.measuring.scorer import Generation
from tracker.models.load import load_model
from tracker.models.sources import find_model
from tracker.schema.config import ModelSpec, cell_request
from tracker.schema.documents import GeneratedText, Prompt, Response
from tracker.schema.extent import ALL_DOCUMENTS
from tracker.schema.provenance import content_hash

pytestmark = pytest.mark.usefixtures("one_thread")
TEMPERATURE, TOP_P, TOKENS, SAMPLES = 0.8, 0.9, 12, 3
SETTINGS = {"temperature": TEMPERATURE, "top_p": TOP_P}


QUESTIONS = [("What is 3 and 4?", "7"), ("What is 2 and 6?", "8")]
TASK = """\
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
metric_list:
  - metric: exact_match
filter_list:
  - name: number
    filter: [{function: regex, regex_pattern: '(\\d+)'}, {function: take_first}]
"""


@pytest.fixture
def task(tmp_path) -> Path:
    """Write a generation task of two questions."""
    rows = [{"q": question, "a": answer} for question, answer in QUESTIONS]
    data = write_rows(tmp_path / "rows", rows=rows) / "rows.jsonl"
    file = tmp_path / "sums.yaml"
    file.write_text(TASK.replace("DATA", str(data)))
    return file


class NaiveSampling(LogitsProcessor):
    """Nucleus sampling of one text, written as in its paper, with given random numbers."""

    def __init__(self, key: str, sample: int, n_prompt: int) -> None:
        self.key, self.sample, self.n_prompt = key, sample, n_prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        position = input_ids.shape[1] - self.n_prompt
        logits = scores[0].double().numpy() / TEMPERATURE
        # transformers samples from the 50 likeliest tokens unless it is told otherwise.
        order = np.argsort(-logits)[:50]
        probabilities = np.exp(logits[order] - logits.max())
        probabilities /= probabilities.sum()
        chosen = order[np.cumsum(probabilities) - probabilities < TOP_P]
        noisy = np.full(len(logits), -math.inf)
        noise = gumbel_noise(self.key, self.sample, position, len(logits))
        noisy[chosen] = logits[chosen] + noise[chosen]
        return torch.from_numpy(noisy)[None]


def sample_text(
    model: Any, tokenizer: Any, prompt: str, sample: int, seed: int
) -> tuple[str, bool]:
    """Generate one text with plain transformers, and return whether it was cut off."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    noise = NaiveSampling(content_hash([seed, ids[0].tolist()]), sample, ids.shape[1])
    output = model.generate(
        ids,
        max_new_tokens=TOKENS,
        do_sample=False,
        logits_processor=LogitsProcessorList([noise]),
        pad_token_id=0,
    )
    tokens = [*output[0, ids.shape[1] :].tolist(), tokenizer.eos_token_id]
    tokens = tokens[: tokens.index(tokenizer.eos_token_id)]  # lm-eval ends a text there too
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    is_ended = "." in text or len(tokens) < TOKENS or 2 in tokens
    return text.split(".")[0], not is_ended


def test_sampled_texts_are_those_of_plain_transformers(
    tiny_llama, task, tmp_path, measure, monkeypatch
) -> None:
    monkeypatch.setenv("TRACKER_CACHE", str(tmp_path / "cache"))
    folder = tiny_llama()
    settings = {"benchmark": str(task), "data": None, "seed": 5, "limit": None}
    settings |= {"gen_kwargs": {**SETTINGS, "max_gen_toks": TOKENS}, "samples": SAMPLES}
    (cell,) = measure(folder, layer=[0, 3], component=["layer"], **settings).cells
    assert {"samples", "noise"} < cell.benchmark.settings.keys()
    assert cell.benchmark.seed == 5
    model, tokenizer = load_model_parts(folder)
    rows = read_outcomes(tmp_path / "results")
    layers = {"baseline": None, "layer:0": 0, "layer:3": 3}
    texts, cut = set(), {}
    for (name, layer), (doc, (prompt, _)) in product(layers.items(), enumerate(QUESTIONS)):
        (row,) = rows[(rows["ablation"] == name) & (rows["doc"] == doc)].itertuples()
        changed = cut_layer(model, layer)
        pairs = [sample_text(changed, tokenizer, prompt, n, 5) for n in range(SAMPLES)]
        expected, cut[name, doc] = zip(*pairs, strict=True)
        assert (row.text, *row.texts) == expected, (name, doc)
        assert tuple(row.text_cut) == cut[name, doc]
        texts |= {*expected}
    assert len(texts) > 12
    (store,) = Ledger(tmp_path / "results").cells()
    (requested,) = store.views.read_requested()
    record = decisions_record(derive_decisions(store, requested.view))
    shares = {name: fmean(cut[name, 0] + cut[name, 1]) for name in layers}
    assert record.cut == pytest.approx(shares["baseline"], abs=1e-3)
    for run in record.runs:
        assert run.cut == pytest.approx(shares[f"layer:{run.run.layer}"], abs=1e-3)
    assert len({*shares.values()}) > 1
    assert not [*(tmp_path / "cache/drafts").iterdir()]  # they were there, and are not needed
    log = tracker.log_samples(tmp_path / "log", results=tmp_path / "results")
    assert not log.failed
    (file,) = (tmp_path / "log").glob("*removed_layers=3/samples_*.jsonl")
    logged = [json.loads(line)["resps"][0] for line in file.read_text().splitlines()]
    stored = rows[rows["ablation"] == "layer:3"].sort_values("doc")
    assert logged == [[row.text, *row.texts] for row in stored.itertuples()]


@pytest.fixture
def generation(tiny_llama) -> Generation:
    spec = ModelSpec(model=str(tiny_llama()))
    loaded = load_model(find_model(spec), device="cpu")
    return Generation(Engine(loaded, 256), loaded.tokenizer)


ABLATIONS = parse_ablations("baseline layer:1 mlp:2 attention:0")
PROMPT = Prompt("Which colour has a pump?", {**SETTINGS, "until": ["th"], "max_gen_toks": TOKENS})


def test_a_sample_does_not_depend_on_the_other_texts(generation) -> None:
    """Neither on the size of a batch, nor on the order, nor on the process."""
    prompt = Prompt(PROMPT.text, PROMPT.settings, samples=4, seed=1)
    texts = generation.generate(prompt, ABLATIONS)
    assert len({text for group in texts for text in group}) > 8
    small = Generation(Engine(generation.engine.loaded, 256, memory=80_000), generation.tokenizer)
    assert small.generate(prompt, ABLATIONS[::-1]) == texts[::-1]
    assert [generation.generate_separately(prompt, a) for a in ABLATIONS] == texts
    fewer = generation.generate(Prompt(PROMPT.text, PROMPT.settings, samples=2, seed=1), ABLATIONS)
    assert fewer == [group[:2] for group in texts]
    other_seed = Prompt(PROMPT.text, PROMPT.settings, samples=4, seed=2)
    assert generation.generate(other_seed, ABLATIONS) != texts


def test_a_killed_run_continues_in_the_middle_of_a_document(generation, monkeypatch) -> None:
    prompt = Prompt(PROMPT.text, PROMPT.settings, samples=4, seed=1, budgets=(2,))
    expected, counts, fatal = generation.generate(prompt, ABLATIONS), list[int](), [0]
    generate_texts = TextGenerator.generate_texts

    def generate(self: Any, prompt: Prompt, samples: Any, decoding: Any = None) -> Any:
        if len(counts) + 1 == fatal[0]:
            raise KeyboardInterrupt
        counts.append(len(samples))
        return generate_texts(self, prompt, samples, decoding)

    monkeypatch.setattr(TextGenerator, "generate_texts", generate)
    engine = Engine(generation.engine.loaded, 256, memory=80_000)
    small = replace(generation, engine=engine)
    small.generate(prompt, ABLATIONS)
    all_counts, counts[:], fatal[0] = [*counts], [], 3
    assert len(all_counts) > 3
    with pytest.raises(KeyboardInterrupt):
        replace(small, drafts=Drafts()).generate(prompt, ABLATIONS)
    assert counts == all_counts[:2]
    fatal[0], drafts = 0, Drafts()
    assert replace(small, drafts=drafts).generate(prompt, ABLATIONS) == expected
    assert counts == all_counts
    other = replace(prompt, seed=2)
    assert replace(small, drafts=drafts).generate(other, ABLATIONS) != expected
    counts.clear()
    drafts.clear()
    assert replace(small, drafts=Drafts()).generate(prompt, ABLATIONS) == expected
    assert counts == all_counts


def test_texts_at_a_budget_are_those_of_a_shorter_generation(generation) -> None:
    """Generated by plain lm-eval with fewer tokens, on the really changed model."""
    settings = {"until": ["th", "e"], "max_gen_toks": 24}
    tokenizer, n_cut = generation.tokenizer, 0
    for question in ("Which colour has a pump?", "A", "7 and 3"):
        prompt = Prompt(question, settings, budgets=(3, 9))
        for ablation, (text,) in zip(
            ABLATIONS, generation.generate(prompt, ABLATIONS), strict=True
        ):
            lm = HFLM(generation.engine.ablate(ablation).loaded.model, tokenizer=tokenizer)
            expected = [
                lm.generate_until([Instance("generate_until", {}, (question, arguments), 0)], True)
                for arguments in ({**settings, "max_gen_toks": n} for n in (3, 9, 24))
            ]
            assert [[*text.early][0:1], [*text.early][1:2], [text.text]] == expected
            assert text.tokens <= 24
            assert not text.is_cut or text.tokens == 24
            n_cut += text.is_cut
    assert 0 < n_cut < 12


def test_samples_have_the_distribution_of_the_model() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0]])
    n, top_p = 4_000, 0.9
    warped = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(1.5)(None, scores))
    noise = CoupledNoise("key", range(n), 0)
    tokens = noise(torch.zeros(n, 1), warped.repeat(n, 1)).argmax(dim=1).numpy()
    probabilities = np.exp(np.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0]) / 1.5)
    probabilities /= probabilities.sum()
    is_likely = np.cumsum(probabilities) - probabilities < top_p
    expected = np.where(is_likely, probabilities, 0) / probabilities[is_likely].sum()
    counts = np.bincount(tokens, minlength=6)
    assert counts[~is_likely].sum() == 0 < (~is_likely).sum()
    assert chisquare(counts[is_likely], n * expected[is_likely]).pvalue > 0.01


def test_coupling_lowers_the_variance_of_a_drop() -> None:
    """In 400 documents of four samples; an answer is one token, right if it is the first."""
    draw = np.random.default_rng(0)
    intact = draw.normal(size=(400, 20))
    changed = intact + 0.3 * draw.normal(size=intact.shape)

    def score(logits: np.ndarray, offset: int) -> np.ndarray:
        noise = [
            [gumbel_noise(str(doc), offset + sample, 0, 20) for sample in range(4)]
            for doc in range(len(logits))
        ]
        return ((logits[:, None] + np.array(noise)).argmax(axis=2) == 0).mean(axis=1)

    coupled = score(intact, 0) - score(changed, 0)
    independent = score(intact, 0) - score(changed, 4)
    assert coupled.var() < 0.5 * independent.var()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 4}, "would be equal, because decoding is greedy"),
        ({"samples": 4, "gen_kwargs": {"do_sample": True}}, "without a temperature"),
        ({"samples": 0, "gen_kwargs": SETTINGS}, "samples"),
        ({"samples": 4, "gen_kwargs": {"num_beams": 2}}, "beam search"),
        ({"benchmark": "piqa", "samples": 4}, "scores given answers"),
        ({"budgets": "few"}, "expected numbers of tokens, e.g. 64,128"),
        ({"budgets": 4}, "budgets: 4 tokens; expected less than"),
    ],
)
def test_what_cannot_be_sampled_is_refused(
    tiny_llama, task, tmp_path, experiment, settings, message
) -> None:
    file = experiment(tiny_llama(), **{"benchmark": str(task), "limit": 2, **settings})
    refused(cli("run", file, "--results", tmp_path / "results", "--track", "none"), message)


def open_task(task: Path, **settings: Any) -> LmEvalBenchmark:
    return LmEvalBenchmark(cell_request(model="m", benchmark=str(task), layers=(0,), **settings))


def test_a_temperature_alone_samples_one_text(task) -> None:
    """As in lm-eval, unless the task itself is greedy; a number of samples asks for sampling."""
    assert "samples" not in open_task(task, gen_kwargs="temperature=1").identity.settings
    sampled = open_task(task, gen_kwargs="temperature=1", samples=1).identity
    task.write_text(task.read_text().replace(", do_sample: false", ""))
    identity = open_task(task, gen_kwargs="temperature=1").identity
    assert identity.settings == sampled.settings
    assert identity.settings["samples"] == "1"
    assert [*identity.tasks[0].metrics] == ["exact_match,number", "cut_off"]


def test_metrics_of_samples_are_those_of_their_definition(task, tiny_llama) -> None:
    texts = ["it is 7", "8", "so 7", "none", "9", "8, I think"]
    settings = {"gen_kwargs": "temperature=1,max_gen_toks=9", "samples": len(texts), "budgets": 3}
    benchmark = open_task(task, **settings)
    encoder = RequestEncoder(*load_model_parts(tiny_llama()))
    document, _ = benchmark.documents(encoder, ALL_DOCUMENTS)
    generated = [
        GeneratedText(text, 9, is_cut, (text[:4],))
        for text, is_cut in zip(texts, [True, False] * 3, strict=True)
    ]
    values = benchmark.outcomes(document, [Response(-1.0, False, 0, tuple(generated))])
    right = [1, 0, 1, 0, 0, 0]
    names = {"exact_match,number": fmean(right)}
    for draws in (2, 4, 6):  # brute force over all subsets
        best = [max(subset) for subset in combinations(right, draws)]
        names[f"exact_match_pass@{draws},number"] = fmean(best)
    answers = Counter(["7", "8", "7", "[invalid]", "9", "8"]).most_common()
    assert answers[0][1] == answers[1][1] == 2
    names["exact_match_majority@6,number"] = 0.5  # of the tied answers 7 and 8, one is right
    names["exact_match@3tok,number"] = 1 / 6  # "it i" and "so 7" and "8, I"
    assert values == pytest.approx({**names, "cut_off": 0.5})
    assert values.keys() == benchmark.identity.tasks[0].metrics.keys()
    assert benchmark.identity.tasks[0].higher_is_better["cut_off"] is False


def test_bench_compares_generation_with_lm_eval(tiny_llama, task) -> None:
    """All texts together against plain lm-eval, which generates the same texts."""
    options = ("--benchmark", task, "--no-check", "--json")
    bench = json.loads(cli("bench", tiny_llama(), *options).stdout)
    loop = bench["loops"]["lm-eval"]
    assert (bench["documents"], bench["ablations"], loop["compared"]) == (2, 5, 10)
    assert loop["disagreements"] == 0
    assert bench["layer_passes"] is loop["largest_difference"] is None
    assert 0 < bench["tokens"] <= 2 * 5 * 4
    sampled = printed(
        "bench", tiny_llama("b"), *options[:3], "--gen_kwargs", "temperature=1", "--samples", 2
    )
    assert "2 texts per document, 2 documents, 5 ablations" in sampled
    assert "not compared" in sampled
