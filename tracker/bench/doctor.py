"""Checks of an installation: does it compute the right numbers on this device?

A tiny mixture of experts with random weights is loaded as models are. Every feature of the engine
computes on the device, and on the CPU each ablation alone on a model that is really changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tracker.bench.features import FEATURES, Feature, largest_difference
from tracker.core.errors import first_line
from tracker.core.provenance import machine, package_versions
from tracker.engine.scoring.sharing import PLAIN
from tracker.engine.scoring.sweep import Engine
from tracker.measuring.progress import Progress, telling
from tracker.models.devices import accelerators, describe, free_memory, runtime_versions
from tracker.models.load import SPREAD, find_device, load_model
from tracker.models.placement import least_bytes
from tracker.models.sources import find_model

CONFIG = Path(__file__).with_suffix(".json")
"""Configuration of the tiny model; its weights are so large that every layer matters."""
WITHIN = 1e-3
"""Largest difference that rounding in float32 may make, as in the self-check."""
REPEATED = "the same row twice"
"""The check that allows no difference."""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: What was checked.
        difference: The largest difference; None where there is none.
        error: Why the check failed; empty where it passed.
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
    """Check this installation on a device; a check that fails does not end the others.

    ModelError if there is no such device.
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
    """List the checks by name; each returns the largest difference."""
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
    try:
        difference = check()
    except Exception as error:  # noqa: BLE001  the other checks go on
        return Finding(name, None, f"{type(error).__name__}: {first_line(error)}")
    finally:
        progress.advance(1)
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
