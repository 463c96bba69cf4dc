"""Memory of a device: layers that do not fit, several devices, and memory that runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import accelerate
import pytest
import torch

from tests.conftest import save_tokenizer
from tests.device.conftest import DEVICE
from tests.device.simulated import counters
from tests.helpers.ablations import single_layers
from tests.helpers.engines import MAX_LENGTH, make_documents, same
from tests.helpers.families import tiny_model
from tests.helpers.truth import layers_of
from tracker.core.changes import INTACT, Ablation
from tracker.engine.scoring import row_size
from tracker.engine.scoring.sweep import HALVED, Engine
from tracker.models import devices
from tracker.models.load import find_device, load_model
from tracker.models.placement import weight_bytes
from tracker.models.sources import find_model

ABLATIONS = single_layers((0, 1, 2, 3))


@pytest.fixture
def load(tmp_path) -> Callable[..., Engine]:
    """Load a tiny Llama, with room for some layers where it computes."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, False)
    layer = max(map(weight_bytes, layers_of(model)))

    def make(device: str = "cpu", room: int = 4, **settings: Any) -> Engine:
        weights = None if room == 4 else weight_bytes(model) + (room - 4) * layer
        loaded = load_model(
            find_model(str(tmp_path)), "float32", device, weights=weights, **settings
        )
        return Engine(loaded, MAX_LENGTH, memory=2**28, row_tokens=40, row_multiple=8)

    return make


def responses(engine: Engine, ablations: Any = ABLATIONS) -> Any:
    """Score some documents."""
    return [scores.responses for scores in engine.score(make_documents(3), ablations)]


@pytest.mark.parametrize("device", ["auto", "sim", "sim:0", "sim:1"])
@pytest.mark.parametrize("room", [2, 3])
@pytest.mark.parametrize("offload", ["host", "disk"])
def test_layers_that_do_not_fit(load, device, room, offload):
    """Two layers at a time, or one more that stays where it is computed."""
    engine = load(device, room, offload=offload)
    assert len(engine.loaded.offloaded.times) == 6 - room
    assert responses(engine) == responses(load())
    assert counters.counts()["h2d pinned, does not block"] if offload == "host" else True


@pytest.mark.parametrize("method", ["wait_event", "wait_stream"])
def test_streams_that_do_not_wait_are_noticed(load, monkeypatch, method):
    """The test above would see weights that are used, or written over, too early."""
    engine = load("auto", 2, offload="host")
    deaf = type("Deaf", (torch.Stream,), {method: lambda stream, other: None})

    def make(stream: Any) -> Any:
        return deaf(stream.stream_id, stream.device_index, stream.device_type)

    current, weights = torch.sim.current_stream, engine.loaded.offloaded
    monkeypatch.setattr(torch.sim, "current_stream", lambda device: make(current(device)))
    monkeypatch.setattr(weights, "_stream", make(weights._stream))
    responses(engine)
    assert counters.races()
    counters.reset()


def test_pinned_memory_takes_what_the_weights_take(load):
    """torch pins powers of two; parts of a layer that are such powers waste a megabyte at most."""
    before = counters.pinned_bytes()
    engine = load("auto", 2, offload="host")
    pinned = counters.pinned_bytes() - before
    assert 0 < pinned <= sum(weight_bytes(part) + devices.ROUNDED for part in engine.loaded.layers)
    for size in (1, devices.ROUNDED, 5 * devices.ROUNDED, 7 * devices.ROUNDED - 1):
        before = counters.pinned_bytes()
        parts = devices.pinned(size)
        assert counters.pinned_bytes() - before == -(-size // devices.ROUNDED) * devices.ROUNDED
        assert sum(map(len, parts)) >= size
        del parts


def test_a_model_spread_over_devices(load):
    """accelerate's own map does not know the simulated device, so it is given one."""
    engine, other = load(), load()
    indices = {"embed_tokens": 0, "rotary_emb": 0, "norm": 1}
    indices |= {f"layers.{layer}": layer // 2 for layer in range(4)}
    device_map = {f"model.{name}": f"sim:{index}" for name, index in indices.items()}
    device_map["lm_head"] = "sim:1"
    model = accelerate.dispatch_model(other.loaded.model, device_map, main_device="sim:0")
    spread = replace(other, loaded=replace(other.loaded, model=model, device=DEVICE))
    sublayers = [Ablation.parse(f"{kind}:{n}") for kind in ("attention", "mlp") for n in range(4)]
    repeats = [INTACT, Ablation.parse("repeat:1-2")]
    for ablations in (ABLATIONS, [INTACT, *sublayers], repeats):
        assert responses(spread, ablations) == responses(engine, ablations)


@pytest.mark.parametrize("fits", [0.8, 0.5])
def test_a_row_that_does_not_fit_is_halved(engines, monkeypatch, fits):
    """The device is full when all documents are read at once."""
    cpu, device = engines("llama", row_tokens=400)
    documents, answered = make_documents(6), []
    counters.reset_peak(0)
    earlier = counters.memory(0)[3]  # of other tests
    device.score(documents, ABLATIONS)
    allocated, _, peak, failures = counters.memory(0)
    assert failures == earlier
    monkeypatch.setenv("SIM_MEMORY", str(int(allocated + (peak - allocated) * fits)))
    same(device.score(documents, ABLATIONS, answered.append), cpu.score(documents, ABLATIONS))
    assert device.notes == [HALVED]
    assert counters.memory(0)[3] > earlier
    assert sum(answered) >= sum(len(d.requests) for d in documents) * len(ABLATIONS)


def test_what_torch_keeps_for_later_is_free(engines):
    """Each new engine of a cell has the budget of the first."""
    _, engine = engines("llama", memory=None)
    gc.collect()  # what moving the model has left
    budgets = []
    for _ in range(3):
        engine = replace(engine)
        budgets.append(engine._budget)
        responses(engine)
        gc.collect()
    assert len(set(budgets)) == 1


def test_devices_are_found_by_torch(monkeypatch):
    assert devices.default_device() == find_device("auto") == find_device("sim") == DEVICE
    assert devices.accelerators() == [DEVICE, torch.device("sim:1")]
    assert devices.total_memory(DEVICE) == counters.mem_get_info(0)[1]
    described = {"device": "sim:1", "accelerator": "simulated"}
    assert devices.describe(torch.device("sim:1")) == described
    assert devices.visible_variable() == "SIM_VISIBLE_DEVICES"
    monkeypatch.setenv("SIM_VISIBLE_DEVICES", "4,7,9")
    assert devices.visible_accelerators() == ["4", "7"]
    devices.synchronize()
    assert counters.counts()["synchronize"] == 1


def test_rows_of_several_sizes_are_tried(engines, monkeypatch):
    """On a device whatever the dtype; answers are those of any other size."""
    monkeypatch.setattr(row_size, "ACCELERATOR_SIZES", (128, 64, 256))
    cpu, device = engines("llama", row_tokens=None)
    assert not row_size.matters(cpu)
    assert row_size.matters(device)
    nodes = row_size.fastest(device)
    assert nodes in (64, 128, 256)
    assert responses(replace(device, row_tokens=nodes)) == responses(replace(cpu, row_tokens=nodes))
