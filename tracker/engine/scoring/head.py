"""Run embeddings and output heads, also quantised; the head only on predicting tokens.

The model's own modules run with quantised weights, so all other computations of the class (a
factor, positions, soft-capping) stay the same.
"""

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

from tracker.core.grouping import group_by
from tracker.engine.refusal import RefusalError
from tracker.models.devices import put_entries, take_entries
from tracker.models.hooks import input_state, replaced_forward
from tracker.models.layers import find_base
from tracker.models.parts.linear_maps import Embeddings

VOCABULARY_BLOCK = 2048
"""Number of tokens of the vocabulary whose logits exist at a time on a CPU. The logits of all
tokens would be written to memory and read back."""
HEAD_STATES = 640
"""Number of hidden states that pass the head together on a CPU."""
LOGITS_BYTES = 64 * 2**20
"""Maximum bytes of logits at a time if the vocabulary is not cut into blocks."""


class Predictions(NamedTuple):
    """The head's predictions for some tokens.

    Attributes:
        logprobs: Log-probability of each token [streams, predicted], in the model's dtype.
        greedy: Whether each token is the most likely one [streams, predicted].
    """

    logprobs: Tensor
    greedy: Tensor


class _States(BaseModelOutputWithPast):  # type: ignore[misc]
    """Output of a base that holds only hidden states; all other outputs are None."""

    def __getattr__(self, name: str) -> None:
        """Return None for cross-attentions, router logits and other missing outputs."""


class Head:
    """The output head of a model, after the base: projection, soft-capping, scaling.

    The logits of all streams at once, [streams, kept, vocabulary], may be gigabytes, so the states
    pass in chunks of streams. On a CPU in full precision the vocabulary is cut into blocks of
    `VOCABULARY_BLOCK` tokens too: the projection multiplies only some rows of its weight, [block,
    hidden], and the rest of the head (soft-capping, scaling) follows as usual. Of each block's
    logits [streams, kept, block] only three values are stored: the maximum with its index, the
    log-sum-exp, and the logits of the predicted tokens in the block. The log-sum-exp of the blocks'
    log-sum-exps is that of the whole vocabulary, so `targets - normaliser` is the log-softmax, up
    to the order of summation.

    This holds if the projection is linear and the rest of the head treats each logit separately;
    `_is_separable` tests it. Half precision is not cut, because lm-eval rounds after the
    log-softmax over the whole vocabulary.
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
        """True if the vocabulary is cut into blocks."""
        return len(self._blocks) > 1

    def predictions(
        self, output: ModelOutput, hidden: Tensor, predictor: Tensor, predicted: Tensor
    ) -> Predictions:
        """Score predicted tokens.

        Args:
            output: The output of the base.
            hidden: Hidden states that predict something [streams, kept, hidden].
            predictor: The index of the state that predicts each token [predicted].
            predicted: The tokens' ids [predicted].

        Returns:
            The tokens' log-probabilities and greedy flags.
        """
        n_kept = hidden.shape[1]
        if self.has_blocks:
            size = max(1, HEAD_STATES // n_kept)
            score = self._score_in_blocks
        else:
            size = max(1, LOGITS_BYTES // (self._vocabulary * hidden.element_size() * n_kept))
            score = self._score_whole
        parts = [
            score(replace(output, last_hidden_state=chunk), predictor, predicted)
            for chunk in torch.split(hidden, size)
        ]
        return Predictions(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def logits(self, output: ModelOutput, states: Tensor) -> Tensor:
        """Run the head on states [streams, kept, hidden]: [streams, kept, vocabulary].

        `output` is the output of the base. All logits are in memory at once.
        """
        return self._logits(replace(output, last_hidden_state=states))

    def _score_whole(
        self, output: ModelOutput, predictor: Tensor, predicted: Tensor
    ) -> Predictions:
        """Compute the log-softmax in the logits' own dtype, as lm-eval does by default."""
        logprobs = functional.log_softmax(self._logits(output), dim=-1)
        argmax = logprobs.max(-1).indices  # the first of equals, as argmax, in half its time
        return Predictions(logprobs[:, predictor, predicted], argmax[:, predictor] == predicted)

    def _score_in_blocks(
        self, output: ModelOutput, predictor: Tensor, predicted: Tensor
    ) -> Predictions:
        """Compute maximum, normaliser and target logits block by block.

        The first of equal maxima wins, within a block and between blocks, as in an argmax over all.
        """
        states = output.last_hidden_state
        maxima: list[Tensor] = []
        normalisers = []
        argmax = states.new_zeros(states.shape[:2], dtype=torch.long)
        targets = states.new_empty(len(states), len(predicted))
        for start, stop in self._blocks:
            logits = self._logits_of_block(output, start, stop)
            maximum, indices = logits.max(-1)
            if maxima:
                is_higher = maximum > maxima[-1]
                argmax = torch.where(is_higher, indices + start, argmax)
                maximum = torch.where(is_higher, maximum, maxima[-1])
            else:
                argmax = indices
            maxima.append(maximum)
            normalisers.append(logits.logsumexp(-1))
            block_targets = ((predicted >= start) & (predicted < stop)).nonzero()[:, 0]
            ids = predicted[block_targets] - start
            targets[:, block_targets] = logits[:, predictor[block_targets], ids]
        normaliser = torch.stack(normalisers).logsumexp(0)
        return Predictions(targets - normaliser[:, predictor], argmax[:, predictor] == predicted)

    def _logits_of_block(self, output: ModelOutput, start: int, stop: int) -> Tensor:
        weight, bias = self._projection.weight, self._projection.bias
        block_bias = None if bias is None else bias[start:stop]
        project = partial(functional.linear, weight=weight[start:stop], bias=block_bias)
        with replaced_forward(self._projection, project):
            return self._logits(output)

    def _logits(self, output: ModelOutput) -> Tensor:
        """Return the logits of the model's own head for states [streams, kept, vocabulary].

        The head differs between architectures, and is part of the code of `forward`, not a module
        that could be called. So the whole model is called, on one placeholder token id, while its
        base is replaced by a function that returns `output`, with the states [streams, kept,
        hidden] as `last_hidden_state`. The head then does what it always does. Two checks follow:
        that the base was called, and that the logits have the states' shape. A head that takes its
        input from elsewhere would return logits of the wrong states.
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
            raise RefusalError("the head does not take the output of the layers")
        return logits

    @torch.inference_mode()
    def _is_separable(self, blocks: list[tuple[int, int]]) -> bool:
        """Return whether the code behind the projection treats each logit separately.

        Four states, rows of the projection itself [1, 4, hidden], pass whole and in blocks. A
        soft-cap gives equal results, a normalisation over the vocabulary does not.
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
    """Run the embedding or the head with a format for each row of a batch, until exit."""
    module = embeddings[name].module
    forward: Callable[[Tensor], Tensor] = module.forward
    rows_by_format = group_by(range(len(formats)), lambda row: formats[row])

    def by_format(inputs: Tensor) -> Tensor:
        output = forward(inputs)
        if len(inputs) != len(formats):
            raise RefusalError(f"the {name} is not called with one row per text")
        for form, rows in rows_by_format.items():
            if form is not None:
                with embeddings.temporary_format(name, form):
                    put_entries(output, rows, forward(take_entries(inputs, rows)))
        return output

    return replaced_forward(module, by_format) if any(formats) else nullcontext()


class _ReachedError(Exception):
    """The first layer was called."""


def compute_first_states(
    base: PreTrainedModel,
    first_layer: nn.Module,
    embeddings: Embeddings,
    formats: Sequence[str],
    inputs: dict[str, Any],
) -> list[Tensor]:
    """Compute the input of the first layer for quantised embeddings; no layer runs.

    Args:
        base: The module that runs the layers.
        first_layer: The first layer.
        embeddings: The embedding.
        formats: The formats of the embedding.
        inputs: The arguments of the base.

    Returns:
        The states [rows, tokens, …] for each format.
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
        raise RefusalError("the first layer does not run on plain text")
    return states
