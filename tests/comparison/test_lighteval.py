"""Models compared by details that lighteval 0.13 wrote, against its own figures.

`lighteval.tar.xz` holds the output folders of SmolLM2-135M-Instruct without layer 27 and without
layer 28, on a task with options and a task with generated texts (12 documents each).
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy.special import softmax

import tracker
from tests.conftest import cli, refused


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    """Unpack the output folders of both models."""
    with tarfile.open(Path(__file__).with_name("lighteval.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    return [tmp_path / "lighteval/27", tmp_path / "lighteval/28"]


def read_rows(folder: Path, task: str) -> list[dict[str, Any]]:
    """Read the details of a task, ordered by document."""
    (path,) = folder.rglob(f"details_{task}|0_*.parquet")
    return sorted(pq.read_table(path).to_pylist(), key=lambda row: int(row["doc"]["id"]))


def read_results(folder: Path) -> dict[str, Any]:
    (path,) = folder.rglob("results_*.json")
    return json.loads(path.read_text())


def test_figures_equal_those_of_lighteval(folders):
    comparison = tracker.compare(*map(str, folders))
    assert {model.name for model in comparison.models} == {"without-27", "without-28"}
    rows = {(row.benchmark, row.metric): row for row in comparison.differences}
    assert rows.keys() == {("colours", "acc"), ("colour_words", "em"), ("colour_words", "f1")}
    reported = [read_results(folder)["results"] for folder in folders]
    for (task, metric), row in rows.items():
        expected = [results[f"{task}|0"][metric] for results in reported]
        assert [row.first.value, row.second.value] == pytest.approx(expected)
    details = [read_rows(folder, "colours") for folder in folders]
    first, second = (pd.Series([r["metric"]["acc"] for r in rows]) for rows in details)
    row = rows["colours", "acc"]
    assert (row.won, row.lost) == ((second > first).sum(), (second < first).sum())
    probabilities = [
        [softmax(r["model_response"]["logprobs"])[r["doc"]["gold_index"]] for r in rows]
        for rows in details
    ]
    gains = pd.Series(probabilities[1]) - pd.Series(probabilities[0])
    assert row.choice.value == pytest.approx(gains.mean())


def test_texts_are_those_of_the_documents(folders):
    model, _ = tracker.compare(*map(str, folders)).models
    table = model.benchmarks["colour_words"].table
    for number, row in enumerate(pq.read_table(next(folders[0].rglob("*words*"))).to_pylist()):
        doc, (answer,) = row["doc"], row["model_response"]["text"]
        texts = table.loc[number, ["question", "text", "answer"]].tolist()
        assert texts == [doc["query"], answer, doc["choices"][0]]


def test_documents_are_matched_in_any_order_and_without_results(folders):
    path = next(folders[1].rglob("details_colours*"))
    table = pq.read_table(path)
    pq.write_table(table.take([*range(11, 3, -1)]), path)
    shutil.rmtree(folders[1] / "results")
    (row,) = tracker.compare(str(folders[0]), str(path)).differences
    ids = [doc["id"] for doc in table["doc"].to_pylist()[4:]]
    values = [r["metric"]["acc"] for r in read_rows(folders[0], "colours") if r["doc"]["id"] in ids]
    assert (row.n, row.first.value) == (8, sum(values) / 8)


def test_the_newest_date_is_read(folders):
    path = next(folders[1].rglob("details_colours*"))
    newer = "2026-12-03T00-00-00.000000"
    copy = path.parents[1] / newer / f"details_colours|0_{newer}.parquet"
    copy.parent.mkdir()
    pq.write_table(pq.read_table(path).slice(0, 5), copy)
    rows = tracker.compare(*map(str, folders)).differences
    assert {row.benchmark: row.n for row in rows} == {"colours": 5, "colour_words": 12}


def test_wrong_input(folders):
    first, second = map(str, folders)
    results = next(folders[1].rglob("results_*.json"))
    changed = read_results(folders[1])
    changed["config_tasks"]["colours|0"]["num_fewshots"] = 5
    results.write_text(json.dumps(changed))
    refused(cli("compare", first, second), "colours: the models differ in num_fewshot, 0 against 5")
    refused(cli("compare", str(folders[0].parent), first), "has the answers of 2 models")
    path = next(folders[1].rglob("details_colours*"))
    shutil.copy(path, path.with_name(path.name.replace("|0_", "|3_")))
    refused(cli("compare", first, second), "two files of colours")
    pq.write_table(pq.read_table(path).drop_columns("metric"), path)
    refused(
        cli("compare", first, str(path)), "incomplete or not written by lighteval", "lacks 'metric'"
    )
    path.write_bytes(path.read_bytes()[:100])
    refused(cli("compare", first, str(path)), "incomplete or not written by lighteval")
