"""Define the command compare, which compares models by their logged answers."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import click
from pydantic import Field

from tracker.cli import options
from tracker.cli.commands import main
from tracker.cli.printing import print_failures, runnable_command
from tracker.cli.terminal import ProgressDisplay, echo, echo_all, print_table


class MarginType(options.TextType):
    """Option type for a margin such as 1pp, 0.02 or arc_easy=2pp."""

    name = "margin"

    def read(self, text: str) -> tuple[str, float]:
        """Parse a margin; return the benchmark (empty for all) and the margin as a fraction."""
        match = re.fullmatch(r"(?:(.+)=)?(\d*\.?\d+)\s*(pp)?", text.strip(), re.ASCII)
        margin = float(match[2]) / (100 if match[3] else 1) if match else 0.0
        if not match or not 0 < margin < 1:
            raise ValueError(f"invalid margin {text!r}; expected e.g. 1pp, 0.02 or arc_easy=2pp")
        return match[1] or "", margin


class CompareOptions(options.CommandOptions):
    """Options of `tracker compare`."""

    within: Annotated[tuple[tuple[str, float], ...], MarginType()] = ()
    """Largest acceptable loss or gain, e.g. 1pp, or arc_easy=2pp for one benchmark. It makes the
    command a release gate: exit code 0 if every model is equivalent or better, 3 if one is worse, 4
    if it is open. May be given several times."""
    metric: Annotated[tuple[str, ...], options.WordType()] = ()
    """Metric to compare, e.g. acc_norm or choice_probability (default: all logged metrics). May be
    given several times."""
    allow_different: Annotated[tuple[str, ...], options.WordType()] = ()
    """Setting that may differ between the models, e.g. num_fewshot. May be given several times."""
    form: Annotated[str, click.Choice(("text", "md", "json", "html"))] = Field(
        "text", alias="format"
    )
    """Format. md: a comment for a pull request. html: a page with the lost documents."""
    output: Path | None = None
    """File to write (default: print)."""
    track: options.Backends = None
    """Tracking backends that get the page and the table as a run, comma-separated: mlflow, wandb,
    wandb:ENTITY/PROJECT (default: none)."""
    plan: bool = False
    """Print how many documents a gate needs, and compare nothing."""
    agreement: Annotated[float, click.FloatRange(0, 1, max_open=True)] = 0.9
    """Expected share of documents that both models answer equally well, for --plan."""
    comparisons: Annotated[int, click.IntRange(min=1)] = 1
    """Number of models times benchmarks times metrics that are decided together, for --plan."""


@main.command()
@options.sources_argument
@options.add_options(CompareOptions, *CompareOptions.model_fields)
@options.results_option
def compare(
    sources: tuple[str, ...],
    within: tuple[tuple[str, float], ...],
    form: str,
    output: Path | None,
    track: tuple[str, ...] | None,
    plan: bool,
    agreement: float,
    comparisons: int,
    results: Path,
    **settings: tuple[str, ...],
) -> None:
    """Compare models with the first one, on the same documents.

    Each of the SOURCES is a folder or file of lm_eval --log_samples or lighteval --save-details, or
    a run as FOLDER:CELL:CHANGE of a results folder or data set, e.g.
    results:SmolLM2-135M-Instruct--arc_easy:layer:3. The change 'intact' is the intact model. Every
    verdict holds with 95 % confidence for all differences together.

    \b
    Examples:
      tracker compare lm-eval/original lm-eval/int4
      tracker compare lm-eval/original lm-eval/int4 lm-eval/int8 --within 1pp --format md
      tracker compare A B --within 1pp --within arc_easy=2pp --format html --output compare.html
      tracker compare results:SmolLM2-135M-Instruct:intact results:SmolLM2-135M-Instruct:layer:3
      tracker compare --plan --within 1pp --agreement 0.93
    """
    from tracker import api

    margins = dict(within)
    if plan:
        _print_plan(margins, agreement, comparisons)
        return
    comparison = api.compare(
        *sources, within=margins, progress=ProgressDisplay(error=True), **settings
    )
    from tracker.comparison import display
    from tracker.ledger.files import write_text
    from tracker.team.reports import publish_page

    build = partial(display.build_page, comparison)
    locations, errors = publish_page(build, track or (), results, ["tracker"])
    if output is not None:
        write_text(output, display.WRITERS[form](comparison))
    elif form != "text":
        click.echo(display.WRITERS[form](comparison), nl=False)
    else:
        print_table(table := display.comparison_table(comparison))
        echo_all(*table.notes, *display.sentences(comparison))
    for location in locations.values():
        echo(f"published: {runnable_command(location)}", error=True)
    print_failures("not published", errors)
    sys.exit(comparison.exit_code or (1 if errors else 0))


def _print_plan(margins: dict[str, float], agreement: float, comparisons: int) -> None:
    """Print the number of documents that show equivalence of equal models."""
    from tracker.stats.accuracy import TEST_POWER, OutcomeVariance

    if not margins:
        raise click.UsageError("--plan needs a margin, for example: --plan --within 1pp")
    variance = OutcomeVariance(1 - agreement, binary=True)
    for benchmark, margin in margins.items():
        count = variance.count_equivalence_documents(margin, comparisons)
        subject = f"{count:,} documents of {benchmark or 'each benchmark'} show that equal models"
        echo(f"{subject} are equivalent within {100 * margin:g} pp in {TEST_POWER:.0%} of cases")
