"""Cost estimates for a cell, made before it is measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

import torch
from torch import nn
from transformers import PreTrainedModel

from tracker.core.changes import Ablation
from tracker.core.documents import Document
from tracker.core.grouping import grouped
from tracker.core.model_parts import experts_of_a_token
from tracker.engine.forward.streams import StreamPlan, plain_passes, plan_streams
from tracker.engine.scoring.head import LOGITS_BYTES
from tracker.engine.scoring.model import read_for, stream_bytes
from tracker.engine.scoring.rows import common_beginning, tree_rows
from tracker.engine.scoring.score import SHORTEST
from tracker.engine.scoring.sweep import ROW_TOKENS
from tracker.engine.selfcheck.check import plain_tokens
from tracker.models.layers import find_layers
from tracker.models.parts.experts import entries
from tracker.models.parts.linear_maps import find_embeddings

SECONDS = 0.5
"""Duration of the measurement of the machine's speed, in seconds."""


@dataclass(frozen=True)
class Cost:
    """The work of one cell, compared with running lm-eval once per ablation.

    Attributes:
        documents: Documents.
        requests: (context, continuation) pairs.
        tokens: Tokens that the model reads, each shared token once.
        layer_passes: Tokens times the layers that each passes, summed over all streams.
        flops: Floating-point operations of the engine.
        naive_tokens: Tokens that lm-eval reads for one evaluation (equal contexts of one-token
            continuations once, padding not counted).
        plain_layer_passes: Program → layer passes of lm-eval's model, run once per ablation. vLLM
            reads the whole text of each request: it reuses no prefix when log-probabilities of
            prompts are requested.
        naive_flops: Floating-point operations of lm-eval, run once per ablation.
        check_layer_passes: Tokens times layers of the self-check on the model itself.
        peak_bytes: Bytes of the weights, the widest activations and the logits of a chunk.
    """

    documents: int
    requests: int
    tokens: int
    layer_passes: float
    flops: float
    naive_tokens: int
    plain_layer_passes: dict[str, float]
    naive_flops: float
    check_layer_passes: float
    peak_bytes: int

    @property
    def times_the_passes(self) -> dict[str, float]:
        """Return the ratio of each program's layer passes to the engine's."""
        plain = self.plain_layer_passes
        return {name: passes / self.layer_passes for name, passes in plain.items()}


@dataclass(frozen=True)
class Reading:
    """The work of scoring documents under any ablations, with full sharing.

    The operations of attentions, MLPs and the head are proportional to the number of passes through
    them. `engine` and `plain` hold the operations of one pass.

    Attributes:
        documents: Number of documents.
        requests: Number of (context, continuation) pairs.
        layers: Number of layers of the model.
        tokens: Tokens that the model reads, each shared token once.
        widest: Tokens of the largest row.
        naive_tokens: Tokens that lm-eval reads for one evaluation.
        engine: Operations of one pass of all tokens through an attention, one through an MLP, and
            one of the predicting tokens through the head.
        plain: The same operations for lm-eval.
    """

    documents: int
    requests: int
    layers: int
    tokens: int
    widest: int
    naive_tokens: int
    engine: tuple[float, float, float]
    plain: tuple[float, float, float]

    def flops(self, plan: StreamPlan) -> float:
        """Count the operations of the streams of a plan."""
        return _work(self.engine, (plan.attention_passes, plan.mlp_passes, plan.answers))

    def naive_flops(self, ablations: Sequence[Ablation]) -> float:
        """Count the operations of lm-eval, run once for each ablation."""
        return _work(self.plain, (*plain_passes(ablations, self.layers), len(ablations)))


def reading(model: PreTrainedModel, documents: Sequence[Document], max_length: int) -> Reading:
    """Count the work of scoring documents.

    Args:
        model: The model; its weights may be on the meta device.
        documents: The documents.
        max_length: Maximum number of tokens that the model reads.

    Returns:
        The counts.
    """
    config = model.config.get_text_config()
    hidden = config.hidden_size
    head = 2 * model.get_output_embeddings().weight.numel()
    attention, mlp = _weights(model)

    def attended(tokens: int, keys: int) -> float:
        """Count the operations of one attention in which `tokens` tokens see `keys` keys."""
        return float(tokens * (2 * attention + 4 * keys * hidden))

    tokens = widest = kept = 0
    attentions = 0.0
    # A task's documents are scored together.
    for together in grouped(documents, lambda document: document.task).values():
        shared = len(common_beginning(together, max_length))
        prefix = shared if shared >= SHORTEST else 0
        tokens += prefix
        attentions += attended(prefix, prefix)
        for row in tree_rows(together, max_length, ROW_TOKENS, prefix):
            tokens += row.tokens
            attentions += attended(row.tokens, prefix + row.tokens)
            kept += len(row.keep)
            widest = max(widest, row.tokens)
    # What lm-eval's Hugging Face model reads.
    texts = {read_for(request, max_length) for d in documents for request in d.requests}
    naive = [len(text) for text in texts]
    return Reading(
        documents=len(documents),
        requests=sum(len(document.requests) for document in documents),
        layers=config.num_hidden_layers,
        tokens=tokens,
        widest=widest,
        naive_tokens=sum(naive),
        engine=(attentions, tokens * 2 * mlp, float(head * kept)),
        plain=(
            sum(attended(length, length) for length in naive),
            sum(naive) * 2 * mlp,
            float(head * sum(naive)),
        ),
    )


def cost(
    model: PreTrainedModel,
    documents: Sequence[Document],
    ablations: Sequence[Ablation],
    max_length: int,
) -> Cost:
    """Count the work of a cell with full sharing.

    Args:
        model: The model; its weights may be on the meta device.
        documents: The cell's documents.
        ablations: The ablations, including the baseline.
        max_length: Maximum number of tokens that the model reads.

    Returns:
        The counts.
    """
    found = reading(model, documents, max_length)
    tied = any(each.ends for each in ablations) and find_embeddings(model).is_tied
    plan = plan_streams(ablations, found.layers, tied)
    plain = sum(plain_passes(ablations, found.layers)) / 2
    # vLLM keeps room for a token that it generates.
    texts = [r.context + r.continuation for document in documents for r in document.requests]
    whole = sum(min(len(text), max_length - 1) for text in texts)
    activations = plan.streams * found.widest * stream_bytes(model)
    return Cost(
        documents=found.documents,
        requests=found.requests,
        tokens=found.tokens,
        layer_passes=found.tokens * plan.layer_passes,
        flops=found.flops(plan),
        naive_tokens=found.naive_tokens,
        plain_layer_passes={"lm-eval": found.naive_tokens * plain, "vllm": whole * plain},
        naive_flops=found.naive_flops(ablations),
        check_layer_passes=float(found.layers * plain_tokens(documents, ablations, max_length)),
        peak_bytes=model.dtype.itemsize * model.num_parameters() + activations + 2 * LOGITS_BYTES,
    )


def _work(operations: Sequence[float], passes: Sequence[int]) -> float:
    return float(sum(map(mul, operations, passes)))


def _weights(model: PreTrainedModel) -> tuple[float, float]:
    """Return the average weights per token of a layer's attention and of its other modules.

    Of routed experts, only as many count as the configuration selects per token.
    """
    layers, chosen = find_layers(model), experts_of_a_token(model.config.get_text_config())

    def passed(module: nn.Module) -> float:
        size: int = sum(each.numel() for each in module.parameters(recurse=False))
        count = entries(module)
        return size * chosen / count if count and chosen and chosen < count else size

    attention = mlp = 0.0
    for layer in layers:
        first, *others = (
            sum(map(passed, part.modules()))
            for part in layer.children()
            if any(p.ndim > 1 for p in part.parameters())
        )
        attention += first
        mlp += sum(others)
    return attention / len(layers), mlp / len(layers)


def matrix_rate(dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> float:
    """Measure the floating-point operations per second of a matrix product; None = on the CPU."""
    size = 1024 if device is None or device.type == "cpu" else 8192
    a, b = (torch.randn(n, size, device=device).to(dtype) for n in (2 * size, size))
    a @ b
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        # Reading a number waits for the accelerator.
        float((a @ b)[0, 0])
        count += 1
    return count * 2 * (2 * size) * size * size / (time.perf_counter() - start)
