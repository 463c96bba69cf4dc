"""Generate texts with lm-eval's code, with several models in one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from tracker.benchmarks.private import HFLM
from tracker.schema.documents import Prompt
from tracker.schema.errors import CellError

Decoding = Callable[[Sequence[int]], AbstractContextManager[Mapping[str, Any]]]
"""Function that prepares the model for rows of one prompt and yields options of `generate`."""


class TextGenerator(HFLM):  # type: ignore[misc]
    """Subclass of lm-eval's Hugging Face model that generates texts."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        think_end_token: str | int | None = None,
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=1,
            think_end_token=think_end_token,
        )
        self._decoding: Decoding | None = None

    def generate_texts(self, prompts: Sequence[Prompt]) -> list[str]:
        """Generate a continuation of each prompt; cut the continuations at stop strings.

        Raises CellError if no context length is left for the prompt.
        """
        max_tokens = max(prompt.max_tokens for prompt in prompts)
        if max_tokens >= self.max_length:
            raise CellError(
                f"max_gen_toks is {max_tokens}, but the model reads only {self.max_length} tokens, "
                "so no tokens are left for the prompt; lower max_gen_toks in gen_kwargs"
            )
        instances = [
            Instance("generate_until", doc={}, arguments=(p.text, dict(p.settings)), idx=0)
            for p in prompts
        ]
        texts: list[str] = self.generate_until(instances, disable_tqdm=True)
        return texts

    def generate_rows(self, prompt: Prompt, n_rows: int, decoding: Decoding) -> list[str]:
        """Generate `n_rows` continuations of one prompt, each with another ablated model."""
        self._decoding = decoding
        self.batch_size_per_gpu = n_rows
        try:
            return self.generate_texts([prompt] * n_rows)
        finally:
            self._decoding = None
            self.batch_size_per_gpu = 1

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **settings: Any
    ) -> Any:
        if self._decoding is None:
            return super()._model_generate(context, max_length, stop, **settings)
        settings.pop("temperature", None)
        settings["do_sample"] = False
        criteria = StoppingCriteriaList([_RowCriterion(self.tokenizer, stop, context)])
        with self._decoding(context[0].tolist()) as cache_options:
            return self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=criteria,
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                **settings,
                **cache_options,
            )


class _RowCriterion(StoppingCriteria):  # type: ignore[misc]
    """Stopping criterion that ends each row of a batch at its first stop string."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: list[str], context: Tensor
    ) -> None:
        rows, tokens = context.shape
        self._criteria = stop_sequences_criteria(tokenizer, stop, tokens, rows)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for criterion in self._criteria:
            criterion(input_ids, scores)
        rows = zip(*(criterion.done_tracker for criterion in self._criteria), strict=True)
        return torch.tensor([*map(any, rows)], dtype=torch.bool, device=input_ids.device)
