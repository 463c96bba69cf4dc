"""Linear maps in a format, by the front door: lm-eval's numbers on the model that is so changed."""

from __future__ import annotations

import copy

import gguf
import torch

from tests.benchmarks.test_tasks import PACKAGE, plain_tasks_in
from tests.conftest import cli, printed, save_tokenizer
from tests.engine.families import tiny_model
from tests.runner.elsewhere import is_lm_evals, run, write_study
from tracker.ledger.store import Ledger
from tracker.models.load import load_model
from tracker.models.sources import find_model

NONE = ("--track", "none")
MAPS = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]
MAPS += [f"self_attn.{name}_proj" for name in "koqv"]


def changed(model, layer, path, kind):
    """Write a map's weight as a GGUF file has it, in a copy."""
    twin = copy.deepcopy(model)
    weight = twin.model.layers[layer].get_submodule(path).weight
    kept = gguf.quants.quantize(weight.detach().numpy(), kind)
    weight.data = torch.from_numpy(gguf.quants.dequantize(kept, kind))
    return twin


def test_a_mixture_has_no_linear_maps_and_is_a_wrong_request(tmp_path):
    """Was: exit code 1, as if some work had failed."""
    folder = tmp_path / "mixture"
    save_tokenizer(folder, False)
    tiny_model("mixtral").save_pretrained(folder)
    asked = (folder, "--benchmark=arc_easy", f"--data={PACKAGE}", "--sample=8")
    results = tmp_path / "results"
    told = ("--component=linear", "--intervention=int8")
    for words in (("plan", *told), ("run", *told), ("quantise", "--budget=5bpw")):
        wrong = cli(words[0], *asked, *words[1:], "--results", results)
        assert (wrong.exit_code, "is no linear map" in wrong.output) == (2, True), wrong.output
    assert not results.exists()


def test_maps_are_lm_evals(tiny_llama, tmp_path, one_thread):
    folder = tiny_llama(hidden_size=64, intermediate_size=96)
    results = tmp_path / "results"
    said = {"model": str(folder), "benchmark": "arc_easy", "data": PACKAGE, "limit": 4}
    said["dtype"] = "float32"
    file = write_study(
        tmp_path / "maps.yaml", **said, component="linear", layer=[0, 1],
        intervention=["q4_0", "q8_0", "q4_k"],
    )  # fmt: skip
    (cell,) = run(file, results).cells
    runs = {each.ablation: each for each in cell.runs}
    words = ("q4_0", "q4_k", "q8_0")
    assert {*runs} == {f"{w}:{layer}.{path}" for w in words for layer in (0, 1) for path in MAPS}
    (store,) = Ledger(results).cells()
    frame = store.read()
    loaded, tasks = load_model(find_model(str(folder)), "float32"), plain_tasks_in(tmp_path)
    kinds = gguf.GGMLQuantizationType
    for word, kind, layer, path in (
        ("q4_0", kinds.Q4_0, 0, "mlp.down_proj"),
        ("q8_0", kinds.Q8_0, 1, "self_attn.q_proj"),
        ("q4_k", kinds.Q5_0, 1, "self_attn.v_proj"),  # what llama.cpp takes for such short rows
    ):
        twin = changed(loaded.model, layer, path, kind)
        is_lm_evals(runs[f"{word}:{layer}.{path}"], frame, twin, loaded.tokenizer, tasks)
    assert "Of 14 linear maps in q4_0 " in printed("run", file, "--results", results, *NONE)
    trial = ("evaluate", *(f"--{key}={value}" for key, value in said.items()), "--layer=1")
    told = ("--component=linear", "--intervention=int4_g128", "--results", results)
    wrong = cli(*trial, *told, "--map=mlp.gate_proj")
    assert wrong.exit_code == 2
    assert "int4_g128 keeps 128 inputs together, and mlp.gate_proj of layer 0 has" in wrong.output
    wrong = cli(*trial, *told, "--map=mlp.gate")
    assert wrong.exit_code == 2
    assert "has no linear map" in wrong.output
