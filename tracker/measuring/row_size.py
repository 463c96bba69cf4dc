"""Sizes of rows that were fastest on this machine, kept in the user's cache."""

from __future__ import annotations

import platform
from dataclasses import replace

import torch
from filelock import FileLock

from tracker.core.provenance import content_hash
from tracker.engine.scoring.row_size import fastest, matters
from tracker.engine.scoring.sweep import Engine
from tracker.ledger.cache import keep, own_folder, recall
from tracker.models.devices import hardware

_KIND = "rows"


def with_fastest_rows(engine: Engine) -> Engine:
    """Give an engine the size of row that is fastest for its model on this machine.

    Args:
        engine: The engine; no call has changed its model yet, and none does here.

    Returns:
        The engine to use: that one where the size makes no difference.
    """
    if not matters(engine):
        return engine
    config = engine.loaded.model.config.get_text_config()
    about = (
        platform.node(),
        torch.__version__,
        torch.get_num_threads(),
        hardware(engine.loaded.device),
        str(engine.loaded.model.dtype),
        engine.class_name,
        config.hidden_size,
        getattr(config, "intermediate_size", None),
    )
    key = content_hash(about)
    # Workers side by side have rows of one size, on which the last digits of answers depend.
    with FileLock(own_folder(_KIND) / f"{key[:32]}.lock"):
        nodes = recall(_KIND, key).get("nodes")
        if nodes is None:
            nodes = fastest(engine)
            keep(_KIND, key, {"nodes": nodes})
    return replace(engine, row_tokens=int(nodes))
