"""`tracker doctor` on the simulated device: all is well there, or nothing."""

from __future__ import annotations

import json

from tests.conftest import cli
from tracker.bench.doctor import diagnose
from tracker.bench.features import FEATURES
from tracker.measuring.progress import Silent

OTHERS = {"the same row twice", "a model spread over 2 devices"}
OTHERS |= {f"layers offloaded: {memory}" for memory in ("host", "disk")}


def test_every_check_passes():
    result = cli("doctor", "--device", "sim:1", "--json")
    assert result.exit_code == 0, result.output
    diagnosis = json.loads(result.stdout)
    assert diagnosis["device"] == {"device": "sim:1", "accelerator": "simulated"}
    assert {finding["name"] for finding in diagnosis["findings"]} == {*FEATURES} | OTHERS


def test_a_device_on_which_nothing_can_be_loaded(monkeypatch):
    """Every check fails by itself, and says why."""
    monkeypatch.setenv("SIM_MEMORY", "1000")
    diagnosis = diagnose("sim", Silent())
    assert len(diagnosis.findings) == len(FEATURES) + len(OTHERS)
    assert {finding.name for finding in diagnosis.failures} >= {*FEATURES}
