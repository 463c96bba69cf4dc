"""A realistic cell, a ready SQLite store and a real MLflow server."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ablations import with_change
from tests.helpers.wandb_double import WandbDouble
from tests.helpers.wandb_runs import WandbPublisher
from tests.report.conftest import build_cell
from tracker.schema.changes import Change
from tracker.schema.estimates import Estimate
from tracker.schema.records import CellRecord, CorrelationRecord, RunRecord

from .mlflow_server import MlflowServer
from .wandb_client import Client


def layer_record(layer: int, n: int) -> RunRecord:
    """Layer 2 has no relevance and no McNemar p-value; every other figure is there."""
    drop = 0.19 / (layer + 1)
    is_defined = layer != 2
    reasons = {
        "accuracy_relevance": "the baseline is at or below chance",
        "mcnemar_p": "the outcomes are not binary",
        "metric/acc_norm": "not reported",
    }
    return RunRecord(
        ablation=f"layer:{layer}",
        layer=layer,
        n=n,
        accuracy=0.5 - drop,
        drop=Estimate(drop, drop - 0.04, drop + 0.04, 0.001 * (layer + 1) if is_defined else None),
        accuracy_relevance=drop / 0.25 if is_defined else None,
        cosine_similarity=0.9 - 0.01 * layer,
        cosine_score=0.1 + 0.01 * layer,
        angular_distance=0.14,
        relative_update=0.5,
        gold_drop=Estimate(0.3),
        metrics={"acc": 0.5 - drop, "acc_norm": 0.4 if is_defined else None},
        reasons={} if is_defined else reasons,
    )


def cell_record(
    layers: Sequence[int] = (0, 1, 2, 3), n: int = 160, key: str = "5f2e0c9ab1d3"
) -> CellRecord:
    template = build_cell()
    (task,) = template.benchmark.tasks
    tasks = (task.model_copy(update={"fingerprint": "cd" * 32}),)
    correlation = {"coefficient": "spearman", "subset": "all", "n": len(layers), "documents": n}
    undefined = Estimate(None, reason="the angular distance is the same for every layer")
    estimates = {"cosine_score": Estimate(0.66, 0.4, 0.8, 0.001), "angular_distance": undefined}
    changes = {
        "key": key,
        "n": n,
        "model": template.model.model_copy(update={"fingerprint": "ab" * 32}),
        "benchmark": template.benchmark.model_copy(update={"tasks": tasks}),
        "tokens": 40 * n,
        "baseline": Estimate(0.5, 0.42, 0.58),
        "baseline_metrics": {"acc": 0.5, "acc_norm": 0.45},
        "runs": tuple(layer_record(layer, n) for layer in layers),
        "correlations": tuple(
            CorrelationRecord(proxy=proxy, estimate=estimate, **correlation)
            for proxy, estimate in estimates.items()
        ),
        "missing": tuple(Change(layers=(x,)) for x in sorted({0, 1, 2, 3} - set(layers))),
        "provenance": {"torch": "2.13.0", "device": "cpu", "host": "node-7"},
    }
    return template.model_copy(update=changes)


@pytest.fixture(autouse=True)
def _settings(monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    # The retries of the client, but not the seconds that it waits between them.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")


@pytest.fixture
def results(template, tmp_path) -> Path:
    """Write a results folder whose MLflow store exists and is empty."""
    folder = tmp_path / "results"
    folder.mkdir()
    shutil.copy(template, folder / "mlflow.db")
    return folder


@pytest.fixture(scope="session")
def serving(template, tmp_path_factory) -> Iterator[MlflowServer]:
    """Build a real `mlflow server`, for all tests of a worker."""
    with MlflowServer(tmp_path_factory.mktemp("server"), template) as server:
        yield server


@pytest.fixture(scope="session")
def server(serving) -> str:
    """Its address."""
    return serving.address


def file_contents(paths: Iterable[Path]) -> dict[str, bytes]:
    """Read files by name."""
    return {path.name: path.read_bytes() for path in paths}


def sqlite_uri(results: Path) -> str:
    return f"sqlite:///{results / 'mlflow.db'}"


@pytest.fixture(params=["sqlite", "server"])
def uri(request, results) -> str:
    """Where MLflow stores runs: in a file, and on a server."""
    return sqlite_uri(results) if request.param == "sqlite" else request.getfixturevalue("server")


def run_of_kind(component: str, layer: int, span: int, ablation: str, **figures: Any) -> RunRecord:
    figures |= {"component": component, "layer": layer, "span": span, "ablation": ablation}
    return with_change(layer_record(layer, 160), cosine_score=None, **figures)


@pytest.fixture
def double() -> Iterator[WandbDouble]:
    with WandbDouble() as double:
        yield double
        assert double.refused == []


@pytest.fixture
def client(double, tmp_path) -> Client:
    return Client(double, tmp_path)


@pytest.fixture
def lent(client, double, monkeypatch) -> WandbDouble:
    """Install the double as the only W&B of this process."""
    client.lend(monkeypatch)
    return double


@pytest.fixture
def study(tiny_llama, experiment) -> Path:
    """Write an experiment file: both layers of a tiny model, on six documents."""
    return experiment(tiny_llama(layers=2), limit=6, layer=[0, 1], benchmark="copa")


@pytest.fixture
def publish(double, tmp_path) -> Iterator[WandbPublisher]:
    publish = WandbPublisher(Client(double, tmp_path), tmp_path)
    yield publish
    publish.close()
