"""What a cell will cost, counted before anything is spent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tracker.ablations import Ablation
from tracker.documents import Document
from tracker.engine.rows import tree_rows
from tracker.engine.score import HEAD_BYTES
from tracker.engine.streams import plan_streams
from tracker.engine.sweep import ROW_TOKENS


@dataclass(frozen=True)
class Cost:
    """The work of one cell, beside that of running lm-eval once for every ablation.

    Attributes:
        documents: Documents.
        requests: (context, continuation) pairs.
        tokens: Tokens that the model reads, shared ones once.
        layer_passes: Tokens times the layers that each passes, all streams together.
        flops: Floating-point operations of the engine.
        naive_tokens: Tokens that lm-eval reads for one evaluation (equal contexts of one-token
            continuations once, padding not counted).
        naive_layer_passes: The same for lm-eval once per ablation.
        naive_flops: The same.
        peak_bytes: Weights, the widest activations and the logits of a chunk.
    """

    documents: int
    requests: int
    tokens: int
    layer_passes: int
    flops: float
    naive_tokens: int
    naive_layer_passes: int
    naive_flops: float
    peak_bytes: int


def cost(
    model: Any, documents: Sequence[Document], ablations: Sequence[Ablation], max_length: int
) -> Cost:
    """Count the work of a cell.

    Args:
        model: The model; its weights may be on the meta device.
        documents: The cell's documents.
        ablations: The ablations, with the baseline.
        max_length: Tokens that the model reads at most.

    Returns:
        The counts, for full sharing.
    """
    config = model.config.get_text_config()
    layers, hidden = config.num_hidden_layers, config.hidden_size
    head = model.get_output_embeddings().weight.numel()
    vocabulary = head // hidden
    in_layers = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n or ".h." in n)
    per_pass = 2 * (in_layers or model.num_parameters() - head) / layers
    plan = plan_streams(ablations, layers)

    tokens = passes = widest = 0
    flops = 0.0
    for row in tree_rows(documents, max_length, ROW_TOKENS):
        tokens += row.tokens
        passes += row.tokens * plan.layer_passes
        flops += row.tokens * plan.layer_passes * (per_pass + 4 * row.tokens * hidden)
        flops += 2 * head * len(row.keep) * plan.streams
        widest = max(widest, row.tokens)

    naive = _naive_sequences(documents, max_length)
    naive_tokens = sum(naive)
    naive_layers = sum(layers - len(ablation.layers) for ablation in ablations)
    naive_flops = sum(
        length * (naive_layers * (per_pass + 4 * length * hidden) + len(ablations) * 2 * head)
        for length in naive
    )
    size = torch.finfo(model.dtype).bits // 8
    wide = 6 * hidden + 3 * (getattr(config, "intermediate_size", None) or 4 * hidden)
    peak = size * (model.num_parameters() + plan.streams * widest * wide) + 3 * HEAD_BYTES
    return Cost(
        documents=len(documents),
        requests=sum(len(document.requests) for document in documents),
        tokens=tokens,
        layer_passes=passes,
        flops=flops,
        naive_tokens=naive_tokens,
        naive_layer_passes=naive_tokens * naive_layers,
        naive_flops=naive_flops,
        peak_bytes=max(peak, size * vocabulary),
    )


def _naive_sequences(documents: Sequence[Document], max_length: int) -> list[int]:
    """Lengths of the sequences that lm-eval's Hugging Face model reads."""
    seen = {
        (request.context + request.continuation[:-1])[-max_length:]
        for document in documents
        for request in document.requests
    }
    return [len(sequence) for sequence in seen]


def matrix_rate(dtype: torch.dtype = torch.float32, seconds: float = 0.5) -> float:
    """Measure how fast this machine multiplies matrices.

    Args:
        dtype: The numbers' type.
        seconds: How long to measure.

    Returns:
        Floating-point operations per second.
    """
    a, b = torch.randn(2048, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
    a @ b
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        a @ b
        count += 1
    return count * 2 * 2048 * 1024 * 1024 / (time.perf_counter() - start)
