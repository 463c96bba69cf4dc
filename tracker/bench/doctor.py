"""Checks of an installation: does it compute the right numbers on this device?

A tiny mixture of experts with random weights is loaded as models are. Every feature of the engine
computes on the device, and on the CPU each ablation alone on a model that is really changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tracker.bench.features import FEATURES, LAYERS, largest_difference, plain, score
from tracker.core.errors import first_line
from tracker.core.provenance import machine, package_versions
from tracker.engine.scoring.sweep import Engine
from tracker.models.devices import accelerators, describe, free_memory, runtime_versions
from tracker.models.load import SPREAD, find_device, load_model
from tracker.models.placement import weight_bytes
from tracker.models.sources import find_model

WITHIN = 1e-3
"""The largest difference that rounding in float32 may make, as in the self-check."""
MAX_LENGTH = 256
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LENGTH,
    "initializer_range": 0.2,
}
"""Of the tiny Qwen2-MoE; its weights are so large that every layer matters."""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: What was checked.
        difference: The largest difference; None where there is none.
        error: Why the check failed; empty where it passed.
        skipped: Why it was left out; empty where it was not.
    """

    name: str
    difference: float | None = None
    error: str = ""
    skipped: str = ""


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

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON has it."""
        return asdict(self)


def diagnose(device: str, advance: Callable[[int], None] = lambda checks: None) -> Diagnosis:
    """Check this installation on a device.

    Args:
        device: As `--device` takes it.
        advance: Called with 1 after each check.

    Returns:
        What was found; a check that fails does not end it.

    Raises:
        ModelError: There is no such device.
    """
    target, start = find_device(device), time.perf_counter()
    findings = []
    with TemporaryDirectory() as folder:
        _save_model(Path(folder))
        for name, check in _checks(Path(folder), target):
            findings.append(_run(name, check))
            advance(1)
    return Diagnosis(
        device=describe(target),
        free_bytes=free_memory(target),
        float32_precision=torch.get_float32_matmul_precision(),
        machine=machine(),
        versions={**package_versions(), **runtime_versions()},
        findings=findings,
        seconds=time.perf_counter() - start,
    )


CHECKS = len(FEATURES) + 4
"""How many checks there are."""


def _checks(folder: Path, target: torch.device) -> Iterator[tuple[str, Callable[[], float | str]]]:
    """List the checks by name; each returns a difference, or why it is left out."""
    source = find_model(str(folder))

    def load(device: str, **settings: Any) -> Engine:
        loaded = load_model(source, "float32", device, **settings)
        return Engine(loaded, MAX_LENGTH, memory=2**28)

    cpu, on_device = load("cpu"), cache(partial(load, str(target)))
    layer = max(map(weight_bytes, cpu.loaded.layers))
    room = weight_bytes(cpu.loaded.model) - (len(cpu.loaded.layers) - 2) * layer

    def layers_of(other: Engine) -> float:
        return largest_difference(score(other, LAYERS), score(cpu, LAYERS))

    for name, feature in FEATURES.items():
        yield name, lambda: largest_difference(feature(on_device()), feature(plain(cpu)))  # noqa: B023

    def repeat() -> float:
        rows = [score(on_device(), LAYERS) for _ in range(2)]
        difference = largest_difference(*rows)
        if difference:
            raise ValueError(f"a row gives other figures the second time, by {difference:.1e}")
        return difference

    def host() -> float | str:
        if target.type == "cpu":
            return "on a CPU it is where layers are computed"
        return layers_of(load(str(target), weights=room, offload="host"))

    def spread() -> float | str:
        count = len(accelerators())
        return layers_of(load(SPREAD)) if count > 1 else f"{count} accelerators"

    yield "the same row twice", repeat
    yield "layers in the host's memory", host
    yield "layers on disk", lambda: layers_of(load(str(target), weights=room, offload="disk"))
    yield "a model spread over all devices", spread


def _run(name: str, check: Callable[[], float | str]) -> Finding:
    try:
        result = check()
    except Exception as error:  # noqa: BLE001  the other checks go on
        return Finding(name, error=f"{type(error).__name__}: {first_line(error)}")
    if isinstance(result, str):
        return Finding(name, skipped=result)
    wrong = f"differs by {result:.1e}, more than rounding ({WITHIN:.0e})"
    return Finding(name, result, error="" if result <= WITHIN else wrong)


def _save_model(folder: Path) -> None:
    """Save the tiny model, and a tokenizer of one word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        Qwen2MoeForCausalLM(Qwen2MoeConfig(**SHAPE)).save_pretrained(folder)
    words = Tokenizer(WordLevel({"word": 0}, unk_token="word"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
