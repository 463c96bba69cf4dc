"""What a cell will cost, counted before anything is spent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tracker.ablations import Ablation
from tracker.documents import Document
from tracker.engine.check import plain_tokens
from tracker.engine.head import LOGITS_BYTES
from tracker.engine.memory import stream_bytes
from tracker.engine.prefix import SHORTEST
from tracker.engine.rows import common_beginning, tree_rows
from tracker.engine.streams import plain_passes, plan_streams
from tracker.engine.sweep import ROW_TOKENS
from tracker.models.layers import find_layers

SECONDS = 0.5
"""How long the machine's speed is measured."""


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
        check_layer_passes: Tokens times layers of the self-check on the model itself.
        peak_bytes: Weights, the widest activations and the logits of a chunk.
    """

    documents: int
    requests: int
    tokens: int
    layer_passes: float
    flops: float
    naive_tokens: int
    naive_layer_passes: float
    naive_flops: float
    check_layer_passes: float
    peak_bytes: int


def cost(
    model: Any, documents: Sequence[Document], ablations: Sequence[Ablation], max_length: int
) -> Cost:
    """Count the work of a cell, for full sharing.

    Args:
        model: The model; its weights may be on the meta device.
        documents: The cell's documents.
        ablations: The ablations, with the baseline.
        max_length: Tokens that the model reads at most.

    Returns:
        The counts.
    """
    config = model.config.get_text_config()
    layers, hidden = config.num_hidden_layers, config.hidden_size
    head = model.get_output_embeddings().weight.numel()
    attention, mlp = _weights(model)
    plan = plan_streams(ablations, layers)

    def operations(attentions: int, mlps: int, tokens: int, keys: int) -> float:
        """Floating-point operations of so many passes of some tokens that see so many keys."""
        seen = 4 * keys * hidden
        return float(tokens * (attentions * (2 * attention + seen) + mlps * 2 * mlp))

    tokens = widest = 0
    flops = 0.0
    for together in _by_task(documents):
        shared = len(common_beginning(together, max_length))
        prefix = shared if shared >= SHORTEST else 0
        tokens += prefix
        flops += operations(plan.attention_passes, plan.mlp_passes, prefix, prefix)
        for row in tree_rows(together, max_length, ROW_TOKENS, prefix):
            keys = prefix + row.tokens
            tokens += row.tokens
            flops += operations(plan.attention_passes, plan.mlp_passes, row.tokens, keys)
            flops += 2 * head * len(row.keep) * plan.streams
            widest = max(widest, row.tokens)

    naive = _naive_sequences(documents, max_length)
    attentions, mlps = plain_passes(ablations, layers)
    naive_flops = sum(
        operations(attentions, mlps, length, length) + len(ablations) * 2 * head * length
        for length in naive
    )
    size = int(model.dtype.itemsize)
    activations = plan.streams * widest * stream_bytes(model)
    return Cost(
        documents=len(documents),
        requests=sum(len(document.requests) for document in documents),
        tokens=tokens,
        layer_passes=tokens * plan.layer_passes,
        flops=flops,
        naive_tokens=sum(naive),
        naive_layer_passes=sum(naive) * (attentions + mlps) / 2,
        naive_flops=naive_flops,
        check_layer_passes=float(layers * plain_tokens(documents, ablations)),
        peak_bytes=size * model.num_parameters() + activations + 2 * LOGITS_BYTES,
    )


def _by_task(documents: Sequence[Document]) -> list[list[Document]]:
    """The documents of each task, which are scored together."""
    tasks: dict[str, list[Document]] = {}
    for document in documents:
        tasks.setdefault(document.task, []).append(document)
    return list(tasks.values())


def _weights(model: Any) -> tuple[float, float]:
    """Average weights of a layer's attention, and of the rest of its matrices."""
    layers = find_layers(model)
    attention = mlp = 0
    for layer in layers:
        sizes = [
            sum(p.numel() for p in part.parameters())
            for part in layer.children()
            if any(p.ndim > 1 for p in part.parameters())
        ]
        attention += sizes[0]
        mlp += sum(sizes[1:])
    return attention / len(layers), mlp / len(layers)


def _naive_sequences(documents: Sequence[Document], max_length: int) -> list[int]:
    """Lengths of the sequences that lm-eval's Hugging Face model reads."""
    seen = {
        (request.context + request.continuation[:-1])[-max_length:]
        for document in documents
        for request in document.requests
    }
    return [len(sequence) for sequence in seen]


def matrix_rate(dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> float:
    """Measure the floating-point operations per second of a matrix product; None = on the CPU."""
    on_cpu = device is None or device.type == "cpu"
    size = 1024 if on_cpu else 8192
    a, b = (torch.randn(n, size, device=device).to(dtype) for n in (2 * size, size))
    a @ b
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        # Reading a number waits for the accelerator.
        float((a @ b)[0, 0])
        count += 1
    return count * 2 * (2 * size) * size * size / (time.perf_counter() - start)
