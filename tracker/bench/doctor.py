"""Checks that an installation computes the right numbers on this device.

A tiny mixture of experts with random weights is loaded as models are. Every feature of the engine
(`FEATURES`) is computed on the device. The reference computes each ablation alone on the CPU, on a
really changed model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from tracker.core.changes import INTACT, Ablation, Change
from tracker.core.documents import Document
from tracker.core.errors import attempt, first_line
from tracker.core.provenance import machine, package_versions
from tracker.engine import fitting
from tracker.engine.observers.layer_proxies import (
    divergences,
    expert_load,
    output_proxies,
    span_similarity,
)
from tracker.engine.observers.perturbation_growth import perturbation_growth
from tracker.engine.observers.rounding_error import rounding_errors, weight_errors
from tracker.engine.scoring.generation import generating
from tracker.engine.scoring.model import PLAIN
from tracker.engine.scoring.row_size import make_documents
from tracker.engine.scoring.sweep import Engine
from tracker.measuring.progress import Progress, telling
from tracker.models.devices import accelerators, describe, free_memory, runtime_versions
from tracker.models.load import SPREAD, find_device, load_model
from tracker.models.offloaded import least_bytes
from tracker.models.parts.linear_maps import linear_maps
from tracker.models.sources import find_model

Feature = Callable[[Engine], Any]
"""Function that computes figures, for any engine of a model with four layers or more."""
SWEEPS: Mapping[str, Sequence[Ablation]] = {
    name: [Ablation.parse(text) for text in texts.split()]
    for name, texts in {
        "layers": "layer:0 layer:1 layer:2 layer:3 layers:1,2",
        "attention and MLP": "attention:0 attention:2 mlp:0 mlp:2 layer:2+attention:0+mlp:3",
        "heads": "head:1.0 head:1.1 head:3.0 head:3.1",
        "experts": "expert:1.0 expert:1.1 expert:3.0 expert:3.1",
        "shared experts": "shared_expert:1 shared_expert:3",
        "weight formats": "int8:2 int4_row:2 fp8:2",
        "formats of embedding and head": "int4_row:embedding int4_row:lm_head",
        "repeated layers": "repeat:1-2",
        "fitted replacements": "mean:1 mean:2 scale:1 scale:2 linear:1 linear:2",
    }.items()
}
"""Ablations of each kind, besides the baseline, by name."""


def documents_for(engine: Engine, beginning: int = 0) -> list[Document]:
    """Generate three documents, whose contexts begin with `beginning` common tokens."""
    return make_documents(engine, 3, 24 + beginning, longest=3, beginning=beginning)


def score(engine: Engine, ablations: Sequence[Ablation], beginning: int = 0) -> Any:
    """Score documents under ablations and the baseline: responses, and sums of the proxies."""
    scores = engine.score(documents_for(engine, beginning), [INTACT, *ablations])
    figures = [(r.loglikelihood, r.hits) for s in scores for row in s.responses for r in row]
    return figures, [s.proxy_sums for s in scores]


def score_fitted(engine: Engine) -> Any:
    """Fit replacements for two layers, and score with them."""
    texts = [[*d.requests[0].context, 3, 7, 9] for d in documents_for(engine)]
    replacements = fitting.fit(engine, texts, {1, 2}, linear=True)
    return score(replace(engine, replacements=replacements), SWEEPS["fitted replacements"])


def generate(engine: Engine) -> Any:
    """Continue a prompt greedily under ablations."""
    prompt = [5, 9, 23, 7, 80, 41, 3, 11]
    ablations = [INTACT, *SWEEPS["layers"], *SWEEPS["attention and MLP"]]
    model = engine.loaded.model
    ids = torch.tensor([prompt], device=engine.loaded.device)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if not engine.sharing.depth:  # each on the really changed model
        models = (engine.without(ablation).loaded.model for ablation in ablations)
        return [changed.generate(ids, **settings)[0].tolist() for changed in models]
    with generating(engine, ablations, prompt) as cache, torch.inference_mode():
        return model.generate(ids.repeat(len(ablations), 1), **settings, **cache).tolist()


def observe_maps(engine: Engine) -> Any:
    """Measure two linear maps in a format: errors of weights, and of outputs."""
    paths = [*linear_maps(engine.loaded.layers[1], "layer 1")]
    maps = [Change.parse(f"int8:1.{path}") for path in (paths[0], paths[-1])]
    return weight_errors(engine, maps), rounding_errors(engine, documents_for(engine)[0], maps)


def _observe(observer: Callable[..., Any], *arguments: Any) -> Feature:
    return lambda engine: observer(engine, documents_for(engine)[0], *arguments)


FEATURES: Mapping[str, Feature] = {
    **{name: partial(score, ablations=ablations) for name, ablations in SWEEPS.items()},
    "layers after a common beginning": partial(score, ablations=SWEEPS["layers"], beginning=60),
    "fitted replacements": score_fitted,
    "generation": generate,
    "output proxies": _observe(output_proxies),
    "divergences": _observe(divergences, SWEEPS["layers"][:2]),
    "perturbation growth": _observe(perturbation_growth, 2),
    "span similarity": _observe(span_similarity),
    "expert load": _observe(expert_load, [Change.parse("expert:1.0"), Change.parse("expert:1.1")]),
    "rounding errors": observe_maps,
}


def largest_difference(figures: Any, others: Any) -> float:
    """Return the largest difference of two results of a feature, above 1 relative to the larger.

    It is infinite if a value is undefined, or has another shape, in only one of them.
    """
    if isinstance(figures, Mapping):
        same = figures.keys() == others.keys()
        return largest_difference([*figures.values()], [*others.values()]) if same else math.inf
    if isinstance(figures, list | tuple):
        if len(figures) != len(others):
            return math.inf
        return max(map(largest_difference, figures, others), default=0.0)
    first, second = (np.asarray(array, dtype=float) for array in (figures, others))
    if first.shape != second.shape or (np.isnan(first) != np.isnan(second)).any():
        return math.inf
    scale = np.maximum(np.maximum(np.abs(first), np.abs(second)), 1)
    return float(np.nan_to_num(np.abs(first - second) / scale).max(initial=0))


CONFIG = Path(__file__).with_suffix(".json")
"""Configuration of the tiny model; its weights are so large that every layer matters."""
WITHIN = 1e-3
"""Largest difference allowed for rounding in float32, as in the self-check."""
REPEATED = "the same row twice"
"""Name of the check that allows no difference."""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: The name of the check.
        difference: The largest difference; None if there is none.
        error: The reason why the check failed; empty if it passed.
    """

    name: str
    difference: float | None
    error: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """An installation, its device, and the findings of its checks."""

    device: dict[str, str]
    free_bytes: int
    float32_precision: str
    machine: dict[str, str]
    versions: dict[str, str]
    findings: list[Finding]
    seconds: float

    @property
    def failures(self) -> list[Finding]:
        """The checks that failed."""
        return [finding for finding in self.findings if finding.error]


def diagnose(device: str, progress: Progress) -> Diagnosis:
    """Check this installation on a device; a failed check does not stop the others.

    Raises ModelError if there is no such device.
    """
    target, start = find_device(device), time.perf_counter()
    with TemporaryDirectory() as folder:
        _save_model(Path(folder))
        checks = _checks(folder, target)
        with telling(progress, "checking", len(checks), "checks"):
            findings = [_run(name, check, progress) for name, check in checks.items()]
    return Diagnosis(
        device=describe(target),
        free_bytes=free_memory(target),
        float32_precision=torch.get_float32_matmul_precision(),
        machine=machine(),
        versions={**package_versions(), **runtime_versions()},
        findings=findings,
        seconds=time.perf_counter() - start,
    )


def _checks(folder: str, target: torch.device) -> Mapping[str, Callable[[], float]]:
    """Return the checks by name; each returns the largest difference."""
    source = find_model(folder)

    def load(device: str, **settings: Any) -> Engine:
        loaded = load_model(source, "float32", device, **settings)
        return Engine(loaded, loaded.model.config.max_position_embeddings, memory=2**28)

    cpu, on_device = load("cpu").with_sharing(PLAIN), cache(partial(load, str(target)))
    layers, room = FEATURES["layers"], least_bytes(cpu.loaded.model)

    def compare(make: Callable[[], Engine], feature: Feature = layers) -> float:
        return largest_difference(feature(make()), feature(cpu))

    checks: dict[str, Callable[[], float]] = {
        name: partial(compare, on_device, feature) for name, feature in FEATURES.items()
    }
    checks[REPEATED] = lambda: largest_difference(layers(on_device()), layers(on_device()))
    for offload in ("disk",) if target.type == "cpu" else ("disk", "host"):
        offloaded = partial(load, str(target), weights=room, offload=offload)
        checks[f"layers offloaded: {offload}"] = partial(compare, offloaded)
    if (count := len(accelerators())) > 1:
        checks[f"a model spread over {count} devices"] = partial(compare, partial(load, SPREAD))
    return checks


def _run(name: str, check: Callable[[], float], progress: Progress) -> Finding:
    allowed = 0 if name == REPEATED else WITHIN
    difference = attempt(check)
    progress.advance(1)
    if isinstance(difference, Exception):
        return Finding(name, None, f"{type(difference).__name__}: {first_line(difference)}")
    return Finding(name, difference, f"more than {allowed:g}" if difference > allowed else "")


def _save_model(folder: Path) -> None:
    """Save the tiny model, and a tokenizer of one word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        config = AutoConfig.from_pretrained(CONFIG)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({"word": 0}, unk_token="word"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
