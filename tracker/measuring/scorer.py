"""Combine the engine's scores with generated texts, in rows of the fastest size."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from filelock import FileLock

from tracker.benchmarks.generation import TextGenerator
from tracker.core.changes import Ablation
from tracker.core.documents import Document, Prompt
from tracker.core.provenance import content_hash
from tracker.engine.refusal import refused
from tracker.engine.scoring.generation import generating, generation_groups
from tracker.engine.scoring.model import DEPTH_ONLY, ONE_BY_ONE, PLAIN
from tracker.engine.scoring.row_size import fastest, matters
from tracker.engine.scoring.sweep import DocumentScores, Engine
from tracker.engine.selfcheck.check import Fit, Kept, check, watch
from tracker.engine.selfcheck.reference import Comparison, Reference, in_words, shaken
from tracker.ledger.cache import keep, own_folder, recall
from tracker.models.devices import hardware

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECKED_TOKENS = 16
"""Number of tokens that the check generates under every ablation."""
_LESS = "measured with less sharing: "
_FINER = ". The report counts them; --dtype float32 avoids it"
DRAWS = 8
"""Number of times that a text is generated again with embeddings perturbed by rounding."""


@dataclass(frozen=True)
class Scorer:
    """Scores documents, and continues the prompts of generation tasks.

    `generation` is None if no document has a prompt. `which` describes a measured model that no
    saved checkpoint holds; else it is None.
    """

    engine: Engine
    generation: Generation | None = None
    which: str | None = None

    def score(
        self,
        documents: Sequence[Document],
        ablations: Sequence[Ablation],
        progress: Callable[[int], None],
    ) -> list[DocumentScores]:
        """Score documents under ablations, which include the baseline: one result per document.

        `progress` is called with the number of new responses.
        """
        results = self.engine.score(documents, ablations, progress)
        for number, result in enumerate(results):
            prompt = result.document.prompt
            if prompt is not None and self.generation is not None:
                texts = self.generation.texts(prompt, ablations)
                progress(len(ablations))
                responses = [
                    [first._replace(text=text), *others]
                    for (first, *others), text in zip(result.responses, texts, strict=True)
                ]
                results[number] = replace(result, responses=responses)
        return results

    def watch(
        self,
        truth: Reference,
        results: Sequence[DocumentScores],
        ablations: Sequence[Ablation],
        seed: str,
        first: int = 0,
    ) -> Iterator[tuple[DocumentScores, Ablation, Comparison]]:
        """Compare each measured document, under one ablation, with a really pruned model.

        Args:
            truth: The reference that computes the pruned model's responses.
            results: The results of `score`.
            ablations: The ablations of the results.
            seed: The seed that selects an ablation for each document.
            first: Index of the first ablation that may be selected.

        Yields:
            Each document's result, the ablation, and the comparison. Generated texts are compared
            for equality only.
        """
        for result, number, found in watch(truth, results, ablations, seed, first):
            ablation, prompt = ablations[number], result.document.prompt
            if prompt is not None and self.generation is not None:
                text = result.responses[number][0].text
                found += self.generation.compare(prompt, ablation, text)
            yield result, ablation, found

    def again(
        self, documents: Sequence[Document], ablations: Sequence[Ablation]
    ) -> list[DocumentScores]:
        """Score documents with less sharing, closer to lm-eval; results differ by rounding only.

        Args:
            documents: The documents, whose prompts are not continued.
            ablations: The ablations, including the baseline.

        Returns:
            One result per document; empty if nothing is shared, so that there is no other way.
        """
        sharing = self.engine.sharing
        less = DEPTH_ONLY if sharing.tokens else PLAIN if sharing.depth else ONE_BY_ONE
        if not documents or less == sharing:
            return []
        return self.engine.with_sharing(less).score(documents, ablations)

    @staticmethod
    def responses(document: Document) -> int:
        """Count a document's scored requests and generated texts under one ablation."""
        return len(document.requests) + (document.prompt is not None)


def checked_scorer(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    ablations: Sequence[Ablation],
    kept: Kept | None = None,
    fit: Fit = lambda engine: {},
    typical: Sequence[Ablation] = (),
) -> tuple[Scorer, list[str]]:
    """Test which computation can be shared exactly, by computing a part of it both ways.

    Args:
        engine: The engine, with full sharing; no call has changed its model yet.
        tokenizer: The model's tokenizer.
        documents: The cell's documents.
        ablations: The ablations of the cell.
        kept: Storage of verdicts on architectures and models; None for none.
        fit: Function that fits replacements of layers.
        typical: The typical ablations, as for `check`.

    Returns:
        The scorer, and lines about disabled sharing, about a measured model that no saved
        checkpoint holds, and about the model's numerical noise.
    """
    checked = check(engine, documents, ablations, kept, fit, typical)
    said = [_LESS + checked.lost] if checked.lost else []
    said += [checked.which] if checked.which else []
    if checked.unsteady:
        finer = _FINER if checked.engine.loaded.identity.is_half else ""
        said.append(f"{checked.unsteady}{finer}")
    prompts = [document.prompt for document in documents if document.prompt is not None]
    if not prompts:
        return Scorer(checked.engine, which=checked.which), said
    generation = Generation(checked.engine, tokenizer, think_end_token=prompts[0].think_end_token)
    generation, why = generation.checked(prompts[0], ablations)
    scorer = Scorer(checked.engine, generation, checked.which)
    return scorer, [*said, *([_LESS + why] if why else [])]


@dataclass(frozen=True)
class Generation:
    """Continues prompts under many ablations.

    With `together`, all ablations generate in one batch; otherwise each generates on a really
    pruned model.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    together: bool = True
    think_end_token: str | int | None = None

    @cached_property
    def _generator(self) -> TextGenerator:
        return TextGenerator(self.engine.loaded.model, self.tokenizer, self.think_end_token)

    def texts(self, prompt: Prompt, ablations: Sequence[Ablation]) -> list[str]:
        """Generate a prompt's continuation under each ablation, in order, baseline included."""
        tokens = len(self._generator.tok_encode(prompt.text))
        tokens = min(tokens, self._generator.max_length - prompt.longest)  # longer ones are cut
        lengths = self.engine.quirks.lengths
        # The prompt is read in several calls, which must be computed as lm-eval's single call.
        if not self.together or lengths.side(tokens) != lengths.side(1):
            return [self.text_apart(prompt, ablation) for ablation in ablations]
        by_ablation: dict[Ablation, str] = {}
        for group in generation_groups(self.engine, ablations, tokens + prompt.longest):
            decoding = partial(generating, self.engine, group)
            texts = self._generator.texts_of_rows(prompt, len(group), decoding)
            by_ablation |= zip(group, texts, strict=True)
        return [by_ablation[ablation] for ablation in ablations]

    def text_apart(self, prompt: Prompt, ablation: Ablation, seed: int | None = None) -> str:
        """Generate a prompt's continuation with a really pruned model, as lm-eval does.

        A `seed` perturbs the model's embeddings by their rounding.
        """
        model = self.engine.without(ablation).loaded.model
        with nullcontext() if seed is None else shaken(model, seed):
            (text,) = TextGenerator(model, self.tokenizer, self.think_end_token).texts([prompt])
        return text

    def checked(
        self, prompt: Prompt, ablations: Sequence[Ablation]
    ) -> tuple[Generation, str | None]:
        """Test with a few tokens whether generating together gives equal texts.

        In half precision rounding depends on the batch size, also within lm-eval, so half of the
        texts may differ there. Returns the generation to use, and a line on disabled sharing or
        None.
        """
        if not self.engine.sharing.depth:  # each ablation is another model, as was said
            return replace(self, together=False), None
        # Stop strings would leave little to compare where a text begins with one.
        settings = {**prompt.limited_to(CHECKED_TOKENS).settings, "until": []}
        short = replace(prompt, settings=settings)
        apart = replace(self, together=False)
        truth = apart.texts(short, ablations)
        try:
            found = self.texts(short, ablations)
        except Exception as error:  # a model may refuse to generate under several ablations
            if refused(error) is None:
                raise
            name = type(self.engine.loaded.model).__name__
            why = in_words(error, DEPTH_ONLY, name)
            return apart, f"each ablation generates alone, because {why}"
        differing = [
            ablation
            for ablation, ours, theirs in zip(ablations, found, truth, strict=True)
            if ours != theirs and not self.is_unsteady(short, ablation, theirs)
        ]
        if len(differing) > (len(truth) / 2 if self.engine.loaded.identity.is_half else 0):
            return apart, f"generating together changes {len(differing)} of {len(truth)} texts"
        return self, None

    def compare(self, prompt: Prompt, ablation: Ablation, text: str | None) -> Comparison:
        """Compare a text with that of a really pruned model."""
        theirs = self.text_apart(prompt, ablation)
        if text == theirs:
            return Comparison(1)
        if self.is_unsteady(prompt, ablation, theirs):
            return Comparison(1, unsteady=1)
        wrong = f"{ablation.name}: {text!r} together, {theirs!r} on the really pruned model"
        return Comparison(1, wrong=wrong)

    def is_unsteady(self, prompt: Prompt, ablation: Ablation, text: str) -> bool:
        """Check whether rounding of its embeddings alone changes a pruned model's text."""
        return any(self.text_apart(prompt, ablation, seed) != text for seed in range(DRAWS))


_ROW_SIZES = "rows"


def with_fastest_rows(engine: Engine) -> Engine:
    """Return an engine with the fastest row size for its model on this machine.

    Args:
        engine: The engine; no call has changed its model yet, and none does here.

    Returns:
        The engine with that size, or the same engine if the size makes no difference.
    """
    if not matters(engine):
        return engine
    config = engine.loaded.model.config.get_text_config()
    about = (
        platform.node(),
        torch.__version__,
        torch.get_num_threads(),
        hardware(engine.loaded.device),
        str(engine.loaded.model.dtype),
        engine.class_name,
        config.hidden_size,
        getattr(config, "intermediate_size", None),
    )
    key = content_hash(about)
    # Parallel workers must have rows of one size, which affects the last digits of results.
    with FileLock(own_folder(_ROW_SIZES) / f"{key[:32]}.lock"):
        nodes = recall(_ROW_SIZES, key).get("nodes")
        if nodes is None:
            nodes = fastest(engine)
            keep(_ROW_SIZES, key, {"nodes": nodes})
    return replace(engine, row_tokens=int(nodes))
