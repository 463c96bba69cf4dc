"""One module asks torch about devices; what it says of the CPU. Others: `tests/device`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import tracker
from tracker.models import devices

ASKING = re.compile(r"torch\.(cuda|mps|xpu|npu|hpu|backends|accelerator|get_device_module)\b")


def test_no_other_module_asks_torch_about_devices():
    folder = Path(tracker.__file__).parent
    modules = {p for p in folder.rglob("*.py") if ASKING.search(p.read_text(encoding="utf-8"))}
    # A program of its own, which imports nothing of tracker.
    program = folder / "export" / "serving_process.py"
    assert modules == {folder / "models" / "devices.py", program}


@pytest.mark.parametrize(
    ("hip", "variable", "names"),
    [(None, "CUDA_VISIBLE_DEVICES", ["5", "6"]), ("6.2", "HIP_VISIBLE_DEVICES", ["2", "3"])],
)
def test_names_of_visible_accelerators(monkeypatch, hip, variable, names):
    """On ROCm HIP's variable comes before CUDA's, which it obeys too."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(devices, "accelerators", lambda: [torch.device("cuda", n) for n in (0, 1)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6,7")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "2,3")
    assert devices.visible_variable() == variable
    assert devices.visible_accelerators() == names
    monkeypatch.delenv("HIP_VISIBLE_DEVICES")
    assert devices.visible_accelerators() == ["5", "6"]
