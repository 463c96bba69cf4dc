"""Score documents and generate texts under many ablations."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import product
from typing import TYPE_CHECKING

import torch
from filelock import FileLock

from tracker.benchmarks.generation import TextGenerator
from tracker.engine.refusal import refusal_reason
from tracker.engine.scoring.generation import generation_groups, prepare_generation
from tracker.engine.scoring.model import DEPTH_ONLY, ONE_BY_ONE, PLAIN
from tracker.engine.scoring.row_size import find_row_size, is_worth_timing
from tracker.engine.scoring.sweep import DocumentScores, Engine
from tracker.engine.selfcheck.check import (
    Fit,
    VerdictStore,
    check_sharing,
    compare_watched_documents,
)
from tracker.engine.selfcheck.reference import (
    Comparison,
    Reference,
    describe_error,
    perturb_embeddings,
)
from tracker.ledger.cache import Drafts, keep, private_folder, recall
from tracker.models.devices import hardware_name
from tracker.schema.changes import Ablation
from tracker.schema.documents import Document, GeneratedText, Prompt
from tracker.schema.errors import CellError
from tracker.schema.provenance import content_hash, package_versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SampledTexts = tuple[GeneratedText, ...]
"""The texts that one ablation generates for a prompt, one per sample."""
CHECKED_TOKENS = 16
"""Number of tokens that the check of generation generates under each ablation."""
_LESS_SHARING = "measured with less sharing: "
_FLOAT32_ADVICE = "The report counts documents that rounding affects; --dtype float32 avoids this"
ROUNDING_DRAWS = 8
"""Number of times that a text is generated again with embeddings perturbed by rounding."""


@dataclass(frozen=True)
class Scorer:
    """Scorer of documents, which also generates texts for the prompts of generation tasks.

    `generation` is None if no document has a prompt. `checkpoint_note` is a message for the user if
    an ablated model cannot be saved as a checkpoint, else None.
    """

    engine: Engine
    generation: Generation | None = None
    checkpoint_note: str | None = None

    def score(
        self,
        documents: Sequence[Document],
        ablations: Sequence[Ablation],
        progress: Callable[[int], None],
    ) -> list[DocumentScores]:
        """Score documents under all ablations and the baseline; return one result per document.

        After each step, `progress` is called with the number of new responses.
        """
        results = self.engine.score(documents, ablations, progress)
        for number, result in enumerate(results):
            if result.document.prompt is not None:
                texts = self.write_texts(result.document, ablations)
                progress(len(ablations))
                pairs = zip(result.responses, texts, strict=True)
                responses = [[r[0]._replace(texts=texts), *r[1:]] for r, texts in pairs]
                results[number] = replace(result, responses=responses)
        return results

    def write_texts(self, document: Document, ablations: Sequence[Ablation]) -> list[SampledTexts]:
        """Generate the texts of a document with a prompt under each ablation."""
        assert document.prompt is not None
        assert self.generation is not None
        return self.generation.generate(document.prompt, ablations)

    def clear_drafts(self) -> None:
        """Delete the cached texts, which only an interrupted run needs."""
        if self.generation is not None and self.generation.drafts is not None:
            self.generation.drafts.clear()

    def compare_results(
        self,
        reference: Reference,
        results: Sequence[DocumentScores],
        ablations: Sequence[Ablation],
        seed: str,
        first_ablation: int,
    ) -> dict[tuple[int, Ablation], Comparison]:
        """Compare responses with a pruned model's responses, for one random ablation per document.

        Args:
            reference: Object that computes the responses of a pruned copy of the model.
            results: The results of `score` for one task.
            ablations: The ablations under which the documents were scored.
            seed: Seed for drawing the ablations.
            first_ablation: Index of the first ablation that can be drawn.

        Returns:
            (Index of the document, ablation) → result of the comparison. Generated texts are
            compared for equality only.

        Raises:
            CellError: A response differs from the pruned model's response by more than rounding.
        """
        comparisons = {}
        for result, number, comparison in compare_watched_documents(
            reference, results, ablations, seed, first_ablation
        ):
            ablation, prompt = ablations[number], result.document.prompt
            if prompt is not None and self.generation is not None:
                texts = result.responses[number][0].texts
                comparison += self.generation.compare(prompt, ablation, texts)
            if comparison.wrong is not None:
                raise CellError(
                    "stopped, because computing ablations together gives a wrong result here: "
                    f"{comparison.wrong}. Do not trust the stored results of this benchmark; "
                    "please report this line"
                )
            comparisons[result.document.index, ablation] = comparison
        return comparisons

    def score_again(
        self, documents: Sequence[Document], ablations: Sequence[Ablation]
    ) -> list[DocumentScores]:
        """Score documents a second time, to measure rounding errors.

        In the second computation, ablations and requests share fewer intermediate results.

        Args:
            documents: The documents to score. No texts are generated.
            ablations: The ablations, including the baseline.

        Returns:
            One result per document. The list is empty if the first computation shared no
            intermediate results.
        """
        sharing = self.engine.sharing
        reduced = DEPTH_ONLY if sharing.tokens else PLAIN if sharing.depth else ONE_BY_ONE
        if not documents or reduced == sharing:
            return []
        return self.engine.with_sharing(reduced).score(documents, ablations)

    @staticmethod
    def count_responses(document: Document) -> int:
        """Count the log-likelihoods and generated texts of a document under one ablation."""
        return len(document.requests) + (document.prompt is not None)


def checked_scorer(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    ablations: Sequence[Ablation],
    verdicts: VerdictStore | None = None,
    fit: Fit = lambda engine: {},
    typical: Sequence[Ablation] = (),
    generating: Sequence[Ablation] | None = None,
) -> tuple[Scorer, list[str]]:
    """Test whether computing ablations together changes results, and build a scorer.

    Args:
        engine: The engine with an unchanged model.
        tokenizer: The model's tokenizer.
        documents: All documents of the benchmark that are measured.
        ablations: All ablations that are measured.
        verdicts: Cache of earlier test results; None = no cache.
        fit: Function that fits the replacements (e.g. linear maps) of ablated layers.
        typical: Ablations for the test on a small random model; if empty, `ablations` are tested.
        generating: Ablations under which texts are generated; None = `ablations`.

    Returns:
        The scorer, and notes for the user, e.g. that ablations are computed separately.
    """
    result = check_sharing(engine, documents, ablations, verdicts, fit, typical)
    notes = [_LESS_SHARING + result.sharing_note] if result.sharing_note else []
    notes += [result.checkpoint_note] if result.checkpoint_note else []
    if result.unsteady_note:
        advice = f". {_FLOAT32_ADVICE}" if result.engine.loaded.identity.is_half else ""
        notes.append(f"{result.unsteady_note}{advice}")
    prompts = [document.prompt for document in documents if document.prompt is not None]
    scorer = Scorer(result.engine, checkpoint_note=result.checkpoint_note)
    if not prompts:
        return scorer, notes
    generation = Generation(result.engine, tokenizer, think_end_token=prompts[0].think_end_token)
    generation, reason = generation.choose_mode(prompts[0], generating or ablations)
    scorer = replace(scorer, generation=replace(generation, drafts=Drafts()))
    return scorer, [*notes, _LESS_SHARING + reason] if reason else notes


@dataclass(frozen=True)
class Generation:
    """Generator of continuations of prompts under many ablations.

    If `together` is true, the continuations under all ablations are generated in one batch. If
    `together` is false, a pruned copy of the model generates the continuations of each ablation.
    `drafts` stores texts, so that an interrupted run can continue; None = no storage.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    together: bool = True
    think_end_token: str | int | None = None
    drafts: Drafts | None = None

    @cached_property
    def _generator(self) -> TextGenerator:
        return self._open_generator(self.engine.loaded.model)

    def _open_generator(self, model: PreTrainedModel) -> TextGenerator:
        settings = {"tokenizer": self.tokenizer, "think_end_token": self.think_end_token}
        return TextGenerator(model, "causal", **settings)

    def generate(self, prompt: Prompt, ablations: Sequence[Ablation]) -> list[SampledTexts]:
        """Generate the continuations of a prompt under each ablation."""
        tokens = len(self._generator.tok_encode(prompt.text))
        tokens = min(tokens, self._generator.max_length - prompt.max_tokens)  # the rest is cut
        lengths = self.engine.quirks.lengths
        # The prompt is read in several calls, whose results must equal those of lm-eval's one call.
        if not self.together or lengths.side(tokens) != lengths.side(1):
            separate, numbers = partial(self.generate_separately, prompt), range(prompt.samples)
            return [
                self._recall_or_generate(prompt, [(a, n) for n in numbers], partial(separate, a))
                for a in ablations
            ]
        texts: dict[tuple[Ablation, int], GeneratedText] = {}
        sizes = (tokens + prompt.max_tokens, prompt.samples)
        for group, samples in generation_groups(self.engine, ablations, *sizes):
            rows = list(product(group, samples))
            decoding = partial(prepare_generation, self.engine, group, n_samples=len(samples))
            row_samples = [sample for _, sample in rows]
            generate = partial(self._generator.generate_texts, prompt, row_samples, decoding)
            texts |= zip(rows, self._recall_or_generate(prompt, rows, generate), strict=True)
        return [tuple(texts[a, sample] for sample in range(prompt.samples)) for a in ablations]

    def _recall_or_generate(
        self,
        prompt: Prompt,
        rows: Sequence[tuple[Ablation, int]],
        generate: Callable[[], Sequence[GeneratedText]],
    ) -> SampledTexts:
        """Return the cached texts of an interrupted run, or generate new texts.

        `rows` contains the ablation and the sample number of each text. `generate` is called if the
        cache lacks the texts.
        """
        # A fitted replacement also depends on the texts that it was fitted to.
        if self.drafts is None or any(ablation.has_replacements for ablation, _ in rows):
            return tuple(generate())
        model = self.engine.loaded
        machine = [hardware_name(model.device), package_versions(), str(self.engine.sharing)]
        settings, names = asdict(prompt), [(ablation.name, sample) for ablation, sample in rows]
        identity = [model.identity.fingerprint, model.identity.dtype]
        key = content_hash([identity, machine, settings, names])
        if (drafts := self.drafts.recall(key)) is not None:
            return tuple(GeneratedText(text, n, cut, tuple(e)) for text, n, cut, e in drafts)
        texts = tuple(generate())
        self.drafts.keep(key, [list(text) for text in texts])
        return texts

    def generate_separately(
        self, prompt: Prompt, ablation: Ablation, seed: int | None = None
    ) -> SampledTexts:
        """Generate continuations of a prompt with a pruned copy of the model.

        If `seed` is given, the token embeddings get random noise as small as rounding errors.
        """
        model = self.engine.ablate(ablation).loaded.model
        generator = self._open_generator(model)
        with nullcontext() if seed is None else perturb_embeddings(model, seed):
            return tuple(generator.generate_texts(prompt, range(prompt.samples)))

    def choose_mode(
        self, prompt: Prompt, ablations: Sequence[Ablation]
    ) -> tuple[Generation, str | None]:
        """Choose whether texts are generated in one batch or separately for each ablation.

        The method generates short texts both in one batch and separately. One batch is chosen if
        the texts are equal. In half precision, up to half of the texts may differ.

        Returns the generator to use, and a message if generating in one batch fails this test.
        """
        if not self.engine.sharing.depth:  # each ablation is another model; the check reported it
            return replace(self, together=False), None
        # Stop strings would leave little to compare where a text begins with one.
        settings = {**prompt.with_limit(CHECKED_TOKENS).settings, "until": []}
        short = replace(prompt, settings=settings, samples=1, budgets=())
        separate = replace(self, together=False)
        true_texts = separate.generate(short, ablations)
        try:
            texts = self.generate(short, ablations)
        except Exception as error:  # a model may refuse to generate under several ablations
            if refusal_reason(error) is None:
                raise
            name = type(self.engine.loaded.model).__name__
            reason = describe_error(error, DEPTH_ONLY, name)
            return separate, f"texts are generated separately for each ablation, because {reason}"
        n_changed = sum(
            text != true_text and not self.is_unsteady(short, ablation, true_text)
            for ablation, text, true_text in zip(ablations, texts, true_texts, strict=True)
        )
        if n_changed > (len(texts) / 2 if self.engine.loaded.identity.is_half else 0):
            reason = f"generation in one batch changes {n_changed} of {len(texts)} texts"
            return separate, reason
        return self, None

    def compare(self, prompt: Prompt, ablation: Ablation, texts: SampledTexts) -> Comparison:
        """Compare generated texts with the texts that a pruned copy of the model generates."""
        true_texts = self.generate_separately(prompt, ablation)
        if texts == true_texts:
            return Comparison(1)
        if self.is_unsteady(prompt, ablation, true_texts):
            return Comparison(1, unsteady=1)
        pairs = ((a.text, b.text) for a, b in zip(texts, true_texts, strict=True) if a != b)
        text, true_text = next(pairs)
        wrong = (
            f"under {ablation.name}, the text is {text!r}, but the pruned model generates "
            f"{true_text!r}"
        )
        return Comparison(1, wrong=wrong)

    def is_unsteady(self, prompt: Prompt, ablation: Ablation, texts: SampledTexts) -> bool:
        """Return whether noise as small as rounding errors changes the generated texts."""
        seeds = range(ROUNDING_DRAWS)
        return any(self.generate_separately(prompt, ablation, seed) != texts for seed in seeds)


_ROW_SIZES = "rows"


def set_row_size(engine: Engine) -> Engine:
    """Choose how many tokens an engine puts into each batch row, so that scoring is fast.

    The fastest number (row size) depends on the model and on this machine.

    Args:
        engine: The engine, with an unchanged model.

    Returns:
        The engine with the fastest row size.
    """
    if not is_worth_timing(engine):
        return engine
    config = engine.loaded.model.config.get_text_config()
    key_parts = (
        platform.node(),
        torch.__version__,
        torch.get_num_threads(),
        hardware_name(engine.loaded.device),
        str(engine.loaded.model.dtype),
        engine.class_name,
        config.hidden_size,
        getattr(config, "intermediate_size", None),
    )
    key = content_hash(key_parts)
    # Parallel workers must use the same row size, because it affects the last digits of results.
    with FileLock(private_folder(_ROW_SIZES) / f"{key[:32]}.lock"):
        nodes = recall(_ROW_SIZES, key).get("nodes")
        if nodes is None:
            nodes = find_row_size(engine)
            keep(_ROW_SIZES, key, {"nodes": nodes})
    return replace(engine, row_tokens=int(nodes))
