"""Plain lm-eval, which tracker is compared with: no code of ours."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.evaluator
import lm_eval.tasks
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

TASKS = Path(lm_eval.tasks.__file__).parent
SPLITS = ("training_split", "validation_split", "test_split")


def evaluate(model: Any, **settings: Any) -> dict[str, Any]:
    """Run lm-eval's own loop, but do not let it ask pip, git and compilers what is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
        patch.setattr(lm_eval.evaluator, "get_git_commit_hash", lambda: None)
        evaluation: dict[str, Any] = lm_eval.simple_evaluate(model, bootstrap_iters=0, **settings)
    return evaluation


def metric_value(results: Mapping[str, Any], task: str, metric: str) -> float:
    """Return lm-eval's metric of a task; compute a choice probability from lm-eval's samples."""
    if not metric.startswith("choice_probability"):
        return float(results["results"][task][f"{metric},none"])
    probabilities = []
    for sample in results["samples"][task]:
        scores = [float(response[0][0]) for response in sample["resps"]]
        if metric.endswith("_norm"):
            texts = [continuation.strip() for _, continuation in sample["arguments"]]
            sizes = [len(text.encode()) * math.log(2) for text in texts]
            scores = [score / size for score, size in zip(scores, sizes, strict=True)]
        weights = [math.exp(score) for score in scores]
        probabilities.append(weights[int(sample["target"])] / sum(weights))
    return sum(probabilities) / len(probabilities)


def folder_tasks(folder: Path, **settings: Any) -> lm_eval.tasks.TaskManager:
    """Return the tasks of a folder, and no others."""
    return lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False, **settings)


def write_plain(
    folder: Path, task: str, config: str, kind: str, files: Mapping[str, Path], extra_yaml: str = ""
) -> None:
    """Write a task `plain_…`: one of lm-eval's own, by its file, on files of some kind alone."""
    folder.mkdir(exist_ok=True)
    paths = "".join(f"    {split}: {path}\n" for split, path in files.items())
    empty = "".join(f"{s}: null\n" for s in SPLITS if s.removesuffix("_split") not in files)
    (folder / f"plain_{task}.yaml").write_text(
        f"include: {TASKS / config}\ntask: plain_{task}\ndataset_path: {kind}\n"
        f"dataset_name: null\n{empty}dataset_kwargs:\n  data_files:\n{paths}{extra_yaml}"
    )


def load_model_parts(folder: Path) -> tuple[Any, Any]:
    """Return a model and its tokenizer, as anybody loads them."""
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def cut_layer(model: Any, layer: int | None) -> Any:
    """Take a layer really out of a copy of a Llama, which may have an adapter."""
    model = copy.deepcopy(model)
    if layer is not None:
        del model.model.layers[layer]
        for index, module in enumerate(model.model.layers):
            module.self_attn.layer_idx = index
        model.config.num_hidden_layers -= 1
    return model


@torch.no_grad()
def predict_tokens(model: Any, ids: list[int], prefix: int, length: int) -> tuple[int, float]:
    """Predict one token at a time; a block of tokens sees up to the model's length before its end.

    How many are right, and the loss of all in nats.
    """
    hits, loss = 0, 0.0
    for index, token in enumerate(ids):
        end = min((index // length + 1) * length, len(ids))
        context = [prefix, *ids][max(0, end - length) : index + 1]
        logprobs = model(torch.tensor([context])).logits[0, -1].log_softmax(-1)
        hits += int(logprobs.argmax()) == token
        loss -= float(logprobs[token])
    return hits, loss


class RecordingModel(HFLM):  # type: ignore[misc]
    """lm-eval's own model that records its requests and answers nothing."""

    def __init__(self, model: Any, tokenizer: Any, **settings: Any) -> None:
        super().__init__(model, tokenizer=tokenizer, backend="causal", batch_size=1, **settings)
        self.tokens: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.prompts: list[tuple[str, Any]] = []

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        self.tokens += [(tuple(context), tuple(answer)) for _, context, answer in requests]
        return [(-1.0, False)] * len(requests)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        self.prompts = [(request.args[0], request.args[1]) for request in requests]
        return [""] * len(requests)


def request_tokens(documents: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Return the requests of our documents in the form in which `Asked` records them."""
    return [(r.context, r.continuation) for document in documents for r in document.requests]


def write_rows(folder: Path, **splits: Iterable[Any]) -> Path:
    """Write a data set's splits; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        lines = (json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


CORPUS_PATHS = {
    "wikitext": ("EleutherAI/wikitext_document_level/wikitext-2-raw-v1", "page", "test"),
    "c4": ("allenai/c4/en", "text", "validation"),
}


AGGREGATIONS = {
    "word_perplexity": "weighted_perplexity",
    "byte_perplexity": "weighted_perplexity",
    "bits_per_byte": "bits_per_byte",
}
