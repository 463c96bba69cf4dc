"""Tokenise requests with lm-eval's own code, without scoring the requests.

This module also gives access to lm-eval's unmodified models, for comparisons with tracker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from tracker.benchmarks.private import HFLM
from tracker.schema.config import BenchmarkSpec
from tracker.schema.documents import Document, Request
from tracker.schema.errors import BenchmarkError, first_line, translate_errors
from tracker.schema.fields import decode_arguments
from tracker.schema.provenance import content_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_QUESTION = "Question: What are 19 + 23?\nAnswer:"


def huggingface_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Any:
    """Wrap an intact or pruned model in lm-eval's unmodified Hugging Face class."""
    return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


def vllm_class() -> Any:
    """Import and return lm-eval's class for vLLM models.

    The import also loads vLLM.
    """
    from lm_eval.models.vllm_causallms import VLLM

    return VLLM


def score_with_lm_eval(
    model: TemplateLM, documents: Sequence[Document]
) -> list[tuple[float, bool]]:
    """Score documents with a model of lm-eval, in the same way as the command `lm_eval`.

    Returns the log-likelihood of each request, and whether its continuation is greedy.
    """
    requests = [
        (None, list(request.context), list(request.continuation))
        for document in documents
        for request in document.requests
    ]
    answers: list[tuple[float, bool]] = model._loglikelihood_tokens(requests, disable_tqdm=True)
    return answers


class RequestEncoder(HFLM):  # type: ignore[misc]
    """Subclass of lm-eval's Hugging Face model that records requests instead of scoring them."""

    _max_tokens: int | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        spec: BenchmarkSpec | None = None,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1)
        if spec is not None:
            self.chat_template_args = decode_arguments(spec.chat_template_args)
            if spec.enable_thinking is not None:
                self.chat_template_args["enable_thinking"] = spec.enable_thinking
        self._recorded: list[Request] = []

    def check_chat_template(self, spec: BenchmarkSpec) -> None:
        """Raise BenchmarkError if lm-eval cannot apply the chat template or the system prompt.

        lm-eval always applies the default template, and silently omits a system prompt that the
        template rejects.
        """
        if not spec.apply_chat_template:
            return
        try:
            template = self.chat_template(spec.apply_chat_template)
            is_default = template == self.tokenizer.get_chat_template()
        except ValueError as error:
            raise BenchmarkError(f"apply_chat_template: {first_line(error)}") from None
        if not is_default:
            raise BenchmarkError(
                "apply_chat_template: lm-eval always applies the tokenizer's default template, but "
                f"{spec.apply_chat_template!r} is not the default. Make it the default in the "
                "tokenizer's configuration, and write apply_chat_template: true"
            )
        prompt = spec.system_instruction
        if prompt is None:
            return
        turns = [{"role": "system", "content": prompt}, {"role": "user", "content": "?"}]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **self.chat_template_args
            )
            problem = "" if prompt in text else "shows no system prompt"
        except TemplateError as error:
            problem = f"refuses a system prompt ({error})"
        if problem:
            raise BenchmarkError(
                f"system_instruction: the model's chat template {problem}, so lm-eval would drop "
                "the prompt; leave out system_instruction, or apply_chat_template"
            )

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
        """Apply the chat template as lm-eval does.

        Raises BenchmarkError if the template fails.
        """
        with translate_errors(
            lambda error: BenchmarkError(
                f"apply_chat_template: the model's chat template fails ({type(error).__name__}: "
                f"{first_line(error)}); correct the template, change chat_template_args or "
                "fewshot_as_multiturn, or leave apply_chat_template out"
            )
        ):
            return str(super().apply_chat_template(*args, **kwargs))

    def tokenisation_digest(self, with_template: bool) -> str:
        """Return a hash of one tokenised test request, to detect changes of the tokenisation."""
        turns = [{"role": "user", "content": _QUESTION}]
        context = self.apply_chat_template(turns) if with_template else _QUESTION
        instance = Instance("loglikelihood", doc={}, arguments=(context, " 42"), idx=0)
        (request,) = self.encode([instance])
        is_native = not type(self.model).__module__.startswith("transformers_modules.")
        return content_hash([request.context, request.continuation, is_native])[:16]

    def encode(self, instances: Sequence[Any]) -> list[Request]:
        """Tokenise lm-eval's `loglikelihood` instances without truncation."""
        self._recorded = []
        self.loglikelihood(list(instances), disable_tqdm=True)
        return self._recorded

    def rolling_windows(self, text: str, max_tokens: int | None = None) -> list[Request]:
        """Cut a text into lm-eval's rolling windows.

        Only the first `max_tokens` tokens of the text are used; None = all tokens.
        """
        self._recorded, self._max_tokens = [], max_tokens
        instance = Instance("loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
        try:
            self.loglikelihood_rolling([instance], disable_tqdm=True)
        finally:
            self._max_tokens = None
        return self._recorded

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """Tokenise a text as lm-eval does, but keep only the first `max_tokens` tokens."""
        tokens: list[int] = super().tok_encode(string, *args, **kwargs)
        return tokens[: self._max_tokens]

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        # Rolling windows arrive batch by batch.
        self._recorded += [
            Request(tuple(context), tuple(continuation)) for _, context, continuation in requests
        ]
        return [(0.0, False)] * len(requests)
