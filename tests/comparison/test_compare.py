"""Models compared by lm-eval's files, against lm-eval's figures and naive statistics."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from html import unescape
from pathlib import Path
from statistics import NormalDist
from typing import Any

import lm_eval.evaluator
import numpy as np
import pytest
import yaml
from lm_eval.tasks import TaskManager
from mlflow import MlflowClient
from scipy.stats import binomtest

import tracker
from tests.conftest import TRACKER, cli, printed, refused
from tests.helpers.lm_eval import folder_tasks, metric_value, write_rows
from tests.helpers.packages import fetch_every_eval_ever
from tests.helpers.samples import DATE, run_lm_eval, sample, write_outcomes, write_samples
from tests.tools.gate import decide, gate_rates, probability_of
from tracker.analysis.paired import PairedOutcomes
from tracker.benchmarks import results
from tracker.comparison.log_formats import LM_EVAL
from tracker.comparison.verdicts import Difference
from tracker.stats.accuracy import OutcomeVariance

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
CHOICES = """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
TEXTS = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: a
filter_list:
  - {name: first, filter: [{function: take_first}]}
  - {name: upper, filter: [{function: uppercase}, {function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}
"""
WORDS = """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " yes"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> TaskManager:
    """Write tasks of several kinds, and a group whose tasks have equal weights."""
    folder = tmp_path_factory.mktemp("tasks")
    kinds = {"facts": (CHOICES, 60), "art": (CHOICES, 25), "law": (CHOICES, 50)}
    kinds |= {"texts": (TEXTS, 40), "words": (WORDS, 30)}
    for name, (kind, count) in kinds.items():
        rows = [
            {"question": f"{name} {i}?", "choices": ["yes", "no", "perhaps"], "answer": i % 3}
            for i in range(count)
        ]
        data = write_rows(folder / "data", **{name: rows}) / f"{name}.jsonl"
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + kind)
    mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": False}
    group = {"group": "school", "task": ["art", "law"], "aggregate_metric_list": [mean]}
    (folder / "school.yaml").write_text(yaml.safe_dump(group))
    return folder_tasks(folder)


NAMES = ["facts", "school", "texts", "words"]


@pytest.fixture(scope="module")
def models(tasks, tmp_path_factory) -> dict[str, Any]:
    """Evaluate three made-up models by lm-eval; folder → results and samples."""
    folder = tmp_path_factory.mktemp("models")
    return {
        str(folder / name): run_lm_eval(folder / name, tasks, NAMES, seed)
        for seed, name in enumerate(("A", "B", "C"))
    }


def naive_interval(drops: np.ndarray, weights: np.ndarray, family: int) -> tuple[float, float]:
    """Return Bonett and Price's interval at Bonferroni's level, one document after another."""
    z = NormalDist().inv_cdf(1 - 0.025 / family)
    n = len(drops)
    values, shares = [*drops, 1, -1], [*(weights * n / (n + 2)), 1 / (n + 2), 1 / (n + 2)]
    mean = sum(v * s for v, s in zip(values, shares, strict=True))
    variance = sum(s**2 * (v - mean) ** 2 for v, s in zip(values, shares, strict=True))
    return mean - z * math.sqrt(variance), mean + z * math.sqrt(variance)


def test_figures_equal_those_of_lm_eval(models):
    first, *others = models
    comparison = tracker.compare(*models)
    metrics = {(row.benchmark, row.metric) for row in comparison.differences}
    # Perplexity is no mean; the group lacks acc_norm.
    assert metrics == {
        *(("facts", "acc"), ("facts", "acc_norm"), ("school", "acc"), ("school", "acc_norm")),
        *(("texts", "exact_match,first"), ("texts", "exact_match,upper")),
    }
    assert any("perplexity" in note for note in comparison.notes)
    family = len(comparison.differences)
    for row in comparison.differences:
        name, _, filter_name = row.metric.partition(",")
        folders = first, next(folder for folder in others if folder.endswith(row.model))
        groups = {"school": ["art", "law"]}.get(row.benchmark, [row.benchmark])
        values, weights = [[], []], []
        for task in groups:
            for side, folder in enumerate(folders):
                rows = models[folder][1][task]
                rows = [r for r in rows if r["filter"] == (filter_name or "none")]
                values[side] += [r[name] for r in sorted(rows, key=lambda r: r["doc_id"])]
            weights += [1 / len(groups) / len(rows)] * len(rows)
        a, b, w = map(np.array, (*values, weights))
        if row.benchmark == "school" and name == "acc_norm":  # not aggregated by lm-eval
            w = np.full(len(a), 1 / len(a)) if row.first.value == pytest.approx(a.mean()) else w
        else:
            for folder, level in zip(folders, (row.first, row.second), strict=True):
                reported = models[folder][0]["results"][row.benchmark]
                assert level.value == pytest.approx(reported[f"{name},{filter_name or 'none'}"])
        assert (row.won, row.lost) == ((b > a).sum(), (a > b).sum())
        low, high = naive_interval(a - b, w, family)
        assert (row.difference.low, row.difference.high) == pytest.approx((-high, -low))
        test = binomtest(row.lost, row.lost + row.won)
        assert row.difference.p_value == pytest.approx(test.pvalue)
        if row.benchmark == "facts":
            chances = [
                metric_value({"samples": models[f][1]}, "facts", "choice_probability")
                for f in folders
            ]
            assert row.choice.value == pytest.approx(chances[1] - chances[0])


def test_a_published_example_gives_its_p_value(tmp_path):
    # EleutherAI/lm-evaluation-harness, pull request 3868: 220 documents, unpaired p = 0.080,
    # paired p = 0.008; the counts are some that give both.
    a, b = write_outcomes(tmp_path, both=110, lost=30, won=12, neither=68)
    (row,) = tracker.compare(a, b).differences
    levels = [(x, x * (1 - x) / 219) for x in (row.first.value, row.second.value)]
    z = (levels[0][0] - levels[1][0]) / math.sqrt(levels[0][1] + levels[1][1])
    assert round(2 * NormalDist().cdf(-abs(z)), 3) == 0.080
    assert round(row.difference.p_value, 3) == 0.008
    assert row.verdict == "worse"


@pytest.mark.parametrize(
    ("counts", "margin", "verdict", "code"),
    [
        ((800, 40, 5), "1pp", "worse", 3),
        ((800, 5, 40), "1pp", "better", 0),
        ((2000, 1, 1), "1pp", "equivalent", 0),
        ((900, 10, 30), "1pp", "better", 0),
        ((900, 10, 20), "1pp", "equivalent or better", 0),
        ((300, 5, 5), "1pp", "open", 4),
        # The interval is inside the margin, but Tango's test is not significant.
        ((276, 0, 0), "0.01", "open", 4),
        # 57.0 against 54.0 on 300 documents is no regression yet.
        ((150, 21, 12, 117), "1pp", "open", 4),
    ],
)
def test_gate(tmp_path, counts, margin, verdict, code):
    result = cli(
        "compare", *write_outcomes(tmp_path, *counts), "--within", margin, "--format", "json"
    )
    content = json.loads(result.stdout)
    (row,) = content["differences"]
    assert (row["verdict"], result.exit_code, content["exit_code"]) == (verdict, code, code)
    assert (row["needed"] is not None) == (verdict == "open")
    without = json.loads(printed("compare", tmp_path / "A", tmp_path / "B", "--format", "json"))
    assert without["exit_code"] == 0


def test_the_gate_is_rarely_wrong():
    for documents, margin, family in ((60, 0.05, 1), (277, 0.01, 1), (200, 0.02, 5)):
        rates = [gate_rates(documents, margin, family, ratio) for ratio in (1.01, 3)]
        assert max(rate.equivalent for rate in rates) <= 0.05
        assert max(rate.worse for rate in rates) <= 0.05


def test_the_planned_documents_give_the_planned_power():
    count = OutcomeVariance(0.07, binary=True).count_equivalence_documents(0.05, 2)
    power = probability_of({"equivalent"}, count, 0.05, 2, share=0.07, drop=0.0)
    assert power == pytest.approx(0.8, abs=0.03)
    text = printed("compare", "--plan", "--within", "5pp", "--agreement", 0.93, "--comparisons", 2)
    assert f"{count:,} documents" in text


ROWS = [sample(i, 1) for i in range(30)]
EQUAL = [sample(i, i < 3, question="Is 2 even?") for i in range(4)]
NO_HASHES = [sample(i, 1, question=f"Is {i + 5 * (i > 7)} even?") for i in range(10)]
for row in NO_HASHES:
    del row["doc_hash"]


@pytest.mark.parametrize(
    ("first", "second", "counts", "unmatched"),
    [
        (
            ROWS,
            [sample(i + 3, i % 2, question=f"Is {i} even?") for i in range(5, 35)],
            (25, 12, 0),
            [range(5), range(33, 38)],
        ),
        (EQUAL, EQUAL[:3], (3, 0, 0), [range(3, 4)]),
        (NO_HASHES, ROWS[:10], (8, 0, 0), [range(8, 10)] * 2),  # by number and text
    ],
    ids=["hashes", "equal", "no hashes"],
)
def test_documents_are_matched(tmp_path, first, second, counts, unmatched):
    folders = (write_samples(tmp_path / n, "parity", r) for n, r in (("A", first), ("B", second)))
    comparison = tracker.compare(*folders)
    (row,) = comparison.differences
    assert (row.n, row.lost, row.won) == counts
    names = [[f"parity {i}" for i in docs] for docs in unmatched]
    assert [*comparison.unmatched.values()] == names
    notes = " ".join(comparison.notes)
    assert all(f"{len(docs)} document" in notes and docs[0] in notes for docs in names)


def test_mutual_information_scores_options_twice(tmp_path):
    rows = [sample(i, i % 2) for i in range(10)]
    more = {"acc_mutual_info": 0, "metrics": ["acc"]}
    twice = [
        {
            **row,
            **more,
            "filtered_resps": [*row["filtered_resps"], ["0.0", "False"], ["-9", "False"]],
        }
        for row in rows
    ]
    folders = (write_samples(tmp_path / n, "parity", r) for n, r in (("A", rows), ("B", twice)))
    (row,) = tracker.compare(*folders).differences
    assert row.choice.value == 0


@pytest.mark.parametrize(
    "options", [["é, ü and \n", "plain", "back\\slash"], ["a", 'say "}'], ["a", '"arg_1": "x"}']]
)
def test_options_are_read_without_their_prompts(options, tmp_path):
    """Options that look like the end of a request are read as JSON."""
    row = sample(0, 1)
    row["arguments"] = {
        f"gen_args_{n}": {"arg_0": 'Is "}, "arg_1": it?', "arg_1": option}
        for n, option in enumerate(options)
    }
    for number, escaped in enumerate((True, False)):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(row, ensure_ascii=escaped) + "\n")
        (read,) = LM_EVAL.read_samples("parity", path)
        assert read.choices == options
        assert read.question == 'Is "}, "arg_1": it?'


def test_a_lower_loss_is_better(tmp_path):
    changes = {"metrics": ["loss"], "target": "?"}
    higher = {"higher_is_better": {"parity": {"loss": False}}}
    a, b = (
        write_samples(
            tmp_path / name,
            "parity",
            [sample(i, 1, loss=2.5 + i % 3 + change * (1 + i % 2), **changes) for i in range(40)],
            **higher,
        )
        for name, change in (("A", 0.0), ("B", -0.25))
    )
    (row,) = tracker.compare(a, b).differences
    assert row.difference.value == pytest.approx(0.375)
    assert (row.won, row.lost, row.verdict) == (40, 0, "better")
    assert row.difference.p_value is None
    assert "2.1250" in printed("compare", a, b) or "3.1" in printed("compare", a, b)


def rewrite(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text()))


SAMPLES, REPORT = f"samples_parity_{DATE}.jsonl", f"results_{DATE}.json"


def drop_line(text: str) -> str:
    return "".join(text.splitlines(keepends=True)[:-1])


def repeat_line(text: str) -> str:
    return text + text.splitlines(keepends=True)[-1]


WRONG_FILES = [
    (SAMPLES, lambda text: text[:-30], f"{SAMPLES}, line 40,"),
    (SAMPLES, lambda text: text + "[]\n", f"{SAMPLES}, line 41,"),
    (SAMPLES, lambda text: text.replace('"filter"', '"f"'), "line 1.*lacks 'filter'"),
    (SAMPLES, drop_line, "the samples of parity contain only 39 of 40 documents"),
    (SAMPLES, lambda text: "", "0 of 40 documents"),
    (SAMPLES, repeat_line, "document 39 of parity occurs twice; give the files of one run"),
    (SAMPLES, lambda text: text.replace('doc_hash": "', 'doc_hash": "0'), "no document in common"),
    (
        SAMPLES,
        lambda text: text.replace('prompt_hash": "', 'prompt_hash": "0'),
        "differ in prompt",
    ),
    (SAMPLES, lambda text: text.replace('"acc"', '"f1"'), "no metric in common"),
    (REPORT, lambda text: text[:-5], REPORT),
    (REPORT, lambda text: text.replace('"parity": 1.0', '"parity": 2.0'), "differ in version"),
    (REPORT, lambda text: text.replace('"parity": 0}', '"parity": 5}'), "differ in num_fewshot"),
    (REPORT, lambda text: text.replace('_sha": null', '_sha": "ab"'), "differ in chat_template"),
    (REPORT, lambda text: '{"results": [], "configs": {}}', "not written by lm-eval .'results': "),
    (
        REPORT,
        lambda text: text.replace('"n-shot"', '"group_subtasks": [1], "n"'),
        "not written by lm-eval",
    ),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG_FILES)
def test_wrong_files_are_refused(tmp_path, name, change, message):
    a, b = write_outcomes(tmp_path, 20, 15, 5)
    rewrite(b / name, change)
    result = cli("compare", a, b)
    refused(result)
    assert re.search(message, result.output)
    if match := re.search(r"--allow-different (\w+)", result.output):
        assert cli("compare", a, b, *match.group().split()).exit_code == 0


WRONG_ARGUMENTS = [
    (["A"], "two models"),
    (["A", "A"], "same answers"),
    (["A", f"A/{SAMPLES}"], "same answers"),
    (["A", "missing"], "does not exist"),
    (["A", "empty"], "--log_samples"),
    (["A", f"B/{REPORT}"], "--log_samples"),
    (["A", "."], "2 models"),
    (["A", "other"], "no benchmark in common: parity against sums"),
    (["A", "B", "--metric", "ac"], "'ac' is not one of.*Did you mean 'acc'"),
    (["A", "B", "--within", "1%"], "1pp"),
    (["A", "B", "--within", "2"], "1pp"),
    (["A", "B", "--within", "party=1pp"], "'party' is not one of.*Did you mean 'parity'"),
    (["A", "B", "--allow-different", "num_fewshotz"], "Did you mean 'num_fewshot'"),
    (["--plan"], "--within"),
    (["A", "B", "--track", "mlfow"], "mlfow"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_ARGUMENTS)
def test_wrong_arguments_are_refused(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / REPORT).write_text("{}")
    write_outcomes(tmp_path, 20, 15, 5)
    write_samples(tmp_path / "far" / "other", "sums", [sample(i, 1) for i in range(5)])
    names = ["far/other" if name == "other" else name for name in arguments]
    result = cli("compare", *names, "--output", "out")
    refused(result)
    assert re.search(message, result.output), result.output
    assert not Path("out").exists()


def test_a_gate_is_open_where_results_are_missing(tmp_path):
    write_outcomes(tmp_path, 3000, 0, 0)
    assert cli("compare", tmp_path / "A", tmp_path / "B", "--within", "1pp").exit_code == 0
    rows = [sample(i, 1, metrics=["acc", "em"], em=1.0) for i in range(3000)]
    for changed, report in (
        ([rows, rows[:2900]], {}),  # documents
        ([rows, [row | {"metrics": ["acc"]} for row in rows]], {}),  # a metric
        ([rows, [row | {"em": math.nan} for row in rows]], {}),
        ([[row | {"metrics": ["loss"], "loss": 1.0} for row in rows]] * 2, {}),  # a direction
    ):
        for name, lines in zip("AB", changed, strict=True):
            shutil.rmtree(tmp_path / name)
            write_samples(tmp_path / name, "parity", lines, **report)
        result = cli("compare", tmp_path / "A", tmp_path / "B", "--within", "1pp")
        assert result.exit_code in (4, 2), result.output
    # A benchmark.
    write_outcomes(tmp_path, 3000, 0, 0)
    (tmp_path / "A" / f"samples_other_{DATE}.jsonl").write_text(json.dumps(sample(0, 1)) + "\n")
    assert cli("compare", tmp_path / "A", tmp_path / "B", "--within", "1pp").exit_code == 4


def test_equivalence_holds_for_rare_large_losses():
    """An interval that trusts the observed variance would be wrong in one of ten samples."""
    generator, n_wrong = np.random.default_rng(0), 0
    for _ in range(400):
        small = np.where(generator.random(100) < 0.3, 0.01, 0.0)
        drops = np.where(generator.random(100) < 0.0175, 1.0, small)  # 2 pp on average
        first, second = np.ones(100), (1 - drops)[:, None]
        weights = np.full(100, 0.01)
        drop = PairedOutcomes(first, second, weights).drop(0)
        row = Difference(
            "B", "b", "m", 100, drop, drop, 0, 0, -drop, drop, spread=drops.std(ddof=1)
        )
        n_wrong += "equivalent" in decide(row, 0.02)
    assert n_wrong <= 0.05 * 400


def test_texts_from_files_are_escaped(tmp_path):
    evil = "<script>alert(1)</script> | `x` \x1b[31m"
    pairs = [[sample(i, right, question=f"{evil} {i}") for i in range(40)] for right in (1, 0)]
    a = write_samples(tmp_path / "A", "parity", pairs[0], model_name=f"org/{evil}A")
    b = write_samples(tmp_path / "B", "parity", pairs[1], model_name=evil)
    page = printed("compare", a, b, "--format", "html")
    assert "<script" not in page
    assert "alert(1)</script> | `x`" in unescape(page)
    assert page.count("<tr>") >= 30
    comment = printed("compare", a, b, "--format", "md")
    assert "<script" not in comment
    assert re.search(r"^\|(?: *[:-]+ *\|){11,}$", comment, re.MULTILINE)
    assert "\x1b" not in printed("compare", a, b)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """Unpack a results folder of SmolLM2 on arc_easy and piqa."""
    folder = tmp_path_factory.mktemp("demo")
    with tarfile.open(Path(__file__).parents[1] / "golden/folders/demo.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_runs_of_a_results_folder_have_the_drops_of_their_records(demo):
    runs = [f"{demo}:SmolLM2-135M-Instruct:{change}" for change in ("intact", "layer:3", "layer:0")]
    comparison = tracker.compare(*runs, metric=["acc", "choice_probability"])
    records = {record.benchmark.name: record for record in tracker.ls(demo)}
    assert len(comparison.differences) == 8
    for row in comparison.differences:
        record = records[row.benchmark]
        (run,) = (r for r in record.runs if f"{r.change}" == row.model.split()[-1])
        drop = run.choice_drop if row.metric == "choice_probability" else run.drop
        if row.metric in (record.metric, "choice_probability"):
            assert row.difference.value == pytest.approx(-drop.value)
            assert row.difference.p_value == drop.p_value
            assert row.n == run.n
    assert "chlorophyll" in printed("compare", *runs, "--format", "html")


def test_one_task_of_a_group_is_compared_alone(models):
    first, second = (next(Path(folder).rglob("samples_law_*.jsonl")) for folder in [*models][:2])
    (row,) = tracker.compare(str(first), str(second), metric=["acc"]).differences
    whole = [json.loads(line)["acc"] for line in first.read_text().splitlines()]
    assert (row.benchmark, row.n) == ("law", 50)
    assert row.first.value == pytest.approx(np.mean(whole))


def test_runs_of_a_data_set_compare_as_those_of_its_results_folder(demo, tmp_path):
    printed("report", demo, "--format", "dataset", "--output", tmp_path / "profiles")
    changes, metric = ("intact", "layer:3", "layer:0"), ["acc"]
    truth, rows = (
        tracker.compare(*(f"{f}:SmolLM2-135M-Instruct:{c}" for c in changes), metric=metric)
        for f in (demo, tmp_path / "profiles")
    )
    assert len(rows.differences) == 4
    for row, true_row in zip(rows.differences, truth.differences, strict=True):
        assert (row.n, row.won, row.lost) == (true_row.n, true_row.won, true_row.lost)
        assert row.difference == true_row.difference
    runs = [f"{f}:SmolLM2-135M-Instruct:layer:3" for f in (demo, tmp_path / "profiles")]
    for row in tracker.compare(*runs, metric=metric).differences:
        assert (row.won, row.lost) == (0, 0)
    other = runs[1].replace("layer:3", "layer:0")
    assert "while holding the phones" in printed("compare", runs[1], other, "--format", "html")
    (tmp_path / "profiles/documents.parquet").unlink()
    refused(cli("compare", runs[1], other), "does not contain the outcomes", "the results folder")


def test_a_run_is_compared_with_files_of_lm_eval(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "BOOTSTRAP_ITERS", 10)
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda storage: None)
    cell = f"{demo}:SmolLM2-135M-Instruct--arc_easy"
    tracker.log_samples(tmp_path, results=demo, benchmark=["arc_easy"], layer=[0])
    intact, removed = sorted(tmp_path.iterdir())
    comparison = tracker.compare(f"{cell}:intact", intact, removed, metric=["acc"])
    same, other = comparison.differences
    assert (same.won, same.lost, same.choice.value) == (0, 0, pytest.approx(0, abs=1e-6))
    expected = tracker.compare(f"{cell}:intact", f"{cell}:layer:0", metric=["acc"]).differences[0]
    assert (other.won, other.lost, other.n) == (expected.won, expected.lost, expected.n)
    assert not comparison.unmatched


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("SmolLM2-135M-Instruct--arc:intact", "fits no cell.*arc_easy"),
        ("SmolLM2-135M-Instruct:layer:99", "no results for layer:99; write e.g. intact, layer"),
        ("SmolLM2-135M-Instruct:lair:3", "invalid change 'lair:3'"),
        ("SmolLM2-135M-Instruct:intact", "same answers"),
    ],
)
def test_wrong_runs_are_refused(demo, run, message):
    result = cli("compare", f"{demo}:SmolLM2-135M-Instruct:intact", f"{demo}:{run}")
    refused(result)
    assert re.search(message, result.output), result.output


def test_a_comparison_is_a_run_in_mlflow(tmp_path, template, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(template, tmp_path / "mlflow.db")
    printed("compare", *write_outcomes(tmp_path, 30, 5, 9), "--track", "mlflow", "--results", ".")
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = (e for e in client.search_experiments() if e.name == "tracker")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "comparison"
    assert {f.path for f in client.list_artifacts(run.info.run_id)} >= {"comparison.html"}
    assert "open on parity" in run.data.tags["mlflow.note.content"]


def test_the_workflow_of_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_outcomes(tmp_path, 200, 60, 5)
    Path("lm-eval").mkdir()
    Path("A").rename("lm-eval/original")
    Path("B").rename("lm-eval/int4")
    text = (Path(__file__).parents[2] / "docs/compare.md").read_text()
    (workflow,) = map(yaml.safe_load, re.findall(r"```yml\n(.*?)```", text, re.DOTALL))
    steps = [s["run"] for job in workflow["jobs"].values() for s in job["steps"] if "run" in s]
    (script,) = (step for step in steps if "tracker compare" in step)
    environment = {**os.environ, "GITHUB_STEP_SUMMARY": "summary.md"}
    environment["PATH"] = f"{TRACKER.parent}:{environment['PATH']}"
    assert subprocess.run(["bash", "-e", "-c", script], env=environment).returncode == 3
    assert "| worse" in Path("summary.md").read_text()


def convert(logs: Path) -> str:
    """Convert lm-eval's files of a model by every_eval_ever's converter."""
    fetch_every_eval_ever()
    from every_eval_ever.cli import main

    data = str(logs.with_name(f"{logs.name}-records"))
    options = ["--log_path", str(logs), "--output_dir", data, "--include_samples"]
    assert not main(["convert", "lm_eval", *options])
    return data


def test_records_of_every_eval_ever_give_the_figures_of_their_source(models, tmp_path):
    """The real converter makes the records; one model stays a folder of lm-eval."""
    logs = []
    for folder in models:
        logs.append(shutil.copytree(folder, tmp_path / Path(folder).name))
        (path,) = logs[-1].rglob("results_*.json")
        results = json.loads(path.read_text())
        results |= {"model_name": f"lab/{logs[-1].name}", "group_subtasks": {}}
        del results["results"]["school"]  # a record is of one task
        path.write_text(json.dumps(results))
    expected = tracker.compare(*map(str, logs))
    comparison = tracker.compare(*map(convert, logs[:2]), str(logs[2]))
    assert [model.name for model in comparison.models] == ["A", "B", "C"]
    figures = [
        {
            (row.benchmark, row.metric, row.model): (row.first, row.second, row.won, row.lost)
            for row in result.differences
        }
        for result in (comparison, expected)
    ]
    assert figures[0] == figures[1] != {}
    for path in tmp_path.glob(
        "*-records/texts/**/*_samples.jsonl"
    ):  # as another program names them
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        named = [r | {"sample_id": f"q{r['sample_id']}", "metadata": {}} for r in rows]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in named))
    texts = tracker.compare(*(str(tmp_path / f"{name}-records/texts") for name in "AB"))
    rows = {(row.metric, row.n): (row.won, row.lost) for row in texts.differences}
    assert rows == {
        (row.metric, 40): (row.won, row.lost)
        for row in expected.differences
        if (row.benchmark, row.model) == ("texts", "B")
    }
    (samples,) = (tmp_path / "A-records/texts").rglob("*_samples.jsonl")
    samples.write_text(samples.read_text() * 2)
    refused(cli("compare", samples, logs[2]), "occurs twice")
    samples.with_name(samples.name.replace("_samples.jsonl", ".json")).unlink()
    refused(cli("compare", samples, logs[2]), "into the same folder")
