"""Tokenise requests with lm-eval's own code, without its scoring.

Also return lm-eval's own unmodified models, with which tracker is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from tracker.benchmarks.private import HFLM
from tracker.core.config import BenchmarkSpec
from tracker.core.documents import Document, Request
from tracker.core.errors import BenchmarkError, first_line, translate_errors
from tracker.core.fields import decoded
from tracker.core.provenance import content_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_QUESTION = "Question: What are 19 + 23?\nAnswer:"


def huggingface_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Any:
    """Return lm-eval's own Hugging Face model, untouched, around a model that may be pruned."""
    return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


def vllm_class() -> Any:
    """Import lm-eval's vLLM model, which imports vLLM."""
    from lm_eval.models.vllm_causallms import VLLM

    return VLLM


def score_with_lm_eval(
    model: TemplateLM, documents: Sequence[Document]
) -> list[tuple[float, bool]]:
    """Score documents once with one of lm-eval's models, as `lm_eval` does.

    Returns the log-likelihood and greedy flag of all requests of all documents, in order.
    """
    requests = [
        (None, list(request.context), list(request.continuation))
        for document in documents
        for request in document.requests
    ]
    answers: list[tuple[float, bool]] = model._loglikelihood_tokens(requests, disable_tqdm=True)
    return answers


class RequestEncoder(HFLM):  # type: ignore[misc]
    """lm-eval's Hugging Face model that records its requests instead of scoring them.

    Tokenisation, the treatment of empty contexts, special tokens and chat templates are inherited.
    """

    _longest: int | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        spec: BenchmarkSpec | None = None,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1)
        if spec is not None:
            thinking = spec.enable_thinking
            self.chat_template_args = {
                **decoded(spec.chat_template_args),
                **({} if thinking is None else {"enable_thinking": thinking}),
            }
        self._recorded: list[Request] = []

    def check_chat(self, spec: BenchmarkSpec) -> None:
        """Raise BenchmarkError for a chat template that is missing, or ignores the system prompt.

        If a named template is missing, lm-eval logs the name but applies the default template. If a
        template rejects a system prompt, lm-eval drops the prompt.
        """
        if not spec.apply_chat_template:
            return
        try:
            default = self.tokenizer.get_chat_template()
            named = self.chat_template(spec.apply_chat_template)
        except ValueError as error:
            raise BenchmarkError(f"apply_chat_template: {first_line(error)}") from None
        if named != default:
            raise BenchmarkError(
                f"apply_chat_template: lm-eval applies the tokenizer's default template, whatever "
                f"name it is given, and {spec.apply_chat_template!r} is another one; make it "
                "the default in the tokenizer's configuration, and write apply_chat_template: true"
            )
        said = spec.system_instruction
        if said is None:
            return
        turns = [{"role": "system", "content": said}, {"role": "user", "content": "?"}]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **self.chat_template_args
            )
        except TemplateError as error:
            why = f"refuses a system prompt ({error})"
        else:
            if said in text:
                return
            why = "shows no system prompt"
        raise BenchmarkError(
            f"system_instruction: the model's chat template {why}, and lm-eval would leave it out; "
            "leave out system_instruction, or apply_chat_template"
        )

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
        """Apply the chat template as lm-eval does; convert all its errors to BenchmarkError."""
        with translate_errors(
            lambda error: BenchmarkError(
                f"apply_chat_template: the model's chat template fails ({type(error).__name__}: "
                f"{first_line(error)}); correct it, change chat_template_args or "
                "fewshot_as_multiturn, or leave apply_chat_template out"
            )
        ):
            return str(super().apply_chat_template(*args, **kwargs))

    def tokenisation(self, with_template: bool) -> str:
        """Hash the tokenisation: tokens of a short request, and whether the model has own code."""
        turn = [{"role": "user", "content": _QUESTION}]
        context = self.apply_chat_template(turn) if with_template else _QUESTION
        instance = Instance("loglikelihood", doc={}, arguments=(context, " 42"), idx=0)
        (request,) = self.encode([instance])
        is_native = not type(self.model).__module__.startswith("transformers_modules.")
        return content_hash([request.context, request.continuation, is_native])[:16]

    def encode(self, instances: Sequence[Any]) -> list[Request]:
        """Tokenise lm-eval's `loglikelihood` instances: one request each, in order, untruncated."""
        self._recorded = []
        self.loglikelihood(list(instances), disable_tqdm=True)
        return self._recorded

    def windows(self, text: str, tokens: int | None = None) -> list[Request]:
        """Cut a text into lm-eval's rolling windows, so that each token is predicted once.

        `tokens` is the number of first tokens to use; None = all.
        """
        self._recorded, self._longest = [], tokens
        instance = Instance("loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
        try:
            self.loglikelihood_rolling([instance], disable_tqdm=True)
        finally:
            self._longest = None
        return self._recorded

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """Tokenise as lm-eval does, up to the number of tokens that is used."""
        tokens: list[int] = super().tok_encode(string, *args, **kwargs)
        return tokens[: self._longest]

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        # Rolling windows arrive batch by batch.
        self._recorded += [
            Request(tuple(context), tuple(continuation)) for _, context, continuation in requests
        ]
        return [(0.0, False)] * len(requests)
