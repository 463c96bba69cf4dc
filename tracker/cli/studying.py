"""Commands that answer a question: one a study."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tracker.cli.commands import main
from tracker.cli.options import Place, running
from tracker.cli.printing import print_end, print_finding
from tracker.cli.terminal import Show


@main.group()
def study() -> None:
    """Answer a question of the paper or of its reviewers over an experiment file.

    A study measures just what its answer lacks, through the ledger and the tracking backends as
    'tracker run' does, prints the answer, and adds a section to the report.

    \b
    Examples:
      tracker study audit experiments/demo.yaml
      tracker study calibration experiments/demo.yaml
      tracker study joint experiments/demo.yaml
      tracker study rescale experiments/replaced.yaml
      tracker study snowball experiments/demo.yaml
      tracker study theorem experiments/demo.yaml --epsilon 1e-8
    """


def _study(name: str, help_text: str, *options: Callable[[Any], Any]) -> None:
    """Register the command of a study, with the options that it alone has."""

    def command(
        experiment: Path,
        results: Path,
        track: tuple[str, ...] | None,
        device: str,
        memory: int | None,
        publish_documents: bool,
        trust_remote_code: bool,
        **settings: Any,
    ) -> None:
        from tracker import api

        done = api.study(
            name,
            experiment,
            results=results,
            track=track,
            device=device,
            memory=memory,
            trust_remote_code=trust_remote_code,
            publish_documents=publish_documents,
            progress=Show(),
            **settings,
        )
        print_finding(done.finding)
        print_end(done.outcome, done.report)
        sys.exit(done.outcome.exit_code)

    command.__doc__ = help_text
    wrapped = running(command)
    for option in reversed(options):
        wrapped = option(wrapped)
    study.command(name)(click.argument("experiment", type=Place())(wrapped))


_study(
    "audit",
    """Set every proxy of a layer's relevance beside the accuracy that its removal costs.

    Measures the drop of each whole layer in EXPERIMENT, and nine proxies of it: cosine score,
    angular distance, relative update, first-order Taylor, logit-lens changes, perplexity, KL and
    Jensen-Shannon divergence, the gold answer's log-probability. Says how well each orders the
    layers, beside chance, and for how many forward passes; with two benchmarks or more also whether
    relevance depends on the task.

    \b
    Examples:
      tracker study audit experiments/demo.yaml
      tracker study audit experiments/demo.yaml --results results --track none
    """,
)

_study(
    "calibration",
    """Say how many documents until the ranking of layers is stable.

    Draws random samples of the measured documents, and says how well two of them that share none
    agree on the order of the layers: by the accuracy drop, and by the proxies. Measures just what
    the file asks for; the more documents, the better the answer.

    \b
    Examples:
      tracker study calibration experiments/demo.yaml
      tracker study calibration experiments/demo.yaml --reliability 0.8
    """,
    click.option(
        "--reliability",
        type=float,
        default=0.9,
        show_default=True,
        help="The rank correlation of two samples that is wanted.",
    ),
)

_study(
    "joint",
    """Say whether the drops of two layers add up when both are removed.

    Removes every two of the file's layers together, and sets what both cost beside the sum of what
    each costs alone. 30 layers have 435 pairs, about twelve times the work of the file itself.

    \b
    Examples:
      tracker study joint experiments/demo.yaml
      tracker study joint experiments/demo.yaml --track none
    """,
)

_study(
    "rescale",
    """Is what a removal costs only missing scale?

    Each layer is removed, and replaced by a factor, by its mean update and by a linear map of its
    input, all fitted on other documents; how much of the drop does each win back?

    \b
    Example:
      tracker study rescale experiments/replaced.yaml
    """,
)

_study(
    "snowball",
    """Follow what a layer's removal changes through all later layers.

    Each layer is removed, and perturbed by as much in random directions; the relative difference
    to the intact residual stream behind each later layer says whether it grows. The file's
    'layer' should hold every layer: their accuracy drops are set beside the growth.

    \b
    Examples:
      tracker study snowball experiments/demo.yaml
      tracker study snowball experiments/demo.yaml --draws 8
    """,
    click.option(
        "--draws",
        type=click.IntRange(1, 1000),
        default=2,
        show_default=True,
        help="Random directions for each layer and token; each costs as much as all removals.",
    ),
)

_study(
    "theorem",
    """Build a model whose layer with the lowest cosine score decides every answer.

    For the documents of EXPERIMENT's benchmarks and each ε, a transformer of five layers is written
    down (its model gives the tokenizer alone) and measured as any model is: layer 2 has the cosine
    score ε, the lowest; the model answers every document, and none without layer 2. The checkpoints
    stay in RESULTS/studies/theorem, for transformers or lm_eval.

    \b
    Examples:
      tracker study theorem experiments/demo.yaml
      tracker study theorem experiments/demo.yaml --epsilon 1e-3 --epsilon 1e-8
    """,
    click.option(
        "--epsilon",
        type=float,
        multiple=True,
        help="Cosine score of the deciding layer; may be given again. Default: 1e-1, 1e-2, 1e-4, "
        "1e-6 and 1e-8.",
    ),
)
