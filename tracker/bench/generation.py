"""Compare generation under all ablations at once with one generation per changed model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tracker.bench.loops import choose_ablations, extrapolate_seconds, time_call
from tracker.benchmarks.encoder import huggingface_model
from tracker.benchmarks.generation import generate_with_lm_eval
from tracker.engine.scoring.sweep import Engine
from tracker.measuring.progress import Progress
from tracker.measuring.scorer import Generation, SampledTexts
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.documents import Document, Prompt
from tracker.schema.provenance import describe_machine, package_versions
from tracker.schema.text_templates import open_templates

GENERATION_BATCH_SIZES = (1, 8)
"""Numbers of texts that lm-eval generates in one batch; the faster is timed."""


@dataclass(frozen=True)
class GenerationBench:
    """Timings of generation under all ablations at once, and of lm-eval's generation one by one.

    Attributes:
        together_seconds: Seconds to generate all texts under all ablations at once.
        tokens: Number of tokens of these texts.
        loop_seconds: Estimated seconds for all ablations one by one, extrapolated from
            `evaluations`.
        batch_size: Number of texts in a batch of lm-eval.
        evaluations: Ablation → seconds that lm-eval took.
        differences: Number of texts that differ between the two.
        compared: Number of texts that were compared; 0 for sampled texts.
    """

    benchmark: str
    documents: int
    ablations: int
    samples: int
    dtype: str
    together_seconds: float
    tokens: int
    loop_seconds: float
    batch_size: int
    evaluations: dict[str, float]
    differences: int
    compared: int
    machine: dict[str, str]
    versions: dict[str, str]

    def text(self) -> str:
        """Format the timings as text for the terminal."""
        template = open_templates("tracker.bench").get_template("generation.txt.j2")
        return template.render(result=self)


def run_generation_bench(
    engine: Engine,
    documents: Sequence[Document],
    ablations: Sequence[Ablation],
    title: str,
    progress: Progress,
) -> GenerationBench:
    """Time the generation of the documents' texts, together and one changed model at a time."""
    prompts = [document.prompt for document in documents if document.prompt is not None]
    loaded, first = engine.loaded, prompts[0]
    generation = Generation(engine, loaded.tokenizer, think_end_token=first.think_end_token)
    progress.say("lm-eval: trying batch sizes on the baseline")
    trials = {size: _run_lm_eval(engine, INTACT, prompts, size) for size in GENERATION_BATCH_SIZES}
    batch_size = min(trials, key=lambda size: trials[size][0])
    progress.start(f"{title}: generation", len(prompts))
    texts: list[list[SampledTexts]] = []

    def generate_together() -> None:
        for prompt in prompts:
            texts.append(generation.generate(prompt, ablations))
            progress.advance(1)

    seconds, _ = time_call(generate_together)
    progress.finish()
    loop = {INTACT.name: trials[batch_size]}
    for ablation in choose_ablations(ablations):
        progress.say(f"lm-eval: {ablation.name}")
        loop[ablation.name] = _run_lm_eval(engine, ablation, prompts, batch_size)
    timings = {name: duration for name, (duration, _) in loop.items()}
    columns = {ablation.name: column for column, ablation in enumerate(ablations)}
    pairs = [
        (document_texts[columns[name]][0].text, text)
        for name, (_, plain_texts) in loop.items()
        for document_texts, text in zip(texts, plain_texts, strict=not first.is_sampled)
        if not first.is_sampled
    ]
    all_texts = [text for by_ablation in texts for group in by_ablation for text in group]
    return GenerationBench(
        benchmark=title,
        documents=len(prompts),
        ablations=len(ablations),
        samples=first.samples,
        dtype=loaded.identity.dtype,
        together_seconds=seconds,
        tokens=sum(text.tokens or 0 for text in all_texts),
        loop_seconds=extrapolate_seconds(timings, len(ablations)),
        batch_size=batch_size,
        evaluations=timings,
        differences=sum(text != plain_text for text, plain_text in pairs),
        compared=len(pairs),
        machine=describe_machine(),
        versions=package_versions(),
    )


def _run_lm_eval(
    engine: Engine, ablation: Ablation, prompts: Sequence[Prompt], batch_size: int
) -> tuple[float, list[str]]:
    """Generate the texts of all prompts with lm-eval and a really changed model."""
    changed = engine.ablate(ablation).loaded
    model = huggingface_model(changed.model, changed.tokenizer, batch_size)
    repeated = [prompt for prompt in prompts for _ in range(prompt.samples)]
    return time_call(lambda: generate_with_lm_eval(model, repeated))
