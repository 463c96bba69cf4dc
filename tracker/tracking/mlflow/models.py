"""Publish pruned models as MLflow transformers models; this code runs in a separate process."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Metric, Param
from typing_extensions import override

from tracker.tracking.base import Models, SavedModel
from tracker.tracking.figures import tracked_name
from tracker.tracking.mlflow.backend import MlflowBackend
from tracker.tracking.mlflow.runs import PARAM_CHARACTERS, source_tags


class MlflowModels(Models):
    """Storage of pruned models in an MLflow experiment.

    The constructor takes the same arguments as the class `MlflowBackend`.
    """

    def __init__(self, project: str, results: Path, tracking_uri: str | None = None) -> None:
        self._backend = MlflowBackend(project, results, tracking_uri)

    @override
    def add_model(self, model: SavedModel) -> str:
        from huggingface_hub import ModelCard

        card = (model.folder / "README.md").read_text(encoding="utf-8")
        user, text = self._backend.user(), ModelCard(card).text
        tags = source_tags("pruned model", model.source_cells, user, text)
        run_id, uri, location = self._backend.begin(model.name, tags)
        with self._backend.connected(f"did not accept {model.name}") as client:
            timestamp, figures = int(time.time() * 1000), model.figures.items()
            packages = ("torch", "transformers")
            requirements = [f"{name}=={version(name).partition('+')[0]}" for name in packages]
            metrics = [Metric(tracked_name(name), value, timestamp, 0) for name, value in figures]
            values = _model_params(model.facts)
            params = [Param(name, value[:PARAM_CHARACTERS]) for name, value in values]
            client.log_batch(run_id, metrics=metrics, params=params, synchronous=True)
            mlflow.set_tracking_uri(uri)
            with mlflow.start_run(run_id=run_id):
                mlflow.transformers.log_model(
                    _load_parts(model.folder),
                    name=model.name,
                    task="text-generation",
                    model_card=ModelCard(card),
                    metadata={"tracker": json.dumps(model.facts)},
                    # Without them, MLflow loads the model again to detect its imports.
                    pip_requirements=requirements,
                    registered_model_name=model.register,
                )
        return location

    @override
    def close(self) -> None:
        self._backend.close()


def _load_parts(folder: Path) -> dict[str, Any]:
    """Load model and tokenizer from a folder, as the dictionary that MLflow's `log_model` takes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return {
        "model": AutoModelForCausalLM.from_pretrained(folder, dtype="auto"),
        "tokenizer": AutoTokenizer.from_pretrained(folder),
    }


def _model_params(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the MLflow params of a pruned model, such as base model and removed layers."""
    yield "model", facts["base"]["source"]
    for name in ("removed", "strategy", "calibration"):
        if facts[name] is not None:
            yield name, str(facts[name])
