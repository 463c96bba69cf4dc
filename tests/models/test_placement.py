"""How much memory there is for a model, and on how many devices: arithmetic, without any device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tracker.models import placement
from tracker.models.placement import devices_for, free_memory, least_free, share_memory

GIB = 2**30


def test_what_is_free_on_the_fullest_device_counts(monkeypatch):
    """Streams are widest on the device of the last layers, and not where the model's inputs go."""
    free = {"cuda:0": 30, "cuda:1": 7, "cuda:2": 2}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[str(device)], 80))
    parts = [torch.device("cuda", n) for n in (0, 0, 1)]
    weights = [SimpleNamespace(device=part, is_meta=False) for part in parts]
    weights.append(SimpleNamespace(device=torch.device("meta"), is_meta=True))
    assert least_free(SimpleNamespace(parameters=lambda: weights), parts[0]) == 7
    assert least_free(SimpleNamespace(parameters=lambda: weights[3:]), parts[0]) == 30


def test_processes_part_the_hosts_memory_and_no_devices(monkeypatch):
    monkeypatch.setattr(placement, "_parts_of_memory", 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 80))
    monkeypatch.setattr(
        placement.psutil, "virtual_memory", lambda: SimpleNamespace(available=24 * GIB)
    )
    assert free_memory(torch.device("cpu")) == 24 * GIB
    share_memory(3)
    assert free_memory(torch.device("cpu")) == 8 * GIB
    assert free_memory(torch.device("cuda")) == 30


@pytest.mark.parametrize(
    ("weights", "devices", "needed"),
    [
        (16, 8, 1),
        (71, 8, 1),  # 71 of 79 fit on one
        (72, 8, 2),
        (141, 8, 3),  # as of 70B in two bytes each: on two there were no room for streams
        (141, 4, 3),
        (141, 2, 1),  # not even on both: each brings the layers in
    ],
)
def test_as_many_devices_as_the_weights_need(weights, devices, needed):
    assert devices_for(weights * GIB, 79 * GIB, devices) == needed
