"""What decides a document's outcome, and nothing else, as a key."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tracker.core.config import CellRequest
from tracker.core.identities import BenchmarkIdentity, ModelIdentity
from tracker.core.provenance import content_hash

RUNS = {"layers", "components", "spans", "interventions", "only"}
"""Keys of a request that say which runs it asks for."""
GROWS = RUNS | {"removed", "limit", "sample", "until", "metric"}
"""Keys of a request by which a cell grows: no document's outcome hangs on them."""
_LATER = {
    *("include_path", "system_instruction", "fewshot_as_multiturn", "chat_template_args"),
    *("enable_thinking", "think_end_token", "gen_kwargs", "metadata", "model_args", "part"),
}


def cell_key(model: ModelIdentity, benchmark: BenchmarkIdentity) -> str:
    """Identify a cell by content, as SHA-256 in hexadecimal.

    Neither which documents, nor the layers, nor the batch, nor the shown metric is part of it: a
    cell grows.
    """
    return content_hash(
        {
            "model": model.fingerprint,
            "dtype": model.dtype,
            "benchmark": benchmark.name,
            "tasks": [[task.name, task.version, task.fingerprint] for task in benchmark.tasks],
            "num_fewshot": benchmark.num_fewshot,
            "seed": benchmark.seed,
            "apply_chat_template": benchmark.apply_chat_template,
            **({"settings": benchmark.settings} if benchmark.settings else {}),
        }
    )


def request_key(
    request: CellRequest, model_stamp: object, data_stamp: object, versions: Mapping[str, str]
) -> str:
    """Identify what was asked for without loading anything, as SHA-256 in hexadecimal.

    Equal keys lead to the same cell; different ones may (after an update of lm-eval, say). What is
    removed, which documents and the metric do not count.
    """
    asked = request.model_dump(exclude=GROWS).items()
    # A setting that is not used leaves the keys of before as they are.
    said = {name: value for name, value in asked if name not in _LATER or value not in (None, ())}
    return content_hash([said, model_stamp, data_stamp, dict(versions)])


def folder_name(model: str, benchmark: str, key: str) -> str:
    """Name a cell's folder so that a person finds it and every file system takes it."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{model}--{benchmark}")[:80]
    return f"{readable}--{key[:12]}"
