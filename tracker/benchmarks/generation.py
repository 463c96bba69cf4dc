"""Generate texts with lm-eval's own code; rows of a batch may use different models."""

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
from tracker.core.documents import Prompt
from tracker.core.errors import CellError

Decoding = Callable[[Sequence[int]], AbstractContextManager[Mapping[str, Any]]]
"""Opens the model for several rows of one prompt (token ids); yields options of `generate`."""


class TextGenerator(HFLM):  # type: ignore[misc]
    """lm-eval's Hugging Face model for generation.

    Tokenisation, truncation, special tokens, stop strings and the cutting of texts are inherited.
    """

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

    def texts(self, prompts: Sequence[Prompt]) -> list[str]:
        """Continue prompts one by one with the current model, and cut the texts as tasks expect.

        Raises CellError if the model's context is no longer than a text may be.
        """
        longest = max(prompt.longest for prompt in prompts)
        if longest >= self.max_length:
            raise CellError(
                f"a text may have {longest} tokens, and the model reads {self.max_length}: nothing "
                "is left for the prompt; lm-eval refuses it too"
            )
        instances = [
            Instance("generate_until", doc={}, arguments=(p.text, dict(p.settings)), idx=0)
            for p in prompts
        ]
        found: list[str] = self.generate_until(instances, disable_tqdm=True)
        return found

    def texts_of_rows(self, prompt: Prompt, rows: int, decoding: Decoding) -> list[str]:
        """Continue one prompt with a different model in each row of a batch: one text a row."""
        self._decoding = decoding
        self.batch_size_per_gpu = rows
        try:
            return self.texts([prompt] * rows)
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
        with self._decoding(context[0].tolist()) as cached:
            return self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=StoppingCriteriaList([_EachRow(self.tokenizer, stop, context)]),
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                **settings,
                **cached,
            )


class _EachRow(StoppingCriteria):  # type: ignore[misc]
    """Stops each row at its first stop string; lm-eval's own criterion waits for all rows."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: list[str], context: Tensor
    ) -> None:
        rows, tokens = context.shape
        self._criteria = stop_sequences_criteria(tokenizer, stop, tokens, rows)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for criterion in self._criteria:
            criterion(input_ids, scores)
        done = [any(flags) for flags in zip(*(c.done_tracker for c in self._criteria), strict=True)]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)
