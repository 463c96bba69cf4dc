"""Linear maps in a format, by the front door: lm-eval's numbers on the model that is so changed."""

from __future__ import annotations

import copy

import gguf
import pytest
import torch

from tests.benchmarks.conftest import PACKAGE
from tests.conftest import cli, printed, save_tokenizer
from tests.helpers.mixtures import save_mixture
from tests.helpers.package_tasks import plain_package_tasks
from tests.helpers.registry import make_registered
from tests.helpers.runs import EASY_SETTINGS, assert_lm_eval_figures, measure_easy
from tracker.models.load import load_model
from tracker.models.sources import find_model
from tracker.report.charts import maps
from tracker.report.frames import layer_frame
from tracker.report.tables import layer_table

NO_TRACKER = ("--track", "none")
MAPS = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]
MAPS += [f"self_attn.{name}_proj" for name in "koqv"]


def round_weight(weight, kind):
    """Return a weight as a GGUF file has it."""
    blocks = gguf.quants.quantize(weight.detach().numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(blocks, kind))


def round_module(model, path, kind):
    """Write a module's weight as a GGUF file has it, in a copy."""
    rounded = copy.deepcopy(model)
    module = rounded.get_submodule(path)
    module.weight.data = round_weight(module.weight, kind)
    return rounded


def test_a_model_of_other_matrices_has_no_linear_maps_and_is_a_wrong_request(tmp_path):
    """Was: exit code 1, as if some work had failed."""
    folder = tmp_path / "convolutions"
    save_tokenizer(folder, False)
    make_registered("lfm2").save_pretrained(folder)
    options = (folder, "--benchmark=arc_easy", f"--data={PACKAGE}", "--sample=8")
    results = tmp_path / "results"
    extra = ("--component=linear", "--intervention=int8")
    for words in (("plan", *extra), ("run", *extra), ("quantise", "--budget=5bpw")):
        result = cli(words[0], *options, *words[1:], "--results", results)
        assert result.exit_code == 2, result.output
        assert "is not a linear map" in result.output
    assert not results.exists()


def test_maps_are_validated_and_planned_as_they_are_measured(tiny_llama, tmp_path):
    """Was: `validate` refused a file without `map`, and passed formats that no row can have."""
    folder = tiny_llama(hidden_size=64, intermediate_size=96)
    options = (folder, "--benchmark=arc_easy", f"--data={PACKAGE}", "--sample=8")
    options = (*options, "--component=linear")
    layers = len(load_model(find_model(str(folder)), "float32").layers)
    assert f", {7 * layers} runs" in printed("validate", *options, "--intervention=int4")
    trial = ("evaluate", f"--model={folder}", *options[1:], "--layer=1", "--map=mlp.down_proj")
    for command in (("validate", *options), ("plan", *options), trial):
        result = cli(*command, "--intervention=int4_g128")
        message = "blocks of 128 weights, but each row of mlp.down_proj of layer 0 of Llama"
        assert (result.exit_code, message in result.output) == (2, True), result.output
    result = cli("validate", *options, "--intervention=int4", "--map=mlp.gate")
    assert (result.exit_code, "has no linear map mlp.gate" in result.output) == (2, True)


def test_experts_matrices_are_lm_evals(tmp_path, one_thread):
    """All of a layer's, one expert's, and with all else that the layer has."""
    save_mixture(folder := tmp_path / "mixture", "mixtral")
    maps = [f"mlp.experts.{name}" for name in ("down_proj", "gate_up_proj", "2.down_proj")]
    q4_0 = {"layer": 1, "intervention": ["q4_0"]}
    runs = measure_easy(folder, tmp_path, **q4_0, component="linear", map=maps)[2]
    assert {*runs} == {f"q4_0:1.{path}" for path in maps}
    _, cell, _, frame = measure_easy(folder, tmp_path, **q4_0)
    runs |= {record.ablation: record for record in cell.runs if record.change.map is None}
    loaded, tasks = load_model(find_model(str(folder)), "float32"), plain_package_tasks(tmp_path)
    kind = gguf.GGMLQuantizationType.Q4_0
    for ablation, result in runs.items():
        rounded = copy.deepcopy(loaded.model)
        layer, map_name = rounded.model.layers[1], ablation.removeprefix("q4_0:1").removeprefix(".")
        rows = [
            (f"self_attn.{n}_proj", layer.self_attn.get_submodule(f"{n}_proj").weight)
            for n in "qkvo"
        ]
        for name in ("gate_up_proj", "down_proj"):
            tensor = getattr(layer.mlp.experts, name)
            for number in range(len(tensor)):
                path = (
                    f"mlp.experts.{number}.{name}"
                    if number == 2 and map_name == maps[2]
                    else f"mlp.experts.{name}"
                )
                rows.append((path, tensor[number]))
        for path, weight in rows:
            if map_name in ("", path):
                weight.data.copy_(round_weight(weight, kind))
        assert_lm_eval_figures(result, frame, rounded, loaded.tokenizer, tasks)


def test_maps_are_lm_evals(tiny_llama, tmp_path, one_thread):
    folder = tiny_llama(layers=2, hidden_size=64, intermediate_size=96)
    kinds, formats = gguf.GGMLQuantizationType, ["q4_0", "q8_0", "q4_k"]
    options = {"component": "linear", "layer": [0, 1], "intervention": formats}
    file, _, runs, frame = measure_easy(folder, tmp_path, **options)
    assert {*runs} == {f"{w}:{layer}.{path}" for w in formats for layer in (0, 1) for path in MAPS}
    loaded, tasks = load_model(find_model(str(folder)), "float32"), plain_package_tasks(tmp_path)
    for word, kind, layer, path in (
        ("q4_0", kinds.Q4_0, 0, "mlp.down_proj"),
        ("q8_0", kinds.Q8_0, 1, "self_attn.q_proj"),
        ("q4_k", kinds.Q5_0, 1, "self_attn.v_proj"),  # what llama.cpp takes for such short rows
    ):
        rounded = round_module(loaded.model, f"model.layers.{layer}.{path}", kind)
        run = runs[f"{word}:{layer}.{path}"]
        assert_lm_eval_figures(run, frame, rounded, loaded.tokenizer, tasks)
    results = tmp_path / "results"
    assert "Of 14 linear maps in q4_0 " in printed("run", file, "--results", results, *NO_TRACKER)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_embedding_and_head_are_lm_evals(tied, tiny_llama, tmp_path, one_thread):
    folder = tiny_llama(hidden_size=64, layers=2, tie_word_embeddings=tied)
    results, report = tmp_path / "results", tmp_path / "page.html"
    names = ["embedding"] if tied else ["embedding", "lm_head"]
    words = ["q4_0", "q4_k"]
    options = {"component": "linear", "layer": [1], "map": [*names, "mlp.up_proj"]}
    file, cell, runs, frame = measure_easy(folder, tmp_path, **options, intervention=words)
    map_names = [*names, "1.mlp.up_proj"]
    assert {*runs} == {f"{word}:{name}" for word in words for name in map_names}
    loaded, tasks = load_model(find_model(str(folder)), "float32"), plain_package_tasks(tmp_path)
    kinds = gguf.GGMLQuantizationType
    for word, kind in (("q4_0", kinds.Q4_0), ("q4_k", kinds.Q5_0)):  # rows of 64
        for map_name in names:
            path = "lm_head" if map_name == "lm_head" else "model.embed_tokens"
            rounded = round_module(loaded.model, path, kind)
            assert (rounded.lm_head.weight is rounded.model.embed_tokens.weight) == tied
            run = runs[f"{word}:{map_name}"]
            assert_lm_eval_figures(run, frame, rounded, loaded.tokenizer, tasks)
    text = printed("run", file, "--results", results, *NO_TRACKER)
    assert f"Of {len(map_names)} linear maps in q4_0 " in text
    printed("report", results, "--output", report)
    frame = layer_frame([cell])
    assert {*frame[frame["layer"].isna()]["map"]} == {*names}
    # Their one run stands in the first column of the map, or in the last one, and is no layer's.
    figure = maps.kind_map(cell, maps.find_heat_map_rows(cell)["linear-q4_0"]).to_figure()
    boxes = {
        (row, column): box.partition("<br>")[0].partition(" · ")[0]
        for row, boxes in zip(figure.data[0].y, figure.data[0].hovertext, strict=True)
        for column, box in enumerate(boxes)
        if box
    }
    assert boxes == {(name, 0): f"<b>{name} q4_0</b>" for name in names} | {
        ("mlp.up_proj", 0): "<b>layer 1 mlp.up_proj q4_0</b>"
    }
    assert "layer 0 " not in text + " ".join(map(str, layer_table(cell).rows))
    settings = {"model": folder, **EASY_SETTINGS, "layer": 1}
    trial = ("evaluate", *(f"--{key}={value}" for key, value in settings.items()))
    extra = ("--component=linear", "--intervention=q4_0", "--results", results, *NO_TRACKER)
    # A grid has a trial for each layer; all are the one run, which is there.
    assert "embedding" in printed(*trial, *extra, "--map=embedding")
