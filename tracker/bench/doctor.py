"""Check that an installation computes the right numbers on a device.

The check uses a tiny mixture-of-experts model with random weights. The engine's results on the
device are compared with changed copies of the model on the CPU.
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

from tracker.engine import fitting
from tracker.engine.observers import layer_proxies
from tracker.engine.observers.perturbation_growth import perturbation_growth
from tracker.engine.observers.rounding_error import rounding_errors, weight_errors
from tracker.engine.scoring.generation import prepare_generation
from tracker.engine.scoring.model import PLAIN
from tracker.engine.scoring.row_size import make_documents
from tracker.engine.scoring.sweep import Engine
from tracker.measuring.progress import Progress, report_work
from tracker.models.devices import accelerators, describe_device, free_memory, runtime_versions
from tracker.models.hooks import TRANSFORMERS_LOCK
from tracker.models.load import SPREAD, find_device, load_model
from tracker.models.offloaded import min_weight_bytes
from tracker.models.parts.linear_maps import find_linear_maps
from tracker.models.sources import find_model
from tracker.schema.changes import INTACT, Ablation, Change
from tracker.schema.documents import Document
from tracker.schema.errors import attempt, first_line
from tracker.schema.provenance import describe_machine, package_versions

EngineFeature = Callable[[Engine], Any]
"""Function that computes figures with an engine; the model has at least four layers."""
FEATURE_SWEEPS: Mapping[str, Sequence[Ablation]] = {
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
"""Name of each feature → ablations that test the feature, without the baseline."""


def generate_documents(engine: Engine, common: int = 0) -> list[Document]:
    """Generate three documents whose contexts start with the same `common` tokens."""
    return make_documents(engine, 3, 24 + common, longest=3, beginning=common)


def score_ablations(engine: Engine, ablations: Sequence[Ablation], common: int = 0) -> Any:
    """Score three generated documents under each ablation.

    Returns the scores, and the sums of the proxies. All contexts start with the same `common`
    tokens.
    """
    scores = engine.score(generate_documents(engine, common), [INTACT, *ablations])
    figures = [(r.loglikelihood, r.hits) for s in scores for row in s.responses for r in row]
    return figures, [s.proxy_sums for s in scores]


def score_fitted(engine: Engine) -> Any:
    """Fit replacements for two layers, and score documents with these replacements.

    Returns the scores and proxies, as `score_ablations` does.
    """
    texts = [[*d.requests[0].context, 3, 7, 9] for d in generate_documents(engine)]
    replacements = fitting.fit_replacements(engine, texts, {1, 2}, linear=True)
    fitted = replace(engine, replacements=replacements)
    return score_ablations(fitted, FEATURE_SWEEPS["fitted replacements"])


def generate_tokens(engine: Engine) -> Any:
    """Continue a fixed prompt by greedy decoding under several ablations.

    Returns one list of token numbers for each ablation: the prompt, followed by the generated
    tokens.
    """
    prompt = [5, 9, 23, 7, 80, 41, 3, 11]
    ablations = [INTACT, *FEATURE_SWEEPS["layers"], *FEATURE_SWEEPS["attention and MLP"]]
    model = engine.loaded.model
    ids = torch.tensor([prompt], device=engine.loaded.device)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if not engine.sharing.depth:  # each on the really changed model
        models = (engine.ablate(ablation).loaded.model for ablation in ablations)
        return [changed.generate(ids, **settings)[0].tolist() for changed in models]
    with prepare_generation(engine, ablations, prompt) as cache, torch.inference_mode():
        return model.generate(ids.repeat(len(ablations), 1), **settings, **cache).tolist()


def observe_maps(engine: Engine) -> Any:
    """Measure the errors of two linear maps after their weights are rounded to int8."""
    paths = [*find_linear_maps(engine.loaded.layers[1], "layer 1")]
    maps = [Change.parse(f"int8:1.{path}") for path in (paths[0], paths[-1])]
    return weight_errors(engine, maps), rounding_errors(engine, generate_documents(engine)[0], maps)


def _observer(observe: Callable[..., Any], *arguments: Any) -> EngineFeature:
    return lambda engine: observe(engine, generate_documents(engine)[0], *arguments)


_LAYERS = FEATURE_SWEEPS["layers"]
_EXPERTS = [Change.parse("expert:1.0"), Change.parse("expert:1.1")]
FEATURES: Mapping[str, EngineFeature] = {
    **{name: partial(score_ablations, ablations=sweep) for name, sweep in FEATURE_SWEEPS.items()},
    "layers after a common beginning": partial(score_ablations, ablations=_LAYERS, common=60),
    "fitted replacements": score_fitted,
    "generation": generate_tokens,
    "output proxies": _observer(layer_proxies.output_proxies),
    "divergences": _observer(layer_proxies.divergences, _LAYERS[:2]),
    "perturbation growth": _observer(perturbation_growth, 2),
    "span similarity": _observer(layer_proxies.measure_state_changes),
    "expert load": _observer(layer_proxies.measure_expert_load, _EXPERTS),
    "rounding errors": observe_maps,
}


def largest_difference(first: Any, second: Any) -> float:
    """Return the largest difference between corresponding numbers of two results.

    If an absolute value exceeds 1, the difference is relative to the larger number. The result is
    infinite if shapes or keys are unequal, or if only one of two numbers is NaN.
    """
    if isinstance(first, Mapping):
        if first.keys() != second.keys():
            return math.inf
        return largest_difference([*first.values()], [*second.values()])
    if isinstance(first, list | tuple):
        if len(first) != len(second):
            return math.inf
        return max(map(largest_difference, first, second), default=0.0)
    a, b = (np.asarray(figures, dtype=float) for figures in (first, second))
    if a.shape != b.shape or (np.isnan(a) != np.isnan(b)).any():
        return math.inf
    # Values that are undefined in both become a difference of 0.
    scale = np.maximum(np.maximum(np.abs(a), np.abs(b)), 1)
    return float(np.nan_to_num(np.abs(a - b) / scale).max(initial=0))


TINY_CONFIG = Path(__file__).with_suffix(".json")
"""Configuration of the tiny model; its weights are so large that every layer matters."""
MAX_ROUNDING = 1e-3
"""Largest difference that float32 rounding may cause, as in the self-check."""
REPEATED_CHECK = "the same row twice"
"""Name of the only check that allows no difference at all."""


@dataclass(frozen=True)
class CheckResult:
    """Result of one check of an installation.

    Attributes:
        name: The name of the check.
        difference: Largest difference between device and reference; None if no difference was
            computed.
        error: Reason why the check failed; "" if the check passed.
    """

    name: str
    difference: float | None
    error: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Results of all checks of an installation on one device."""

    device: dict[str, str]
    free_bytes: int
    float32_precision: str
    machine: dict[str, str]
    versions: dict[str, str]
    findings: list[CheckResult]
    seconds: float

    @property
    def failures(self) -> list[CheckResult]:
        """List of the failed checks."""
        return [finding for finding in self.findings if finding.error]


def diagnose(device: str, progress: Progress) -> Diagnosis:
    """Run all checks of this installation on a device, even if some checks fail.

    Raises ModelError if the device does not exist.
    """
    torch_device, start_time = find_device(device), time.perf_counter()
    with TemporaryDirectory() as folder:
        _save_tiny_model(Path(folder))
        checks = _list_checks(folder, torch_device)
        with report_work(progress, "checking", len(checks), "checks"):
            findings = [_run_check(name, check, progress) for name, check in checks.items()]
    return Diagnosis(
        device=describe_device(torch_device),
        free_bytes=free_memory(torch_device),
        float32_precision=torch.get_float32_matmul_precision(),
        machine=describe_machine(),
        versions={**package_versions(), **runtime_versions()},
        findings=findings,
        seconds=time.perf_counter() - start_time,
    )


def _list_checks(folder: str, torch_device: torch.device) -> Mapping[str, Callable[[], float]]:
    """Return the checks of a device: name → function.

    A check computes a result twice, usually on the device and on the CPU, and returns the largest
    difference. `folder` contains the tiny model.
    """
    source = find_model(folder)

    def load(device: str, **settings: Any) -> Engine:
        loaded = load_model(source, "float32", device, **settings)
        return Engine(loaded, loaded.model.config.max_position_embeddings, memory=2**28)

    cpu, tested = load("cpu").with_sharing(PLAIN), cache(partial(load, str(torch_device)))
    layers, weight_bytes = FEATURES["layers"], min_weight_bytes(cpu.loaded.model)

    def compare(engine: Callable[[], Engine], feature: EngineFeature = layers) -> float:
        return largest_difference(feature(engine()), feature(cpu))

    checks: dict[str, Callable[[], float]] = {
        name: partial(compare, tested, feature) for name, feature in FEATURES.items()
    }
    checks[REPEATED_CHECK] = lambda: largest_difference(layers(tested()), layers(tested()))
    for offload in ("disk",) if torch_device.type == "cpu" else ("disk", "host"):
        offloaded = partial(load, str(torch_device), weights=weight_bytes, offload=offload)
        checks[f"layers offloaded: {offload}"] = partial(compare, offloaded)
    if (count := len(accelerators())) > 1:
        checks[f"a model spread over {count} devices"] = partial(compare, partial(load, SPREAD))
    return checks


def _run_check(name: str, check: Callable[[], float], progress: Progress) -> CheckResult:
    allowed = 0 if name == REPEATED_CHECK else MAX_ROUNDING
    difference = attempt(check)
    progress.advance(1)
    if isinstance(difference, Exception):
        return CheckResult(name, None, f"{type(difference).__name__}: {first_line(difference)}")
    return CheckResult(name, difference, f"more than {allowed:g}" if difference > allowed else "")


def _save_tiny_model(folder: Path) -> None:
    """Save the tiny test model and a minimal tokenizer in a folder."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    with TRANSFORMERS_LOCK, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        config = AutoConfig.from_pretrained(TINY_CONFIG)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    vocabulary = Tokenizer(WordLevel({"word": 0}, unk_token="word"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary).save_pretrained(folder)
