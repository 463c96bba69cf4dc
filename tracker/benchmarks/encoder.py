"""lm-eval's own tokenisation of its requests, without its scoring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from tracker.documents import Request


class RequestEncoder(HFLM):  # type: ignore[misc]
    """lm-eval's Hugging Face model with the scoring replaced by a record of what it would score.

    Tokenisation, the treatment of empty contexts, special tokens and chat templates are inherited.
    """

    _longest: int | None = None

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1)
        self._recorded: list[Request] = []

    def encode(self, instances: Sequence[Any]) -> list[Request]:
        """Tokenise lm-eval's `loglikelihood` instances: a request each, in order, not truncated."""
        self._recorded = []
        self.loglikelihood(list(instances), disable_tqdm=True)
        return self._recorded

    def windows(self, text: str, tokens: int | None = None) -> list[Request]:
        """Cut a text into lm-eval's rolling windows, so that each token is predicted once.

        `tokens` are the first ones that count; None = all.
        """
        self._recorded, self._longest = [], tokens
        instance = Instance("loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
        try:
            self.loglikelihood_rolling([instance], disable_tqdm=True)
        finally:
            self._longest = None
        return self._recorded

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """Tokenise as lm-eval does, no further than is read."""
        tokens: list[int] = super().tok_encode(string, *args, **kwargs)
        return tokens[: self._longest]

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        # Rolling windows come batch by batch.
        self._recorded += [
            Request(tuple(context), tuple(continuation)) for _, context, continuation in requests
        ]
        return [(0.0, False)] * len(requests)
