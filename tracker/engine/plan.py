"""Estimate the cost of measuring a model on a benchmark before the measurement."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from operator import mul

import torch
from torch import nn
from transformers import PreTrainedModel

from tracker.engine.forward.streams import (
    Ablations,
    StreamPlan,
    count_unshared_computations,
    plan_streams,
)
from tracker.engine.scoring.head import LOGITS_BYTES
from tracker.engine.scoring.model import input_tokens, stream_bytes
from tracker.engine.scoring.rows import Documents, common_beginning, measured_texts, pack_tree_rows
from tracker.engine.scoring.score import MIN_PREFIX
from tracker.engine.scoring.sweep import ROW_TOKENS
from tracker.engine.selfcheck.check import count_unshared_tokens
from tracker.models.layers import find_layers
from tracker.models.parts.experts import count_experts
from tracker.models.parts.linear_maps import find_embeddings
from tracker.schema.grouping import group_by
from tracker.schema.model_parts import experts_per_token

GRADIENT_PASSES = 2
"""Cost of a pass with gradients of outputs but not of weights, in forward passes."""
RATE_SECONDS = 0.5
"""Duration of the measurement of the machine's speed, in seconds."""


@dataclass(frozen=True)
class Cost:
    """The cost of measuring several ablations, compared with one lm-eval run per ablation.

    Attributes:
        documents: Number of documents.
        requests: Number of (context, continuation) pairs.
        tokens: Number of tokens that the model reads, counting shared tokens once.
        layer_passes: Number of (token, layer) computations in the engine, for all ablations
            together.
        flops: Floating-point operations that the engine needs.
        naive_tokens: Number of tokens that lm-eval reads in one evaluation, without padding. A
            context counts only once for all its one-token continuations.
        plain_layer_passes: Number of (token, layer) computations with one lm-eval run per ablation.
            The keys are the inference programs, `lm-eval` and `vllm`. vLLM does not use its prefix
            cache for prompt log-probabilities.
        naive_flops: Floating-point operations that lm-eval needs, with one run per ablation.
        check_layer_passes: Number of (token, layer) computations in the self-check, without the
            check on a miniature model.
        statistics_layer_passes: Number of (token, layer) computations for proxies of parts and for
            the statistics in `observe`. `layer_passes` and `flops` do not include these
            computations.
        peak_bytes: Estimated peak memory: bytes of the weights, the largest activations and one
            chunk of logits.
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
    statistics_layer_passes: float
    peak_bytes: int

    @property
    def times_the_passes(self) -> dict[str, float]:
        """Ratio of (token, layer) computations of lm-eval and vLLM to those of the engine."""
        plain = self.plain_layer_passes
        return {name: passes / self.layer_passes for name, passes in plain.items()}


@dataclass(frozen=True)
class Workload:
    """Counts of tokens and floating-point operations for scoring documents.

    Attributes:
        documents: Number of documents.
        requests: Number of (context, continuation) pairs.
        layers: Number of layers of the model.
        tokens: Number of tokens that the model reads, counting shared tokens once.
        widest_row: Largest number of tokens that are computed together in one forward pass.
        naive_tokens: Number of tokens that lm-eval reads in one evaluation.
        engine_operations: Floating-point operations in the engine for one attention, one MLP, and
            the output head, with full sharing of computation.
        plain_operations: Floating-point operations of lm-eval for one attention, one MLP, and the
            output head.
    """

    documents: int
    requests: int
    layers: int
    tokens: int
    widest_row: int
    naive_tokens: int
    engine_operations: tuple[float, float, float]
    plain_operations: tuple[float, float, float]

    def flops(self, plan: StreamPlan) -> float:
        """Count the engine's floating-point operations for planned ablations."""
        passes = (plan.attention_passes, plan.mlp_passes, plan.n_answers)
        return float(sum(map(mul, self.engine_operations, passes)))

    def naive_flops(self, ablations: Ablations) -> float:
        """Count the floating-point operations of running lm-eval once for each ablation."""
        passes = (*count_unshared_computations(ablations, self.layers), len(ablations))
        return float(sum(map(mul, self.plain_operations, passes)))


def count_work(model: PreTrainedModel, documents: Documents, max_length: int) -> Workload:
    """Count the tokens and floating-point operations of scoring documents.

    Args:
        model: The model; its weights may be on the meta device.
        documents: The documents to score.
        max_length: Maximum number of tokens that the model reads.

    Returns:
        The counted work.
    """
    config = model.config.get_text_config()
    hidden = config.hidden_size
    head_operations = 2 * model.get_output_embeddings().weight.numel()
    attention, mlp = _weights_per_token(model)

    def count_attention(n_tokens: int, n_keys: int) -> float:
        """Count the operations of one attention, in which each token attends to `n_keys` tokens."""
        return float(n_tokens * (2 * attention + 4 * n_keys * hidden))

    tokens, widest_row, n_predicting, attentions = 0, 0, 0, 0.0
    # A task's documents are scored together.
    for group in group_by(documents, lambda document: document.task).values():
        n_shared = len(common_beginning(group, max_length))
        prefix_tokens = n_shared if n_shared >= MIN_PREFIX else 0
        tokens += prefix_tokens
        attentions += count_attention(prefix_tokens, prefix_tokens)
        for row in pack_tree_rows(group, max_length, ROW_TOKENS, prefix_tokens):
            tokens += row.tokens
            attentions += count_attention(row.tokens, prefix_tokens + row.tokens)
            n_predicting += len(row.predicting_nodes)
            widest_row = max(widest_row, row.tokens)
    # What lm-eval's Hugging Face model reads.
    texts = {input_tokens(request, max_length) for d in documents for request in d.requests}
    n_naive = sum(map(len, texts))
    naive_attentions = sum(count_attention(len(text), len(text)) for text in texts)
    return Workload(
        documents=len(documents),
        requests=sum(len(document.requests) for document in documents),
        layers=config.num_hidden_layers,
        tokens=tokens,
        widest_row=widest_row,
        naive_tokens=n_naive,
        engine_operations=(attentions, tokens * 2 * mlp, float(head_operations * n_predicting)),
        plain_operations=(naive_attentions, n_naive * 2 * mlp, float(head_operations * n_naive)),
    )


def estimate_cost(
    model: PreTrainedModel,
    documents: Documents,
    ablations: Ablations,
    max_length: int,
    observe: Collection[str] = (),
    has_gradients: bool = True,
) -> Cost:
    """Estimate the cost of measuring ablations on a benchmark before the measurement.

    Args:
        model: The model; its weights may be on the meta device.
        documents: The documents to measure.
        ablations: The ablations, including the baseline.
        max_length: Maximum number of tokens that the model reads.
        observe: Statistics to measure besides the outcomes, e.g. `kl`.
        has_gradients: Whether proxies that need gradients are measured. If weights are offloaded,
            these proxies cannot be measured.

    Returns:
        The estimated cost.
    """
    work = count_work(model, documents, max_length)
    has_formats = any(ablation.outer_formats for ablation in ablations)
    is_tied = has_formats and find_embeddings(model).is_tied
    plan = plan_streams(ablations, work.layers, is_tied)
    n_plain = sum(count_unshared_computations(ablations, work.layers)) / 2
    # vLLM keeps room for a token that it generates.
    texts = [r.context + r.continuation for document in documents for r in document.requests]
    n_read = sum(min(len(text), max_length - 1) for text in texts)
    texts_read = [text for d in documents for text, _ in measured_texts(d, max_length)]
    parts = [part for ablation in ablations if (part := ablation.part)]
    formats = {part.intervention for part in parts} - {"remove"}
    # The gradient of KL also reads the text by the exact model, once for each format.
    passes = GRADIENT_PASSES * bool(parts) + (GRADIENT_PASSES + 1) * len(formats)
    passes *= has_gradients
    passes += any(part.component == "expert" for part in parts)  # the load of the experts
    statistics_passes = passes * work.layers + plan.layer_passes * len(observe)
    activations = plan.n_streams * work.widest_row * stream_bytes(model)
    return Cost(
        documents=work.documents,
        requests=work.requests,
        tokens=work.tokens,
        layer_passes=work.tokens * plan.layer_passes,
        flops=work.flops(plan),
        naive_tokens=work.naive_tokens,
        plain_layer_passes={"lm-eval": work.naive_tokens * n_plain, "vllm": n_read * n_plain},
        naive_flops=work.naive_flops(ablations),
        check_layer_passes=float(
            work.layers * count_unshared_tokens(documents, ablations, max_length)
        ),
        statistics_layer_passes=sum(map(len, texts_read)) * statistics_passes,
        peak_bytes=model.dtype.itemsize * model.num_parameters() + activations + 2 * LOGITS_BYTES,
    )


def _weights_per_token(model: PreTrainedModel) -> tuple[float, float]:
    """Count the weights that a token uses in the attention and the MLP, per layer.

    The two numbers are means over all layers. In a mixture of experts, only the experts that a
    token uses are counted.
    """
    layers, n_chosen = find_layers(model), experts_per_token(model.config.get_text_config())

    def count_weights(module: nn.Module) -> float:
        size: int = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        n_experts = count_experts(module)
        return size * n_chosen / n_experts if n_chosen and n_chosen < (n_experts or 0) else size

    attention = mlp = 0.0
    for layer in layers:
        attention_size, *other_sizes = (
            sum(map(count_weights, part.modules()))
            for part in layer.children()
            if any(p.ndim > 1 for p in part.parameters())
        )
        attention += attention_size
        mlp += sum(other_sizes)
    return attention / len(layers), mlp / len(layers)


def measure_matrix_rate(
    dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> float:
    """Measure the speed of matrix products on a device (default: the CPU).

    Returns the number of floating-point operations per second.
    """
    size = 1024 if device is None or device.type == "cpu" else 8192
    a, b = (torch.randn(n, size, device=device).to(dtype) for n in (2 * size, size))
    a @ b
    n_products, start = 0, time.perf_counter()
    while time.perf_counter() - start < RATE_SECONDS:
        # Reading a number waits for the accelerator.
        float((a @ b)[0, 0])
        n_products += 1
    return n_products * 2 * (2 * size) * size * size / (time.perf_counter() - start)
