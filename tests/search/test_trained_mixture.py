"""A trained mixture of experts is pruned, saved, and loaded by plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

from tests.conftest import cli
from tests.helpers.lm_eval import HFLM, evaluate, folder_tasks, load_model_parts, write_rows
from tests.helpers.mixtures import save_mixture, without_experts
from tracker.schema.changes import Ablation, Change

from .conftest import stored_searches

pytestmark = pytest.mark.usefixtures("one_thread", "fast_timing", "in_process")
SUMS = [(a, b, (a + b) % 10) for a in range(8) for b in range(8)]


def train(model: Any, tokenizer: Any) -> None:
    """Teach a model the last digits of sums."""
    texts = [f"{a} + {b} = {total}" for a, b, total in SUMS]
    ids = torch.tensor(tokenizer(texts, add_special_tokens=False).input_ids)
    model.train().requires_grad_(True)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    with torch.enable_grad():
        for _ in range(150):
            loss = cross_entropy(model(ids[:, :-1]).logits[:, -1], ids[:, -1])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a mixture of two layers with four experts, and write the task that it has learnt."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    model = save_mixture(folder / "mixtral", "mixtral")
    _, tokenizer = load_model_parts(folder / "mixtral")
    train(model, tokenizer)
    model.save_pretrained(folder / "mixtral")
    rows = [
        {"question": f"{a} + {b} =", "digits": [str((total + n) % 10) for n in range(4)]}
        for a, b, total in SUMS
    ]
    data = write_rows(folder / "data", last_digits=rows) / "last_digits.jsonl"
    task = {"task": "last_digits", "dataset_path": "json", "test_split": "test"}
    task |= {"dataset_kwargs": {"data_files": {"test": str(data)}}}
    task |= {"output_type": "multiple_choice", "doc_to_text": "{{question}}"}
    task |= {"doc_to_choice": "digits", "doc_to_target": 0, "metric_list": [{"metric": "acc"}]}
    (folder / "last_digits.yaml").write_text(yaml.safe_dump(task))
    return folder


def test_experts_of_a_trained_mixture_are_removed(trained: Path, tmp_path: Path) -> None:
    options = ["--unit", "expert", "--strategy", "gold_logprob_oneshot", "--remove", 2]
    options += ["--dtype", "float32", "--sample", 24, "--test-sample", 24, "--track", "none"]
    task = ["--benchmark", trained / "last_digits.yaml"]
    folders = ["--results", tmp_path / "results", "--output", tmp_path / "saved"]
    result = cli("prune", trained / "mixtral", *task, *options, *folders)
    assert result.exit_code == 0, result.output
    (record,) = stored_searches(tmp_path)
    parts = [divmod(part, 4) for part in record.removed]
    removed = Ablation.from_changes(*(Change("expert", (n,), part=part) for n, part in parts))
    base, tokenizer = load_model_parts(trained / "mixtral")
    loaded, _ = load_model_parts(tmp_path / "saved")
    assert loaded.config.num_local_experts == 3
    ids = torch.arange(64).reshape(4, 16) * 7 % 300
    by_hand = without_experts(base, "mixtral", removed)
    assert torch.allclose(loaded(ids).logits, by_hand(ids).logits, atol=1e-4)
    proof = json.loads((tmp_path / "saved" / "tracker.json").read_text())["proof"]
    assert (proof["documents"], proof["figure"]["acc"]) == (24, proof["measured"])
    lm = HFLM(base, tokenizer=tokenizer, batch_size=8)
    results = evaluate(lm, tasks=["last_digits"], task_manager=folder_tasks(trained))
    assert results["results"]["last_digits"]["acc,none"] > 0.95, "it was trained"
