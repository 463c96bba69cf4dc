"""Test the computation of memory and devices for a model, without any device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tracker.models import devices, offloaded
from tracker.models.devices import free_memory, share_memory
from tracker.models.offloaded import devices_needed, min_free_memory

GIB = 2**30


def test_what_is_free_on_the_fullest_device_counts(monkeypatch):
    """Streams are widest on the device of the last layers, and not where the model's inputs go."""
    free_bytes = {"cuda:0": 30, "cuda:1": 7, "cuda:2": 2}
    monkeypatch.setattr(offloaded, "free_memory", lambda device: free_bytes[str(device)])
    devices_used = [torch.device("cuda", n) for n in (0, 0, 1)]
    weights = [
        SimpleNamespace(device=weight_device, is_meta=False) for weight_device in devices_used
    ]
    weights.append(SimpleNamespace(device=torch.device("meta"), is_meta=True))
    assert min_free_memory(SimpleNamespace(parameters=lambda: weights), devices_used[0]) == 7
    assert min_free_memory(SimpleNamespace(parameters=lambda: weights[3:]), devices_used[0]) == 30


def test_processes_share_the_hosts_memory(monkeypatch):
    monkeypatch.setattr(devices, "_host_shares", 1)
    monkeypatch.setattr(
        devices.psutil, "virtual_memory", lambda: SimpleNamespace(available=24 * GIB)
    )
    assert free_memory(torch.device("cpu")) == 24 * GIB
    share_memory(3)
    assert free_memory(torch.device("cpu")) == 8 * GIB


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
    assert devices_needed(weights * GIB, 79 * GIB, devices) == needed
