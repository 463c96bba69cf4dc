"""A file that takes experts out, by the front door: lm-eval's numbers on the model without them."""

from __future__ import annotations

import copy

import pytest

from tests.benchmarks.conftest import PACKAGE
from tests.conftest import cli, printed, save_tokenizer
from tests.helpers.families import MIXED_LAYERS, tiny_model
from tests.helpers.mixtures import expert_ablation, without_experts
from tests.helpers.package_tasks import plain_package_tasks
from tests.helpers.runs import assert_lm_eval_figures, measure_easy
from tracker.models.load import load_model
from tracker.models.sources import find_model

NEVER = "expert:1.1"
"""Its router's bias lets no token go there."""


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "mixture"
    vocabulary = save_tokenizer(folder, False)
    model = tiny_model("gpt_oss", num_hidden_layers=2, layer_types=MIXED_LAYERS[:2])
    model.resize_token_embeddings(vocabulary)
    model.model.layers[1].mlp.router.bias.data[1] = -1e4
    model.save_pretrained(folder)
    return folder


def test_experts_are_lm_evals(folder, tmp_path, one_thread):
    results = tmp_path / "results"
    _, cell, runs, frame = measure_easy(folder, tmp_path, component="expert", layer=1)
    assert list(runs) == [f"expert:1.{number}" for number in range(4)]
    loaded, tasks = load_model(find_model(str(folder)), "float32"), plain_package_tasks(tmp_path)
    for number in (0, 1, 3):
        pruned = without_experts(loaded.model, "gpt_oss", expert_ablation(1, number))
        assert_lm_eval_figures(runs[f"expert:1.{number}"], frame, pruned, loaded.tokenizer, tasks)
    undefined_names = [name for name, result in runs.items() if result.drop.value is None]
    assert undefined_names == [NEVER]
    assert "no token that affects an answer is routed" in runs[NEVER].drop.reason
    assert sum(result.routed_share for result in cell.runs) == pytest.approx(2)
    unused_names = [name for name, result in runs.items() if result.expert_saliency is None]
    assert (unused_names, runs[NEVER].routed_share) == ([NEVER], 0)
    assert "no token of these documents" in runs[NEVER].reasons["expert_saliency"]
    proxies = {result.proxy for result in cell.correlations}
    assert proxies == {"taylor", "expert_saliency", "routed_share"}
    assert [result.taylor for result in cell.runs if not result.taylor] == [0.0]
    assert printed("report", results, "--format", "csv", "--output", tmp_path / "figures")
    page = printed("report", results, "--output", tmp_path / "page.html") and (
        tmp_path / "page.html"
    ).read_text(encoding="utf-8")
    assert "how well each proxy ranks the experts by accuracy drop" in page
    trial = ("evaluate", "--model", folder, "--benchmark", "arc_easy", "--data", PACKAGE)
    options = ("--limit", 4, "--dtype", "float32", "--component", "expert", "--layer", 1)
    output = printed(*trial, *options, "--expert", 1, "--results", results, "--track", "none")
    assert "is routed to this expert" in output
    assert (
        "has 4 experts, numbered 0 to 3"
        in cli(*trial, *options, "--expert", 4, "--results", results).output
    )


def test_shared_experts_are_lm_evals(tmp_path, one_thread):
    folder = tmp_path / "mixture"
    model = tiny_model("deepseek_v3")
    model.resize_token_embeddings(save_tokenizer(folder, False))
    model.save_pretrained(folder)
    _, cell, _, frame = measure_easy(folder, tmp_path, component="shared_expert", layer=[1, 3])
    loaded, tasks = load_model(find_model(str(folder)), "float32"), plain_package_tasks(tmp_path)
    for record in cell.runs:
        pruned = copy.deepcopy(loaded.model)
        pruned.model.layers[record.change.layer].mlp.shared_experts.down_proj.weight.data.zero_()
        assert_lm_eval_figures(record, frame, pruned, loaded.tokenizer, tasks)
    assert [record.ablation for record in cell.runs] == ["shared_expert:1", "shared_expert:3"]
    assert printed("report", tmp_path / "results", "--output", tmp_path / "page.html")
    assert "each layer’s shared expert was removed" in (tmp_path / "page.html").read_text("utf-8")
