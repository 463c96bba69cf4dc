"""How long a layer takes, measured here: what a budget of seconds is solved with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from tracker.core.provenance import content_hash, machine
from tracker.ledger.notes import read_note, write_note
from tracker.ledger.store import Ledger
from tracker.models.load import LoadedModel

TOKENS = 128
"""Tokens of one text that is read at once."""
PASSES = 15
"""Passes, of which each layer's median counts; as many as half of them come before, unmeasured."""


def seconds_a_token(loaded: LoadedModel, ledger: Ledger) -> tuple[list[float], float]:
    """Measure what each layer takes, and the whole model: seconds a token of one long text.

    It is measured once for a model, a machine and a device, and kept in the results folder: a
    search that goes on has the same budget.
    """
    identity = loaded.identity
    where = {**machine(), "device": str(loaded.device), "threads": str(torch.get_num_threads())}
    name = content_hash([identity.fingerprint, identity.dtype, where])[:16]
    path = ledger.root / "searches" / "timing" / f"{name}.json"
    kept = read_note(path)
    if not kept:
        ledger.create()
        layers, whole = _measured(loaded)
        kept = {"model": identity.name, **where, "layers": layers, "whole": whole}
        write_note(path, kept)
    return [float(each) for each in kept["layers"]], float(kept["whole"])


@torch.inference_mode()
def _measured(loaded: LoadedModel) -> tuple[list[float], float]:
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device=loaded.device)
    rounds: list[list[float]] = []
    whole: list[float] = []
    with _timed(loaded.layers) as ticks:
        for _ in range(PASSES + PASSES // 2):
            ticks.clear()
            start = _now()
            loaded.model(input_ids=ids, use_cache=False)
            whole.append(_now() - start)
            rounds.append([end - begin for begin, end in zip(ticks[::2], ticks[1::2], strict=True)])
    layers = [statistics.median(each) / TOKENS for each in zip(*rounds[-PASSES:], strict=True)]
    return layers, statistics.median(whole[-PASSES:]) / TOKENS


@contextmanager
def _timed(layers: nn.ModuleList) -> Iterator[list[float]]:
    """Take down when each layer begins and ends."""
    ticks: list[float] = []

    def tick(*given: Any) -> None:
        ticks.append(_now())

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.register_forward_pre_hook(tick))
            stack.enter_context(layer.register_forward_hook(tick))
        yield ticks


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
