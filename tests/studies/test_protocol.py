"""Protocols over a tiny model: their figures follow from the ledger, naively computed."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, norm, spearmanr

from tests.conftest import save_llama
from tests.helpers.runs import write_study
from tests.helpers.trace_tasks import write_paired_tasks
from tracker import api
from tracker.ledger.outcomes import METRIC_PREFIX
from tracker.schema.findings import FindingRecord

from .conftest import cell_stores, plain_values, table_column

BENCHMARKS = ["options", "letters", "traces:letters", "sampled"]
LABELS = ("generation", "reading", "option likelihood")
LAYERS = [0, 1, 2, 3]


def write_file(folder: Path, **settings: Any) -> Path:
    """Write an experiment on the paired tasks and a tiny model."""
    tasks = write_paired_tasks(folder / "tasks")
    grid = {"model": str(save_llama(folder / "tiny", seed=3)), "benchmark": BENCHMARKS}
    grid |= {"include_path": str(tasks), "layer": LAYERS, **settings}
    return write_study(folder / "study.yaml", **grid)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tuple[Path, Path, FindingRecord]:
    folder = tmp_path_factory.mktemp("protocol")
    path, results = write_file(folder), folder / "results"
    returned = api.study("protocol", path, results=results, track=[])
    assert returned.outcome.exit_code == 0
    return path, results, returned.finding


@pytest.fixture(scope="module")
def scores(study) -> dict[str, pd.DataFrame]:
    """Return label → scores `[documents, changes]` of the intact model (first) and the others."""
    path, results, _ = study
    options, letters, traces, sampled = (store.read() for store in cell_stores(path, results))
    odds = np.exp(np.array([*options["loglikelihoods"]]))
    gold = np.take_along_axis(odds, options[["gold"]].to_numpy(int), axis=1)[:, 0]
    options[f"{METRIC_PREFIX}choice"] = gold / odds.sum(axis=1)
    columns = {
        "sampling": (sampled, "exact_match,last-letter"),
        "generation": (letters, "exact_match,last-letter"),
        "reading": (traces, "answer_kept,last-letter"),
        "option likelihood": (options, "acc"),
        "choice probability": (options, "choice"),
    }
    return {
        label: frame.pivot(index="doc", columns="ablation", values=METRIC_PREFIX + name).astype(
            float
        )
        for label, (frame, name) in columns.items()
    }


def drops_of(scores: pd.DataFrame) -> np.ndarray:
    changed = [column for column in sorted(scores) if column != "baseline"]
    return (scores[["baseline"]].to_numpy() - scores[changed].to_numpy()).astype(float)


def test_drops_and_verdicts_follow_from_the_ledger(study, scores):
    table, *_ = study[2].tables
    assert [heading.label for heading in table.headings] == ["change", *scores, "shown by"]
    n_drops, shown = len(scores) * len(LAYERS), {layer: set() for layer in LAYERS}
    p_values = {}
    for label, frame in scores.items():
        drops = drops_of(frame)
        entries = table_column(table, label)
        assert plain_values(entries) == pytest.approx(drops.mean(axis=0))
        for layer, (entry, values) in enumerate(zip(entries, drops.T, strict=True)):
            if set(values) <= {-1, 0, 1}:  # Bonett and Price, at the level of all drops together
                padded = np.append(values, (1, -1))
                error = np.sqrt(((padded - padded.mean()) ** 2).sum()) / len(padded)
                half = norm.ppf(1 - 0.025 / n_drops) * error
                assert entry.low == pytest.approx(max(padded.mean() - half, -1))
                assert entry.high == pytest.approx(min(padded.mean() + half, 1))
                n_lost, n_won = (values == 1).sum(), (values == -1).sum()
                p_values[label, layer] = (
                    binomtest(n_lost, n_lost + n_won).pvalue if n_lost + n_won else 1.0
                )
            if entry.low > 0:
                shown[layer].add(label)
    order = sorted(p_values, key=p_values.get)
    for rank, key in enumerate(order):
        if p_values[key] * (len(order) - rank) > 0.05:
            for label, layer in order[rank:]:
                shown[layer].discard(label)
            break
    labels = [{*text.split(", ")} - {"none"} for text in table_column(table, "shown by")]
    assert [{t for t in texts if "better" not in t} for texts in labels] == list(shown.values())


def test_agreement_and_lost_documents_follow_from_the_ledger(study, scores):
    _, agreement, grouped, single = study[2].tables
    pairs = [*combinations(scores, 2)]
    assert [row[:2] for row in agreement.rows] == pairs
    for (first, second), row in zip(pairs, agreement.rows, strict=True):
        means = [drops_of(scores[label]).mean(axis=0).round(12) for label in (first, second)]
        if np.ptp(means[0]) and np.ptp(means[1]):
            assert row[2].value == pytest.approx(spearmanr(*means).statistic)
    bands = {"all": LAYERS, "first third of the layers": [0, 1], "other layers": [2, 3]}
    layers = {f"layer {layer}": [layer] for layer in LAYERS}
    for table, groups in ((grouped, bands), (single, layers)):
        rows = iter([row for row in table.rows if "minus" not in row[2]])
        for first, second in combinations(LABELS, 2):
            is_right = (scores[first]["baseline"] == 1) & (scores[second]["baseline"] == 1)
            pair = [drops_of(scores[label])[is_right] == 1 for label in (first, second)]
            for name, changes in groups.items():
                row = next(rows)
                lost, other = (drops[:, changes] for drops in pair)
                assert row[:3] == (first, second, name)
                n, only_first, only_second, difference = plain_values(row[3:])
                assert n == is_right.sum()
                assert (only_first, only_second) == ((lost & ~other).sum(), (other & ~lost).sum())
                if n:
                    assert difference == pytest.approx(lost.mean() - other.mean())
                if n > 1:
                    assert -1 <= row[6].low <= difference <= row[6].high <= 1
    *_, early, late, contrast = grouped.rows[:4]
    assert contrast[6].value == pytest.approx(late[6].value - early[6].value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"benchmark": "letters"}, "traces:TASK"), ({"sample": 8}, "limit: {value: 8}")],
)
def test_protocols_without_common_documents_are_refused(tmp_path, refused, settings, words):
    assert words in refused("protocol", write_file(tmp_path, **settings))
