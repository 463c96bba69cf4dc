"""What ablations say about documents: the engine's scores and lm-eval's generation, joined."""

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
"""Tokens that the check lets every ablation generate."""
_LESS = "measured with less sharing: "
_FINER = ". The report counts them; --dtype float32 avoids it"
DRAWS = 8
"""Times that a text is generated again with embeddings moved by rounding."""


@dataclass(frozen=True)
class Scorer:
    """Scores documents, and continues the prompts of those that have one.

    `generation` is None where no document has one; `which` says where what is measured is no saved
    checkpoint.
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
        """Score documents under ablations that include the baseline: one result a document.

        `progress` is called with how many responses have come, `responses` of them a document.
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
        """Answer measured documents again on a really pruned model, each under one ablation.

        Args:
            truth: Answers them.
            results: What `score` found.
            ablations: Under which ablations.
            seed: Decides which ablation,
            first: from this one on.

        Yields:
            Each document's result, the ablation, and the comparison; of a generated text only
            whether it is the same.
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
        """Score documents in another way, equal but for rounding: sharing less, as lm-eval does.

        Args:
            documents: The documents; of their prompts nothing is made.
            ablations: Under which ablations, the baseline among them.

        Returns:
            One result a document; none where nothing is shared, and there is no other way.
        """
        sharing = self.engine.sharing
        less = DEPTH_ONLY if sharing.tokens else PLAIN if sharing.depth else ONE_BY_ONE
        if not documents or less == sharing:
            return []
        return self.engine.with_sharing(less).score(documents, ablations)

    @staticmethod
    def responses(document: Document) -> int:
        """Count the requests to score and texts to generate of a document under one ablation."""
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
    """Find out what can be shared exactly, by computing a little of it both ways.

    Args:
        engine: The engine, with full sharing; no call has changed its model yet.
        tokenizer: The model's tokenizer.
        documents: The cell's documents.
        ablations: What will be removed.
        kept: Where verdicts on architectures and models are kept.
        fit: Fits what stands in for layers.
        typical: As for `check`.

    Returns:
        The scorer to use, and lines that say which sharing was lost, which model is measured where
        it is no saved checkpoint, and how steady the model is.
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

    `together` says whether all ablations generate in one batch; otherwise each does on a really
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
        """Continue a prompt under ablations, the baseline among them: one text each, in order."""
        tokens = len(self._generator.tok_encode(prompt.text))
        tokens = min(tokens, self._generator.max_length - prompt.longest)  # longer ones are cut
        lengths = self.engine.quirks.lengths
        # The prompt is read in several calls, which must all be computed as the one of lm-eval.
        if not self.together or lengths.side(tokens) != lengths.side(1):
            return [self.text_apart(prompt, ablation) for ablation in ablations]
        by_ablation: dict[Ablation, str] = {}
        for group in generation_groups(self.engine, ablations, tokens + prompt.longest):
            decoding = partial(generating, self.engine, group)
            texts = self._generator.texts_of_rows(prompt, len(group), decoding)
            by_ablation |= zip(group, texts, strict=True)
        return [by_ablation[ablation] for ablation in ablations]

    def text_apart(self, prompt: Prompt, ablation: Ablation, seed: int | None = None) -> str:
        """Continue a prompt with a really pruned model, as lm-eval does.

        A `seed` moves the model's embeddings by their rounding.
        """
        model = self.engine.without(ablation).loaded.model
        with nullcontext() if seed is None else shaken(model, seed):
            (text,) = TextGenerator(model, self.tokenizer, self.think_end_token).texts([prompt])
        return text

    def checked(
        self, prompt: Prompt, ablations: Sequence[Ablation]
    ) -> tuple[Generation, str | None]:
        """Generate a few tokens both ways, and stay together if the texts are equal.

        In half precision rounding differs with the size of a batch, also within lm-eval, so half of
        the texts may differ there. With what to use comes one line on what was lost and why, if so.
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
        """Hold a text against what a really pruned model generates."""
        theirs = self.text_apart(prompt, ablation)
        if text == theirs:
            return Comparison(1)
        if self.is_unsteady(prompt, ablation, theirs):
            return Comparison(1, unsteady=1)
        wrong = f"{ablation.name}: {text!r} together, {theirs!r} on the really pruned model"
        return Comparison(1, wrong=wrong)

    def is_unsteady(self, prompt: Prompt, ablation: Ablation, text: str) -> bool:
        """Say whether rounding alone, of its embeddings, lets a pruned model continue otherwise."""
        return any(self.text_apart(prompt, ablation, seed) != text for seed in range(DRAWS))


_ROW_SIZES = "rows"


def with_fastest_rows(engine: Engine) -> Engine:
    """Give an engine the size of row that is fastest for its model on this machine.

    Args:
        engine: The engine; no call has changed its model yet, and none does here.

    Returns:
        The engine to use: that one where the size makes no difference.
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
    # Workers side by side have rows of one size, on which the last digits of answers depend.
    with FileLock(own_folder(_ROW_SIZES) / f"{key[:32]}.lock"):
        nodes = recall(_ROW_SIZES, key).get("nodes")
        if nodes is None:
            nodes = fastest(engine)
            keep(_ROW_SIZES, key, {"nodes": nodes})
    return replace(engine, row_tokens=int(nodes))
