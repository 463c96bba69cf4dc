"""Generate texts with lm-eval's code, with several models in one batch.

Sampled texts are coupled: to draw the token at a position of a sample, all models use the same
random noise. Two models with equal probabilities therefore generate equal texts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor
from transformers import PreTrainedTokenizerBase, generation

from tracker.benchmarks.private import HFLM
from tracker.schema.documents import GeneratedText, Prompt
from tracker.schema.errors import CellError
from tracker.schema.provenance import content_hash
from tracker.stats.arrays import Array

Decoding = Callable[[Sequence[int]], AbstractContextManager[Mapping[str, Any]]]
"""Function that prepares the model for rows of one prompt and yields options of `generate`."""


@dataclass
class _Batch:
    """Texts of one prompt that are generated together.

    Attributes:
        prompt: The prompt.
        samples: For each row, the index of the sample (text) that the row generates.
        decoding: Function that prepares the model; None if the model needs no preparation.
        budget: Number of tokens of each text that lm-eval reads.
        rows: Tokens of the prompt and of the whole texts; None if the texts are not generated yet.
        ends: For each row, the number of tokens of its text, and whether the token limit ended the
            text.
    """

    prompt: Prompt
    samples: Sequence[int]
    decoding: Decoding | None
    budget: int
    rows: Tensor | None = None
    ends: Sequence[tuple[int, bool]] = ()


class TextGenerator(HFLM):  # type: ignore[misc]
    """Subclass of lm-eval's Hugging Face model that generates texts."""

    _batch: _Batch

    def generate_texts(
        self, prompt: Prompt, samples: Sequence[int], decoding: Decoding | None = None
    ) -> list[GeneratedText]:
        """Generate continuations of a prompt, and cut the texts at stop strings.

        Args:
            prompt: The prompt.
            samples: For each text, the index of its sample. Two texts with one sample index are
                drawn with the same random numbers.
            decoding: Function that prepares the model for one row per text; None if the model needs
                no preparation.

        Returns:
            The texts, in the order of `samples`.

        Raises:
            CellError: No context length is left for the prompt.
        """
        limit, prompts = prompt.max_tokens, [prompt] * len(samples)
        if limit >= self.max_length:
            raise CellError(
                f"max_gen_toks is {limit}, but the model reads only {self.max_length} tokens, so "
                "no tokens are left for the prompt; lower max_gen_toks in gen_kwargs"
            )
        batch = self._batch = _Batch(prompt, samples, decoding, limit)
        self.batch_size_per_gpu = len(samples)
        by_budget = []
        for budget in (limit, *prompt.budgets):
            batch.budget = budget
            by_budget.append(generate_with_lm_eval(self, prompts))
        rows = zip(zip(*by_budget, strict=True), batch.ends, strict=True)
        return [GeneratedText(text, *end, tuple(early)) for (text, *early), end in rows]

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **settings: Any
    ) -> Any:
        """Return the token ids of the current batch, shortened to its token budget.

        The first call for a batch generates the texts. Later calls return beginnings of the
        generated texts.
        """
        batch, n_prompt = self._batch, context.shape[1]
        if batch.rows is None:
            batch.rows = self._generate_rows(context, max_length, stop, settings)
            texts, room = batch.rows[:, n_prompt:].tolist(), max_length - n_prompt
            batch.ends = [self._find_end(tokens, room, stop) for tokens in texts]
        return batch.rows[:, : n_prompt + batch.budget]

    def _generate_rows(
        self, context: Tensor, max_length: int, stop: list[str], settings: dict[str, Any]
    ) -> Any:
        batch, prompt, prompt_tokens = self._batch, self._batch.prompt, context[0].tolist()
        if batch.decoding is None and not prompt.is_sampled:
            return super()._model_generate(context, max_length, stop, **settings)
        if prompt.is_sampled:
            key = content_hash([prompt.seed, prompt_tokens])
            noise = CoupledNoise(key, batch.samples, len(prompt_tokens))
            settings["custom_generate"] = partial(_sample, noise=noise)
        else:
            settings.pop("temperature", None)
            settings["do_sample"] = False
        criteria = generation.StoppingCriteriaList([_RowCriterion(self.tokenizer, stop, context)])
        decoding = nullcontext({}) if batch.decoding is None else batch.decoding(prompt_tokens)
        with decoding as cache_options:
            return self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=criteria,
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                **settings,
                **cache_options,
            )

    def _find_end(self, tokens: list[int], room: int, stop: list[str]) -> tuple[int, bool]:
        """Count the tokens of a generated text, and check whether the token limit ended the text.

        Args:
            tokens: The generated tokens, padded after the end of the text.
            room: The maximum number of tokens.
            stop: Strings that end a text.

        Returns:
            The number of tokens before the end of the text, and True if the token limit ended the
            text (False if a stop string or an end token did).
        """
        end_ids = self.model.generation_config.eos_token_id
        end_ids = [*(end_ids if isinstance(end_ids, list) else [end_ids]), self.eot_token_id]
        count = min((tokens.index(end) for end in end_ids if end in tokens), default=len(tokens))
        while count and tokens[count - 1] == self.tokenizer.pad_token_id:
            count -= 1
        text = self.tok_decode(tokens[:count])
        return count, count == room and not any(term in text for term in stop if term)


def generate_with_lm_eval(model: TemplateLM, prompts: Sequence[Prompt]) -> list[str]:
    """Generate a text for each prompt with a model of lm-eval."""
    instances = [
        Instance("generate_until", doc={}, arguments=(p.text, dict(p.settings)), idx=0)
        for p in prompts
    ]
    texts: list[str] = model.generate_until(instances, disable_tqdm=True)
    return texts


def _sample(model: Any, input_ids: Tensor, noise: CoupledNoise, **options: Any) -> Any:
    """Sample texts with coupled random noise.

    At each position, the function chooses the token with the largest sum of log-probability and
    Gumbel noise.

    The log-probabilities already include the temperature and truncations such as top-p. The texts
    therefore have the same distribution as texts that transformers samples.
    """
    options["logits_processor"] = generation.LogitsProcessorList(
        [*options["logits_processor"], noise]
    )
    config = options["generation_config"] = copy.copy(options["generation_config"])
    config.do_sample = False
    return model._sample(input_ids, **options)


class CoupledNoise(generation.LogitsProcessor):  # type: ignore[misc]
    """Gumbel noise for a batch; all rows of the same sample get the same noise.

    Args:
        key: Text that identifies the prompt and the seed.
        samples: For each row, the index of its sample.
        start: Number of tokens of the prompt.
    """

    def __init__(self, key: str, samples: Sequence[int], start: int) -> None:
        self._key, self._start = key, start
        self._samples = sorted(set(samples))
        self._rows = [self._samples.index(sample) for sample in samples]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Add noise to the scores of all tokens at the position that is generated next."""
        position, size = input_ids.shape[1] - self._start, scores.shape[1]
        noise = [gumbel_noise(self._key, sample, position, size) for sample in self._samples]
        rows = torch.from_numpy(np.stack(noise)).to(scores.device, scores.dtype)
        return scores + rows[self._rows]


def gumbel_noise(key: str, sample: int, position: int, size: int) -> Array:
    """Draw standard Gumbel noise for each token of a vocabulary.

    `size` is the number of tokens in the vocabulary.

    Every position of every sample has its own seed, so the noise is the same on every machine and
    in every order of computation.
    """
    seed = int(content_hash([key, sample, position])[:32], 16)
    uniform = np.random.Generator(np.random.Philox(key=seed)).random(size)
    return -np.log(-np.log(np.maximum(uniform, np.finfo(np.float64).tiny)))


class _RowCriterion(generation.StoppingCriteria):  # type: ignore[misc]
    """Stopping criterion that ends each row of a batch at its first stop string."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: list[str], context: Tensor
    ) -> None:
        rows, tokens = context.shape
        self._criteria = stop_sequences_criteria(tokenizer, stop, tokens, rows)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        for criterion in self._criteria:
            criterion(input_ids, scores)
        rows = zip(*(criterion.done_tracker for criterion in self._criteria), strict=True)
        return torch.tensor([*map(any, rows)], dtype=torch.bool, device=input_ids.device)
