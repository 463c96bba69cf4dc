"""`tracker doctor` on the CPU: what passes, what fails, and that a failure does not end it."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.conftest import cli, printed, refused
from tracker.bench import doctor
from tracker.bench.doctor import FEATURES, largest_difference
from tracker.engine.scoring.rows import Row

CHECKS = len(FEATURES) + 2
pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_sound_installation():
    output = printed("doctor", "--device", "cpu")
    assert output.count(" ok") == CHECKS
    assert "FAILED" not in output


def test_wrong_numbers_and_errors_are_failures(monkeypatch):
    """Tokens see their sisters, and one feature raises; the other checks go on."""

    def fail(engine: object) -> float:
        raise RuntimeError("no kernel image is available")

    everything = property(lambda row: torch.ones(row.tokens, row.tokens, dtype=torch.bool).tril())
    monkeypatch.setattr(Row, "ancestors", everything)
    monkeypatch.setitem(FEATURES, "heads", fail)
    result = cli("doctor", "--device", "cpu", "--json")
    assert result.exit_code == 1
    findings = {f["name"]: f for f in json.loads(result.stdout)["findings"]}
    assert len(findings) == CHECKS
    assert findings["heads"]["error"] == "RuntimeError: no kernel image is available"
    assert findings["layers"]["difference"] > doctor.MAX_ROUNDING
    assert findings["layers"]["error"]
    assert not findings["generation"]["error"]


def test_a_device_that_is_not_there():
    refused(cli("doctor", "--device", "cuda:7"), "cuda:7")


@pytest.mark.parametrize(
    ("figures", "others", "difference"),
    [
        ([(1.0, 2), "a" == "a"], [(1.5, 2), True], 1 / 3),
        ({"sums": torch.tensor([2.0, math.nan])}, {"sums": torch.tensor([1.0, math.nan])}, 0.5),
        ({"sums": torch.tensor([2.0])}, {"other": torch.tensor([2.0])}, math.inf),
        (torch.tensor([math.nan]), torch.tensor([1.0]), math.inf),
        ([1.0], [1.0, 2.0], math.inf),
        (torch.zeros(2), torch.zeros(3), math.inf),
        ([], [], 0),
    ],
)
def test_the_largest_difference(figures, others, difference):
    assert largest_difference(figures, others) == pytest.approx(difference)
