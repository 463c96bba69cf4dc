"""Memory of a device: layers that do not fit, several devices, and memory that runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import accelerate
import pytest
import torch

from tests.device.conftest import DEVICE
from tests.device.simulated import counters
from tests.helpers.engines import MAX_LENGTH, assert_same_scores, make_documents, save_model
from tests.helpers.families import tiny_model
from tracker.bench.doctor import FEATURE_SWEEPS, FEATURES, largest_difference
from tracker.engine.scoring import row_size
from tracker.engine.scoring.sweep import HALVED_NOTE, Engine
from tracker.models import devices
from tracker.models.load import find_device, load_model
from tracker.models.offloaded import min_weight_bytes, weight_bytes
from tracker.schema.changes import INTACT

score_layers = FEATURES["layers"]


@pytest.fixture
def load(tmp_path) -> Callable[..., Engine]:
    """Load a tiny Llama, with room for some layers where it computes."""
    model = tiny_model("llama")
    source = save_model(model, tmp_path)

    def make(device: str = "cpu", staying: int | None = None, **settings: Any) -> Engine:
        weights = None if staying is None else min_weight_bytes(model, staying)
        loaded = load_model(source, "float32", device, weights=weights, **settings)
        return Engine(loaded, MAX_LENGTH, memory=2**28, row_tokens=40, row_multiple=8)

    return make


@pytest.mark.parametrize("device", ["auto", "sim", "sim:0", "sim:1"])
@pytest.mark.parametrize("staying", [0, 1])
@pytest.mark.parametrize("offload", ["host", "disk"])
def test_layers_that_do_not_fit(load, device, staying, offload):
    """Two layers at a time, or one more that stays where it is computed."""
    engine = load(device, staying, offload=offload)
    assert len(engine.loaded.offloaded.load_counts) == 4 - staying
    assert largest_difference(score_layers(engine), score_layers(load())) == 0
    assert counters.counts()["h2d pinned, does not block"] if offload == "host" else True


@pytest.mark.parametrize("method", ["wait_event", "wait_stream"])
def test_streams_that_do_not_wait_are_noticed(load, monkeypatch, method):
    """The test above would see weights that are used, or written over, too early."""
    engine = load("auto", 0, offload="host")
    deaf_stream = type("Deaf", (torch.Stream,), {method: lambda stream, event: None})

    def make(stream: Any) -> Any:
        return deaf_stream(stream.stream_id, stream.device_index, stream.device_type)

    current, weights = torch.sim.current_stream, engine.loaded.offloaded
    monkeypatch.setattr(torch.sim, "current_stream", lambda device: make(current(device)))
    monkeypatch.setattr(weights, "_stream", make(weights._stream))
    score_layers(engine)
    assert counters.races()
    counters.reset()


def test_pinned_memory_takes_what_the_weights_take(load):
    """torch pins powers of two; parts of a layer that are such powers waste a megabyte at most."""
    before = counters.pinned_bytes()
    engine = load("auto", 0, offload="host")
    pinned = counters.pinned_bytes() - before
    assert 0 < pinned <= sum(weight_bytes(p) + devices.PINNED_BLOCK for p in engine.loaded.layers)
    for size in (1, devices.PINNED_BLOCK, 5 * devices.PINNED_BLOCK, 7 * devices.PINNED_BLOCK - 1):
        before = counters.pinned_bytes()
        parts = devices.allocate_pinned(size)
        assert (
            counters.pinned_bytes() - before
            == -(-size // devices.PINNED_BLOCK) * devices.PINNED_BLOCK
        )
        assert sum(map(len, parts)) >= size
        del parts


def test_a_model_spread_over_devices(load):
    """accelerate's own map does not know the simulated device, so it is given one."""
    engine, plain_engine = load(), load()
    first_modules = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1")
    last_modules = ("model.layers.2", "model.layers.3", "model.norm", "lm_head")
    device_map = dict.fromkeys(first_modules, "sim:0") | dict.fromkeys(last_modules, "sim:1")
    model = accelerate.dispatch_model(plain_engine.loaded.model, device_map, main_device="sim:0")
    spread_engine = replace(
        plain_engine, loaded=replace(plain_engine.loaded, model=model, device=DEVICE)
    )
    for feature in ("layers", "attention and MLP", "repeated layers"):
        assert largest_difference(*map(FEATURES[feature], (spread_engine, engine))) == 0


@pytest.mark.parametrize("fits", [0.8, 0.5])
def test_a_row_that_does_not_fit_is_halved(engines, monkeypatch, fits):
    """The device is full when all documents are read at once."""
    cpu, device = engines("llama", row_tokens=400)
    documents, progress, ablations = make_documents(6), [], [INTACT, *FEATURE_SWEEPS["layers"]]
    counters.reset_peak(0)
    old_failures = counters.memory(0)[3]  # of other tests
    device.score(documents, ablations)
    allocated, _, peak, failures = counters.memory(0)
    assert failures == old_failures
    monkeypatch.setenv("SIM_MEMORY", str(int(allocated + (peak - allocated) * fits)))
    assert_same_scores(
        device.score(documents, ablations, progress.append), cpu.score(documents, ablations)
    )
    assert device.notes == [HALVED_NOTE]
    assert counters.memory(0)[3] > old_failures
    assert sum(progress) >= sum(len(d.requests) for d in documents) * len(ablations)


def test_what_torch_keeps_for_later_is_free(engines):
    """Each new engine of a cell has the budget of the first."""
    _, engine = engines("llama", memory=None)
    gc.collect()  # what moving the model has left
    budgets = []
    for _ in range(3):
        engine = replace(engine)
        budgets.append(engine.budget)
        score_layers(engine)
        gc.collect()
    assert len(set(budgets)) == 1


def test_devices_are_found_by_torch(monkeypatch):
    assert devices.default_device() == find_device("auto") == find_device("sim") == DEVICE
    assert devices.accelerators() == [DEVICE, torch.device("sim:1")]
    assert devices.total_memory(DEVICE) == counters.mem_get_info(0)[1]
    assert devices.visible_variable() == "SIM_VISIBLE_DEVICES"
    monkeypatch.setenv("SIM_VISIBLE_DEVICES", "4,7,9")
    assert devices.visible_accelerators() == ["4", "7"]
    devices.synchronize()
    assert counters.counts()["synchronize"] == 1


def test_rows_of_several_sizes_are_tried(engines, monkeypatch):
    """On a device whatever the dtype; answers are those of any other size."""
    monkeypatch.setattr(row_size, "ACCELERATOR_ROW_SIZES", (128, 64, 256))
    cpu, device = engines("llama", row_tokens=None)
    assert not row_size.is_worth_timing(cpu)
    assert row_size.is_worth_timing(device)
    nodes = row_size.find_row_size(device)
    assert nodes in (64, 128, 256)
    pair = (replace(engine, row_tokens=nodes) for engine in (device, cpu))
    assert largest_difference(*map(score_layers, pair)) == 0
