"""Folders of lm-eval's results: by lm-eval itself with a made-up model, or line by line."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from lm_eval.loggers import EvaluationTracker

from tests.helpers.lm_eval import evaluate

DATE = "2026-11-30T10-00-00.000000"


class MadeUpModel(LM):  # type: ignore[misc]
    """A model that answers at random, and on some documents otherwise than the first one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed

    def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
        return [(self._score(request.args), False) for request in requests]

    def _score(self, texts: tuple[str, str]) -> float:
        noise = random.Random(f"{self._seed}{texts}").gauss(0, 1)
        return random.Random(str(texts)).gauss(-9, 2) + noise

    def generate_until(self, requests: Any) -> list[str]:
        return [random.Random(f"{self._seed}{r.args[0]}").choice("ab1") for r in requests]

    def loglikelihood_rolling(self, requests: Any) -> list[float]:
        return [self._score((request.args[0], "")) for request in requests]


def run_lm_eval(
    folder: Path, tasks: Any, names: list[str], seed: int, **settings: Any
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Evaluate a made-up model with lm-eval, which writes its files; return results and samples."""
    return write_evaluation(folder, MadeUpModel(seed), tasks=names, task_manager=tasks, **settings)


def write_evaluation(
    folder: Path, model: LM, **settings: Any
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Evaluate a model with lm-eval, which writes its files; return results and samples."""
    writer = EvaluationTracker(output_path=str(folder))
    evaluation = evaluate(model, evaluation_tracker=writer, **settings)
    writer.general_config_tracker.model_name = folder.name
    writer.general_config_tracker.model_name_sanitized = folder.name
    samples = evaluation.pop("samples")
    writer.save_results_aggregated(results=evaluation, samples=samples)
    for task in evaluation["configs"]:
        writer.save_results_samples(task_name=task, samples=samples[task])
    return evaluation, samples


def sample(doc: int, right: float, **changes: Any) -> dict[str, Any]:
    """Return a line of samples of a task with two options."""
    question = changes.pop("question", f"Is {doc} even?")
    scores = [-1.0, -2.0] if right else [-2.0, -1.0]
    hashes = {
        name: hashlib.sha256(text.encode()).hexdigest()
        for name, text in (("doc_hash", question), ("prompt_hash", question), ("target_hash", "0"))
    }
    return {
        "doc_id": doc,
        "doc": {"question": question},
        "target": "0",
        "arguments": {
            f"gen_args_{i}": {"arg_0": question, "arg_1": f" {option}"}
            for i, option in enumerate(("yes", "no"))
        },
        "resps": [[[str(score), "False"]] for score in scores],
        "filtered_resps": [[str(score), "False"] for score in scores],
        "filter": "none",
        "metrics": ["acc"],
        **hashes,
        "acc": right,
        **changes,
    }


def write_samples(
    folder: Path, task: str, rows: Iterable[Mapping[str, Any]], **report: Any
) -> Path:
    """Write a model's folder with one task; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(rows)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / f"samples_{task}_{DATE}.jsonl").write_text("".join(lines))
    results = {
        task: {"acc,none": sum(row["acc"] for row in rows) / len(rows), "sample_len": len(rows)}
    }
    content = {"results": results, "model_name": folder.name, "n-shot": {task: 0}}
    content |= {"versions": {task: 1.0}, "chat_template_sha": None, **report}
    (folder / f"results_{DATE}.json").write_text(json.dumps(content))
    return folder


def write_outcomes(
    folder: Path, both: int, lost: int, won: int, neither: int = 0
) -> tuple[Path, Path]:
    """Write two models' folders by how many documents both, one or none of them answer right."""
    pairs = [(1, 1)] * both + [(1, 0)] * lost + [(0, 1)] * won + [(0, 0)] * neither
    first, second = (
        write_samples(folder / name, "parity", [sample(i, pair[k]) for i, pair in enumerate(pairs)])
        for k, name in enumerate("AB")
    )
    return first, second
