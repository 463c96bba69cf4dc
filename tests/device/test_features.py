"""Every feature of the engine computes on a device what it computes on the CPU, to the bit."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.conftest import cli
from tests.helpers.engines import VerdictMemory, make_documents
from tests.helpers.families import FAMILIES
from tracker.bench.doctor import (
    FEATURE_SWEEPS,
    FEATURES,
    EngineFeature,
    diagnose,
    largest_difference,
)
from tracker.engine.observers.layer_proxies import output_proxies
from tracker.engine.observers.taylor import measure_kl_gradients, measure_taylor
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.model import DEPTH_ONLY, ONE_BY_ONE, PLAIN
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck.check import check_sharing
from tracker.measuring.progress import Silent
from tracker.schema.changes import INTACT, Change
from tracker.schema.errors import CellError

NO_EXPERTS = {"experts", "shared experts", "expert load"}
UNDEFINED = dict.fromkeys(("llama", "gpt2", "gemma3_mixed"), NO_EXPERTS)
UNDEFINED |= {"qwen2_moe": set(), "bloom": NO_EXPERTS | {"heads", "generation"}}
WITHOUT_FLOAT64 = ("layers", *[*FEATURES][[*FEATURES].index("fitted replacements") :])
CHECKS = len(FEATURES) + 4
"""Features, a repeated row, offloading to the host and to disk, spreading."""


def outcome(feature: EngineFeature, engine: Engine) -> Any:
    """Return what a feature computes, or why the model cannot be used so."""
    try:
        figures = feature(engine)
    except (CellError, RefusalError) as error:
        return str(error)
    if isinstance(figures, dict):
        # The simulated device computes the gradients of attention from other parts than the CPU.
        figures.pop("gate_gradient", None)
    return figures


@pytest.mark.parametrize("family", UNDEFINED)
@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature(engines, family, feature):
    pair = (engine.with_sharing(FAMILIES[family].sharing) for engine in engines(family))
    cpu, device = (outcome(FEATURES[feature], engine) for engine in pair)
    assert isinstance(cpu, str) == isinstance(device, str) == (feature in UNDEFINED[family])
    assert cpu == device if isinstance(cpu, str) else largest_difference(cpu, device) == 0


@pytest.mark.parametrize("sharing", [PLAIN, DEPTH_ONLY, ONE_BY_ONE])
def test_less_sharing(engines, sharing):
    pair = (engine.with_sharing(sharing) for engine in engines("llama"))
    assert largest_difference(*map(FEATURES["attention and MLP"], pair)) == 0


def test_the_self_check(engines):
    verdicts = VerdictMemory()
    documents = make_documents(3)
    layers = [INTACT, *FEATURE_SWEEPS["layers"]]
    checks = [check_sharing(engine, documents, layers, verdicts) for engine in engines("llama")]
    assert len({(c.difference, str(c.engine.sharing), c.sharing_note) for c in checks}) == 1
    assert sum("confirmed" in text for text in verdicts.values()) == 2, "each device has its own"


def test_gradients(engines):
    document = make_documents(1)[0]
    sums = [output_proxies(engine, document, "gate_gradient") for engine in engines("llama")]
    assert largest_difference(*sums) < 1e-5


TAYLOR_CHANGES = {
    "llama": ("head:1.3", "attention:0", "mlp:3", "int4:1.self_attn.q_proj"),
    "qwen2_moe": ("expert:1.2", "shared_expert:2"),
}


@pytest.mark.parametrize("family", TAYLOR_CHANGES)
def test_taylor_terms(engines, family):
    document = make_documents(1)[0]
    changes = [Change.parse(text) for text in TAYLOR_CHANGES[family]]
    on_cpu, on_device = (measure_taylor(engine, document, changes) for engine in engines(family))
    assert on_device == pytest.approx(on_cpu, rel=1e-4)
    rounded = [change for change in changes if change.intervention != "remove"]
    if rounded:
        sums = (measure_kl_gradients(engine, [document], rounded) for engine in engines(family))
        assert next(sums) == [pytest.approx(next(sums)[0], rel=1e-3, nan_ok=True)]


@pytest.mark.parametrize("feature", WITHOUT_FLOAT64)
def test_a_device_without_float64(engines, monkeypatch, feature):
    """As Apple's: figures are equal but for the rounding of float32."""
    monkeypatch.setenv("SIM_NO_FLOAT64", "1")
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(1, dtype=torch.float64, device="sim")
    assert largest_difference(*map(FEATURES[feature], engines("qwen2_moe"))) < 1e-5


def test_every_check_of_the_doctor_passes():
    result = cli("doctor", "--device", "sim:1", "--json")
    assert result.exit_code == 0, result.output
    diagnosis = json.loads(result.stdout)
    assert diagnosis["device"] == {"device": "sim:1", "accelerator": "simulated"}
    assert len(diagnosis["findings"]) == CHECKS


def test_a_device_on_which_nothing_can_be_loaded(monkeypatch):
    """Every check fails by itself, and says why."""
    monkeypatch.setenv("SIM_MEMORY", "1000")
    diagnosis = diagnose("sim", Silent())
    assert len(diagnosis.findings) == CHECKS
    assert {finding.name for finding in diagnosis.failures} >= {*FEATURES}
