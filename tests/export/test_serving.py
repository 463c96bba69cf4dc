"""Speed and memory of models in a fresh process."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.conftest import save_llama
from tracker.export import serving, serving_process
from tracker.export.serving import measure_serving, median_speedup
from tracker.schema.errors import WorkError

REAL_RUN = serving.run_program


def test_other_work_in_whole_turns_does_not_matter():
    quiet_turns, busy_turns = ([0.13] * 4, [0.10] * 4), ([0.52] * 4, [0.40] * 4)
    for base, model in (quiet_turns, busy_turns):
        assert median_speedup(base, model) == pytest.approx((1.3, 1.3, 1.3))


def test_unequal_disturbances_give_no_speedup():
    turns = [0.13, 0.13, 0.52, 0.13, 0.13, 0.5], [0.10, 0.40, 0.10, 0.10, 0.40, 0.11]
    assert median_speedup(*turns) is None
    assert median_speedup([0.13] * 9 + [0.9], [0.1] * 10) == pytest.approx((1.3, 1.3, 1.3))


def test_fresh_processes_measure_both_models(tmp_path, monkeypatch):
    # The real program, which the other tests run in their own process.
    monkeypatch.setattr(serving, "run_program", REAL_RUN)
    base = save_llama(tmp_path / "base")
    model = shutil.copytree(base, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    heads = config["num_key_value_heads"]
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    figures = {f.name: f for f in measure_serving(base, model, "cpu", "float32", 1, False)}
    names = ("prefill_4", "prefill_8", "decode_1", "decode_8", "first_token_4", "first_token_8")
    assert [*figures] == [*names, "cache_bytes", "peak_bytes"]
    for name in names:
        for median, low, high in (figures[name].base, figures[name].model):
            assert 0 < low <= median <= high
    # Keys and values of 16 tokens, four bytes each.
    layer_bytes = 2 * 16 * heads * config["hidden_size"] // config["num_attention_heads"] * 4
    cache = figures["cache_bytes"]
    assert (cache.base[0], cache.model[0]) == (
        config["num_hidden_layers"] * layer_bytes,
        layer_bytes,
    )
    assert figures["peak_bytes"].base[0] > 2**26, "Python alone takes more than 64 MiB"
    (model / "config.json").write_text("{}")
    with pytest.raises(WorkError, match="Unrecognized model"):
        measure_serving(base, model, "cpu", "float32", 1, False)


def test_time_of_prompt_does_not_count_as_writing(tmp_path, monkeypatch):
    request = {"trust_remote_code": False, "dtype": "float32", "device": "cpu"}
    model = serving_process.build_model(str(save_llama(tmp_path / "base")), request)
    lengths, forward = [], model.forward

    def record(input_ids, cache=None, **settings):
        lengths.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, cache=cache, **settings)

    clock = iter([0.0, 5.0, 7.0])
    monkeypatch.setattr(model, "forward", record)
    monkeypatch.setattr(serving_process.time, "perf_counter", lambda: next(clock))
    assert serving_process.time_answer(model, 8, 6, 3)[0] == 2.0
    assert lengths == [(8, 6), (8, 1), (8, 1), (8, 1)]
