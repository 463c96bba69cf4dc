"""Run embeddings and output heads, also in formats; the head only on predicting tokens.

The model's own modules run with other weights, so everything else that a class does (a factor,
positions, soft-capping) stays the same.
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

from tracker.core.grouping import grouped
from tracker.engine.refusal import RefusalError
from tracker.models.devices import put, take
from tracker.models.hooks import replaced_forward, state_of
from tracker.models.layers import find_base
from tracker.models.parts.linear_maps import Embeddings

BLOCK = 2048
"""Tokens of the vocabulary whose logits exist at a time on a CPU. All of them at once would be
written to memory and read back."""
STATES = 640
"""Hidden states that pass the head together on a CPU."""
LOGITS_BYTES = 64 * 2**20
"""Bytes of logits that exist at a time where the vocabulary is not cut into blocks."""


class Predictions(NamedTuple):
    """The head's predictions for some tokens.

    Attributes:
        logprobs: Log-probability of each token [streams, predicted], in the model's dtype.
        greedy: Whether each token is the most likely one [streams, predicted].
    """

    logprobs: Tensor
    greedy: Tensor


class _States(BaseModelOutputWithPast):  # type: ignore[misc]
    """Output of a base: the hidden states, without the other outputs that a head may pass on."""

    def __getattr__(self, name: str) -> None:
        """Return None for cross-attentions, router logits and other missing outputs."""


class Head:
    """The part of a model behind its base: projection, soft-capping, scaling.

    The logits of all streams at once, [streams, kept, vocabulary], may be gigabytes, so the states
    pass in chunks of streams. On a CPU in full precision the vocabulary is cut into blocks of
    `BLOCK` tokens too: the projection multiplies only some rows of its weight, [block, hidden], and
    the rest of the head (soft-capping, scaling) follows as usual. Of each block's logits [streams,
    kept, block] only three things are kept: the largest and its index, the log-sum-exp, and the
    logits of the predicted tokens in the block. The log-sum-exp of the blocks' log-sum-exps is that
    of the whole vocabulary, so `wanted - normaliser` is the log-softmax, up to the order of
    summation.

    This holds if the projection is linear and the rest of the head treats each logit separately;
    `_gives_the_same` tests it. Half precision is not cut, because lm-eval rounds after the
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
            starts = range(0, self._vocabulary, BLOCK)
            blocks = [(start, min(start + BLOCK, self._vocabulary)) for start in starts]
            if self._gives_the_same(blocks):
                self._blocks = blocks

    @property
    def in_blocks(self) -> bool:
        """True if the vocabulary is cut into blocks."""
        return len(self._blocks) > 1

    def predictions(
        self, output: ModelOutput, hidden: Tensor, predictor: Tensor, predicted: Tensor
    ) -> Predictions:
        """Score predicted tokens.

        Args:
            output: The output of the base.
            hidden: Hidden states that predict something [streams, kept, hidden].
            predictor: The index into `kept` for every predicted token [predicted].
            predicted: The tokens' ids [predicted].

        Returns:
            Their log-probabilities and greedy flags.
        """
        kept = hidden.shape[1]
        if self.in_blocks:
            size = max(1, STATES // kept)
            score = self._score_in_blocks
        else:
            size = max(1, LOGITS_BYTES // (self._vocabulary * hidden.element_size() * kept))
            score = self._score_at_once
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

    def _score_at_once(
        self, output: ModelOutput, predictor: Tensor, predicted: Tensor
    ) -> Predictions:
        """Compute the log-softmax in the logits' own dtype, as lm-eval does by default."""
        logprobs = functional.log_softmax(self._logits(output), dim=-1)
        best = logprobs.max(-1).indices  # the first of equals, as argmax, in half its time
        return Predictions(logprobs[:, predictor, predicted], best[:, predictor] == predicted)

    def _score_in_blocks(
        self, output: ModelOutput, predictor: Tensor, predicted: Tensor
    ) -> Predictions:
        """Compute maximum, normaliser and wanted logits block by block.

        The first of equal maxima wins, within a block and between blocks, as in an argmax over all.
        """
        states = output.last_hidden_state
        highest: list[Tensor] = []
        normalisers = []
        best = states.new_zeros(states.shape[:2], dtype=torch.long)
        wanted = states.new_empty(len(states), len(predicted))
        for start, stop in self._blocks:
            logits = self._logits_of_block(output, start, stop)
            top, place = logits.max(-1)
            if highest:
                better = top > highest[-1]
                best = torch.where(better, place + start, best)
                top = torch.where(better, top, highest[-1])
            else:
                best = place
            highest.append(top)
            normalisers.append(logits.logsumexp(-1))
            inside = ((predicted >= start) & (predicted < stop)).nonzero()[:, 0]
            wanted[:, inside] = logits[:, predictor[inside], predicted[inside] - start]
        normaliser = torch.stack(normalisers).logsumexp(0)
        return Predictions(wanted - normaliser[:, predictor], best[:, predictor] == predicted)

    def _logits_of_block(self, output: ModelOutput, start: int, stop: int) -> Tensor:
        weight, bias = self._projection.weight, self._projection.bias
        some = None if bias is None else bias[start:stop]
        projected = partial(functional.linear, weight=weight[start:stop], bias=some)
        with replaced_forward(self._projection, projected):
            return self._logits(output)

    def _logits(self, output: ModelOutput) -> Tensor:
        """Run the model's own head on given states: [streams, kept, vocabulary].

        The head differs between architectures, and is code in `forward`, not a module that could be
        called. So the whole model is called, on one placeholder token id, while its base is
        replaced by a function that returns `output`, with the states [streams, kept, hidden] as
        `last_hidden_state`. The head then does what it always does. Two checks follow: that the
        base was called, and that the logits have the states' shape. A head that takes its input
        elsewhere would answer for the wrong states.
        """
        asked = []

        def base(*args: Any, **kwargs: Any) -> Any:
            asked.append(True)
            return output

        with replaced_forward(self.base, base):
            # Where a model is spread over devices, accelerate moves the logits to the ids' device.
            ids = torch.zeros(1, 1, dtype=torch.long, device=output.last_hidden_state.device)
            answer = self._model(input_ids=ids)
        logits: Tensor | None = getattr(answer, "logits", None)
        if not asked or logits is None or logits.shape[:2] != output.last_hidden_state.shape[:2]:
            raise RefusalError("its head does not take what the layers return")
        return logits

    @torch.inference_mode()
    def _gives_the_same(self, blocks: list[tuple[int, int]]) -> bool:
        """Return whether the code behind the projection treats each logit separately.

        Four states, rows of the projection itself [1, 4, hidden], pass whole and in blocks. A
        soft-cap gives equal results, a normalisation over the vocabulary does not.
        """
        weight = self._projection.weight
        states = weight[torch.linspace(0, len(weight) - 1, 4).long()][None]
        output = _States(last_hidden_state=states)
        try:
            whole = self._logits(output)
            parts = [self._logits_of_block(output, *block) for block in blocks]
        except (RefusalError, RuntimeError, AttributeError, TypeError):
            return False
        return torch.allclose(torch.cat(parts, dim=-1), whole, rtol=1e-4, atol=1e-4)


def by_row(
    ends: Embeddings, name: str, formats: Sequence[str | None]
) -> AbstractContextManager[None]:
    """Give the embedding or the head its own weights for each row of a batch, until exit."""
    module = ends[name].module
    forward: Callable[[Tensor], Tensor] = module.forward
    rows_of = grouped(range(len(formats)), lambda row: formats[row])

    def by_format(given: Tensor) -> Tensor:
        output = forward(given)
        if len(given) != len(formats):
            raise RefusalError(f"its {name} is not called with a row a text")
        for form, rows in rows_of.items():
            if form is not None:
                with ends.having(name, form):
                    put(output, rows, forward(take(given, rows)))
        return output

    return replaced_forward(module, by_format) if any(formats) else nullcontext()


class _ReachedError(Exception):
    """Raised when the first layer is called."""


def first_states(
    base: PreTrainedModel,
    first: nn.Module,
    ends: Embeddings,
    formats: Sequence[str],
    inputs: dict[str, Any],
) -> list[Tensor]:
    """Compute the input of the first layer for embeddings in formats; no layer runs.

    Args:
        base: The module that runs the layers.
        first: The first layer.
        ends: The embedding.
        formats: The formats of the embedding.
        inputs: The arguments of the base.

    Returns:
        The states [rows, tokens, …] for each format.
    """
    states: list[Tensor] = []

    def reached(*args: Any, **kwargs: Any) -> Any:
        states.append(state_of(args, kwargs))
        raise _ReachedError

    reached.is_weightless = True  # type: ignore[attr-defined]
    for form in formats:
        with ends.having("embedding", form), replaced_forward(first, reached):
            try:
                base(**inputs)
            except _ReachedError:
                continue
        raise RefusalError("its first layer does not run on plain text")
    return states
