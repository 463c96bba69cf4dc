"""What ablations say about documents: the engine's scores and lm-eval's generation, joined."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from tracker.ablations import INTACT, Ablation
from tracker.benchmarks.generation import TextGenerator
from tracker.documents import Document, Prompt
from tracker.engine.check import REFUSALS, check, some_of_each_kind
from tracker.engine.sweep import DocumentScores, Engine

CHECKED_TOKENS = 16
"""Tokens that the check lets every ablation generate."""


@dataclass(frozen=True)
class Scorer:
    """Scores documents, and continues the prompts of those that have one.

    Attributes:
        engine: The model's engine.
        generation: Continues prompts; None where no document has one.
    """

    engine: Engine
    generation: Generation | None = None

    def score(
        self,
        documents: Sequence[Document],
        ablations: Sequence[Ablation],
        progress: Callable[[int], None],
    ) -> list[DocumentScores]:
        """Score documents.

        Args:
            documents: What to score.
            ablations: What to remove; must include the baseline.
            progress: Called with how many responses have come, `responses` of them a document.

        Returns:
            One result a document, in the same order.
        """
        results = self.engine.score(documents, ablations, progress)
        if self.generation is None:
            return results
        return [self._with_texts(result, ablations, progress) for result in results]

    def _with_texts(
        self,
        result: DocumentScores,
        ablations: Sequence[Ablation],
        progress: Callable[[int], None],
    ) -> DocumentScores:
        prompt = result.document.prompt
        if prompt is None or self.generation is None:
            return result
        texts = self.generation.texts(prompt, ablations)
        progress(len(ablations))
        responses = [
            [first._replace(text=text), *others]
            for (first, *others), text in zip(result.responses, texts, strict=True)
        ]
        return replace(result, responses=responses)

    @staticmethod
    def responses(document: Document) -> int:
        """Count what a document asks for under one ablation.

        Args:
            document: The document.

        Returns:
            Requests to score and texts to generate.
        """
        return len(document.requests) + (document.prompt is not None)


def checked_scorer(
    engine: Engine,
    tokenizer: Any,
    documents: Sequence[Document],
    ablations: Sequence[Ablation],
) -> tuple[Scorer, list[str]]:
    """Find out what can be shared exactly, by computing a little of it both ways.

    Args:
        engine: The engine, with full sharing.
        tokenizer: The model's tokenizer.
        documents: The cell's documents.
        ablations: What will be removed.

    Returns:
        The scorer to use, and one line for each kind of sharing that was lost.
    """
    checked = check(engine, documents, ablations)
    lost = [checked.lost] if checked.lost else []
    prompts = [document.prompt for document in documents if document.prompt is not None]
    if not prompts:
        return Scorer(checked.engine), lost
    generator = TextGenerator(engine.loaded.model, tokenizer)
    few = [INTACT, *some_of_each_kind(ablations)]
    generation, why = Generation(checked.engine, generator).checked(prompts[0], few)
    return Scorer(checked.engine, generation), [*lost, *([why] if why else [])]


@dataclass(frozen=True)
class Generation:
    """Continues prompts under many ablations.

    Attributes:
        engine: The model's engine.
        generator: lm-eval's generation with the same model.
        together: Whether all ablations generate in one batch; otherwise each layer is taken out.
    """

    engine: Engine
    generator: TextGenerator
    together: bool = True

    def texts(self, prompt: Prompt, ablations: Sequence[Ablation]) -> list[str]:
        """Continue a prompt.

        Args:
            prompt: What to continue.
            ablations: Under which ablations; the baseline must be among them.

        Returns:
            One text an ablation, in the same order.
        """
        if not self.together:
            found = []
            for ablation in ablations:
                with self.engine.removed(ablation):
                    found += self.generator.texts([prompt])
            return found
        tokens = len(self.generator.tok_encode(prompt.text)) + prompt.longest
        tokens = min(tokens, self.generator.max_length)  # longer prompts are cut
        by_ablation: dict[Ablation, str] = {}
        for group in self.engine.decoding_groups(ablations, tokens):
            by_ablation |= zip(group, self._texts_together(prompt, group), strict=True)
        return [by_ablation[ablation] for ablation in ablations]

    def _texts_together(self, prompt: Prompt, group: Sequence[Ablation]) -> list[str]:
        @contextmanager
        def decoding(tokens: Sequence[int]) -> Iterator[Mapping[str, Any]]:
            with self.engine.decoding(group, tokens) as cached:
                yield cached

        return self.generator.texts_of_rows(prompt, len(group), decoding)

    def checked(
        self, prompt: Prompt, ablations: Sequence[Ablation]
    ) -> tuple[Generation, str | None]:
        """Generate a few tokens both ways, and stay together if the texts are equal.

        In half precision rounding differs with the size of a batch, also within lm-eval, so half of
        the texts may differ there.

        Args:
            prompt: What is continued.
            ablations: A few of the ablations, with the baseline.

        Returns:
            What to use, and one line that says what was lost and why.
        """
        # Stop strings would leave little to compare where a text begins with one.
        settings = {**prompt.limited_to(CHECKED_TOKENS).settings, "until": []}
        short = replace(prompt, settings=settings)
        apart = replace(self, together=False)
        truth = apart.texts(short, ablations)
        try:
            found = self.texts(short, ablations)
        except REFUSALS as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            return apart, f"generating together is refused by the model ({said})"
        equal = sum(a == b for a, b in zip(found, truth, strict=True))
        exact = self.engine.loaded.model.dtype in (torch.float32, torch.float64)
        if equal < (len(truth) if exact else len(truth) / 2):
            return apart, f"generating together changes {len(truth) - equal} of {len(truth)} texts"
        return self, None
