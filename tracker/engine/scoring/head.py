"""Run the model's embedding and output head, with exact or quantised weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

from tracker.engine.refusal import RefusalError
from tracker.models.devices import put_entries, take_entries
from tracker.models.hooks import input_state, replaced_forward
from tracker.models.layers import find_base
from tracker.models.parts.linear_maps import Embeddings
from tracker.schema.grouping import group_by

VOCABULARY_BLOCK = 2048
"""Number of tokens of the vocabulary whose logits exist at a time on a CPU. The logits of all
tokens would be written to memory and read back."""
HEAD_STATES = 640
"""Number of hidden states that pass the head together on a CPU."""
LOGITS_BYTES = 64 * 2**20
"""Maximum bytes of logits at a time if the vocabulary is not cut into blocks."""


class Predictions(NamedTuple):
    """Log-probabilities of target tokens, and whether each token has the highest logit.

    Attributes:
        logprobs: Log-probability of each predicted token [streams, predicted], in the model's
            dtype.
        greedy: True for each predicted token with the highest logit [streams, predicted].
    """

    logprobs: Tensor
    greedy: Tensor


class _States(BaseModelOutputWithPast):  # type: ignore[misc]
    """Output of a model that contains only hidden states."""

    def __getattr__(self, name: str) -> None:
        """Return None for missing outputs, such as cross-attentions or router logits."""


class Head:
    """The computations of a model after its last layer: projection, soft-capping and scaling.

    All logits together can take gigabytes, so the head processes the hidden states in chunks. On a
    CPU in full precision, the vocabulary is also cut into blocks of `VOCABULARY_BLOCK` tokens. For
    each block, the head stores only the maximum, the log-sum-exp, and the logits of target tokens.
    These numbers give the log-softmax over the whole vocabulary.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.base = find_base(model)
        self._projection = model.get_output_embeddings()
        self._vocabulary: int = self._projection.weight.shape[0]
        self._blocks = [(0, self._vocabulary)]
        full_precision = model.dtype in (torch.float32, torch.float64)
        on_cpu = self._projection.weight.device.type == "cpu"
        if full_precision and on_cpu and type(self._projection) is nn.Linear:
            starts = range(0, self._vocabulary, VOCABULARY_BLOCK)
            blocks = [(start, min(start + VOCABULARY_BLOCK, self._vocabulary)) for start in starts]
            if self._is_separable(blocks):
                self._blocks = blocks

    @property
    def has_blocks(self) -> bool:
        """True if the head computes logits in blocks of the vocabulary."""
        return len(self._blocks) > 1

    def predictions(
        self, output: ModelOutput, hidden: Tensor, predictor: Tensor, predicted: Tensor
    ) -> Predictions:
        """Compute the log-probability of each target token, and whether the token is greedy.

        A target token is greedy if it has the highest logit.

        Args:
            output: The output of the model without the head.
            hidden: Hidden states from which tokens are predicted [streams, positions, hidden].
            predictor: For each target token, the index of its hidden state in `hidden` [targets].
            predicted: The ids of the target tokens [targets].

        Returns:
            The log-probabilities, and the flags of greedy tokens.
        """
        n_kept = hidden.shape[1]
        if self.has_blocks:
            size = max(1, HEAD_STATES // n_kept)
            score = self._score_in_blocks
        else:
            size = max(1, LOGITS_BYTES // (self._vocabulary * hidden.element_size() * n_kept))
            score = self._score_whole_vocabulary
        parts = [
            score(replace(output, last_hidden_state=chunk), predictor, predicted)
            for chunk in torch.split(hidden, size)
        ]
        return Predictions(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def logits(self, output: ModelOutput, states: Tensor) -> Tensor:
        """Compute logits [streams, tokens, vocabulary] from states [streams, tokens, hidden].

        `output` is the output of the model without the head. All logits are in memory at the
        same time.
        """
        return self._logits(replace(output, last_hidden_state=states))

    def _score_whole_vocabulary(
        self, output: ModelOutput, predictor: Tensor, predicted: Tensor
    ) -> Predictions:
        """Score target tokens by a log-softmax over the whole vocabulary, as lm-eval does.

        The hidden states are taken from `output`. See `predictions` for the arguments and the
        result.
        """
        logprobs = functional.log_softmax(self._logits(output), dim=-1)
        argmax = logprobs.max(-1).indices  # the first of equals, as argmax, in half its time
        return Predictions(logprobs[:, predictor, predicted], argmax[:, predictor] == predicted)

    def _score_in_blocks(
        self, output: ModelOutput, predictor: Tensor, predicted: Tensor
    ) -> Predictions:
        """Score target tokens, computing the logits of one block of the vocabulary at a time."""
        states = output.last_hidden_state
        maximum = states.new_full(states.shape[:2], -torch.inf)
        normalisers = []
        targets = states.new_empty(len(states), len(predicted))
        is_first = torch.empty_like(targets, dtype=torch.bool)
        for start, stop in self._blocks:
            logits = self._logits_of_block(output, start, stop)
            indices = ((predicted >= start) & (predicted < stop)).nonzero()[:, 0]
            nodes, ids = predictor[indices], predicted[indices] - start
            targets[:, indices] = logits[:, nodes, ids]
            # Indices of maxima are slow, so they are computed only where a token is predicted.
            is_argmax = logits[:, nodes].max(-1).indices == ids
            is_first[:, indices] = is_argmax & (targets[:, indices] > maximum[:, nodes])
            peaks = logits.amax(-1)
            maximum = torch.maximum(maximum, peaks)
            # Unlike `logsumexp`, this reuses the maxima and the memory of the logits.
            peaks = peaks.masked_fill(peaks.isinf(), 0)
            normalisers.append(logits.sub_(peaks[..., None]).exp_().sum(-1).log_().add_(peaks))
        normaliser = torch.stack(normalisers).logsumexp(0)
        greedy = is_first & (targets == maximum[:, predictor])
        return Predictions(targets - normaliser[:, predictor], greedy)

    def _logits_of_block(self, output: ModelOutput, start: int, stop: int) -> Tensor:
        weight, bias = self._projection.weight, self._projection.bias
        block_bias = None if bias is None else bias[start:stop]
        project = partial(functional.linear, weight=weight[start:stop], bias=block_bias)
        with replaced_forward(self._projection, project):
            return self._logits(output)

    def _logits(self, output: ModelOutput) -> Tensor:
        """Compute logits [streams, tokens, vocabulary] with the model's own output head.

        The head is part of the model's `forward` method. Therefore the whole model is called, but
        its layers are replaced by a function that returns `output`. Raises RefusalError if the head
        does not use `output`.
        """
        calls = []

        def return_output(*args: Any, **kwargs: Any) -> Any:
            calls.append(True)
            return output

        with replaced_forward(self.base, return_output):
            # Where a model is spread over devices, accelerate moves the logits to the ids' device.
            ids = torch.zeros(1, 1, dtype=torch.long, device=output.last_hidden_state.device)
            model_output = self._model(input_ids=ids)
        logits: Tensor | None = getattr(model_output, "logits", None)
        if not calls or logits is None or logits.shape[:2] != output.last_hidden_state.shape[:2]:
            raise RefusalError("the output head does not read the states that the layers return")
        return logits

    @torch.inference_mode()
    def _is_separable(self, blocks: list[tuple[int, int]]) -> bool:
        """Test whether logits can be computed in blocks of the vocabulary.

        The result is False, for example, if the head normalises logits over the vocabulary.
        """
        weight = self._projection.weight
        states = weight[torch.linspace(0, len(weight) - 1, 4).long()][None]
        output = _States(last_hidden_state=states)
        try:
            full_logits = self._logits(output)
            block_logits = [self._logits_of_block(output, *block) for block in blocks]
        except (RefusalError, RuntimeError, AttributeError, TypeError):
            return False
        return torch.allclose(torch.cat(block_logits, dim=-1), full_logits, rtol=1e-4, atol=1e-4)


def use_row_formats(
    embeddings: Embeddings, name: str, formats: Sequence[str | None]
) -> AbstractContextManager[None]:
    """Quantise the embedding or the output head for each row of a batch in a `with` block.

    `name` selects the embedding or the output head. `formats` has one entry per row of the batch.
    """
    module = embeddings[name].module
    forward: Callable[[Tensor], Tensor] = module.forward
    rows_by_format = group_by(range(len(formats)), lambda row: formats[row])

    def by_format(inputs: Tensor) -> Tensor:
        output = forward(inputs)
        if len(inputs) != len(formats):
            raise RefusalError(f"{name} gets {len(inputs)} input rows for {len(formats)} texts")
        for form, rows in rows_by_format.items():
            if form is not None:
                with embeddings.temporary_format(name, form):
                    put_entries(output, rows, forward(take_entries(inputs, rows)))
        return output

    return replaced_forward(module, by_format) if any(formats) else nullcontext()


class _ReachedError(Exception):
    """Exception that stops a forward pass at the first layer."""


def compute_first_states(
    base: PreTrainedModel,
    first_layer: nn.Module,
    embeddings: Embeddings,
    formats: Sequence[str],
    inputs: dict[str, Any],
) -> list[Tensor]:
    """Compute the first layer's input once for each format of the quantised embedding.

    Args:
        base: The module that runs the layers.
        first_layer: The first layer of the model.
        embeddings: The embedding and the output head of the model.
        formats: The weight formats for the embedding.
        inputs: The arguments for calling `base`.

    Returns:
        For each format, the states before the first layer [rows, tokens, …].
    """
    states: list[Tensor] = []

    def stop(*args: Any, **kwargs: Any) -> Any:
        states.append(input_state(args, kwargs))
        raise _ReachedError

    stop.is_weightless = True  # type: ignore[attr-defined]
    for form in formats:
        with embeddings.temporary_format("embedding", form), replaced_forward(first_layer, stop):
            try:
                base(**inputs)
            except _ReachedError:
                continue
        raise RefusalError("the model did not run its first layer when it read a plain text")
    return states
